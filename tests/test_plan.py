"""Plans: choosing sites, files that come back the same or are refused with the reason."""

import copy
import json
import os
import stat
import time

import pytest
import torch

import vmeanba_fx
from tests import zoo
from vmeanba_fx import Plan, PlanError, SiteError, calibrate
from vmeanba_fx.calibration.curve import Curve

LOADER = zoo.labelled(2, 4)


@pytest.fixture(scope="module")
def model():
    return zoo.live(4, directions=2, state=1)


@pytest.fixture(scope="module")
def plan(model):
    """Scored by hand, so that the choices below are known: impacts 0.3, -0.1, 0.2 and 0.2.

    On the held-out half the loss with one, two, three and four sites replaced is worse by -0.1, 0.2, 0.15 and 0.7.
    """
    made = calibrate(model, LOADER, metric="loss")
    curve = Curve(((1,), (3,), (2,), (0,)), False, base=2.0, values=(1.9, 2.2, 2.15, 2.7), margins=(0.1,) * 4, samples=4)
    scored = {"base": 1.0, "scores": [1.3, 0.9, 1.2, 1.2], "tiebreaks": [0.5, 0.5, 0.9, 0.1], "curve": curve}
    return Plan(**vars(made) | scored)


NAMES = [f"blocks.{i}.op" for i in range(4)]


def chosen(*indices):
    return [NAMES[i] for i in indices]


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, expected", [(0, ()), (1, (1,)), (2, (1, 3)), (3, (1, 2, 3)), (4, (0, 1, 2, 3))])
def test_k_sites_of_least_impact(plan, k, expected):
    """The smallest impact first; the tie of sites 2 and 3 goes to the smaller shift of the outputs."""
    assert plan.choose(k) == chosen(*expected)
    assert plan.order() == [1, 3, 2, 0]


def test_direction_of_the_metric(plan):
    higher = Plan(**vars(plan) | {"higher_is_better": True})
    assert [round(higher.impact(i), 6) for i in range(4)] == [-0.3, 0.1, -0.2, -0.2]
    assert higher.order() == [0, 3, 2, 1]


@pytest.mark.parametrize("max_drop, expected", [
    (0, (1,)), (0.14, (1,)), (0.16, (1,)), (0.21, (1, 2, 3)), (0.69, (1, 2, 3)), (0.71, (0, 1, 2, 3)),
])  # fmt: skip
def test_max_drop_stops_before_the_held_out_metric_falls_further(plan, max_drop, expected):
    """Two sites cost 0.2 and three 0.15: at 0.16 the walk stops in front of the two, whatever comes behind."""
    assert plan.choose(max_drop=max_drop) == chosen(*expected)


def test_max_drop_needs_measurements_of_sites_together(plan):
    for curve in (None, Curve(plan.curve.order, True, ranked=(1.0,) * 4)):
        without = Plan(**vars(plan) | {"curve": curve})
        with pytest.raises(PlanError, match=r"replaced together on images that were held out.*held_out=True"):
            without.choose(max_drop=1.0)
    with pytest.raises(PlanError, match=r"max_drop= with exclude=: blocks.3.op .* give exclude= to calibrate"):
        plan.choose(max_drop=0.21, exclude="blocks.3.op")
    assert plan.choose(max_drop=0.21, exclude="blocks.0.op") == chosen(1, 2, 3)  # beyond what is replaced anyway


def test_globs(plan):
    assert plan.choose(sites="blocks.1.op") == chosen(1)
    assert plan.choose(sites=["blocks.[03].*"]) == chosen(0, 3)
    assert plan.choose(sites=["blocks.3.op", "blocks.0.op"]) == chosen(0, 3)
    assert plan.choose(sites="*", exclude="blocks.2*") == chosen(0, 1, 3)
    assert plan.choose(2, exclude=["blocks.1.op"]) == chosen(2, 3)
    assert plan.choose(3, exclude=["blocks.1.op"]) == chosen(0, 2, 3)


