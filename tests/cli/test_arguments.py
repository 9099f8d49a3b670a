"""What the command line names (models, weights, data, devices), wrong usage, and the program as a process."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vmeanba_fx
from tests.cli.running import refused, run
from vmeanba_fx.cli import main
from vmeanba_fx.cli.arguments import ModelSpec
from vmeanba_fx.models import save_checkpoint, vmamba_digits

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "module", "factory", "args", "kwargs"),
    [
        ("vmamba_tiny_s1l8", "vmeanba_fx.models", "vmamba_tiny_s1l8", (), {}),
        ("a.b:make", "a.b", "make", (), {}),
        ("a.b:Outer.make(1, x=-2.5)", "a.b", "Outer.make", (1,), {"x": -2.5}),
        ("dir/f.py:make(s='a:b(c)', d={'k': [1, (2,)]}, n=None)", "dir/f.py", "make", (),
         {"s": "a:b(c)", "d": {"k": [1, (2,)]}, "n": None}),
        (r"C:\models\f.py:make(True)", r"C:\models\f.py", "make", (True,), {}),
    ],
)  # fmt: skip
def test_model_specs(text, module, factory, args, kwargs):
    spec = ModelSpec.parse(text)
    assert (spec.module, spec.factory, spec.args, spec.kwargs) == (module, factory, args, kwargs)


@pytest.mark.parametrize(
    "text",
    [
        "", "a:", "a:1x", "a:f(", "a:f(x)", "a:f(x=y)", "a:f(**{'x': 1})", "a:f()()", "a:f(lambda: 0)",
        "a:f(open('evaluated', 'w'))", "a:f(x=__import__('os').remove('x'))", "a:f(" + "-" * 5000 + "1)",
    ],
)  # fmt: skip
def test_model_specs_are_never_evaluated(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["find", "--model", text, "--data", "digits"])
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert "Traceback" not in capsys.readouterr().err


def test_models_that_cannot_be_built(capsys, tmp_path, spec):
    def find(model):
        return refused(capsys, "find", "--model", model, "--data", "random:2,1,32,32")

    assert "RuntimeError: no such luck second line" in find(spec.replace("build()", "fails()"))
    assert "has no 'missing'" in find(spec.replace("build()", "missing"))
    said = find("vmamba_tiny")
    assert "has no 'vmamba_tiny', only" in said and "vmamba_tiny_s1l8" in said and "path/to/file.py:FACTORY" in said
    assert find("my_models.py").endswith("name a factory in a file as my_models.py:FACTORY")
    assert "neither a model nor a factory" in find(spec.replace("build()", "number"))
    assert "returns a dict" in find("builtins:dict()")
    assert "no such file" in find(f"{tmp_path / 'other.py'}:build")
    assert "cannot import no_such_module" in find("no_such_module:build")
    assert "did you mean 'depths'" in find("vmamba_digits(depth=[1])")
    (tmp_path / "broken.py").write_text("def build(:\n")
    assert "SyntaxError" in find(f"{tmp_path / 'broken.py'}:build")


def test_debug_shows_the_traceback(spec):
    with pytest.raises(vmeanba_fx.VMeanbaError, match="no such luck"):
        main(["find", "--model", spec.replace("build()", "fails()"), "--data", "random:2,1,32,32", "--debug"])


def test_weights_that_cannot_be_loaded(capsys, tmp_path, spec):
    bad = tmp_path / "weights.safetensors"
    bad.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all.")
    argv = ["find", "--model", spec, "--data", "random:2,1,32,32", "--weights"]
    assert "weights.safetensors: not a readable checkpoint" in refused(capsys, *argv, bad)
    assert "no such checkpoint file" in refused(capsys, *argv, tmp_path / "missing.pt")
    save_checkpoint(vmamba_digits(depths=(1, 1), dims=(8, 12)), bad)
    assert "does not fit" in refused(capsys, *argv, bad)


def test_data_files(capsys, tmp_path, spec, images):
    argv = ["find", "--model", spec, "--data"]
    save_file({"images": images.double()}, tmp_path / "ok.safetensors")
    assert run(capsys, *argv, tmp_path / "ok.safetensors")[0] == 0

    cases = {
        "unlabelled.npz": ({"pictures": images.numpy()}, "holds no 'images'"),
        "bytes.npz": ({"images": images.to(torch.uint8).numpy()}, "floating point"),
        "labels.npz": ({"images": images.numpy(), "labels": np.zeros(5, int)}, "each of the 12 images"),
        "one.npz": ({"images": images.numpy(), "labels": np.array(3)}, "each of the 12 images"),
        "complex.npz": ({"images": images.numpy(), "labels": np.zeros(12, complex)}, "each of the 12 images"),
        "pickle.npz": ({"images": np.array([object()], dtype=object)}, "cannot be read"),
        "channels.npz": ({"images": np.zeros((2, 3, 32, 32), np.float32)}, "does not run on the example input"),
        "none.npz": ({"images": np.zeros((0, 1, 32, 32), np.float32)}, "at least one"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / name, **arrays)
        assert message in refused(capsys, *argv, tmp_path / name), name
    (tmp_path / "cut.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:300])
    assert "cannot be read" in refused(capsys, *argv, tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", images.numpy())
    (tmp_path / "one.npy").rename(tmp_path / "bare.npz")
    assert "not a zip file" in refused(capsys, *argv, tmp_path / "bare.npz")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            for _ in range(65):
                member.write(bytes(2**24))
    assert "compressed to less than 1/100" in refused(capsys, *argv, tmp_path / "bomb.npz")


def test_named_data_sets(capsys, tmp_path, spec):
    pytest.importorskip("sklearn")
    assert run(capsys, "find", "--model", spec, "--data", "digits")[0] == 0
    said = refused(capsys, "find", "--model", spec, "--data", f"fashion-mnist:{tmp_path}")
    assert "dataset-fashion-mnist" in said and str(tmp_path) in said
    assert "--size has no effect" in refused(capsys, "find", "--model", spec, "--data", "digits", "--size", 64)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["guess"],
        ["find", "--model", "vmamba_digits"],
        ["find", "--data", "digits"],
        ["find", "--model", "vmamba_digits", "--data", "images/"],
        ["find", "--model", "vmamba_digits", "--data", "random:2,1,32"],
        ["find", "--model", "vmamba_digits", "--data", "random:2,1,0,32"],
        ["find", "--model", "vmamba_digits", "--data", "digits", "--batch", "0"],
        ["score", "--model", "vmamba_digits", "--data", "digits"],
        ["score", "--model", "vmamba_digits", "--data", "digits", "--out", "x", "--metric", "guess"],
        ["score", "--model", "vmamba_digits", "--data", "digits", "--out", "x", "--reduce", "rank", "--rank", "0"],
        ["apply", "--model", "vmamba_digits", "--data", "digits", "--out", "x.pt2"],
        ["apply", "--model", "vmamba_digits", "-k", "1", "--out", "x.pt2"],
        ["apply", "--model", "vmamba_digits", "--data", "digits", "--plan", "p", "-k", "1", "--out", "x.pt2"],
        ["apply", "--model", "vmamba_digits", "--data", "digits", "-k", "1", "--sites", "*", "--out", "x.pt2"],
        ["apply", "--model", "vmamba_digits", "--data", "digits", "-k", "-1", "--out", "x.pt2"],
        ["export", "--model", "vmamba_digits", "--data", "digits", "--out", "x.pt2", "--format", "exe"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage:") and "Traceback" not in err


def test_devices(capsys, spec):
    argv = ["score", "--model", spec, "--data", "random:2,1,32,32", "--out", "unused.json", "--device"]
    assert "expected cpu, cuda" in refused(capsys, *argv, "tpu")
    assert "expected cpu, cuda" in refused(capsys, *argv, "meta")
    assert "CUDA devices" in refused(capsys, *argv, "cuda:99")


def test_interruption(capsys, spec, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vmeanba_fx.cli.commands.build_model", interrupt)
    code, out, err = run(capsys, "find", "--model", spec, "--data", "digits")
    assert (code, out, err) == (130, "", "vmeanba-fx: interrupted\n")


def test_as_a_process_from_a_checkout():
    """`python -m vmeanba_fx` without an installation, and into a pipe whose reader leaves."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vmeanba_fx"]
    shown = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("find", "score", "apply", "export", "bench"))
    read, write = os.pipe()
    os.close(read)
    argv = [*command, "find", "--model", "vmamba_digits(depths=[1], dims=[8])", "--data", "random:2,1,32,32"]
    left = subprocess.run(argv, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert left.returncode == 0 and "BrokenPipe" not in left.stderr and "Traceback" not in left.stderr
