"""Lossy as autocast is: what ``torch.autocast`` would cast at run time is cast in the graph, weights once and for all.

Before (float32 graph, run under ``torch.autocast("cuda", torch.float16)``)::

    n = aten.layer_norm(x, [D], g, b)              # x float32
    y = aten.linear(n, w, c)                       # autocast: n, w, c to half on every call
    s = aten.silu(y)                               # half
    m = aten.layer_norm(s, [D], g2, b2)            # autocast: s to float32
    z = aten.linear(m, w2, None)

After (no autocast around it)::

    n = aten.layer_norm(x, [D], g, b)
    y = aten.linear(aten.to(n, half), w_half, c_half)
    s = aten.silu(y)
    m = aten.layer_norm(s, [D], g2_half, b2_half)  # statistics in float32 inside; no float32 map is written
    z = aten.linear(m, w2_half, None)

The rules are autocast's: matrix products and convolutions in half, norms, exponentials and sums in float32, the rest as its
inputs come. One thing is better: a LayerNorm of a half map whose readers all want half reads and writes half.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vmeanba_fx.analysis.evaluate import evaluate, is_parameter_only
from vmeanba_fx.dead_code import remove_dead_code
from vmeanba_fx.errors import GraphCheckError, PassError
from vmeanba_fx.graph import Emitter, args_of, aten, callee, graph_modules, refresh, value

from .cleanup import cleanup

NAME = "bake_autocast"
_CASTABLE = {torch.float32, torch.float16, torch.bfloat16}
_MOVES = {aten.permute.default, aten.transpose.int, aten.flatten.using_ints, aten.unflatten.int}
# Autocast's lists (ATen/autocast_mode.h), as far as captured graphs hold their operators.
HALF = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default, aten.linear.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.conv1d.padding,
    aten.conv2d.padding, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default,
    aten.einsum.default, aten.prelu.default, aten.scaled_dot_product_attention.default,
}  # fmt: skip
FLOAT32 = {
    aten.layer_norm.default, aten.native_layer_norm.default, aten.group_norm.default, aten.rms_norm.default,
    aten.exp.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.reciprocal.default,
    aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.softplus.default, aten.softmax.int,
    aten.log_softmax.int, aten.logsumexp.default, aten.cumsum.default, aten.prod.default, aten.sum.default,
    aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.upsample_bilinear2d.default, aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.default, aten.upsample_nearest2d.vec, aten.upsample_bicubic2d.default,
}  # fmt: skip


def bake_autocast(gm: fx.GraphModule, dtype: torch.dtype = torch.float16) -> fx.GraphModule:
    """Rewrite ``gm`` in place and return it.

    Raises:
        PassError: ``dtype`` is not a 16-bit float.
        GraphCheckError: the graph holds regions with an autocast of their own.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise PassError(f"dtype={dtype}: autocast runs in torch.float16 or torch.bfloat16")
    if len(list(graph_modules(gm))) > 1:
        raise GraphCheckError("the graph holds autocast or checkpoint regions of its own: run it under torch.autocast")
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in HALF or _is_half_norm(node, dtype):
            wanted = dtype
        elif node.target in FLOAT32 and not is_parameter_only(node):
            wanted = torch.float32
        else:
            refresh(node)
            continue
        for operand in node.all_input_nodes:
            held = value(operand)
            if isinstance(held, Tensor) and held.dtype in _CASTABLE - {wanted}:
                node.replace_input_with(operand, _cast(gm, operand, wanted, casts))
        refresh(node)
    remove_dead_code(gm)
    return cleanup(gm)


def _is_half_norm(node: fx.Node, dtype: torch.dtype) -> bool:
    """A LayerNorm of a half map that only matrix products and convolutions read."""
    return (
        node.target is aten.layer_norm.default
        and value(node.args[0]).dtype == dtype
        and all(_wants_half(user) for user in node.users)
    )


def _wants_half(node: fx.Node) -> bool:
    moves = _MOVES | {aten.contiguous.default}
    return node.target in HALF or (node.target in moves and all(_wants_half(user) for user in node.users))


def _cast(
    gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, casts: dict[tuple[fx.Node, torch.dtype], fx.Node]
) -> fx.Node:
    """``node`` in ``dtype``; made once, right behind it, but before what only moves it: there a compiler can fuse it with the
    step that computed it. A weight becomes a buffer of that type.
    """
    if (node, dtype) not in casts:
        emit = Emitter(gm.graph, node.next, NAME, like=node)
        if is_parameter_only(node):
            [full] = evaluate([node], {}, 1)
            name = f"{node.target if node.op == 'get_attr' else node.name}_{str(dtype).removeprefix('torch.')}"
            casts[node, dtype] = emit.get_attr(gm, name, full.to(value(node).device, dtype))
        elif node.target in _MOVES:
            x, *rest = args_of(node)
            casts[node, dtype] = emit(callee(node), _cast(gm, x, dtype, casts), *rest)
        else:
            casts[node, dtype] = emit(aten.to.dtype, node, dtype)
    return casts[node, dtype]
