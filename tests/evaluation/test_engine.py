"""The engine's promises: the same bytes whatever happens, no work lost, no success invented."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advbench
from advbench.attacks.apgd import APGD
from advbench.attacks.base import Attack, Clean
from advbench.attacks.fab import FAB
from advbench.attacks.pgd import PGD
from advbench.attacks.referee import Referee
from advbench.attacks.square import Square
from advbench.attacks.threat import Threat
from advbench.data.base import ArraySplit
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation import deadline, search, stage_cache
from advbench.evaluation.batch_sizes import Shapes
from advbench.evaluation.engine import CLEAN, Engine
from advbench.evaluation.eta import Forecast
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.fast_model import Searcher, Speed, ask, searcher
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.protocols import CurveProtocol, PGDProtocol
from advbench.evaluation.resources import Resources
from advbench.evaluation.samples import Samples
from advbench.evaluation.store import Store, read_samples
from advbench.progress import NullProgress
from advbench.runs.fingerprint import model_sha256
from advbench.runs.results import Results

SHAPE = (1, 6, 6)
EPS = 0.06


class Net(nn.Module):
    """Convolutions, batch norm, two kinds of layers whose kernels depend on the batch's size."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 32),
            nn.ReLU(),
            nn.Linear(32, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def net(classes: int = 5) -> nn.Module:
    torch.manual_seed(3)
    model = Net(classes).eval()
    batch_norm = model.body[1]
    assert isinstance(batch_norm, nn.BatchNorm2d)
    nn.init.uniform_(batch_norm.running_var, 0.5, 2)  # pyright: ignore
    nn.init.normal_(batch_norm.running_mean, std=0.1)  # pyright: ignore
    return model


def samples(model: nn.Module, n: int = 40) -> Samples:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return Samples(ArraySplit(x, y), torch.arange(n), torch.device("cpu"))


@dataclass(frozen=True)
class Mixed(Protocol):
    """One stage of each kind of attack, short enough for a test."""

    name = "mixed"

    def stages(self, subject: Subject) -> list[Stage]:
        attacks: dict[str, Attack] = {
            "apgd": APGD(steps=12, loss_name="ce"),
            "apgd-t": APGD(steps=8, loss_name="dlr_targeted", targets=3),
            "fab-t": FAB(steps=6, targets=2),
            "square": Square(steps=90),
        }
        return [Stage(name, attack, "a test") for name, attack in attacks.items()]


def evaluation(protocol: Protocol | None = None, slots: int = 16, n: int = 40) -> Evaluation:
    model = net()
    threat = Threat("linf", EPS)
    case = samples(model, n)
    return Evaluation(
        "net", model, Traits(), case, "made", threat, protocol or Mixed(), slots=slots
    )


def files(folder: Path) -> bytes:
    return (folder / "samples.parquet").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    case = evaluation()
    results = case.execute(folder, case.stages())
    broken = [stage.broken for stage in results.stages]
    assert broken[0] > 3 and sum(broken[1:]) > 0 and results.robust.acc > 0.1, broken
    return folder


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written down at once."""
    for name in ("COMMIT_SECONDS", "TELL_SECONDS", "FLIGHT_SECONDS"):
        monkeypatch.setattr(search, name, 0.0)
    monkeypatch.setattr(search, "FLIGHT_SHARE", np.inf)


# --- the same bytes -----------------------------------------------------------------------------


class Cut(Exception):
    pass


def impatient(after: int) -> Callable[[], bool]:
    """A clock that stops an evaluation, as a kill would, after so many looks."""
    looks = itertools.count()

    def hurry() -> bool:
        if next(looks) >= after:
            raise Cut
        return False

    return hurry


def cut_engine(case: Evaluation, after: int) -> Engine:
    return Engine(case.model, case.samples, case.threat, slots=case.slots, hurry=impatient(after))


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_anywhere_it_ends_with_the_same_bytes(
    seed: int, whole: Path, tmp_path: Path, restless: None
) -> None:
    rng, case, cuts = np.random.default_rng(seed), evaluation(), 0
    store = Store(tmp_path)
    while cuts < 5:
        try:
            cut_engine(case, int(rng.integers(3, 25))).run(case.stages(), store)
            break
        except Cut:
            cuts += 1
            store = Store(tmp_path)
    assert cuts == 5
    case.execute(tmp_path, case.stages())
    assert files(tmp_path) == files(whole)


def test_an_interruption_loses_no_search(tmp_path: Path, restless: None) -> None:
    """What was under way goes on in its middle: no query is asked twice, but for the last one."""
    asked = []
    for after in (10**9, 40):
        case, folder = evaluation(), tmp_path / str(after)
        calls = Calls(case.model)
        case = replace(case, model=calls)
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
    # A copy of the model is compared and probed once more, and one round of slots is asked again.
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
    board = search.Search._board

    class Shuffled(deque):  # pyright: ignore[reportMissingTypeArgument]
        def __init__(self, positions: Iterator[int]) -> None:
            order = list(positions)
            super().__init__(np.random.default_rng(len(order)).permutation(order).tolist())

    monkeypatch.setattr(search, "deque", Shuffled)
    assert board is search.Search._board
    case = evaluation()
    case.execute(tmp_path, case.stages())
    assert files(tmp_path) == files(whole)


@pytest.mark.parametrize("sized", [False, True])
def test_shards_merge_to_the_same_bytes(sized: bool, tmp_path: Path) -> None:
    """Also where a smaller batch would round differently."""
    case = evaluation(Parts(("apgd", "square")))
    case = replace(case, model=Sized(net(), by_place=False)) if sized else case
    case.execute(tmp_path / "one", case.stages())
    (tmp_path / "three").mkdir()
    for rank in range(3):
        engine = Engine(case.model, case.samples, case.threat, slots=16, share=(rank, 3))
        assert engine.run(case.stages(), Store(tmp_path / "three", rank))
    case.execute(tmp_path / "three", case.stages())
    assert files(tmp_path / "one") == files(tmp_path / "three")


@pytest.mark.parametrize("slots", [8, 40])
def test_other_batch_sizes_give_the_same_flags(slots: int, whole: Path, tmp_path: Path) -> None:
    case = evaluation(slots=slots)
    case.execute(tmp_path, case.stages())
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
    for target, fits, placeless in (
        (plain, [12, 16], True),
        (model, [16, 16], True),
        (Sized(net(), by_place=True), [16, 16], False),
    ):
        shapes = Shapes(16)
        shapes.probe(target, clean)
        assert ([shapes.fit(rows) for rows in (12, 15)], shapes.placeless) == (fits, placeless)

    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
        case = replace(evaluation(), model=model)
        if folder.name == "cut":
            with pytest.raises(Cut):
                cut_engine(case, 50).run(case.stages(), Store(folder))
        case.execute(folder, case.stages())
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
        shapes = Shapes(40, coarse)
        shapes.probe(Pixels(), clean)
        assert [shapes.fit(number) for number in rows] == sizes


SCRIPT = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
torch.set_num_threads(1)
import test_engine, numpy as np
from pathlib import Path
from advbench.evaluation import search
search.COMMIT_SECONDS = search.FLIGHT_SECONDS = 0.0
search.FLIGHT_SHARE = np.inf
case = test_engine.evaluation()
case.execute(Path(sys.argv[2]), case.stages())
"""


def test_killed_at_random_moments_it_ends_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(int(time.time()))
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]
    kills = 0
    for _ in range(60):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        if kills < 5:
            while not (tmp_path / "plan.json").exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5 if kills else 0.3))
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        elif process.wait() == 0:
            break
        if (tmp_path / "results.json").exists():
            break
    assert kills >= 2 and (tmp_path / "results.json").exists()
    assert files(tmp_path) == files(whole)


