"""The command line, run in this process: what it prints, what it writes, and one line instead of a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vmeanba_fx
from tests.helpers import make_scan_matter, relative_error
from vmeanba_fx.cli import bench, bench_kernels, main
from vmeanba_fx.cli.arguments import ModelSpec
from vmeanba_fx.models import save_checkpoint, vmamba_digits

BY_NAME = "vmamba_digits(depths=[1, 2], dims=[8, 12])"
ROOT = Path(__file__).resolve().parent.parent
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


def tiny():
    return make_scan_matter(vmamba_digits(depths=(1, 2), dims=(8, 12))).eval()


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


def run(capsys, *argv):
    """(exit code, standard output, standard error) of one command."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *argv):
    """The one line an unsuccessful command prints."""
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("vmeanba-fx: error: ")]
    assert code == 1 and set(out.splitlines()) <= {"hello from the model"}
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


# -- find --------------------------------------------------------------------------------------------------------------


def test_find_lists_every_site(capsys, spec, data):
    code, out, _ = run(capsys, "find", "--model", spec, "--data", data)
    assert code == 0
    for name in ("layers.0.blocks.0.op", "layers.1.blocks.0.op", "layers.1.blocks.1.op"):
        assert name in out
    assert out.rstrip().endswith("3 sites")


def test_json_is_one_object_whatever_the_model_prints(capsys, spec, data):
    code, out, err = run(capsys, "find", "--model", spec, "--data", data, "--json")
    found = json.loads(out)
    assert code == 0 and "hello from the model" in err
    assert [s["name"] for s in found["sites"]] == [
        "layers.0.blocks.0.op", "layers.1.blocks.0.op", "layers.1.blocks.1.op"
    ]  # fmt: skip
    assert [(s["groups"], s["channels"], s["length"]) for s in found["sites"]] == [(4, 8, 64), (4, 12, 16), (4, 12, 16)]


def test_json_of_a_failed_command_is_an_object_too(capsys, spec):
    code, out, err = run(capsys, "find", "--model", spec, "--data", "missing.npz", "--json")
    assert code == 1 and "no such file" in json.loads(out)["error"] and "no such file" in err


def test_models_by_name_module_and_instance(capsys, tmp_path, spec, data):
    for model in (BY_NAME, f"vmeanba_fx.models:{BY_NAME}", spec.replace("build()", "instance")):
        assert run(capsys, "find", "--model", model, "--data", "random:2,1,32,32")[0] == 0


def test_a_model_without_scans(capsys):
    said = refused(capsys, "find", "--model", "torch.nn:Linear(4, 3)", "--data", "random:2,1,4,4")
    assert "no selective scan" in said


# -- score, apply, export ----------------------------------------------------------------------------------------------


def test_score_writes_the_plan_of_the_python_interface(capsys, tmp_path, spec, data, images):
    out = tmp_path / "plan.json"
    argv = ["score", "--model", spec, "--data", data, "--batch", 5, "--metric", "loss", "--out", out]
    code, text, _ = run(capsys, *argv)
    loader = list(zip(images.split(5), (torch.arange(12) % 10).split(5), strict=True))
    expected = vmeanba_fx.calibrate(tiny(), loader, metric="loss")
    assert code == 0 and "layers.1.blocks.1.op" in text
    assert vmeanba_fx.Plan.load(out).to_dict() == expected.to_dict()


def test_score_in_json(capsys, tmp_path, spec, data):
    argv = ["score", "--model", spec, "--data", data, "--metric", "kl", "--batches", 1, "--batch", 4]
    first = json.loads(run(capsys, *argv, "--out", tmp_path / "a.json", "--json", "--resume", tmp_path / "state")[1])
    again = json.loads(run(capsys, *argv, "--out", tmp_path / "b.json", "--json", "--resume", tmp_path / "state")[1])
    assert sorted(first["order"]) == sorted(first["impacts"]) and first["plan"]["samples"] == 4
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert first["plan"] == again["plan"]


