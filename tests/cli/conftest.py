"""A model and a data file as a user has them: a Python file and an ``.npz``."""

import numpy as np
import pytest
import torch

FACTORY = """
from tests.helpers import make_scan_matter
from vmeanba_fx.models import vmamba_digits

def build(depths=(1, 2), dims=(8, 12), in_chans=1):
    print("hello from the model")
    return make_scan_matter(vmamba_digits(depths=depths, dims=dims, in_chans=in_chans))

def fails():
    raise RuntimeError("no such luck\\nsecond line")

number = 3
instance = build()
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "my_models.py").write_text(FACTORY)
    return f"{tmp_path / 'my_models.py'}:build()"


@pytest.fixture
def images():
    return torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def data(tmp_path, images):
    """A file with images and labels."""
    labels = torch.arange(12) % 10
    np.savez(tmp_path / "data.npz", images=images.numpy(), labels=labels.numpy())
    return str(tmp_path / "data.npz")
