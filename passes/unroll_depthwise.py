"""Exact: depthwise convolutions become sums of shifted maps, which a compiler fuses with the steps around them.

For ``torch.compile`` on a GPU: a library's depthwise kernel is a pass over memory of its own, and what it writes is read again
by the activation and the LayerNorm behind it. Inductor makes one pass of all three.

Before::

    y = aten.conv2d(x, w, b, [1, 1], [1, 1], [1, 1], D)         # x (B, D, H, W) with the channels innermost, w (D, 1, 3, 3)
    z = aten.silu(y)

After (taps is w as a (9, D) matrix)::

    p = aten.constant_pad_nd(aten.permute(x, [0, 2, 3, 1]), [0, 0, 1, 1, 1, 1])
    s = sum over i, j of aten.to(aten.slice(aten.slice(p, 1, i, ...), 2, j, ...), float32) * taps[3 * i + j]
    y = aten.permute(aten.to(s + b, half), [0, 3, 1, 2])
    z = aten.silu(y)

Uncompiled, this would be slower by far.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from vmeanba_fx.analysis.evaluate import attribute
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.graph import Emitter, args_of, aten, graph_modules, value

NAME = "unroll_depthwise"
_CONV = {"bias": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
_MOST_TAPS = 25


def unroll_depthwise(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it."""
    for owner in graph_modules(gm):
        for conv in owner.graph.find_nodes(op="call_function", target=aten.conv2d.default):
            options = _CONV | dict(zip(_CONV, conv.args[2:], strict=False))
            if _is_depthwise(conv, options):
                _unroll(owner, conv, options["bias"], options["padding"])
    remove_dead_code(gm)
    return gm


def _is_depthwise(conv: fx.Node, options: dict[str, Any]) -> bool:
    """Stride 1, one filter a channel, weights that are the graph's own, and a map with the channels innermost."""
    x, weight = args_of(conv)[:2]
    plain = options["stride"] == options["dilation"] == [1, 1] and not conv.kwargs
    if not plain or weight.op != "get_attr" or value(x).dim() != 4:
        return False
    filters, each, rows, columns = value(weight).shape
    innermost = value(x).is_contiguous(memory_format=torch.channels_last)
    return filters == options["groups"] > 1 and each == 1 and rows * columns <= _MOST_TAPS and innermost


def _unroll(owner: fx.GraphModule, conv: fx.Node, bias: fx.Node | None, padding: list[int]) -> None:
    emit = Emitter(conv.graph, conv, NAME)
    x, weight = args_of(conv)[:2]
    kernel, dtype = attribute(weight), value(conv).dtype
    _, _, rows, columns = kernel.shape
    matrix = kernel.detach().flatten(1).t().contiguous()
    taps = emit.get_attr(owner, f"{weight.target}_taps", matrix, trained=isinstance(kernel, torch.nn.Parameter))
    down, across = padding if len(padding) == 2 else padding * 2
    padded = emit(aten.permute.default, x, [0, 2, 3, 1])
    padded = emit(aten.constant_pad_nd.default, padded, [0, 0, across, across, down, down])
    wide = torch.promote_types(dtype, torch.float32)  # as the convolutions themselves sum
    total = None
    for tap in range(rows * columns):
        i, j = divmod(tap, columns)
        shifted = emit(aten.slice.Tensor, padded, 1, i, i - rows + 1 or sys.maxsize)
        shifted = emit(aten.slice.Tensor, shifted, 2, j, j - columns + 1 or sys.maxsize)
        term = emit(aten.to.dtype, emit(aten.select.int, taps, 0, tap), wide)
        term = emit(aten.mul.Tensor, emit(aten.to.dtype, shifted, wide), term)
        total = term if total is None else emit(aten.add.Tensor, total, term)
    if bias is not None:
        total = emit(aten.add.Tensor, total, emit(aten.to.dtype, bias, wide))
    conv.replace_all_uses_with(emit(aten.permute.default, emit(aten.to.dtype, total, dtype), [0, 3, 1, 2]))
