"""Scenes for segmentation, composed of Fashion-MNIST images: several objects, overlaps, clutter before and behind.

Every scene follows from its seed alone: all random numbers come from a generator on the CPU, the drawing is done on the
device of the images. Label 0 is the background, clutter included; label c + 1 is class c.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vmeanba_fx.data import FASHION_MEAN, FASHION_STD

CLASSES = 11
BEHIND, OBJECTS, BEFORE = 5, 5, 2  # layers; the objects' presence is random
INK = 0.12  # a pixel of an object covers what is below it above this brightness


def compose(images: Tensor, labels: Tensor, count: int, *, seed: int, size: int = 96) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 28, 28), labels (n,) -> scenes (count, 1, size, size), normalised, and maps (count, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    device = images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    canvas = F.interpolate(uniform(0.0, 0.45, 1, 5, 5), size=(size, size), mode="bicubic", align_corners=False)
    canvas = (canvas + uniform(-0.1, 0.1, 1, size, size)).clamp(0.0, 1.0)
    target = torch.zeros(count, 1, size, size, dtype=torch.long, device=device)
    for layer in range(BEHIND + OBJECTS + BEFORE):
        is_object = BEHIND <= layer < BEHIND + OBJECTS
        chosen = torch.randint(len(labels), (count,), generator=generator).to(device)
        sprite = images[chosen][:, None].float() / 255.0
        scale = uniform(0.22, 0.5) if is_object else uniform(0.08, 0.22)
        place = _placement(scale, uniform(-0.8, 0.8), uniform(-0.8, 0.8), uniform(-0.5, 0.5), uniform(0, 1) < 0.5)
        local = F.affine_grid(place, [count, 1, size, size], align_corners=False)
        inside = (local.abs() <= 1).all(-1)[:, None]
        if not is_object:  # a window of a garment: its texture, not its outline
            local = 0.4 * local + uniform(-0.5, 0.5, 1, 1, 2)
        drawn = F.grid_sample(sprite, local, align_corners=False)
        covers = (drawn > INK) & inside
        if layer > BEHIND and is_object:  # one object is always there, the others with chance 0.7
            covers &= uniform(0, 1, 1, 1, 1) < 0.7
        canvas = torch.where(covers, drawn * uniform(0.7, 1.0, 1, 1, 1), canvas)
        label = labels[chosen].long()[:, None, None, None] + 1 if is_object else torch.zeros_like(target)
        target = torch.where(covers, label, target)
    return (canvas - FASHION_MEAN) / FASHION_STD, target[:, 0]


def _placement(scale: Tensor, x: Tensor, y: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """(n, 2, 3) maps from the scene's coordinates in [-1, 1] to the sprite's: turned by `angle`, centred at x, y."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    sign = torch.where(flip, -1.0, 1.0)
    first = torch.stack([cos, sin, -(cos * x + sin * y)], -1) * sign[:, None]
    return torch.stack([first, torch.stack([-sin, cos, sin * x - cos * y], -1)], 1)


def background_share(labels: Tensor) -> float:
    """Share of pixels without an object: what a constant answer would score."""
    return float((labels == 0).double().mean()) if labels.numel() else math.nan
