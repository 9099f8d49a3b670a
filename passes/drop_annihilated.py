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

from vmeanba_fx.analysis.evaluate import is_parameter_only
from vmeanba_fx.analysis.regions import is_annihilated, is_linear_in
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import SITE, Emitter, aten, graph_modules, value

from .mean_scan import BROADCAST

NAME = "drop_annihilated"
SKIP = "vmeanba_fx.skip"
"""``node.meta`` key of a product D*u whose scan was dropped; its value is the number of groups K."""


def drop_annihilated(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it; broadcasts that are live stay."""
    dropped = [
        (owner.graph, node)
        for owner in graph_modules(gm)
        for node in owner.graph.nodes
        if (groups := node.meta.get(BROADCAST)) is not None and is_annihilated(node, groups)[0]
    ]
    for _, node in dropped:
        _leave_out(node)
    remove_dead_code(gm)
    for graph, node in dropped:
        if node.users:
            _put_zeros(graph, node)
    remove_dead_code(gm)
    return gm


def _leave_out(zero: fx.Node) -> None:
    """Take ``zero``, whose value may as well be zero, out of the sums it flows into."""
    for user in list(zero.users):
        other = _other_summand(user, zero)
        if other is not None:
            if BROADCAST in zero.meta:
                other.meta |= {SKIP: zero.meta[BROADCAST], SITE: zero.meta[SITE]}
            user.replace_all_uses_with(other)
        elif is_linear_in(user, zero):
            _leave_out(user)


def _put_zeros(graph: fx.Graph, broadcast: fx.Node) -> None:
    """What has no sum to be left out of reads zeros, in the shape of the scan's input and not of its output.

    A weight may have that shape by chance, but not at another batch size.
    """
    shape = value(broadcast).shape
    before = {broadcast}
    for node in reversed(list(graph.nodes)):
        if node in before:
            before.update(node.all_input_nodes)
    varying = (n for n in graph.nodes if n in before and not is_parameter_only(n))
    source = next(n for n in varying if getattr(value(n), "shape", None) == shape)
    if source is not broadcast:
        users = list(broadcast.users)
        zeros = Emitter(graph, broadcast.next, NAME, like=broadcast)(
            aten.zeros_like.default, source, dtype=value(broadcast).dtype
        )
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
