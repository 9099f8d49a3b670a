"""Mixers with the call structures of public models, written for these tests: other walks over the map, gates, regions.

Each is a ``zoo.SS2D`` whose scans go through ``call``, so that a test can put another implementation in their place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import zoo


class Mixer(zoo.SS2D):
    """``spread`` lays a map (B, D, H, W) out as K sequences (B, K, D, L), ``gather`` puts scanned ones back."""

    def spread(self, u: Tensor) -> Tensor:
        return zoo.cross_scan(u, self.directions)

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        return zoo.cross_merge(y, height, width)

    def scans(self, us: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """us, delta (B, K, D, L); B, C (B, K, N, L) -> y (B, K, D, L)."""
        A = -torch.exp(self.A_log)
        return self.scan(us.flatten(1, 2), delta.flatten(1, 2), A, B, C).unflatten(1, (self.directions, -1))

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        us = self.spread(F.silu(self.in_proj(x)).permute(0, 3, 1, 2))
        features = torch.einsum("bkdl,kcd->bkcl", us, self.x_proj)
        dt, B, C = features.split([self.rank, self.state, self.state], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj)
        y = self.gather(self.scans(us, delta, B, C), height, width)
        return self.out_proj(self.after(y.permute(0, 2, 3, 1)))


class EightWays(Mixer):
    """Rows, columns, both kinds of diagonals, each both ways."""

    def orders(self, height: int, width: int) -> Tensor:
        i = torch.arange(height * width).view(height, width)
        diagonal = sorted(range(height * width), key=lambda p: (p // width + p % width, p))
        other = sorted(range(height * width), key=lambda p: (p // width - p % width, p))
        ways = [i.flatten(), i.t().flatten(), torch.tensor(diagonal), torch.tensor(other)]
        return torch.stack([*ways, *(way.flip(0) for way in ways)])  # (8, L)

    def spread(self, u: Tensor) -> Tensor:
        return u.flatten(2)[:, :, self.orders(*u.shape[2:])].permute(0, 2, 1, 3)

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        back = self.orders(height, width).argsort(-1)
        return sum(y[:, k][..., back[k]] for k in range(8)).unflatten(-1, (height, width))


class Windows(Mixer):
    """Scans through windows of 2 x 2 patches one after another, forwards and backwards; the map is padded to fit."""

    def spread(self, u: Tensor) -> Tensor:
        u = F.pad(u, (0, -u.shape[3] % 2, 0, -u.shape[2] % 2))
        batch, dim, height, width = u.shape
        walk = u.view(batch, dim, height // 2, 2, width // 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(batch, dim, -1)
        return torch.stack([walk, walk.flip(-1)], dim=1)

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        walk = y[:, 0] + y[:, 1].flip(-1)
        tall, wide = math.ceil(height / 2), math.ceil(width / 2)
        full = walk.view(*walk.shape[:2], tall, wide, 2, 2).permute(0, 1, 2, 4, 3, 5)
        return full.reshape(*walk.shape[:2], 2 * tall, 2 * wide)[:, :, :height, :width]


class Tables(Mixer):
    """Walks by index tables, read by ``gather`` and written back by ``scatter`` and into a slice of zeros."""

    def orders(self, height: int, width: int) -> Tensor:
        snake = torch.arange(height * width).view(height, width)
        snake = torch.where(torch.arange(height)[:, None] % 2 == 0, snake, snake.flip(1))
        return torch.stack([snake.flatten(), snake.t().flatten()])  # (2, L)

    def spread(self, u: Tensor) -> Tensor:
        rows, columns = self.orders(*u.shape[2:])
        u = u.flatten(2)
        return torch.stack([u.gather(2, rows.expand(u.shape)), u.mT.index_select(1, columns).mT], dim=1)

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        rows, columns = self.orders(height, width)
        first = torch.zeros_like(y[:, 0]).scatter(2, rows.expand(y[:, 0].shape), y[:, 0])
        second = torch.zeros_like(first)
        second[:, :, columns] = y[:, 1]
        return (first + second).unflatten(-1, (height, width))


class Frames(Mixer):
    """The rows of the map as the frames of a video: walks over (B, D, T, H, W) in three orders."""

    def spread(self, u: Tensor) -> Tensor:
        u = torch.tanh(u[:, :, :, None])
        return torch.stack([u.flatten(2), u.permute(0, 1, 3, 4, 2).flatten(2), u.flatten(2).flip(-1)], dim=1)

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        columns = y[:, 1].unflatten(-1, (1, width, height)).permute(0, 1, 4, 2, 3).flatten(2)
        return (y[:, 0] + columns + y[:, 2].flip(-1)).unflatten(-1, (height, width))


class Sequence(Mixer):
    """One walk, with an axis for its direction in front of the channels."""

    def spread(self, u: Tensor) -> Tensor:
        return torch.tanh(u.flatten(2)[:, None])

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        return y[:, 0].unflatten(-1, (height, width))


class Strided(Mixer):
    """An atrous scan: each of the four directions walks over every second patch, and the merge writes into a buffer."""

    def spread(self, u: Tensor) -> Tensor:
        u = F.pad(u, (0, u.shape[3] % 2, 0, u.shape[2] % 2))
        walks = [
            u[:, :, ::2, ::2].flatten(2),
            u.transpose(2, 3)[:, :, ::2, 1::2].flatten(2),
            u[:, :, ::2, 1::2].flatten(2),
            u.transpose(2, 3)[:, :, 1::2, 1::2].flatten(2),
        ]
        out = u.new_empty(u.shape[0], 4, u.shape[1], walks[0].shape[-1])
        for k, walk in enumerate(walks):
            out[:, k] = walk
        return out

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        tall, wide = math.ceil(height / 2), math.ceil(width / 2)
        out = y.new_empty(y.shape[0], y.shape[2], 2 * tall, 2 * wide)
        out[:, :, ::2, ::2] = y[:, 0].unflatten(-1, (tall, wide))
        out[:, :, 1::2, ::2] = y[:, 1].unflatten(-1, (wide, tall)).transpose(2, 3)
        out[:, :, ::2, 1::2] = y[:, 2].unflatten(-1, (tall, wide))
        out[:, :, 1::2, 1::2] = y[:, 3].unflatten(-1, (wide, tall)).transpose(2, 3)
        return out[:, :, :height, :width].contiguous()


class GatedDirections(Mixer):
    """Each direction is weighted by a gate computed from its own output."""

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        gate = torch.sigmoid(2 * y.mean(-1, keepdim=True).flip(2))  # (B, K, D, 1)
        return super().gather(y * gate, height, width)


class OneByOne(Mixer):
    """One scan call per direction."""

    def scans(self, us: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        A = -torch.exp(self.A_log).unflatten(0, (self.directions, -1))
        D, bias = (t.unflatten(0, (self.directions, -1)) for t in (self.D, self.dt_bias))
        call = self.call or zoo.call_s1
        return torch.stack(
            [
                call(us[:, k], delta[:, k], A[k], B[:, k : k + 1], C[:, k : k + 1], D[k], bias[k])
                for k in range(self.directions)
            ],
            dim=1,
        )


class InAutocast(Mixer):
    """The scans run in a region without autocast."""

    def scans(self, us: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().scans(us.float(), delta.float(), B.float(), C.float())


class Checkpointed(Mixer):
    """Activations of the scans are recomputed in the backward pass."""

    def scans(self, us: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return checkpoint(super().scans, us, delta, B, C, use_reentrant=False)


class KeepsState(EightWays):
    """Builds its orders in the first forward, keeps them, and holds on to the last output."""

    kept: Tensor | None = None
    last: Tensor | None = None

    def orders(self, height: int, width: int) -> Tensor:
        if self.kept is None:
            self.kept = super().orders(height, width)
        return self.kept

    def gather(self, y: Tensor, height: int, width: int) -> Tensor:
        self.last = super().gather(y, height, width)
        return self.last


STRUCTURES = {
    "8 directions": (EightWays, 8),
    "local windows": (Windows, 2),
    "index tables": (Tables, 2),
    "video": (Frames, 3),
    "sequence": (Sequence, 1),
    "strided": (Strided, 4),
    "per-direction gates": (GatedDirections, 4),
    "one call per direction": (OneByOne, 4),
    "autocast region": (InAutocast, 2),
    "checkpoint region": (Checkpointed, 2),
    "state kept": (KeepsState, 8),
}


def build(name: str, *, call=None, after: nn.Module | None = None, depth: int = 2) -> zoo.TinyNet:
    """A ``TinyNet`` of a structure in eval mode; behind its scans follows ``after``, by default nothing (live sites)."""
    mixer, directions = STRUCTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ops = [mixer(6, directions=directions, call=call, after=after or nn.Identity()) for _ in range(depth)]
        return zoo.TinyNet(ops, 6).eval()
