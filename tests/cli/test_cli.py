"""The command line, end to end in a temporary directory."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import FAST, OWN, save
from processes import Process, killed, main_of
from torch import nn

import advbench
from advbench import config
from advbench.cli import hydra_app, options
from advbench.cli.main import main
from advbench.config.words import setting
from advbench.defenses.jumprelu import jump_of
from advbench.runs.results import Results


def test_train_eval_report_list_copy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Path("good")
    names = {path.name for path in good.iterdir()}
    assert names >= {"config.yaml", "model.safetensors", "metrics.csv", "summary.json", "log.txt"}
    assert main(["eval", "run=good", "protocol=pgd", "protocol.steps=3", "n=40"]) == 0
    (file,) = place.glob("outputs/eval/*/results.json")
    results = Results.load(file)
    assert results.data["n"] == 40 and results.protocol.get("steps") == 3
    assert {p.name for p in file.parent.iterdir()} >= {
        "config.yaml",
        "plan.json",
        "samples.parquet",
        "log.txt",
    }
    assert main(["report", "outputs"]) == 0
    assert "pgd 1" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert main(["list", "backbones"]) == 0
    assert "resnet18" in capsys.readouterr().out
    assert main(["copy", "defense/none", "own"]) == 0
    assert Path("own/defense/none.yaml").is_file()
    assert main(["--help"]) == main([]) == main(["--version"]) == 0


def test_the_same_command_does_not_work_twice(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = Path("good/summary.json").stat().st_mtime_ns
    assert main(["train", "hydra.run.dir=good", *FAST]) == 0
    assert "finished already" in capsys.readouterr().out
    assert Path("good/summary.json").stat().st_mtime_ns == stamp


def test_multirun_makes_a_run_per_job(place: Path) -> None:
    assert main(["train", "-m", "seed=1,2", "recipe=standard", "trainer.epochs=1"]) == 0
    found = sorted(place.glob("outputs/train/*/summary.json"))
    assert len(found) == 2 and all("standard-s" in str(run) for run in found)
    assert main(["eval", "protocol=clean"]) == 0  # the newest finished run
    (file,) = place.glob("outputs/eval/*standard-s2*clean*/results.json")
    assert Results.load(file).stages == ()


def test_a_model_of_your_own(place: Path) -> None:
    own = ["data=npz", "data.path=ok.npz", "threat=linf_8", "protocol=fgsm"]
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
               .state_dict(), "w.pt")  # fmt: skip
    assert main(["eval", "model=m.py:build", "weights=w.pt", *own]) == 0
    own[2:3] = ["threat.norm=linf", "threat.eps=8/255"]  # the same
    assert main(["eval", "model=m.py:resnet", *own]) == 0
    files = list(place.glob("outputs/eval/m-fgsm*/results.json"))
    assert len(files) == 2
    assert len({Results.load(file).provenance.get("model_sha256") for file in files}) == 2


def test_data_and_threat_come_from_the_run_and_can_be_changed(place: Path) -> None:
    assert main(["eval", "run=good", "protocol=fgsm", "threat.eps=8/255", "n=20"]) == 0
    (file,) = place.glob("outputs/eval/good-fgsm-linf_8-255-*/results.json")
    assert Results.load(file).threat == {"norm": "linf", "eps": 8 / 255}
    assert main(["eval", "run=good", "protocol=fgsm", "threat=l2_05", "n=20"]) == 0
    assert list(place.glob("outputs/eval/good-fgsm-l2_0.5-*/results.json"))


def test_the_api_uses_the_same_objects(place: Path) -> None:
    model = advbench.load("good")
    x = torch.rand(12, 1, 8, 8)
    results = advbench.evaluate(model, x, model(x).argmax(1), threat="linf_8", protocol="pgd")
    assert results.clean.acc == 1.0 and results.data["n"] == 12


def test_a_plugin_is_named_on_the_command_line(place: Path) -> None:
    Path("mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from advbench.defenses.base import Defense\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Defense):\n    strength: float = 1.0\n"
    )
    Path("conf/defense").mkdir(parents=True)
    Path("conf/defense/mine.yaml").write_text("_target_: mine.Mine\nstrength: 2.0\n")
    command = ["train", "--config-dir", "conf", "defense=mine", "hydra.run.dir=mine_run", *FAST]
    assert main([*command, "plugins=[mine.py]"]) == 0
    assert main(["eval", "run=mine_run", "protocol=clean", "plugins=[mine.py]"]) == 0
    assert main(["eval", "run=mine_run", "protocol=clean"]) == 2


def test_what_is_suggested_can_be_typed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a training with a plugin, and for a run that did not finish, whatever its name is."""
    Path("my [1].py").write_text("")
    home, code = "outputs/train/seed=1,recipe=it's mine", setting("plugins", ["my [1].py"])
    command = ["train", code, setting("hydra.run.dir", home), *FAST]
    assert main(command) == 0
    (told,) = re.findall("^next: advbench (.+)$", capsys.readouterr().out, re.MULTILINE)
    words = shlex.split(told)
    assert code in words
    assert main([*words, "n=5", "budget=0.1s"]) == 0
    Path(f"{home}/summary.json").unlink()
    assert main(["eval", setting("run", home)]) == 2
    told = capsys.readouterr().err.rpartition("resume it with: advbench ")[2]
    assert main(shlex.split(told)) == 0
    assert main(["eval", "run=nothing"]) == 2
    told = capsys.readouterr().err.rpartition("the newest is ")[2]
    assert shlex.split(told) == [setting("run", home)]