def test_ways_of_scoring_and_choosing(capsys, tmp_path, spec, data):
    """Each option reaches the Python interface; what belongs to scoring is refused with a plan."""
    plan = str(tmp_path / "plan.json")
    options = ["--batch", "4", "--metric", "loss", "--score", "both", "--greedy", "--exclude", "*0.blocks.0*"]
    found = json.loads(run(capsys, "score", "--model", spec, "--data", data, "--out", plan, "--json", *options)[1])
    curve = found["plan"]["curve"]
    assert curve["greedy"] and sorted(curve["order"]) == [[1], [2]] and len(found["drops"]) == 2
    assert len(found["plan"]["estimates"]) == 3 and -1 <= found["correlation"] <= 1
    out = str(tmp_path / "fast.pt2")

    def chosen(*choice):
        return json.loads(run(capsys, "apply", "--model", spec, "--out", out, "--json", *choice)[1])["report"]

    assert len(chosen("--plan", plan, "--max-drop", "100")["chosen"]) == 2
    fast = chosen("--plan", plan, "--speedup", "1.0")
    assert fast["speed"]["asked"] == 1.0 and fast["speed"]["measured"] > 0
    assert len(chosen("--data", data, "--batch", "4", "--max-drop", "100", "--group-by", "module")["chosen"]) == 3
    given = ["apply", "--model", spec, "--plan", plan, "--out", out]
    assert "--greedy belongs to scoring" in refused(capsys, *given, "-k", "1", "--greedy")
    assert "the most that replacing sites reaches is" in refused(capsys, *given, "--speedup", "1000")


def test_apply_writes_a_program_that_equals_the_rewritten_graph(capsys, tmp_path, spec, data, images):
    plan, out = tmp_path / "plan.json", tmp_path / "model.pt2"
    run(capsys, "score", "--model", spec, "--data", data, "--out", plan)
    code, text, _ = run(capsys, "apply", "--model", spec, "--plan", plan, "-k", 2, "--out", out)
    assert code == 0 and "2 sites replaced" in text and "any batch size" in text
    model, found = tiny(), vmeanba_fx.Plan.load(plan)
    expected = found.apply(2, model=model)(images)
    assert relative_error(torch.export.load(out).module()(images), expected) < 1e-6
    assert relative_error(expected, model(images)) > 1e-3, "the scans of this model do not matter: the test is empty"


def test_the_program_carries_its_report_and_plan(capsys, tmp_path, spec, data):
    out = tmp_path / "model.pt2"
    argv = ["apply", "--model", spec, "--data", data, "--out", out]
    argv += ["--sites", "layers.1.*", "--exclude", "*.blocks.1.op"]
    said = json.loads(run(capsys, *argv, "--json")[1])
    extra = {"report.json": "", "plan.json": ""}
    torch.export.load(out, extra_files=extra)
    assert json.loads(extra["report.json"])["chosen"] == said["report"]["chosen"] == ["layers.1.blocks.0.op"]
    assert len(json.loads(extra["plan.json"])["sites"]) == 3
    assert said["bytes"] == out.stat().st_size and said["dynamic_batch"] is True


def test_rank_r_scans_and_refits(capsys, tmp_path, spec, data, images):
    plan, out = tmp_path / "plan.json", tmp_path / "model.pt2"
    run(capsys, "score", "--model", spec, "--data", data, "--out", plan, "--reduce", "rank", "--rank", "2")
    argv = ["apply", "--model", spec, "--plan", plan, "-k", 2, "--out", out, "--refit", "sites"]
    assert "calib_loader" in refused(capsys, *argv)
    code, text, err = run(capsys, *argv, "--calibration", data)
    assert code == 0, err
    assert "2 sites replaced (lossy, rank 2)" in text and "refitted" in text
    expected = vmeanba_fx.Plan.load(plan).apply(2, model=tiny(), refit=True, calib_loader=[images])(images)
    assert relative_error(torch.export.load(out).module()(images), expected) < 1e-4
    assert "--rank belongs to scoring" in refused(capsys, *argv, "--rank", "auto")


def test_export_without_a_choice_changes_nothing(capsys, tmp_path, spec, images):
    out = tmp_path / "model.pt2"
    code, _, _ = run(capsys, "export", "--model", spec, "--data", "random:2,1,32,32", "--out", out)
    with torch.no_grad():
        assert code == 0 and relative_error(torch.export.load(out).module()(images), tiny()(images)) < 1e-5


def test_export_to_onnx(capsys, tmp_path, images):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "model.onnx"
    argv = ["apply", "--model", "vmamba_digits(depths=[1], dims=[8])", "--data", "random:2,1,32,32", "--sites", "*"]
    code, text, _ = run(capsys, *argv, "--out", out, "--format", "onnx")
    assert code == 0 and "(onnx, " in text and "any batch size" in text
    session = onnxruntime.InferenceSession(out)
    assert session.run(None, {session.get_inputs()[0].name: images.numpy()})[0].shape == (12, 10)
    assert "the format of .onnx is onnx" in refused(capsys, *argv, "--out", out)