def test_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    """Through the command line: samples dealt out to two processes, results merged."""
    model = tmp_path / "own.py"
    model.write_text(
        f"import sys; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r}\n"
        "import test_engine\n\ndef build():\n    return test_engine.net()\n"
    )
    case = samples(net())
    x = np.round(case.fetch(case.ids).x.numpy().transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    y = case.split.labels.numpy()
    np.savez(tmp_path / "test.npz", x_test=x, y_test=y)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "advbench", "eval", f"model={model}:build", "data=npz"),
                *(f"data.path={tmp_path / 'test.npz'}", "threat=linf_015", "protocol=apgd"),
                *("protocol.steps=10", "trainer.batch_size=16", f"trainer.devices={devices}"),
                *("trainer.accelerator=cpu", f"hydra.run.dir={tmp_path / str(devices)}"),
            ],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("robust accuracy") == 1
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


class Notes(NullProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("error", "text"), ERRORS)
def test_out_of_memory_ends_with_the_same_result(
    error: type[RuntimeError], text: str, tmp_path: Path, whole: Path
) -> None:
    case = evaluation(slots=40)
    case = replace(case, model=Tight(net(), 16, error, text))
    progress = Notes()
    results = case.execute(tmp_path, case.stages(), progress)
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
    case = replace(evaluation(), model=Fading(net()))
    progress = Notes()
    case.execute(tmp_path, case.stages(), progress)
    assert any("8 samples side by side" in note for note in progress.notes)
    ours, theirs = read_samples(tmp_path), read_samples(whole)
    for name, records in theirs.items():
        for column in ("broken", "label", "forwards", "backwards"):  # no search counts twice
            assert np.array_equal(getattr(ours[name], column), getattr(records, column)), name
        np.testing.assert_allclose(ours[name].margin, records.margin, atol=1e-5)


