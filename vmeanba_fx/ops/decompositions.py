"""Every op of ours in terms of ATen, for processes that have only ATen: ONNX, AOTInductor from C++.

`decompose(gm, form)` puts them into a graph, which is then exported. Each computes in float64 for a float64 input and in
float32 otherwise, as the ops do, and equals them up to rounding. How the recurrence is written out is a choice of form
(see `chunked`), the last argument of those that have one.
"""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .chunked import Form, unrolled
from .directions import ScanOrder
from .last_state import compute_last_state

_ops = torch.ops.vmeanba_fx


def decompose(gm: fx.GraphModule, form: Form) -> None:
    """Make every call of an op of ours, in the graph and in those inside it, a call of the function here, in place."""
    found = table(form)
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.target = found.get(node.target, node.target)
            module.recompile()


def table(form: Form) -> dict[Any, Callable[..., Any]]:
    """Operator -> function."""
    scans = {getattr(_ops, f.__name__).default: update_wrapper(partial(f, form=form), f) for f in _SCANS}
    return scans | {_ops.broadcast_add.default: broadcast_add, _ops.last_state.default: compute_last_state}


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None, *, form=unrolled
):
    """u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,). Returns (B, K*D, L)."""
    dtype = _compute_dtype(u)
    K = B.shape[1]
    x = u.to(dtype)
    dt = _step(delta, delta_bias, delta_softplus, dtype)
    y = _scan(form, _groups(x, K), _groups(dt, K), A.to(dtype).unflatten(0, (K, -1)), B.to(dtype), C.to(dtype))
    y = y.flatten(1, 2)
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype or u.dtype)


def linear_scan(a, b, C, *, form=unrolled):
    """a, C (B, K, N, L); b (B, K, R, N, L). Returns (B, K, R, L)."""
    dtype = _compute_dtype(a)

    def step(decay: Tensor, drive: Tensor) -> tuple[Tensor, Tensor]:
        return decay.unsqueeze(-3), drive

    return form(step, (a.to(dtype), b.to(dtype)), (), C.to(dtype), b.shape[2]).to(a.dtype)


def shared_scan(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None, *, form=unrolled):
    """u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,). Returns (B, K, R, L)."""
    dtype = _compute_dtype(u)
    dt = _step(delta, delta_bias, delta_softplus, dtype).unsqueeze(2)
    y = _scan(form, u.to(dtype), dt, A.to(dtype).unsqueeze(1), B.to(dtype), C.to(dtype))
    return y.to(out_dtype or u.dtype)


def shared_scan2d(
    u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None, *, form=unrolled
):
    """u (B, 1 or K, R, H, W); delta (B, K, H, W); B, C (B, K, N, H, W). Returns (B, R, H, W) or (B, K, R, H, W)."""
    dtype = _compute_dtype(u)
    walk = _walk(directions, order, u)
    x, step, Bs, Cs = (_read(walk, maps.to(dtype)) for maps in (u, delta.unsqueeze(2), B, C))
    y = shared_scan(x, step.squeeze(2), A.to(dtype), Bs, Cs, delta_bias, delta_softplus, form=form)
    y = _put_back(walk, y)
    return (y.sum(1) if merge else y).to(out_dtype or u.dtype)


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None, *, form=unrolled):
    """x (B, D, H, W); feats (B, K, R + 2N, H, W); dt_weight (K, D, R); A (K*D, N). Returns (B, D, H, W)."""
    dtype = _compute_dtype(x)
    R, N = dt_weight.shape[2], A.shape[1]
    walk = _walk(directions, order, x)
    u = _read(walk, x.to(dtype).unsqueeze(1)).flatten(1, 2)
    rank, Bs, Cs = _read(walk, feats.to(dtype)).split([R, N, N], dim=2)
    delta = torch.matmul(dt_weight.to(dtype), rank).flatten(1, 2)
    y = selective_scan(u, delta, A, Bs, Cs, None, None, delta_bias, delta_softplus, form=form)
    out = _put_back(walk, _groups(y, feats.shape[1])).sum(1)
    if D is not None:
        out = out + D.to(dtype).view(-1, 1, 1) * x.to(dtype)
    return out.to(out_dtype or x.dtype)


def broadcast_add(y, u, D, out_dtype=None):
    """y (B, K, 1, L) copied to the channels of its group, + D*u: u (B, K*D, L); D (K*D,). Returns (B, K*D, L)."""
    dtype = _compute_dtype(u)
    K = y.shape[1]
    out = y.to(dtype)
    if D is None:
        out = out.expand(-1, -1, u.shape[1] // K, -1)
    else:
        out = out + _groups(D.to(dtype).unsqueeze(-1) * u.to(dtype), K)
    return out.flatten(1, 2).to(out_dtype or u.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _groups(x: Tensor, K: int) -> Tensor:
    """(B, K*D, L) -> (B, K, D, L)."""
    return x.unflatten(1, (K, -1))


def _step(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """softplus?(delta + bias), (B, channels, L)."""
    step = delta.to(dtype)
    if bias is not None:
        step = step + bias.to(dtype).unsqueeze(-1)
    return F.softplus(step) if softplus else step


def _scan(form: Form, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """x (B, K, R, L); dt (B, K, R or 1, L); A (K, R or 1, N); B, C (B, K, N, L). Returns y (B, K, R, L)."""

    def step(dt: Tensor, x: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(dt.unsqueeze(-2) * A), (dt * x).unsqueeze(-2) * B.unsqueeze(-3)

    return form(step, (dt, x, B), (A.unsqueeze(-1),), C, x.shape[2])


def _walk(directions: list[int], order: Tensor | None, like: Tensor) -> ScanOrder:
    return ScanOrder(directions, order, *like.shape[-2:], checked=False)


def _read(walk: ScanOrder, maps: Tensor) -> Tensor:
    """(B, 1 or K, C, H, W) -> (B, K, C, L)."""
    return torch.stack(list(walk.rows_of(maps)), dim=1)


def _put_back(walk: ScanOrder, rows: Tensor) -> Tensor:
    """The inverse: (B, K, C, L) -> (B, K, C, H, W)."""
    return torch.stack([walk.put_back(rows[:, k], k) for k in range(rows.shape[1])], dim=1)


_SCANS = (selective_scan, linear_scan, shared_scan, shared_scan2d, ss2d)

# One pass over memory is the best that eager execution can do; torch.compile fuses these operators with those around them.
_ops.broadcast_add.default.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(broadcast_add)
