"""Scenes for segmentation, composed of Fashion-MNIST images: several objects, overlaps, clutter before and behind.

A scene follows from its number alone, on every device: all random numbers are hashes of it, computed where the images are.
Label 0 is the background, clutter included; label c + 1 is class c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmeanba_fx.data import FASHION_MEAN, FASHION_STD

CLASSES = 11
BEHIND, OBJECTS, BEFORE = 5, 5, 2  # layers; the objects' presence is random
INK = 0.12  # a pixel of an object covers what is below it above this brightness
_MASK = (1 << 32) - 1


def uniform(numbers: Tensor, count: int, start: int = 0) -> Tensor:
    """`count` numbers in [0, 1) for each scene number (n,), int64: (n, count); `start` picks others of its sequence."""
    positions = torch.arange(start, start + count, device=numbers.device)
    x = _mixed(_mixed(numbers)[:, None] ^ ((positions * 0x9E3779B1) & _MASK))
    return (x >> 8).float() / (1 << 24)  # exact: 24 bits, never 1


def _mixed(x: Tensor) -> Tensor:
    """A 32-bit integer hash; every product stays below 2^63."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _MASK
    return (x >> 16) ^ x


def compose(images: Tensor, labels: Tensor, numbers: Tensor, size: int = 96) -> tuple[Tensor, Tensor]:
    """uint8 images (k, 28, 28), labels (k,), scene numbers (n,) -> scenes (n, 1, size, size), maps (n, size, size)."""
    count = len(numbers)
    coarse = 0.45 * uniform(numbers, 25, 1000).view(count, 1, 5, 5)
    canvas = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    grain = uniform(numbers, size * size, 2000).view(count, 1, size, size)
    canvas = (canvas + 0.2 * (grain - 0.5)).clamp(0.0, 1.0)
    target = torch.zeros(count, 1, size, size, dtype=torch.long, device=images.device)
    for layer in range(BEHIND + OBJECTS + BEFORE):
        is_object = BEHIND <= layer < BEHIND + OBJECTS
        draw = uniform(numbers, 10, 20 * layer).unbind(1)
        chosen = (draw[0] * len(labels)).long()
        scale = 0.22 + 0.28 * draw[1] if is_object else 0.08 + 0.14 * draw[1]
        place = _placement(scale, 1.6 * draw[2] - 0.8, 1.6 * draw[3] - 0.8, draw[4] - 0.5, draw[5] < 0.5)
        local = F.affine_grid(place, [count, 1, size, size], align_corners=False)
        inside = (local.abs() <= 1).all(-1)[:, None]
        if not is_object:  # a window of a garment: its texture, not its outline
            local = 0.4 * local + torch.stack(draw[6:8], -1)[:, None, None] - 0.5
        drawn = F.grid_sample(images[chosen][:, None].float() / 255.0, local, align_corners=False)
        covers = (drawn > INK) & inside
        if layer > BEHIND and is_object:  # one object is always there, the others with chance 0.7
            covers = covers & (draw[8] < 0.7)[:, None, None, None]
        canvas = torch.where(covers, drawn * (0.7 + 0.3 * draw[9])[:, None, None, None], canvas)
        label = labels[chosen][:, None, None, None] + 1 if is_object else torch.zeros_like(target)
        target = torch.where(covers, label, target)
    return (canvas - FASHION_MEAN) / FASHION_STD, target[:, 0]


def _placement(scale: Tensor, x: Tensor, y: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """(n, 2, 3) maps from the scene's coordinates in [-1, 1] to the sprite's: turned by `angle`, centred at x, y."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    sign = 1.0 - 2.0 * flip.float()
    first = torch.stack([cos, sin, -(cos * x + sin * y)], -1) * sign[:, None]
    return torch.stack([first, torch.stack([-sin, cos, sin * x - cos * y], -1)], 1)