def test_without_memory_for_one_image_it_says_so() -> None:
    case = replace(evaluation(), model=Tight(net(), 0, *ERRORS[0]))
    engine = Engine(case.model, case.samples, case.threat, slots=16)
    with pytest.raises(UserError, match="does not hold a single image"):
        engine.run([Stage("pgd", PGD(), "")], Store(None))


def test_a_budget_stops_in_time_and_goes_on(whole: Path, tmp_path: Path) -> None:
    case = evaluation()
    sittings = 0
    while True:
        begin = time.perf_counter()
        results = case.execute(tmp_path, case.stages(), budget=0.15 * 1.05**sittings)
        sittings += 1
        if not results.missing:
            break
        assert time.perf_counter() - begin < 5
        assert Results.load(tmp_path / "results.json").missing == results.missing
        assert results.missing[-1] == "square" and sittings < 200
        assert results.robust.acc >= Results.load(whole / "results.json").robust.acc
    assert sittings > 2
    assert files(tmp_path) == files(whole)
    assert "missing" in (tmp_path / "results.json").read_text()


def test_durations() -> None:
    for text, value in (("90s", 90), ("10min", 600), ("1.5h", 5400), ("1h 30min", 5400)):
        assert deadline.seconds(text) == value
    for text in ("10", "ten min", "0s", "5 parsecs", "", "-3min", "1h,3min"):
        with pytest.raises(UserError, match="is not a duration: write"):
            deadline.seconds(text)


def test_the_forecast_is_right_within_a_quarter() -> None:
    """On a made-up stage: 200 samples, a third of which break at once and some later."""
    rng = np.random.default_rng(0)
    n, queries, slots = 200, 900, 32
    ends = np.where(rng.random(n) < 0.33, rng.integers(1, 60, n), queries)
    late = rng.random(n) < 0.1
    ends[late] = rng.integers(1, queries, late.sum())
    clock = itertools.count()
    forecast = Forecast(queries)
    waiting, under_way, history = list(range(n)), {}, []
    while waiting or under_way:
        while waiting and len(under_way) < slots:
            under_way[waiting.pop(0)] = 0
        tick = next(clock)
        forecast.query_seconds = 1.0
        for sample in list(under_way):
            under_way[sample] += 1
            if under_way[sample] == ends[sample]:
                forecast.ended(under_way.pop(sample), bool(ends[sample] < queries))
        ages = np.array(list(under_way.values()), dtype=np.int64)
        history.append((tick, forecast.seconds(ages, len(waiting), slots)))
    total = len(history)
    checked = [(tick, left) for tick, left in history if 0.1 < tick / total < 0.9]
    assert len(checked) > 1000
    for tick, left in checked:
        assert abs(left - (total - tick)) <= 0.25 * total, (tick, left, total)


