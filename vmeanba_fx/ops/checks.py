"""Argument checks of the ops: one function per op, and every failure is a sentence that names the tensor.

They run in the Python wrappers, in the CPU implementations and in the fake ones, so a wrong call fails the same way
eagerly, while exporting and while compiling. Only shapes, dtypes and devices are read: sizes may be symbolic.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_selective_scan(u, delta, A, B, C, D, z, delta_bias, out_dtype) -> None:
    """u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,)."""
    op = "selective_scan"
    _check_kinds(op, out_dtype, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    _check_dims(op, "u", u, "(B, K*D, L)", 3)
    _check_dims(op, "A", A, "(K*D, N)", 2)
    _check_dims(op, "B", B, "(B, K, N, L)", 4)
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    _check_length(op, "u", length)
    if channels % groups != 0:
        raise ValueError(f"{op}: u has {channels} channels, which B's K = {groups} groups do not divide")
    _check_shape(op, "delta", delta, "(B, K*D, L)", (batch, channels, length))
    _check_shape(op, "A", A, "(K*D, N)", (channels, states))
    _check_shape(op, "B", B, "(B, K, N, L)", (batch, groups, states, length))
    _check_shape(op, "C", C, "(B, K, N, L)", (batch, groups, states, length))
    _check_shape(op, "D", D, "(K*D,)", (channels,))
    _check_shape(op, "z", z, "(B, K*D, L)", (batch, channels, length))
    _check_shape(op, "delta_bias", delta_bias, "(K*D,)", (channels,))


def check_linear_scan(a, b, C) -> None:
    """a, C (B, K, N, L); b (B, K, R, N, L)."""
    op = "linear_scan"
    _check_kinds(op, None, a=a, b=b, C=C)
    _check_dims(op, "a", a, "(B, K, N, L)", 4)
    _check_dims(op, "b", b, "(B, K, R, N, L)", 5)
    batch, groups, states, length = a.shape
    _check_length(op, "a", length)
    _check_shape(op, "b", b, "(B, K, R, N, L)", (batch, groups, b.shape[2], states, length))
    _check_shape(op, "C", C, "(B, K, N, L)", (batch, groups, states, length))


def check_shared_scan(u, delta, A, B, C, delta_bias, out_dtype) -> None:
    """u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,)."""
    op = "shared_scan"
    _check_kinds(op, out_dtype, u=u, delta=delta, A=A, B=B, C=C, delta_bias=delta_bias)
    _check_dims(op, "u", u, "(B, K, R, L)", 4)
    _check_dims(op, "A", A, "(K, N)", 2)
    batch, groups, _, length = u.shape
    states = A.shape[1]
    _check_length(op, "u", length)
    _check_shape(op, "delta", delta, "(B, K, L)", (batch, groups, length))
    _check_shape(op, "A", A, "(K, N)", (groups, states))
    _check_shape(op, "B", B, "(B, K, N, L)", (batch, groups, states, length))
    _check_shape(op, "C", C, "(B, K, N, L)", (batch, groups, states, length))
    _check_shape(op, "delta_bias", delta_bias, "(K,)", (groups,))


def check_shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, out_dtype) -> None:
    """u (B, 1 or K, R, H, W); delta (B, K, H, W); A (K, N); B, C (B, K, N, H, W); delta_bias (K,)."""
    op = "shared_scan2d"
    _check_kinds(op, out_dtype, u=u, delta=delta, A=A, B=B, C=C, delta_bias=delta_bias)
    _check_dims(op, "u", u, "(B, 1 or K, R, H, W)", 5)
    _check_dims(op, "delta", delta, "(B, K, H, W)", 4)
    _check_dims(op, "A", A, "(K, N)", 2)
    batch, u_groups, _, height, width = u.shape
    groups, states = delta.shape[1], A.shape[1]
    _check_length(op, "u", height * width)
    if u_groups != 1 and u_groups != groups:
        raise ValueError(
            f"{op}: u must have 1 or K = {groups} groups in dim 1 (K is that of delta), but it has {u_groups}"
        )
    _check_shape(op, "delta", delta, "(B, K, H, W)", (batch, groups, height, width))
    _check_shape(op, "A", A, "(K, N)", (groups, states))
    _check_shape(op, "B", B, "(B, K, N, H, W)", (batch, groups, states, height, width))
    _check_shape(op, "C", C, "(B, K, N, H, W)", (batch, groups, states, height, width))
    _check_shape(op, "delta_bias", delta_bias, "(K,)", (groups,))
    _check_order(op, directions, order, groups, height * width)


def check_ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, out_dtype) -> None:
    """x (B, D, H, W); feats (B, K, R + 2N, H, W); dt_weight (K, D, R); A (K*D, N); D (D,); delta_bias (K*D,)."""
    op = "ss2d"
    _check_kinds(op, out_dtype, x=x, feats=feats, dt_weight=dt_weight, A=A, D=D, delta_bias=delta_bias)
    _check_dims(op, "x", x, "(B, D, H, W)", 4)
    _check_dims(op, "feats", feats, "(B, K, R + 2N, H, W)", 5)
    _check_dims(op, "dt_weight", dt_weight, "(K, D, R)", 3)
    _check_dims(op, "A", A, "(K*D, N)", 2)
    batch, channels, height, width = x.shape
    groups, rank, states = feats.shape[1], dt_weight.shape[2], A.shape[1]
    _check_length(op, "x", height * width)
    _check_shape(op, "feats", feats, "(B, K, R + 2N, H, W)", (batch, groups, rank + 2 * states, height, width))
    _check_shape(op, "dt_weight", dt_weight, "(K, D, R)", (groups, channels, rank))
    _check_shape(op, "A", A, "(K*D, N)", (groups * channels, states))
    _check_shape(op, "D", D, "(D,)", (channels,))
    _check_shape(op, "delta_bias", delta_bias, "(K*D,)", (groups * channels,))
    _check_order(op, directions, order, groups, height * width)


def check_broadcast_add(y, u, D, out_dtype) -> None:
    """y (B, K, 1, L); u (B, K*D, L); D (K*D,)."""
    op = "broadcast_add"
    _check_kinds(op, out_dtype, y=y, u=u, D=D)
    _check_dims(op, "y", y, "(B, K, 1, L)", 4)
    _check_dims(op, "u", u, "(B, K*D, L)", 3)
    batch, channels, length = u.shape
    groups = y.shape[1]
    if channels % groups != 0:
        raise ValueError(f"{op}: u has {channels} channels, which y's K = {groups} groups do not divide")
    _check_shape(op, "y", y, "(B, K, 1, L)", (batch, groups, 1, length))
    _check_shape(op, "D", D, "(K*D,)", (channels,))


def _check_kinds(op: str, out_dtype: torch.dtype | None, **tensors: Tensor | None) -> None:
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            hint = "; complex scans are not supported" if tensor.is_complex() else ""
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, but is {tensor.dtype}{hint}")
        if first is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first_name} is on {first.device}")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype must be float32, bfloat16, float16 or float64, but is {out_dtype}")


def _check_dims(op: str, name: str, tensor: Tensor, layout: str, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dims {layout}, but has shape {tuple(tensor.shape)}")
    if layout.startswith("(B, K") and tensor.shape[1] == 0:
        raise ValueError(f"{op}: dim 1 of {name} {layout} is empty")


def _check_shape(op: str, name: str, tensor: Tensor | None, layout: str, expected: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{op}: {name} must be {layout} = {tuple(expected)}, but has shape {tuple(tensor.shape)}")


def _check_length(op: str, name: str, length: int) -> None:
    if length < 1:
        raise ValueError(f"{op}: {name} has length 0, but a scan needs at least one step")


def _check_order(op: str, directions: list[int], order: Tensor | None, groups: int, length: int) -> None:
    if order is None:
        if len(directions) != groups:
            raise ValueError(
                f"{op}: directions must hold one code for each of the K = {groups} groups, but has {len(directions)}"
            )
        for code in directions:
            if not 0 <= code <= 7:
                raise ValueError(f"{op}: a direction code must be 0 to 7, but directions is {list(directions)}")
        return
    if len(directions) != 0:
        raise ValueError(f"{op}: directions must be [] where order is given, but is {list(directions)}")
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: order must be int32 or int64, but is {order.dtype}")
    if order.shape != (groups, length):
        raise ValueError(f"{op}: order must be (K, L) = {(groups, length)}, but has shape {tuple(order.shape)}")
