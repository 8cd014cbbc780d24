"""Recipes against linear models, whose loss and worst perturbation are known."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from problems import L2, LINF, attack_direction, linear, record
from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.cli.main import main
from advbench.config import options
from advbench.data import sources
from advbench.defenses.base import Defense
from advbench.errors import UserError
from advbench.experiments.train import _teachers
from advbench.recipes.awp import AWP
from advbench.recipes.base import Recipe, frozen
from advbench.recipes.fgsm_rs import FGSMRS
from advbench.recipes.mart import MART
from advbench.recipes.mixed import Mixed
from advbench.recipes.mtard import MTARD
from advbench.recipes.pgd_at import PGDAT
from advbench.recipes.standard import Standard
from advbench.recipes.trades import NOISE, TRADES, divergence
from advbench.runs.results import Results
from advbench.training.step import TrainingStep


@pytest.fixture
def problem() -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, generator=generator)
    x = 0.3 + 0.4 * torch.rand(8, 1, 1, 6, generator=generator)
    return linear(weight), x, torch.arange(8) % 2


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_standard_is_the_smoothed_cross_entropy_of_the_clean_part(problem, smoothing):
    model, x, y = problem
    terms = Standard(label_smoothing=smoothing).loss_terms(model, record(model, y, clean=x))
    logits = x.flatten(1) @ next(model.head.parameters()).T
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    wanted = torch.full((8, 2), smoothing / 2)
    wanted[torch.arange(8), y] += 1 - smoothing
    assert terms.keys() == {"ce"}
    torch.testing.assert_close(terms["ce"], -(wanted * log_p).sum(1).mean())


@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_at_finds_the_worst_linf_point_of_a_linear_model(problem, random_start):
    model, x, y = problem
    recipe = PGDAT(threat=LINF, random_start=random_start)
    point = recipe.perturb(model, x, y)
    direction = attack_direction(model, y)
    torch.testing.assert_close(point, x + 0.1 * direction.sign())
    # CE of two classes is softplus(-margin), and the budget costs eps |w|_1 of the margin.
    clean_margin = -(direction * x).flatten(1).sum(1)
    worst = clean_margin - 0.1 * direction.flatten(1).abs().sum(1)
    loss = recipe.loss_terms(model, record(model, y, adversarial=point))["ce"]
    torch.testing.assert_close(loss, nn.functional.softplus(-worst).mean())


def test_pgd_at_finds_the_worst_l2_point_of_a_linear_model(problem):
    model, x, y = problem
    point = PGDAT(threat=Threat("l2", 0.2), random_start=False).perturb(model, x, y)
    direction = attack_direction(model, y)
    unit = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(point, x + 0.2 * unit)


def test_pgd_at_stays_inside_the_image(problem):
    model, _, y = problem
    x = (torch.arange(48).view(8, 1, 1, 6) % 2).float()
    point = PGDAT(threat=LINF).perturb(model, x, y)
    wanted = (x + 0.1 * attack_direction(model, y).sign()).clamp(0, 1)
    torch.testing.assert_close(point, wanted)


def test_step_size_is_in_pixel_units(problem):
    model, x, y = problem
    recipe = PGDAT(threat=LINF, steps=1, step_size="2/255", random_start=False)
    moved = (recipe.perturb(model, x, y) - x).abs()
    torch.testing.assert_close(moved, torch.full_like(x, 2 / 255))


def test_random_starts_differ_between_equal_rows_and_follow_the_seed(problem):
    model, x, y = problem
    recipe = PGDAT(threat=LINF, steps=1, step_size=1e-6)
    same, label = x[:1].expand(2, -1, -1, -1), y[:1].expand(2)
    torch.manual_seed(3)
    first = recipe.perturb(model, same, label)
    assert (first[0] - first[1]).abs().max() > 0.01
    torch.manual_seed(3)
    assert torch.equal(recipe.perturb(model, same, label), first)
    torch.manual_seed(4)
    assert not torch.equal(recipe.perturb(model, same, label), first)


def bernoulli_divergence(a: Tensor, b: Tensor) -> Tensor:
    """KL between two classes with log-odds ``a`` and two with log-odds ``b``."""
    p, q = a.sigmoid(), b.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_divergence_is_the_sum_of_p_log_p_over_q():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    p, q = logits.softmax(2)
    wanted = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(p.log(), logits[1]), wanted)
    assert (wanted > 0).all()
    assert not torch.allclose(divergence(q.log(), logits[0]), wanted), "not symmetric"


def test_divergence_stays_finite_where_probabilities_vanish():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    clean, adversarial = logits.log_softmax(1), logits.flip(0)
    loss = divergence(clean, adversarial)
    # The second row of q holds one class alone: KL(uniform || q) is the mean gap, less log 3.
    torch.testing.assert_close(loss, torch.tensor([math.log(3), 1e4 - math.log(3)]))
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trades_finds_the_worst_point_of_a_linear_model(problem, norm):
    model, x, y = problem
    torch.manual_seed(0)
    point = TRADES(threat=Threat(norm, 0.1)).perturb(model, x, y)
    # The divergence of two classes is convex in the log-odds, so its largest values lie at the two
    # ends of what the budget allows; the noise decides which one the search walks to.
    direction = attack_direction(model, y)
    length = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    way = direction.sign() if norm == "linf" else direction / length
    ahead = ((point - x) * direction).flatten(1).sum(1).sign().view(-1, 1, 1, 1)
    # The sign step forgets the noise; the l2 step keeps what is across the direction.
    across = 0.0 if norm == "linf" else 2 * NOISE
    torch.testing.assert_close(point, x + 0.1 * ahead * way, rtol=0, atol=across + 1e-6)
    assert {float(sign) for sign in ahead} == {-1.0, 1.0}


def test_the_search_of_trades_does_not_look_at_the_classes(problem):
    model, x, y = problem
    points = []
    for classes in (y, 1 - y):
        torch.manual_seed(0)
        points.append(TRADES(threat=LINF).perturb(model, x, classes))
    assert torch.equal(*points)


def test_trades_starts_at_small_noise_of_each_row(problem):
    model, x, y = problem
    recipe = TRADES(threat=LINF, steps=1, step_size=0)
    same = x[:1].expand(500, -1, -1, -1)
    noise = recipe.perturb(model, same, y[:1].expand(500)) - same
    assert NOISE == 0.001
    assert noise.mean().abs() < 1e-4 and abs(noise.std() - 0.001) < 1e-4
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_trades_is_cross_entropy_and_beta_divergence(problem, smoothing):
    model, x, y = problem
    point = x + 0.1 * attack_direction(model, 1 - y).sign()
    recipe = TRADES(threat=LINF, beta=3.0, label_smoothing=smoothing)
    terms = recipe.loss_terms(model, record(model, y, clean=x, adversarial=point))
    assert terms.keys() == {"ce", "kl"}
    standard = Standard(label_smoothing=smoothing).loss_terms(model, record(model, y, clean=x))
    torch.testing.assert_close(terms["ce"], standard["ce"])

    weight = next(model.head.parameters())
    odds = [part.flatten(1) @ (weight[1] - weight[0]) for part in (x, point)]
    wanted = 3 * bernoulli_divergence(*odds).mean()
    torch.testing.assert_close(terms["kl"], wanted)
    # Both sides of the divergence learn, as in the authors' code.
    gradients = [
        torch.autograd.grad(term, weight, retain_graph=True)[0] for term in (terms["kl"], wanted)
    ]
    torch.testing.assert_close(*gradients)


class Mode(nn.Module):
    """Notes in which mode it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.training)
        return x


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (PGDAT, 10),
        (TRADES, 11),
        (FGSMRS, 1),
        (MART, 10),
        (Mixed, 1),
        (lambda threat: AWP(of=TRADES(threat=threat)), 11),
    ],
)
def test_the_attack_leaves_the_model_as_it_was(kind, passes, threat):
    mode = Mode()
    trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), mode, nn.Flatten())
    model = Classifier(trunk, num_features=16, num_classes=3, input_shape=(1, 4, 4)).train()
    trunk[2].eval()
    trunk[0].weight.requires_grad_(False)
    kept = next(model.head.parameters())
    kept.grad = torch.full_like(kept, 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    point = kind(threat=threat).perturb(model, x, y)

    assert not point.requires_grad and point.shape == x.shape and not torch.equal(point, x)
    assert threat.contains(point, x).all()
    assert mode.seen == [False] * passes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in (model, trunk[1], trunk[2], mode)] == [True, True, False, True]
    assert not trunk[0].weight.requires_grad and trunk[0].bias.requires_grad
    assert torch.equal(kept.grad, torch.full_like(kept, 7.0))
    grads = [p.grad for p in model.parameters() if p is not kept]
    assert len(grads) == 5 and all(grad is None for grad in grads)


