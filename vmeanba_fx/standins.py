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

from .registry import compute_dtype

StandIn = Callable[[Mapping[str, Any]], Any]
PYBIND_CONVOLUTION = ("causal_conv1d_cuda", "causal_conv1d_fwd")


def find_stand_in(parameters: tuple[str, ...]) -> StandIn | None:
    """What computes the same as a compiled function with these parameters; None where it is no known companion."""
    if parameters[:3] != ("x", "weight", "bias"):
        return None
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


def _add_norm(a: Mapping[str, Any]) -> Any:
    """``norm(x + residual)`` and, with ``prenorm``, the sum; LayerNorm or RMSNorm; parameters of mamba-ssm's Triton code."""
    unused = ("x1", "weight1", "bias1", "rowscale", "dropout_p", "zero_centered_weight", "return_dropout_mask", "out",
              "residual_out")  # fmt: skip
    if any(a.get(name) is not None and (isinstance(a[name], Tensor) or a[name]) for name in unused):
        raise NotImplementedError("a fused norm with dropout, two branches or outputs of the caller's")
    x, weight, bias, residual = a["x"], a["weight"], a["bias"], a["residual"]
    compute = compute_dtype(x.dtype)
    total = x.to(compute) if residual is None else x.to(compute) + residual.to(compute)
    weight, bias = weight.to(compute), None if bias is None else bias.to(compute)
    if a["is_rms_norm"]:
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + a["eps"]) * weight
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(total, total.shape[-1:], weight, bias, a["eps"])
    y = y.to(a.get("out_dtype") or x.dtype)
    if not a["prenorm"]:
        return y
    kept = residual.dtype if residual is not None else torch.float32 if a["residual_in_fp32"] else x.dtype
    return y, total.to(kept)