def test_weights_are_loaded(capsys, tmp_path, images):
    save_checkpoint(tiny(), tmp_path / "tiny.safetensors")
    out = tmp_path / "model.pt2"
    argv = ["export", "--model", BY_NAME, "--weights", tmp_path / "tiny.safetensors", "--out", out]
    assert run(capsys, *argv, "--data", "random:2,1,32,32")[0] == 0
    with torch.no_grad():
        assert relative_error(torch.export.load(out).module()(images), tiny()(images)) < 1e-5


def test_nothing_is_left_where_the_written_program_is_wrong(capsys, tmp_path, spec, monkeypatch):
    out = tmp_path / "model.pt2"
    out.write_text("the old file")
    load = torch.export.load

    class Wrong:
        def __init__(self, path):
            self.inner = load(path).module()

        def module(self):
            return lambda x: self.inner(x) * 1.001

    monkeypatch.setattr(torch.export, "load", Wrong)
    before = sorted(tmp_path.iterdir())
    said = refused(capsys, "export", "--model", spec, "--data", "random:2,1,32,32", "--out", out)
    assert "differs from the graph" in said
    assert out.read_text() == "the old file" and sorted(tmp_path.iterdir()) == before


def test_a_choice_that_does_not_fit_writes_nothing(capsys, tmp_path, spec, data):
    out = tmp_path / "model.pt2"
    argv = ["apply", "--model", spec, "--data", data, "--out", out]
    assert "0 to 3" in refused(capsys, *argv, "-k", 4)
    assert "matches no site" in refused(capsys, *argv, "--sites", "encoder.*")
    assert "matches no site" in refused(capsys, *argv, "-k", 1, "--exclude", "encoder.*")
    assert "max_drop" in refused(capsys, *argv, "--max-drop", "nan")
    assert not out.exists()


def test_a_plan_of_another_model_or_a_damaged_one(capsys, tmp_path, spec, data):
    plan, out = tmp_path / "plan.json", tmp_path / "model.pt2"
    run(capsys, "score", "--model", spec, "--data", data, "--batches", 1, "--out", plan)
    argv = ["apply", "--plan", plan, "-k", 1, "--out", out]
    assert "another model" in refused(capsys, *argv, "--model", spec.replace("build()", "build(dims=[8, 16])"))
    assert "no effect" in refused(capsys, *argv, "--model", spec, "--metric", "kl")
    plan.write_text(plan.read_text()[:100])
    assert "damaged" in refused(capsys, *argv, "--model", spec)
    assert "cannot read" in refused(capsys, "apply", "--plan", tmp_path / "no", "-k", 1, "--out", out, "--model", spec)
    assert not out.exists()