def test_frozen_restores_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    with pytest.raises(RuntimeError), frozen(model):
        assert not model[1].training and not any(p.requires_grad for p in model.parameters())
        raise RuntimeError
    assert model[1].training and all(p.requires_grad for p in model.parameters())


def test_parts():
    assert Standard().parts == ("clean",)
    assert Standard(threat=LINF).threat == LINF
    assert PGDAT(threat=LINF).parts == ("adversarial",)
    assert TRADES(threat=LINF).parts == ("clean", "adversarial")


def every_recipe(student: Classifier) -> dict[str, Recipe]:
    """One of each, with teachers of the student's size."""
    size, generator = (student.num_classes, student.num_features), torch.Generator().manual_seed(4)
    teachers: dict[str, Any] = {
        f"{name}_teacher": linear(torch.randn(size, generator=generator))
        for name in ("robust", "standard")
    }
    mtard = MTARD(threat=LINF, **teachers)
    made: dict[str, Recipe] = {
        "standard": Standard(threat=LINF),
        "pgd_at": PGDAT(threat=LINF),
        "fgsm_rs": FGSMRS(threat=LINF),
        "trades": TRADES(threat=LINF),
        "mart": MART(threat=LINF),
        "mixed": Mixed(threat=LINF),
        "mtard": mtard,
        "awp": AWP(of=mtard),
    }
    assert made.keys() == options("recipe").keys()
    return made


