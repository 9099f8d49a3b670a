"""The scans in vectorised PyTorch: no Python loop over time, work space of a fixed size.

The implementation on the CPU where Numba is not installed (`cpu_jit` is several times as fast), and for float64. They run on
any device, and CUDA falls back on them where its kernels do not apply (float64, no CuPy). Two ways to compute the same
thing, chosen by shape:

    rows   every channel's states with time innermost, as the inputs lie: for small N, few channels, shared decays
    steps  time outermost, so that one step is a wide vector: for the full scan with N > 2 and many channels

Both write exp(dt A) as exp2(dt (A log2 e)): PyTorch's exp2 is about three times as fast as its exp on x86, and as
accurate.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, cpu_jit
from .library import LIBRARY, empty_map
from .recurrence import scan_rows, scan_steps_
from .tiles import blocks, tiles

LOG2_E = math.log2(math.e)

# Elements of one work-space tensor; four (rows) or two (steps) of them are in use. Found by timing: they stay in cache.
_ROWS_BUDGET = 1 << 18
_STEPS_BUDGET = 3 << 18
# States that advance together in a step (B x K x D x N of a tile), and the fewest for which "steps" is worth it.
_STEP_WIDTH = 49_152
_FEWEST_STATES = 1_024
# Elements of u that "steps" transposes at a time, to time outermost.
_TRANSPOSED_BUDGET = 1 << 20


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 inputs, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None):
    """u, delta, z (B, K*D, L); A (K*D, N); B, C (B, K, N, L); D, delta_bias (K*D,). Returns (B, K*D, L)."""
    checks.check_selective_scan(u, delta, A, B, C, D, z, delta_bias, out_dtype)
    if cpu_jit.usable(u, delta, A, B, C, D, z, delta_bias):
        return cpu_jit.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype or u.dtype)
    K = B.shape[1]

    def grouped(tensor: Tensor | None, dim: int) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(dim, (K, -1))

    out = torch.empty(u.shape, dtype=out_dtype or u.dtype, device=u.device)
    arguments = grouped(u, 1), grouped(delta, 1), grouped(A, 0), B, C, grouped(delta_bias, 0), delta_softplus
    _scan(*arguments, grouped(D, 0), grouped(z, 1), grouped(out, 1))
    return out


def linear_scan(a, b, C):
    """a, C (B, K, N, L); b (B, K, R, N, L). Returns (B, K, R, L)."""
    checks.check_linear_scan(a, b, C)
    if cpu_jit.usable(a, b, C):
        return cpu_jit.linear_scan(a, b, C)
    dtype = compute_dtype(a)
    batch, K, R, N, length = b.shape
    out = torch.empty(batch, K, R, length, dtype=a.dtype, device=a.device)
    for item, group, channel in tiles(batch, K, R, N * length, _ROWS_BUDGET):
        h = scan_rows(a[item, group, None].to(dtype), b[item, group, channel].to(dtype))
        out[item, group, channel] = _read_states(h, C[item, group, None].to(dtype))
    return out


def shared_scan(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None):
    """u (B, K, R, L); delta (B, K, L); A (K, N); B, C (B, K, N, L); delta_bias (K,). Returns (B, K, R, L)."""
    checks.check_shared_scan(u, delta, A, B, C, delta_bias, out_dtype)
    if cpu_jit.usable(u, delta, A, B, C, delta_bias):
        return cpu_jit.shared_scan(u, delta, A, B, C, delta_bias, delta_softplus, out_dtype or u.dtype)
    out = torch.empty(u.shape, dtype=out_dtype or u.dtype, device=u.device)
    bias = None if delta_bias is None else delta_bias[:, None]
    _scan(u, delta[:, :, None], A[:, None], B, C, bias, delta_softplus, None, None, out)
    return out


def broadcast_add(y, u, D, out_dtype=None):
    """y (B, K, 1, L); u (B, K*D, L); D (K*D,). Returns y + D*u, (B, K*D, L)."""
    checks.check_broadcast_add(y, u, D, out_dtype)
    dtype, grouped = compute_dtype(u), (y.shape[1], -1)
    out = empty_map(u, out_dtype or u.dtype)
    channels = out.unflatten(1, grouped)
    if D is None:
        channels.copy_(y)
        return out
    u, D = u.unflatten(1, grouped), D.to(dtype).unflatten(0, grouped)[..., None]
    if out.dtype == u.dtype == dtype:
        torch.addcmul(y.to(dtype), u, D, out=channels)
        return out
    batch, K, each, length = u.shape
    for item, group, channel in tiles(batch, K, each, length, _ROWS_BUDGET):
        terms = y[item, group].to(dtype), u[item, group, channel].to(dtype), D[group, channel]
        channels[item, group, channel] = torch.addcmul(*terms)
    return out


def _scan(u, delta, A, B, C, bias, softplus, D, z, out):
    """Fill `out` (B, K, D, L). u, z (B, K, D, L); delta (B, K, D|1, L); A (K, D|1, N); bias (K, D|1); D (K, D)."""
    batch, K, channels, length = u.shape
    N = A.shape[2]
    own_decay = delta.shape[2] == channels
    states = batch * K * channels * N
    if own_decay and N > 2 and channels >= 8 and states >= _FEWEST_STATES and length > 1:
        _scan_by_steps(u, delta, A, B, C, bias, softplus, D, z, out)
        return
    for item, group, channel in tiles(batch, K, channels, N * length, _ROWS_BUDGET):
        own = channel if own_decay else slice(None)
        x = u[item, group, channel]
        dt = step_size(delta[item, group, own], part(bias, group, own), softplus, u)
        a, b = discretise(dt, x, A[group, own], B[item, group])
        y = _read_states(scan_rows(a, b, spoil=True), C[item, group, None].to(dt.dtype))
        out[item, group, channel] = _with_skip_and_gate(y, x, part(D, group, channel), part(z, item, group, channel))


def part(tensor: Tensor | None, *index: slice) -> Tensor | None:
    """A slice of an optional tensor."""
    return None if tensor is None else tensor[index]


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool, like: Tensor) -> Tensor:
    """softplus?(delta + bias) in the compute dtype of `like`; delta (B, K, D, L), bias (K, D)."""
    dtype = compute_dtype(like)
    dt = torch.empty(delta.shape, dtype=dtype, device=delta.device)
    if bias is None:
        dt.copy_(delta)
    else:
        torch.add(delta.to(dtype), bias.to(dtype)[..., None], out=dt)
    return F.softplus(dt, out=dt) if softplus else dt  # type: ignore[call-arg]  # its stub has no out=


def discretise(dt: Tensor, u: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt A) (B, K, D|1, N, L) and dt B u (B, K, D, N, L); dt (B, K, D|1, L), A (K, D|1, N), B (B, K, N, L)."""
    a = torch.mul(dt[:, :, :, None], (A.to(dt.dtype) * LOG2_E)[..., None])
    torch.exp2(a, out=a)
    b = torch.mul((dt * u.to(dt.dtype))[:, :, :, None], B[:, :, None].to(dt.dtype))
    return a, b


