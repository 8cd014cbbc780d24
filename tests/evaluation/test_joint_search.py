"""Models whose rows depend on each other, models that draw, and the plans for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_searches import changed
from safetensors.torch import load_file
from torch import Tensor, nn

from advbench.attacks.apgd import APGD
from advbench.attacks.pgd import PGD
from advbench.attacks.threat import Threat
from advbench.data.arrays import array_split
from advbench.defenses.base import Surrogate, Traits
from advbench.errors import UserError
from advbench.evaluation.adaptive import AdaptiveProtocol, MSAProtocol
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import Evaluation, claim
from advbench.evaluation.job import Job
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.protocols import AutoAttackProtocol, FABProtocol, PGDProtocol
from advbench.evaluation.samples import Samples, fixed_batches, subset
from advbench.evaluation.store import Store, read_samples
from advbench.progress import NullProgress

LINF = Threat("linf", 0.1)
SIDE = 4


class Linear(nn.Module):
    """Two classes: the logit is the sum of the pixels less ``bar``, each way."""

    def __init__(self, bar: float = 8.0) -> None:
        super().__init__()
        self.bar = nn.Parameter(torch.tensor(bar))

    def excess(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1) - self.bar

    def forward(self, x: Tensor) -> Tensor:
        excess = self.excess(x)
        return torch.stack([-excess, excess], 1)


class Crowd(Linear):
    """Compares each row with the mean of its batch instead of with a fixed bar."""

    def forward(self, x: Tensor) -> Tensor:
        excess = self.excess(x)
        excess = excess - excess.mean()
        return torch.stack([-excess, excess], 1)


class Noisy(Linear):
    """The bar moves by normal noise at every draw and row."""

    def forward(self, x: Tensor) -> Tensor:
        excess = self.excess(x) + torch.randn(len(x))
        return torch.stack([-excess, excess], 1)


def samples(n: int = 40, total: int = 40) -> tuple[Samples, np.ndarray]:
    """Gray images at several distances from the bar, and those distances."""
    random = np.random.default_rng(0)
    shift = random.uniform(-4, 4, total).astype(np.float32)
    images = np.full((total, SIDE, SIDE, 1), 0.5, np.float32) + shift[:, None, None, None] / SIDE**2
    split = array_split(images, (shift > 0).astype(np.int64), "x", "y")
    return Samples(split, subset(total, n), torch.device("cpu")), shift


@dataclass(frozen=True)
class Short(Protocol):
    """One PGD stage on the model, and one on each surrogate."""

    name = "short"
    surrogates = True
    steps: int = 5

    def stages(self, subject: Subject) -> list[Stage]:
        attack = PGD(steps=self.steps, loss_name="margin", random_start=False)
        targets = ["model", *subject.surrogates]
        return [Stage(f"pgd@{name}", attack, "a test", victim=name) for name in targets]


def evaluation(model: nn.Module, traits: Traits, n: int = 40, total: int = 40) -> Evaluation:
    job = Job(model.eval(), samples(n, total)[0], LINF, traits=traits, batch_size=16)
    return Evaluation("a", "arrays", Short(), job)


BATCHES = Traits(batch_dependent=True, batch_size=10)


def test_fixed_batches_do_not_depend_on_n() -> None:
    batches = fixed_batches(45, 10)
    assert batches.shape == (5, 10)
    assert batches[:4].unique().numel() == 40 and batches.unique().numel() == 45
    assert torch.equal(batches[4, 5:], batches[0, :5])
    assert set(subset(45, 20).tolist()) == set(batches[:2].flatten().tolist())
    with pytest.raises(UserError, match="batches of 46 images and there are 45"):
        fixed_batches(45, 46)


def test_a_batch_breaks_whom_no_single_image_can() -> None:
    """A row moves by 16 * 0.1 = 1.6, and the mean of ten rows by 1.6 as well if all move.

    Together they shift a row against the mean by 3.2 at the most; alone by 1.6 less its own share
    of the mean, a tenth. In between, the batch decides.
    """
    case = evaluation(Crowd(), BATCHES)
    store = Store(None)
    engine = Engine(case.job)
    assert engine.run(case.plan().stages, store)
    records = store.records("pgd@model")
    x, y = case.job.samples.fetch(torch.arange(40))[1:]
    place = {int(i): b for b in fixed_batches(40, 10) for i in b}
    alone, least, seen = 0, np.inf, 0
    for sample, broken, by_itself in zip(
        records.sample, records.broken, records.alone, strict=True
    ):
        batch = place[int(sample)]
        sums = x.flatten(1).sum(1)[batch]
        own = float(x[sample].sum())
        gap = abs(own - float(sums.mean()))
        assert by_itself == (gap < 0.9 * 1.6), gap  # alone: the closed form, exactly
        assert broken >= by_itself
        if not by_itself and broken:
            alone += 1
        if not broken:
            least = min(least, gap)
        seen += 1
    assert seen > 25 and alone > 0
    assert (store.records("clean").broken == store.records("clean").alone).all()
    del y


def test_the_record_of_a_batch_is_inside_the_threat(tmp_path: Path) -> None:
    case = changed(evaluation(Crowd(), BATCHES), keep_images=True)
    results = case.execute(tmp_path, case.plan())
    records = read_samples(tmp_path)["pgd@model"]
    broken = records.distance[records.broken]
    assert len(broken) > 5 and (broken <= 0.1 + 1e-6).all() and (broken > 0.05).all()
    assert results.measures["single_image"] > results.robust.acc
    assert results.stages[0].attacked == len(records)


def test_company_that_is_not_asked_for_is_there_all_the_same() -> None:
    """n = 25 of 44 in batches of 10: the third batch has five that are not counted, and the fifth,
    which is filled up with the first samples, none that are.
    """
    whole = evaluation(Crowd(), BATCHES, n=44, total=44)
    part = evaluation(Crowd(), BATCHES, n=25, total=44)
    found = {}
    for case in (whole, part):
        store = Store(None)
        Engine(case.job).run(case.plan().stages, store)
        found[len(case.job.samples)] = store.records("pgd@model")
    assert len(np.unique(found[44].sample)) == len(found[44])
    common = np.isin(found[44].sample, part.job.samples.ids.numpy())
    assert len(found[25]) > 10
    for name in ("sample", "broken", "alone", "margin"):
        np.testing.assert_array_equal(
            getattr(found[25], name), getattr(found[44], name)[common], err_msg=name
        )


@pytest.mark.parametrize(
    ("model", "traits"), [(Crowd(), BATCHES), (Noisy(), Traits(stochastic=True))]
)
def test_killed_and_sharded_groups_end_with_the_same_records(
    model: nn.Module, traits: Traits, tmp_path: Path
) -> None:
    case = evaluation(model, traits)
    case.execute(tmp_path / "whole", case.plan())
    whole = (tmp_path / "whole" / "samples.parquet").read_bytes()

    def engine(after: int | None = None, share: tuple[int, int] = (0, 1)) -> Engine:
        asked = 0

        def deadline() -> bool:
            nonlocal asked
            asked += 1
            return after is not None and asked > after

        return Engine(replace(case.job, rank=share[0], world_size=share[1], deadline=deadline))

    cut = tmp_path / "cut"
    claim(cut, case.plan())
    for after in (2, 7, 9, 13):
        engine(after).run(case.plan().stages, Store(cut))
    case.execute(cut, case.plan())
    assert (cut / "samples.parquet").read_bytes() == whole
    shards = tmp_path / "shards"
    claim(shards, case.plan())
    for rank in range(3):
        assert engine(share=(rank, 3)).run(case.plan().stages, Store(shards, rank))
    case.execute(shards, case.plan())
    assert (shards / "samples.parquet").read_bytes() == whole


def test_noise_hides_nobody_from_the_majority() -> None:
    """A row whose clean excess is beyond 1.6 can't be broken by most draws; one below 1.2 can."""
    traits = Traits(stochastic=True)
    case = evaluation(Noisy(), traits)
    results = case.execute(None, case.plan())
    store = Store(None)
    Engine(case.job).run(case.plan().stages, store)
    _, shift = samples()
    records = store.records("pgd@model")
    gap = np.abs(shift[records.sample])
    assert not records.broken[gap > 2.2].any() and records.broken[gap < 1.0].all()
    held = ~records.broken
    assert 0 < records.wrong[held].max() <= 0.9 and (records.wrong[~held] > 0.5).all()
    assert results.measures["worst_draw"] <= results.measures["mean_draw"] < results.clean.acc


