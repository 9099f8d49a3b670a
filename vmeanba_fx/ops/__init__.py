"""The scan ops. Importing this package registers them as `torch.ops.vmeanba_fx.*`; the functions are their typed form.

    selective_scan   the full scan: every channel has its own decay
    linear_scan      the scan after discretisation, R channels sharing one decay (the paper's block has R = 1)
    shared_scan      the same from u, delta, A, B, C (input mean, rank r)
    shared_scan2d    shared_scan on maps in spatial order, read and merged in K scan directions
    ss2d             the full scan of an un-scanned map in K directions, with its step projection, merged
    broadcast_add    a one-channel scan copied to all channels, plus D*u

Shapes, errors and meaning are those of each function's docstring. `naive` holds the same six as plain loops.
"""

import torch
from torch import Tensor

# Most of these are imported because importing them registers their implementations.
from . import autograd, backward, checks, compose, cpu, cuda, cuda_shared, cuda_ss2d, decompositions, flops, library  # noqa: F401

__all__ = ["broadcast_add", "linear_scan", "selective_scan", "shared_scan", "shared_scan2d", "ss2d"]

_ops = torch.ops.vmeanba_fx


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The full selective scan, (B, K*D, L) in `out_dtype` or u's dtype.

        dt = softplus?(delta + delta_bias);  h_t = exp(dt A) h_{t-1} + dt B u;  y = <C, h> (+ D u) (* silu(z))

    u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,); L >= 1. K is read from B. Dtypes may
    be mixed; the arithmetic is float64 for float64 `u` and float32 otherwise.
    """
    checks.check_selective_scan(u, delta, A, B, C, D, z, delta_bias, out_dtype)
    return _ops.selective_scan.default(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype)


def linear_scan(a: Tensor, b: Tensor, C: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t, y_t = <C_t, h_t>: y (B, K, R, L) in a's dtype.

    a, C (B, K, N, L); b (B, K, R, N, L): R channels that share the decay a.
    """
    checks.check_linear_scan(a, b, C)
    return _ops.linear_scan.default(a, b, C)


def shared_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A selective scan of R channels that share step and decay: y (B, K, R, L) in `out_dtype` or u's dtype.

    u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,).
    """
    checks.check_shared_scan(u, delta, A, B, C, delta_bias, out_dtype)
    return _ops.shared_scan.default(u, delta, A, B, C, delta_bias, delta_softplus, out_dtype)


def shared_scan2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    directions: list[int],
    order: Tensor | None,
    delta_softplus: bool,
    merge: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`shared_scan` on maps in spatial order, each direction reading them in its own order.

    u (B, 1 or K, R, H, W); delta (B, K, H, W); A (K, N); B, C (B, K, N, H, W); delta_bias (K,).
    `directions`: one code per direction, see `directions.py`; or [] and `order`, an int table (K, L) of positions.
    Returns the sum over directions (B, R, H, W) with `merge`, else (B, K, R, H, W); both in spatial order.

    On CUDA it is fastest where every (H, W) plane is contiguous and starts at a multiple of 16 bytes, as in views of one
    projection's output (B, features, H*W). Other layouts, channels last among them, are read element by element.
    """
    checks.check_shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, out_dtype)
    return _ops.shared_scan2d.default(
        u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype
    )


def ss2d(
    x: Tensor,
    feats: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    directions: list[int],
    order: Tensor | None,
    delta_softplus: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The core of an SS2D block in one op: (B, D, H, W) = sum over directions of the scans put back in place, + D*x.

    x (B, D, H, W), un-scanned; feats (B, K, R + 2N, H, W): [step features | B | C] per direction, in spatial order;
    dt_weight (K, D, R): delta = dt_weight @ step features; A (K*D, N); D (D,), already summed over directions, or None;
    delta_bias (K*D,). `directions` and `order` as in `shared_scan2d`.
    """
    checks.check_ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, out_dtype)
    return _ops.ss2d.default(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype)


def broadcast_add(y: Tensor, u: Tensor, D: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """y (B, K, 1, L) copied to the channels of its group, + D*u, in one pass: (B, K*D, L). u (B, K*D, L); D (K*D,)."""
    checks.check_broadcast_add(y, u, D, out_dtype)
    return _ops.broadcast_add.default(y, u, D, out_dtype)
