"""The rewritten model: exports, saves, compiles and copies with the same numbers, and can tell how it was made."""

import ast
import copy
import json
import operator
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from vmeanba_fx.passes import Pass, check_graph, run_passes

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from vmeanba_fx import GraphCheckError, Plan, VMeanbaError, calibrate
from vmeanba_fx.graph import MADE_BY, copy_graph, graph_modules

aten = torch.ops.aten
FORMS = {
    "k=0": {"k": 0},
    "some": {"sites": ["blocks.0.op", "blocks.2.op"]},
    "all": {"k": 3},
    "literal": {"sites": ["blocks.0.op", "blocks.1.op"]},  # without the exact passes
}


def gated(u, delta, A, B, C, D, bias):
    return zoo.selective_scan_fn(u, delta, A, B, C, D, u.flip(1), bias, True)


@pytest.fixture(scope="module")
def plan():
    """A plan of a model with an annihilated site, a live one and one with a gate inside the call."""
    model = zoo.tiny(3, directions=2)
    model.blocks[1].op.after = nn.Identity()
    model.blocks[2].op.call = gated
    return calibrate(model, zoo.labelled(2, 4), metric="loss")


@pytest.fixture(scope="module")
def exact(plan):
    """Names of the exact passes: all that run where no site is replaced."""
    records = vmeanba_fx.report(plan.apply(0)).passes
    assert len(records) > 2 and all(r.exact for r in records)
    return [r.name for r in records]


@pytest.fixture(scope="module")
def results(plan, exact):
    """The rewritten graphs by form."""
    return {
        name: plan.apply(**options, skip_passes=exact if name == "literal" else ())
        for name, options in FORMS.items()
    }  # fmt: skip


def export(gm, batch=3):
    return torch.export.export(gm, (zoo.images(batch),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))


def same_outputs(found, gm, bound=1e-5):
    for batch in (2, 5, 1):
        x = zoo.images(batch, seed=batch)
        with torch.no_grad():
            assert relative_error(found(x), gm(x)) <= bound


def test_the_forms_differ(results):
    """Otherwise one test of them would do."""
    x = zoo.images(3)
    outputs = [gm(x) for gm in results.values()]
    for i, y in enumerate(outputs):
        assert all(relative_error(y, other) > 1e-3 for other in outputs[:i])


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # what torch says of any channels-last weight
@pytest.mark.parametrize("form", FORMS)
def test_export_save_load_and_decompose(results, form, tmp_path):
    gm = results[form]
    program = export(gm)
    same_outputs(program.module(), gm)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    same_outputs(loaded.module(), gm)
    same_outputs(loaded.run_decompositions().module(), gm)


def test_an_exported_result_is_a_front_door(results):
    """What was rewritten, exported and read back can be rewritten further; it names the sites as before."""
    gm = results["literal"]
    again = vmeanba_fx.capture(export(gm))
    assert [s.name for s in vmeanba_fx.find_sites(again)] == ["blocks.2.op"]
    same_outputs(again, gm)


@pytest.mark.parametrize("form", FORMS)
def test_compile_takes_the_whole_graph(results, form):
    gm = results[form]
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    same_outputs(compiled, gm)


