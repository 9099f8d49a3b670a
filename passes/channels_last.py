"""Exact: 1x1 convolutions become linear layers on channels-last maps, and permutations between such steps cancel.

Networks with channel-first LayerNorms permute each map twice per norm, copy it for the norm, and convert it again inside every
convolution. Moved through the pointwise steps, the permutations meet and go.

Before::

    a = aten.permute(x, [0, 2, 3, 1])
    b = aten.layer_norm(a, ...)
    c = aten.permute(b, [0, 3, 1, 2])
    d = aten.conv2d(c, fc1)                    # 1x1
    e = aten.gelu(d)
    f = aten.conv2d(e, fc2)                    # 1x1
    y = x + f

After (x is the permuted form of x')::

    b = aten.layer_norm(x', ...)
    d = aten.linear(b, fc1)
    e = aten.gelu(d)
    f = aten.linear(e, fc2)
    y = aten.permute(x' + f, [0, 3, 1, 2])
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vmeanba_fx.analysis.evaluate import attribute
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import Emitter, args_of, aten, callee, is_pointwise_conv, value

from .cleanup import cleanup

NAME = "channels_last"
_FIRST, _LAST = [0, 3, 1, 2], [0, 2, 3, 1]
UNARY = {
    aten.gelu.default, aten.silu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.neg.default,
    aten.dropout.default, aten.to.dtype, aten.contiguous.default, aten.clone.default,
}  # fmt: skip
BINARY = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}


def channels_last(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it. Sub-graphs are left alone: their inputs' layouts are not theirs to choose."""
    for node in list(gm.graph.nodes):
        if node.target is aten.conv2d.default and value(node.args[0]).dim() == 4 and is_pointwise_conv(node):
            _to_linear(node)
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            _sink(node)
    # A view of what was contiguous meets a permuted map now; a reshape is the same view where there still is one.
    for node in gm.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    remove_dead_code(gm)
    _lay_out_weights(gm)
    return cleanup(gm)


def _to_linear(conv: fx.Node) -> None:
    emit = Emitter(conv.graph, conv, NAME)
    x, weight, bias = (*args_of(conv), None)[:3]
    matrix = weight
    while matrix.target is aten.unsqueeze.default and value(matrix.args[0]).dim() >= 2:
        matrix = args_of(matrix)[0]
    if value(matrix).dim() != 2:
        matrix = emit(aten.flatten.using_ints, weight, 1, 3)
    out = emit(aten.linear.default, emit(aten.permute.default, x, _LAST), matrix, bias)
    conv.replace_all_uses_with(emit(aten.permute.default, out, _FIRST))


def _sink(node: fx.Node) -> None:
    """``f(permute(x))`` becomes ``permute(f(x))``, so that permutations move towards the outputs and meet."""
    if node.target in UNARY and _is_first(node.args[0]):
        x, *rest = args_of(node)
        inside = [args_of(x)[0], *rest]
    elif node.target in BINARY and (operands := _operands(node)) is not None:
        inside = operands
    else:
        return
    emit = Emitter(node.graph, node, NAME, like=node)
    node.replace_all_uses_with(emit(aten.permute.default, emit(callee(node), *inside, **node.kwargs), _FIRST))


def _lay_out_weights(gm: fx.GraphModule) -> None:
    """A convolution of a channels-last map converts a weight that is not channels-last at every call: do it here, once.

    Where its result is read with the channels last, as behind images, such a weight makes it be written so.
    """
    for conv in gm.graph.find_nodes(op="call_function", target=aten.conv2d.default):
        last = _is_first(conv.args[0]) or all(_is_permute(user, _LAST) for user in conv.users)
        reader = args_of(conv)[1]
        if last and reader.op == "get_attr":
            weight = attribute(reader)
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            reader.meta["val"] = value(reader).contiguous(memory_format=torch.channels_last)


def _is_first(node: object) -> bool:
    return _is_permute(node, _FIRST)


def _is_permute(node: object, order: list[int]) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.permute.default and list(args_of(node)[1]) == order


def _operands(node: fx.Node) -> list[object] | None:
    """Both operands with the channels last, or None where one of them cannot be read so without moving data."""
    emit = Emitter(node.graph, node, NAME, like=node)
    pair = node.args[:2]
    if not any(_is_first(a) for a in pair):
        return None
    plans = []
    for a in pair:
        if _is_first(a):
            plans.append(lambda a=a: a.args[0])
        elif not isinstance(a, fx.Node) or not isinstance(value(a), Tensor) or value(a).numel() == 1:
            plans.append(lambda a=a: a)
        elif value(a).dim() == 3 and tuple(value(a).shape[1:]) == (1, 1):  # one value per channel
            plans.append(lambda a=a: emit(aten.flatten.using_ints, a, 0, 2))
        elif value(a).dim() == 4 and value(a).shape[1] == 1:  # one channel: its permuted form is a view
            plans.append(lambda a=a: emit(aten.permute.default, a, _LAST))
        else:
            return None
    return [*(plan() for plan in plans), *node.args[2:]]
