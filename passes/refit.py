"""Lossy (compensation): the layer that reads a replaced site out gets new weights; the graph's shape and cost stay.

Before (the site's output was y, now it is y')::

    n   = layer_norm(merged y', [D]) * gate
    out = aten.linear(n, weight)                     # or a 1x1 aten.conv2d / conv1d

After::

    out = aten.linear(n, weight + change, bias)

``change`` and ``bias`` come from :func:`vmeanba_fx.fitting.least_squares.refit_linear`. Norms, gates or depthwise convolutions
may lie between the scan and the layer, as long as the scan reaches the rest of the model through that layer only. Where no
such layer follows, scale and bias of the first LayerNorm that all of the scan flows through are refitted, each channel by
itself. :func:`find_readout` finds the layer, or says why there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from vmeanba_fx.analysis.evaluate import is_parameter_only
from vmeanba_fx.analysis.regions import NOTHING
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import Emitter, args_of, aten, downstream, is_pointwise_conv, refresh, upstream, value

NAME = "refit"
_CONVS = {aten.conv1d.default, aten.conv2d.default}
_SAME = {
    aten.dropout.default, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.to.dtype,
}  # fmt: skip


@dataclass(frozen=True)
class Readout:
    """``layer``: the linear, 1x1 convolution or LayerNorm node. ``stream``: the residual sum that its output goes into
    unchanged, or None."""

    layer: fx.Node
    stream: fx.Node | None

    @property
    def is_norm(self) -> bool:
        return self.layer.target is aten.layer_norm.default

    @property
    def channel_dim(self) -> int:
        return 1 if self.layer.target in _CONVS else -1

    @property
    def weight(self) -> fx.Node:
        return args_of(self.layer)[weight_position(self.layer)]

    @property
    def bias(self) -> fx.Node | None:
        at = weight_position(self.layer) + 1
        return args_of(self.layer)[at] if len(self.layer.args) > at else None


def weight_position(layer: fx.Node) -> int:
    """Which argument of a linear, convolution or LayerNorm node is its weight; the bias is the next."""
    return 2 if layer.target is aten.layer_norm.default else 1


def find_readout(scan: fx.Node) -> Readout | str:
    """The layer that reads ``scan`` out, or a sentence saying why none can be refitted."""
    reached = downstream(scan.graph, {scan})
    norm: fx.Node | None = None
    why = "no linear layer follows it"
    for node in scan.graph.nodes:
        if node not in reached or node is scan:
            continue
        if norm is None and _is_affine_norm(node) and _all_flows_through(scan, node):
            norm = node
        if not is_pointwise_linear(node):
            continue
        if not _all_flows_through(scan, node):
            why = f"{node.name} reads it, but not all of it goes through that layer"
        elif not is_parameter_only(node.args[1]):
            why = f"the weight of {node.name} depends on the input"
        else:
            return Readout(node, find_stream(node))
        break
    return Readout(norm, find_stream(norm)) if norm is not None else why


def is_pointwise_linear(node: fx.Node) -> bool:
    """A linear layer, or a convolution with kernel 1, stride 1 and one group, called with positional arguments."""
    if node.target is aten.linear.default:
        return not node.kwargs
    return node.target in _CONVS and not node.kwargs and is_pointwise_conv(node)


def _is_affine_norm(node: fx.Node) -> bool:
    if node.target is not aten.layer_norm.default or node.kwargs or len(node.args) < 3 or len(args_of(node)[1]) != 1:
        return False
    return isinstance(node.args[2], fx.Node) and is_parameter_only(node.args[2])


def _all_flows_through(start: fx.Node, gate: fx.Node) -> bool:
    """True where every path from ``start`` to anything that counts passes through ``gate``."""
    above = upstream(gate)
    stack, seen = [start], {gate}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in above:
            if node.target in NOTHING and not node.users:
                continue
            return False
        stack.extend(node.users)
    return True


def find_stream(layer: fx.Node) -> fx.Node | None:
    """The sum ``x + layer`` of equal shapes right behind ``layer`` (copies and inert dropout aside), or None."""
    node = layer
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is aten.add.Tensor and not user.kwargs:
            others = [a for a in user.args if a is not node]
            same = len(others) == 1 and isinstance(others[0], fx.Node) and value(others[0]).shape == value(layer).shape
            return user if same else None
        if user.target not in _SAME or (user.target is aten.dropout.default and user.args[2]):
            return None
        node = user
    return None


def refit(gm: fx.GraphModule, layer: fx.Node, weight: Tensor, bias: Tensor) -> fx.GraphModule:
    """Give ``layer`` of ``gm`` (in place) new weights, in the shape and dtype of its own, and return ``gm``."""
    emit = Emitter(gm.graph, layer, NAME)
    at = weight_position(layer)
    held = value(layer.args[at])
    new = [emit.get_attr(gm, f"{layer.name}_refit_{name}", t.detach().to(held.device, held.dtype), trained=True) for name, t in
           (("weight", weight.reshape(held.shape)), ("bias", bias))]  # fmt: skip
    args = [*layer.args, *[None] * (at + 2 - len(layer.args))]
    args[at : at + 2] = new
    layer.args = tuple(args)
    refresh(layer)
    remove_dead_code(gm)
    return gm
