"""Files for deployment: each format computes what the graph computes, or says in a sentence why it was not written."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from vmeanba_fx import ExportError, PlanError, SiteError, calibrate, export, load

HAS_ONNX = all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript and onnxruntime")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
LARGER = (16, 20)  # L = 20: more than one chunk of a decomposed scan


def images(batch, dtype=torch.float32):
    return torch.randn(batch, 3, *LARGER, generator=torch.Generator().manual_seed(batch)).to(dtype)


@functools.cache
def planned():
    """(plan, model): an annihilated site and a live one."""
    model = zoo.tiny(2, directions=2, state=2)
    model.blocks[1].op.after = nn.Identity()
    loader = [(images(4), torch.tensor([0, 1, 2, 3]))]
    return calibrate(model, loader, metric="loss"), model


FORMS = {"k=0": {"k": 0}, "one": {"sites": "blocks.0.op"}, "all": {"k": 2}}


@functools.cache
def result(form):
    return planned()[0].apply(**FORMS[form])


def outputs(gm, x):
    with torch.no_grad():
        return gm(x)


# -- pt2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_pt2_gives_back_module_report_and_plan(form, tmp_path):
    gm, path = result(form), tmp_path / "model.pt2"
    written = export(gm, images(3), path)
    assert written.format == "pt2" and written.dynamic_batch and written.batches == (3, 1) and written.error < 1e-5
    assert written.bytes == path.stat().st_size and list(tmp_path.iterdir()) == [path]
    found = load(path)
    for batch in (1, 2, 5):
        assert relative_error(found(images(batch)), outputs(gm, images(batch))) < 1e-5
    assert found.report == vmeanba_fx.report(gm) == vmeanba_fx.report(found.module)
    assert str(found.report) == str(vmeanba_fx.report(gm))
    assert found.plan == planned()[0]
    found.module.train().eval()


def test_a_file_holds_the_example_and_not_the_data_it_is_a_slice_of(tmp_path):
    data = images(2).repeat(500, 1, 1, 1)
    assert export(result("k=0"), data[:2], tmp_path / "model.pt2").bytes < data.nbytes / 4


def test_a_loaded_module_goes_on(tmp_path):
    """It can be written again, and what is left to replace can be replaced."""
    export(result("one"), None, tmp_path / "one.pt2")
    module = load(tmp_path / "one.pt2").module
    assert [s.name for s in vmeanba_fx.find_sites(vmeanba_fx.transform(planned()[1], [images(2)], k=0, skip_passes=
        ["fuse_ss2d"]))] == ["blocks.0.op", "blocks.1.op"]  # fmt: skip
    export(module, images(2), tmp_path / "two.pt2")
    again = load(tmp_path / "two.pt2")
    assert again.plan == planned()[0] and again.report == vmeanba_fx.report(result("one"))
    assert relative_error(again(images(3)), outputs(result("one"), images(3))) < 1e-5


def test_models_that_were_not_captured(tmp_path):
    model = zoo.live(1)
    export(model, zoo.images(2), tmp_path / "model.pt2")
    found = load(tmp_path / "model.pt2")
    assert found.report is None and found.plan is None
    assert relative_error(found(zoo.images(4)), outputs(model, zoo.images(4))) < 1e-5
    with pytest.raises(ExportError, match="example_inputs are needed"):
        export(model, None, tmp_path / "model.pt2")


def test_a_program_of_torch_itself_is_loaded_too(tmp_path):
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),))
    torch.export.save(program, tmp_path / "linear.pt2")
    assert load(tmp_path / "linear.pt2")(torch.ones(4, 3)).shape == (4, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pt2_of_other_dtypes(dtype, tmp_path):
    model = zoo.tiny(1, directions=1).to(dtype)
    gm = vmeanba_fx.transform(model, [zoo.images(2, dtype=dtype)], k=0)
    export(gm, None, tmp_path / "model.pt2")
    assert load(tmp_path / "model.pt2")(zoo.images(2, dtype=dtype)).dtype == dtype


def test_keyword_inputs_and_several_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.live(1, directions=1)

        def forward(self, *, left, right=None):
            return {"sum": self.net(left + right), "left": left.mean((1, 2, 3))}

    inputs = {"left": zoo.images(2), "right": zoo.images(2, seed=5)}
    gm = vmeanba_fx.capture(Two(), (), inputs)
    export(gm, inputs, tmp_path / "model.pt2")
    found, expected = load(tmp_path / "model.pt2")(**inputs), gm(**inputs)
    assert all(relative_error(found[k], expected[k]) < 1e-5 for k in ("sum", "left"))
    for wrong in (zoo.images(2), {"left": zoo.images(2)}, {"left": zoo.images(2), "right": 3}):
        with pytest.raises(ExportError, match="example inputs are"):
            export(gm, wrong, tmp_path / "other.pt2")


def test_inputs_of_another_size_are_named(tmp_path):
    gm = vmeanba_fx.capture(zoo.tiny(1, directions=1), zoo.images(2))
    with pytest.raises(ExportError, match=r"not such as the graph takes: \w+\.size\(\)\[3\] == \d+ does not hold"):
        export(gm, zoo.images(2)[..., :-1], tmp_path / "model.pt2")


# -- the plan alone ---------------------------------------------------------------------------------------------------


def test_apply_plan(tmp_path):
    plan, model = planned()
    plan.save(tmp_path / "plan.json")
    gm = vmeanba_fx.apply_plan(model, tmp_path / "plan.json", k=1)
    assert vmeanba_fx.report(gm).chosen == vmeanba_fx.report(plan.apply(1)).chosen
    assert torch.equal(outputs(gm, images(3)), outputs(plan.apply(1), images(3)))
    assert torch.equal(outputs(vmeanba_fx.apply_plan(model, plan, sites="*"), images(2)), outputs(result("all"), images(2)))
    with pytest.raises(PlanError, match="of another model"):
        vmeanba_fx.apply_plan(zoo.tiny(2, seed=3), tmp_path / "plan.json", k=1)
    with pytest.raises(SiteError, match="0 to 2"):
        vmeanba_fx.apply_plan(model, tmp_path / "plan.json", k=3)
    with pytest.raises(PlanError, match="cannot read plan"):
        vmeanba_fx.apply_plan(model, tmp_path / "none.json", k=1)


# -- onnx -------------------------------------------------------------------------------------------------------------


def onnx_ops(path):
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [o.domain for o in model.opset_import] == [""] and model.opset_import[0].version >= 18
    return operators(model.graph), {p.key: p.value for p in model.metadata_props}


def operators(graph):
    """Types of all nodes of an ONNX graph, those in the bodies of its loops included."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [node.op_type for node in graph.node] + [name for body in inner for name in operators(body)]


