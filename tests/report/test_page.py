"""The page of ``advbench report --html``: what is on it, and what may never be."""

from __future__ import annotations

import json
import re
import shlex
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluations import LOST, WRONG, N, curve, results, write
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from jinja2 import UndefinedError
from omegaconf import OmegaConf

from advbench import config
from advbench.cli.main import main
from advbench.errors import UserError
from advbench.experiments import home, subject
from advbench.report import gallery
from advbench.report import page as pages
from advbench.report.collection import Entry, find
from advbench.runs import command
from advbench.runs.results import Results

HOSTILE = "</script></title></style><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"


class Page(HTMLParser):
    """Elements with attributes, and the text between them, with script and style apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.code: list[str] = []
        self._raw = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        (self.code if self._raw else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(folder: Path) -> Page:
    return Page(pages.page(find([folder])))


def test_templates_escape_and_refuse_what_is_undefined() -> None:
    templates = pages.templates()
    shown = templates.from_string("<a title='{{ x }}'>{{ x }}</a>").render(x=HOSTILE)
    assert "<script>" not in shown and shown.count("'") == 2
    with pytest.raises(UndefinedError):
        templates.from_string("{{ nowhere }}").render()


def test_one_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "a", results("net"), images=True)
    found = page(tmp_path)
    for words in (
        "1 evaluation of 1 model",
        "digits test 40 images, linf 0.15 , pgd 1 (weak)",
        f"{100 * (N - WRONG) / N:.1f}",
        "What each stage left",
        "Accuracy by class",
        "What broken images are taken for",
        "Margins before and after",
        f"advbench eval data=digits protocol=pgd run=outputs/train/gone n={N} adversarial=true",
        "perturbation times 5 (blue darker, orange brighter)",
        "linf 0.1, image",
        "model sha256 " + "ab" * 32,
    ):
        assert words in found.text, words
    images = found.all("img")
    assert len(images) == 3 * gallery.PICTURES
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in images)


def test_nothing_is_loaded_and_one_script_runs(tmp_path: Path) -> None:
    write(tmp_path / "a", results())
    found = page(tmp_path)
    policy = next(m["content"] for m in found.all("meta") if "http-equiv" in m)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert len(found.all("script")) == len(found.all("style")) == 1
    css, script = found.code
    assert pages._hash(script) in policy and pages._hash(css) in policy
    assert "unsafe-inline" not in policy.replace("style-src-attr 'unsafe-inline'", "")
    for _, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;")), value
    assert not re.search(r"url\((?!#)|@import|https?:", css + script)


def test_hostile_text(tmp_path: Path) -> None:
    """Markup in every string of a result is text on the page."""
    folder = write(tmp_path / "a", results(), images=True)
    values = json.loads((folder / "results.json").read_text())
    del values["checksum"]

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k if k in known else HOSTILE: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        fixed = key in ("schema", "norm", "sha256", "label", "class", "question")
        return HOSTILE if isinstance(value, str) and not fixed else value

    known = {*values, *values["data"], *values["threat"], *values["protocol"], *values["clean"]}
    known |= {*values["stages"][0], *values["verdict"], "seconds", "seed"}
    sign = {"id": "x", "value": "x", "threshold": "x", "triggered": True, "why": "x"}
    sign |= {"class": "proof", "kind": "x", "question": "number", "source": "x", "settles": "x"}
    values["verdict"] = {"label": "unreliable", "indicators": [sign]}
    known |= set(values["verdict"]["indicators"][0])
    values["settings"]["deep"], values["provenance"]["torch"] = "x", "x"
    (folder / "results.json").write_text(json.dumps(poison(values)))
    kept = {k: HOSTILE for k in ("run", "model", "protocol")} | {"choices": {"data": HOSTILE}}
    kept[HOSTILE] = HOSTILE
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))
    text = pages.page(find([tmp_path]))
    found = Page(text)
    assert found.text.count("alert(1)") > 10  # it is there to be read
    assert len(found.all("script")) == len(found.all("style")) == len(found.all("title")) == 1
    assert "<img src=x" not in text and not any("onerror" in a for _, a in found.elements)
    assert not any("alert" in code for code in found.code)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    """What can't be read costs its figures, not the page."""
    cases = {
        "samples.parquet": "samples.parquet' is damaged",
        "adversarial.safetensors": "adversarial.safetensors' is damaged",
        "config.yaml": "does not say where its data are",
    }
    for name, told in cases.items():
        folder = write(tmp_path / name / "a", results(), images=True)
        (folder / name).write_bytes(b"nothing of the kind")
        assert told in page(tmp_path / name).text, name
    write(tmp_path / "none/a", results(), bare=True)
    found = page(tmp_path / "none").text
    assert "only results.json is left" in found and "not run by a command" in found
    write(tmp_path / "half/a", results(missing=("second",)), bare=True)
    assert "the budget was spent before the end of second" in page(tmp_path / "half").text


