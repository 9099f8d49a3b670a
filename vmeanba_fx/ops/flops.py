"""FLOP formulas of the ops for `torch.utils.flop_counter`, which counts an op without a formula as zero.

The unit is the paper's: one for each multiply and each add as its authors count them (`FlopCounterMode` counts a GEMM's
multiply-add as 2, so the two add up).

    full scan                 9 B L (K D) N            Mamba's own count, used by VMamba and by the paper
    scan of a shared decay    10 B L (K R) N           the paper's one-channel scan, for each of the R channels
    `+ D u`, `* silu(z)`      B L (K D) each           where the op is given them

The paper's whole block costs 10 B L N + B L D N: what its mean over channels adds is not in the scan op, it lies in the
nodes before it. `ss2d` adds its step projection, 2 B L K D R. Backward ops and `broadcast_add` have no formula.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.vmeanba_fx


@register_flop_formula(_ops.selective_scan)
def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None, **_
) -> int:
    batch, channels, length = u
    return batch * length * channels * (9 * A[1] + (D is not None) + (z is not None))


@register_flop_formula(_ops.linear_scan)
def linear_scan(a, b, C, **_) -> int:
    batch, groups, rank, states, length = b
    return 10 * batch * length * groups * rank * states


@register_flop_formula(_ops.shared_scan)
def shared_scan(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None, **_) -> int:
    batch, groups, rank, length = u
    return 10 * batch * length * groups * rank * A[1]


@register_flop_formula(_ops.shared_scan2d)
def shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None, **_) -> int:
    batch, _, rank, height, width = u
    return 10 * batch * height * width * delta[1] * rank * A[1]


@register_flop_formula(_ops.ss2d)
def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None, **_) -> int:
    batch, channels, height, width = x
    groups, _, rank = dt_weight
    scan = 9 * groups * channels * A[1]
    projection = 2 * groups * channels * rank
    return batch * height * width * (scan + projection + channels * (D is not None))
