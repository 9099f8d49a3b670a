"""The examples, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import example, write_fashion
from vmeanba_fx.models import save_checkpoint, vmamba_fashion_v05

ROOT = Path(__file__).resolve().parent.parent
FASHION = Path("/usr/share/datasets/fashion-mnist")


def test_readme(tmp_path):
    """The Python block of the README does what it says; it runs in a process of its own, in an empty folder."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    pytest.importorskip("sklearn")
    check = "\nassert torch.equal(program.module()(images[:3]), gm(images[:3]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", block + check]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 sites replaced" in done.stdout and os.listdir(tmp_path) == ["plan.json"]


def rows(output, first):
    """The cells of a printed table's rows that begin with ``first``."""
    return [line.split() for line in output.splitlines() if line.startswith(first)]


@pytest.mark.slow(seconds=90)
def test_quickstart(tmp_path):
    pytest.importorskip("sklearn")
    out = tmp_path / "digits.pt2"
    done = example("quickstart.py", "--out", out)
    assert done.returncode == 0, done.stderr
    (original, again), both = rows(done.stdout, "original"), rows(done.stdout, "k = ")
    assert float(original[1]) >= 97.0 and again[:3] == original[:3]
    sites = len(both) // 2 - 1
    for curve in (both[: sites + 1], both[sites + 1 :]):
        assert [row[2] for row in curve] == [str(k) for k in range(sites + 1)] and sites >= 3
        assert curve[0][3] == original[1], "k = 0 changes the accuracy"
    flops = [float(row[5]) for row in both[: sites + 1]]
    assert flops == sorted(flops, reverse=True) and flops[-1] < flops[0]
    assert float(both[-1][3]) > float(both[sites][3]) + 50, "the fitted scans are no better than the mean"
    assert "equal at batch 64, 1 and 5" in done.stdout
    assert torch.export.load(out).module()(torch.zeros(3, 1, 32, 32)).shape == (3, 10)


@pytest.mark.slow
@pytest.mark.parametrize("k", [-1, 9])
def test_quickstart_refuses_sites_that_do_not_exist(k):
    pytest.importorskip("sklearn")
    done = example("quickstart.py", "--k", k)
    message = f"quickstart.py: k={k}: this model has 8 sites to replace, so k can be 0 to 8"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == message


def test_fashion_mnist_names_what_is_missing(tmp_path):
    weights = tmp_path / "weights.safetensors"
    done = example("fashion_mnist.py", tmp_path, "--weights", weights)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    # The last line: PyTorch may warn before it.
    assert done.stderr.splitlines()[-1] == f"fashion_mnist.py: {weights}: no such checkpoint file"
    save_checkpoint(vmamba_fashion_v05(), weights)
    done = example("fashion_mnist.py", tmp_path, "--weights", weights)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "dataset-fashion-mnist" in done.stderr and str(tmp_path) in done.stderr
    done = example("fashion_mnist.py", tmp_path, "--weights", weights, "--out", tmp_path / "missing" / "out.pt2")
    assert done.returncode == 1 and done.stderr.endswith(f"there is no folder {tmp_path / 'missing'}\n")


@pytest.mark.slow
def test_fashion_mnist_on_any_machine(tmp_path):
    """All of the example, without Debian's data and without trained weights."""
    random = np.random.default_rng(0)
    for stem in ("train", "t10k"):
        write_fashion(tmp_path, random.integers(0, 256, (6, 28, 28)), random.integers(0, 10, 6), stem)
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(vmamba_fashion_v05(), weights)
    out = tmp_path / "fashion.pt2"
    done = example("fashion_mnist.py", tmp_path, "--weights", weights, "--refit", "sites", "--k", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    curve = rows(done.stdout, "k = ")
    assert [row[2] for row in curve] == [str(k) for k in range(11)]
    assert curve[0][3:5] == [rows(done.stdout, "original")[0][1], "+0.00"]
    assert "3 sites replaced" in done.stdout and "equal at batch 6, 1 and 5" in done.stdout
    assert torch.export.load(out).module()(torch.zeros(3, 1, 96, 96)).shape == (3, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "at_least"), [("v05", 80.0), ("v0", 80.0)])
def test_fashion_mnist(model, at_least):
    weights = ROOT.parent / "shared" / "weights" / f"vmamba_{model}_fashion96.pt"
    if not weights.is_file() or not FASHION.is_dir():
        pytest.skip(f"needs {weights.name} in ../shared/weights and Debian's dataset-fashion-mnist")
    argv = [FASHION, "--weights", weights, "--model", model, "--calibration-images", 32, "--test-images", 128]
    done = example("fashion_mnist.py", *argv, "--k", 2)
    assert done.returncode == 0, done.stderr
    curve = rows(done.stdout, "k = ")
    assert len(curve) == 11 and float(curve[0][3]) >= at_least
    assert "equal at batch 64, 1 and 5" in done.stdout
