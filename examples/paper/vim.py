"""A small bidirectional Mamba in the manner of Vision Mamba (Vim): one sequence of patches, two scans, a gate per channel.

Nothing absorbs a channel-constant term behind these scans. Without the short convolution of Mamba, so that the scans alone
mix positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from vmeanba_fx.models.ss2d import initial_scan_parameters
from vmeanba_fx.ops import selective_scan


class Direction(nn.Module):
    """One selective scan of (B, E, L) with its projections, gated by z (B, E, L) where there is one."""

    def __init__(self, inner: int, state: int, rank: int) -> None:
        super().__init__()
        self.state, self.rank = state, rank
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        A_logs, D, *_ = initial_scan_parameters(inner, state, rank)
        self.A_log, self.D = nn.Parameter(A_logs[:inner].clone()), nn.Parameter(D[:inner].clone())
        self.dt_weight = nn.Parameter(torch.randn(inner, rank) * rank**-0.5)
        self.dt_bias = nn.Parameter(torch.empty(inner).uniform_(-4.0, 0.0))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.rank, self.state, self.state], dim=-1)
        return selective_scan(
            x, (dt @ self.dt_weight.T).transpose(1, 2), -torch.exp(self.A_log.float()), B.transpose(1, 2)[:, None],
            C.transpose(1, 2)[:, None], self.D, z, self.dt_bias, True,
        )  # fmt: skip


class VimBlock(nn.Module):
    """x + out_proj(forward scan + backward scan), (B, L, C) -> the same."""

    def __init__(self, dim: int, state: int = 8) -> None:
        super().__init__()
        inner = 2 * dim
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.ahead, self.back = (Direction(inner, state, math.ceil(dim / 16)) for _ in range(2))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(self.norm(x)).transpose(1, 2).chunk(2, dim=1)
        u = nn.functional.silu(u)
        y = self.ahead(u, z) + self.back(u.flip(-1), z.flip(-1)).flip(-1)
        return x + self.out_proj(y.transpose(1, 2))


class Patches(nn.Module):
    """Grey images (B, 1, size, size) -> logits (B, classes), by blocks (B, L, dim) -> the same on the sequence of patches."""

    def __init__(
        self, make_blocks: Callable[[], Iterable[nn.Module]], dim: int, size: int = 32, patch: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, dim))
        self.blocks = nn.Sequential(*make_blocks())
        self.last_norm = nn.LayerNorm(dim)
        self.readout = nn.Linear(dim, classes)

    def tokens(self, x: Tensor) -> Tensor:
        """What the blocks make of the patches, (B, L, dim)."""
        return self.blocks(self.embed(x).flatten(2).transpose(1, 2) + self.place)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.last_norm(self.tokens(x)).mean(1))


class Vim(Patches):
    """See :class:`Patches`."""

    def __init__(self, dim: int = 32, depth: int = 3, **images: int) -> None:
        super().__init__(lambda: (VimBlock(dim) for _ in range(depth)), dim, **images)