class OneScan(nn.Module):
    """Steps of every size from 0.01 to 50, so that decays reach from 0.99 to an underflow within a few steps."""

    def forward(self, x):
        """(B, 4, L) -> (B, 4, L)."""
        steps = torch.exp(x * 2).clamp(0.01, 50.0)
        rates = -torch.arange(1.0, 5.0).unsqueeze(1)
        return vmeanba_fx.ops.selective_scan(x, steps, rates, x[:, None, :1], x[:, None, 1:2], delta_softplus=False)


@needs_onnx
def test_onnx_of_long_scans(tmp_path):
    """No operator more for a thousand times the length, and right at 16,384 steps, whatever the decays."""
    import onnxruntime

    found = []
    for length in (12, 16_384):
        x = torch.randn(2, 4, length, generator=torch.Generator().manual_seed(length))
        path = tmp_path / f"{length}.onnx"
        export(OneScan(), x, path, "onnx")
        found.append(sorted(onnx_ops(path)[0]))
        session = onnxruntime.InferenceSession(path)
        for batch in (x[:1], x):
            [y] = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            assert relative_error(torch.from_numpy(y), OneScan()(batch)) < 1e-4
    assert found[0] == found[1]


@needs_onnx
@pytest.mark.parametrize("form", ["k=0", "all"])
def test_onnx(form, tmp_path):
    import onnxruntime

    gm, path = result(form), tmp_path / "model.onnx"
    written = export(gm, images(2), path, "onnx")
    assert written.dynamic_batch and written.error < 1e-4 and list(tmp_path.iterdir()) == [path]
    ops, notes = onnx_ops(path)
    assert not {"Loop", "If"} & set(ops)
    assert json.loads(notes["vmeanba_fx.report.json"])["chosen"] == list(vmeanba_fx.report(gm).chosen)
    session = onnxruntime.InferenceSession(path)
    described = [(v.name, v.shape[0]) for v in (*session.get_inputs(), *session.get_outputs())]
    assert described == [("x", "batch"), ("output", "batch")]
    for batch in (1, 4):
        [found] = session.run(["output"], {"x": images(batch).numpy()})
        assert relative_error(torch.from_numpy(found), outputs(gm, images(batch))) < 1e-4


