"""Run directories: their names, locks, ``config.yaml``, and whether a run is finished.

    outputs/train/NAME-KEY    config.yaml, model.safetensors, metrics.csv, summary.json, log.txt
    outputs/eval/NAME-KEY     config.yaml, plan.json, samples.parquet, results.json, log.txt

KEY is a hash of all that decides the outcome. So the same command finds the same directory: it goes
on where it was interrupted, and a finished run is not run again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from advbench import config
from advbench.config.words import command, word
from advbench.errors import UserError
from advbench.files import remove_temporary, write_text
from advbench.runs import manifest
from advbench.runs.deciding import deciding
from advbench.runs.manifest import CONFIG, SUMMARY

OUTPUTS = Path("outputs")
WEIGHTS = "model.safetensors"
BASE = "base.safetensors"
"""In a run that put its defense on a finished undefended model: that model's weights."""
WITHOUT_WORK = {".lock", "log.txt", "plan.json", BASE, "epoch.pt", CONFIG}
"""Files that a run has before it has done anything."""


def kind_of(kept: Mapping[Any, Any]) -> Literal["train", "eval"] | None:
    """The subcommand of a run's config; None if it is something else."""
    return "train" if "recipe" in kept else "eval" if "protocol" in kept else None


def kind_in(folder: Path) -> Literal["train", "eval"] | None:
    """The subcommand of the run in the directory; None if it is not a run."""
    return kind_of(config.read(folder / CONFIG)) if (folder / CONFIG).is_file() else None


def named_by_key(folder: Path, subcommand: str) -> bool:
    """Whether it is a directory that the program chose: the same command finds it again."""
    path = folder.resolve()
    return (
        path.parent.parts[-2:] == (*OUTPUTS.parts, subcommand)
        and re.search(r"-[0-9a-f]{8}$", path.name) is not None
    )


def going_on(folder: Path, kept: Mapping[Any, Any]) -> str:
    """The command that resumes a run; code is run only where the command line names it.

    kept: the run's config.
    """
    repeated = {key: kept.get(key) for key in ("model", "weights")}
    plugins = list(kept.get("plugins") or ())
    return command(str(kind_of(kept)), {"resume": str(folder), **repeated, "plugins": plugins})


def trained_to_end(folder: Path) -> bool:
    """Whether the training in this directory has finished."""
    return (folder / SUMMARY).is_file()


@dataclass(frozen=True)
class TrainingRun:
    """A finished training run: found, checked and read once, then handed on."""

    folder: Path
    """As it was named."""
    config: DictConfig
    """Its config.yaml, without interpolations."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    @property
    def weights(self) -> Path:
        """The weights of its best epoch."""
        return self.folder / WEIGHTS

    @property
    def base(self) -> Path | None:
        """The weights of the undefended model that it put its defense on; None if it began anew."""
        path = self.folder / BASE
        return path if path.is_file() or manifest.belongs(path) else None

    @property
    def undefended(self) -> bool:
        """Whether it has no defense."""
        return self.config.defense.get("_target_") == "advbench.defenses.base.Defense"


def find(folder: str | Path) -> TrainingRun:
    """A finished training run. Raises UserError, with what to type, if it is none."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no run '{path}'{_offer()}")
    refuse_links(path)
    kept = config.read(path / CONFIG) if (path / CONFIG).is_file() else None
    kind = None if kept is None else kind_of(kept)
    if kept is None or kind is None:
        raise UserError(f"'{path}' is not a run: it has no {CONFIG} of one{_offer()}")
    if kind == "eval":
        raise UserError(f"'{path}' is an evaluation; give the training run that it evaluated")
    if not trained_to_end(path):
        raise UserError(f"'{path}' did not finish; resume it with: {going_on(path, kept)}")
    refuse_edited(path, kept)
    return TrainingRun(path, kept)


