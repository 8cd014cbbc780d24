"""Module surgery: replace, count, and find what replacing would miss.

Surgery is a pure function of a model that says what it replaced and raises when that is nothing
(after mosaicml/composer, ``utils/module_surgery.py``, where no effect is a warning). It works on
modules, so it is right only if each call of an activation is a module of its own. torchvision's
ResNet-18 has 9 ReLU modules for 17 calls, its DenseNet calls ``F.relu``. ``check_sites`` finds
both, ``split_sites`` mends both.

A ``kind`` is a module class or a tuple of classes; subclasses match.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from advbench.errors import UserError

M = TypeVar("M", bound=nn.Module)
Kind = type[nn.Module] | tuple[type[nn.Module], ...]

FUNCTIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
}
"""Name of a function or tensor method -> the module that does the same.

What is written as arithmetic (``x.clamp(min=0)``, ``x * x.sigmoid()``) can't be told from other
arithmetic and is not seen.
"""


def replace_modules(
    model: nn.Module, kind: Kind, make: Callable[[nn.Module, str], nn.Module]
) -> list[str]:
    """Puts ``make(old, name)`` in the place of each module of ``kind`` inside the model.

    The new module is put in the old one's training mode; ``make`` puts it on its device. The model
    itself and modules inside a replaced one are left alone, so ``make`` may wrap the old.

    Args:
        model: changed in place.
        kind: a module class, or several.
        make: from the old module and its dotted name to the new module.

    Returns:
        The dotted names, in the order of registration.

    Raises:
        UserError: when nothing matches, and when one module is registered under several names: what
            ``make`` returns for one name would then be wrong for the other (see ``split_sites``).
    """
    replaced: dict[str, nn.Module] = {}
    names: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not isinstance(module, kind) or _inside(name, replaced):
            continue
        if id(module) in names:
            raise UserError(
                f"'{names[id(module)]}' and '{name}' are one {type(module).__name__} module; "
                "give each call its own (advbench.surgery.split_sites)"
            )
        replaced[name] = module
        names[id(module)] = name
    if not replaced:
        raise UserError(f"{type(model).__name__} has no {_describe(kind)} module to replace")
    for name, old in replaced.items():
        model.set_submodule(name, make(old, name).train(old.training))
    return list(replaced)


def twin(model: M) -> M:
    """The same model again, of modules of its own and the very same parameters and buffers.

    What is set on its modules leaves ``model`` alone; what is trained, both see.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(tensors))


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module is in training or evaluation mode as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each buffer has the values that it had before."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def probe_images(input_shape: Sequence[int], n: int = 2) -> Tensor:
    """The same random images in [0, 1] each time, (n, C, H, W): to see what a model calls."""
    return torch.rand(n, *input_shape, generator=torch.Generator().manual_seed(0))


def count_calls(model: nn.Module, kind: Kind, x: Tensor) -> dict[str, int]:
    """How often one forward pass calls each module of ``kind``, by name; 0 where it does not.

    Args:
        model: any module.
        kind: a module class, or several.
        x: a batch that the model takes. The pass is made in eval mode, without gradients.
    """
    return dict(_probe(model, kind, x).calls)


def input_shapes(model: nn.Module, kind: Kind, x: Tensor) -> dict[str, torch.Size]:
    """What one forward pass gives each module of ``kind``, by name, where it calls it.

    Of several calls the last counts. x and the pass as for ``count_calls``.
    """
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            shapes[name] = inputs[0].shape

        return hook

    with ExitStack() as stack, _evaluating(model):
        for name, module in model.named_modules():
            if name and isinstance(module, kind):
                stack.callback(module.register_forward_pre_hook(note(name)).remove)
        model(x)
    return shapes


def check_sites(model: nn.Module, kind: Kind, x: Tensor) -> None:
    """Check that surgery on ``kind`` would miss nothing.

    Args:
        model: any module.
        kind: a module class, or several.
        x: a batch that the model takes; only what this one pass runs is seen.

    Raises:
        UserError: for a module that serves several calls (they would share one replacement), and
            for an activation that is called as a function (``FUNCTIONS``; it would stay).
    """
    probe = _probe(model, kind, x)
    missed = [f"'{name}' serves {n} calls" for name, n in probe.calls.items() if n > 1]
    missed += [f"'{name}' calls {function}" for name, function in probe.functional.items()]
    if missed:
        raise UserError(
            f"surgery would miss activations of {type(model).__name__}: {', '.join(missed)}; "
            "make each call an nn.Module of its own"
        )


