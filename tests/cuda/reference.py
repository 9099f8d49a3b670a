"""float64 references for the GPU, fast at L = 65536 where plain loops are not, and helpers of the tests.

The recurrence is solved by recursive doubling, log2(L) passes over whole tensors; it shares nothing with the kernels.
`test_reference.py` holds it against the plain loops of `vmeanba_fx.ops.naive`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


def recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along the last dim, differentiable."""
    length, offset = b.shape[-1], 1
    while offset < length:
        b = torch.cat([b[..., :offset], b[..., offset:] + a[..., offset:] * b[..., :-offset]], -1)
        a = torch.cat([a[..., :offset], a[..., offset:] * a[..., :-offset]], -1)
        offset *= 2
    return b


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    u, delta, A, B, C, D, z, delta_bias = (
        None if t is None else t.double() for t in (u, delta, A, B, C, D, z, delta_bias)
    )
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    per_group = u.shape[1] // B.shape[1]
    y = 0
    for n in range(A.shape[1]):
        read, write = (t[:, :, n].repeat_interleave(per_group, 1) for t in (C, B))
        y = y + read * recurrence(torch.exp(dt * A[:, n, None]), dt * write * u)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z)


def linear_scan(a, b, C) -> Tensor:
    a, b, C = a.double(), b.double(), C.double()
    return sum(recurrence(a[:, :, None, n], b[:, :, :, n]) * C[:, :, None, n] for n in range(a.shape[2]))


def shared_scan(u, delta, A, B, C, delta_bias=None, delta_softplus=False) -> Tensor:
    u, delta, A, B, C = (t.double() for t in (u, delta, A, B, C))
    dt = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    y = 0
    for n in range(A.shape[1]):
        a = torch.exp(dt * A[:, n, None])[:, :, None]
        y = y + C[:, :, None, n] * recurrence(a, (dt * B[:, :, n])[:, :, None] * u)
    return y


def shared_scan2d(u, delta, A, B, C, delta_bias, table, delta_softplus, merge) -> Tensor:
    """`table` (K, L): the flat position of each step."""
    batch, _, rank, height, width = u.shape
    groups = delta.shape[1]
    out = torch.zeros(batch, groups, rank, height * width, dtype=torch.float64, device=u.device)
    for k in range(groups):
        at = table[k].to(u.device).long()
        maps = (u[:, min(k, u.shape[1] - 1)], delta[:, k], B[:, k], C[:, k])
        u_k, delta_k, B_k, C_k = (t.flatten(-2)[..., at].unsqueeze(1) for t in maps)
        bias = None if delta_bias is None else delta_bias[k : k + 1]
        out[:, k, :, at] = shared_scan(u_k, delta_k, A[k : k + 1], B_k, C_k, bias, delta_softplus)[:, 0]
    out = out.unflatten(-1, (height, width))
    return out.sum(1) if merge else out


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Leave NaNs where the next allocations will be: an element that a kernel forgets to write shows."""
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    for _ in range(4):
        torch.full((max(1, size // 4),), float("nan"), device="cuda")
    kept = [torch.full((max(1, size // 4),), float("nan"), device="cuda") for _ in range(2)]
    del kept


def assert_near(out: Tensor, expected: Tensor, tolerance: float) -> None:
    """|out - expected| / |expected| < tolerance, and no NaN or infinity."""
    assert out.shape == expected.shape, (out.shape, expected.shape)
    assert torch.isfinite(out).all(), f"{(~torch.isfinite(out)).sum()} of {out.numel()} elements are not finite"
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def scan_inputs(batch, groups, per_group, states, length, dtype):
    """u, delta, A, B, C, D, z, delta_bias as a trained block has them: steps around 0.1, decays of all speeds."""
    channels = groups * per_group
    return (
        normal(batch, channels, length, dtype=dtype),
        normal(batch, channels, length, dtype=dtype),
        -torch.rand(channels, states, device="cuda") * 2 - 0.01,
        normal(batch, groups, states, length, dtype=dtype),
        normal(batch, groups, states, length, dtype=dtype),
        normal(channels),
        normal(batch, channels, length, dtype=dtype),
        normal(channels) - 2,
    )