# --- what is searched, and what is scored -------------------------------------------------------


def test_the_search_copy_is_the_model_folded() -> None:
    model = net()
    clean = samples(model).fetch(torch.arange(8))
    fast = searcher(model, Speed(), clean)
    assert isinstance(fast, Searcher)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    for a, b in zip(ask(model, clean), ask(fast, clean), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters())


class Shy(nn.Module):
    """Hides its gradient in a way that a traced copy would not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.inner(x)
        return hidden + 1e-3 * x.flatten(1)[:, :5]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else -self.inner(x)


class Singleton(nn.Module):
    """Can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.eval()

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("cannot copy a lock")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("make", [Shy, Branching, Singleton])
def test_a_copy_that_is_another_function_is_not_used(make: type[nn.Module]) -> None:
    model = make()
    clean = samples(net()).fetch(torch.arange(8))
    fast = searcher(model, Speed(), clean)
    assert (fast is model) == (make is Singleton)
    for a, b in zip(ask(model, clean), ask(fast, clean), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


def test_a_search_in_bf16_is_confirmed_in_float32(whole: Path) -> None:
    case = replace(evaluation(), speed=Speed("bf16"))
    store = Store(None)
    engine = Engine(case.model, case.samples, case.threat, slots=16, speed=case.speed)
    engine.run(case.stages(), store)
    broken = {name: int(store.records(name).broken.sum()) for name in ("apgd", CLEAN)}
    exact = read_samples(whole)
    assert broken[CLEAN] == exact[CLEAN].broken.sum()
    assert abs(broken["apgd"] - int(exact["apgd"].broken.sum())) <= 3
    for name in ("apgd", "apgd-t", "fab-t", "square"):
        records = store.records(name)
        assert (records.margin[records.broken] <= 0).all()
        assert (records.margin[~records.broken] > 0).all()


class Liar(nn.Module):
    """Calls every image misclassified."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 5) + 0 * x.flatten(1)[:, :5]


def test_a_surrogate_is_searched_and_the_model_is_scored() -> None:
    model = net()
    case = samples(model)
    stages = [
        Stage("lies", PGD(steps=5), "nothing is broken because a surrogate says so", "liar"),
        Stage("twin", APGD(steps=10), "the same weights", "twin"),
    ]
    surrogates = {
        name: Surrogate(model, exact=False, loss="ce", why="")
        for name, model in {"liar": Liar().eval(), "twin": net()}.items()
    }
    store = Store(None)
    threat = Threat("linf", EPS)
    assert Engine(model, case, threat, slots=16, surrogates=surrogates).run(stages, store)
    assert store.records("lies").broken.sum() <= 5  # a random start may be lucky
    direct = Store(None)
    assert Engine(model, case, threat, slots=16).run([Stage("twin", APGD(steps=10), "")], direct)
    broken = [set(s.records("twin").sample[s.records("twin").broken]) for s in (store, direct)]
    lucky = set(store.records("lies").sample[store.records("lies").broken])
    assert broken[0] | lucky == broken[1] | lucky and len(broken[1]) > 3


class Noisy(nn.Module):
    """Right by a margin of ``edge``, under noise of the logits of size one."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        right = torch.full((len(x), 1), self.edge) + torch.randn(len(x), 1)
        return torch.cat([right, torch.zeros(len(x), 1)], 1) + 0 * x.flatten(1)[:, :2]


def test_noise_is_judged_by_the_majority() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(300, *SHAPE), torch.zeros(300, dtype=torch.int64)
    for edge, low, high in ((1.5, 0.0, 0.01), (-1.5, 0.99, 1.0), (0.0, 0.01, 0.2)):
        judged = Referee(Noisy(edge), Threat("linf", 0.1), draws=10).judge(x, y, x)
        share = judged.broken.float().mean()
        assert low <= share <= high, (edge, share)
        assert torch.equal(judged.broken, judged.margin < 0)
        assert torch.equal(judged.broken, judged.label != y)


def test_expectation_sees_through_noise() -> None:
    """The gradient of a noisy model points the right way only on average."""

    class Shaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 6 * (torch.randn_like(x) * x).flatten(1)[:, :5]

    model, plain = Shaky(), net()
    case, threat = samples(plain), Threat("linf", EPS)
    broken = []
    for draws in (1, 30):
        store = Store(None)
        stage = Stage("apgd", APGD(steps=10), "", draws=draws)
        engine = Engine(model, case, threat, slots=40, traits=Traits(stochastic=True))
        assert engine.run([stage], store)
        records = store.records("apgd")
        broken.append(int(records.broken.sum()) / max(len(records), 1))
        assert (records.backwards % draws == 0).all() and records.backwards.max() > 0
    assert broken[1] >= broken[0]


# --- the curve, and what earlier evaluations know -----------------------------------------------


def test_a_curve_falls_and_is_right_on_a_linear_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).eval()
    x = torch.rand(80, *SHAPE) * 0.4 + 0.3
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()  # pyright: ignore
    reach = (logits[:, 0] - logits[:, 1]).abs() / weight.abs().sum()
    eps = float(reach.quantile(0.8))
    results = advbench.evaluate(
        model, x, y, threat=Threat("linf", eps), protocol=CurveProtocol(points=5, steps=20)
    )
    shares = [stage.robust_acc for stage in results.stages]
    truth = [float((reach > eps * i / 5).float().mean()) for i in range(1, 6)]
    assert shares == pytest.approx(truth) and shares == sorted(shares, reverse=True)
    assert len(set(shares)) > 3 and results.robust.acc == shares[-1]
    attacked = [stage.attacked for stage in results.stages]
    assert attacked == sorted(attacked, reverse=True)
    radii: list[float | str] = ["1/255", eps / 2]
    own = CurveProtocol(eps=radii)
    assert own.radii(Threat("linf", eps)) == pytest.approx([1 / 255, eps / 2, eps])
    for factor in (0.0, 2.0):
        bad: list[float | str] = [factor * eps]
        with pytest.raises(UserError, match=r"protocol\.eps must lie"):
            CurveProtocol(eps=bad).radii(Threat("linf", eps))


