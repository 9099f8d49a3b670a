"""find, score, apply and export: what they print and write, and that nothing is written where they fail."""

import json

import pytest
import torch

import vmeanba_fx
from tests.cli.running import BY_NAME, refused, run, tiny
from tests.helpers import relative_error
from vmeanba_fx.models import save_checkpoint

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
    assert "--calibration DATA" in refused(capsys, *argv)
    assert "a plan of rank-r scans needs" in refused(capsys, *argv[:-2])
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


def test_data_to_fit_to_are_asked_for(capsys, tmp_path, spec, data):
    plan, out = tmp_path / "plan.json", tmp_path / "model.pt2"
    assert run(capsys, "score", "--model", spec, "--data", data, "--batches", 1, "--out", plan)[0] == 0
    argv = ["apply", "--model", spec, "-k", 1, "--out", out]
    assert "--refit needs the calibration data" in refused(capsys, *argv, "--plan", plan, "--refit", "sites")
    assert "--calibration goes with --plan" in refused(capsys, *argv, "--data", data, "--calibration", data)
    assert not out.exists()


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
