"""The input guards of ``torch.export``: which inputs a captured graph takes, and which of its guards are needless.

A graph made with ``ExportedProgram.module()`` calls ``_guards_fn`` first, which fails where the trace decided something
that would be otherwise for these inputs. :class:`InputGuards` checks the same in its place. Most guards are needed. Some
only record that a tensor had to be copied to be viewed, which is right for every input; those are dropped where the
numbers prove it.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.node import has_side_effect

from ..errors import ExportError, GuardError
from ..graph import GUARDS, graph_modules, value
from .examples import shapes_of

log = logging.getLogger(__name__)
_PREFIX = "Guard failed: "
_MOST = 16  # guards dropped from one graph; more would mean that this is not about copies


class InputGuards(nn.Module):
    """The guards of one graph, called with its inputs: the conditions of torch's, which cannot be pickled nor read.

    ``checks``: a graph of :func:`check_input` calls. ``regions``: whether the graph that it guards has sub-graphs.
    """

    _is_impure = True  # fx keeps a call of it although nothing uses its result

    def __init__(self, checks: fx.GraphModule, regions: bool) -> None:
        super().__init__()
        self.checks = checks
        self.regions = regions

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGuards:
        return InputGuards(copy.deepcopy(self.checks, memo), self.regions)

    def __getstate__(self) -> dict[str, Any]:
        if self.regions:  # fx unpickles a graph by tracing its code, and a region's operator runs its body then
            raise ExportError(
                "a graph with autocast or checkpoint regions cannot be pickled, for they would be lost: use vmeanba_fx.export"
            )
        return self.__dict__

    def forward(self, *inputs: Any) -> None:
        self.checks(*inputs)

    def drop(self, condition: str) -> None:
        """Do not check ``condition`` any more."""
        for node in self.checks.graph.find_nodes(op="call_function", target=check_input):
            if node.args[1] == condition:
                self.checks.graph.erase_node(node)
        self.checks.recompile()


@has_side_effect
def check_input(holds: Any, condition: str, inputs: tuple[Any, ...]) -> None:
    """Raise :class:`GuardError` unless ``holds``, the truth of ``condition`` for ``inputs``."""
    sentence = (
        f"this graph was captured for inputs with {condition}; for others capture or transform again with them, or with "
        "dynamic_size=True, which leaves height and width open"
    )
    if isinstance(holds, fx.Proxy):  # plain fx traces the graph again
        holds.tracer.create_proxy("call_function", check_input, (holds, condition, inputs), {})
    elif not holds:
        if torch.compiler.is_dynamo_compiling():  # which shows users the message of an assertion alone
            torch._assert(False, sentence)
        raise GuardError(f"{sentence}. These are {shapes_of(inputs)}.", condition)


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """``program.module()``, its guards :class:`InputGuards` where fx can record what torch's do."""
    gm = program.module()
    if hasattr(gm, GUARDS):
        try:
            checks = _recorded(getattr(gm, GUARDS), gm.graph.find_nodes(op="placeholder"))
            setattr(gm, GUARDS, InputGuards(checks, regions=len([*graph_modules(gm)]) > 1))
        except Exception as error:  # of fx, such as for `a or b`, which asks a recording for its truth
            log.info("the guards stay torch's own (%s)", error)
    return gm


def _recorded(guards: nn.Module, placeholders: list[fx.Node]) -> fx.GraphModule:
    """Torch builds its guards from text and keeps a function alone; called with proxies it tells its conditions."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    inputs = tuple(fx.Proxy(graph.placeholder(node.name), tracer) for node in placeholders)
    for node, proxy in zip(placeholders, inputs, strict=True):
        if isinstance(value(node), Tensor):  # sizes by number are read below
            check_input(proxy.dim() == value(node).dim(), f"{node.name}.dim() == {value(node).dim()}", inputs)
    guards(*inputs)
    for node in graph.find_nodes(op="call_function", target=torch._assert):
        holds, message = node.args
        node.target, node.args = check_input, (holds, str(message).removeprefix(_PREFIX), tuple(p.node for p in inputs))
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph)


def failed_guard(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The first guard of ``gm`` that these inputs violate, as text; empty where they pass."""
    guards = getattr(gm, GUARDS, None)
    try:
        if guards is not None:
            guards(*pytree.arg_tree_leaves(*args, **kwargs))
    except GuardError as error:
        return error.condition
    except AssertionError as error:  # of torch's own
        return str(error).removeprefix(_PREFIX)
    return ""


def drop_needless_guards(
    program: ExportedProgram, gm: fx.GraphModule, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """Drop the guards of ``gm`` that refuse these inputs, if the graph gives what ``run(*args, **kwargs)`` gives.

    Returns the guard that still refuses them, if any.
    """
    guard = failed_guard(gm, args, kwargs)
    guards = getattr(gm, GUARDS, None)
    if not guard or not isinstance(guards, InputGuards):
        return guard
    if not _agree(run(*args, **kwargs), program.module(check_guards=False)(*args, **kwargs)):
        return guard
    for _ in range(_MOST):
        log.info("dropped a guard that no number depends on: %s", guard)
        guards.drop(guard)
        guard = failed_guard(gm, args, kwargs)
        if not guard:
            break
    return guard


def _agree(expected: Any, found: Any) -> bool:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
        for a, b in pairs
        if isinstance(a, Tensor)
    )


def drop_implied_bounds(gm: fx.GraphModule) -> None:
    """Erase runtime assertions ``size >= number`` of sizes of which another one asserts the exact value.

    Such a size is that of a selection by a mask, say ``42 * batch``. Its bound follows from the batches that
    ``torch.export`` thinks of, from two on, and refuses batch 1.
    """
    checks = [(n, n.args[0]) for n in gm.graph.nodes if n.target is torch.ops.aten._assert_scalar.default]
    checks = [(node, what) for node, what in checks if isinstance(what, fx.Node)]
    pinned = {side for _, what in checks if what.target is operator.eq for side in what.args}
    for node, what in checks:
        if what.target is operator.ge and what.args[0] in pinned and isinstance(what.args[1], int):
            gm.graph.erase_node(node)