def test_a_lie_about_batches_is_found() -> None:
    with pytest.raises(UserError, match="depends on the other images of its batch"):
        evaluation(Crowd(), Traits()).plan()
    with pytest.raises(UserError, match=r"traits\.batch_size=NUMBER"):
        case = evaluation(Crowd(), Traits(batch_dependent=True))
        case.execute(None, case.plan())
    with pytest.raises(UserError, match="attacks image by image"):
        FABProtocol().plan(Subject(BATCHES, 10, LINF))
    with pytest.raises(UserError, match="attacks image by image"):
        AutoAttackProtocol(engine="reference").plan(Subject(BATCHES, 10, LINF))
    names = [stage.name for stage in AutoAttackProtocol().plan(Subject(BATCHES, 10, LINF))]
    assert names == ["apgd-ce", "apgd-t", "square"]


class Broken(Crowd):
    """Its backward is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0 * (x - x.detach()).sqrt())


def test_gradients_that_are_not_numbers_are_refused_in_batches_too() -> None:
    case = evaluation(Broken(), BATCHES)
    with pytest.raises(UserError, match="NaN or infinite for whole images"):
        Engine(case.job).run(case.plan().stages, Store(None))


def test_stochastic_and_batch_dependent_is_refused() -> None:
    case = evaluation(Noisy(), Traits(stochastic=True, batch_dependent=True, batch_size=10))
    with pytest.raises(UserError, match="stochastic and batch-dependent"):
        case.execute(None, case.plan())


@dataclass(frozen=True)
class Two(Short):
    """Two stages, of which the second is owed to all that did not break alone."""

    def stages(self, subject: Subject) -> list[Stage]:
        attack = PGD(steps=self.steps, loss_name="margin", random_start=False)
        return [Stage("a", attack, ""), Stage("b", attack, "")]


def test_what_broke_in_a_batch_alone_is_still_owed_the_next_stage(tmp_path: Path) -> None:
    case = changed(evaluation(Crowd(), BATCHES), protocol=Two())
    plan = case.plan()
    claim(tmp_path, plan)
    store = Store(tmp_path)
    Engine(case.job).run(plan.stages[:1], store)
    results = case.execute(tmp_path, plan, budget=1e-9)  # one batch is finished in any case
    assert results.missing == ("b",)
    sittings = 0
    while results.missing:
        results = case.execute(tmp_path, plan, budget=1e-9)
        sittings += 1
    assert sittings == 3
    whole = case.execute(tmp_path / "whole", plan)
    assert (results.robust, results.measures) == (whole.robust, whole.measures)
    first = read_samples(tmp_path)["a"]
    again = read_samples(tmp_path)["b"].sample
    assert set(first.sample[~first.alone].tolist()) == set(again.tolist())
    assert (first.broken & ~first.alone).any()


@pytest.mark.parametrize("stochastic", [True, False])
def test_short_sittings_come_to_an_end(stochastic: bool, tmp_path: Path) -> None:
    model = Noisy() if stochastic else Linear()
    case = changed(
        evaluation(model, Traits(stochastic=stochastic), total=150, n=150), batch_size=500
    )
    results, sittings = case.execute(tmp_path, case.plan(), budget=1e-9), 1
    while results.missing:
        results = case.execute(tmp_path, case.plan(), budget=1e-9)
        sittings += 1
        assert sittings < 100
    assert sittings > 3
    assert results.robust == case.execute(tmp_path / "whole", case.plan()).robust


def test_images_are_kept_once_and_break_alone(tmp_path: Path) -> None:
    case = changed(evaluation(Crowd(), BATCHES), keep_images=True, protocol=Two())
    case.execute(tmp_path, case.plan())
    kept = load_file(tmp_path / "adversarial.safetensors")
    records = read_samples(tmp_path)
    alone = np.concatenate([r.sample[r.alone] for name, r in records.items() if name != "clean"])
    assert sorted(kept["sample"].tolist()) == sorted(alone.tolist())
    x = case.job.samples.fetch(case.job.samples.ids).x
    y = case.job.samples.fetch(case.job.samples.ids).y
    place = {int(i): batch for batch in fixed_batches(40, 10) for i in batch}
    for sample, image in zip(kept["sample"].tolist(), kept["x"], strict=True):
        batch = place[sample]
        images = x[batch].clone()
        images[batch == sample] = image
        label = Crowd()(images).argmax(1)[batch == sample]
        assert label != y[sample]


def test_another_surrogate_of_the_same_name_is_not_reused(tmp_path: Path) -> None:
    notes: list[str] = []

    class Reader(NullProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    cases = [
        changed(evaluation(Stepped(), Traits()), surrogates={"twin": other(Linear(b))})
        for b in (8.0, 8.0, 7.9)
    ]
    for i, case in enumerate(cases):
        case.execute(tmp_path / str(i), case.plan(), Reader(), archive=tmp_path)
    reused = [note.partition(":")[0] for note in notes if "known from" in note]
    assert reused == ["clean", "pgd@model", "pgd@twin", "clean", "pgd@model"]


# --- other targets ------------------------------------------------------------------------------


class Stepped(Linear):
    """``Linear`` with logits that are rounded: no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