def test_records_of_another_evaluation_are_used_where_they_fit(tmp_path: Path) -> None:
    first = evaluation(PGDProtocol(steps=5, loss="margin"), n=20)
    first.execute(tmp_path / "small", first.stages())
    larger = evaluation(PGDProtocol(steps=5, loss="margin"))
    larger.execute(tmp_path / "alone", larger.stages())
    progress = Notes()
    subset = replace(
        first, samples=Samples(larger.samples.split, first.samples.ids, first.samples.device)
    )
    subset.execute(tmp_path / "archive" / "subset", subset.stages())
    results = larger.execute(
        tmp_path / "archive" / "larger", larger.stages(), progress, archive=tmp_path / "archive"
    )
    assert [note.split(":")[0] for note in progress.notes] == ["clean", "pgd-margin"]
    assert "20 samples known from" in progress.notes[0]
    alone = Results.load(tmp_path / "alone" / "results.json")
    assert (results.robust, results.stages[0].forwards) == (
        alone.robust,
        alone.stages[0].forwards,
    )
    flags = [read_samples(tmp_path / d)["pgd-margin"] for d in ("alone", "archive/larger")]
    assert np.array_equal(flags[0].broken, flags[1].broken)
    for change in ({"seed": 1}, {"threat": Threat("linf", EPS / 2)}, {"slots": 8}):
        progress = Notes()
        other = replace(larger, **change)
        folder = tmp_path / "archive" / next(iter(change))
        other.execute(folder, other.stages(), progress, archive=tmp_path / "archive")
        assert not any("pgd" in note for note in progress.notes), change


