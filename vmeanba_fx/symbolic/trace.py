"""`symbolic_trace`: a model in, a readable module-level graph with its scans as nodes out."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ..capturing.confinement import LOCK  # one process-wide swap of code objects at a time, whoever makes it
from . import source
from .assemble import assemble, twin_of
from .guards import SymbolicTraceError
from .leaves import LeafFunctions, ScanObserver
from .recorder import input_names
from .tracer import ShadowTracer
from .world import same_random_numbers, traced_world

_ADVICE = (
    "vmeanba_fx.capture and vmeanba_fx.transform take such models: they go through torch.export instead. "
    "A part that cannot be traced can also stay one node: leaf_modules=(ItsClass,) or leaf_functions=(its_function,)."
)


def symbolic_trace(
    model: nn.Module,
    *example_inputs: Any,
    leaf_functions: Iterable[object] = (),
    leaf_modules: Iterable[type[nn.Module]] = (),
) -> fx.GraphModule:
    """Trace ``model`` into a readable graph: layers as ``call_module`` nodes, each selective scan a ``call_function``.

    The model's Python runs once, in eval mode on a private copy, with proxies that know their values on the example
    inputs. Sizes stay symbolic, so the graph runs for other batch sizes, heights and widths. Where the Python decided
    something (a branch, a loop count, a dtype) the graph holds a ``check_guard`` node: called with an input for which
    the decision would differ, it raises :class:`GuardError` instead of computing something else than the model would.

    A scan is any function whose parameters say so (the registry of ``vmeanba_fx.register_scan``), however the model
    refers to it; the node's target is that function. An ``autograd.Function`` becomes a node that calls its ``apply``.

    Args:
        model: any module; it is not changed.
        example_inputs: positional inputs of ``forward``; small ones will do. They are not changed.
        leaf_functions: further Python functions, ``autograd.Function`` classes or their ``apply`` to keep as one node.
        leaf_modules: further module classes to keep as one node.

    Returns:
        A ``GraphModule`` with the model's own parameters and buffers (shared, not copied) under the same state-dict
        keys, in eval mode: what ``forward`` makes of ``self.training`` is fixed. ``vmeanba_fx.transform`` accepts it.

    Raises:
        SymbolicTraceError: the model cannot be traced; the message names the module and the operation. Or ``model`` is no
            module, there is no example tensor, or a leaf is of a kind that cannot be one.
    """
    leaf_modules = tuple(leaf_modules)
    _check_arguments(model, example_inputs, leaf_modules)
    with LOCK, torch.no_grad():
        leaves = LeafFunctions(leaf_functions)
        observer = ScanObserver(leaves)
        replica = _replica_of(model)
        tensors = [t for t in pytree.tree_leaves(example_inputs) if isinstance(t, Tensor)]
        devices = sorted({t.device.index for t in tensors if t.is_cuda})
        # An eager forward first: lazily built tensors are there then, and it is what the graph must equal.
        with same_random_numbers(devices), observer.watching():
            expected = replica(*_fresh(example_inputs))
        graph, tracer = _trace(model, replica, example_inputs, leaves, observer, leaf_modules, devices)
        check = assemble(_replica_of(model), copy.deepcopy(graph), tracer.constants)
        with same_random_numbers(devices), leaves.intercepted(observer):
            _compare(check(*_fresh(example_inputs)), expected)
    return assemble(twin_of(model), graph, tracer.constants)


def _check_arguments(model: object, example_inputs: tuple[Any, ...], leaf_modules: tuple[object, ...]) -> None:
    if not isinstance(model, nn.Module):
        raise SymbolicTraceError(f"symbolic_trace takes an nn.Module, not {type(model).__name__}")
    if "_orig_mod" in model._modules:
        raise SymbolicTraceError("the model is compiled; trace what it was compiled from: symbolic_trace(model._orig_mod, ...)")
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs)):
        raise SymbolicTraceError("symbolic_trace needs example inputs: symbolic_trace(model, torch.zeros(2, 3, 64, 64))")
    for leaf in leaf_modules:
        if not (isinstance(leaf, type) and issubclass(leaf, nn.Module)):
            raise SymbolicTraceError(f"leaf_modules takes module classes, not {leaf!r}")
    if any(p.is_meta for p in model.parameters()):
        raise SymbolicTraceError("the model is on the meta device, where it cannot run on the example inputs")
    input_names(model, len(example_inputs))


def _fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the inputs: a model may write into its input."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)


def _replica_of(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise SymbolicTraceError(
            f"the model cannot be copied (copy.deepcopy: {error}); tracing needs a private copy, for it may leave "
            "traced values behind in a module"
        ) from error


def _trace(
    model: nn.Module, replica: nn.Module, inputs: tuple[Any, ...], leaves: LeafFunctions, observer: ScanObserver,
    leaf_modules: tuple[type[nn.Module], ...], devices: list[int],
) -> tuple[fx.Graph, ShadowTracer]:  # fmt: skip
    tracer = ShadowTracer(model, replica, leaves, observer, leaf_modules)
    inputs = _fresh(inputs)
    try:
        with same_random_numbers(devices) as untouched, leaves.intercepted(tracer):
            with traced_world(tracer):
                tracer.trace(replica, concrete_args=inputs)  # type: ignore[arg-type]
            if not untouched():
                raise SymbolicTraceError("the model draws numbers from `random` or `numpy.random`, which are no nodes")
        return tracer.finish(), tracer
    except Exception as error:
        _explain(error, tracer)


def _explain(error: Exception, tracer: ShadowTracer) -> NoReturn:
    """Turn whatever went wrong into one sentence on where, and one on what to do."""
    path, kind = tracer.failed_in or ("", "")
    where = f"{path or 'the model'} ({kind})" if kind else "the model"
    lines = [f for f, _ in traceback.walk_tb(error.__traceback__) if source.is_user_frame(f)]
    numbers = [n for f, n in traceback.walk_tb(error.__traceback__) if source.is_user_frame(f)]
    at = f" at {source.line_of(lines[-1], numbers[-1])}" if lines else ""
    what = str(error) if isinstance(error, SymbolicTraceError) else f"{type(error).__name__}: {error}"
    raise SymbolicTraceError(f"{where} cannot be traced symbolically{at}: {what}. {_ADVICE}") from error


def _compare(actual: Any, expected: Any) -> None:
    """The last check: on the example inputs the graph must give what the model gave."""
    try:
        torch.testing.assert_close(_plain(actual), _plain(expected), equal_nan=True)
    except (AssertionError, TypeError, ValueError) as error:
        raise SymbolicTraceError(
            "the traced graph does not reproduce the model on the example inputs: something that the model decides "
            f"leaves no trace on its tensors ({str(error).splitlines()[0]}). {_ADVICE}"
        ) from error


def _plain(output: Any) -> Any:
    """Dataclasses as dictionaries, which can be compared item by item."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {f.name: _plain(getattr(output, f.name)) for f in dataclasses.fields(output)}
    return output
