"""The engine's promises: the same bytes whatever happens, and no work lost."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_searches import Cut, Notes, Parts, changed, cut_engine, evaluation, files, net, samples
from processes import Process, killed, main_of, together
from torch import Tensor, nn

from advbench.attacks.pgd import PGD
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.errors import UserError
from advbench.evaluation import search
from advbench.evaluation.batch_sizes import BatchSizes
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import claim
from advbench.evaluation.protocol import Stage, Subject
from advbench.evaluation.protocols import CurveProtocol, PGDProtocol
from advbench.evaluation.store import Store, read_samples
from advbench.runs.results import Results


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    seed: int, whole: Path, tmp_path: Path, restless: None
) -> None:
    rng, case, cuts = np.random.default_rng(seed), evaluation(), 0
    claim(tmp_path, case.plan())
    store = Store(tmp_path)
    while cuts < 5:
        try:
            cut_engine(case, int(rng.integers(3, 25))).run(case.plan().stages, store)
            break
        except Cut:
            cuts += 1
            store = Store(tmp_path)
    assert cuts == 5
    case.execute(tmp_path, case.plan())
    assert files(tmp_path) == files(whole)


def test_an_interruption_loses_no_search(tmp_path: Path, restless: None) -> None:
    """What was under way goes on in its middle: no query is asked twice, but for the last one."""
    asked = []
    for after in (10**9, 40):
        case, folder = evaluation(), tmp_path / str(after)
        calls = Calls(case.job.model)
        case = changed(case, model=calls)
        stages = [Stage("square", Square(steps=90), "a test")]
        folder.mkdir()
        with torch.no_grad():
            try:
                cut_engine(case, after).run(stages, Store(folder))
            except Cut:
                before = len(calls.sizes)
                cut_engine(case, 10**9).run(stages, Store(folder))
                assert len(calls.sizes) > before > 30
        asked.append(sum(calls.sizes))
    # A copy of the model is compared and probed once more, and one batch is asked again.
    assert asked[0] <= asked[1] <= asked[0] + 12 * 16 + 2 * 8


class Calls(nn.Module):
    """Remembers the sizes of its batches, also those of its copies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self.sizes = Shared()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.model(x)


class Shared(list):  # pyright: ignore[reportMissingTypeArgument]
    def __deepcopy__(self, memo: object) -> Shared:
        return self


def test_order_of_the_samples_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    class Shuffled(deque):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, positions: Iterator[int]) -> None:
            order = list(positions)
            super().__init__(np.random.default_rng(len(order)).permutation(order).tolist())

    monkeypatch.setattr(search, "deque", Shuffled)
    case = evaluation()
    case.execute(tmp_path, case.plan())
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("sized", [False, True])
def test_shards_merge_to_the_same_bytes(sized: bool, tmp_path: Path) -> None:
    """Also where a smaller batch would round differently."""
    case = evaluation(Parts(("apgd", "square")))
    case = changed(case, model=Sized(net(), by_place=False)) if sized else case
    case.execute(tmp_path / "one", case.plan())
    claim(tmp_path / "three", case.plan())
    for rank in range(3):
        engine = Engine(replace(case.job, rank=rank, world_size=3))
        assert engine.run(case.plan().stages, Store(tmp_path / "three", rank))
    case.execute(tmp_path / "three", case.plan())
    assert files(tmp_path / "one") == files(tmp_path / "three")


@pytest.mark.parametrize("batch_size", [8, 40])
def test_other_batch_sizes_give_the_same_flags(
    batch_size: int, whole: Path, tmp_path: Path
) -> None:
    case = evaluation(batch_size=batch_size)
    case.execute(tmp_path, case.plan())
    ours, theirs = read_samples(tmp_path), read_samples(whole)
    for name, records in theirs.items():
        assert np.array_equal(ours[name].broken, records.broken), name
        assert np.array_equal(ours[name].label, records.label), name


class Sized(nn.Module):
    """Rounds differently in batches of different sizes and in different places of a batch."""

    def __init__(self, model: nn.Module, by_place: bool) -> None:
        super().__init__()
        self.model, self.by_place = model, by_place
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(len(x), device=x.device)[:, None] if self.by_place else len(x)
        return self.model(x) * (1 + 1e-6 * place)


def test_a_batch_size_that_changes_bits_is_not_used(tmp_path: Path, restless: None) -> None:
    plain, model = net(), Sized(net(), by_place=False)
    clean = samples(plain).fetch(torch.arange(16))
    for target, fits, same_at_all_positions in (
        (plain, [12, 16], True),
        (model, [16, 16], True),
        (Sized(net(), by_place=True), [16, 16], False),
    ):
        sizes_of = BatchSizes(16)
        sizes_of.probe(target, clean)
        assert ([sizes_of.fit(rows) for rows in (12, 15)], sizes_of.same_at_all_positions) == (
            fits,
            same_at_all_positions,
        )

    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
        case = changed(evaluation(), model=model)
        if folder.name == "cut":
            claim(folder, case.plan())
            with pytest.raises(Cut):
                cut_engine(case, 50).run(case.plan().stages, Store(folder))
        case.execute(folder, case.plan())
    assert files(folders[0]) == files(folders[1])


