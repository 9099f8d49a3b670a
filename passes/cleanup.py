"""Exact: steps that change nothing go: inert dropout, casts to the same dtype, repeated copies, full slices, permutations.

Before::

    a = aten.permute(x, [0, 2, 3, 1])
    b = aten.layer_norm(a, ...)
    c = aten.permute(b, [0, 3, 1, 2])
    d = aten.permute(c, [0, 2, 3, 1])          # undoes c
    e = aten.dropout(d, 0.1, False)
    f = aten.to(e, float32)                    # is float32

After::

    a = aten.permute(x, [0, 2, 3, 1])
    f = aten.layer_norm(a, ...)
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import Emitter, args_of, aten, graph_modules, value

NAME = "cleanup"
_COPIES = {aten.contiguous.default, aten.clone.default}


def cleanup(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    for owner in graph_modules(gm):
        for node in list(owner.graph.nodes):
            if node.op == "call_function" and (same := _same_value(node)) is not None:
                node.replace_all_uses_with(same)
    remove_dead_code(gm)
    return gm


def _same_value(node: fx.Node) -> Any:
    """A node that holds what ``node`` computes, or None."""
    if node.target is aten.dropout.default and not node.args[2]:
        return node.args[0]
    if node.target is aten.slice.Tensor and not node.kwargs and _takes_all(*node.args[2:]):
        return node.args[0]
    if node.target is aten.to.dtype and len(node.args) == 2 and value(node.args[0]).dtype == node.args[1]:
        return node.args[0]
    if node.target in _COPIES and not node.kwargs and len(node.args) == 1:
        [inner] = args_of(node)
        # Only right behind another copy nobody else reads: a lone copy fixes a layout or detaches an alias.
        return inner if inner.target in _COPIES and not inner.kwargs and len(inner.users) == 1 else None
    if node.target is aten.permute.default:
        return _without_inverse(node)
    return None


def _takes_all(start: Any = None, end: Any = None, step: Any = 1) -> bool:
    """Whether a slice is ``x[:]``, which traces hold for each ``:`` of an index."""
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


def _without_inverse(node: fx.Node) -> Any:
    inner, order = args_of(node)[0], _positive(node)
    if inner.target is aten.permute.default:
        inner_order = _positive(inner)
        combined = [inner_order[i] for i in order]
        if combined == sorted(combined):
            return inner.args[0]
        return Emitter(node.graph, node, NAME)(aten.permute.default, inner.args[0], combined)
    return inner if order == sorted(order) and isinstance(value(inner), torch.Tensor) else None


def _positive(permute: fx.Node) -> list[int]:
    order = args_of(permute)[1]
    return [i % len(order) for i in order]
