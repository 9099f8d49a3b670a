"""What the experiments share: the trained models, their data, measures and ways of replacement. (Files: results.py.)

The data is one of

    a folder with the four idx files of Fashion-MNIST (Debian and Ubuntu: apt-get install dataset-fashion-mnist),
    beside scikit-learn for the digits; or
    one .npz file with the arrays `fashion_train_images`, `fashion_train_labels`, `digits_train_images`, ... and the same
    with `test`, for machines that have neither.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mambavision import MambaVision
from results import ROOT
from scenes import CLASSES, compose
from torch import Tensor, nn
from vim import Vim

import vmeanba_fx
from vmeanba_fx import models
from vmeanba_fx.data import FASHION_MEAN, FASHION_STD, FashionMNIST, load_digits_images

CHECKPOINTS = Path(os.environ.get("VMEANBA_CHECKPOINTS", Path(__file__).resolve().parent / "checkpoints"))
SHARED = Path(os.environ.get("VMEANBA_WEIGHTS", ROOT.parent / "shared" / "weights"))


# -- models -----------------------------------------------------------------------------------------------------------


def deep() -> nn.Module:
    """VMamba v05 with 20 scan sites, for 96x96 grey images."""
    return models.vmamba_tiny_s1l8(in_chans=1, num_classes=10, depths=(2, 2, 14, 2), dims=32, drop_path_rate=0.1)


def segmentation(ssm_conv: int = 3) -> nn.Module:
    """A VMamba v05 backbone with 10 scan sites under a UperNet head, for 96x96 grey scenes."""
    backbone = models.backbone(
        "vmamba_tiny_s1l8", in_chans=1, depths=(2, 2, 4, 2), dims=32, drop_path_rate=0.1, ssm_conv=ssm_conv
    )
    return models.UperNet(backbone, num_classes=CLASSES, channels=64)


def segmentation_scans() -> nn.Module:
    """The same without the depthwise convolutions of the blocks."""
    return segmentation(ssm_conv=-1)


def scan_only_v05() -> nn.Module:
    """Three v05 blocks without depthwise convolution on 4x4 patches of 32x32: the scans alone mix positions."""
    return models.vmamba_tiny_s1l8(
        in_chans=1, num_classes=10, depths=(3,), dims=(32,), ssm_conv=-1, mlp_ratio=2.0, patchembed_version="v1",
        drop_path_rate=0.0,
    )  # fmt: skip


def scan_only_v0() -> nn.Module:
    """The same of v0's kind: a gate, 16 states, twice the channels inside, no MLP. (v0 itself always has the convolution.)"""
    return models.vanilla_vmamba_tiny(
        in_chans=1, num_classes=10, depths=(3,), dims=(32,), ssm_conv=-1, forward_type="v05", drop_path_rate=0.0
    )


def scan_only_live() -> nn.Module:
    """`scan_only_v05` without the LayerNorm behind the scans: there the one-channel scan has an effect."""
    return models.vmamba_tiny_s1l8(
        in_chans=1, num_classes=10, depths=(3,), dims=(32,), ssm_conv=-1, mlp_ratio=2.0, patchembed_version="v1",
        drop_path_rate=0.0, forward_type="v05_onnone_noz",
    )  # fmt: skip


def scan_only_mambavision() -> nn.Module:
    """MambaVision's mixers without their convolutions, and no attention."""
    return MambaVision(mixers=3, attention=0, conv=0)


# -- data -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def arrays(data: str, kind: str, train: bool) -> tuple[Tensor, Tensor]:
    """All images and labels of a split: "fashion" uint8 (n, 28, 28), or "digits" normalised float (n, 8, 8)."""
    if data.endswith(".npz"):
        split = f"{kind}_{'train' if train else 'test'}"
        with np.load(data) as file:
            return torch.from_numpy(file[f"{split}_images"]).squeeze(1), torch.from_numpy(file[f"{split}_labels"]).long()
    if kind == "digits":
        images, labels = load_digits_images(train, size=8)
        return images[:, 0], labels
    fashion = FashionMNIST(data, train)
    return fashion.images, fashion.labels.long()


def fashion_images(images: Tensor, size: int) -> Tensor:
    """uint8 (n, 28, 28) -> normalised float (n, 1, size, size), on the device of `images`."""
    x = F.interpolate(images[:, None].float() / 255.0, size=(size, size), mode="bilinear", align_corners=False)
    return (x - FASHION_MEAN) / FASHION_STD


def digits_images(images: Tensor, size: int = 32) -> Tensor:
    """Normalised (n, 8, 8) -> (n, 1, size, size)."""
    return F.interpolate(images[:, None], size=(size, size), mode="bilinear", align_corners=False)


HELD_OUT = -1
"""As a seed: training images that are in no calibration set of `SEEDS` with up to `CALIBRATION_IMAGES` images."""
SEEDS, CALIBRATION_IMAGES = (0, 1, 2), 4000