def test_stages_that_never_ran_are_not_in_the_table(tmp_path: Path) -> None:
    found = results(lost=(LOST, LOST, 0), missing=("second", "third"))
    text = json.dumps(found.to_json()).replace('"second"', '"halfway"')
    text = text.replace('"third"', '"unbegun"')
    write(tmp_path / "a", found, bare=True)
    (tmp_path / "a/results.json").write_text(text)
    text = page(tmp_path).text
    assert "halfway because unfinished model" in text
    assert text.count("unbegun") == text.count("before the end of halfway, unbegun") == 2


def test_links_are_not_followed(tmp_path: Path) -> None:
    real = write(tmp_path / "elsewhere", results("secret"), images=True)
    folder = write(tmp_path / "in/a", results(), bare=True)
    for name in ("samples.parquet", "adversarial.safetensors"):
        (folder / name).symlink_to(real / name)
    (tmp_path / "in/linked").symlink_to(real)
    found = page(tmp_path / "in")
    assert "is a symbolic link" in found.text
    assert "secret" not in found.text and not found.all("img")
    assert "Margins" not in found.text


def test_other_data_are_not_shown(tmp_path: Path) -> None:
    """A config that names other data than were evaluated opens nobody's pictures."""
    elsewhere = {**results().data, "sha256": "0" * 64}
    write(tmp_path / "a", results(data=elsewhere), images=True)
    found = page(tmp_path)
    assert "the data found here are not the evaluation's data" in found.text
    assert not found.all("img")
    assert "Of images that were classified correctly at first." in found.text


def test_a_config_runs_no_code(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", results(), images=True)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nbuild = print\n")
    kept = config.plain(config.read(folder / "config.yaml"))
    for data in ({"_target_": "os.system"}, {"_target_": "evil.build"}):
        kept |= {"data": data, "plugins": [str(tmp_path / "evil.py")]}
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))
        found = page(tmp_path)
        assert "data may not be" in found.text and not found.all("img")
    assert not (tmp_path / "ran").exists()


def test_other_configs_are_not_shown(tmp_path: Path) -> None:
    """What an evaluation calls its training may be a place of something else."""
    folder = write(tmp_path / "in/a", results())
    (tmp_path / "private").mkdir()
    (tmp_path / "private/config.yaml").write_text("password: hunter2")
    kept = config.plain(config.read(folder / "config.yaml")) | {"run": str(tmp_path / "private")}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))
    assert "hunter2" not in page(tmp_path / "in").text


