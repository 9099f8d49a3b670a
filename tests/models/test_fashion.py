"""The two Fashion-MNIST models at their published accuracy. Needs files that are not part of the repository."""

import os
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from vmeanba_fx import models
from vmeanba_fx.data import FashionMNIST, accuracy

# Of the first 500 test images, with a margin of three images.
EXPECTED = {"v05": 0.906, "v0": 0.922}


@pytest.mark.slow
@pytest.mark.parametrize("version", EXPECTED)
def test_accuracy_on_the_first_images(version):
    weights, folder = os.environ.get("VMEANBA_FASHION_WEIGHTS"), os.environ.get("VMEANBA_FASHION_DATA")
    if not weights or not folder:
        pytest.skip(
            "set VMEANBA_FASHION_WEIGHTS to the folder of vmamba_v05_fashion96.pt and vmamba_v0_fashion96.pt, and "
            "VMEANBA_FASHION_DATA to the folder of Fashion-MNIST (Debian: dataset-fashion-mnist)"
        )
    model = getattr(models, f"vmamba_fashion_{version}")()
    models.load_checkpoint(model, Path(weights) / f"vmamba_{version}_fashion96.pt")
    images = FashionMNIST(folder, train=False, limit=500)
    assert accuracy(model, DataLoader(images, 50)) >= EXPECTED[version] - 3 / 500
