"""Compute nodes of a graph in float64 from values given for other nodes, to find out what a region of a graph *does*.

Passes that claim exactness do not read the names of nodes. They evaluate the region between two places on index tensors and
on random inputs and compare it with the closed form they want to put there; what does not agree to float64 rounding
stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..graph import args_of, aten, callee, value
from .regions import IDENTITY

_EMPTY = {
    aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default, aten.new_empty_strided.default,
}  # fmt: skip
_VIEWS = {aten.view.default, aten._unsafe_view.default}


class Unprovable(Exception):
    """The region cannot be evaluated on its own; the message says why."""


def batch_symbols(graph: fx.Graph) -> frozenset[Any]:
    """The symbols that stand for the batch: those of the first dimension of the inputs."""
    symbols: set[Any] = set()
    for node in graph.find_nodes(op="placeholder"):
        held = value(node)
        if isinstance(held, Tensor) and held.dim() and isinstance(held.shape[0], torch.SymInt):
            symbols |= held.shape[0].node.expr.free_symbols
    return frozenset(symbols)


def resolve(size: Any, symbols: frozenset[Any], batch: int) -> int:
    """A size as a number, with the batch symbols at ``batch``.

    Raises:
        Unprovable: another size is dynamic too.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr.xreplace(dict.fromkeys(symbols, sympy.Integer(batch)))
    if expr.free_symbols:
        raise Unprovable("height or width is dynamic")
    return int(expr)


def shape_of(node: fx.Node, batch: int) -> tuple[int, ...]:
    """Sizes of a node's value at a batch size."""
    symbols = batch_symbols(node.graph)
    return tuple(resolve(s, symbols, batch) for s in value(node).shape)


def evaluate(wanted: Sequence[fx.Node], given: dict[fx.Node, Tensor], batch: int) -> list[Tensor]:
    """Values of ``wanted`` in float64, from ``given`` and the graph's own parameters and constants.

    Casts and copies are the identity, freshly allocated memory is NaN, the batch is ``batch``.

    Raises:
        Unprovable: a wanted node depends on something that is neither given nor a parameter, or cannot be computed.
    """
    graph = wanted[0].graph
    symbols = batch_symbols(graph)
    needed = _ancestors(wanted, given)
    env: dict[fx.Node, Any] = dict(given)
    device = next((t.device for t in given.values()), torch.device("cpu"))
    for node in graph.nodes:
        if node in needed and node not in env:
            try:
                env[node] = _compute(node, env, symbols, batch, device)
            except (RuntimeError, TypeError, IndexError, ValueError) as error:
                raise Unprovable(f"{node.name} could not be run ({str(error).splitlines()[0]})") from error
    return [env[node] for node in wanted]


def _ancestors(wanted: Sequence[fx.Node], given: dict[fx.Node, Tensor]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in needed or node in given:
            continue
        if isinstance(value(node), torch.SymInt):
            needed.add(node)
            continue
        if node.op == "placeholder" or node.op == "call_module":
            raise Unprovable(f"it also depends on {node.name}")
        needed.add(node)
        stack.extend(node.all_input_nodes)
    return needed


def _compute(node: fx.Node, env: dict[fx.Node, Any], symbols: frozenset[Any], batch: int, device: torch.device) -> Any:
    held = value(node)
    if isinstance(held, (torch.SymInt, int)):
        return resolve(held, symbols, batch)
    if node.op == "get_attr":
        return _double(attribute(node), device)
    if node.target in IDENTITY:
        return env[args_of(node)[0]]
    if node.target in _EMPTY:
        shape = [resolve(s, symbols, batch) for s in held.shape]
        return torch.full(shape, float("nan"), dtype=torch.float64, device=device)
    args, kwargs = pytree.tree_map_only(fx.Node, env.__getitem__, (node.args, dict(node.kwargs)))
    target = aten.reshape.default if node.target in _VIEWS else callee(node)
    result = target(*args, **kwargs)
    return pytree.tree_map_only(Tensor, lambda t: _double(t, device), result)


def attribute(node: fx.Node) -> Any:
    """The tensor or module a ``get_attr`` node reads."""
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _double(t: Any, device: torch.device) -> Any:
    if isinstance(t, Tensor):
        t = t.detach().to(device)
        return t.double() if t.is_floating_point() else t
    return t


def depends_on(node: fx.Node, source: fx.Node) -> bool:
    """True where ``source`` is an ancestor of ``node`` (or ``node`` itself)."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is source:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def is_parameter_only(node: fx.Node) -> bool:
    """True where no input of the model reaches ``node``."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "call_module"):
            return False
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return True
