"""Models of RobustBench's zoo (Croce et al. 2021, arXiv 2010.09670), as they are and as backbones.

They take images in [0, 1] and normalise them inside. Weights are fetched from Google Drive into
``models/DATA/THREAT/NAME.pt``, as RobustBench does, where that file is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advbench.backbones.base import Classifier
from advbench.backbones.external import ExternalBackbone, fetches_weights, may_download
from advbench.errors import UserError, did_you_mean, reason_of
from advbench.surgery import probe_images

PREFIX = "robustbench:"
FOLDER = "models"
BUDGETS = {
    ("cifar10", "Linf"): 8 / 255,
    ("cifar10", "L2"): 0.5,
    ("cifar100", "Linf"): 8 / 255,
    ("imagenet", "Linf"): 4 / 255,
}
"""Budgets of the leaderboards, in pixel units; those of corruptions have none."""


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Raises:
        UserError: for data and threats that have no leaderboard.
    """

    data: str
    """``cifar10``, ``cifar100`` or ``imagenet``."""
    threat: str
    """``Linf`` or ``L2``."""
    name: str
    """Of the model, as the leaderboard spells it."""

    def __post_init__(self) -> None:
        if (self.data, self.threat) not in BUDGETS:
            names = [f"{data}/{threat}" for data, threat in BUDGETS]
            raise UserError(
                f"RobustBench has no '{self.data}/{self.threat}'"
                f"{did_you_mean(f'{self.data}/{self.threat}', names)}"
            )

    @property
    def budget(self) -> float:
        return BUDGETS[self.data, self.threat]

    @classmethod
    def of(cls, spec: str) -> Entry:
        """From ``robustbench:DATA/THREAT/NAME``; DATA/THREAT may be left out: cifar10/Linf."""
        parts = spec.removeprefix(PREFIX).split("/")
        if len(parts) == 1:
            parts = ["cifar10", "Linf", *parts]
        if len(parts) != 3 or not all(parts):
            raise UserError(
                f"model={spec} is not robustbench:DATA/THREAT/NAME, such as "
                "model=robustbench:cifar10/Linf/Carmon2019Unlabeled"
            )
        return cls(*parts)


def is_named(spec: str | None) -> bool:
    """Whether ``model=`` names a model of the zoo."""
    return spec is not None and spec.startswith(PREFIX)


def load(
    entry: Entry, folder: str = FOLDER, pretrained: bool = True, download: bool = True
) -> nn.Module:
    """A model of the zoo, in evaluation mode.

    Args:
        entry: which one.
        folder: where weights are, as ``DATA/THREAT/NAME.pt``.
        pretrained: False builds it with fresh weights and fetches nothing.
        download: whether weights that are not in the folder may be fetched.

    Raises:
        UserError: without robustbench, for an unknown name, and if the weights can't be downloaded.
    """
    model_zoo, enums, utils = _package()
    data, threat = enums.BenchmarkDataset(entry.data), enums.ThreatModel(entry.threat)
    entries: Mapping[str, Mapping[str, Any]] = model_zoo.model_dicts[data][threat]
    if entry.name not in entries:
        hint = did_you_mean(entry.name, entries)
        raise UserError(f"RobustBench has no '{entry.name}' in {entry.data}/{entry.threat}{hint}")
    file = Path(folder) / entry.data / entry.threat / f"{entry.name}.pt"
    if pretrained and not download and not file.is_file():
        raise UserError(
            f"the weights of '{entry.name}' are not at '{file}': fetch them with data={entry.data} "
            "data.download=true once, or put the file there by hand"
        )
    try:
        with redirect_stdout(sys.stderr):  # it prints
            if not pretrained:
                return entries[entry.name]["model"]().eval()
            model = utils.load_model(
                entry.name, model_dir=folder, dataset=entry.data, threat_model=entry.threat
            )
    except Exception as error:
        raise UserError(
            f"the weights of '{entry.name}' can't be downloaded ({reason_of(error):.160}): try "
            f"again, or put the file at '{file}' by hand"
        ) from error
    return model.eval()


def _package() -> tuple[Any, Any, Any]:
    """RobustBench's zoo, its names, and what loads from it. Raises UserError without them.

    The package itself imports its evaluation too, which needs ``pkg_resources`` and the
    ``autoattack`` of another repository, and so fails as it comes from PyPI (1.1.1): only the parts
    for models are imported.
    """
    spec = importlib.util.find_spec("robustbench")
    if spec is None or spec.submodule_search_locations is None:
        raise UserError("robustbench is not installed: pip install 'advbench[zoo]'")
    parts = ("robustbench.model_zoo", "robustbench.model_zoo.enums", "robustbench.utils")
    hollow = None
    if "robustbench" not in sys.modules:
        hollow = types.ModuleType("robustbench")
        hollow.__path__ = list(spec.submodule_search_locations)
        sys.modules["robustbench"] = hollow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports names that timm has moved
            zoo, enums, utils = (importlib.import_module(part) for part in parts)
    except ImportError as error:
        raise UserError(
            f"robustbench does not import ({error}): pip install 'advbench[zoo]'"
        ) from error
    finally:
        if hollow is not None:
            del sys.modules["robustbench"]
    return zoo, enums, utils


@dataclass(frozen=True, kw_only=True)
class zoo(ExternalBackbone):
    """A model of the zoo to train or fine-tune (the extra ``advbench[zoo]``).

    ``mean`` and ``std`` are not used; the model normalises images itself.
    ``build`` raises UserError as ``load`` does, too, and for ensembles.
    """

    library = "RobustBench"
    dataset: str = "cifar10"
    """Of the leaderboard."""
    threat_model: str = "Linf"
    """Of the leaderboard."""
    folder: str = FOLDER
    """Of the weights."""
    pretrained: bool = True
    """False starts at random."""

    def build(self) -> Classifier:
        entry = Entry(self.dataset, self.threat_model, self.name)
        self.check_channels()
        downloads = self.pretrained and fetches_weights()
        model = load(entry, self.folder, downloads, download=may_download())
        x = probe_images([3, *self.input_shape[1:]])
        with self.refusal(), torch.no_grad():
            before = model(x)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        last = linears[-1] if linears else None
        problem = UserError(
            f"{self.title} does not end in one linear layer, so it can't be trained "
            f"here; to evaluate it as it is: advbench eval "
            f"model={PREFIX}{self.dataset}/{self.threat_model}/{self.name}"
        )
        try:
            classifier = self.split(model, last, mean=None, std=None)
        except UserError as error:  # it took the images before it was taken apart
            raise problem from error
        if last is not None and last.out_features == self.num_classes:
            with torch.no_grad():
                after = classifier.eval()(x)
            if not torch.allclose(before, after, atol=1e-4, rtol=1e-4):
                raise problem
        return classifier
