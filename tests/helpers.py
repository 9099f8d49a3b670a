"""What tests of several parts share. Works on our models and on the official ones alike, by parameter names."""

import copy
import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def make_scan_matter(model: nn.Module, seed: int = 0, out_gain: float = 3.0) -> nn.Module:
    """Draws all weights anew so that the scans carry a good part of the output; returns the model.

    At the official initialisation they carry less than a thousandth, and a test passes whatever the scan computes.
    `out_gain` scales what each SS2D adds to its residual stream.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):  # the order of creation does not matter
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "A_logs":
                states = torch.arange(1, parameter.shape[-1] + 1).log()
                parameter.copy_(states + 0.3 * normal(parameter.shape))
            elif leaf == "Ds":
                parameter.copy_(0.3 + 0.3 * normal(parameter.shape))
            elif leaf == "dt_projs_bias":
                parameter.copy_(-2.0 + 0.5 * normal(parameter.shape))
            elif "x_proj" in name:  # twice the fan-in scale: the scan is quadratic in B and C
                parameter.copy_(2.0 * normal(parameter.shape) * parameter.shape[-1] ** -0.5)
            elif "dt_projs" in name:
                parameter.copy_(0.5 * normal(parameter.shape) * parameter.shape[-1] ** -0.5)
            elif "op.out_proj" in name:
                parameter.copy_(out_gain * normal(parameter.shape) * parameter.shape[-1] ** -0.5)
            elif parameter.ndim >= 2:
                parameter.copy_(normal(parameter.shape) * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_((1.0 if leaf == "weight" else 0.0) + 0.1 * normal(parameter.shape))
    return model


def without_scans(model: nn.Module) -> nn.Module:
    """A copy of a VMamba in which every C is zero: of each scan only the skip D * u is left."""
    model = copy.deepcopy(model)
    module: Any
    for module in model.modules():
        if hasattr(module, "A_logs"):
            weight = module.x_proj_weight if hasattr(module, "x_proj_weight") else module.x_proj.weight
            states = module.A_logs.shape[-1]
            with torch.no_grad():
                weight.view(4, -1, weight.shape[-1])[:, -states:] = 0.0
    return model


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected magnitude."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def agrees(graph, model, *args, bound: float = 1e-5, **kwargs) -> bool:
    """Asserts that a graph gives the model's output: shape, dtype, and numbers up to a relative ``bound``."""
    with torch.no_grad():
        found, expected = graph(*args, **kwargs), model(*args, **kwargs)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = relative_error(found, expected)
    assert error <= bound, error
    return True


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of bytes as an idx file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path, images: np.ndarray, labels: np.ndarray, stem: str = "t10k", packed: bool = True) -> None:
    """The two idx files of one half of Fashion-MNIST, as its site (packed) or Debian's package lays them down."""
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        name = folder / f"{stem}-{kind}-ubyte"
        if packed:
            name.with_name(name.name + ".gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            name.write_bytes(idx_bytes(array))


def example(script: str, *argv: object) -> subprocess.CompletedProcess[str]:
    """A run of a script of ``examples``, in a process of its own."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "examples" / script), *map(str, argv)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
