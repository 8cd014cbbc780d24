"""Wraps models of many kinds in the one form that an evaluation uses.

That form is a module in evaluation mode that takes float32 images (N, C, H, W) in [0, 1], leaves
them alone, and returns logits (N, K). Two gray images show what a
model needs for it. A thin wrapper does that and prints a line for each change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from advbench.errors import UserError

OTHER_TYPES = (torch.float16, torch.bfloat16, torch.float64)
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Adapted(nn.Module):
    """A model behind the form that an evaluation understands.

    Args:
        model: the user's model.
        part: the key or place of the logits in what it returns; None for logits alone.
        copies: whether it writes into its input, and so gets a copy.
    """

    def __init__(self, model: nn.Module, part: str | int | None, copies: bool) -> None:
        super().__init__()
        self.model = model
        self.part = part
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        answer = self.model(x.clone() if self.copies else x)
        return answer if self.part is None else _parts(answer)[self.part]


def in_evaluation_mode(model: nn.Module) -> nn.Module:
    """Put the user's model into evaluation mode, whatever its ``train`` returns.

    An exported program keeps the mode in which it was exported and says that it can't change it.
    """
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False
    return model


def adapted(
    model: nn.Module, input_shape: Sequence[int], num_classes: int | None = None
) -> tuple[nn.Module, list[str]]:
    """The model in the form that an evaluation understands, and what was done for it.

    A model that has the form already comes back as it is. The model given is not changed.

    Args:
        model: in evaluation mode.
        input_shape: (C, H, W) of the images.
        num_classes: of the data; it tells the logits from other outputs of the same rank.

    Returns:
        The model, and a line for each thing that was done.

    Raises:
        UserError: The model returns several tensors that could be its logits.
    """
    notices = []
    while isinstance(inner := _unwrapped(model), nn.Module):
        notices.append(f"the model inside {type(model).__name__} is evaluated")
        model = inner
    answer, writes = _trial(model, input_shape)
    kinds = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    odd = sorted(str(kind).removeprefix("torch.") for kind in kinds & {*OTHER_TYPES})
    if odd and answer is None:  # else it converts the images itself
        try:
            model = copy.deepcopy(model).float()
        except Exception as problem:
            raise UserError(
                f"the model's weights are {odd[0]} and can't be converted: call .float() on it"
            ) from problem
        notices.append(f"the model's weights are {', '.join(odd)}: it is evaluated in float32")
        answer, writes = _trial(model, input_shape)
    if answer is None:  # it can't take such images: whoever checks it says why
        return model, notices
    part = None if isinstance(answer, Tensor) else _logits_of(answer, num_classes)
    if part is not None:
        label = f"'{part}'" if isinstance(part, str) else f"number {part + 1}"
        notices.append(f"the model returns {type(answer).__name__}: its logits are {label} of it")
    if writes:
        notices.append("the model writes into its input: it works on a copy")
    if part is None and not writes:
        return model, notices
    return Adapted(model, part, writes).eval(), notices


def initialise_lazy(model: nn.Module, input_shape: Sequence[int]) -> bool:
    """Give lazy modules their shapes by a forward pass. Returns whether there were any.

    Raises:
        UserError: They have no shape after it either.
    """
    if not _is_lazy(model):
        return False
    with torch.no_grad():
        try:
            model(torch.zeros(2, *input_shape))
        except Exception as problem:
            raise UserError(
                f"the model's lazy modules can't take images of shape {tuple(input_shape)}: "
                f"{' '.join(str(problem).split()):.200}"
            ) from problem
    if _is_lazy(model):
        raise UserError("the model has lazy modules that a forward pass does not reach")
    return True


def _is_lazy(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return any(is_lazy(tensor) for tensor in tensors)


def _unwrapped(model: nn.Module) -> nn.Module | None:
    """The model inside a wrapper that computes the same function; None if it is none."""
    if isinstance(model, WRAPPERS):
        return model.module
    return getattr(model, "_orig_mod", None)


def _trial(model: nn.Module, input_shape: Sequence[int]) -> tuple[Any, bool]:
    """What the model returns for two gray images, and whether it wrote into them.

    None where it can't take them.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    x = torch.full((2, *input_shape), 0.5, device=device)
    before = x._version  # goes up with each write, one that changes no value too
    try:
        with torch.no_grad():
            answer = model(x)
    except Exception:
        return None, False
    return answer, x._version != before


def _parts(answer: Any) -> dict[str | int, Any]:
    """The parts of what a model returns, by key or place."""
    if isinstance(answer, Mapping):
        return dict(answer)
    if isinstance(answer, tuple | list):
        return dict(enumerate(answer))
    return dict(vars(answer)) if hasattr(answer, "__dict__") else {}


def _logits_of(answer: Any, num_classes: int | None) -> str | int | None:
    """Where the logits are in what a model returns for two images; None if nowhere."""
    parts = _parts(answer)
    rows = {
        key: value
        for key, value in parts.items()
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] == 2
    }
    if "logits" in rows:
        return "logits"
    candidates = [key for key, value in rows.items() if value.shape[1] == num_classes] or list(rows)
    if len(candidates) > 1:
        raise UserError(
            f"the model returns several tensors that could be its logits ({len(candidates)} in a "
            f"{type(answer).__name__}): return the logits alone, (N, K)"
        )
    return candidates[0] if candidates else None
