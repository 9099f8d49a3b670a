"""Refitted layers: which are found, that they compensate, and that they leave alone what needs none."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vmeanba_fx.passes import find_readout, mean_scan
from vmeanba_fx.passes.refit import Readout

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from vmeanba_fx import CalibrationError, PlanError
from vmeanba_fx.calibration.batches import Batches
from vmeanba_fx.calibration.replacing import Replacer
from vmeanba_fx.fitting.refits import REFIT, _Walk, refit_each, refit_sites
from vmeanba_fx.graph import copy_graph, scan_nodes

LOADER = zoo.labelled(3, 6)


def data_of(loader=LOADER) -> Batches:
    return Batches(loader, None, None, 0)


def captured(model: nn.Module, dtype=torch.float32):
    return vmeanba_fx.capture(model.to(dtype), zoo.images(3, dtype=dtype))


def readout_of(model: nn.Module) -> Readout | str:
    gm = captured(model)
    return find_readout(scan_nodes(gm)[0][1])


def deviation(gm, original, loader=LOADER) -> float:
    """Mean square of what the outputs moved by."""
    with torch.no_grad():
        return float(torch.cat([gm(x) - original(x) for x, _ in loader]).double().square().mean())


# -- which layer ------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """A gate computed from nothing but the position, then a depthwise convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Parameter(torch.randn(dim))
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, y: Tensor) -> Tensor:
        y = self.norm(y) * torch.sigmoid(self.gate)
        return self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Pointwise(nn.Module):
    """A 1x1 convolution on channel-first maps."""

    def __init__(self, dim: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1, bias=False, groups=groups)

    def forward(self, y: Tensor) -> Tensor:
        return self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Twice(nn.Module):
    """Two layers read the scan."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.a(y) * self.b(y)


@pytest.mark.parametrize("after, layer", [
    (None, "linear"), (Gate(6), "linear"), (nn.Identity(), "linear"), (zoo.RMSNorm(6), "linear"), (Pointwise(6), "conv2d"),
    (Pointwise(6, groups=2), "linear"),  # its channels are not mixed freely: the layer behind it is
])  # fmt: skip
def test_the_next_pointwise_layer_is_found(after, layer):
    found = readout_of(zoo.tiny(2, after=after))
    assert isinstance(found, Readout) and found.layer.name.startswith(layer) and not found.is_norm
    assert (found.stream is not None) == (layer == "linear")  # behind the convolution there is another layer


def test_a_branching_scan_is_refused_by_name():
    found = readout_of(zoo.tiny(2, after=Twice(6)))
    assert isinstance(found, str) and "not all of it goes through that layer" in found


class Then(nn.Module):
    """A linear layer and something behind it."""

    def __init__(self, dim: int, fn) -> None:
        super().__init__()
        self.linear, self.fn = nn.Linear(dim, dim), fn

    def forward(self, y: Tensor) -> Tensor:
        return self.fn(self.linear(y))


@pytest.mark.parametrize("fn", [
    lambda y: F.dropout(y, 0.5, training=False),
    lambda y: y.contiguous().clone(),
])  # fmt: skip
def test_the_stream_behind_the_layer_is_found(fn):
    model = zoo.tiny(1)
    model.blocks[0].op.out_proj = Then(6, fn)
    assert readout_of(model).stream is not None


@pytest.mark.parametrize("fn", [
    lambda y: F.dropout(y, 0.5, training=True),
    lambda y: y + torch.arange(6.0),  # no residual sum: of one vector
    lambda y: y * 2,
])  # fmt: skip
def test_what_changes_the_layers_output_is_no_stream(fn):
    model = zoo.tiny(1)
    model.blocks[0].op.out_proj = Then(6, fn)
    found = readout_of(model)
    assert found.layer.name.startswith("linear") and found.stream is None


def without_projection(after: nn.Module | None = None) -> nn.Module:
    """The first site goes into the residual stream as it is."""
    model = zoo.tiny(2, after=after)
    model.blocks[0].op.out_proj = nn.Identity()
    return model


def read_by_a_norm(_depth: int = 2, eps: float = 0.3) -> nn.Module:
    """Of the first site, whose norm is not one of PyTorch's defaults."""
    model = without_projection()
    model.blocks[0].op.after.eps = eps
    return model


def test_where_no_layer_follows_the_norm_is_found_or_a_reason():
    found = readout_of(without_projection())
    assert isinstance(found, Readout) and found.is_norm
    found = readout_of(without_projection(nn.Identity()))
    assert isinstance(found, str) and "reads it, but not all of it" in found


# -- what refitting does ----------------------------------------------------------------------------------------------