def split_sites(model: nn.Module, kind: Kind, x: Tensor) -> nn.Module:
    """Gives each call of an activation a module of its own; the function computed stays the same.

    A module under several names is copied. A module whose forward calls one activation several
    times, or calls it as a function, has that forward traced by torch.fx, with all its children as
    black boxes, and each call becomes a new module. The rest of the model is untouched, and the
    names of parameters and buffers stay.

    Args:
        model: any module; changed in place where that is possible.
        kind: a module class, or several.
        x: a batch that the model takes, for the passes that find the calls and compare the outputs.

    Returns:
        The model: the same object, unless its own forward had to be traced.

    Raises:
        UserError: where that is impossible: a forward that torch.fx can't trace or that differs
            between training and evaluation, or a block that is called several times as a whole.
    """
    _copy_aliases(model, kind)
    probe = _probe(model, kind, x)
    callers = {c for name, n in probe.calls.items() if n > 1 for c in probe.callers[name]}
    callers |= set(probe.functional)
    if not callers:
        return model
    keys = model.state_dict().keys()
    for name in sorted(callers):
        traced = _split_forward(model.get_submodule(name), kind, name or type(model).__name__)
        if name:
            model.set_submodule(name, traced)
        else:
            model = traced
    check_sites(model, kind, x)
    with _evaluating(model):
        same = torch.allclose(model(x), probe.output, rtol=1e-4, atol=1e-5)
    if not same or model.state_dict().keys() != keys:
        raise UserError(
            "giving each activation a module of its own changes what the model computes or stores "
            f"(in {', '.join(sorted(callers))})"
        )
    return model


class _Probe(TorchFunctionMode):
    """Counts calls of modules, and notes functions that stand for a module of ``kind``.

    calls: name of a module of ``kind`` -> calls.  callers: the same -> names of the modules whose
    forward calls it.  functional: name of the calling module -> name of the function.
    """

    output: Tensor

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.calls: Counter[str] = Counter()
        self.callers: dict[str, set[str]] = {}
        self.functional: dict[str, str] = {}
        self.running: list[tuple[str, nn.Module]] = [("", model)]

    def watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Registers the hooks on one module and yields their handles."""

        def enter(*_: Any) -> None:
            if name in self.calls:
                self.calls[name] += 1
                self.callers.setdefault(name, set()).add(self.running[-1][0])
            self.running.append((name, module))

        def leave(*_: Any) -> None:
            self.running.pop()

        if name and isinstance(module, self.kind):
            self.calls[name] = 0
        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = getattr(func, "__name__", "")
        stands_for = FUNCTIONS.get(function)
        if stands_for and issubclass(stands_for, self.kind):
            name, module = self.running[-1]
            if not isinstance(module, self.kind):
                self.functional[name] = function
        return func(*args, **(kwargs or {}))


def _probe(model: nn.Module, kind: Kind, x: Tensor) -> _Probe:
    """One pass in eval mode under a ``_Probe``; its output is kept."""
    probe = _Probe(model, kind)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            for handle in probe.watch(name, module):
                stack.callback(handle.remove)
        stack.enter_context(_evaluating(model))
        stack.enter_context(probe)
        probe.output = model(x)
    return probe


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module has its own mode back."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


def _copy_aliases(model: nn.Module, kind: Kind) -> None:
    """A copy for each further name of a module without state; tied weights stay tied."""
    seen: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(module, kind) and _stateless(module):
            if id(module) in seen:
                module = copy.deepcopy(module)
                model.set_submodule(name, module)
            seen.add(id(module))


class _ShallowTracer(fx.Tracer):
    """Traces the forward of one module and none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _split_forward(module: nn.Module, kind: Kind, name: str) -> fx.GraphModule:
    """The module with one child per call of an activation in its own forward."""
    mode = module.training
    try:
        training, graph = (_trace(module, training=training) for training in (True, False))
    # torch.fx runs the module's code on stand-ins for tensors: any exception may come out.
    except Exception as error:
        raise UserError(
            f"the forward of '{name}' can't be split into one module per activation: {error}"
        ) from error
    finally:
        module.training = mode
    if training.python_code("self").src != graph.python_code("self").src:
        raise UserError(
            f"the forward of '{name}' differs between training and evaluation and so can't be "
            "split into one module per activation"
        )
    called: set[str] = set()
    for node in list(graph.nodes):
        if node.op == "call_module":
            child = module.get_submodule(node.target)
            if node.target in called and isinstance(child, kind) and _stateless(child):
                node.target = _add_child(module, node.target, copy.deepcopy(child))
            called.add(node.target)
        elif node.op in ("call_function", "call_method"):
            function = getattr(node.target, "__name__", node.target)
            stands_for = FUNCTIONS.get(function)
            if stands_for and issubclass(stands_for, kind):
                z = node.args[0] if node.args else node.kwargs["input"]
                child = _add_child(module, function.strip("_"), stands_for())
                with graph.inserting_before(node):
                    node.replace_all_uses_with(graph.call_module(child, (z,)))
                graph.erase_node(node)
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def _trace(module: nn.Module, *, training: bool) -> fx.Graph:
    """The forward as a function of its required arguments; the others keep their defaults."""
    module.training = training
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    return _ShallowTracer().trace(module, concrete_args=defaults)


def _add_child(module: nn.Module, name: str, child: nn.Module) -> str:
    """Registers the child under ``name``, or ``name_2`` and so on where that is taken."""
    name = name.replace(".", "_")
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    free = next(new for new in itertools.chain([name], numbered) if not hasattr(module, new))
    module.add_module(free, child)
    return free


def _stateless(module: nn.Module) -> bool:
    return not module.state_dict()


def _inside(name: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{outer}.") for outer in names)


def _describe(kind: Kind) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)
