"""``advbench verify``: what of a claim stands, on true claims and on forged ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import FAST, MODEL, arrays, without_checksums
from safetensors.numpy import load_file, save_file

from advbench.attacks.threat import Threat
from advbench.cli.main import main
from advbench.data.base import ArraySplit
from advbench.defenses.base import Traits
from advbench.evaluation.job import Job
from advbench.evaluation.rescoring import rescore
from advbench.evaluation.samples import Samples
from advbench.evaluation.witnesses import Witnesses

OWN = ["model=m.py:build", "data=npz", "data.path=ok.npz", "threat=linf_8"]


@pytest.fixture
def claims(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """A directory with a training run, an evaluation of it and one of a model of the user's own."""

    def make() -> None:
        Path("m.py").write_text(MODEL)
        np.savez("ok.npz", **arrays())  # pyright: ignore
        assert main(["train", "hydra.run.dir=good", *FAST]) == 0
        common = ["protocol=pgd", "protocol.steps=3", "adversarial=true", "n=30"]
        assert main(["eval", "run=good", "hydra.run.dir=claim", *common]) == 0
        assert main(["eval", *OWN, "hydra.run.dir=own", *common]) == 0
        del sys.modules["m"]  # the test that comes first has a file of that name elsewhere

    return start_in("claims", make)


def verify(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["verify", *words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out + said.err


def changed_images(change: Callable[[np.ndarray], object]) -> None:
    content = load_file("claim/adversarial.safetensors")
    change(content["x"])
    save_file(content, "claim/adversarial.safetensors")


def moved_out() -> None:
    def move(x: np.ndarray) -> None:
        x[0] = 1 - x[0]

    changed_images(move)


def one_less() -> None:
    content = load_file("claim/adversarial.safetensors")
    save_file({k: v[1:] for k, v in content.items()}, "claim/adversarial.safetensors")


def cut() -> None:
    path = Path("claim/adversarial.safetensors")
    path.write_bytes(path.read_bytes()[:-40])


def column(name: str) -> None:
    table = pq.read_table("claim/samples.parquet")
    values, broken = table[name].to_numpy().copy(), table["broken"].to_numpy()
    row = int(
        np.flatnonzero(broken & (table["stage"].to_numpy(zero_copy_only=False) != "clean"))[0]
    )
    values[row] = {"label": (values[row] + 1) % 10, "broken": False}[name]
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, pa.array(values)), "claim/samples.parquet")


def swapped() -> None:
    content = load_file("good/model.safetensors")
    for value in content.values():
        if value.dtype == np.float32:
            value *= 1.001
    save_file(content, "good/model.safetensors")


def better() -> None:
    results = json.loads(Path("claim/results.json").read_text())
    plan = json.loads(Path("claim/plan.json").read_text())
    plan["identity"]["data"]["sha256"] = results["data"]["sha256"] = "0" * 64
    Path("claim/results.json").write_text(json.dumps(results))


FORGERIES: dict[str, tuple[Callable[[], object], str]] = {
    "an image outside the ball": (moved_out, "1 image outside linf"),
    "an image less": (one_less, "lacks 1 image"),
    "a cut file of images": (cut, "adversarial.safetensors' is damaged"),
    "no file of images": (
        lambda: Path("claim/adversarial.safetensors").unlink(),
        "adversarial.safetensors is missing",
    ),
    "another label": (lambda: column("label"), "names another class"),
    "a broken sample that is said to be robust": (lambda: column("broken"), "results.json says"),
    "a cut table": (
        lambda: Path("claim/samples.parquet").write_bytes(b"PAR1"),
        "samples.parquet can't be read",
    ),
    "another model": (swapped, "the model: not that of the claim"),
    "other data": (better, "the data: images or labels are not those of results.json"),
}


