"""A small stage in the manner of MambaVision: mixers that scan half of their channels, then blocks with attention.

The scan's output is concatenated with the other half and goes into a linear layer, so that the copied one-channel scan has
an effect. The scan runs in one direction, over rows of patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from vim import Direction, Patches


class Mixer(nn.Module):
    """(B, L, C) -> the same. ``conv``: width of the depthwise convolutions before the scan and beside it; 0 for none."""

    def __init__(self, dim: int, state: int, conv: int) -> None:
        super().__init__()
        half = dim // 2
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.convs = nn.ModuleList(
            nn.Conv1d(half, half, conv, padding="same", groups=half, bias=False) if conv else nn.Identity() for _ in range(2)
        )
        self.scan = Direction(half, state, math.ceil(dim / 16))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        halves = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        u, z = (nn.functional.silu(conv(half)) for conv, half in zip(self.convs, halves, strict=True))
        return self.out_proj(torch.cat([self.scan(u), z], dim=1).transpose(1, 2))


class Attention(nn.Module):
    """(B, L, C) -> the same."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(dim), mixer
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(x)


class MambaVision(Patches):
    """See :class:`vim.Patches`."""

    def __init__(
        self, mixers: int = 4, attention: int = 4, conv: int = 3, *, dim: int = 64, state: int = 8, heads: int = 4,
        **images: int,
    ) -> None:  # fmt: skip
        def blocks() -> Iterator[Block]:
            yield from (Block(dim, Mixer(dim, state, conv)) for _ in range(mixers))
            yield from (Block(dim, Attention(dim, heads)) for _ in range(attention))

        super().__init__(blocks, dim, **images)
