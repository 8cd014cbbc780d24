"""MTARD against linear models and weights by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from problems import attack_direction, linear
from small import THREAT, assert_same_result, fit, net
from torch import Tensor, nn

from advbench.attacks.threat import Threat
from advbench.backbones.base import Classifier
from advbench.config import build, options
from advbench.defenses.base import Defense, Part, Step
from advbench.errors import UserError
from advbench.recipes import mtard
from advbench.recipes.mtard import MTARD, Balance
from advbench.recipes.trades import NOISE
from advbench.training.trainer import Trainer

LINF = Threat("linf", 0.1)


def problem(classes: int = 2) -> tuple[Classifier, Classifier, Classifier, Tensor, Tensor]:
    """A student, a robust and a standard teacher, images and their classes."""
    generator = torch.Generator().manual_seed(0)
    student, robust, standard = (
        linear(torch.randn(classes, 6, generator=generator)) for _ in range(3)
    )
    x = 0.3 + 0.4 * torch.rand(8, 1, 1, 6, generator=generator)
    return student, robust, standard, x, torch.arange(8) % 2


def recipe(robust: Any, standard: Any, threat: Threat | None = LINF, **values) -> MTARD:
    return MTARD(threat=threat, robust_teacher=robust, standard_teacher=standard, **values)


def record(
    model: Classifier,
    x: Tensor,
    point: Tensor,
    y: Tensor,
    memory: nn.Module,
    *,
    epoch: int = 0,
    step: int = 0,
) -> Step:
    clean, adversarial = (Part(z, model.features(z), model(z)) for z in (x, point))
    return Step(y, clean, adversarial, epoch=epoch, step=step, memory=memory)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


# The losses


def test_each_teacher_teaches_its_part():
    student, robust, standard, x, y = problem()
    point = x + 0.1
    how = recipe(robust, standard)
    memory = how.memory()
    memory.clean.fill_(0.3)
    terms = how.loss_terms(student, record(student, x, point, y, memory))
    wanted = {
        "kl_adversarial": 0.7 * divergence(robust(point), student(point)),
        "kl_clean": 0.3 * divergence(standard(x), student(x)),
    }
    assert terms.keys() == wanted.keys()
    for name, term in wanted.items():
        torch.testing.assert_close(terms[name], term)
    losses = torch.stack([wanted["kl_clean"] / 0.3, wanted["kl_adversarial"] / 0.7])
    torch.testing.assert_close(memory.last, losses.detach())
    assert not memory.last.requires_grad

    weight = next(student.head.parameters())
    gradients = [
        torch.autograd.grad(sum(t.values(), torch.zeros(())), weight, retain_graph=True)[0]
        for t in (terms, wanted)
    ]
    torch.testing.assert_close(*gradients)


def test_a_student_like_its_teachers_has_nothing_to_learn():
    student, _, _, x, y = problem(classes=4)
    twins = [linear(next(student.head.parameters()).detach().clone()) for _ in range(2)]
    how = recipe(twins[0], twins[1])
    terms = how.loss_terms(student, record(student, x, x + 0.1, y, how.memory()))
    loss = terms["kl_adversarial"] + terms["kl_clean"]
    torch.testing.assert_close(loss, torch.zeros(()))
    loss.backward()
    gradient = next(student.head.parameters()).grad
    torch.testing.assert_close(gradient, torch.zeros(4, 6))


def test_a_teacher_that_is_sure_gives_finite_losses():
    student, robust, standard, x, y = problem()
    for model in (student, robust, standard):
        next(model.head.parameters()).data *= 1e4
    how = recipe(robust, standard)
    terms = how.loss_terms(student, record(student, x, 1 - x, y, how.memory()))
    sum(terms.values(), torch.zeros(())).backward()
    gradient = next(student.head.parameters()).grad
    assert gradient is not None and gradient.isfinite().all() and gradient.any()


def test_teachers_are_frozen_and_in_evaluation_mode():
    teachers = [net().train() for _ in range(2)]
    states = [{k: v.clone() for k, v in t.state_dict().items()} for t in teachers]
    how = recipe(teachers[0], teachers[1])
    assert not any(module.training for t in teachers for module in t.modules())
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    student = net(plain=True)
    terms = how.loss_terms(student, record(student, x, 1 - x, y, how.memory()))
    sum(terms.values(), torch.zeros(())).backward()
    for teacher, state in zip(teachers, states, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


class Placed(nn.Module):
    """A teacher that notes where it is sent; its buffer says it is on another device."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, device=where))
        self.sent: list[torch.device] = []

    def to(self, device: torch.device) -> Placed:  # pyright: ignore
        self.sent.append(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]