@pytest.mark.parametrize("command", ["score", "apply"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(capsys, tmp_path, command, monkeypatch):
    monkeypatch.setattr("vmeanba_fx.cli.commands.build_model", lambda *_, **__: pytest.fail("the work was begun"))
    argv = [command, "--model", BY_NAME, "--data", "random:2,1,32,32", *(["-k", 1] if command == "apply" else [])]
    assert "there is no folder" in refused(capsys, *argv, "--out", tmp_path / "missing" / "x.pt2")
    assert "is a folder" in refused(capsys, *argv, "--out", tmp_path)
    if command == "apply":
        assert "ends in .pt2" in refused(capsys, *argv, "--out", tmp_path / "model.onnx")


# -- bench -------------------------------------------------------------------------------------------------------------


def test_bench_times_the_model_and_its_rewritten_forms(capsys, spec):
    argv = ["bench", "--model", spec, "--batch", 2, "--size", 32, "--min-time", 0.01, "--device", "cpu"]
    argv += ["--parts", "model"]
    found = json.loads(run(capsys, *argv, "--json")[1])
    assert [r["name"] for r in found["rows"]] == ["original", "k = 0", "k = 1", "k = 3"]
    assert [r["k"] for r in found["rows"]] == [None, 0, 1, 3]
    assert found["environment"]["input"] == [2, 1, 32, 32] and found["rows"][0]["speedup"] == 1.0
    flops = [r["flops"] for r in found["rows"]]
    assert flops[0] == flops[1] > flops[2] > flops[3]
    for row in found["rows"]:
        assert row["milliseconds"] > 0 and row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
        assert row["speedup"] == pytest.approx(found["rows"][0]["milliseconds"] / row["milliseconds"])


def test_bench_under_autocast(capsys, spec):
    argv = ["bench", "--model", spec, "--size", 32, "--min-time", 0.01, "--device", "cpu", "--parts", "model", "-k", 0]
    code, out, _ = run(capsys, *argv, "--autocast", "bfloat16")
    assert code == 0 and "1x1x32x32 float32 under bfloat16 autocast" in out and "k = 0" in out


def test_bench_text_with_data_and_plan(capsys, tmp_path, spec, data):
    plan = tmp_path / "plan.json"
    run(capsys, "score", "--model", spec, "--data", data, "--batches", 1, "--out", plan)
    argv = ["bench", "--model", spec, "--data", data, "--plan", plan, "-k", 1, "--min-time", 0.01, "--device", "cpu"]
    code, out, _ = run(capsys, *argv)
    assert code == 0 and "1x1x32x32" in out and "original" in out and "k = 1" in out and "k = 0" not in out
    assert "one channel us" in out and "kernels of" in out


def test_bench_times_nothing_whose_numbers_are_wrong(capsys, spec, monkeypatch):
    apply = vmeanba_fx.Plan.apply

    def wrong(self, k, **options):
        gm = apply(self, k, **options)
        with torch.no_grad():
            gm.get_parameter(next(n for n, _ in gm.named_parameters() if n.endswith("head.weight"))).mul_(1.01)
        return gm

    monkeypatch.setattr(vmeanba_fx.Plan, "apply", wrong)
    monkeypatch.setattr(bench, "Timer", lambda *_, **__: pytest.fail("a wrong model was timed"))
    argv = ["bench", "--model", spec, "--batch", 2, "--size", 32, "-k", 0, "--device", "cpu"]
    assert "nothing was timed" in refused(capsys, *argv)


def test_bench_of_kernels_and_profile_saved(capsys, tmp_path, spec):
    out = tmp_path / "results"
    argv = ["bench", "--model", spec, "--size", 32, "--min-time", 0.01, "--device", "cpu", "--parts", "kernels", "profile"]
    code, text, _ = run(capsys, *argv, "--out", out)
    assert code == 0 and "1x1x32x32" in text and "one channel us" in text and "kernels of" in text and "original" not in text
    (path,) = out.glob("*.json")
    found = json.loads(path.read_text())
    assert "rows" not in found and sum(row["sites"] for row in found["kernels"]) == 3
    assert all(row["factor"] == pytest.approx(row["full_us"] / row["one_us"]) for row in found["kernels"])
    shares = [row["share"] for row in found["profile"]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert len(list(out.glob("*_kernels.csv"))) == len(list(out.glob("*_profile.csv"))) == len(list(out.glob("*.txt"))) == 1
    pytest.importorskip("matplotlib")
    assert len(list(out.glob("*_profile.png"))) == 1


def test_bench_refuses_a_wrong_kernel(capsys, spec, monkeypatch):
    full = torch.ops.vmeanba_fx.selective_scan
    monkeypatch.setattr(vmeanba_fx.ops, "selective_scan", lambda *args: full(*args) * 1.01)
    monkeypatch.setattr(bench_kernels, "Timer", lambda *_, **__: pytest.fail("a wrong kernel was timed"))
    argv = ["bench", "--model", spec, "--size", 32, "--device", "cpu", "--parts", "kernels"]
    assert "nothing was timed" in refused(capsys, *argv)


def test_bench_refuses_a_block_that_is_not_there(capsys, spec):
    argv = ["bench", "--model", spec, "--size", 32, "--device", "cpu", "--parts", "profile", "--block", "nowhere"]
    assert "no such module" in refused(capsys, *argv)


# -- models, data, usage -----------------------------------------------------------------------------------------------


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
        "pickle.npz": ({"images": np.array([object()], dtype=object)}, "cannot be read"),
        "channels.npz": ({"images": np.zeros((2, 3, 32, 32), np.float32)}, "does not run on the example input"),
        "none.npz": ({"images": np.zeros((0, 1, 32, 32), np.float32)}, "at least one"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / name, **arrays)
        assert message in refused(capsys, *argv, tmp_path / name), name
    (tmp_path / "cut.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:300])
    assert "cannot be read" in refused(capsys, *argv, tmp_path / "cut.npz")


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
