"""Small models of our own with selective scans inside, and weights with which the scans matter.

``TinyNet`` is a patch embedding, a few ``Block``s and a classifier; a block's mixer is ``SS2D``, a cross scan in K
directions around one scan call. What differs between the models of the tests is how the scan is called (``call``) and
what happens to the merged scan (``after``). Images are 12 x 20 with 4 x 4 patches, so L = 15, and H != W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEIGHT, WIDTH, PATCH = 12, 20, 4
CLASSES = 7


def loop_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False) -> tuple[Tensor, Tensor]:
    """The recurrence, step by step: y (B, K*D, L) and the last state (B, K*D, N), both at least float32."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    B, C = (t[:, None] if t.dim() == 3 else t for t in (B, C))
    channels = u.shape[1] // B.shape[1]
    dt = delta if delta_bias is None else delta + delta_bias.to(dtype)[:, None]
    if softplus:
        dt = F.softplus(dt)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        drive = B[..., t].repeat_interleave(channels, dim=1) * u[:, :, t, None]
        h = torch.exp(step * A) * h + step * drive
        ys.append((h * C[..., t].repeat_interleave(channels, dim=1)).sum(-1))
    y = torch.stack(ys, dim=-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y, h


# The two signatures most public code uses: mamba-ssm's, and VMamba's, whose sixth argument is another one.


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # fmt: skip
    y, state = loop_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y.to(u.dtype), state) if return_last_state else y.to(u.dtype)


def vmamba_scan_fn(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
    y, _ = loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return y if oflex else y.to(u.dtype)


class ScanFunction(torch.autograd.Function):
    """A scan as VMamba's older code has it: an ``autograd.Function`` with an option for its kernel."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
        return vmamba_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus, False)


def cross_scan(x: Tensor, directions: int) -> Tensor:
    """(B, D, H, W) -> (B, K, D, L): rows, columns, and for K = 4 both backwards."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    walks = [rows, columns, rows.flip(-1), columns.flip(-1)]
    return torch.stack(walks[:directions], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, K, D, L) -> (B, D, H, W): every direction put back in place, and their sum."""
    directions = y.shape[1]
    total = y[:, 0].unflatten(-1, (height, width))
    if directions > 1:
        total = total + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
    if directions > 2:
        total = total + y[:, 2].flip(-1).unflatten(-1, (height, width))
        total = total + y[:, 3].flip(-1).unflatten(-1, (width, height)).transpose(2, 3)
    return total


class SS2D(nn.Module):
    """(B, H, W, dim) -> the same. ``call(u, delta, A, B, C, D, bias) -> y`` scans; ``after`` gets y as (B, H, W, D)."""

    def __init__(
        self,
        dim: int,
        *,
        directions: int = 4,
        state: int = 3,
        call: Callable[..., Tensor] | None = None,
        after: nn.Module | None = None,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        inner = inner or dim
        self.directions, self.state, self.rank = directions, state, 2
        self.in_proj = nn.Linear(dim, inner)
        self.x_proj = nn.Parameter(torch.randn(directions, self.rank + 2 * state, inner) * inner**-0.5)
        self.dt_proj = nn.Parameter(torch.randn(directions, inner, self.rank) * self.rank**-0.5)
        self.dt_bias = nn.Parameter(torch.randn(directions * inner) * 0.3 - 1)
        self.A_log = nn.Parameter(torch.randn(directions * inner, state) * 0.3)
        self.D = nn.Parameter(torch.randn(directions * inner) * 0.5)
        self.after = nn.LayerNorm(inner) if after is None else after
        self.out_proj = nn.Linear(inner, dim)
        nn.init.normal_(self.out_proj.weight, std=inner**-0.5)
        self.call = call

    def scan(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        # The signature of a scan, but not the scan: D and the bias come from the module. A trap for the capture step.
        return (self.call or call_s1)(u, delta, A, B, C, self.D, self.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        u = F.silu(self.in_proj(x)).permute(0, 3, 1, 2)
        us = cross_scan(u, self.directions)  # (B, K, D, L)
        features = torch.einsum("bkdl,kcd->bkcl", us, self.x_proj)
        dt, B, C = features.split([self.rank, self.state, self.state], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj)
        y = self.scan(us.flatten(1, 2), delta.flatten(1, 2), -torch.exp(self.A_log), B, C)
        y = cross_merge(y.unflatten(1, (self.directions, -1)), height, width)
        return self.out_proj(self.after(y.permute(0, 2, 3, 1)))


def call_s1(u, delta, A, B, C, D, delta_bias):
    """The default ``call``: mamba-ssm's function through a module global."""
    return selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, True)