def other(model: nn.Module, **more: bool) -> Surrogate:
    return Surrogate(model.eval(), exact=False, loss="ce", why="a test", **more)


class Anchored(Linear):
    """Sees the perturbation alone, and so needs the clean image."""

    def forward(self, x: Tensor, clean: Tensor) -> Tensor:  # pyright: ignore
        assert not (x - clean).abs().max() > 0.1 + 1e-6
        return super().forward(clean) + super().forward(x) - super().forward(clean).detach()


class Steered(Stepped):
    """Logits without a gradient, and an auxiliary loss that has one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        sign = torch.where(x.flatten(1).sum(1) > self.bar, -1.0, 1.0).detach()
        return super().forward(x), sign * self.excess(x)


@pytest.mark.parametrize(
    "surrogate",
    [
        other(Linear()),
        other(Anchored(), needs_clean_input=True),
        other(Steered(), auxiliary_loss=True),
    ],
    ids=["plain", "needs_clean_input", "auxiliary_loss"],
)
def test_a_surrogate_breaks_what_the_gradient_of_the_model_cannot(surrogate: Surrogate) -> None:
    model = Stepped()
    case = changed(evaluation(model, Traits()), surrogates={"other": surrogate})
    results = case.execute(None, case.plan())
    assert results.stages[0].broken == 0
    assert results.stages[1].target == "other" and results.stages[1].broken > 5
    assert results.robust.acc == min(stage.robust_acc for stage in results.stages)


class Detached(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("surrogate", "expected"),
    [
        (other(nn.Flatten()), r"must return \[\(16, 2\)\] for 16 images, not \[\(16, 16\)\]"),
        (other(Steered()), r"not \[\(16, 2\), \(16,\)\]"),
        (other(Linear(), auxiliary_loss=True), r"must return \[\(16, 2\), \(16,\)\]"),
        (other(Linear(), needs_clean_input=True), "can't take the data's images"),
        (other(Detached()), "surrogate 'other' has no gradient"),
    ],
)
def test_a_surrogate_that_is_none_is_refused(surrogate: Surrogate, expected: str) -> None:
    case = changed(evaluation(Linear(), Traits()), surrogates={"other": surrogate})
    with pytest.raises(UserError, match=expected):
        case.plan()


def test_names_that_are_taken_are_refused() -> None:
    """Under them a stage's records were those of the clean images, and a target the real model."""

    @dataclass(frozen=True)
    class Named(Short):
        def stages(self, subject: Subject) -> list[Stage]:
            return [Stage("clean", PGD(steps=1, random_start=False), "")]

    with pytest.raises(UserError, match="no stage may have the name 'clean'"):
        Named().plan(subject())
    with pytest.raises(UserError, match="no surrogate may have the name 'model'"):
        Short().plan(subject({"model": other(Linear())}))


