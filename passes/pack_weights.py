"""Exact: for inference on this CPU, weights are laid out once as oneDNN wants them; activations and sums go into the products.

PyTorch's own linear layers and convolutions bring their weights into the order of the matrix units at every call; with one
image that is up to two thirds of their time.

Before::

    y = aten.linear(x, w1, b1)
    z = aten.gelu(y)
    u = aten.add(r, aten.linear(z, w2, b2))
    v = aten.silu(aten.conv2d(c, w3, b3, ...))

After (w1, w2, w3 are in a format that only oneDNN reads, so that the graph cannot be trained, copied, exported or moved)::

    z = mkldnn._linear_pointwise(x, w1, b1, "gelu", [], "none")
    u = mkldnn._linear_pointwise.binary(z, r, w2, b2, "add")
    v = mkldnn._convolution_pointwise(c, w3, b3, ..., "swish", [], "")

What depends on weights alone is worked out, and all weights become buffers of the graph itself, which reads them faster there.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx

from vmeanba_fx.analysis.evaluate import Unprovable, attribute, evaluate, is_parameter_only, shape_of
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.errors import GraphCheckError
from vmeanba_fx.graph import Emitter, args_of, aten, graph_modules, value, with_flat_weights

NAME = "pack_weights"
mkldnn = torch.ops.mkldnn
_LAYERS = {aten.linear.default, aten.conv2d.default}
# Multiply-adds from which on a packed layer is faster than PyTorch's own: it costs a few microseconds more per call.
_LEAST_WORK = 1 << 18
_ACTIVATIONS = {aten.silu.default: "swish", aten.relu.default: "relu"}
_CONV = {"bias": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


def pack_weights(gm: fx.GraphModule, batch: int = 1) -> fx.GraphModule:
    """A graph module of the rewritten graph of ``gm``, laid out for inputs of ``batch`` items; it runs for any number.

    Raises:
        GraphCheckError: this PyTorch has no oneDNN, or the graph holds autocast or checkpoint regions of its own.
    """
    if not torch.backends.mkldnn.is_available():
        raise GraphCheckError("this build of PyTorch has no oneDNN, which packed weights are for")
    if len(list(graph_modules(gm))) > 1:
        raise GraphCheckError("the graph holds autocast or checkpoint regions of its own: capture the model outside of them")
    _fold_constants(gm)
    for node in list(gm.graph.nodes):
        if node.target in _LAYERS and _is_packable(node):
            with contextlib.suppress(Unprovable):  # where height and width are open: oneDNN lays out for one size
                (_pack_linear if node.target is aten.linear.default else _pack_conv)(gm, node, batch)
    for scan in gm.graph.find_nodes(op="call_function", target=torch.ops.vmeanba_fx.ss2d.default):
        table = args_of(scan)[2]
        if table.op == "get_attr":  # the kernel reads this table in float32
            scan.update_arg(2, _buffer(gm, scan, table, attribute(table).detach().float()))
    remove_dead_code(gm)
    return with_flat_weights(gm)


def _fold_constants(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        frontier = node.op == "call_function" and isinstance(value(node), Tensor) and is_parameter_only(node)
        if frontier and not all(is_parameter_only(user) for user in node.users):
            [tensor] = evaluate([node], {}, 1)
            node.replace_all_uses_with(_buffer(gm, node, node, tensor.to(value(node).dtype)))


def _is_packable(layer: fx.Node) -> bool:
    x = value(layer.args[0])
    supported = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
    fixed = all(a is None or a.op == "get_attr" for a in args_of(layer)[1:3])
    return supported and fixed and x.device.type == "cpu" and all(value(a).dtype == x.dtype for a in layer.all_input_nodes)


def _pack_linear(gm: fx.GraphModule, layer: fx.Node, batch: int) -> None:
    x, weight, bias = (*args_of(layer), None)[:3]
    rows, matrix = torch.Size(shape_of(x, batch)[:-1]).numel(), attribute(weight).detach()
    if rows * matrix.numel() < _LEAST_WORK:
        return
    packed = _buffer(gm, layer, weight, mkldnn._reorder_linear_weight(matrix.contiguous(), rows))
    reader = _only_reader(layer)
    if reader is not None and reader.target is aten.add.Tensor and (other := _summand(reader, layer)) is not None:
        _replace(reader, mkldnn._linear_pointwise.binary, x, other, packed, bias, "add")
        return
    last, *activation = _activation(layer, reader)
    _replace(last, mkldnn._linear_pointwise.default, x, packed, bias, *activation)


def _pack_conv(gm: fx.GraphModule, layer: fx.Node, batch: int) -> None:
    x, weight, *options = args_of(layer)
    size = list(shape_of(x, batch))
    bias, stride, padding, dilation, groups = (_CONV | dict(zip(_CONV, options, strict=False))).values()
    if not value(x).is_contiguous(memory_format=torch.channels_last):
        x = Emitter(gm.graph, layer, NAME)(aten.contiguous.default, x, memory_format=torch.channels_last)
    where = padding, stride, dilation, groups
    kernel = attribute(weight).detach().contiguous(memory_format=torch.channels_last)
    reordered = mkldnn._reorder_convolution_weight(kernel, *where, size)
    packed = _buffer(gm, layer, weight, reordered)
    last, *activation = _activation(layer, _only_reader(layer))
    new = _replace(last, mkldnn._convolution_pointwise.default, x, packed, bias, *where, *activation)
    new.meta["val"] = value(last).contiguous(memory_format=torch.channels_last)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(layer: fx.Node, reader: fx.Node | None) -> tuple[fx.Node, str, list, str]:
    """The node that the packed layer stands for, and what oneDNN calls the activation in it."""
    if reader is not None and reader.target is aten.gelu.default:
        return reader, "gelu", [], str(reader.kwargs.get("approximate", "none"))
    if reader is not None and reader.target in _ACTIVATIONS:
        return reader, _ACTIVATIONS[reader.target], [], ""
    return layer, "none", [], ""


def _summand(add: fx.Node, layer: fx.Node) -> fx.Node | None:
    """What ``add`` adds to ``layer``, where it is a contiguous tensor of the same shape and dtype."""
    first, second = args_of(add)
    other = second if first is layer else first
    held, mine = value(other), value(layer)
    same = isinstance(held, Tensor) and other is not layer and held.shape == mine.shape and held.dtype == mine.dtype
    return other if same and not add.kwargs and held.is_contiguous() else None


def _replace(old: fx.Node, target: Any, *args: Any) -> fx.Node:
    with old.graph.inserting_before(old):
        new = old.graph.call_function(target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    return new


def _buffer(gm: fx.GraphModule, before: fx.Node, like: fx.Node, tensor: Tensor) -> fx.Node:
    """A node that reads ``tensor``; as far as fake values go, an oneDNN tensor is the plain one that it was made from."""
    name = str(like.target if like.op == "get_attr" else like.name)
    node = Emitter(gm.graph, before, NAME).get_attr(gm, name, torch.empty(0))
    gm.register_buffer(str(node.target), tensor)
    node.meta["val"] = value(like)
    return node
