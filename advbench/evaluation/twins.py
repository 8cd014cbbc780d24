"""Twins: surrogates that advbench makes for a model that names none.

A **straight-through twin** is the same model with another backward pass (BPDA; Athalye et al. 2018,
arXiv 1802.00420): rounding, signs and hard labels pass the gradient on, and if need be so do cut
graphs, gradient hooks and the user's own backward functions. It is kept if images that lower its
margin lower the model's by more than the model's own gradient does.

Where none is kept, a **student** (``advbench.evaluation.student``) learns the model's answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from advbench import surgery
from advbench.attacks import losses
from advbench.attacks.base import Clean, attackable, craft
from advbench.attacks.pgd import PGD
from advbench.attacks.random import KeyedRandom
from advbench.attacks.threat import Threat
from advbench.data.base import Split
from advbench.defenses.base import Surrogate, Traits
from advbench.evaluation.samples import Samples
from advbench.evaluation.student import learn

TWIN, STUDENT = "straight-through", "student"
"""What they are called among the surrogates."""

LOOKED_AT = 32
"""Images on which gradients are compared."""
STEPS = 10
"""Of the search that compares them."""
BETTER = 0.1
"""By how much of the clean margin a twin's images must lower the model's margin further."""

GRAD_MODE = "is_grad_enabled"
ROUNDING = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"}
CASTS = {"byte": torch.uint8, "char": torch.int8, "int": torch.int32, "long": torch.int64}


def made_for(
    model: nn.Module,
    samples: Samples,
    threat: Threat,
    traits: Traits,
    train: Split | None = None,
    seed: int = 0,
) -> dict[str, Surrogate]:
    """Surrogates of a model that names none; {} for one that depends on its batch.

    Args:
        model: in evaluation mode on the samples' device.
        samples: those that are attacked. Labels of the model's own are used, not theirs.
        threat: what an attack may change.
        traits: what is known of the model.
        train: training images, of which a student learns; None stands for the samples with noise.
        seed: of all draws.

    Returns:
        By name, each with a line on what was made and why.
    """
    if traits.batch_dependent:
        return {}
    if not traits.stochastic and (twin := straight_through(model, samples, threat, seed)):
        return {TWIN: twin}
    student = learn(model, samples, threat, train, seed)
    why = "a small net that learned the model's answers: its images may break the model too"
    return {STUDENT: Surrogate(student, exact=False, loss="ce", why=why, transfer=True)}


def straight_through(
    model: nn.Module, samples: Samples, threat: Threat, seed: int = 0
) -> Surrogate | None:
    """The straight-through twin whose gradient lowers the margins more than the model's own.

    Args:
        model: the real one, in evaluation mode.
        samples: the first few of them are searched.
        threat: where the searches may go.
        seed: of their random numbers.

    Returns:
        A surrogate; None if no twin does better.
    """
    clean = samples.fetch(samples.ids[:LOOKED_AT])
    with torch.no_grad():
        logits = model(clean.x)
    clean = Clean(clean.ids, clean.x, logits.argmax(1))  # the model's own labels
    clean_margin = -losses.margin(logits, clean.y)
    best_margin, best_twin = _margin(model, model, clean, threat, seed), None
    min_gain = BETTER * clean_margin.clamp_min(1e-6)
    for harsh in (False, True):
        twin = StraightThrough(surgery.twin(model), harsh=harsh)
        margin = _margin(twin, model, clean, threat, seed)
        if margin is None or not twin.replaced:
            continue
        if best_margin is None or ((best_margin - margin) / min_gain).mean() > 1:
            best_margin, best_twin = margin, twin
    if best_twin is None:
        return None
    names = [name for name, _ in best_twin.replaced.most_common()]
    if len(names) > 1:  # PyTorch's own no_grad asks it too
        names = [name for name in names if name != GRAD_MODE]
    what = ", ".join(names)
    why = f"the same function with a gradient that passes straight through: {what}"
    return Surrogate(best_twin, exact=True, loss="margin", why=why)


def _margin(
    victim: nn.Module, model: nn.Module, clean: Clean, threat: Threat, seed: int
) -> Tensor | None:
    """The model's margins (N,) at the images that a short search on ``victim`` ends with.

    None if the victim is not the model's function, or can't be searched.
    """
    random = KeyedRandom(seed, "twins", clean.ids, torch.zeros_like(clean.ids))
    attack = PGD(steps=STEPS, loss_name="margin")
    try:
        with attackable(victim):
            with torch.no_grad():
                logits, twice = model(clean.x), victim(clean.x)
            torch.testing.assert_close(twice, logits)
            images = craft(attack, _Cut(victim), clean, threat, random)
        with torch.no_grad():
            return -losses.margin(model(images), clean.y)
    except Exception:  # a forward that a twin can't follow, whatever it raises
        return None


class _Cut(nn.Module):
    """A victim whose answer may be cut off from its input: the gradient is zero then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits if logits.requires_grad else logits + 0 * x.flatten(1).sum(1, keepdim=True)