def subject(surrogates: dict[str, Surrogate] | None = None, **traits: object) -> Subject:
    return Subject(
        Traits(**traits),  # pyright: ignore[reportArgumentType]
        10,
        LINF,
        surrogates={"soft": other(Linear())} if surrogates is None else surrogates,
    )


PLANS = [
    (subject({}), ["apgd-ce", "apgd-t", "fab-t", "square"]),
    (
        subject(gradient="discontinuous"),
        ["apgd-ce", "apgd-ce@soft", "apgd-t", "apgd-t@soft", "fab-t", "square"],
    ),
    (subject(gradient="none"), ["apgd-ce@soft", "apgd-t@soft", "square"]),
    (
        subject(stochastic=True),
        ["apgd-ce", "apgd-ce@soft", "apgd-dlr", "apgd-t@soft", "square"],
    ),
    (
        subject(gradient="straight_through", batch_dependent=True, batch_size=10),
        ["apgd-ce", "apgd-ce@soft", "apgd-t", "apgd-t@soft", "square"],
    ),
    (
        subject({"two": other(Steered(), auxiliary_loss=True)}),
        ["apgd-ce", "apgd-ce@two", "apgd-t", "fab-t", "square"],
    ),
]


def test_msa_is_planned_from_the_traits() -> None:
    seen = 0
    for case, names in PLANS:
        plan = MSAProtocol().plan(case)
        assert [stage.name for stage in plan] == names
        for stage in plan:
            own = stage.victim == "model" and stage.attack.gradient
            assert stage.eot_samples == (20 if case.traits.stochastic and own else 1), stage.name
        adaptive = AdaptiveProtocol().plan(case)
        assert [stage.name for stage in adaptive][: len(names)] == names
        assert len(adaptive) > len(names)
        seen += 1
    assert seen == 6
    longer = AdaptiveProtocol().plan(PLANS[1][0])
    (margin,) = (stage for stage in longer if stage.name == "apgd-margin-long@soft")
    assert isinstance(margin.attack, APGD)
    assert (margin.attack.steps, margin.attack.restarts) == (200, 3)
    draws = [s.eot_samples for s in AdaptiveProtocol().plan(PLANS[3][0]) if "eot" in s.name]
    assert draws == [20, 40, 80, 160, 320]