class Pixels(nn.Module):
    """Logits that are pixels: no kernel can round them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


def test_sizes_of_batches() -> None:
    clean = samples(net()).fetch(torch.arange(40))
    for coarse, rows, sizes in (
        (False, (1, 2, 3, 15, 17, 31, 33, 39), [2, 2, 4, 16, 18, 32, 36, 40]),
        (True, (1, 2, 3, 5, 8, 9, 17, 33), [1, 2, 4, 8, 8, 16, 32, 40]),
    ):
        sizes_of = BatchSizes(40, coarse)
        sizes_of.probe(Pixels(), clean)
        assert [sizes_of.fit(number) for number in rows] == sizes


def work(folder: Path) -> None:
    search.COMMIT_SECONDS = search.SAVE_SECONDS = 0.0
    search.SAVE_SHARE = np.inf
    case = evaluation()
    case.execute(folder, case.plan())


def test_killed_at_random_moments_it_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        writes = int(rng.integers(1, 6)) * int(rng.choice([-1, 1]))
        process = Process(killed, "*", writes, work, tmp_path, folder=tmp_path)
        assert process.wait() == -signal.SIGKILL, process.output
    assert not (tmp_path / "results.json").exists()
    assert Process(work, tmp_path, folder=tmp_path).wait() == 0
    assert files(tmp_path) == files(whole)


def test_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    """Through the command line: samples dealt out to two processes, results merged."""
    model = tmp_path / "own.py"
    model.write_text("import made_up_searches\n\ndef build():\n    return made_up_searches.net()\n")
    case = samples(net())
    x = np.round(case.fetch(case.ids).x.numpy().transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    y = case.split.labels.numpy()
    np.savez(tmp_path / "test.npz", x_test=x, y_test=y)
    for devices in (1, 2):
        words = [
            *("eval", f"model={model}:build", "data=npz", "data.path=test.npz", "threat=linf_015"),
            *("protocol=apgd", "protocol.steps=10", "trainer.batch_size=16"),
            *(f"trainer.devices={devices}", "trainer.accelerator=cpu", f"hydra.run.dir={devices}"),
        ]
        said = together(devices, main_of, words, folder=tmp_path)
        assert said.count("robust accuracy") == 1
    assert files(tmp_path / "1") == files(tmp_path / "2")
    one, two = (Results.load(tmp_path / d / "results.json") for d in "12")
    assert (one.robust, one.clean) == (two.robust, two.clean)


# --- memory, time -------------------------------------------------------------------------------


class Tight(nn.Module):
    """Has no memory for more than ``most`` images at once."""

    def __init__(self, model: nn.Module, most: int, error: type[RuntimeError], text: str) -> None:
        super().__init__()
        self.model, self.most, self.error, self.text = model, most, error, text
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most and torch.is_grad_enabled():
            raise self.error(self.text)
        return self.model(x)


ERRORS = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize(("error", "text"), ERRORS)
def test_out_of_memory_ends_with_the_same_result(
    error: type[RuntimeError], text: str, tmp_path: Path, whole: Path
) -> None:
    case = evaluation(batch_size=40)
    case = changed(case, model=Tight(net(), 16, error, text))
    progress = Notes()
    results = case.execute(tmp_path, case.plan(), progress)
    assert any("out of memory" in note for note in progress.notes)
    assert results.robust == Results.load(whole / "results.json").robust
    ours, theirs = read_samples(tmp_path), read_samples(whole)
    for name, records in theirs.items():
        assert np.array_equal(ours[name].broken, records.broken), name


class Fading(nn.Module):
    """Loses its memory in the middle of a search."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = Shared()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        if len(self.calls) > 60 and len(x) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(x)


def test_out_of_memory_in_the_middle_of_a_search(whole: Path, tmp_path: Path) -> None:
    case = changed(evaluation(), model=Fading(net()))
    progress = Notes()
    case.execute(tmp_path, case.plan(), progress)
    assert any("8 samples side by side" in note for note in progress.notes)
    ours, theirs = read_samples(tmp_path), read_samples(whole)
    for name, records in theirs.items():
        for column in ("broken", "label", "forwards", "backwards"):  # no search counts twice
            assert np.array_equal(getattr(ours[name], column), getattr(records, column)), name
        np.testing.assert_allclose(ours[name].margin, records.margin, atol=1e-5)


def test_without_memory_for_one_image_it_says_so() -> None:
    case = changed(evaluation(), model=Tight(net(), 0, *ERRORS[0]))
    engine = Engine(case.job)
    with pytest.raises(UserError, match="does not hold a single image"):
        engine.run([Stage("pgd", PGD(), "")], Store(None))


def test_stages_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice(Parts):
        def stages(self, subject: Subject) -> list[Stage]:
            return 2 * super().stages(subject)

    with pytest.raises(UserError, match="stages of the same name: apgd, apgd"):
        evaluation(Twice(wanted=("apgd",))).plan()
    near: list[float | str] = [0.0156863, 0.0313725]
    assert CurveProtocol(eps=near).radii(Threat("linf", "8/255")) == [0.0156863, 8 / 255]


@pytest.mark.parametrize(
    ("first", "second"), [((0, 1), (1, 2)), ((1, 2), (0, 1)), ((0, 2), (1, 2))]
)
def test_searches_of_other_processes_are_ignored(
    first: tuple[int, int], second: tuple[int, int], tmp_path: Path, restless: None
) -> None:
    """Cut, gone on with by another number of processes, and cut again."""
    protocol = PGDProtocol(steps=4, restarts=5, loss="margin")
    case = evaluation(protocol, n=40, batch_size=8)
    case.execute(tmp_path / "whole", case.plan())
    for n, cuts in enumerate(((8, 30), (14, 6), (18, 15))):
        folder = tmp_path / str(n)
        claim(folder, case.plan())
        for share, cut in zip((first, second), cuts, strict=True):
            engine = Engine(replace(cut_engine(case, cut).job, rank=share[0], world_size=share[1]))
            with suppress(Cut):
                engine.run(case.plan().stages, Store(folder, share[0]))
        case.execute(folder, case.plan())
        assert files(folder) == files(tmp_path / "whole")