@dataclass(frozen=True)
class Parts(Protocol):
    """Some of the stages of ``Mixed``."""

    name = "parts"
    wanted: tuple[str, ...] = ()

    def stages(self, subject: Subject) -> list[Stage]:
        stages = Mixed().stages(subject)
        return [stage for stage in stages if stage.name in self.wanted]


def test_what_an_earlier_stage_breaks_is_not_counted_again(whole: Path, tmp_path: Path) -> None:
    """An archive may know more breaks of a later stage than this plan lets it attack."""
    alone = evaluation(Parts(("square",)))
    alone.execute(tmp_path / "square", alone.stages())
    case = evaluation()
    results = case.execute(tmp_path / "all", case.stages(), archive=tmp_path)
    assert results.robust == Results.load(whole / "results.json").robust
    assert files(tmp_path / "all") == files(whole)


def test_a_finished_evaluation_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(stage_cache, "read_samples", lambda f: (read.append(f), read_samples(f))[1])
    case = evaluation(PGDProtocol(steps=5, loss="margin"))
    case.execute(tmp_path / "first", case.stages())
    progress = Notes()
    case.execute(tmp_path / "second", case.stages(), progress, archive=tmp_path)
    assert [note.split(":")[0] for note in progress.notes] == ["clean", "pgd-margin"]
    assert read == [tmp_path / "first"]


def test_kept_images_are_not_missing_for_knowing_better(tmp_path: Path) -> None:
    case = evaluation(Parts(("apgd",)))
    case.execute(tmp_path / "plain", case.stages())
    case = replace(case, keep_images=True)
    results = case.execute(tmp_path / "images", case.stages(), archive=tmp_path)
    assert results.stages[0].broken > 0
    assert (tmp_path / "images" / "adversarial.safetensors").exists()


def test_stages_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Twice(Parts):
        def stages(self, subject: Subject) -> list[Stage]:
            return 2 * super().stages(subject)

    with pytest.raises(UserError, match="stages of the same name: apgd, apgd"):
        evaluation(Twice(wanted=("apgd",))).stages()
    near: list[float | str] = [0.0156863, 0.0313725]
    assert CurveProtocol(eps=near).radii(Threat("linf", "8/255")) == [0.0156863, 8 / 255]


@pytest.mark.parametrize(
    ("first", "second"), [((0, 1), (1, 2)), ((1, 2), (0, 1)), ((0, 2), (1, 2))]
)
def test_flights_of_other_processes_mislead_nobody(
    first: tuple[int, int], second: tuple[int, int], tmp_path: Path, restless: None
) -> None:
    """Cut, gone on with by another number of processes, and cut again."""
    protocol = PGDProtocol(steps=4, restarts=5, loss="margin")
    case = evaluation(protocol, n=40, slots=8)
    case.execute(tmp_path / "whole", case.stages())
    for n, cuts in enumerate(itertools.product((8, 14, 18), (6, 15, 30))):
        folder = tmp_path / str(n)
        folder.mkdir()
        for share, cut in zip((first, second), cuts, strict=True):
            engine = replace(cut_engine(case, cut), share=share)
            with suppress(Cut):
                engine.run(case.stages(), Store(folder, share[0]))
        case.execute(folder, case.stages())
        assert files(folder) == files(tmp_path / "whole")


class Plain(nn.Module):
    """Keeps its normalisation as a plain tensor, which no state_dict knows."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.inner, self.mean, self.scales = net(), torch.full((1, 1, 1), mean), (mean, 1.0)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - self.mean)


def test_models_that_differ_in_a_plain_tensor_are_two() -> None:
    assert model_sha256(Plain(0.1)) == model_sha256(Plain(0.1))
    assert model_sha256(Plain(0.1)) != model_sha256(Plain(0.2))


class Lucky(nn.Module):
    """Wrong three times in ten, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        sign = (torch.rand(len(x), 1) > 0.3).float() * 2 - 1
        return torch.cat([sign, -sign], 1) + 0 * x.flatten(1)[:, :2]


