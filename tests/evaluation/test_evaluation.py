"""The engine, the store and the results, on models whose answers are known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cheat import Cheat
from made_up_searches import changed
from torch import Tensor, nn

import advbench
from advbench.attacks.libraries import TorchAttack
from advbench.attacks.threat import Threat
from advbench.data.base import ArraySplit
from advbench.defenses.base import Traits
from advbench.errors import UserError
from advbench.evaluation import search
from advbench.evaluation.engine import Engine
from advbench.evaluation.evaluation import Evaluation
from advbench.evaluation.job import CLEAN, Job
from advbench.evaluation.protocol import Protocol, Stage, Subject
from advbench.evaluation.protocols import (
    AutoAttackProtocol,
    CleanProtocol,
    FGSMProtocol,
    PGDProtocol,
    TorchattacksProtocol,
)
from advbench.evaluation.samples import Samples, subset
from advbench.evaluation.store import Store, read_samples
from advbench.progress import NullProgress
from advbench.runs.accuracy import wilson
from advbench.runs.results import Results

SHAPE = (1, 4, 4)


def linear(classes: int = 2) -> nn.Module:
    """Without a preference for a class on images around 1/2, so that margins are small."""
    torch.manual_seed(0)
    layer = nn.Linear(16, classes)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight -= layer.weight.mean(1, keepdim=True)
    return nn.Sequential(nn.Flatten(), layer).eval()


def images(n: int = 60) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(2)) * 0.6 + 0.2


def labels(model: nn.Module, x: Tensor, wrong: int = 5) -> Tensor:
    """The model's own classes, but for the first ``wrong`` samples."""
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[:wrong] = (y[:wrong] + 1) % logits.shape[1]
    return y


