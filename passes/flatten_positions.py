"""Exact: steps that treat all positions of a (B, H, W, C) map alike work on (B, H*W, C).

Compilers lay out 4-D values around convolutions as channels-last, and judge which axis that is by its place. A map that has
its channels last already then comes out with rows innermost, and every LayerNorm of the residual stream reads it with
strides and in two kernels. With three axes there is nothing to lay out; only convolutions and scans see H and W.

Before::

    n = aten.layer_norm(x, [C], ...)                  # (B, H, W, C)
    y = x + aten.linear(n, w)
    c = aten.conv2d(aten.permute(y, [0, 3, 1, 2]), k)

After (x is the unflattened form of x')::

    n = aten.layer_norm(x', [C], ...)                 # (B, H*W, C)
    y = x' + aten.linear(n, w)
    c = aten.conv2d(aten.permute(aten.unflatten(y, 1, [H, W]), [0, 3, 1, 2]), k)
"""

from __future__ import annotations

from typing import Any

from torch import SymInt, Tensor, fx

from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import Emitter, args_of, aten, callee, value

from .channels_last import BINARY, UNARY

NAME = "flatten_positions"


def flatten_positions(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it. Maps of dynamic height or width stay as they are."""
    flat: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and _is_map(node) and (operands := _operands(node, flat)) is not None:
            emit = Emitter(node.graph, node, NAME, like=node)
            inside = [_flatten(a, flat) if _is_map(a) else a for a in operands]
            new = emit(callee(node), *inside, *node.args[len(operands) :], **node.kwargs)
            out = emit(aten.unflatten.int, new, 1, list(value(node).shape[1:3]))
            flat[out] = new
            node.replace_all_uses_with(out)
    remove_dead_code(gm)
    return gm


def _operands(node: fx.Node, flat: dict[fx.Node, fx.Node]) -> list[Any] | None:
    """The maps that ``node`` reads, where it treats their positions alike; None where it does not, or nothing is gained."""
    if node.target is aten.linear.default or (node.target is aten.layer_norm.default and len(args_of(node)[1]) == 1):
        return [node.args[0]]
    if node.target in UNARY and node.args[0] in flat:
        return [node.args[0]]
    if node.target in BINARY and any(a in flat for a in node.args[:2] if isinstance(a, fx.Node)):
        pair = list(node.args[:2])
        alike = all((_is_map(a) and value(a).shape == value(node).shape) or _is_per_channel(a) for a in pair)
        return pair if alike else None
    return None


def _is_map(a: object) -> bool:
    held = value(a)
    if not isinstance(a, fx.Node) or not isinstance(held, Tensor) or held.dim() != 4:
        return False
    return not any(isinstance(s, SymInt) for s in held.shape[1:3])


def _is_per_channel(a: object) -> bool:
    held = value(a)
    return not isinstance(held, Tensor) or held.dim() <= 1


def _flatten(node: fx.Node, flat: dict[fx.Node, fx.Node]) -> fx.Node:
    if node not in flat:
        flat[node] = Emitter(node.graph, node.next, NAME, like=node)(aten.flatten.using_ints, node, 1, 2)
    return flat[node]