@pytest.mark.parametrize("options, message", [
    ({"k": 5}, r"k=5: this model has 4 sites to replace, so k can be 0 to 4"),
    ({"k": -1}, r"k=-1: .* k can be 0 to 4"),
    ({"k": 4, "exclude": "blocks.1.op"}, r"this model has 3 sites to replace besides the excluded ones, so k can be 0 to 3"),
    ({"k": 1.0}, r"k=1.0: give a whole number"),
    ({"k": "2"}, r"k='2': give a whole number"),
    ({"k": True}, r"k=True: give a whole number"),
    ({}, "give exactly one of"),
    ({"k": 1, "max_drop": 0.1}, "give exactly one of"),
    ({"k": 1, "sites": "*"}, "give exactly one of"),
    ({"k": 1, "speedup": 1.1}, "give exactly one of"),
    ({"speedup": 0.9}, "speedup=0.9: give a number of at least 1"),
    ({"speedup": float("nan")}, "speedup=nan"),
    ({"speedup": "2x"}, "speedup='2x'"),
    ({"k": 1, "group_by": "stage"}, "group_by='stage': give 'module' or None"),
    ({"sites": "layers.*"}, r"sites: 'layers.\*' matches no site; the sites are blocks.0.op, blocks.1.op"),
    ({"sites": ["blocks.0.op", "blocks.9.op"]}, r"sites: 'blocks.9.op' matches no site"),
    ({"sites": "blocks.1*", "exclude": "blocks.*"}, r"exclude= keeps all that sites= names: blocks.1.op"),
    ({"k": 1, "exclude": "nothing"}, r"exclude: 'nothing' matches no site"),
    ({"max_drop": -0.1}, r"max_drop=-0.1: .* in units of the metric 'loss'"),
    ({"max_drop": float("nan")}, "max_drop=nan"),
    ({"max_drop": float("inf")}, "max_drop=inf"),
    ({"max_drop": True}, "max_drop=True"),
    ({"max_drop": "1%"}, "max_drop='1%'"),
])  # fmt: skip
def test_choices_that_cannot_be_made(plan, options, message):
    with pytest.raises(SiteError, match=message):
        plan.choose(**options)
    with pytest.raises(SiteError, match=message):
        plan.apply(**options)


def test_without_scores_only_names_choose(model):
    plan = calibrate(vmeanba_fx.capture(model, zoo.images()), LOADER, score_sites=False)
    assert plan.base is None and plan.scores == []
    assert plan.choose(0) == [] and plan.choose(4) == NAMES and plan.choose(sites="*.2.*") == chosen(2)
    for options in ({"k": 1}, {"max_drop": 1.0}):
        with pytest.raises(PlanError, match="no scores: calibrate the model first"):
            plan.choose(**options)
    with pytest.raises(PlanError, match="no scores: calibrate the model first"):
        plan.worse(0.5)
    assert "blocks.3.op" in str(plan)


def test_table(plan):
    text = str(plan)
    assert all(word in text for word in (*NAMES, "live", "impact (loss)", "MFLOPs"))
    rows = {line.split()[0]: line.split() for line in plan.table(["blocks.1.op"]).splitlines() if "blocks" in line}
    assert rows["blocks.1.op"][-1] == "replaced" and rows["blocks.0.op"][-1] != "replaced"
    assert rows["blocks.0.op"][6:8] == ["+0.30000", "4"] and rows["blocks.1.op"][6:8] == ["-0.10000", "1"]
    assert "replaced together in the order of their impacts on the other images, on 4 held-out samples" in text
    steps = [line.split() for line in text.splitlines() if "held-out" not in line and line.split()[0] in list("1234")]
    assert steps[1] == ["2", "blocks.3.op", "2.2", "+0.20000", "0.10000"]


# -- files ------------------------------------------------------------------------------------------------------------


def outputs(gm):
    with torch.no_grad():
        return gm(zoo.images(3))


def test_a_loaded_plan_does_the_same(plan, model, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan  # everything but the graph
    assert str(loaded) == str(plan) and loaded.choose(2) == plan.choose(2)
    with pytest.raises(PlanError, match=r"pass the model too, plan.apply\(..., model=model\)"):
        loaded.apply(2)
    assert torch.equal(outputs(loaded.apply(2, model=model)), outputs(plan.apply(2)))
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_a_plan_is_refused_for_another_model(plan, model):
    plan = Plan(**vars(plan) | {"graph": None})

    def refused(other, match):
        with pytest.raises(PlanError, match=match):
            plan.apply(1, model=other)

    refused(zoo.live(3, directions=2, state=1), r"the plan is of another model: it has no site named blocks.3.op")
    refused(zoo.live(4, directions=2, state=1, seed=5), r"of another model \(other weights\): calibrate this one")
    refused(zoo.live(4, directions=2, state=2), r"another model graph, other weights")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    refused(other, r"\(other weights\)")
    other = copy.deepcopy(model)
    other.norm.eps = 1e-3  # the same weights and operators, another constant
    refused(other, r"\(another model graph\)")
    assert plan.apply(1, model=copy.deepcopy(model).train()) is not None


def test_dynamic_sizes_are_remembered(tmp_path):
    model = zoo.live(1)
    plan = calibrate(model, LOADER, metric="loss", dynamic_size=True)
    plan.save(tmp_path / "plan.json")
    gm = Plan.load(tmp_path / "plan.json").apply(1, model=model)
    x = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), plan.apply(1)(x))


