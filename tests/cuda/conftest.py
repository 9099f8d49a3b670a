"""The CUDA tests need an NVIDIA GPU and CuPy. On such a machine, one command from the repository root runs them:

    python3 -m pytest tests/cuda

With pytest-xdist, `-n 8` compiles the kernel variants in parallel.
"""

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items):
    reason = None
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif importlib.util.find_spec("cupy") is None:
        reason = "CuPy is not installed"
    for item in items:
        if "tests/cuda" in item.path.as_posix():
            item.add_marker(pytest.mark.cuda)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