def test_a_training_is_the_same_wherever_its_data_are(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And however it is said, saved and logged; its data are then where they were last."""
    Path("there").mkdir()
    Path("there/moved.npz").write_bytes(Path("ok.npz").read_bytes())
    random = np.random.default_rng(1)
    save("other.npz", x_train=random.integers(0, 256, (64, 8, 8, 3), np.uint8))
    fast = ["recipe=standard", "trainer.epochs=1", "trainer.batch_size=16"]
    command = ["train", "data=npz", *fast, "seed=14"]
    capsys.readouterr()
    assert main([*command, "data.path=ok.npz"]) == 0
    assert "note: threat=linf_015 is made for digits" in capsys.readouterr().out
    (folder,) = place.glob("outputs/train/npz-*-s14-*")
    moved = [*command, "data.path=there/moved.npz"]
    around = ["trainer.save_every=0", "trainer.accelerator=cpu", f"hydra.run.dir={folder}"]
    for again in (moved, [*moved, *around]):
        capsys.readouterr()
        assert main(again) == 0
        assert "finished already" in capsys.readouterr().out
    kept = config.read(folder / "config.yaml")
    assert kept.data.path == str(Path("there/moved.npz").absolute())
    assert kept.trainer.save_every == 0
    assert main([*command, "data.path=other.npz", f"hydra.run.dir={folder}"]) == 2
    assert config.read(folder / "config.yaml") == kept
    assert main([*command, "data.path=other.npz"]) == 0
    assert len(list(place.glob("outputs/train/npz-*-s14-*"))) == 2
    # Seen from another directory they are the same, also where a file there has their name.
    monkeypatch.chdir("there")
    Path("there").mkdir()
    few = {"x_test": np.zeros((4, 8, 8, 3), np.uint8), "y_test": np.zeros(4, int)}
    save("there/moved.npz", **few)
    assert main(["eval", f"run={folder}", "protocol=clean", "hydra.run.dir=seen"]) == 0
    assert Results.load(Path("seen/results.json")).data["n"] == 32


def test_an_edited_model_is_another_model(place: Path) -> None:
    given = ["eval", "model=e.py:build", "data=npz", "data.path=ok.npz", "threat=linf_8"]
    for sign in ("", "-"):
        Path("e.py").write_text(
            "import torch\nfrom torch import nn\n\n\nclass M(nn.Linear):\n"
            f"    def forward(self, x):\n        return {sign}super().forward(x.flatten(1))\n\n\n"
            "def build():\n    torch.manual_seed(0)\n    return M(192, 5)\n"
        )
        sys.modules.pop("e", None)
        assert main([*given, "protocol=clean"]) == 0
    found = [Results.load(f).clean.acc for f in place.glob("outputs/eval/e-clean*/results.json")]
    assert len(found) == 2 and found[0] != found[1]


def test_a_result_may_be_asked_for_again_in_other_words(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["eval", "protocol=fgsm", "n=25", "run=good"]
    assert main(asked) == 0
    for other in (["budget=1h"], ["trainer.accelerator=cpu"], [f"run={place / 'good'}"]):
        assert main([*asked, *other]) == 0
        assert "finished already" in capsys.readouterr().out


def test_strict_wants_a_verdict(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs where there will be none; else it decides the exit code."""
    asked = ["eval", "-q", "protocol=clean", "run=good", "hydra.run.dir=strictly"]
    assert main([*asked, "strict=true"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("advbench: strict=true needs a verdict") and said.count("\n") == 1
    assert not Path("strictly").exists()
    asked[2:3] = ["protocol=fgsm", "n=25"]
    assert main([*asked, "strict=true", "verdict=none"]) == 2 and not Path("strictly").exists()
    capsys.readouterr()
    assert main([*asked, "strict=true"]) == 4  # one step of one attack
    kept = json.loads(Path("strictly/results.json").read_text())
    del kept["checksum"], kept["files"]
    assert kept["verdict"]["label"] == "inconclusive"
    for label, status in (("reliable", 0), ("inconclusive", 4), ("unreliable", 3)):
        told = {**kept, "verdict": {**kept["verdict"], "label": label, "indicators": []}}
        Path("strictly/results.json").write_text(json.dumps(told))
        assert (main([*asked, "strict=true"]), main(asked)) == (status, 0)
        assert not capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # of another device, which does not end the first one
    assert hydra_app._strictly("unreliable") == 0 and not capsys.readouterr().err


def test_a_sweep_goes_on_after_a_mistake(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "-m", "trainer.batch_size=9999,64", "seed=9", *FAST]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("[0 trainer.batch_size=9999] advbench: ")
    assert len(list(place.glob("outputs/train/*-s9-*/summary.json"))) == 1


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path: Path) -> None:
    """Training and evaluation, killed twice each, end as the uninterrupted ones do."""
    training = ["train", "trainer.epochs=3", "recipe.steps=2", "trainer.save_every=0"]
    attack = ["eval", "protocol=pgd", "protocol.steps=100", "n=160", "trainer.batch_size=40"]
    ends = []
    for name, kills in (("whole", ()), ("cut", (1, -2))):
        folder = tmp_path / name
        folder.mkdir()
        for words, state, final in (
            (training, "resume.pt", "summary.json"),
            (attack, "*-*", "results.json"),  # the files of a journal
        ):
            for writes in kills:
                process = Process(killed, state, writes, main_of, words, folder=folder)
                assert process.wait() == -signal.SIGKILL, process.output
            process = Process(main_of, words, folder=folder)
            assert process.wait() == 0, process.output
            assert len(list(folder.rglob(final))) == 1, "a killed run must be gone on with"
        (weights,) = folder.rglob("model.safetensors")
        (metrics,) = folder.rglob("metrics.csv")
        (results,) = folder.rglob("results.json")
        content = json.loads(results.read_text())
        times = [line.rsplit(",", 1)[0] for line in metrics.read_text().splitlines()]
        counts = [(s["broken"], s["forwards"], s["backwards"]) for s in content["stages"]]
        ends.append((weights.read_bytes(), times, content["clean"], content["robust"], counts))
    assert ends[0] == ends[1]


def test_completion_knows_verbs_and_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "advbench tr")
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["train"]
    monkeypatch.setenv("COMP_LINE", "advbench train backbone=resnet")
    assert main(["-sc", "query=bash"]) == 0
    offered = capsys.readouterr().out.split()
    assert "backbone=resnet18" in offered and len(offered) == 4


def test_every_shipped_config_says_what_it_is() -> None:
    seen = 0
    for group in options.GROUPS:
        for name, file in options.config.options(group).items():
            command, description = options.header(file.read_text())
            assert command.startswith("advbench "), f"{group}/{name}: {command}"
            assert len(description) > 20, f"{group}/{name}"
            seen += 1
    assert seen >= 40


def test_every_experiment_composes(capsys: pytest.CaptureFixture[str]) -> None:
    names = list(config.options("experiment"))
    for name in names:
        assert main(["train", f"experiment={name}", "--cfg", "job"]) == 0, name
        assert "_target_" in capsys.readouterr().out
    assert len(names) >= 11


def test_a_retrofit_is_swept_and_shown(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "-m", "run=good", "defense=jumprelu", "defense.jump=0,0.5,1.0", "n=30"]
    assert main([*command, "protocol=pgd", "protocol.steps=2", "hydra.sweep.dir=jumps"]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if "defense.jump=" in line]
    assert headings == [f"[{i} defense.jump={jump}]" for i, jump in enumerate(("0", "0.5", "1.0"))]
    found = [Results.load(file) for file in sorted(Path("jumps").rglob("results.json"))]
    assert sorted(results.settings["defense.jump"] for results in found) == [0, 0.5, 1.0]
    assert len({results.clean.acc for results in found}) > 1
    capsys.readouterr()
    assert main(["report", "jumps"]) == 0
    table = capsys.readouterr().out
    assert "defense.jump" in table and table.index("0.5") < table.index("1.0")


def test_jumprelu_is_trained_as_shipped(place: Path) -> None:
    """The plain net is trained, fresh or from a run; the evaluation finds the jump of the end."""
    starts = {"fresh": [], "tuned": ["init_from=good"], "again": ["init_from=tuned"]}
    for name, start in starts.items():
        command = ["train", "defense=jumprelu", *FAST, *start]
        assert main([*command, f"hydra.run.dir={name}"]) == 0
        chosen = json.loads(Path(f"{name}/summary.json").read_text())["chosen"]
        assert chosen["jump"] > 0
        assert f"jump={chosen['jump']}" in Path(f"{name}/log.txt").read_text()
        assert jump_of(advbench.load(name)) == pytest.approx(chosen["jump"])
    command = ["eval", "run=tuned", "protocol=msa", "budget=0.1s", "n=20"]
    assert main([*command, "hydra.run.dir=tuned-msa"]) == 0
    plan = json.loads(Path("tuned-msa/plan.json").read_text())
    assert plan["identity"]["traits"]["gradient"] == "discontinuous"
    assert {"bpda_relu", "undefended"} <= {stage["target"] for stage in plan["stages"]}


def test_a_model_of_your_own_takes_a_retrofit(place: Path) -> None:
    command = [*OWN, "defense=jumprelu", "defense.jump=0.1", "protocol=paper/jumprelu"]
    assert main([*command, "hydra.run.dir=own-jump", "threat.eps=0.1"]) == 0
    plan = json.loads(Path("own-jump/plan.json").read_text())
    assert [stage["name"] for stage in plan["stages"]] == ["ifgsm", "gray-box"]
    assert plan["identity"]["traits"]["gradient"] == "discontinuous"
    results = Results.load(Path("own-jump/results.json"))
    assert (results.run, results.settings["defense.jump"]) == ("m+jumprelu", 0.1)


def test_a_chain_is_trained_set_and_transferred_to(place: Path) -> None:
    chain = ["train", "defense=chain", "defense.members=[{jumprelu: {jump: 0.1}}, mfdv_snn]"]
    assert main([*chain, "recipe=standard", "trainer.epochs=1", "hydra.run.dir=chain"]) == 0
    command = ["eval", "run=chain", "defense.draws=3", "defense.jump=0.2", "protocol=adaptive"]
    more = ["n=20", "budget=0.1s", "transfer=[good]", "hydra.run.dir=chain-adaptive"]
    assert main([*command, *more]) == 0
    results = Results.load(Path("chain-adaptive/results.json"))
    assert results.settings["defense.members"] == "jumprelu+mfdvsnn"
    assert results.settings["defense.mfdvsnn.draws"] == 3
    stages = json.loads(Path("chain-adaptive/plan.json").read_text())["stages"]
    targets = {stage["target"]: stage.get("draws", 1) for stage in stages}
    assert targets["bpda_relu"] == 20 and targets["bpda_relu+mean"] == 1
    assert list(targets)[-1] == "transfer-good"
    command = ["eval", "run=good", "n=20", "protocol=adaptive", "transfer=[chain]", "budget=0.1s"]
    assert main([*command, "hydra.run.dir=good-adaptive"]) == 0


def test_fine_tuning_and_values_of_the_evaluation(place: Path) -> None:
    """A defense on a finished plain run; at evaluation what the weights allow may be changed."""
    tune = ["train", "defense=hpm", "defense.eval_batch=60", "init_from=good", *FAST]
    assert main([*tune, "hydra.run.dir=hpm"]) == 0
    ends = {}
    for name, more in {"batch": [], "context": ["defense.inference=context"]}.items():
        command = ["eval", "run=hpm", "n=60", "protocol=msa", "protocol.square=0", "budget=0.1s"]
        assert main([*command, *more, f"hydra.run.dir=hpm-{name}"]) == 0
        ends[name] = json.loads(Path(f"hpm-{name}/plan.json").read_text())
    assert ends["batch"]["identity"]["traits"]["batch_dependent"]
    assert not ends["context"]["identity"]["traits"]["batch_dependent"]
    targets = {stage["target"] for stage in ends["context"]["stages"]}
    assert targets >= {"model", "fc_head", "static", "soft-1", "frozen_batch", "base"}
    assert any("never change" in reason for reason in ends["batch"]["reasons"])
    assert Path("hpm/base.safetensors").read_bytes() == Path("good/model.safetensors").read_bytes()
    again = ["train", "defense=hpm", "defense.eval_batch=60", "init_from=hpm", *FAST]
    assert main([*again, "hydra.run.dir=hpm-again"]) == 0
    command = ["eval", "run=hpm-again", "n=60", "protocol=msa", "budget=0.1s"]
    assert main([*command, "hydra.run.dir=hpm-again-msa"]) == 0
    plan = json.loads(Path("hpm-again-msa/plan.json").read_text())
    assert "base" not in {stage["target"] for stage in plan["stages"]}


def test_teachers_are_runs(place: Path) -> None:
    command = ["train", "recipe=mtard", "recipe.robust_teacher=good", *FAST]
    assert main([*command, "recipe.standard_teacher=good", "hydra.run.dir=student"]) == 0
    rows = Path("student/metrics.csv").read_text().splitlines()
    assert "loss_kl_adversarial" in rows[0] and len(rows) == 2


def test_what_a_killed_process_left_does_not_stop_the_next(place: Path) -> None:
    folder = Path("left")
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.yaml.999.tmp").write_text("half")
    command = ["train", "hydra.run.dir=left", "seed=7", *FAST]
    assert main(command) == 0
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    attack = ["eval", "run=left", "protocol=fgsm", "n=20", "hydra.run.dir=left-eval"]
    assert main(attack) == 0
    journal = Path("left-eval/journal")
    journal.mkdir()
    (journal / "000-000000.npz").touch()
    assert main(attack) == 0
    assert not journal.exists()


def test_a_shape_may_be_a_list(place: Path) -> None:
    assert main([*OWN[:1], "model=m.py:shaped", *OWN[2:], "protocol=fgsm"]) == 0


def test_own_configs_count_inside_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a member of a chain, and inside AWP, a config of the user's own comes first."""
    assert main(["copy", "defense/sparta", "mine"]) == main(["copy", "recipe/trades", "mine"]) == 0
    sparta, trades = Path("mine/defense/sparta.yaml"), Path("mine/recipe/trades.yaml")
    sparta.write_text(sparta.read_text().replace("share: site", "share: net"))
    trades.write_text(trades.read_text().replace("beta: 6.0", "beta: 2.5"))
    words = ["defense=chain", "defense.members=[sparta,hpm]", "recipe=awp", "recipe.of=trades"]
    command = ["train", "--config-dir", "mine", *words, "trainer.val_steps=1", "trainer.epochs=1"]
    assert main([*command, "recipe.of={trades: {steps: 1}}", "hydra.run.dir=mixed"]) == 0
    kept = config.read(Path("mixed/config.yaml"))
    assert kept.defense.members[0].share == "net"
    assert (kept.recipe.of.beta, kept.recipe.of.steps) == (2.5, 1)
    sparta.write_text("defaults: [none]\n" + sparta.read_text())
    capsys.readouterr()
    assert main(command) == 2
    assert "write its values out" in capsys.readouterr().err