def test_another_k_never_scores_again(plan, monkeypatch):
    monkeypatch.setattr("vmeanba_fx.calibration.execute.Executor.run", lambda *a, **k: 1 / 0)
    assert [len(vmeanba_fx.report(plan.apply(k)).chosen) for k in range(5)] == [0, 1, 2, 3, 4]


def written(plan, path, change):
    content = json.loads(json.dumps(plan.to_dict()))
    change(content)
    path.write_text(json.dumps(content))


def assign(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


HOSTILE = {
    "other format": (assign("format", value="pickle"), "its format is 'pickle'"),
    "earlier version": (assign("version", value=1), "its version is 1, of an older release.*calibrate again"),
    "later version": (assign("version", value=3), "its version is 3, this release reads 2"),
    "no version": (lambda c: c.pop("version"), "version"),
    "unknown field": (assign("note", value="x" * 10**6), r"it has unknown fields, \['note'\]"),
    "unknown field without end": (assign("n" * 10**6, value=1), r"it has unknown fields, \['nnn"),
    "no sites": (assign("sites", value=[]), "site names are missing"),
    "sites are text": (assign("sites", value="all"), "sites is a str"),
    "two sites of one name": (assign("sites", 1, "name", value="blocks.0.op"), "not unique"),
    "unknown field of a site": (assign("sites", 0, "__class__", value="os.system"), "missing or unknown fields"),
    "missing field of a site": (lambda c: c["sites"][0].pop("groups"), "missing or unknown fields"),
    "text for a number": (assign("sites", 0, "groups", value="4"), "groups is '4'"),
    "flag for a number": (assign("sites", 0, "length", value=True), "length is True"),
    "site of no state": (assign("sites", 0, "state", value=0), "a site of no size"),
    "site of less than no channels": (assign("sites", 0, "channels", value=-5), "channels is -5"),
    "too few scores": (lambda c: c["scores"].pop(), "3 scores for 4 sites"),
    "too many tiebreaks": (lambda c: c["tiebreaks"].append(0.0), "5 tiebreaks for 4 sites"),
    "infinite score": (assign("scores", 0, value=1e999), "damaged|finite"),
    "score is text": (assign("scores", 0, value="0"), "not a finite number"),
    "infinite base": (lambda c: None, "base is missing or not a finite number"),
    "no base": (assign("base", value=None), "base"),
    "other mean": (assign("mean", value="mode"), "mean='mode'"),
    "mean is a list": (assign("mean", value=["all"]), "mean is a list"),
    "samples are text": (assign("samples", value="8"), "of .8. samples"),
    "less than no samples": (assign("samples", value=-3), "of -3 samples"),
    "metric without end": (assign("metric", value="x" * 10**6), "its metric is 'xxx"),
    "metric that clears the screen": (assign("metric", value="\x1b[2Jloss"), r"its metric is '\\x1b"),
    "site with a hidden name": (assign("sites", 0, "name", value="a\u202eb"), r"name is 'a\\u202eb'"),
    "site of half a character": (assign("sites", 0, "name", value="\ud800"), r"name is '\\ud800'"),
    "site with a name without end": (assign("sites", 0, "name", value="n" * 10**6), "name is 'nnn"),
    "reason that sets the title": (assign("sites", 0, "reason", value="\x1b]0;x\x07"), "reason is"),
    "more groups than any number has": (assign("sites", 0, "groups", value=10**4000), "groups is 1000"),
    "score beyond all": (assign("scores", 0, value=1.7e308), "not a finite number"),
    "interval turned round": (assign("intervals", value=[[1.0, -1.0]] * 4), "the lower one first"),
    "curve of less than no samples": (assign("curve", "samples", value=-1), "samples of the curve"),
    "curve with a negative margin": (assign("curve", "margins", value=[-0.1] * 4), "margin of the curve"),
    "seed that is a flag": (assign("fingerprint", "seed", value=True), "the fingerprint"),
    "options without end": (assign("fingerprint", "options", value={"mean": "x" * 10**6}), "the fingerprint"),
    "options within options": (assign("fingerprint", "options", value={"mean": {}}), "the fingerprint"),
    "input named by a flag": (assign("inputs", 0, "key", value=True), "an input described as"),
    "input of a thousand dims": (assign("inputs", 0, "shape", value=[1] * 1000), "an input described as"),
    "format without end": (assign("format", value="x" * 10**6), "its format is"),
    "refused are pairs of letters": (assign("refused", value=["ab"]), "not a list of names and reasons"),
    "no fingerprint": (assign("fingerprint", value=None), "fingerprint is incomplete"),
    "fingerprint of a list": (assign("fingerprint", "graph", value=[]), "fingerprint is incomplete"),
    "huge input": (assign("inputs", 0, "shape", value=[2**20, 2**20]), "elements"),
    "negative input": (assign("inputs", 0, "shape", value=[-1, 3]), "an input described as"),
    "input of no dtype": (assign("inputs", 0, "dtype", value="load"), "an input described as"),
    "input of unknown form": (assign("inputs", 0, value={"path": "/etc/passwd"}), "an input described as"),
    "input that is an object": (assign("inputs", 0, value={"key": 0, "value": {}}), "an input described as"),
    "too few estimates": (assign("estimates", value=[0.0]), "1 estimates for 4 sites"),
    "interval of one number": (assign("intervals", value=[[0.0]] * 4), "not a pair of finite numbers"),
    "flags are numbers": (assign("apart", value=[0, 1, 0]), "not a list of flags"),
    "too many flags": (assign("apart", value=[True] * 4), "not a list of flags"),
    "unknown group": (assign("group_by", value="stage"), "group_by='stage'"),
    "curve is a list": (assign("curve", value=[]), "a curve with missing or unknown fields"),
    "curve of other sites": (assign("curve", "order", value=[[0], [4]]), "one that is not there"),
    "curve with a site twice": (assign("curve", "order", value=[[0], [0]]), "names a site twice"),
    "curve of flags": (assign("curve", "order", value=[[True], [0]]), "one that is not there"),
    "empty step of the curve": (assign("curve", "order", value=[[]]), "not a list of lists"),
    "curve too short": (assign("curve", "values", value=[1.0]), "values of the curve are not finite numbers"),
    "curve without base": (assign("curve", "base", value=None), "base of the curve is missing"),
    "refused are numbers": (assign("refused", value=[[1, 2]]), "not a list of names and reasons"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_plans_are_refused(plan, tmp_path, name):
    change, message = HOSTILE[name]
    path = tmp_path / "plan.json"
    written(plan, path, change)
    if name == "infinite base":
        path.write_text(path.read_text().replace('"base": 1.0', '"base": 1e999'))
    start = time.process_time()
    with pytest.raises(PlanError, match=message) as error:
        Plan.load(path)
    assert time.process_time() - start < 1 and str(path) in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("content, message", [
    (b"", "damaged"), (b"{", "damaged"), (b"null", "holds a NoneType"), (b"[]", "holds a list"),
    (b'{"base": NaN}', "NaN is not a number"), (b"\xff\xfe", "damaged"), (b"\x80\x04K\x01.", "damaged"),
    (b"[" * 40 + b"]" * 40, "nested more than 32 deep"), (b"[" * 10**6, "nested more than 32 deep"),
    (b'{"a": 1' + b"0" * 10**5 + b"}", "damaged|format"), (b" " * (5 * 2**20), "larger than 4 MiB"),
])  # fmt: skip
def test_files_that_are_no_plans(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_truncated_plans(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    whole = path.read_bytes()
    for size in (1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(PlanError, match="damaged"):
            Plan.load(path)


def test_missing_plan(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read plan .*No such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match=r"cannot read plan .*directory"):
        Plan.load(tmp_path)


def test_paths_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "plan.json", tmp_path / "none" / "plan.json"):
        with pytest.raises(OSError, match=r"cannot write .*plan\.json"):
            plan.save(path)
    with pytest.raises(OSError):
        plan.save(tmp_path)  # a folder
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_read_only_folder(plan, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="cannot write"):
        plan.save(folder / "plan.json")


def test_an_interrupted_save_leaves_the_old_plan(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Plan(**vars(plan) | {"samples": 99}).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_saved_plans_have_the_usual_permissions(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_nested_inputs_cannot_be_described(tmp_path):
    class Nested(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.live(1)

        def forward(self, views):
            return self.net(views["a"] + views["b"])

    model = Nested().eval()

    def batch(raw):
        return vmeanba_fx.Batch(({"a": raw[0], "b": raw[0].flip(0)},), labels=raw[1])

    plan = calibrate(model, LOADER, metric="loss", transform_fn=batch)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"nested inputs.*model=vmeanba_fx.capture"):
        loaded.apply(1, model=model)
    inputs = ({"a": zoo.images(2), "b": zoo.images(2)},)
    gm = loaded.apply(1, model=vmeanba_fx.capture(model, inputs))
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs), plan.apply(1)(*inputs))