class StraightThrough(nn.Module):
    """A model whose backward pass is the identity where its own is lost.

    Args:
        model: a copy, which is changed.
        harsh: also ignore what cuts the graph (``detach``, ``no_grad``) or changes the gradient on
            its way (hooks, backward functions of ``torch.autograd.Function``), and what asks
            whether a gradient is computed.

    Attributes:
        replaced: how often what was passed through straight in the last forward pass.
    """

    def __init__(self, model: nn.Module, harsh: bool = False) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.harsh = harsh
        self.replaced: Counter[str] = Counter()
        if harsh:
            for module in self.model.modules():
                module._backward_hooks.clear()
                module._backward_pre_hooks.clear()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = Counter()
        with _Straight(self.replaced, self.harsh), _own_backwards(self.replaced, self.harsh):
            return self.model(x)


class _Straight(TorchFunctionMode):
    """Gives functions without a gradient the identity's; the values stay as they are."""

    def __init__(self, replaced: Counter[str], harsh: bool) -> None:
        super().__init__()
        self.replaced, self.harsh = replaced, harsh
        self.sources: dict[int, tuple[Tensor, Tensor]] = {}
        """Of a tensor of indices by its id: itself, and what it is the argmax of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args else None
        if self.harsh and name == "_set_grad_enabled":
            self.replaced["no_grad"] += not args[0]
            return None
        if not isinstance(x, Tensor):
            return func(*args, **kwargs)
        if self.harsh and name == "register_hook":
            self.replaced["a gradient hook"] += 1
            return _NoHandle()
        if self.harsh and x.requires_grad and (name == "detach" or func is Tensor.data.__get__):  # pyright: ignore
            self.replaced["detach"] += 1
            return x.view_as(x)
        if name == "one_hot" and id(x) in self.sources:
            return self._one_hot(func, args, kwargs)
        answer = func(*args, **kwargs)
        if name == "argmax" and x.requires_grad:
            self.sources[id(answer)] = answer, x
        if not x.requires_grad or not isinstance(answer, Tensor) or answer.shape != x.shape:
            return answer
        to_integers = name in CASTS or (name in ("to", "type") and not answer.is_floating_point())
        if name in ROUNDING or to_integers or kwargs.get("rounding_mode"):
            self.replaced[f"a cast to {answer.dtype}" if to_integers else name] += 1
            smooth = torch.true_divide(*args[:2]) if kwargs.get("rounding_mode") else x
            return smooth + (answer.to(x.dtype) - smooth).detach()
        return answer

    def _one_hot(self, func: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        """A hard label, with the gradient of the softmax of what it is the argmax of."""
        self.replaced["argmax"] += 1
        _, source = self.sources[id(args[0])]
        hard, soft = func(*args, **kwargs), source.softmax(-1)
        return hard + (soft - soft.detach()) if hard.shape == soft.shape else hard


class _NoHandle:
    def remove(self) -> None:
        pass


@contextmanager
def _own_backwards(replaced: Counter[str], harsh: bool) -> Iterator[None]:
    """Inside, the user's backward functions give way to the gradient of their forward pass."""
    if not harsh:
        yield
        return

    def apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
        replaced[f"{cls.__name__}.backward"] += 1
        return cls.forward(_Context(), *args)

    def off() -> bool:
        replaced[GRAD_MODE] += 1
        return False

    with (
        _swapped(torch.autograd.Function, "apply", classmethod(apply)),
        _swapped(torch, "is_grad_enabled", off),
    ):
        yield


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute, inside."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Context:
    """Takes what a forward pass keeps for its backward pass, and forgets it."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass

    mark_non_differentiable = mark_dirty = save_for_forward = save_for_backward
    set_materialize_grads = save_for_backward