def test_reasons_say_what_follows() -> None:
    def said(protocol: Protocol, case: Subject) -> str:
        return " ".join(protocol.reasons(case, protocol.plan(case)))

    joint, noisy = said(MSAProtocol(), PLANS[4][0]), PLANS[3][0]
    assert "batches of 10 never change" in joint and "straight through" in joint
    assert "means over 20 EOT samples" in said(MSAProtocol(), noisy)
    black_box = MSAProtocol(square=10)
    assert "names no surrogate" in said(black_box, subject({}, gradient="none"))
    assert "each step of apgd-ce, apgd-t, fab-t:" in said(AutoAttackProtocol(), noisy)
    assert "each step of pgd-ce:" in said(PGDProtocol(), noisy)
    assert "each step" not in said(AutoAttackProtocol(suite="rand"), noisy)
    assert "each step" not in said(PGDProtocol(), subject({}))


def test_more_draws_stop_where_they_break_nobody(tmp_path: Path) -> None:
    """The last EOT stage attacks only groups in which the one before still broke somebody."""

    @dataclass(frozen=True)
    class Level(Protocol):
        name = "level"

        def stages(self, subject: Subject) -> list[Stage]:
            attack = PGD(steps=3, loss_name="margin", random_start=False)
            return [
                Stage("first", attack, "", eot_samples=2),
                Stage("second", attack, "", eot_samples=2),
                Stage("third", attack, "", eot_samples=2, only_if="second"),
            ]

    case = changed(evaluation(Noisy(), Traits(stochastic=True)), protocol=Level(), batch_size=10)
    results = case.execute(tmp_path, case.plan())
    assert not results.missing
    records = read_samples(tmp_path)
    broken = records["second"].sample[records["second"].broken]
    groups = [set(unit.tolist()) for unit in torch.arange(40).split(10)]
    touched = set(records["third"].sample[records["third"].forwards > 0].tolist())
    for group in groups:
        expected = bool(group & set(broken.tolist()))
        left = group & set(records["third"].sample.tolist())
        assert left and (left <= touched if expected else not left & touched)
    assert results.stages[2].attacked == len(touched)


def test_foreign_models_come_last_and_only_where_they_are_asked_for() -> None:
    found = {"soft": other(Linear()), "transfer-a": other(Linear(), transfer=True)}
    assert "transfer-a" not in {s.victim for s in MSAProtocol().plan(subject(found))}
    names = [stage.name for stage in AdaptiveProtocol().plan(subject(found))]
    assert names[-2:] == ["apgd-ce@transfer-a", "apgd-t@transfer-a"]
    assert names.count("apgd-margin-long@soft") == 1 and "apgd-margin-long" in names
