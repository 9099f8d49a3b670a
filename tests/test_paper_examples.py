"""The examples for real data on tiny generated folders, and the scripts of `examples/paper` on a few images."""

import functools
import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import example
from vmeanba_fx import models
from vmeanba_fx.models import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def run(script, *argv):
    done = example(script, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(script, *argv):
    done = example(script, *argv)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


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

    # Told before the scoring, which takes minutes on real data.
    argv = [tmp_path, "--model", "vmamba_digits", "--weights", weights, "--size", 32, "--workers", 0, "--device", "cpu"]
    assert refused("imagenet.py", *argv, "-k", 9) == "imagenet.py: k=9: this model has 8 sites to replace, so k can be 0 to 8"
    assert "there is no folder" in refused("imagenet.py", *argv, "--plan", tmp_path / "missing" / "plan.json")


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


@pytest.fixture
def scripts(monkeypatch):
    """Runs `main()` of a script of examples/paper in this process, with the given arguments."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))

    def call(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        importlib.import_module(name).main()

    yield call
    for name in [n for n, m in sys.modules.items() if str(ROOT / "examples" / "paper") in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.slow(seconds=40)
def test_paper_scripts(scripts, tmp_path):
    """Every experiment on a few digits: files with provenance, tables and plots."""
    quick = ["--quick", "--device", "cpu", "--out", tmp_path]
    scripts("curves", *quick, "--tasks", "scan_v05_digits", "--seeds", 0, "--variants", "mean", "rank4_refit")
    scripts("channel_statistics", *quick, "--tasks", "scan_v05_digits")
    scripts("pruning", *quick, "--tasks", "scan_v05_digits", "--variants", "mean")
    scripts("receptive_field", *quick, "--tasks", "scan_v05_digits")
    scripts("reductions", *quick, "--tasks", "scan_v05_digits")
    scripts("frontier", *quick, "--tasks", "scan_v05_digits", "--reductions", "mean")
    scripts("gradient_scores", *quick, "--tasks", "scan_v05_digits")
    text = {p.name: p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.md")}
    assert set(text) == {f"{n}.md" for n in (
        "curves_scan-dependent", "channel_statistics", "pruning", "receptive_field", "reductions", "frontier",
        "gradient_scores",
    )}  # fmt: skip
    assert all("examples/paper/" in t and f"torch {torch.__version__}" in t for t in text.values())
    plots = {"curves_scan-dependent.png", "channel_statistics.png", "receptive_field.png", "frontier.png"}
    assert {p.name for p in tmp_path.glob("*.png")} == plots
    # Without depthwise convolutions nothing but the scans carries information from patch to patch.
    lines = [line.split("|") for line in text["receptive_field.md"].splitlines() if line.startswith("| scan")]
    fields = {line[3].strip(): line[4] for line in lines}
    assert float(fields["mean"]) == 0.0 and float(fields["original"]) > 30.0


@pytest.mark.slow
def test_held_out_images_took_no_part_in_calibration(scripts, tmp_path):
    generator = np.random.default_rng(0)
    split = {"images": generator.integers(0, 256, (6000, 28, 28), dtype=np.uint8), "labels": generator.integers(0, 10, 6000)}
    data = tmp_path / "data.npz"
    np.savez(data, **{f"fashion_{where}_{key}": values for where in ("train", "test") for key, values in split.items()})
    argv = ["--quick", "--device", "cpu", "--out", tmp_path, "--data", data, "--tasks", "scan_v05_fashion", "--seeds", 0]
    scripts("held_out", *argv, "--ks", 3)
    table = (tmp_path / "held_out.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if "| difference" in line]
    assert [line[4] for line in lines] == ["0.00"] * 4  # with all sites replaced, scores make no difference

    common = importlib.import_module("common")
    used = {int(i) for seed in common.SEEDS for i in common.subset(6000, common.CALIBRATION_IMAGES, True, seed)}
    free = common.subset(6000, 16, True, common.HELD_OUT).tolist()
    assert len(free) == 16 and not used & set(free)


def test_paper_recipe(scripts, tmp_path, capsys):
    argv = ["--quick", "--device", "cpu", "--out", tmp_path, "--checkpoints", tmp_path, "--only", "scan_v05_digits"]
    scripts("train_scan_dependent", *argv)
    assert "after 2 steps" in capsys.readouterr().out
    assert (tmp_path / "scan_v05_digits.safetensors").is_file() and (tmp_path / "training" / "scan_v05_digits.csv").is_file()


def test_scripts_of_models_at_full_size(scripts, tmp_path, monkeypatch):
    """FLOPs, and what a calibration costs, of a model that is not."""
    small = functools.partial(models.vmamba_digits, in_chans=3, num_classes=1000, depths=(1, 1), dims=(16, 20))
    monkeypatch.setattr(models, "vmamba_tiny_s1l8", small)
    quick = ["--quick", "--device", "cpu", "--out", tmp_path]
    scripts("flops_table", *quick)
    scripts("calibration_cost", *quick, "--variants", "mean", "rank4_refit")
    rows = (tmp_path / "flops.md").read_text(encoding="utf-8").splitlines()
    assert sum("paper's block at all sites" in row for row in rows) == 2 and any("D=16: 81.9 %" in row for row in rows)
    cost = (tmp_path / "calibration_cost.md").read_text(encoding="utf-8")
    assert "| vmamba_tiny_s1l8 | 4 " in " ".join(cost.split()) and "rank 4 + refit" in cost


def test_training_of_the_digits_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    train_digits = importlib.import_module("train_digits")
    images, labels = train_digits.load_digits_images(train=False)
    monkeypatch.setattr(train_digits, "load_digits_images", lambda train: (images[:256], labels[:256]))
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--out", str(tmp_path / "digits.safetensors"), "--epochs", "5"])
    train_digits.main()
    assert "without any scan: " in capsys.readouterr().out
    models.load_checkpoint(models.vmamba_digits(), tmp_path / "digits.safetensors")


def test_scenes_follow_from_their_numbers(scripts):
    scenes = importlib.import_module("scenes")
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    labels = torch.arange(20) % 10
    x, y = scenes.compose(images, labels, torch.tensor([5, 7, 5]), size=48)
    assert x.shape == (3, 1, 48, 48) and y.shape == (3, 48, 48) and int(y.max()) <= 10 and x.isfinite().all()
    assert torch.equal(x[0], x[2]) and torch.equal(y[0], y[2]) and not torch.equal(y[0], y[1])
    drawn = scenes.uniform(torch.arange(2000), 500)
    assert 0 <= float(drawn.min()) and float(drawn.max()) < 1 and abs(float(drawn.mean()) - 0.5) < 1e-3


MODELS = {
    "`v05`": "v05", "`v0`": "v0", "`deep`": "deep", "`segmentation`": "segmentation",
    "`segmentation_scans`": "segmentation_scans", "v05, digits": "scan_v05_digits", "v0 kind, digits": "scan_v0_digits",
    "v05, Fashion-MNIST": "scan_v05_fashion", "v0 kind, Fashion-MNIST": "scan_v0_fashion", "Vim, digits": "scan_vim_digits",
    "MambaVision mixers, digits": "scan_mambavision_digits", "v05 without output norm, digits": "scan_live_digits",
    "MambaVision with convolutions and attention, Fashion-MNIST": "mambavision_fashion",
    "VMamba `v05` (89.68 %)": "v05", "VMamba `v0` (90.73 %)": "v0",
}  # fmt: skip
COLUMNS = {"mean, as published": "mean", "rank 16, fitted to the outputs, refit all": "best"}


@pytest.mark.parametrize(("document", "cells"), [("README.md", 15), ("docs/results/README.md", 180)])
def test_tables_of_documents_are_those_of_the_results(scripts, document, cells):
    """Every number of a table over K, in the documents, is the mean of the seeds in docs/results/curves."""
    common, curves, results = (importlib.import_module(name) for name in ("common", "curves", "results"))
    drops, *_ = curves.collected(ROOT / "docs" / "results")
    columns = {short: name for name, short in common.SHORT.items()} | COLUMNS
    checked, head, model = 0, [], ""
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if len(row) > 2 and row[1] == "sites replaced":
            head = [columns[title] for title in row[2:]]
        elif not row:
            head = []
        elif head and (row[1] == "all" or " of " in row[1]):
            model = MODELS[row[0]] if row[0] else model
            k = max(drops[model]["mean"]) if row[1] == "all" else int(row[1].split(" of ")[0])
            for variant, text in zip(head, row[2:], strict=True):
                if text:
                    assert results.cell(drops[model][variant][k]).split(" ")[0] == text, (model, variant, k)
                    checked += 1
    assert checked >= cells


def test_tables_of_the_results_are_what_the_scripts_make_of_the_files(scripts, tmp_path, monkeypatch):
    folder = shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    written = {path: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    for name in ("README.md", "calibration_cost.md", "flops.md"):  # by hand, and with the measurement itself
        written.pop(folder / name)
    for path in written:
        path.unlink()
    for name in ("channel_statistics", "curves", "frontier", "gradient_scores", "held_out", "pruning", "receptive_field"):
        scripts(name, "--plot-only", "--out", folder)
    scripts("reductions", "--plot-only", "--out", folder)
    monkeypatch.setattr(importlib.import_module("bars"), "RESULTS", folder)
    scripts("bars")
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, path.name


@pytest.mark.parametrize("name", ["deep", "scan_v05_digits", "scan_v0_digits", "scan_live_digits", "scan_vim_digits",
                                  "scan_mambavision_digits", "mambavision_fashion"])  # fmt: skip
def test_trained_models_load(scripts, name):
    common = importlib.import_module("common")
    task = common.TASKS[name]
    assert sum(p.stat().st_size for p in common.CHECKPOINTS.iterdir()) < 40e6
    with torch.no_grad():
        assert task.model("cpu")(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