def test_a_true_claim_stands(claims: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = verify(capsys, "claim")
    acc = json.loads(Path("claim/results.json").read_text())["robust"]["acc"]
    assert code == 0, said
    assert f"robust accuracy at most {100 * acc:.1f} %" in said and "the claim stands" in said
    code, said = verify(capsys, "claim", "--json")
    found = json.loads(said)
    assert code == 0 and found["stands"] and found["stand"] == found["witnesses"] > 3
    assert found["robust_at_most"] == pytest.approx(acc) and found["problems"] == []


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_claim_does_not_stand(
    claims: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    forge, expected = FORGERIES[kind]
    without_checksums("claim", "good")
    forge()
    code, said = verify(capsys, "claim")
    assert code == 1 and expected in said and "does NOT stand" in said, said


def test_a_model_of_ones_own_is_said_again(
    claims: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = verify(capsys, "own")
    assert code == 2 and said.endswith("advbench verify own model=m.py:build\n"), said
    assert verify(capsys, "own", "model=m.py:build")[0] == 0
    Path("m.py").write_text(MODEL.replace("manual_seed(0)", "manual_seed(1)"))
    code, said = verify(capsys, "own", "model=m.py:build")
    assert code == 1 and "the model: not that of the claim" in said, said


def test_files_that_moved_are_said_again(claims: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("ok.npz").rename("moved.npz")
    kept = Path("own/config.yaml")  # which names the file where the fixture made it
    kept.write_text(kept.read_text().replace("ok.npz", "gone.npz"))
    assert verify(capsys, "own", "model=m.py:build")[0] == 2
    assert verify(capsys, "own", "model=m.py:build", "data.path=moved.npz")[0] == 0
    Path("good").rename("away")
    assert verify(capsys, "claim")[0] == 2
    assert verify(capsys, "claim", "run=away", "trainer.batch_size=8")[0] == 0


def test_images_made_elsewhere(claims: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load("ok.npz") as content:
        clean = content["x_test"]
    x = torch.from_numpy(clean).movedim(-1, 1).float() / 255
    torch.manual_seed(0)
    near = (x + (8 / 255) * torch.randn_like(x).sign()).clamp(0, 1)
    far = near.clone()
    far[:3] = (x[:3] + 0.2).clamp(0, 1)
    far[3, 0, 0, 0] = 1.5
    torch.save(near, "near.pt")
    torch.save({"x_adv": far}, "far.pt")
    np.save("last.npy", np.asarray(near.movedim(1, -1)))
    np.savez("bytes.npz", x=np.asarray((near * 255).round().to(torch.uint8)))
    save_file(
        {"sample": np.arange(32)[::-1].copy(), "x": near.flip(0).contiguous().numpy()},
        "ids.safetensors",
    )
    found = {}
    for file in ("near.pt", "far.pt", "last.npy", "bytes.npz", "ids.safetensors"):
        code, said = verify(capsys, "--images", file, *OWN, "trainer.batch_size=5", "--json")
        assert code == 0, said
        found[file] = json.loads(said)
    assert found["near.pt"]["witnesses"] == 32 and found["near.pt"]["outside_the_ball"] == 0
    for file in ("last.npy", "bytes.npz", "ids.safetensors"):
        ours, theirs = found[file], found["near.pt"]
        assert ours["robust_at_most"] == theirs["robust_at_most"], file
    off = found["far.pt"]
    assert (off["outside_the_ball"], off["outside_the_range"]) == (4, 1)
    assert off["farthest_outside"] > 0.1
    assert verify(capsys, "--images", "near.pt", *OWN, "n=7")[0] == 0


MISTAKES = {
    "too few": (np.zeros((7, 3, 8, 8), np.float32), "has 7 images and the test split 32"),
    "another shape": (np.zeros((32, 3, 9, 9), np.float32), "has images of shape (3, 9, 9)"),
    "integers": (np.zeros((32, 3, 8, 8), np.int64), "holds images of int64"),
    "not scaled": (np.full((32, 3, 8, 8), 200.0), "pixels far above 1"),
    "flat": (np.zeros((32, 192)), "no one array of images"),
    "an object": (np.array([{}], object), "can't be read"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_file_that_does_not_fit_is_one_line(
    claims: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    array, expected = MISTAKES[kind]
    np.save("x.npy", array)
    code, said = verify(capsys, "--images", "x.npy", *OWN)
    assert code == 2 and expected in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "give the directory of one evaluation"),
        (["claim", "own"], "give the directory of one evaluation"),
        (["good"], "is no evaluation"),
        (["claim", "threat=linf_8"], "threat is the claim's own"),
        (["--images", "none.pt", *OWN], "there is no file 'none.pt'"),
        (["--images", "m.py", *OWN], "give a file that ends in"),
    ],
)
def test_a_mistake_is_one_line(
    claims: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    code, said = verify(capsys, *words)
    assert code == 2 and expected in said and said.count("\n") == 1, said


@pytest.mark.parametrize("words", [["own"], ["--images", "x.npy"]])
def test_data_that_the_model_cannot_take_are_one_line(
    claims: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    wide = {f"x_{part}": arrays()[f"x_{part}"][:, :, :6] for part in ("train", "test")}
    np.savez("wide.npz", **arrays(**wide))  # pyright: ignore
    np.save("x.npy", wide["x_test"])
    given = [word for word in OWN if "threat" not in word or words[0] == "--images"]
    code, said = verify(capsys, *words, *given, "data.path=wide.npz")
    assert code == 2 and "can't take the data's images" in said and said.count("\n") == 1, said


class Sizes(torch.nn.Module):
    """Class 1 where the mean of an image is above that of the batch; remembers its batches."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise, self.seen = noise, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        mean = x.flatten(1).mean(1) + self.noise * torch.randn(len(x))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


@pytest.mark.parametrize("rule", ["plain", "stochastic", "batches"])
def test_each_image_is_judged_by_the_deployed_rule(rule: str) -> None:
    traits = {
        "plain": Traits(),
        "stochastic": Traits(stochastic=True),
        "batches": Traits(batch_dependent=True, batch_size=6),
    }[rule]
    x = torch.full((20, 1, 2, 2), 0.4)
    split = ArraySplit(x, torch.zeros(20, dtype=torch.long))
    model = Sizes(noise=0.02 * traits.stochastic).eval()
    samples = Samples(split, torch.arange(20), torch.device("cpu"))
    job = Job(model, samples, Threat("linf", 0.2), traits, batch_size=8)
    images = np.full((3, 1, 2, 2), 0.58, np.float32)
    images[1], images[2] = 0.45, 0.9  # right, and out of the ball
    scores = rescore(job, Witnesses(np.array([2, 5, 7]), images))
    assert scores.sample.tolist() == list(range(20))
    assert np.flatnonzero(scores.stands).tolist() == [2] == np.flatnonzero(scores.wrong).tolist()
    assert scores.proven == pytest.approx(0.95) and scores.counts.sum() == 2
    assert scores.excess[7] == pytest.approx(0.3, abs=1e-5)
    assert max(model.seen) <= 8
    passes = {"plain": 3, "stochastic": 30, "batches": 4 + 2}[rule]
    assert len(model.seen) == passes
    if rule == "batches":
        assert set(model.seen) == {6}
