"""Exact: what VMeanba's block adds is removed where a LayerNorm over the channels absorbs it.

``LN(x + c*1) = LN(x)``: behind a replaced scan the broadcast output is constant over the channels of each direction, and in
VMamba and most of its descendants it flows only through permutations and sums into such a LayerNorm.

Before::

    y   = expand(linear_scan(Abar, Bu, C))     # (B, K*D, L), constant over D
    out = y + D*u
    ...                                        # cross merge
    n   = layer_norm(merged, [D])

After::

    out = D*u
    ...
    n   = layer_norm(merged, [D])

The scan, its discretisation, ``x_proj`` and ``dt_proj`` have no reader left and go with it.
"""

from __future__ import annotations

from torch import fx

from vmeanba_fx.analysis.regions import is_annihilated
from vmeanba_fx.graph import Emitter, aten, graph_modules, remove_dead_code, value

from .mean_scan import BROADCAST

NAME = "drop_annihilated"
SKIP = "vmeanba_fx.skip"
"""``node.meta`` key of a product D*u whose scan was dropped; its value is the number of groups K."""


def drop_annihilated(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it; broadcasts that are live stay."""
    for owner in graph_modules(gm):
        for node in list(owner.graph.nodes):
            groups = node.meta.get(BROADCAST)
            if groups is not None and is_annihilated(node, groups)[0]:
                _drop(owner.graph, node)
    remove_dead_code(gm)
    return gm


def _drop(graph: fx.Graph, broadcast: fx.Node) -> None:
    for user in list(broadcast.users):
        other = _other_summand(user, broadcast)
        if other is not None:
            other.meta[SKIP] = broadcast.meta[BROADCAST]
            user.replace_all_uses_with(other)
    if broadcast.users:
        # No sum of equal shape to fold into: a zero of the same shape is as good, and still needs no scan.
        emit = Emitter(graph, broadcast.next, NAME, like=broadcast)
        users = list(broadcast.users)
        zeros = emit(aten.zeros_like.default, broadcast)
        for user in users:
            user.replace_input_with(broadcast, zeros)


def _other_summand(node: fx.Node, summand: fx.Node) -> fx.Node | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    left, right = node.args[0], node.args[1]
    other = right if left is summand else left
    if not isinstance(other, fx.Node) or other is summand:
        return None
    there, here = value(other), value(node)
    return other if there.shape == here.shape and there.dtype == here.dtype else None
