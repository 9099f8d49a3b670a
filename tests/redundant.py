"""A model whose sites interact: two carry the same signal, and either alone is enough."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tests import zoo


class Redundant(nn.Module):
    """(B, 3, 12, 20) -> (B, 7). ``first`` and ``second`` are the same; ``third`` adds a little of its own.

    The scan term of a replaced site is constant over channels, and weights that sum to zero make nothing of it.
    """

    def __init__(self, *, gain: float = 20000.0, little: float = 64.0) -> None:
        super().__init__()
        self.gain, self.little = gain, little
        self.embed = nn.Conv2d(3, 6, zoo.PATCH, zoo.PATCH)
        self.first, self.third = (zoo.SS2D(6, directions=2, after=nn.Identity()) for _ in range(2))
        for op in (self.first, self.third):
            with torch.no_grad():
                op.D.zero_()
                op.out_proj.bias.zero_()
                op.out_proj.weight.sub_(op.out_proj.weight.mean(1, keepdim=True))
        self.second = copy.deepcopy(self.first)
        self.head = nn.Linear(6, zoo.CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        first, second, third = (op(x).mean((1, 2)) for op in (self.first, self.second, self.third))
        return self.head(3 * torch.tanh(self.gain * (first + second)) + self.little * third)


def redundant(seed: int = 0) -> Redundant:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Redundant().eval()


def loader(model: nn.Module, batches: int = 4, batch: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches with the labels that the model itself gives."""
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in (zoo.images(batch, seed=10 + i) for i in range(batches))]