def test_luck_is_no_success() -> None:
    """A hundred chances to be wrong do not break what is right seven times in ten."""
    torch.manual_seed(0)
    x, y = torch.rand(60, *SHAPE), torch.zeros(60, dtype=torch.int64)
    results = advbench.evaluate(
        Lucky(), x, y, threat="linf_8", traits=Traits(stochastic=True),
        protocol=PGDProtocol(steps=100),
    )  # fmt: skip
    assert results.clean.acc > 0.8
    assert results.robust.acc == results.clean.acc


class Hole(nn.Module):
    """Says NaN, with a NaN gradient, a little away from the images."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.inner, self.x = net(), x
        self.eval()

    def forward(self, z: Tensor) -> Tensor:
        far = (z[:, None] - self.x).abs().flatten(2).amax(2).amin(1) > 1e-4
        return self.inner(z) * torch.where(far, torch.nan, 1.0)[:, None]


def test_a_point_without_an_answer_breaks_the_sample() -> None:
    case = samples(net())
    clean = case.fetch(case.ids)
    results = advbench.evaluate(Hole(clean.x), clean.x, clean.y, threat="linf_8", protocol="apgd")
    assert results.clean.acc > 0.9 and results.robust.acc == 0


class Viewing(nn.Module):
    """Takes a view that channels last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(128, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(len(x), -1))


def test_a_model_of_one_layout_is_copied_in_it() -> None:
    torch.manual_seed(0)
    model = Viewing()
    clean = samples(net()).fetch(torch.arange(8))
    fast = searcher(model, Speed("bf16"), clean)
    assert isinstance(fast, Searcher) and fast.layout is torch.contiguous_format
    assert fast(clean.x).shape == (8, 5)


def test_a_model_with_hooks_is_not_traced() -> None:
    model = net()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    clean = samples(net()).fetch(torch.arange(8))
    fast = searcher(model, Speed(), clean)
    assert any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(fast(clean.x), model(clean.x), rtol=1e-4, atol=1e-5)


# --- settings -----------------------------------------------------------------------------------


def test_resources() -> None:
    cpu = Resources("cpu")
    assert [cpu.slots(shape) for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224))] == [
        512, 256, 64, 8,
    ]  # fmt: skip
    assert Resources("cpu", batch_size=7).slots((3, 32, 32)) == 7
    wrong: dict[str, Any]
    for wrong, said in (
        ({"batch_size": "large"}, "is not auto or at least 1"),
        ({"batch_size": 0}, "is not auto or at least 1"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"compile": "fast"}, "no trainer.compile 'fast'"),
    ):
        with pytest.raises(UserError, match=said):
            Resources("cpu", **wrong)


@pytest.mark.slow
def test_a_compiled_search_finds_the_same(whole: Path, tmp_path: Path) -> None:
    # One size of batch, because each is compiled.
    case = replace(evaluation(slots=4), speed=Speed(compile="default"))
    case.execute(tmp_path, case.stages())
    ours, theirs = read_samples(tmp_path), read_samples(whole)
    differ = sum(int((ours[n].broken != theirs[n].broken).sum()) for n in ("clean", "apgd"))
    assert differ <= 1


def test_rows_of_a_chunk_do_not_change_a_judgement() -> None:
    model = net()
    clean: Clean = samples(model).fetch(torch.arange(40))
    referee = Referee(model, Threat("linf", EPS))
    many = referee.judge(clean.x, clean.y, clean.x)
    for i in (0, 7, 39):
        one = referee.judge(clean.x[i : i + 1], clean.y[i : i + 1], clean.x[i : i + 1])
        assert torch.equal(one.margin[0], many.margin[i])