@pytest.mark.slow(seconds=50)
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compile_with_inductor(results, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a run that was killed may have left half a library
    gm = results["some"]
    torch._dynamo.reset()
    same_outputs(torch.compile(gm, fullgraph=True), gm)


@pytest.mark.parametrize("form", FORMS)
def test_copies_are_independent_and_carry_the_report(results, form):
    gm = results[form]
    other = copy.deepcopy(gm)
    same_outputs(other, gm, bound=0)
    assert vmeanba_fx.report(other) == vmeanba_fx.report(gm)
    x = zoo.images(2)
    before = gm(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(gm(x), before)


def test_a_result_shares_nothing_with_plan_and_other_results(plan):
    x = zoo.images(2)
    first, second = plan.apply(1), plan.apply(1)
    expected = second(x)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(second(x), expected) and torch.equal(plan.apply(1)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_the_models(dtype):
    model = zoo.tiny(1).to(dtype)
    x = zoo.images(3, dtype=dtype)
    for k in (0, 1):
        gm = vmeanba_fx.transform(model, [x], k=k)
        own = {name for name, _ in model.named_parameters()}
        assert gm(x).dtype == dtype and {p.dtype for name, p in gm.named_parameters() if name in own} == {dtype}


def test_modes_can_be_switched(results):
    gm = copy_graph(results["some"])
    x = zoo.images(2)
    expected = gm(x)
    assert not gm.training
    assert torch.equal(gm.train()(x), expected) and torch.equal(gm.eval()(x), expected)


# -- where nodes come from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_new_node_says_which_pass_made_it(plan, results, form):
    old = {(node.op, str(node.target), node.name) for node in plan.graph.graph.nodes}
    names = {record.name for record in vmeanba_fx.report(results[form]).passes}
    new = [n for n in results[form].graph.nodes if (n.op, str(n.target), n.name) not in old]
    assert bool(new) == any(r.changed for r in vmeanba_fx.report(results[form]).passes) or form == "k=0"
    assert {n.meta.get(MADE_BY) for n in new} <= names
    if form == "literal":
        assert {n.meta[MADE_BY] for n in new} == {"mean_scan"}


def test_dump_writes_the_graph_after_each_pass(plan, tmp_path):
    folder = tmp_path / "deep" / "dump"
    gm = plan.apply(2, dump=folder)
    records = vmeanba_fx.report(gm).passes
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [f"{i:02d}_{r.name}.py" for i, r in enumerate(records)]
    assert records[0].name == "mean_scan"
    for file, record in zip(files, records, strict=True):
        text = file.read_text()
        assert text.startswith(f"# {record.name} ({'exact' if record.exact else 'lossy'}): ")
        ast.parse(text)
    assert gm.code.strip() in files[-1].read_text()
    assert "linear_scan" in files[0].read_text()


def test_report(plan, results, exact):
    report = vmeanba_fx.report(results["some"])
    text, found = str(report), report.to_dict()
    assert report.chosen == ("blocks.0.op", "blocks.2.op") == tuple(found["chosen"])
    assert "2 sites replaced (lossy, mean='direction')" in text and "mean_scan (lossy): " in text
    assert all(f"{name} (exact): " in text for name in exact)
    assert found["impacts"] == {s.name: plan.impact(i) for i, s in enumerate(plan.sites)}
    assert json.loads(json.dumps(found)) == found
    sizes = {s.name: (s.flops(), s.flops_replaced()) for s in plan.sites}
    assert report.flops_before == sum(full for full, _ in sizes.values())
    assert report.flops_after == sizes["blocks.0.op"][1] + sizes["blocks.1.op"][0] + sizes["blocks.2.op"][1]
    none = vmeanba_fx.report(results["k=0"])
    assert none.chosen == () and none.flops_after == none.flops_before
    literal = vmeanba_fx.report(results["literal"])
    assert [r.name for r in literal.passes] == ["mean_scan"]
    # Unlike the clean graph, the literal block scans one channel of the annihilated site too.
    (one,) = [s for s in plan.sites if s.name == "blocks.0.op"]
    assert one.flops_replaced() < literal.flops_after - sizes["blocks.1.op"][1] - sizes["blocks.2.op"][0]


def test_a_notebook_shows_tables(plan, results):
    report = vmeanba_fx.report(results["some"])
    assert repr(report) == str(report) and repr(plan) == str(plan)
    assert repr(vmeanba_fx.find_sites(plan.graph)).startswith("site ")


def test_what_was_not_fused_has_the_name_of_its_site():
    model = vmeanba_fx.capture(zoo.tiny(2, directions=4), zoo.images(2), dynamic_size=True)
    gm = vmeanba_fx.transform(model, [zoo.images(2)], sites=["blocks.0.op"])
    assert vmeanba_fx.report(gm).unfused == dict.fromkeys(["blocks.0.op", "blocks.1.op"], "height or width is dynamic")


def test_other_graphs_carry_no_report(plan):
    for gm in (plan.graph, fx.symbolic_trace(nn.ReLU())):
        with pytest.raises(VMeanbaError, match=r"was not made by vmeanba_fx\.transform"):
            vmeanba_fx.report(gm)


# -- checks on passes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_verify_finds_every_pass_exact(plan, form):
    plan.apply(**FORMS[form], verify=True)


def scaled(gm):
    """A pass that calls itself exact and changes the classifier's bias."""
    with torch.no_grad():
        gm.head.bias.add_(0.1)
    gm.graph.create_node("get_attr", "head.bias", name="unused")  # so that it counts as a change
    gm.recompile()
    return gm


def reordered(gm):
    """A pass that leaves a node in front of one it reads."""
    first = next(n for n in gm.graph.nodes if n.target is aten.conv2d.default)
    first.append(next(n for n in gm.graph.nodes if n.target is aten.mean.dim))
    return gm


def reads_nothing(gm):
    """A pass that leaves a reference to an attribute that is gone."""
    del gm.head.bias
    return gm


def forgets_the_value(gm):
    """A pass that inserts a node without its value."""
    node = next(n for n in gm.graph.nodes if n.target is aten.mean.dim)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(operator.neg, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    gm.recompile()
    return gm


def loses_a_module(gm):
    """A pass that leaves a call of a module that is gone."""
    del gm._guards_fn
    return gm


def other_graphs_node(gm):
    """A pass that wires in a node of another graph."""
    stranger = fx.symbolic_trace(nn.ReLU())
    node = next(n for n in gm.graph.nodes if n.target is aten.mean.dim)
    node.args = (next(iter(stranger.graph.nodes)), *node.args[1:])
    return gm


BROKEN = {
    reordered: "used before it has been defined|before",
    reads_nothing: "the graph reads 'head.bias', which the module does not have|references nonexistent",
    forgets_the_value: r"node neg\w* does not know its value \(meta\['val'\] is missing\)",
    loses_a_module: "_guards_fn",
    other_graphs_node: "",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_the_checker_names_the_pass_that_broke_the_graph(plan, broken):
    gm = copy_graph(plan.graph)
    check_graph(gm, "nothing")
    steps = [Pass("fine", lambda g: g, True), Pass("broken", broken, True), Pass("never run", scaled, True)]
    with pytest.raises(GraphCheckError, match=f"after broken: .*({BROKEN[broken]})"):
        run_passes(gm, steps)


def test_the_checker_looks_into_sub_graphs():
    class Block(zoo.Block):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x + self.op(self.norm(x)).float()

    model = zoo.live(1)
    model.blocks = nn.ModuleList([Block(6, model.blocks[0].op)]).eval()
    gm = vmeanba_fx.capture(model, zoo.images())
    inner = list(graph_modules(gm))[1]
    check_graph(gm, "nothing")
    next(n for n in inner.graph.nodes if n.target is aten.silu.default).meta.pop("val")
    with pytest.raises(GraphCheckError, match="after a pass: node silu does not know its value"):
        check_graph(gm, "a pass")


def test_verify_names_the_pass_that_is_not_exact(plan, monkeypatch):
    original = Plan._passes
    monkeypatch.setattr(Plan, "_passes", lambda self, names: [*original(self, names), Pass("scaled", scaled, True)])
    with pytest.raises(GraphCheckError, match=r"scaled is an exact pass but moved output 0 by .* \(relative; allowed"):
        plan.apply(1, verify=True)
    plan.apply(1)  # without verify nobody looks
    monkeypatch.setattr(Plan, "_passes", lambda self, names: [*original(self, names), Pass("scaled", scaled, False)])
    plan.apply(1, verify=True)  # a lossy pass may


def test_unknown_passes_cannot_be_skipped(plan):
    with pytest.raises(ValueError, match=r"no pass named fuse_everything to skip; the passes are: mean_scan, "):
        plan.apply(1, skip_passes=["fuse_everything"])


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["some", "literal"])
def test_results_can_be_trained(results, form):
    gm = copy_graph(results[form])
    assert not [name for name, buffer in gm.named_buffers() if buffer.is_floating_point()]  # all weights are parameters
    loss = F.cross_entropy(gm(zoo.images(4)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    grads = {name: p.grad for name, p in gm.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert sum(bool(g.abs().sum() > 0) for g in grads.values()) == len(grads)


def test_fitted_weights_can_be_trained_as_well():
    gm = vmeanba_fx.transform(zoo.live(2), zoo.labelled(2, 4), sites=["blocks.0.op"], reduce="rank", rank=2, refit=True)
    assert not [name for name, buffer in gm.named_buffers() if buffer.is_floating_point()]
    gm(zoo.images(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gm.parameters())


def test_weights_of_a_frozen_model_stay_frozen():
    gm = vmeanba_fx.transform(zoo.tiny(2, directions=4).requires_grad_(False), [zoo.images(2)], sites=["blocks.0.op"])
    assert not any(p.requires_grad for p in gm.parameters())