def refuse_edited(folder: Path, kept: DictConfig) -> None:
    """Raise UserError for a finished training whose config was changed in what decides its outcome.

    Where files are may be changed. A config is compared as it is written first: what decides may be
    told in other keys by another version.
    """
    if not manifest.edited(folder):
        return
    try:
        trained = manifest.read_json(folder / SUMMARY)["identity"]["config"]
    except (LookupError, TypeError):
        return  # named by a caller in Python, not by a config
    differs = _differing(trained, deciding(config.plain(kept)))
    if differs:
        raise UserError(
            f"'{folder / CONFIG}' was changed after the training (in: {', '.join(differs)}), and "
            "the weights are of what it was: change it back; an evaluation takes changes on the "
            "command line"
        )


def _differing(saved: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two configs differ."""
    return sorted(key for key in {*saved, *new} if saved.get(key) != new.get(key))


def refuse_links(folder: Path) -> None:
    """Raise UserError for symbolic links in a run: in a downloaded one they could lead anywhere."""
    links = [path for path in folder.iterdir() if path.is_symlink()]
    if links:
        raise UserError(f"'{links[0]}' is a symbolic link, which a run has none of: remove it")


def newest() -> TrainingRun:
    """The training run that finished last. Raises UserError if there is none."""
    runs = trained()
    if not runs:
        raise UserError(
            f"there is no finished training run in {OUTPUTS / 'train'}: run 'advbench train' "
            "first, or give run=DIR, or model=FILE.py:FACTORY weights=FILE"
        )
    return find(runs[-1])


def trained() -> list[Path]:
    """All finished training runs of the output folder, the newest last."""
    files = (OUTPUTS / "train").glob(f"*/{SUMMARY}")
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]


def _offer() -> str:
    runs = trained()
    return (
        f"; the newest is {word('run', str(runs[-1]))}"
        if runs
        else "; make one with: advbench train"
    )


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Hold the run directory alone. Raises UserError while another process works in it.

    The lock ends with the process, however it ends. A new directory in which a mistake was found
    before any work is removed again.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file, not a directory")
    existed = folder.is_dir()
    fresh = not existed or not any(folder.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)  # nothing is written through one
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process is at work in '{folder}'") from None
    remove_temporary(folder)
    try:
        yield
    except UserError:
        if fresh and {path.name for path in folder.iterdir()} <= WITHOUT_WORK:
            for path in folder.iterdir():
                path.unlink()
            if not existed:
                folder.rmdir()
        raise
    finally:
        # The file stays: another process may hold it by now.
        lock.release()


def keep_config(
    folder: Path,
    cfg: DictConfig,
    *,
    training: bool,
) -> None:
    """Write ``config.yaml`` where there is none.

    Args:
        folder: the run's directory.
        cfg: the resolved config.
        training: whether the run is a training, whose config must agree with a saved one in every
            key that decides the outcome; an evaluation compares its plan instead.

    Raises:
        UserError: the directory holds a training with another config, something else, or, for an
            evaluation, a training.
    """
    path = folder / CONFIG
    if path.exists() and not training:
        if kind_in(folder) == "train":
            raise UserError(
                f"'{folder}' holds a training run; give hydra.run.dir=DIR with a new DIR"
            )
        return
    if path.exists():
        saved, new = (deciding(config.plain(one)) for one in (config.read(path), cfg))
        if differs := _differing(saved, new):
            raise UserError(
                f"'{folder}' holds a run with another config (it differs in: "
                f"{', '.join(differs)}); give hydra.run.dir=DIR with a new DIR"
            )
        return
    if any(child.name != ".lock" for child in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and holds no run; give hydra.run.dir=DIR")
    write_text(path, OmegaConf.to_yaml(cfg))


def renew_config(folder: Path, cfg: DictConfig) -> None:
    """Keep a config that decides the same: its data are where they were said to be last."""
    text = OmegaConf.to_yaml(cfg)
    if (folder / CONFIG).read_text(encoding="utf-8") != text:
        write_text(folder / CONFIG, text)
