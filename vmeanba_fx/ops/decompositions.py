"""Every op of ours in terms of ATen, for processes that have only ATen: ONNX, AOTInductor from C++.

`table()` goes into `ExportedProgram.run_decompositions`, alone or beside PyTorch's own. Each decomposition computes in
float64 for a float64 input and in float32 otherwise, as the ops do, and equals them up to rounding.

The recurrence h_t = a_t h_{t-1} + b_t runs in chunks of `CHUNK` steps: all chunks advance together from a state of zero,
the last states of the chunks are one recurrence of L / CHUNK steps, done the same way, and what the state before a
chunk adds is put right afterwards. So the number of operators grows with the logarithm of L. Nothing is divided by a
product of decays and no sum of exponents is exponentiated: a decay of zero or above one is as safe as in a loop. The
price is memory: a and b exist for all steps, states and channels, B*K*D*N*L elements each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16

_ops = torch.ops.vmeanba_fx


def table() -> dict[Any, Callable[..., Any]]:
    """Operator -> decomposition, for `ExportedProgram.run_decompositions`."""
    return {getattr(_ops, name).default: function for name, function in _TABLE.items()}


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None):
    """u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,). Returns (B, K*D, L)."""
    dtype = _compute_dtype(u)
    K = B.shape[1]
    x = u.to(dtype)
    dt = _step(delta, delta_bias, delta_softplus, dtype)
    y = _scan(_groups(x, K), _groups(dt, K), A.to(dtype).unflatten(0, (K, -1)), B.to(dtype), C.to(dtype))
    y = y.flatten(1, 2)
    if D is not None:
        y = y + D.to(dtype).unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype or u.dtype)


def linear_scan(a, b, C):
    """a, C (B, K, N, L); b (B, K, R, N, L). Returns (B, K, R, L)."""
    dtype = _compute_dtype(a)
    decay = a.to(dtype).permute(3, 0, 1, 2).unsqueeze(3)  # (L, B, K, 1, N)
    drive = b.to(dtype).permute(4, 0, 1, 2, 3)  # (L, B, K, R, N)
    h = _recurrence(decay, drive)
    return _read(h, C.to(dtype)).to(a.dtype)


def shared_scan(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None):
    """u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,). Returns (B, K, R, L)."""
    dtype = _compute_dtype(u)
    dt = _step(delta, delta_bias, delta_softplus, dtype).unsqueeze(2)
    y = _scan(u.to(dtype), dt, A.to(dtype).unsqueeze(1), B.to(dtype), C.to(dtype))
    return y.to(out_dtype or u.dtype)


def shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None):
    """u (B, 1 or K, R, H, W); delta (B, K, H, W); B, C (B, K, N, H, W). Returns (B, R, H, W) or (B, K, R, H, W)."""
    dtype = _compute_dtype(u)
    walk = _Walk(directions, order, u)
    inputs = (walk.read(maps.to(dtype)) for maps in (u, delta.unsqueeze(2), B, C))
    x, step, Bs, Cs = inputs
    y = shared_scan(x, step.squeeze(2), A.to(dtype), Bs, Cs, delta_bias, delta_softplus)
    y = walk.put_back(y)
    return (y.sum(1) if merge else y).to(out_dtype or u.dtype)


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None):
    """x (B, D, H, W); feats (B, K, R + 2N, H, W); dt_weight (K, D, R); A (K*D, N). Returns (B, D, H, W)."""
    dtype = _compute_dtype(x)
    R, N = dt_weight.shape[2], A.shape[1]
    walk = _Walk(directions, order, x)
    u = walk.read(x.to(dtype).unsqueeze(1)).flatten(1, 2)
    rank, Bs, Cs = walk.read(feats.to(dtype)).split([R, N, N], dim=2)
    delta = torch.matmul(dt_weight.to(dtype), rank).flatten(1, 2)
    y = selective_scan(u, delta, A, Bs, Cs, None, None, delta_bias, delta_softplus)
    out = walk.put_back(_groups(y, feats.shape[1])).sum(1)
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


def last_state(u, delta, A, B, delta_bias=None, delta_softplus=False):
    """h after step L, (B, K*D, N): sum over t of exp(A * (sum of dt after t)) dt_t B_t u_t."""
    dtype = _compute_dtype(u)
    K = B.shape[1]
    dt = _step(delta, delta_bias, delta_softplus, dtype)
    after = dt.flip(-1).cumsum(-1).flip(-1) - dt  # what is left of the sum, added up from its small end
    decay = torch.exp(after.unsqueeze(2) * A.to(dtype).unsqueeze(-1))  # (B, K*D, N, L)
    terms = (decay * (dt * u.to(dtype)).unsqueeze(2)).unflatten(1, (K, -1))
    return (terms * B.to(dtype).unsqueeze(2)).sum(-1).flatten(1, 2)


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


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """x (B, K, R, L); dt (B, K, R or 1, L); A (K, R or 1, N); B, C (B, K, N, L). Returns y (B, K, R, L).

    Time goes first: a step is then one contiguous block, whatever the layout of the model around it.
    """
    step = dt.permute(3, 0, 1, 2)  # (L, B, K, R or 1)
    decay = torch.exp(step.unsqueeze(-1) * A)  # (L, B, K, R or 1, N)
    drive = (step * x.permute(3, 0, 1, 2)).unsqueeze(-1) * B.permute(3, 0, 1, 2).unsqueeze(3)  # (L, B, K, R, N)
    return _read(_recurrence(decay, drive), C)


def _read(h: Tensor, C: Tensor) -> Tensor:
    """h (L, B, K, R, N), C (B, K, N, L) -> y = <C, h>, (B, K, R, L)."""
    return (h * C.permute(3, 0, 1, 2).unsqueeze(3)).sum(-1).permute(1, 2, 3, 0)


def _recurrence(a: Tensor, b: Tensor) -> Tensor:
    """The states h_t = a_t h_{t-1} + b_t along dim 0, from h = 0. `a` may have size 1 where `b` has more."""
    length = b.shape[0]
    if length == 1:
        return b
    if length <= CHUNK:
        return torch.cat(_unrolled(a.split(1, 0), b.split(1, 0)), 0)
    chunks = -(-length // CHUNK)
    missing = chunks * CHUNK - length
    if missing:  # steps after the last one, which nobody reads
        a, b = (torch.cat([t, torch.zeros_like(t[:missing])]) for t in (a, b))
    a_steps, b_steps = (t.unflatten(0, (chunks, CHUNK)).split(1, 1) for t in (a, b))  # each (chunks, 1, ...)
    states, products = _unrolled(a_steps, b_steps), _products(a_steps)
    ends = _recurrence(products[-1], states[-1])
    before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])  # the state before each chunk
    h = torch.cat(states, 1) + torch.cat(products, 1) * before
    return h.flatten(0, 1)[:length]


def _unrolled(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> list[Tensor]:
    states = [b[0]]
    for decay, drive in zip(a[1:], b[1:], strict=True):
        states.append(decay * states[-1] + drive)
    return states


def _products(a: tuple[Tensor, ...]) -> list[Tensor]:
    products = [a[0]]
    for decay in a[1:]:
        products.append(products[-1] * decay)
    return products


class _Walk:
    """The K orders in which maps (..., H, W) are read: views and flips for codes, an index for a table."""

    def __init__(self, directions: list[int], order: Tensor | None, like: Tensor) -> None:
        self.codes, self.order = directions, order
        self.height, self.width = like.shape[-2:]
        if order is not None:
            self.order = order.long()
            steps = torch.arange(order.shape[1], device=order.device).expand_as(order)
            self.inverse = torch.zeros_like(self.order).scatter(1, self.order, steps)

    def read(self, maps: Tensor) -> Tensor:
        """(B, 1 or K, C, H, W) -> (B, K, C, L)."""
        count = len(self.codes) if self.order is None else self.order.shape[0]
        own = maps.shape[1] == count
        return torch.stack([self._read(maps[:, k if own else 0], k) for k in range(count)], dim=1)

    def _read(self, maps: Tensor, k: int) -> Tensor:
        if self.order is not None:
            return maps.flatten(-2).index_select(-1, self.order[k])
        code = self.codes[k]
        if code & 1:
            maps = maps.transpose(-1, -2)
        if code & 4:
            maps = maps.flip(-1)
        rows = maps.flatten(-2)
        return rows.flip(-1) if code & 2 else rows

    def put_back(self, rows: Tensor) -> Tensor:
        """The inverse of `read`: (B, K, C, L) -> (B, K, C, H, W)."""
        return torch.stack([self._put_back(rows[:, k], k) for k in range(rows.shape[1])], dim=1)

    def _put_back(self, rows: Tensor, k: int) -> Tensor:
        if self.order is not None:
            return rows.index_select(-1, self.inverse[k]).unflatten(-1, (self.height, self.width))
        code = self.codes[k]
        if code & 2:
            rows = rows.flip(-1)
        maps = rows.unflatten(-1, (self.width, self.height) if code & 1 else (self.height, self.width))
        if code & 4:
            maps = maps.flip(-1)
        return maps.transpose(-1, -2) if code & 1 else maps


_TABLE = {
    function.__name__: function
    for function in (selective_scan, linear_scan, shared_scan, shared_scan2d, ss2d, broadcast_add, last_state)
}