class Block(nn.Module):
    """x + op(norm(x)), channels last."""

    def __init__(self, dim: int, op: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return x + self.op(self.norm(x))


class TinyNet(nn.Module):
    """(B, 3, 12, 20) -> (B, 7). One block per entry of ``ops``."""

    def __init__(self, ops: list[nn.Module], dim: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(dim, op) for op in ops)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)
        nn.init.normal_(self.head.weight)  # scores of a size at which metrics tell models apart

    def maps(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class RMSNorm(nn.Module):
    """Normalises without subtracting the mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def tiny(depth: int = 2, *, seed: int = 0, dim: int = 6, **options) -> TinyNet:
    """A ``TinyNet`` in eval mode whose weights depend on ``seed`` alone; ``options`` are those of ``SS2D``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet([SS2D(dim, **options) for _ in range(depth)], dim).eval()


def live(depth: int = 2, **options) -> TinyNet:
    """As :func:`tiny`, but nothing absorbs a channel-constant term behind its scans."""
    return tiny(depth, after=nn.Identity(), **options)


class Dense(TinyNet):
    """(B, 3, 12, 20) -> (B, 7, 3, 5): class scores for every place of the map."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x)).permute(0, 3, 1, 2)


def dense(depth: int = 2, **options) -> Dense:
    """A :func:`live` model of dense scores."""
    model = live(depth, **options)
    model.__class__ = Dense
    return model


def images(batch: int = 2, *, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """(batch, 3, 12, 20), normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def labelled(batches: int = 2, batch: int = 4, *, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Batches of (images, labels)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (images(batch, seed=seed + i), torch.randint(0, CLASSES, (batch,), generator=generator)) for i in range(batches)
    ]


def scan_inputs(
    batch=2, directions=2, channels=3, state=3, length=7, *, dtype=torch.float64, seed=0
) -> dict[str, Tensor]:
    """Arguments of a scan call by name, such that it is a good part of y: u, delta, A, B, C, D, z, delta_bias."""
    g = torch.Generator().manual_seed(seed)
    wide, groups = directions * channels, (batch, directions, state, length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    out = {
        "u": normal(batch, wide, length),
        "delta": normal(batch, wide, length) * 0.5 - 0.5,
        "A": -torch.exp(normal(wide, state) * 0.5),
        "B": normal(*groups),
        "C": normal(*groups),
        "D": normal(wide),
        "z": normal(batch, wide, length),
        "delta_bias": normal(wide) * 0.3,
    }
    return {name: t.to(dtype) for name, t in out.items()}


def without_scan(model: nn.Module, x: Tensor) -> Tensor:
    """Output of ``model`` with every scan deleted and its ``D*u`` kept: how much of the output is due to the scans."""
    saved = [(m, m.call) for m in scanners(model)]
    try:
        for m, _ in saved:
            m.call = lambda u, delta, A, B, C, D, delta_bias: (D[:, None] * u).to(u.dtype)
        with torch.no_grad():
            return model(x)
    finally:
        for m, call in saved:
            m.call = call


def scanners(model: nn.Module) -> Iterator[SS2D]:
    """The ``SS2D`` modules of ``model`` in order."""
    return (m for m in model.modules() if isinstance(m, SS2D))