def test_teachers_come_to_the_images():
    student, _, _, x, y = problem()
    away, here = Placed("meta"), Placed("cpu")
    how = recipe(away, here)
    how.loss_terms(student, record(student, x, x, y, how.memory()))
    assert away.sent == [torch.device("cpu")] and here.sent == []


# The search


def test_x_adversarial_is_the_worst_for_the_student():
    student, robust, standard, x, y = problem()
    how = recipe(robust, standard)
    point = how.perturb(student, x, y)
    torch.testing.assert_close(point, x + 0.1 * attack_direction(student, y).sign())
    assert how.parts == ("clean", "adversarial")
    one = recipe(robust, standard, steps=1, step_size=0.004)
    moved = (one.perturb(student, x, y) - x).abs()
    assert (moved - 0.004).abs().max() < 6 * NOISE and moved.std() > 0


def test_the_search_starts_near_the_image_and_runs_in_evaluation_mode():
    student, robust, standard, x, y = problem()
    same = x[:1].expand(500, -1, -1, -1)
    how = recipe(robust, standard, steps=1, step_size=0)
    noise = how.perturb(student, same, y[:1].expand(500)) - same
    assert noise.mean().abs() < 1e-4 and abs(noise.std() - NOISE) < 1e-4

    seen = []
    student.head.register_forward_hook(lambda module, *_: seen.append(module.training))
    recipe(robust, standard).perturb(student.train(), x, y)
    assert seen == [False] * 10 and student.training


# The weights


def test_weights_by_hand_over_three_steps():
    student, robust, standard, x, y = problem()
    how = recipe(robust, standard, weight_rate=0.2, weight_milestones=[1, 2])
    memory, w_n, first = how.memory(), 0.5, [0.0, 0.0]
    for step, epoch in enumerate((0, 0, 1)):
        point = x + 0.1 * (step + 1)
        losses = [float(divergence(t(z), student(z)).detach())
                  for t, z in ((standard, x + 0.05 * step), (robust, point))]  # fmt: skip
        now = record(student, x + 0.05 * step, point, y, memory, epoch=epoch, step=step)
        terms = how.loss_terms(student, now)
        assert float(terms["kl_clean"].detach()) == pytest.approx(w_n * losses[0], rel=1e-4)
        adversarial = float(terms["kl_adversarial"].detach())
        assert adversarial == pytest.approx((1 - w_n) * losses[1], rel=1e-4)
        how.after_step(student, now)
        first = losses if step == 0 else first
        l_n, l_a = (loss / start for loss, start in zip(losses, first, strict=True))
        rate = 0.2 if epoch == 0 else 0.02
        w_n -= rate * (w_n - l_n / (l_a + l_n))
        assert float(memory.clean) == pytest.approx(w_n, rel=1e-4)
        if step == 0:
            assert w_n == 0.5
    assert abs(w_n - 0.5) > 0.01
    torch.testing.assert_close(memory.first, torch.tensor(first))


def test_milestones_drop_the_rate_each_time():
    student, robust, standard, x, y = problem()
    for epoch, rate in ((0, 0.5), (3, 0.5), (4, 0.05), (5, 0.05), (6, 0.005)):
        how = recipe(robust, standard, weight_rate=0.5, weight_milestones=[4, 6])
        memory = how.memory()
        memory.first.copy_(torch.tensor([1.0, 1.0]))
        memory.last.copy_(torch.tensor([3.0, 1.0]))
        how.after_step(student, record(student, x, x, y, memory, epoch=epoch, step=9))
        torch.testing.assert_close(memory.clean, torch.tensor(0.5 + rate * 0.25))


def test_a_first_loss_of_zero_leaves_finite_weights():
    for last in ([0.0, 0.0], [0.0, 1.0]):
        memory = Balance()
        memory.first.zero_()
        memory.last.copy_(torch.tensor(last))
        memory.move(0.5)
        torch.testing.assert_close(memory.clean, torch.tensor(0.5 - 0.25 * last[1]))


