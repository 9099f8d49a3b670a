"""The plain reference of every op: loops over time, nothing clever. Slow, and the truth for tests and benchmarks.

Shapes: batch B, groups (scan directions) K, channels per group D, state size N, length L, rank R of the projection.
Each function takes the arguments of the op of the same name, computes in float64 when its input is float64 and in
float32 otherwise, and rounds once at the end. It is written independently of the fast code, with no shared helper.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,). Returns y (B, K*D, L)."""
    dtype = _compute_dtype(u)
    batch, channels, length = u.shape
    K, N = B.shape[1], B.shape[2]
    x, dt, decay = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    per_channel = channels // K
    Bk = (
        B.to(dtype).view(batch, K, 1, N, length).expand(-1, -1, per_channel, -1, -1).reshape(batch, channels, N, length)
    )
    Ck = (
        C.to(dtype).view(batch, K, 1, N, length).expand(-1, -1, per_channel, -1, -1).reshape(batch, channels, N, length)
    )
    Abar = torch.exp(torch.einsum("bdl,dn->bdln", dt, decay))
    Bu = torch.einsum("bdl,bdnl,bdl->bdln", dt, Bk, x)

    h = x.new_zeros(batch, channels, N)
    steps = []
    for t in range(length):
        h = Abar[:, :, t] * h + Bu[:, :, t]
        steps.append(torch.einsum("bdn,bdn->bd", h, Ck[:, :, :, t]))
    y = torch.stack(steps, dim=2)

    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype or u.dtype)


def linear_scan(a: Tensor, b: Tensor, C: Tensor) -> Tensor:
    """a, C (B, K, N, L); b (B, K, R, N, L): R channels that share the decay a. Returns y (B, K, R, L)."""
    dtype = _compute_dtype(a)
    decay, drive, read = a.to(dtype), b.to(dtype), C.to(dtype)
    h = drive.new_zeros(drive.shape[:-1])
    steps = []
    for t in range(a.shape[-1]):
        h = decay[:, :, None, :, t] * h + drive[..., t]
        steps.append((h * read[:, :, None, :, t]).sum(-1))
    return torch.stack(steps, dim=-1).to(a.dtype)


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
    """u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,). Returns y (B, K, R, L)."""
    dtype = _compute_dtype(u)
    x, dt = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    h = x.new_zeros(*x.shape[:3], A.shape[1])
    steps = []
    for t in range(x.shape[-1]):
        step = dt[:, :, t, None]  # (B, K, 1)
        decay = torch.exp(step * A.to(dtype))  # (B, K, N)
        drive = (step * B[..., t].to(dtype))[:, :, None] * x[..., t, None]  # (B, K, R, N)
        h = decay[:, :, None] * h + drive
        steps.append((h * C[:, :, None, :, t].to(dtype)).sum(-1))
    return torch.stack(steps, dim=-1).to(out_dtype or u.dtype)


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
    """As `shared_scan` on maps in spatial order: u (B, 1 or K, R, H, W), delta (B, K, H, W), B, C (B, K, N, H, W)."""
    batch, groups, R, height, width = u.shape
    K, dtype = delta.shape[1], _compute_dtype(u)
    walks = [_walk(k, directions, order, height, width) for k in range(K)]
    out = u.new_zeros(batch, K, R, height, width, dtype=dtype)
    for k, walk in enumerate(walks):
        rows, columns = zip(*walk, strict=True)
        y = shared_scan(
            u[:, min(k, groups - 1), :, rows, columns].to(dtype)[:, None],
            delta[:, k, rows, columns].to(dtype)[:, None],
            A[k : k + 1].to(dtype),
            B[:, k, :, rows, columns].to(dtype)[:, None],
            C[:, k, :, rows, columns].to(dtype)[:, None],
            None if delta_bias is None else delta_bias[k : k + 1].to(dtype),
            delta_softplus,
        )
        for t, (row, column) in enumerate(walk):
            out[:, k, :, row, column] = y[:, 0, :, t]
    return (out.sum(1) if merge else out).to(out_dtype or u.dtype)


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
    """x (B, D, H, W); feats (B, K, R + 2N, H, W) as [step features | B | C]; dt_weight (K, D, R); A (K*D, N)."""
    batch, channels, height, width = x.shape
    K, R, N, dtype = feats.shape[1], dt_weight.shape[2], A.shape[1], _compute_dtype(x)
    out = x.new_zeros(batch, channels, height, width, dtype=dtype)
    for k in range(K):
        walk = _walk(k, directions, order, height, width)
        rows, columns = zip(*walk, strict=True)
        features = feats[:, k, :, rows, columns].to(dtype)  # (B, R + 2N, L)
        own = slice(k * channels, (k + 1) * channels)
        y = selective_scan(
            x[:, :, rows, columns].to(dtype),
            torch.einsum("dr,brl->bdl", dt_weight[k].to(dtype), features[:, :R]),
            A[own],
            features[:, None, R : R + N],
            features[:, None, R + N :],
            delta_bias=None if delta_bias is None else delta_bias[own],
            delta_softplus=delta_softplus,
        )
        for t, (row, column) in enumerate(walk):
            out[:, :, row, column] += y[:, :, t]
    if D is not None:
        out = out + D.to(dtype)[:, None, None] * x.to(dtype)
    return out.to(out_dtype or x.dtype)


def broadcast_add(y: Tensor, u: Tensor, D: Tensor | None, out_dtype: torch.dtype | None = None) -> Tensor:
    """y (B, K, 1, L) copied to all channels of its group; u (B, K*D, L); D (K*D,). Returns y + D*u, (B, K*D, L)."""
    dtype = _compute_dtype(u)
    out = y.to(dtype)[:, :, 0].repeat_interleave(u.shape[1] // y.shape[1], dim=1)
    if D is not None:
        out = out + D.to(dtype)[:, None] * u.to(dtype)
    return out.to(out_dtype or u.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _walk(k: int, directions: list[int], order: Tensor | None, height: int, width: int) -> list[tuple[int, int]]:
    """The (row, column) that direction k reads at each step."""
    if order is not None:
        return [divmod(int(position), width) for position in order[k]]
    code, length = directions[k], height * width
    walk = []
    for t in range(length):
        s = length - 1 - t if code & 2 else t
        minor_length = height if code & 1 else width
        major, minor = divmod(s, minor_length)
        if code & 4:
            minor = minor_length - 1 - minor
        walk.append((minor, major) if code & 1 else (major, minor))
    return walk