def test_another_training_of_the_name_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was evaluated is looked for beside the evaluation, and known by its settings."""

    def train(project: str, *words: str, name: str = "first") -> Path:
        made = kept("train", *words)
        folder = tmp_path / project / "outputs/train" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(made)))
        (folder / "summary.json").write_text("{}")
        return folder

    def evaluated(project: str, name: str, run: Path, *words: str) -> Entry:
        trained = config.read(run / "config.yaml")
        cfg = kept("eval", f"run={run.relative_to(tmp_path / project)}", *words)
        node = config.inherit(OmegaConf.create(cfg["defense"]), trained, "defense")
        settings = subject.settings_of(trained, node)
        folder = write(tmp_path / project / "outputs/eval" / name, results(settings=settings))
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(cfg)))
        return Entry(folder, Results.load(folder / "results.json"))

    ours, theirs = train("a"), train("b", "optimizer.lr=0.25")
    first = evaluated("a", "one", ours)
    begun = "init_from=outputs/train/first"
    noisy = train("a", "defense=hpm", "defense.momentum=0.5", begun, name="noisy")
    second = evaluated("a", "two", noisy, "defense.inference=static")
    monkeypatch.chdir(theirs.parents[2])
    assert first.training == ours and second.training == noisy
    assert "optimizer.lr=0.25" not in page(tmp_path / "a").text
    (ours / "config.yaml").unlink()  # it is gone from there, and here is one of its name
    assert Entry(first.folder, first.results).training is None
    for words in (["threat=l2_05"], ["seed=1"], ["trainer.epochs=7"], ["backbone.activation=silu"]):
        train("a", *words)  # trained again
        assert Entry(first.folder, first.results).training is None
    train("a", "defense=hpm", "defense.momentum=0.25", begun, name="noisy")
    assert Entry(second.folder, second.results).training is None
    monkeypatch.chdir(tmp_path)
    train("", "trainer.accelerator=cpu")  # the same, elsewhere
    assert Entry(first.folder, first.results).training == Path("outputs/train/first")


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "a", results(), images=True)
    kept = config.plain(config.read(folder / "config.yaml"))
    kept["data"] = config.plain(config.shipped("data", "mnist")) | {"download": True}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(kept)))
    assert "mnist is not under" in page(tmp_path).text


def test_pictures_are_varied(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", results(), images=True)
    entry = Entry(folder, Results.load(folder / "results.json"))
    shown = gallery.gallery(entry, gallery.Library().open(entry))
    assert shown is not None and len(shown.pictures) == gallery.PICTURES
    assert len({picture.truth for picture in shown.pictures}) == gallery.PICTURES
    for picture in shown.pictures:
        assert int(picture.taken_for) == (int(picture.truth) + 2) % 10
        assert picture.distance == pytest.approx(0.1)
        assert picture.delta.max() == pytest.approx(0.1)
    assert shown.factor == pytest.approx(5)
    change = shown.change(shown.pictures[0])
    brightest = shown.pictures[0].delta[..., 0].argmax()
    assert np.allclose(change.reshape(-1, 3)[brightest] * 255, gallery.BRIGHTER, atol=1e-3)


def test_like_with_like(tmp_path: Path) -> None:
    """A body of the table for each set of conditions; seeds of one model in one row."""
    plain = results().settings
    for seed in (0, 1, 2):
        more = {"settings": {**plain, "seed": seed}, "lost": (LOST, N - WRONG - LOST - 10 - seed)}
        write(tmp_path / f"s{seed}", results(f"net-{seed}", **more), bare=True)
    write(tmp_path / "l2", results("l2", threat={"norm": "l2", "eps": 0.5}), bare=True)
    found = page(tmp_path)
    bodies = [a for a in found.all("th") if a.get("scope") == "rowgroup"]
    rows = [a for a in found.all("tr") if a.get("class") == "run"]
    assert len(bodies) == 2 and len(rows) == 2
    assert "seeds 0, 1, 2" in found.text and "±2.5" in found.text
    assert "the interval is that of the images, which all seeds share" in found.text
    assert {row["data-threat"] for row in rows} == {"linf 0.15", "l2 0.5"}


def test_what_was_not_attacked_has_no_robust_accuracy(tmp_path: Path) -> None:
    protocol = {"name": "clean", "version": "1", "seed": 0}
    write(tmp_path / "a", results("bare", lost=(), protocol=protocol), bare=True)
    write(tmp_path / "b", results("net"), bare=True)
    found = page(tmp_path)
    rows = [row for row in found.all("tr") if row.get("class") == "run"]
    assert [str(row["data-words"]).split()[0] for row in rows] == ["net", "bare"]
    assert ["data-open" in row for row in rows] == [False, True]
    assert "clean 95.0 83.5\u201398.6 robust - 3 s" in found.text
    assert "Robust -: nothing was attacked." in found.text
    told = "bare digits, linf 0.15, clean 1 - Clean accuracy 95.0 % [83.5, 98.6] No figures"
    assert told in found.text and found.text.count("WRA") == 1  # that of the other


def test_what_differs_is_in_the_heading(tmp_path: Path) -> None:
    for steps in (10, 50):
        protocol = {"name": "pgd", "version": "1", "steps": steps, "restarts": 1, "seed": 0}
        write(tmp_path / f"p{steps}", results(protocol=protocol), bare=True)
    write(tmp_path / "aa", results(protocol={"name": "autoattack", "version": "1"}), bare=True)
    text = page(tmp_path).text
    headings = re.findall(r"digits test 40 images, linf 0.15 , (.*?\d\)?) net", text)
    assert headings == ["autoattack 1", "pgd 1 (weak, steps 10)", "pgd 1 (weak, steps 50)"]
    assert text.count("Weak: the protocol overestimates robustness") == 1


def test_the_unfinished_comes_last(tmp_path: Path) -> None:
    write(tmp_path / "a", results("short", lost=(0, 0), missing=("second",)), bare=True)
    write(tmp_path / "b", results("whole"), bare=True)
    rows = [row for row in page(tmp_path).all("tr") if row.get("class") == "run"]
    assert [str(row["data-words"]).split()[0] for row in rows] == ["whole", "short"]
    assert ["data-open" in row for row in rows] == [False, True]
    found = page(tmp_path)
    assert "robust at most 95.0" in found.text
    assert "UNFINISHED: at most 95.0 %, 19 of 38 samples decided" in found.text
    hollow = [i for i in found.all("i") if "hollow" in str(i.get("class"))]
    assert len(hollow) == 1 and str(hollow[0]["class"]) == "dot robust hollow"
    assert "verdict" not in found.text.lower()


def test_curves_and_sweeps(tmp_path: Path) -> None:
    write(tmp_path / "c1", curve("one", 0.9, 0.5), bare=True)
    write(tmp_path / "c2", curve("two", 0.8, 0.2), bare=True)
    for jump in (0.0, 0.5, 1.0):
        settings = {**results().settings, "defense": "jumprelu", "defense.jump": jump}
        write(tmp_path / f"j{jump}", results(f"j{jump}", settings=settings), bare=True)
    text = page(tmp_path).text
    assert "Clean against robust, by defense.jump" in text
    assert "Robust accuracy over the radius digits, 40 images." in text


@pytest.mark.parametrize(("attack", "lost", "shown"), [
    ("Square", 25, True), ("Square", 2, False), ("PGD", 25, False),
])  # fmt: skip
def test_what_the_gradient_alone_left_is_struck_through(
    tmp_path: Path, attack: str, lost: int, shown: bool
) -> None:
    """Where it differs from the number by more than the interval."""
    found = results(lost=(1, lost))
    first, second = found.stages
    found = replace(found, stages=(first, replace(second, attack=attack)))
    write(tmp_path / "a", found, bare=True)
    text = pages.page(find([tmp_path]))
    struck = re.search(r"<s>([\d.]+) %</s>", text)
    assert (struck is not None) is shown
    assert struck is None or float(struck[1]) == pytest.approx(100 * (first.robust_acc or 0))
    assert (
        "the attacks that follow the model's own gradient" in text.replace("&#39;", "'")
    ) is shown


def test_verdict_is_shown(tmp_path: Path) -> None:
    sign = {"id": "masking", "value": 0.25, "threshold": 0.1, "triggered": True, "why": "FGSM wins"}
    sign |= {"class": "proof", "kind": "gradient", "question": "gradient"}
    verdict: Any = {"label": "unreliable", "indicators": [sign]}
    curve = {
        "id": "curve",
        "triggered": False,
        "why": "w",
        "data": {"eps": [1, 2], "broken": [0, 1]},
    }
    odd = {"id": "odd", "triggered": False, "why": "w", "data": {"cosines": [1, "<script>"]}}
    cosines = {"id": "way", "triggered": False, "why": "w", "data": {"cosines": [-1, 0.5]}}
    more = {"class": "thin", "kind": "k", "question": "number"}
    verdict["indicators"] += [{**one, **more} for one in (curve, odd, cosines)]
    write(tmp_path / "a", results(verdict=verdict), bare=True)
    found = page(tmp_path)
    told = "Indicator Value Threshold Triggered masking proof FGSM wins 0.25 0.1 yes"
    assert told in found.text and "Verdict unreliable" in found.text
    assert "does the model hide its gradient? yes (masking)" in found.text
    assert "is the number too high? perhaps: attacks that follow this gradient" in found.text
    assert "unreliable the attacks were misled" in found.text
    text = pages.page(find([tmp_path]))
    assert text.count("share of broken images over eps") == 1
    assert (
        text.count("image by image, from -1 to 1") == 1
        and "<script>" not in text.split("odd")[1][:400]
    )


def test_hundreds(tmp_path: Path) -> None:
    """With many evaluations the page stays small and says what it left out."""
    found = results()
    for i in range(120):
        write(tmp_path / f"r{i:03d}", replace(found, run=f"net-{i}"), bare=True)
    before = time.process_time()
    text = pages.page(find([tmp_path]))
    assert time.process_time() - before < 60
    assert len(text) < 2e6
    assert f"Figures of the first {pages.MOST_FIGURES} only" in text
    assert text.count("<svg") == pages.MOST_FIGURES
    assert text.count('<details id="run-') == 120


def test_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "BUDGET", 1000)
    for name in ("a", "b", "c"):
        write(tmp_path / name, results(name), bare=True)
    assert "Figures of the first 1 only" in page(tmp_path).text


# --- commands -----------------------------------------------------------------------------------


def kept(verb: str, *words: str) -> dict[str, Any]:
    """The config that a run of this command would keep."""
    config.register()
    with initialize_config_module("advbench.configs", version_base="1.3"):
        cfg = compose(verb, list(words), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    choices = dict(HydraConfig.get().runtime.choices)
    del cfg.hydra
    cfg.defense = config.spelled_out(cfg.defense)
    return config.plain(home.kept_config(cfg, choices))


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["train", "recipe=trades", "recipe.beta=3", "seed=7", "trainer.epochs=2"],
        ["train", "data=npz", "data.path=my data/it's [x].npz", "threat=l2_05", "threat.eps=1/4"],
        ["train", "experiment=hpm_quick", "init_from=outputs/train/a=b", "defense.momentum=0.5"],
        ["train", "defense=chain", "defense.members=[sparta,{hpm:{momentum:0.5}}]"],
        ["train", "data.augment.crop=2", "data.mean=[0.25]", "backbone=resnet20"],
        ["eval", "run=r", "n=10", "adversarial=true", "protocol=paper/hpm"],
        ["eval", "run=r", "protocol=curve", "protocol.eps=[0.01,8/255]", "threat.eps=0.1"],
        ["eval", "model=my_model.py:build", "weights=w.pt", "data=digits", "threat=linf_8"],
        ["eval", "run=null", "transfer=[a,b]", "traits.stochastic=true", "plugins=['a b.py']"],
    ],
)
def test_commands_come_back(words: list[str]) -> None:
    """The command of a run's config makes that config again."""
    verb, *overrides = words
    wanted = kept(verb, *_quoted(overrides))
    program, again, *found = shlex.split(command.command(wanted))
    assert (program, again) == ("advbench", verb)
    made = kept(verb, *found)
    wanted["choices"].pop("experiment", None)
    made["choices"].pop("experiment", None)
    assert made == wanted
    assert len(found) <= len(overrides) + 2