def subset(total: int, count: int, train: bool, seed: int) -> Tensor:
    """Which images: of the test split always the first, of the training split a random choice."""
    if not train:
        return torch.arange(min(count, total))
    if seed == HELD_OUT:
        free = torch.ones(total, dtype=torch.bool)
        for other in SEEDS:
            free[subset(total, CALIBRATION_IMAGES, True, other)] = False
        return free.nonzero()[:count, 0]
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def classification_data(kind: str, size: int) -> Callable[..., tuple[Tensor, Tensor]]:
    def load(data: str, train: bool, count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
        images, labels = arrays(data, kind, train)
        chosen = subset(len(labels), count, train, seed)
        prepare = fashion_images if kind == "fashion" else digits_images
        return prepare(images[chosen].to(device), size), labels[chosen].to(device)

    return load


def scene_data(data: str, train: bool, count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Scenes that no other seed gives and none of training; those of the test split are made from test images only."""
    images, labels = (t.to(device) for t in arrays(data, "fashion", train))
    numbers = torch.arange(1_000_000 * (seed + 2), 1_000_000 * (seed + 2) + count, device=device)
    parts = [compose(images, labels, chunk) for chunk in numbers.split(250)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


# -- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A trained model with its data: `load(data, train, count, seed, device)` gives images and labels."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    weights: Path
    load: Callable[..., tuple[Tensor, Tensor]]
    test_images: int
    measure: str = "accuracy"

    def model(self, device: str) -> nn.Module:
        return models.load_checkpoint(self.build(), self.weights).eval().to(device)


_96, _32 = classification_data("fashion", 96), classification_data("fashion", 32)
TASKS = {
    task.name: task
    for task in (
        Task("v05", "VMamba v05, 10 sites, Fashion-MNIST", models.vmamba_fashion_v05,
             SHARED / "vmamba_v05_fashion96.pt", _96, 10_000),
        Task("v0", "VMamba v0, 10 sites, Fashion-MNIST", models.vmamba_fashion_v0,
             SHARED / "vmamba_v0_fashion96.pt", _96, 10_000),
        Task("deep", "VMamba v05, 20 sites, Fashion-MNIST", deep, CHECKPOINTS / "deep.safetensors", _96, 10_000),
        Task("segmentation", "VMamba v05 + UperNet, 10 sites, scenes", segmentation,
             CHECKPOINTS / "segmentation.safetensors", scene_data, 2_000, "mIoU"),
        Task("segmentation_scans", "VMamba v05 without depthwise convolutions + UperNet, 10 sites, scenes", segmentation_scans,
             CHECKPOINTS / "segmentation_scans.safetensors", scene_data, 2_000, "mIoU"),
        Task("scan_v05_digits", "scans only, v05, digits", scan_only_v05,
             CHECKPOINTS / "scan_v05_digits.safetensors", classification_data("digits", 32), 10_000),
        Task("scan_v0_digits", "scans only, v0 kind, digits", scan_only_v0,
             CHECKPOINTS / "scan_v0_digits.safetensors", classification_data("digits", 32), 10_000),
        Task("scan_v05_fashion", "scans only, v05, Fashion-MNIST", scan_only_v05,
             CHECKPOINTS / "scan_v05_fashion.safetensors", _32, 10_000),
        Task("scan_v0_fashion", "scans only, v0 kind, Fashion-MNIST", scan_only_v0,
             CHECKPOINTS / "scan_v0_fashion.safetensors", _32, 10_000),
        Task("scan_live_digits", "scans only, v05 without out-norm, digits", scan_only_live,
             CHECKPOINTS / "scan_live_digits.safetensors", classification_data("digits", 32), 10_000),
        Task("scan_vim_digits", "scans only, Vim blocks, digits", Vim,
             CHECKPOINTS / "scan_vim_digits.safetensors", classification_data("digits", 32), 10_000),
        Task("scan_mambavision_digits", "scans only, MambaVision mixers, digits", scan_only_mambavision,
             CHECKPOINTS / "scan_mambavision_digits.safetensors", classification_data("digits", 32), 10_000),
        Task("mambavision_fashion", "MambaVision blocks, 4 scans, Fashion-MNIST", MambaVision,
             CHECKPOINTS / "mambavision_fashion.safetensors", _32, 10_000),
    )
}  # fmt: skip


def pick(names: Iterable[str]) -> list[Task]:
    """The tasks whose weights are here; the others are named."""
    chosen = [TASKS[name] for name in names]
    for task in chosen:
        if not task.weights.is_file():
            print(f"{task.name}: left out, no {task.weights}", file=sys.stderr)
    here = [task for task in chosen if task.weights.is_file()]
    if chosen and not here:
        sys.exit("there is nothing to do without weights")
    return here


@torch.inference_mode()
def confusion(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> Tensor:
    """Counts (classes, classes): rows are labels, columns predictions; of pixels where labels are maps."""
    counts = []
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        logits = model(x)
        classes = logits.shape[1]
        found = torch.bincount((y * classes + logits.argmax(1)).flatten(), minlength=classes**2)
        counts.append(found.view(classes, classes))
    return torch.stack(counts).sum(0).double()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, measure: str = "accuracy", batch: int = 500) -> float:
    """Accuracy or mean intersection over union, in percent."""
    counts = confusion(model, images, labels, batch)
    hits = counts.diagonal()
    if measure == "accuracy":
        return 100 * float(hits.sum() / counts.sum())
    union = counts.sum(0) + counts.sum(1) - hits
    return 100 * float((hits[union > 0] / union[union > 0]).mean())


def batches(images: Tensor, labels: Tensor, batch: int = 125) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(batch), labels.split(batch), strict=True))


# -- variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """How sites are replaced: options of `vmeanba_fx.calibrate`, those of `Plan.apply`, and how a plot draws it."""

    name: str
    calibrate: dict[str, Any]
    apply: dict[str, Any]
    line: str


def _rank(r: int) -> dict[str, Any]:
    return {"reduce": "rank", "rank": r}


_REFIT = {"refit": True}
_OUTPUTS = {"fit": "outputs", "metric": "kl"}
VARIANTS = {
    v.name: v
    for v in (
        Variant("mean", {}, {}, "k.-"),
        Variant("rank1", _rank(1), {}, "C0.--"),
        Variant("rank4", _rank(4), {}, "C1.--"),
        Variant("rank8", _rank(8), {}, "C5.--"),
        Variant("rank16", _rank(16), {}, "C2.--"),
        Variant("mean_refit", {}, _REFIT, "k.:"),
        Variant("rank1_refit", _rank(1), _REFIT, "C0.-"),
        Variant("rank4_refit", _rank(4), _REFIT, "C1.-"),
        Variant("rank8_refit", _rank(8), _REFIT, "C5.-"),
        Variant("rank16_refit", _rank(16), _REFIT, "C2.-"),
        Variant("rank4_refit_all", _rank(4), {"refit": "all"}, "C1.-."),
        Variant("rank8_refit_all", _rank(8), {"refit": "all"}, "C5.-."),
        Variant("rank16_refit_all", _rank(16), {"refit": "all"}, "C2.-."),
        Variant("rank16_outputs_refit_all", _rank(16) | _OUTPUTS, {"refit": "all"}, "C4.-"),
        Variant("best", _rank(16) | _OUTPUTS | {"refitted": True}, {"refit": "all"}, "C6.-"),
        Variant("mean_greedy", {"greedy": True}, {}, "k.-."),
        Variant("rank4_greedy_refit", _rank(4) | {"greedy": True}, _REFIT, "C3.-."),
    )
}
_WORDS = {"refit_all": "refit all", "_outputs": " to outputs", "_": " + "}
SHORT = {
    name: re.sub(r"rank(\d+)", r"rank \1", functools.reduce(lambda text, word: text.replace(*word), _WORDS.items(), name))
    for name in VARIANTS
} | {"mean": "paper's mean", "best": "rank 16 to outputs + refit all, scored refitted"}


def dispensable(plan: vmeanba_fx.Plan) -> list[str]:
    """The exact passes: to accuracy they make no difference. The cheap ones that delete dead scans are not among them."""
    kept = ("drop_annihilated", "cleanup")
    return [r.name for r in vmeanba_fx.report(plan.apply(0)).passes if r.exact and r.name not in kept]


class Study:
    """A task's model, captured once, with calibration images of a seed and the test images, all on the device."""

    def __init__(self, task: Task, args: argparse.Namespace, seed: int = 0, calibration_images: int = 1000) -> None:
        self.task, self.seed = task, seed
        count, tests = (16, 32) if args.quick else (calibration_images, task.test_images)
        self.calibration = batches(*task.load(args.data, True, count, seed, args.device))
        self.test = task.load(args.data, False, tests, 0, args.device)
        self.model = task.model(args.device)
        self.graph = vmeanba_fx.capture(self.model, (self.calibration[0][0][:2],))
        self.base = self.measure(self.model)
        plan = vmeanba_fx.calibrate(self.graph, self.calibration, score_sites=False)
        self.sites = plan.sites
        self._plans: dict[str, vmeanba_fx.Plan] = {}
        self.skipped = dispensable(plan)

    def measure(self, model: nn.Module) -> float:
        return evaluate(model, *self.test, self.task.measure)

    def use_weights(self, state: dict[str, Tensor]) -> None:
        """Other weights for the model and its captured graph; plans made before are forgotten."""
        self.model.load_state_dict(state)
        own = dict(self.graph.named_parameters()) | dict(self.graph.named_buffers())
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                own[name].copy_(value)
        self._plans.clear()

    def plan(self, variant: Variant) -> vmeanba_fx.Plan:
        """Scored with the variant's own replacement; variants that differ in how they are applied share it."""
        key = str(variant.calibrate)
        if key not in self._plans:
            # The curve on held-out images serves `max_drop=` alone; a greedy order is judged by it.
            options: dict[str, Any] = {"metric": "loss", "held_out": "greedy" in variant.calibrate, **variant.calibrate}
            plan = vmeanba_fx.calibrate(self.graph, self.calibration, seed=self.seed, progress=False, **options)
            self._plans[key] = plan
        return self._plans[key]

    def apply(self, variant: Variant, k: int) -> nn.Module:
        return self.plan(variant).apply(k, skip_passes=self.skipped, **variant.apply)