def test_weights_follow_the_losses_of_all_devices(monkeypatch):
    student, robust, standard, x, y = problem()
    how = recipe(robust, standard)
    memory = how.memory()
    memory.last.copy_(torch.tensor([1.0, 2.0]))
    other = torch.tensor([3.0, 6.0])
    monkeypatch.setattr(mtard.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(mtard.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(mtard.distributed, "all_reduce", lambda value: value.add_(other))
    how.after_step(student, record(student, x, x, y, memory))
    torch.testing.assert_close(memory.first, torch.tensor([2.0, 4.0]))


@dataclass(frozen=True)
class Weights(Defense):
    """Keeps w_n after each step; raises after one of them."""

    stop_at: int = -1
    seen: dict[int, float] = field(default_factory=dict)

    def after_step(self, model: Classifier, step: Step) -> None:
        assert isinstance(step.memory, Balance)
        self.seen[step.step] = float(step.memory.clean)
        if step.step == self.stop_at:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_with_its_weights(tmp_path):
    trainer = Trainer(epochs=2, batch_size=16, val_steps=1, save_every=0)

    def how() -> MTARD:
        torch.manual_seed(5)
        teachers = [net(), net(plain=True)]
        for teacher in teachers:
            next(teacher.head.parameters()).data *= 3
        return recipe(teachers[0], teachers[1], THREAT, steps=1, weight_rate=0.3)

    whole, parts = Weights(), Weights()
    fit(tmp_path / "whole", trainer, recipe=how(), defense=whole)
    for stop_at in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            stopped = Weights(stop_at=stop_at, seen=parts.seen)
            fit(tmp_path / "parts", trainer, recipe=how(), defense=stopped)
    fit(tmp_path / "parts", trainer, recipe=how(), defense=parts)
    assert_same_result(tmp_path / "whole", tmp_path / "parts")
    assert parts.seen == whole.seen and len(whole.seen) == 12
    assert len(set(whole.seen.values())) == 12, "the weight moves in each step but the first"
    assert all(0 < w < 1 for w in whole.seen.values())


# Mistakes and configs


def teachers(**values) -> MTARD:
    _, robust, standard, _, _ = problem()
    return recipe(robust, standard, **values)


def mismatched(which: str) -> object:
    student, robust, standard, x, y = problem()
    _, more, _, _, _ = problem(classes=3)
    how = recipe(more, standard) if which == "robust" else recipe(robust, more)
    return how.loss_terms(student, record(student, x, x, y, how.memory()))


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: MTARD(threat=LINF), r"give recipe\.robust_teacher=RUN recipe\.standard_teacher=RUN$"),
    (lambda: recipe(problem()[1], None), "needs two teachers"),
    (lambda: recipe(None, problem()[1]), "needs two teachers"),
    (lambda: teachers(threat=None), "threat=linf_8"),
    (lambda: teachers(threat=Threat("l1", 12)), "not defined for l1"),
    (lambda: teachers(steps=0), "steps >= 1"),
    (lambda: teachers(weight_rate=1.5), r"recipe\.weight_rate=1\.5 "),
    (lambda: teachers(weight_rate=float("nan")), r"recipe\.weight_rate=nan"),
    (lambda: teachers(label_smoothing=0.1), r"recipe\.label_smoothing=0$"),
    (lambda: mismatched("robust"), r"recipe\.robust_teacher knows 3 classes and the student 2"),
    (lambda: mismatched("standard"), r"recipe\.standard_teacher knows 3 classes"),
]


def test_mistakes_are_user_errors():
    for make, message in MISTAKES:
        with pytest.raises(UserError, match=message):
            make()
    assert len(MISTAKES) == 11


def test_the_shipped_config_writes_out_every_field():
    text = options("recipe")["mtard"].read_text()
    node: Any = OmegaConf.create(text)
    values = {str(key): value for key, value in node.items()}
    assert values.pop("_target_") == "advbench.recipes.mtard.MTARD"
    assert values.keys() == {field.name for field in fields(MTARD)} - {"threat"}
    assert text.startswith("# advbench train recipe=mtard") and "lr=0.1 " in text
    _, robust, standard, _, _ = problem()
    given: dict[str, Any] = {"robust_teacher": robust, "standard_teacher": standard}
    assert build(node, "recipe", threat=LINF, **given) == MTARD(threat=LINF, **given)
    for key in given:
        node[key] = f"outputs/{key}"
    assert build(node, "recipe", threat=LINF).robust_teacher == "outputs/robust_teacher"
    with pytest.raises(UserError, match="needs two teachers"):
        build(OmegaConf.create(text), "recipe", threat=LINF)