def test_nothing_changes_where_nothing_was_replaced():
    gm = captured(zoo.tiny(2), torch.float64)
    same = refit_sites(copy_graph(gm), gm, ["blocks.0.op", "blocks.1.op"], data_of(doubled()))
    x = zoo.images(4, seed=9, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(same(x), gm(x)) < 1e-12
    assert [note.layer for note in same.meta[REFIT]] == [f"linear_{2 * i + 1} in blocks.{i}.op.out_proj" for i in range(2)]


def doubled():
    return [(x.double(), y) for x, y in LOADER]


@pytest.mark.parametrize("how", [True, "all"])
@pytest.mark.parametrize("after", [None, Gate(6), Pointwise(6)])
def test_the_error_falls_on_images_it_was_not_fitted_to(after, how):
    model = zoo.tiny(2, after=after)
    gm = captured(model)
    names = ["blocks.0.op", "blocks.1.op"]
    replaced = mean_scan(copy_graph(gm), names)
    many = zoo.labelled(4, 16, seed=20)
    fitted = refit_sites(copy_graph(replaced), gm, names, data_of(many), how=how)
    held_out = zoo.labelled(2, 16, seed=90)
    assert deviation(fitted, gm, held_out) < 0.9 * deviation(replaced, gm, held_out)
    shapes = [tuple(t.shape) for t in fitted.state_dict().values()]
    assert len([n for n in fitted.graph.nodes if n.op == "call_function"]) <= len(
        [n for n in replaced.graph.nodes if n.op == "call_function"]
    ), shapes


def test_a_linear_change_is_undone():
    """A layer that reads a scaled map is refitted to the original output exactly."""
    gm = captured(zoo.tiny(1, after=nn.Identity()), torch.float64)
    scaled = copy_graph(gm)
    scan = scan_nodes(scaled)[0][1]
    out = next(n for n in scaled.graph.nodes if n.target is torch.ops.aten.linear.default and n.name == "linear_1")
    with scaled.graph.inserting_before(out):
        node = scaled.graph.call_function(torch.ops.aten.mul.Tensor, (out.args[0], 1.25))
    node.meta["val"] = out.args[0].meta["val"]
    out.replace_input_with(out.args[0], node)
    scaled.recompile()
    assert scan is not None and deviation(scaled, gm, doubled()) > 1e-6
    fitted = refit_sites(scaled, gm, ["blocks.0.op"], data_of(doubled()))
    assert deviation(fitted, gm, doubled()) < 1e-8


def test_the_error_that_the_stream_carries_is_compensated():
    """One in front of the block that its own norm absorbs: the layer's output is right, the sum behind it is not."""
    gm = captured(zoo.tiny(2), torch.float64)
    moved = copy_graph(gm)
    with torch.no_grad():
        moved.get_parameter("blocks.0.op.out_proj.bias").add_(1.0)
    fitted = refit_sites(moved, gm, ["blocks.1.op"], data_of(doubled()))
    bias = gm.get_parameter("blocks.1.op.out_proj.bias")
    torch.testing.assert_close(fitted.get_parameter("linear_3_refit_bias"), bias - 1.0)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_a_change_of_a_norm_is_undone(eps):
    gm = captured(read_by_a_norm(eps=eps), torch.float64)
    moved = copy_graph(gm)
    with torch.no_grad():
        moved.get_parameter("blocks.0.op.after.weight").mul_(torch.arange(1, 7))
        moved.get_parameter("blocks.0.op.after.bias").add_(0.5)
    assert deviation(moved, gm, doubled()) > 1e-3
    assert deviation(refit_sites(moved, gm, ["blocks.0.op"], data_of(doubled())), gm, doubled()) < 1e-20


def test_the_norm_is_refitted_where_no_layer_follows():
    gm = captured(without_projection())
    replaced = mean_scan(copy_graph(gm), ["blocks.0.op"])
    fitted = refit_sites(copy_graph(replaced), gm, ["blocks.0.op"], data_of())
    [note] = fitted.meta[REFIT]
    assert note.layer.startswith("layer_norm") and note.left < 0.9
    assert deviation(fitted, gm) < deviation(replaced, gm)


def test_refusals_are_reported_and_leave_the_site_as_it_is():
    gm = captured(without_projection(nn.Identity()))
    fitted = vmeanba_fx.transform(gm, LOADER, sites="blocks.0.op", refit=True)
    plain = vmeanba_fx.transform(gm, LOADER, sites="blocks.0.op")
    assert torch.equal(fitted(zoo.images(2)), plain(zoo.images(2)))
    assert "blocks.0.op: not refitted" in str(vmeanba_fx.report(fitted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["mean", "rank"])
def test_half_precision_models(dtype, reduce):
    gm = captured(zoo.tiny(1), dtype)
    loader = [(x.to(dtype), y) for x, y in LOADER]
    options = {"sites": "*", "reduce": reduce} | ({"rank": 2} if reduce == "rank" else {})
    plain, fitted = (vmeanba_fx.transform(gm, loader, refit=r, **options) for r in (False, True))
    assert fitted(loader[0][0]).dtype == dtype
    # What a rank-r site errs by is little more than what these dtypes round.
    assert deviation(fitted, gm, loader) < (1.0 if reduce == "mean" else 1.5) * deviation(plain, gm, loader)


def test_values_kept_between_layers_change_nothing(monkeypatch):
    gm = captured(zoo.tiny(3))
    names = ["blocks.0.op", "blocks.2.op"]
    results = []
    for room in (1 << 30, 6000, 0):  # all batches are kept, some, none
        monkeypatch.setattr("vmeanba_fx.fitting.refits.KEPT_BYTES", room)
        results.append(refit_sites(mean_scan(copy_graph(gm), names), gm, names, data_of(), how="all"))
    for other in results[1:]:
        assert other.meta[REFIT] == results[0].meta[REFIT]
        for a, b in zip(results[0].state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_what_is_kept_counts():
    gm = captured(zoo.tiny(1))
    walk, layer = _Walk(gm), find_readout(scan_nodes(gm)[0][1]).layer
    walk.start()
    first, second = (walk.stop(layer, index, batch) for index, batch in enumerate(data_of(LOADER[:2]).sweep()))
    room = walk.keep(0, first, 1 << 20)
    assert 0 < room < 1 << 20
    assert walk.keep(1, second, (1 << 20) - room - 1) == (1 << 20) - room - 1  # as large as the first: it stays out
    walk.finish(layer)
    assert walk.stop(layer, 0, None) is first


@pytest.mark.parametrize("how, later", [("sites", []), ("all", ["linear_5", "linear_6"])])
def test_which_layers_are_refitted(how, later):
    """The one that reads the site out; with "all" also what writes into the stream behind it, and the head."""
    gm = captured(zoo.tiny(3))
    names = ["blocks.1.op"]
    fitted = refit_sites(mean_scan(copy_graph(gm), names), gm, names, data_of(), how=how)
    done = [(r.site, r.layer.split(" in ")[0]) for r in fitted.meta[REFIT]]
    assert done == [("blocks.1.op", "linear_3"), *(("", name) for name in later)]


def test_the_same_run_gives_the_same_bytes():
    gm = captured(zoo.tiny(2))
    a, b = (vmeanba_fx.transform(gm, LOADER, k=2, reduce="rank", rank=2, refit=how) for how in (True, "sites"))
    assert a.code == b.code and not any(buffer.requires_grad for buffer in copy_graph(a).buffers())
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_a_plan_from_a_file_needs_data(tmp_path):
    model = zoo.tiny(1)
    plan = vmeanba_fx.calibrate(model, LOADER, score_sites=False)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="refit=True is fitted to calibration data"):
        vmeanba_fx.Plan.load(tmp_path / "plan.json").apply(sites="*", model=model, refit=True)


# -- scoring ----------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two scans, one layer that reads both out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = (next(zoo.scanners(zoo.tiny(1, seed=seed, dim=dim))) for seed in (1, 2))
        self.first.out_proj, self.second.out_proj = nn.Identity(), nn.Identity()
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.first(x) + self.second(x))


def test_sites_that_share_a_layer_are_scored_without_it():
    """Fitted for either of them alone it would be wrong for both."""
    model = zoo.tiny(2)
    model.blocks[0].op = Pair(6)
    gm = captured(model)
    sites = vmeanba_fx.find_sites(gm)
    assert [s.name for s in sites] == ["blocks.0.op.first", "blocks.0.op.second", "blocks.1.op"]
    assert list(refit_each(gm, sites, data_of(), Replacer(gm, sites, "direction"))) == ["blocks.1.op"]


@pytest.mark.parametrize("options", [{}, {"reduce": "rank", "rank": 2}], ids=["mean", "rank"])
@pytest.mark.parametrize("build", [zoo.tiny, zoo.live, read_by_a_norm])
def test_sites_are_scored_as_they_are_applied(build, options):
    plan = vmeanba_fx.calibrate(build(2), LOADER, metric="loss", refitted=True, progress=False, **options)
    plain = vmeanba_fx.calibrate(build(2), LOADER, metric="loss", progress=False, **options)
    for site, score in zip(plan.sites, plan.scores, strict=True):
        gm = plan.apply(sites=site.name, refit=True)
        with torch.no_grad():
            losses = torch.cat([nn.functional.cross_entropy(gm(x), y, reduction="none") for x, y in LOADER])
        assert score == pytest.approx(float(losses.double().mean()), rel=1e-5)
    assert plan.fingerprint != plain.fingerprint
    if not options:  # a rank-r fit may leave nothing to a refit
        assert plan.scores != pytest.approx(plain.scores, rel=1e-4)


def test_refitted_scores_are_measured():
    with pytest.raises(CalibrationError, match="refitted=True needs score='measured', not 'both'"):
        vmeanba_fx.calibrate(zoo.tiny(1), LOADER, metric="loss", refitted=True, score="both")
