"""PyTorch code for the compiled companions of selective scans, for traces on the CPU.

mamba-ssm's fused paths call a causal convolution and a fused add + norm that exist for GPUs only. A trace runs on the CPU,
so where such a kernel does not run there, the same function in PyTorch takes its place, and its operators enter the
graph. Like scans they are recognised by their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .registry import compute_dtype

StandIn = Callable[[Mapping[str, Any]], Any]
PYBIND_CONVOLUTION = ("causal_conv1d_cuda", "causal_conv1d_fwd")


def find_stand_in(parameters: tuple[str, ...]) -> StandIn | None:
    """What computes the same as a compiled function with these parameters; None where it is no known companion."""
    if parameters[:7] == ("zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D", "chunk_size"):
        return _mamba2
    if parameters[:3] != ("x", "weight", "bias"):
        return None
    if {"z", "eps", "group_size", "norm_before_gate", "is_rms_norm"} <= set(parameters):
        return _gated_norm
    if parameters[3:] == ("seq_idx", "initial_states", "final_states_out", "silu_activation"):
        return _convolution_function
    if {"residual", "prenorm", "residual_in_fp32", "is_rms_norm", "eps"} <= set(parameters):
        return _add_norm
    return None


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Depthwise convolution over the last ``width`` positions: x (B, D, L), weight (D, width), bias (D,)."""
    width, length = weight.shape[1], x.shape[-1]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(x, weight.to(x.dtype).unsqueeze(1), bias, padding=width - 1, groups=x.shape[1])[..., :length]
    return F.silu(y) if silu else y


def convolution_pybind(*args: Any) -> Tensor:
    """``causal_conv1d_cuda.causal_conv1d_fwd`` of any release: x, weight, bias first; silu last; states between."""
    x, weight, bias, *between, silu = args
    out = between.pop(2) if len(between) == 4 else None  # later releases write into a tensor that the caller made
    if any(isinstance(t, Tensor) for t in between):
        raise NotImplementedError("a causal convolution with sequence indices or states")
    y = causal_convolution(x, weight, bias, bool(silu))
    return y if out is None else out.copy_(y)


def _convolution_function(a: Mapping[str, Any]) -> Tensor:
    if any(a[name] is not None for name in ("seq_idx", "initial_states", "final_states_out")):
        raise NotImplementedError("a causal convolution with sequence indices or states")
    return causal_convolution(a["x"], a["weight"], a["bias"], bool(a["silu_activation"]))


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, size: int | None = None) -> Tensor:
    """LayerNorm or RMSNorm over the last axis, or over each ``size`` of its channels, in the dtype of ``x``."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not rms and size is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    grouped = x.unflatten(-1, (-1, size or x.shape[-1]))
    if rms:
        y = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    else:
        y = F.layer_norm(grouped, grouped.shape[-1:], eps=eps)
    y = y.flatten(-2) * weight
    return y if bias is None else y + bias


def _add_norm(a: Mapping[str, Any]) -> Any:
    """``norm(x + residual)`` and, with ``prenorm``, the sum; LayerNorm or RMSNorm; parameters of mamba-ssm's Triton code."""
    unused = ("x1", "weight1", "bias1", "rowscale", "dropout_p", "zero_centered_weight", "return_dropout_mask", "out",
              "residual_out")  # fmt: skip
    if any(a.get(name) is not None and (isinstance(a[name], Tensor) or a[name]) for name in unused):
        raise NotImplementedError("a fused norm with dropout, two branches or outputs of the caller's")
    x, weight, bias, residual = a["x"], a["weight"], a["bias"], a["residual"]
    compute = compute_dtype(x.dtype)
    total = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
    y = _norm(total, weight, bias, a["eps"], a["is_rms_norm"]).to(a.get("out_dtype") or x.dtype)
    if not a["prenorm"]:
        return y
    kept = residual.dtype if residual is not None else torch.float32 if a["residual_in_fp32"] else x.dtype
    return y, total.to(kept)


def _gated_norm(a: Mapping[str, Any]) -> Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))`` with the gate first; x, z (..., D)."""
    x, z = a["x"], a["z"]
    y = x.to(compute_dtype(x.dtype))
    gate = None if z is None else F.silu(z.to(y.dtype))
    if gate is not None and not a["norm_before_gate"]:
        y, gate = y * gate, None
    y = _norm(y, a["weight"], a["bias"], a["eps"], a["is_rms_norm"], a["group_size"])
    return (y if gate is None else y * gate).to(x.dtype)


def _mamba2(a: Mapping[str, Any]) -> Tensor:
    """Mamba-2's fused path: zxbcdt (B, L, ...) holds z, x, B, C and dt; convolution, scan, gated norm, projection."""
    if any(a.get(n) is not None for n in ("initial_states", "seq_idx")) or a["return_final_states"]:
        raise NotImplementedError("Mamba-2's fused path with states")
    D, groups, packed = a["D"], a["ngroups"], a["zxbcdt"]
    heads = D.shape[0]
    width = D.shape[1] if D.dim() == 2 else a["headdim"]
    inner = heads * width
    state = (a["conv1d_weight"].shape[0] - inner) // (2 * groups)
    if packed.shape[-1] != 2 * inner + 2 * groups * state + heads:
        raise NotImplementedError("Mamba-2's fused path with a part that bypasses the scan")
    z, xBC, dt = packed.split([inner, inner + 2 * groups * state, heads], dim=-1)
    silu = a["activation"] in ("silu", "swish")
    xBC = causal_convolution(xBC.transpose(1, 2), a["conv1d_weight"], a["conv1d_bias"], silu)
    x, B, C = xBC.split([inner, groups * state, groups * state], dim=1)
    compute = compute_dtype(x.dtype)
    step = F.softplus(dt.to(compute) + a["dt_bias"]).clamp(*a["dt_limit"]).transpose(1, 2)  # (B, H, L)
    A = a["A"][:, None].expand(heads, width).reshape(inner, 1).expand(-1, state)
    skip = (D if D.dim() == 2 else D[:, None].expand(heads, width)).reshape(inner)
    gated_norm = a["rmsnorm_weight"] is not None
    y = ops.selective_scan(
        x, step.repeat_interleave(width, dim=1).to(x.dtype), A, B.unflatten(1, (groups, state)),
        C.unflatten(1, (groups, state)), skip, None if gated_norm else z.transpose(1, 2), None, False,
    ).transpose(1, 2)  # fmt: skip
    if gated_norm:
        y = _gated_norm({
            "x": y, "z": z, "weight": a["rmsnorm_weight"], "bias": None, "eps": a["rmsnorm_eps"],
            "group_size": inner // groups,
            "norm_before_gate": a["norm_before_gate"], "is_rms_norm": True,
        })  # fmt: skip
    return y if a["outproj_weight"] is None else F.linear(y, a["outproj_weight"], a["outproj_bias"])