def _read_states(h: Tensor, C: Tensor) -> Tensor:
    """<C, h> over N, spoiling h: h (B, K, D, N, L), C (B, K, 1, N, L)."""
    torch.mul(h, C, out=h)
    return h[:, :, :, 0] if h.shape[3] == 1 else h.sum(3)


def _with_skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) silu(z), spoiling y. All (B, K, D, L) but D (K, D)."""
    if D is not None:
        y.addcmul_(u.to(y.dtype), D[..., None].to(y.dtype))
    if z is not None:
        y.mul_(F.silu(z.to(y.dtype)))
    return y


def _scan_by_steps(u, delta, A, B, C, bias, softplus, D, z, out):
    """`_scan` with time outside channels and states: t_... are (batch items, groups, steps, ...).

    Pairs of batch item and group stay outermost. PyTorch gives each thread a range of the outermost dim, in the
    operations on all steps as in those on one, so that every thread finds its own pairs in its own cache.
    """
    batch, K, channels, length = u.shape
    N, dtype, device = A.shape[2], compute_dtype(u), u.device
    decay = (A.to(dtype) * LOG2_E).transpose(1, 2)  # (K, N, D)
    for item, group, channel in tiles(batch, K, channels, N, _STEP_WIDTH):
        x_tile, delta_tile = u[item, group, channel], delta[item, group, channel]
        b_size, k_size, d_size = x_tile.shape[:3]
        pairs = b_size * k_size
        block = min(length, max(64, _TRANSPOSED_BUDGET // (pairs * d_size)))
        steps = max(1, min(block, _STEPS_BUDGET // (pairs * d_size * N)))
        decay_tile = decay[group, None, :, channel].contiguous()
        state = torch.zeros(b_size, k_size, N, d_size, dtype=dtype, device=device)
        space = torch.empty(2, pairs * steps * N * d_size, dtype=dtype, device=device)

        for now in blocks(length, block):
            x = x_tile[..., now]
            dt = step_size(delta_tile[..., now], part(bias, group, channel), softplus, u)
            t_dt = dt.transpose(2, 3).contiguous()
            t_x = dt.mul_(x).transpose(2, 3).contiguous()
            t_B = B[item, group, :, now].to(dtype).transpose(2, 3).contiguous()
            t_C = C[item, group, :, now].to(dtype).transpose(2, 3).contiguous()
            t_y = torch.empty_like(t_x)
            for some in blocks(t_x.shape[2], steps):
                shape = b_size, k_size, some.stop - some.start, N, d_size
                a, h = (flat[: math.prod(shape)].view(shape) for flat in space)
                torch.mul(t_dt[:, :, some, None], decay_tile, out=a)
                torch.exp2(a, out=a)
                torch.mul(t_x[:, :, some, None], t_B[:, :, some, :, None], out=h)
                a_steps, h_steps = a.unbind(2), h.unbind(2)
                h_steps[0].addcmul_(a_steps[0], state)
                scan_steps_(a_steps, h_steps)
                state.copy_(h_steps[-1])
                read = torch.bmm(t_C[:, :, some].reshape(-1, 1, N), h.view(-1, N, d_size))
                t_y[:, :, some] = read.view(b_size, k_size, -1, d_size)
            y = t_y.transpose(2, 3)
            if D is not None or z is not None:
                y = _with_skip_and_gate(dt.copy_(y), x, part(D, group, channel), part(z, item, group, channel, now))
            out[item, group, channel, now] = y


for _op in (selective_scan, linear_scan, shared_scan, broadcast_add):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
