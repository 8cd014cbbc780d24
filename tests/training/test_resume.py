"""A training that is interrupted ends as one that is not."""

from __future__ import annotations

import random
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from processes import Process, killed, main_of
from small import STEPS, Planted, Stripes, assert_same_result, fit, position, table

from advbench.errors import UserError
from advbench.progress import NullProgress
from advbench.training import loop
from advbench.training.checkpoint import Checkpoints, load_resume, save_resume
from advbench.training.optimizers import SGD, AdamW
from advbench.training.trainer import Trainer

# Interruption


@pytest.mark.parametrize(
    ("trainer", "optimizer"),
    [
        (Trainer(epochs=3, batch_size=16, val_steps=1, save_every=0), SGD(warmup=0.5)),
        (
            Trainer(epochs=3, batch_size=16, val_steps=1, save_every=0, ema=0.9, clip_grad=0.5),
            AdamW(lr=0.01),
        ),
    ],
)
def test_an_interrupted_training_goes_on(tmp_path, monkeypatch, trainer, optimizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepared: list[bool] = []
    fit(whole, trainer, optimizer=optimizer, defense=Planted())
    for stop_at in (3, 6, 11, 15):
        with pytest.raises(KeyboardInterrupt):
            defense = Planted(stop_at=stop_at, prepared=prepared)
            fit(parts, trainer, optimizer=optimizer, defense=defense)
        epoch, batch = position(parts)
        assert epoch * STEPS + batch == stop_at
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "accuracies", Mock(side_effect=KeyboardInterrupt))
        fit(parts, trainer, optimizer=optimizer, defense=Planted(prepared=prepared))
    notes: list[str] = []

    class Notes(NullProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    defense = Planted(prepared=prepared)
    fit(parts, trainer, optimizer=optimizer, defense=defense, progress=Notes())
    assert_same_result(whole, parts)
    assert prepared == [False], "prepared once, in eval mode"
    assert notes == ["resuming at epoch 3 of 3, step 6 of 6"]
    assert len(list(parts.iterdir())) == 4


@pytest.mark.parametrize("after", ["position", "last.safetensors", "model.safetensors"])
def test_files_are_those_of_a_finished_epoch_wherever_it_is_killed(tmp_path, monkeypatch, after):
    """Repeated on a GPU, an epoch may end otherwise: nothing may be left of the first attempt."""
    trainer = Trainer(epochs=3, batch_size=16, val_steps=1)
    whole, parts, written = tmp_path / "whole", tmp_path / "parts", []
    saves = {"weights": loop.save_weights, "start": Checkpoints.save_start}

    def weights(model, path) -> None:
        saves["weights"](model, path)
        written.append(path.name)
        if written.count(after) == 2:
            raise KeyboardInterrupt

    def start(checkpoints: Checkpoints, state) -> None:
        if after == "position" and state["position"]["epoch"] == 2:
            raise KeyboardInterrupt
        saves["start"](checkpoints, state)

    with monkeypatch.context() as patch:
        # Every epoch is the best so far.
        best = iter([(0.5, epoch / 10) for epoch in (1, 2, 3, 1, 2, 2, 3)])
        patch.setattr(loop, "accuracies", lambda *_, **__: next(best))
        fit(whole, trainer)
        with monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
            kill.setattr(loop, "save_weights", weights)
            kill.setattr(Checkpoints, "save_start", start)
            fit(parts, trainer)
        ended = 1 if after == "position" else 2
        assert position(parts) == (ended, 0)
        if after == "position":
            assert written == ["last.safetensors", "model.safetensors"], "of the first epoch"
            assert len(table(parts)) == 1
        else:
            next(best)
        fit(parts, trainer)
    assert_same_result(whole, parts)


def test_the_newest_state_is_of_this_epoch_and_this_attempt(tmp_path):
    """Killed after the state of a new epoch was written and before the old one was removed."""

    def at(epoch: int, batch: int, **guards: str) -> dict:
        return {"position": {"epoch": epoch, "batch": batch, "guards": guards}}

    checkpoints = Checkpoints(tmp_path, {"run": "a"}, writes=True)
    assert checkpoints.newest() is None
    for start, inside, newest in (
        (at(1, 0), at(1, 3), at(1, 3)),
        (at(2, 0), at(1, 5), at(2, 0)),
        (at(2, 0, diverged="why"), at(2, 4), at(2, 0, diverged="why")),
    ):
        checkpoints.save_start(start)
        assert checkpoints.newest() == start
        checkpoints.save_inside(inside)
        assert checkpoints.newest() == newest and checkpoints.start() == start
    checkpoints.save_start(at(3, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch.pt"]
    Checkpoints(tmp_path, {"run": "a"}, writes=False).save_start(at(4, 0))
    assert checkpoints.newest() == at(3, 0)


def test_a_finished_training_is_not_repeated(tmp_path):
    summary = fit(tmp_path)
    for name in ("resume.pt", "epoch.pt"):
        (tmp_path / name).write_bytes(b"killed before it was removed")
    assert fit(tmp_path, defense=Planted(bad_from=0)) == summary
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(UserError, match=r"another run: take another hydra\.run\.dir"):
        fit(tmp_path, identity={"run": "b"})


def test_another_identity_or_number_of_devices_does_not_go_on(tmp_path):
    trainer = Trainer(epochs=1, batch_size=16, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, trainer, defense=Planted(stop_at=3))
    with pytest.raises(UserError, match="another run"):
        fit(tmp_path, trainer, identity={"run": "b"})
    saved = load_resume(tmp_path / "resume.pt", {"run": "a"})
    assert saved is not None
    save_resume(tmp_path / "resume.pt", {**saved, "devices": 2}, {"run": "a"})
    with pytest.raises(UserError, match=r"trainer\.devices=2"):
        fit(tmp_path, trainer)
    (tmp_path / "resume.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="remove it to start again"):
        fit(tmp_path, trainer)


class Global:
    """What a pickle could smuggle in."""


def test_resume_runs_no_code(tmp_path):
    torch.save({"identity": "{}", "state": {"planted": Global()}}, tmp_path / "resume.pt")
    with pytest.raises(UserError, match="is damaged or another run's"):
        load_resume(tmp_path / "resume.pt", {})
    assert load_resume(tmp_path / "missing.pt", {}) is None


COMMON = (
    "data=npz",
    "data.path=data.npz",
    "trainer.epochs=4",
    "trainer.batch_size=8",
    "trainer.val_steps=1",
    "trainer.save_every=0",
)
COMMANDS = {
    "plain": ("recipe.steps=1",),
    # Everything that has a state: average, displaced weights, prototypes.
    "more": ("trainer.ema=0.9", "defense=hpm", "recipe=awp", "recipe.of={pgd_at: {steps: 1}}"),
}


def test_a_training_that_is_killed_five_times_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = Stripes().open("train")
    x, y = images.fetch(torch.arange(len(images)), "cpu")
    np.savez("data.npz", x_train=x.permute(0, 2, 3, 1).numpy(), y_train=y.numpy())
    moments = random.Random(0)
    for name, more in COMMANDS.items():
        whole, parts = tmp_path / f"{name}-whole", tmp_path / f"{name}-parts"
        words = ["train", *COMMON, *more, f"hydra.run.dir={parts}"]
        inside = 0
        for _ in range(5):
            writes = moments.randint(1, STEPS) * moments.choice((-1, 1))
            process = Process(killed, "resume.pt", writes, main_of, words, folder=tmp_path)
            assert process.wait() == -signal.SIGKILL, process.output
            inside += position(parts)[1] > 0
        assert inside >= 2, "some kills were inside an epoch"
        for folder in (parts, whole):
            words[-1] = f"hydra.run.dir={folder}"
            process = Process(main_of, words, folder=tmp_path)
            assert process.wait() == 0, process.output
        assert_same_result(whole, parts)
        files = {path.name for path in parts.iterdir()}
        assert files == {path.name for path in whole.iterdir()}, "no temporary file is left"
    assert len(COMMANDS) == 2