class CallsItsInputOutput(nn.Module):
    def __init__(self, returns_it):
        super().__init__()
        self.net, self.returns_it = zoo.live(1), returns_it

    def forward(self, output):
        return (self.net(output), output) if self.returns_it else self.net(output)


@needs_onnx
@pytest.mark.parametrize("returns_it", [True, False])
def test_onnx_inputs_keep_their_names(returns_it, tmp_path):
    import onnxruntime

    export(CallsItsInputOutput(returns_it), zoo.images(3), tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    first, *others = [v.name for v in session.get_outputs()]
    assert [v.name for v in session.get_inputs()] == ["output"] and others == ["output"] * returns_it
    assert first == "output_0" if returns_it else first != "output"


@needs_onnx
def test_an_annihilated_model_is_small_in_onnx(tmp_path):
    """Nothing of its scans is left: no product of decays, no exponential."""
    model = zoo.tiny(1, directions=2)
    export(vmeanba_fx.transform(model, [images(2)], sites="*"), None, tmp_path / "model.onnx", "onnx")
    ops, _ = onnx_ops(tmp_path / "model.onnx")
    assert len(ops) < 40 and not {"Exp", "Softplus", "Scan"} & set(ops)


@needs_onnx
def test_onnx_of_what_it_cannot_hold(tmp_path):
    gm = vmeanba_fx.transform(zoo.live(1), [zoo.images(2)], k=0, dynamic_size=True)
    with pytest.raises(ExportError, match="needs the length of every scan"):
        export(gm, None, tmp_path / "model.onnx", "onnx")
    half = vmeanba_fx.transform(zoo.live(1, directions=1).bfloat16(), [zoo.images(2, dtype=torch.bfloat16)], k=0)
    with pytest.raises(ExportError, match="onnx file"):
        export(half, None, tmp_path / "model.onnx", "onnx")
    counts = nn.ModuleList([zoo.live(1)])
    counts.forward = lambda x: {"scores": counts[0](x), "classes": 7, "loss": None}
    with pytest.raises(ExportError, match="the model returns 7 beside its tensors"):
        export(counts, zoo.images(2), tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_missing_packages(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(ExportError, match=r"needs onnxscript, not installed here: pip install 'vmeanba-fx\[onnx\]'"):
        export(result("all"), None, tmp_path / "model.onnx", "onnx")


# -- aoti -------------------------------------------------------------------------------------------------------------

LOADER = Path(__file__).parent / "aoti_loader.cpp"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """An AOTInductor package of a model with a full scan in it, and its graph."""
    folder = tmp_path_factory.mktemp("aoti")
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")  # a run that was killed may have left half a library
    gm = vmeanba_fx.transform(zoo.tiny(1, directions=1, state=1), [images(2)], k=0)
    try:
        written = export(gm, None, folder / "model.pt2", "aoti")
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR") if cache is None else os.environ.update(TORCHINDUCTOR_CACHE_DIR=cache)
    assert written.error < 1e-4 and written.dynamic_batch
    return folder / "model.pt2", gm


@pytest.mark.slow
@needs_compiler
def test_aoti_in_python(package):
    path, gm = package
    module = torch._inductor.aoti_load_package(str(path))
    for batch in (1, 5):
        assert relative_error(module(images(batch)), outputs(gm, images(batch))) < 1e-5
    assert json.loads(module.get_metadata()["vmeanba_fx.report.json"])["chosen"] == []
    with pytest.raises(ExportError, match="AOTInductor package, which is machine code"):
        load(path)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="looks for Python in /proc/self/maps")
def test_aoti_in_a_process_without_python(package, tmp_path):
    path, gm = package
    root = Path(torch.__file__).parent
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    command = ["g++", "-std=c++20", "-O0", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", str(LOADER), "-o", str(tmp_path / "loader")]
    command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}"]
    command += [f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    x = images(3)
    (tmp_path / "x").write_bytes(x.numpy().tobytes())
    argv = [str(tmp_path / "loader"), str(path), str(tmp_path / "x"), str(tmp_path / "y"), *map(str, x.shape)]
    said = subprocess.run(argv, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert said.returncode == 0, said.stderr
    assert "no Python" in said.stdout
    found = torch.frombuffer(bytearray((tmp_path / "y").read_bytes()), dtype=torch.float32).view(3, -1)
    assert relative_error(found, outputs(gm, x)) < 1e-5


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, format, message", [
    ("model.pt2", "tflite", "unknown format 'tflite': choose one of pt2, aoti, onnx"),
    ("model.onnx", "pt2", r"ends in .pt2 \(the format of .onnx is onnx\)"),
    ("model.bin", "pt2", "ends in .pt2"),
    ("none/model.pt2", "pt2", "there is no folder"),
    (".", "pt2", "is a folder"),
    ("x" * 300 + ".pt2", "pt2", "cannot write .*name too long"),
    ("a\0b.pt2", "pt2", "cannot write .*null"),
])  # fmt: skip
def test_targets_that_cannot_be(name, format, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(result("all"), None, tmp_path / name, format)
    assert not list(tmp_path.iterdir())


def test_links_are_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    link, loop = tmp_path / "link.pt2", tmp_path / "loop.pt2"
    link.symlink_to(tmp_path / "folder" / "model.pt2")
    loop.symlink_to(loop)
    export(result("all"), None, link)
    assert link.is_symlink() and load(link).plan == load(tmp_path / "folder" / "model.pt2").plan == planned()[0]
    for read in (load, lambda path: vmeanba_fx.apply_plan(planned()[1], path, k=1)):
        for path in (loop, "a\0b"):
            with pytest.raises(vmeanba_fx.VMeanbaError, match="cannot read"):
                read(path)
    for path in (loop, "a\0b"):
        with pytest.raises(OSError, match="cannot write"):
            planned()[0].save(path)


def test_a_read_only_folder(tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("the old file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ExportError, match="is not writable"):
        export(result("all"), None, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "the old file"


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_a_full_disk(format, tmp_path):
    """The kernel refuses to let files grow, as it does on a full disk but with another errno."""
    suffix = {"pt2": ".pt2", "onnx": ".onnx"}[format]
    path = tmp_path / f"model{suffix}"
    path.write_text("the old file")
    code = f"""
import resource, signal, sys, torch, vmeanba_fx
from tests.exporting import test_export
gm = test_export.result("all")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    vmeanba_fx.export(gm, None, {str(path)!r}, {format!r})
except vmeanba_fx.ExportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"cannot write {path}") or "could not be made" in said.stdout
    assert len(said.stdout.splitlines()) == 1
    assert path.read_text() == "the old file" and list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_where_the_file_is_wrong(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("the old file")
    load_program = torch.export.load

    class Wrong:
        def __init__(self, file):
            self.inner = load_program(file).module()

        def module(self):
            return lambda x: self.inner(x) * 1.001

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(ExportError, match="differs from the graph by"):
        export(result("all"), None, path)
    assert path.read_text() == "the old file" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("the old file")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(result("all"), None, path)
    assert path.read_text() == "the old file" and list(tmp_path.iterdir()) == [path]


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(ExportError, match=r"cannot read .*No such file"):
        load(tmp_path / "none.pt2")