def _quoted(words: list[str]) -> list[str]:
    """Values with spaces or other signs of Hydra's, in its quotes."""
    return [
        f'{key}="{value}"' if re.search(r"[' =]", value) and value[0] != "[" else word
        for word in words
        for key, _, value in [word.partition("=")]
    ]


def test_a_command_is_of_the_run_and_not_of_a_sitting() -> None:
    """What one sitting was told is left out; a key that is not in the option is added."""
    sitting = ["budget=1min", "strict=true", "resume=r"]
    wanted = kept("eval", "run=r", "n=3", *sitting)
    assert command.command(wanted) == "advbench eval run=r n=3"
    wanted = kept("train", "+optimizer.foreach=true", "+data.augment.new=[1,2]")
    _, verb, *found = shlex.split(command.command(wanted))
    assert found == ["+data.augment.new=[1,2]", "+optimizer.foreach=true"]
    assert kept(verb, *found) == wanted


def test_the_command_of_a_run_with_options_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks for their folder, and makes the run again once it has that."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from advbench.defenses.base import Defense\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Defense):\n"
        "    strength: float | None = 1.0\n    more: int = 0\n"
    )
    Path("conf/defense").mkdir(parents=True)
    Path("conf/defense/mine.yaml").write_text("_target_: mine.Mine\nstrength: 2.0\nmore: 1\n")
    Path("conf/backbone").mkdir()
    net = config.options("backbone")["convnet"].read_text()
    Path("conf/backbone/my net.yaml").write_text(net)
    given = ["--config-dir", "conf", "plugins=[mine.py]", "defense=mine", 'backbone="my net"']
    values = ["defense.strength=null", "recipe=standard", "trainer.epochs=1"]
    assert main(["train", *given, *values, "hydra.run.dir=run"]) == 0
    line = command.command(config.plain(config.read(Path("run/config.yaml"))))
    _, verb, option, asked, *found = shlex.split(line)
    assert (option, asked) == (
        "--config-dir",
        "DIR with backbone/my net.yaml and defense/mine.yaml",
    )
    assert "defense.more=1" in found and not any("_target_" in word for word in found)
    capsys.readouterr()
    assert main([verb, option, asked, *found]) == 2
    assert "DIR with backbone" in capsys.readouterr().err
    assert main([verb, option, "conf", *found, "hydra.run.dir=run"]) == 0
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("outputs/eval/net-pgd-0123abcd", False),
        ("outputs/eval/mine", True),
        ("outputs/train/net-pgd-0123abcd", True),
        ("sweep/net-pgd-0123abcd", True),
        ("my runs/a=b", True),
    ],
)
def test_a_command_names_the_directory_that_its_user_named(place: str, named: bool) -> None:
    _, verb, *found = shlex.split(command.command(kept("eval", "run=r"), Path(place)))
    assert found[0] == "run=r" and len(found) == 1 + named
    if named:
        config.register()
        with initialize_config_module("advbench.configs", version_base="1.3"):
            cfg = compose(verb, found, return_hydra_config=True)
        assert cfg.hydra.run.dir == place