@pytest.mark.parametrize("scale", [1.0, 1e4, 0.0])
def test_losses_and_gradients_are_finite_whatever_the_logits(problem, scale):
    """Also of a model that is as sure as float32 allows, or of none."""
    model, x, y = problem
    weight = next(model.head.parameters())
    weight.data *= scale
    seen = 0
    for name, recipe in every_recipe(model).items():
        parts: dict[Any, Tensor] = {"clean": x}
        if "adversarial" in recipe.parts:
            parts["adversarial"] = recipe.perturb(model, x, y)
            assert parts["adversarial"].isfinite().all(), name
            assert LINF.contains(parts["adversarial"], x).all()
        terms = TrainingStep(model, recipe, Defense())(parts, y, 0, 0)
        assert all(term.isfinite() and term >= 0 for term in terms.values()), (name, terms)
        (gradient,) = torch.autograd.grad(sum(terms.values(), torch.zeros(())), weight)
        assert gradient.isfinite().all(), name
        assert gradient.any() or scale == 1e4, name
        seen += 1
    assert seen == 8


MISTAKES = [
    (lambda: PGDAT(), "threat=linf_8"),
    (lambda: PGDAT(threat=Threat("l1", 12)), "not defined for l1"),
    (lambda: PGDAT(threat=LINF, steps=0), "steps >= 1"),
    (lambda: PGDAT(threat=LINF, loss_name="cee"), "did you mean 'ce'"),
    (lambda: PGDAT(threat=LINF, step_size="two"), "step_size='two'"),
    (lambda: TRADES(), "threat=linf_8"),
    (lambda: TRADES(threat=Threat("l1", 12)), "not defined for l1"),
    (lambda: TRADES(threat=LINF, steps=0), "steps >= 1"),
    (lambda: TRADES(threat=LINF, beta=-1.0), "recipe.beta=-1 "),
    (lambda: TRADES(threat=LINF, beta=math.nan), "recipe.beta=nan"),
    (lambda: Standard(label_smoothing=1.0), "recipe.label_smoothing=1 "),
    (lambda: Standard(label_smoothing=math.nan), "recipe.label_smoothing=nan"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 12


def test_shipped_recipes_write_out_every_field(problem):
    shipped, seen = options("recipe"), 0
    made = every_recipe(problem[0])
    for name in shipped.keys() - {"mtard"}:  # which has a test of its own, with teachers
        text = shipped[name].read_text()
        node = {str(key): value for key, value in OmegaConf.create(text).items()}
        module, _, attribute = node.pop("_target_").rpartition(".")
        component = getattr(import_module(module), attribute)
        assert component is type(made[name])
        # The threat is its own group; the caller hands it in.
        assert node.keys() == {field.name for field in fields(component)} - {"threat"}
        inside: dict[str, Any] = {"of": PGDAT(threat=LINF)} if node.get("of") == "pgd_at" else {}
        values = {**node, "threat": LINF, **inside}
        assert component(**values) == component(threat=LINF, **inside), "it gives the defaults"
        assert text.startswith(f"# advbench train recipe={name}") and text.count("\n# ") >= 2
        assert name == "standard" or "forward and" in text, "what a step costs"
        seen += 1
    assert seen == 7


# From the command line


FAST = ["trainer.epochs=1", "trainer.val_steps=1", "trainer.batch_size=400"]
TEACHERS = {"robust_teacher": "pgd_at", "standard_teacher": "standard"}
COMMANDS = {
    "standard": ([], ["ce"]),
    "pgd_at": (["recipe.steps=1"], ["ce"]),
    "fgsm_rs": (["optimizer.schedule=cyclic"], ["ce"]),
    "trades": (["recipe.steps=1"], ["ce", "kl"]),
    "mart": (["recipe.steps=1"], ["ce", "runner_up", "kl"]),
    "mixed": (["recipe.fraction=0.5"], ["ce"]),
    "mtard": (
        ["recipe.steps=1", *(f"recipe.{key}={run}" for key, run in TEACHERS.items())],
        ["kl_adversarial", "kl_clean"],
    ),
    "awp": (
        ["recipe.of={mtard: {steps: 1, robust_teacher: pgd_at, standard_teacher: standard}}"],
        ["kl_adversarial", "kl_clean"],
    ),
}


@pytest.fixture
def runs(start_in: Callable[[str, Callable[[], None]], Path]) -> Path:
    """A directory with runs to learn from."""

    def make() -> None:
        for name in TEACHERS.values():
            command = ["train", f"recipe={name}", f"hydra.run.dir={name}"]
            assert main([*command, *FAST, *COMMANDS[name][0]]) == 0

    return start_in("teachers", make)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_recipe_trains_from_the_command_line(runs: Path, name: str):
    settings, terms = COMMANDS[name]
    assert main(["train", f"recipe={name}", f"hydra.run.dir={name}", *FAST, *settings]) == 0
    summary = json.loads((runs / name / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (1, 3)
    chosen = "clean" if name == "standard" else "robust"
    assert summary["selected_by"].startswith(chosen)
    with (runs / name / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert [key for key in row if key.startswith("loss")] == ["loss", *(f"loss_{t}" for t in terms)]
    assert float(row["loss"]) == pytest.approx(
        sum(float(row[f"loss_{term}"]) for term in terms), rel=1e-4
    )
    assert COMMANDS.keys() == options("recipe").keys() and len(COMMANDS) == 8


def test_a_run_keeps_the_recipe_inside_and_goes_by_it(runs: Path, capsys):
    settings, _ = COMMANDS["awp"]
    command = ["train", "recipe=awp", "hydra.run.dir=kept", *FAST]
    assert main([*command, *settings]) == 0
    kept: Any = OmegaConf.load(runs / "kept" / "config.yaml")
    assert kept.recipe.of._target_ == "advbench.recipes.mtard.MTARD"
    assert kept.recipe.of.robust_teacher == "pgd_at" and kept.recipe.of.steps == 1
    identity = json.loads((runs / "kept" / "summary.json").read_text())["identity"]
    assert identity["teachers"].keys() == TEACHERS.keys()
    capsys.readouterr()
    assert main([*command, *settings]) == 0
    assert "finished already" in "".join(capsys.readouterr())
    assert main([*command, "recipe.of=trades"]) == 2, "another recipe inside is another run"
    assert main(["eval", "run=kept", "protocol=fgsm", "n=8", "hydra.run.dir=judged"]) == 0
    settings = Results.load(runs / "judged" / "results.json").settings
    assert settings["recipe"] == "awp" and settings["recipe.of"] == "mtard"
    assert settings["recipe.mtard.steps"] == 1


@pytest.mark.parametrize("recipe", ["recipe=pgd_at", "recipe=awp"])
def test_an_attack_that_two_classes_do_not_allow_is_one_line(runs: Path, capsys, recipe: str):
    rng = np.random.default_rng(0)
    np.savez("two.npz", x_train=rng.random((40, 8, 8), np.float32), y_train=np.arange(40) % 2)
    command = ["train", recipe, "data=npz", "data.path=two.npz", "hydra.run.dir=two"]
    loss = "recipe.loss_name=dlr" if "pgd" in recipe else "recipe.of={pgd_at: {loss_name: dlr}}"
    capsys.readouterr()
    assert main([*command, loss, "trainer.batch_size=8"]) == 2
    told = capsys.readouterr().err
    assert "the dlr loss needs at least 3 classes and there are 2" in told
    assert not (runs / "two" / "epoch.pt").exists(), "nothing was begun"


OTHER_DATA = {
    # The digits of the teachers, told to be something else.
    "advbench.data.sources.mnist": "=pgd_at was trained on digits and the student .* learn mnist",
    "advbench.data.sources.npz": None,
    "mine.Digits": None,
}


@pytest.mark.parametrize("target", OTHER_DATA)
def test_a_teacher_of_other_data_is_one_line(runs: Path, target: str):
    recipe = OmegaConf.create({"of": {"robust_teacher": "pgd_at", "standard_teacher": "standard"}})
    own = {"path": "digits.npz", "name": None} if target.endswith("npz") else {}
    data = OmegaConf.create({"_target_": target, **own})
    info = sources.digits().build().info
    if (message := OTHER_DATA[target]) is None:
        assert _teachers(recipe, (), data, info).keys() == TEACHERS.keys()
        return
    with pytest.raises(UserError, match=message):
        _teachers(recipe, (), data, info)


def test_a_teacher_of_other_images_or_classes_is_one_line(runs: Path, capsys):
    x = np.random.default_rng(0).random((40, 6, 6), np.float32)
    for y, knows in (
        (np.arange(40) % 10, "(1, 6, 6) of 10"),
        (np.arange(40) % 2, "(1, 6, 6) of 2"),
    ):
        np.savez("small.npz", x_train=x, y_train=y)
        command = [
            "train",
            "recipe=mtard",
            "data=npz",
            "data.path=small.npz",
            "hydra.run.dir=small",
        ]
        assert main([*command, *(f"recipe.{key}={run}" for key, run in TEACHERS.items())]) == 2
        told = capsys.readouterr().err
        assert "robust_teacher=pgd_at has images (1, 8, 8) of 10 classes and npz:small" in told
        assert f"has images {knows} classes: take a run on the same data" in told
        assert told.count("\n") == 1 and not (runs / "small").exists()


WRONG = {
    "recipe.of=trads": "did you mean 'trades'?",
    "recipe.of.beta=3": "give 'recipe.of={NAME: {beta: VALUE}}'",
    "recipe.of={trades: {bta: 3}}": "did you mean 'beta'?",
    "recipe.of=mtard": "needs two teachers",
    "recipe.of={mtard: {robust_teacher: no, standard_teacher: no}}": "there is no run",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_mistake_is_one_line(runs: Path, capsys, setting: str):
    before = set(runs.iterdir())
    assert main(["train", "recipe=awp", setting]) == 2
    told = capsys.readouterr().err
    assert WRONG[setting] in told and told.count("\n") == 1
    assert set(runs.iterdir()) == before and len(WRONG) == 5
