"""The examples for real data on tiny generated folders, and the scripts of `examples/paper` on a few images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vmeanba_fx import models
from vmeanba_fx.models import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FASHION = Path("/usr/share/datasets/fashion-mnist")


def run(script, *argv):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "examples" / script, *map(str, argv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(path, generator, size=(40, 50)):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def test_imagenet(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("n01", "n02", "n03"):
            for i in range(2):
                picture(tmp_path / split / label / f"{i}.JPEG", generator)
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(models.vmamba_digits(in_chans=3, num_classes=3), weights)
    out = run(
        "imagenet.py", tmp_path, "--model", "vmamba_digits", "--weights", weights, "--size", 32, "--batch", 3,
        "--workers", 0, "--device", "cpu", "-k", 0, 8,
    )  # fmt: skip
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["k = 0"][3] == rows["original"][1] and "k = 8" in rows
    assert "6 validation images; calibrated on 6 training images" in out


def test_ade20k(tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for split in ("training", "validation"):
        for name, size in (("a", (40, 70)), ("b", (32, 64))):
            picture(tmp_path / "images" / split / f"{name}.jpg", generator, size)
            classes = generator.integers(0, 5, size, dtype=np.uint8)
            path = tmp_path / "annotations" / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(classes).save(path)
    weights = tmp_path / "weights.safetensors"
    model = models.UperNet(models.backbone("vmamba_fashion_v05", in_chans=3), num_classes=4, channels=8)
    model.auxiliary_head = torch.nn.Linear(1, 1)
    save_checkpoint(model, weights)
    out = run(
        "ade20k.py", tmp_path, "--model", "vmamba_fashion_v05", "--weights", weights, "--size", 32, "--classes", 4,
        "--channels", 8, "--batch", 2, "--calibration-images", 1, "--workers", 0, "--device", "cpu", "-k", 0, 10,
    )  # fmt: skip
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["k = 0"][3] == rows["original"][1] and "k = 10" in rows
    assert "2 validation images; calibrated on 1 training images" in out