def test_command_refuses_other_files() -> None:
    with pytest.raises(UserError, match="does not say which options"):
        command.command({"seed": 0})


# --- as a user ----------------------------------------------------------------------------------


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train, evaluate, and one page of it: with learning curves, images, and true commands."""
    monkeypatch.chdir(tmp_path)
    fast = ["trainer.epochs=2", "recipe.steps=2", "trainer.val_steps=1"]
    assert main(["train", *fast]) == 0
    ask = ["eval", "protocol=pgd", "protocol.steps=5", "n=50", "adversarial=true"]
    assert main(ask) == 0
    capsys.readouterr()
    assert main(["report", "--html", "page.html"]) == 0
    assert capsys.readouterr().out.startswith("page.html: ")
    found = Page(Path("page.html").read_text(encoding="utf-8"))
    assert "Training Accuracy and loss over the epochs. Dashed line: epoch" in found.text
    assert found.all("img")
    told = re.findall(r"advbench (?:train|eval) [^\n]*?(?=Copy)", "".join(found.words))
    again, first = (shlex.split(command) for command in told)
    assert first[1:] == ["train", "recipe.steps=2", "trainer.epochs=2", "trainer.val_steps=1"]
    assert main(again[1:]) == 0
    assert "finished already" in capsys.readouterr().out  # the very same evaluation
    assert len(list(Path("outputs/eval").glob("*/results.json"))) == 1
    for words in (["--html", "."], ["--html", "no/page.html"], ["--html", "p.html", "--mix"]):
        assert main(["report", *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_results_of_a_seedless_model(tmp_path: Path) -> None:
    """A model of the user's own has no settings and no training."""
    write(tmp_path / "a", replace(results(), settings={}), bare=True)
    assert "1 evaluation of 1 model" in page(tmp_path).text