def robust_truth(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Which samples of a two-class linear model no linf perturbation breaks, by duality."""
    weight = model[1].weight.detach()  # pyright: ignore
    with torch.no_grad():
        margin = model(x)[torch.arange(len(x)), y] - model(x)[torch.arange(len(x)), 1 - y]
    return margin > eps * (weight[0] - weight[1]).abs().sum()


def evaluation(
    protocol: Protocol, *, batch_size: int = 16, eps: float = 0.05, n: int = 60, classes: int = 2
) -> Evaluation:
    model, x = linear(classes), images(n)
    split = ArraySplit(x, labels(model, x))
    samples = Samples(split, subset(n, None), torch.device("cpu"))
    threat = Threat("linf", eps)
    return Evaluation(
        "linear", "made", protocol, Job(model, samples, threat, batch_size=batch_size)
    )


def kept(case: Evaluation, stages: Sequence[Stage] = (), seed: int = 0) -> Store:
    """The records of the stages, by default the case's own."""
    store = Store(None)
    engine = Engine(dataclasses.replace(case.job, seed=seed))
    assert engine.run(stages or case.plan().stages, store)
    return store


def test_a_linear_model_gets_its_exact_robust_accuracy() -> None:
    case = evaluation(PGDProtocol(steps=20, restarts=2))
    x, y = images(), case.job.samples.split.labels
    results = case.execute(None, case.plan())
    assert results.clean.acc == pytest.approx(55 / 60)
    truth = robust_truth(case.job.model, x, y, 0.05)
    assert 0 < truth.sum() < 55
    assert results.robust.acc == pytest.approx(int(truth.sum()) / 60)
    stage = results.stages[0]
    assert stage.attacked == 55 and stage.broken == 55 - int(truth.sum())
    # A sample that held: 2 searches of 20 gradients and a last look.
    assert stage.backwards >= int(truth.sum()) * 40
    assert stage.forwards >= int(truth.sum()) * 42


def test_records_tell_margin_distance_and_label() -> None:
    case = evaluation(PGDProtocol(steps=20))
    store = kept(case)
    clean, attacked = store.records(CLEAN), store.records("pgd-ce")
    y = case.job.samples.split.labels.numpy()
    assert (clean.broken == (clean.label != y)).all()
    assert set(attacked.sample) == set(clean.sample[~clean.broken])
    broke = attacked.broken
    assert (attacked.label[broke] != y[attacked.sample[broke]]).all()
    assert (attacked.label[~broke] == y[attacked.sample[~broke]]).all()
    assert (attacked.margin[broke] <= 0).all() and (attacked.margin[~broke] > 0).all()
    assert np.nanmax(attacked.distance) <= 0.05 + 1e-6
    assert np.isnan(attacked.distance[~broke]).all()


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    protocol = PGDProtocol(steps=10, restarts=3, loss="margin")
    few, reference = (
        evaluation(protocol, batch_size=batch_size, classes=4),
        evaluation(protocol, classes=4),
    )
    stores = [kept(case, seed=3).records("pgd-margin") for case in (few, reference)]
    for name in ("sample", "broken", "label", "forwards", "backwards"):
        assert np.array_equal(getattr(stores[0], name), getattr(stores[1], name)), name
    np.testing.assert_allclose(stores[0].margin, stores[1].margin, atol=1e-5)


class Cut(Exception):
    pass


class Impatient(NullProgress):
    """Interrupts an evaluation after so many messages."""

    def __init__(self, after: int) -> None:
        self.after = after

    def update(self, *_: object, **__: object) -> None:
        self.after -= 1
        if self.after < 0:
            raise Cut


def test_an_interrupted_evaluation_ends_with_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COMMIT_SECONDS", "SHOW_SECONDS", "SAVE_SECONDS"):
        monkeypatch.setattr(search, name, 0.0)
    monkeypatch.setattr(search, "SAVE_SHARE", np.inf)
    protocol = PGDProtocol(steps=10, restarts=3)
    whole = evaluation(protocol, batch_size=4)
    expected = whole.execute(tmp_path / "whole", whole.plan())
    cuts = 0
    while not (tmp_path / "cut" / "results.json").exists():
        case = evaluation(protocol, batch_size=4)
        try:
            case.execute(tmp_path / "cut", case.plan(), Impatient(5))
        except Cut:
            cuts += 1
    assert cuts >= 3
    ends = [(tmp_path / name / "samples.parquet").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]
    got = Results.load(tmp_path / "cut" / "results.json")
    assert (got.clean, got.robust) == (expected.clean, expected.robust)
    assert not (tmp_path / "cut" / "journal").exists()


def test_a_folder_with_another_evaluation_is_refused(tmp_path: Path) -> None:
    case = evaluation(PGDProtocol(steps=3))
    case.execute(tmp_path, case.plan())
    other = evaluation(PGDProtocol(steps=4))
    with pytest.raises(UserError, match=r"another evaluation \(it differs in: protocol, stages\)"):
        other.execute(tmp_path, other.plan())


def test_results_have_the_schema_and_come_back(tmp_path: Path) -> None:
    case = evaluation(PGDProtocol(steps=3))
    results = case.execute(tmp_path, case.plan())
    raw = json.loads((tmp_path / "results.json").read_text())
    assert list(raw) == [
        "schema", "run", "settings", "data", "threat", "protocol", "clean", "robust",
        "estimate",
        "unfinished", "stages", "measures", "missing", "verdict", "provenance",
        "files", "checksum",
    ]  # fmt: skip
    assert raw["schema"] == "advbench.results/3"
    assert raw["data"].keys() == {"name", "split", "n", "sha256"}
    assert raw["verdict"] == {"label": None, "indicators": []}
    assert raw["stages"][0].keys() >= {"name", "attack", "target", "why", "robust_acc", "broken"}
    assert Results.load(tmp_path / "results.json") == results
    stages = read_samples(tmp_path)
    assert list(stages) == ["clean", "pgd-ce"] and len(stages["clean"]) == 60


def test_a_cheating_attack_breaks_only_what_its_budget_can() -> None:
    case = evaluation(CleanProtocol(), eps=0.01)
    weight = case.job.model[1].weight.detach()  # pyright: ignore
    direction = (weight[1] - weight[0]).view(SHAPE)
    store = kept(case, [Stage("cheat", Cheat(torch.stack([direction, -direction])), "cheats")])
    truth = robust_truth(case.job.model, images(), case.job.samples.split.labels, 0.01).numpy()
    records = store.records("cheat")
    assert np.array_equal(records.broken, ~truth[records.sample])
    assert not records.broken.all()


def test_kept_images_break_the_model_inside_the_budget(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    case = evaluation(PGDProtocol(steps=10))
    case = changed(case, keep_images=True)
    results = case.execute(tmp_path, case.plan())
    kept = load_file(tmp_path / "adversarial.safetensors")
    assert len(kept["sample"]) == results.stages[0].broken > 0
    point, x = torch.from_numpy(kept["x"]), images()[torch.from_numpy(kept["sample"])]
    assert case.job.threat.contains(point, x).all()
    y = case.job.samples.split.labels[torch.from_numpy(kept["sample"])]
    with torch.no_grad():
        assert (case.job.model(point).argmax(1) != y).all()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_reference_engine_is_pyautoattack_sample_for_sample(channels_last: bool) -> None:
    from pyautoattack import AutoAttack

    torch.manual_seed(1)
    model = Small().eval()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore
    x = images(10)
    y = labels(model, x, wrong=2)
    eps = 0.02
    results = None
    attacks = ["apgd-ce", "apgd-t", "fab-t"] if channels_last else None  # Square has no gradient
    for _ in range(2 if channels_last else 1):  # the seed decides, not the generator's state
        store = Store(None)
        samples = Samples(ArraySplit(x, y), subset(10, None), torch.device("cpu"))
        threat, protocol = Threat("linf", eps), AutoAttackProtocol("standard", "reference", attacks)
        stages = protocol.plan(Subject(Traits(), 4, threat, 7))
        assert Engine(Job(model, samples, threat, seed=7, batch_size=8)).run(stages, store)
        broken = np.zeros(10, bool)
        for name in (CLEAN, *(stage.name for stage in stages)):
            records = store.records(name)
            broken[records.sample[records.broken]] = True
        assert results is None or np.array_equal(results, broken)
        results = broken

    suite = AutoAttack(model, norm="Linf", eps=eps, seed=7, version="standard")
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = 3
    suite.verbose = False
    suite.attacks_to_run = attacks or suite.attacks_to_run
    plain = x if not channels_last else x.contiguous()
    if channels_last:  # pyautoattack itself can't take channels-last gradients
        model = model.to(memory_format=torch.contiguous_format)  # pyright: ignore
    adversarial, _ = suite.run_standard_evaluation(plain, y, batch_size=8)
    with torch.no_grad():
        direct = (model(adversarial).argmax(1) != y).numpy()
    assert 2 < direct.sum() < 9
    assert results is not None and np.array_equal(results, direct)


def test_any_torchattacks_attack_behind_the_referee() -> None:
    for name, params in (("PGD", {"alpha": 0.01, "steps": 20}), ("CW", {"steps": 20})):
        case = evaluation(TorchattacksProtocol(name, params))
        results = case.execute(None, case.plan())
        truth = robust_truth(case.job.model, images(), case.job.samples.split.labels, 0.05)
        assert results.robust.acc >= int(truth.sum()) / 60
        assert results.stages[0].forwards > 0
    with pytest.raises(UserError, match="did you mean 'MIFGSM'"):
        TorchAttack("MIFGMS")
    with pytest.raises(UserError, match="no parameter 'stepz'; did you mean 'steps'"):
        TorchAttack("PGD", {"stepz": 3})


def test_plans_are_what_the_protocols_say() -> None:
    threat = Threat("linf", 0.1)
    table = [
        (CleanProtocol(), 10, []),
        (FGSMProtocol(), 10, ["fgsm-ce"]),
        (PGDProtocol(loss="dlr"), 10, ["pgd-dlr"]),
        (AutoAttackProtocol(), 10, ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (AutoAttackProtocol("rand"), 10, ["apgd-ce", "apgd-dlr"]),
        (
            AutoAttackProtocol("plus"),
            10,
            ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"],
        ),
        (TorchattacksProtocol("CW"), 10, ["torchattacks-CW"]),
    ]
    for protocol, classes, names in table:
        plan = protocol.plan(Subject(Traits(), classes, threat, 0))
        assert [stage.name for stage in plan] == names
        assert all(stage.why and stage.victim == "model" for stage in plan)
        json.dumps([stage.to_json() for stage in plan])
    for engine in ("fast", "reference"):
        some = AutoAttackProtocol("plus", engine, attacks=["square", "apgd-ce"])
        plan = some.plan(Subject(Traits(), 10, threat, 0))
        assert [stage.name for stage in plan] == ["square", "apgd-ce"]
        whole = AutoAttackProtocol("plus", engine).plan(Subject(Traits(), 10, threat, 0))
        assert [stage.attack for stage in plan] == [whole[3].attack, whole[0].attack]
        protocol = AutoAttackProtocol(engine=engine)
        assert protocol.plan(Subject(Traits(), 5, threat, 0))[1].attack.targets == 4  # pyright: ignore
    for wrong, said in ((["sqare"], "did you mean 'square'"), ([], "attacks nothing")):
        with pytest.raises(UserError, match=said):
            AutoAttackProtocol(attacks=wrong)
    with pytest.raises(UserError, match="needs at least 4 classes"):
        AutoAttackProtocol(engine="reference").plan(Subject(Traits(), 3, threat, 0))


def test_autoattack_has_upstreams_parameters_in_every_norm_and_suite() -> None:
    from pyautoattack import AutoAttack

    seen = 0
    for norm, upstream in (("linf", "Linf"), ("l2", "L2"), ("l1", "L1")):
        for suite in ("standard", "plus", "rand"):
            model: Any = linear(10)
            theirs = AutoAttack(model, norm=upstream, eps=0.5, version=suite)  # pyright: ignore
            ours = AutoAttackProtocol(suite).plan(Subject(Traits(), 10, Threat(norm, 0.5), 0))
            assert [stage.name for stage in ours] == theirs.attacks_to_run
            for stage in ours:
                attack: Any = stage.attack
                if stage.name.startswith("apgd"):
                    member = theirs.apgd_targeted if stage.name == "apgd-t" else theirs.apgd
                    assert attack.steps == member.n_iter and attack.restarts == member.n_restarts
                    assert attack.large_radius == member.use_largereps
                    assert stage.eot_samples == theirs.apgd.eot_iter
                elif stage.name.startswith("fab"):
                    restarts = 1 if stage.name == "fab-t" else theirs.fab.n_restarts
                    assert (attack.steps, attack.restarts) == (theirs.fab.n_iter, restarts)
                    assert attack.targets == theirs.fab.n_target_classes
                else:
                    assert attack.steps == theirs.square.n_queries
                    assert attack.p_init == theirs.square.p_init
                if stage.name == "apgd-t":
                    assert attack.targets == theirs.apgd_targeted.n_target_classes
                seen += 1
    assert seen == 3 * (4 + 6 + 2)


@pytest.mark.parametrize("classes", [2, 3, 4, 1000])
def test_autoattack_knows_any_number_of_classes(classes: int) -> None:
    for suite in ("standard", "plus", "rand"):
        plan = AutoAttackProtocol(suite).plan(Subject(Traits(), classes, Threat("l2", 0.5), 0))
        for stage in plan:
            assert getattr(stage.attack, "targets", 1) <= 9
    case = evaluation(AutoAttackProtocol(), n=6, classes=classes, eps=0.01)
    tiny = [dataclasses.replace(stage, attack=short(stage.attack)) for stage in case.plan().stages]
    store = kept(case, tiny)
    assert len(store.records("apgd-ce")) == int((~store.records(CLEAN).broken).sum())


def short(attack: Any) -> Any:
    return dataclasses.replace(attack, steps=3)


def test_wilson_is_the_textbook_interval() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(0, 0) == (0, 1)


def test_a_subset_is_fixed_and_nested() -> None:
    small, large = subset(1000, 50), subset(1000, 200)
    assert len(small) == 50 and torch.isin(small, large).all()
    assert torch.equal(small, small.sort().values) and torch.equal(small, subset(1000, 50))
    assert not torch.equal(small, torch.arange(50))
    for n, said in ((0, "n=0 is not at least 1"), (1001, "n=1001 but the split has 1000")):
        with pytest.raises(UserError, match=said):
            subset(1000, n)


class Around(nn.Module):
    """A model with something done around it."""

    def __init__(self, model: nn.Module, call: Callable) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


def test_pixels_with_a_nan_gradient_do_not_stop_an_attack() -> None:
    x = images(40)
    x[:, :, 0, 0] = 0.0  # where the square root has no gradient
    plain = linear()
    rooted = Around(linear(), lambda model, x: model(x + 0 * x.sqrt()))
    y = labels(plain, x, wrong=0)
    threat = Threat("linf", 0.03)
    found = [
        advbench.evaluate(model, x, y, threat=threat, protocol="pgd").robust.acc
        for model in (plain, rooted)
    ]
    assert 0 < found[0] < 1 and abs(found[0] - found[1]) <= 2 / 40


def test_an_answer_that_is_no_number_is_wrong() -> None:
    """NaN logits have an argmax, class 0; that does not make class 0 robust."""
    x = images(20)
    y = torch.zeros(20, dtype=torch.int64)
    layer = nn.Linear(16, 2)
    nn.init.zeros_(layer.weight)
    layer.bias.data = torch.tensor([2.0, 0.0])
    inner = nn.Sequential(nn.Flatten(), layer)

    def off_the_images(model: nn.Module, z: Tensor) -> Tensor:
        far = (z[:, None] - x).abs().flatten(2).amax(2).amin(1) > 1e-6
        return torch.where(far[:, None], torch.nan, model(z))

    model = Around(inner, off_the_images)
    results = advbench.evaluate(model, x, y, threat="linf_8", protocol="pgd")
    assert results.clean.acc == 1 and results.robust.acc == 0


def test_models_that_cannot_be_evaluated_are_refused() -> None:
    x = images(8)
    y = torch.zeros(8, dtype=torch.int64)

    def refused(model: nn.Module, match: str, x: Tensor = x, y: Tensor = y) -> None:
        with pytest.raises(UserError, match=match):
            advbench.evaluate(model, x, y, threat="linf_8", protocol="pgd")

    refused(linear().train(), "training mode")
    broken = linear()
    broken[1].weight.data[0, 0] = torch.nan  # pyright: ignore
    refused(broken, r"not finite: '1.weight'")
    refused(linear(), "labels up to 5", y=y + 5)
    refused(linear(), "can't take the data's images", x=torch.rand(8, 3, 9, 9))
    refused(nn.Flatten(0).eval(), r"logits of shape \(N, K\)")
    refused(nn.Sequential(linear().train(False), nn.Dropout(0.5)), "training mode")
    refused(Around(linear(), lambda model, x: model(x) * torch.rand(1)), "stochastic")
    refused(Around(linear(), lambda model, x: model(x - x.mean(0))), "other images of its batch")
    refused(Around(linear(), lambda model, x: model(x).detach()), "has no gradient")
    refused(Around(linear(), lambda model, x: {}["key"]), "can't take the data's images")
    refused(Around(linear(), lambda model, x: model(x) * (x - x).sum().sqrt()), "NaN or infinite")
    refused(linear(), "images are .N, C, H, W.", x=x[:, 0])
    refused(linear(), "outside .0, 1.", x=255 * x)
    refused(linear(), "NaN", x=torch.where(x > 0.5, torch.nan, x))


def test_values_from_python_are_checked_like_those_from_the_command_line(tmp_path: Path) -> None:
    model, x = linear(), images(8)
    y = labels(model, x)

    def evaluated(x: Tensor = x, **given: Any) -> float:
        given = {"threat": "linf_8", "protocol": "fgsm", **given}
        return advbench.evaluate(model, x, y, **given).robust.acc

    known = evaluated()
    assert evaluated(precision=32) == evaluated(precision="32") == known
    rough = x.to(torch.bfloat16)
    assert evaluated(rough) == evaluated(rough.float())
    (tmp_path / "file").touch()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("recipe: {}\n")
    for wrong, match in (
        ({"threat": 0.1}, "threat is 0.1: give a name"),
        ({"protocol": 3}, "protocol is 3: give a name"),
        ({"precision": 16}, "no trainer.precision '16'"),
        ({"folder": tmp_path / "file"}, "is a file, not a directory"),
        ({"folder": run}, "holds a training run"),
    ):
        with pytest.raises(UserError, match=match):
            evaluated(x, **wrong)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_the_model_comes_back_as_it_was() -> None:
    model, x = linear(), images(8)
    model[1].bias.requires_grad_(False)  # pyright: ignore
    before = {k: v.clone() for k, v in model.state_dict().items()}
    advbench.evaluate(model, x, labels(model, x), threat="linf_8", protocol="pgd")
    assert [p.requires_grad for p in model.parameters()] == [True, False]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
