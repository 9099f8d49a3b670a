"""Gradient scores: finite differences in float64, the exact curvature, where gates sit, what is refused."""

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.capturing.models import AutocastBlock, InPlaceBlock
from tests.helpers import relative_error
from tests.redundant import loader, redundant
from vmeanba_fx import CalibrationError, calibrate
from vmeanba_fx.calibration.gates import Gated, branch_of
from vmeanba_fx.calibration.gradient import Estimator
from vmeanba_fx.calibration.metrics import resolve_metric, unpack, values_of
from vmeanba_fx.calibration.replacing import Replacer
from vmeanba_fx.calibration.scoring import Runner
from vmeanba_fx.graph import scan_nodes
from vmeanba_fx.sites import find_sites


def runner_of(model, metric="loss", dtype=torch.float64):
    """A runner on the model in ``dtype``, and one batch of 4 labelled images."""
    x, y = zoo.labelled(1, 4)[0]
    gm = vmeanba_fx.capture(model.to(dtype), x.to(dtype))
    sites = find_sites(gm)
    return Runner(gm, sites, resolve_metric(metric, True), Replacer(gm, sites, "direction")), unpack((x.to(dtype), y))


def metric_at(runner, gated, batch, gates):
    with torch.no_grad():
        base = runner.base(0, batch).outputs
        return values_of(runner.metric, gated(gates, batch), batch, base)[0]


@pytest.fixture(scope="module", params=["live", "annihilated"])
def runner(request):
    return runner_of(zoo.live(3) if request.param == "live" else zoo.tiny(3))


@pytest.mark.parametrize("taken", [(), (0,)])
def test_derivative_against_finite_differences(runner, taken):
    """Of a metric without curvature, per image and site, in float64; also with another site replaced already."""
    runner, batch = runner
    margin = resolve_metric(lambda out, raw: out.gather(1, raw[1][:, None])[:, 0] ** 2, True)
    runner = Runner(runner.gm, runner.sites, margin, runner.replacer)
    left = [i for i in range(3) if i not in taken]
    estimator = Estimator(runner, left, taken)
    found, weight = estimator.columns(0, batch)
    h = 1e-5
    for j in range(len(left)):
        gates = torch.zeros(4, len(left), dtype=torch.float64)
        gates[:, j] = h
        slope = (metric_at(runner, estimator.gated, batch, gates) - metric_at(runner, estimator.gated, batch, -gates)) / (2 * h)
        torch.testing.assert_close(found[1 + j] - found[0], slope, rtol=1e-6, atol=1e-9)
        assert slope.abs().min() > 1e-7
    torch.testing.assert_close(found[0], metric_at(runner, estimator.gated, batch, torch.zeros_like(gates)))
    assert weight == 1


@pytest.mark.parametrize("build", [zoo.live, zoo.dense])
def test_curvature_of_kl_against_second_differences(build, monkeypatch):
    """At g = 0 the KL has no slope, and half its second derivative is what the random signs estimate."""
    monkeypatch.setattr("vmeanba_fx.calibration.gradient.PROBES", 400)
    runner, batch = runner_of(build(2), "kl")
    estimator = Estimator(runner, [0, 1])
    found, _ = estimator.columns(0, batch)
    h = 1e-3
    for j in range(2):
        gates = torch.zeros(4, 2, dtype=torch.float64)
        gates[:, j] = h
        up, down = (metric_at(runner, estimator.gated, batch, g) for g in (gates, -gates))
        torch.testing.assert_close(found[1 + j], (up + down) / (2 * h * h), rtol=0.3, atol=0)
        assert float(found[1 + j].sum()) == pytest.approx(float((up + down).sum()) / (2 * h * h), rel=0.15)


def test_gates_sit_where_the_branch_joins_the_stream():
    """At g = 1 a gate gives what replacing the site gives, and in between the output is a straight line to it."""
    runner, batch = runner_of(zoo.tiny(1))
    for _, scan in scan_nodes(runner.gm):
        branch = branch_of(scan)
        assert branch[0] is scan and len(branch) > 5
        (join,) = branch[-1].users
        assert join.target is torch.ops.aten.add.Tensor and not set(join.all_input_nodes) <= set(branch)
    gated = Gated(runner.gm, runner.sites, [], runner.replacer)
    with torch.no_grad():
        replaced, _ = runner.base(0, batch).replaced([0])
        torch.testing.assert_close(gated(torch.ones(4, 1, dtype=torch.float64), batch), replaced)
        assert relative_error(gated(torch.zeros(4, 1, dtype=torch.float64), batch), replaced) > 1e-3


def test_gates_do_not_mix_images():
    runner, batch = runner_of(zoo.live(2))
    gated = Gated(runner.gm, runner.sites, [], runner.replacer)
    gates = torch.zeros(4, 2, dtype=torch.float64)
    with torch.no_grad():
        base = gated(gates, batch)
        gates[1, 0] = 1.0
        moved = (gated(gates, batch) - base).abs().amax(1)
    assert moved[1] > 1e-6 and moved[[0, 2, 3]].max() == 0


@pytest.mark.parametrize("kind", [InPlaceBlock, AutocastBlock])
def test_graphs_that_are_no_plain_data_flow(kind):
    """In-place operators; scans inside the sub-graph of an autocast region."""
    model = zoo.live(2)
    model.blocks = nn.ModuleList(kind(6, block.op) for block in model.blocks)
    both = calibrate(model.eval(), zoo.labelled(4, 8), metric="kl", score="both", held_out=False)
    for measured, estimate in zip(both.impacts(), both.estimates, strict=True):
        assert 0.2 < estimate / measured < 5


@pytest.mark.slow
def test_rank_fits_are_scored_as_they_are():
    """The gradient of a nearly perfect replacement is small: the fits, changes of D included, are in the gated graph."""
    model, data = zoo.live(1), zoo.labelled(2, 16)
    mean, ranked = (
        calibrate(model, data, metric="kl", score="both", held_out=False, reduce=kind, rank=r)
        for kind, r in (("mean", None), ("rank", 4))
    )
    assert all(r < m / 2 for r, m in zip(ranked.impacts(), mean.impacts(), strict=True))
    assert all(r < m / 2 for r, m in zip(ranked.estimates, mean.estimates, strict=True))


def test_scores_and_correlation():
    """Where sites differ by orders of magnitude both scores agree on the order, and the plan says how well."""
    model = redundant()
    data = loader(model)
    both = calibrate(model, data, metric="kl", score="both", held_out=False)
    assert both.correlation() == pytest.approx(1.0)
    assert "gradient against measured impact: rank correlation 1.00 (Spearman)" in str(both)
    only = calibrate(model, data, metric="kl", score="gradient", held_out=False)
    assert only.scores == [] and only.impacts() == both.estimates and only.correlation() is None
    assert only.order() == both.order() and only.base == pytest.approx(0)
    assert "gradient impact (kl)" in str(only) and len(only.intervals) == 3
    assert only.choose(2) == ["first", "second"]


def test_defaults_and_refusals():
    model = zoo.live(1)
    data = zoo.labelled(1, 4)
    assert calibrate(model, data, score="gradient").metric == "loss"
    assert calibrate(model, [x for x, _ in data], score="gradient").metric == "kl"
    with pytest.raises(CalibrationError, match="score='gradient': the accuracy has no gradient"):
        calibrate(model, data, score="gradient", metric="accuracy")
    with pytest.raises(CalibrationError, match="'best' has no gradient: use score='measured'"):

        def best(outputs, batch):
            return (outputs.argmax(1) == batch[1]).float()

        calibrate(model, data, score="gradient", metric=best)
    with pytest.raises(CalibrationError, match="score='exact': choose one of 'measured', 'gradient', 'both'"):
        calibrate(model, data, score="exact")
    whole = calibrate(model, data, score="gradient", metric=lambda out, batch: out.square().mean(), held_out=False)
    each = calibrate(model, data, score="gradient", metric=lambda out, batch: out.square().mean(1), held_out=False)
    assert whole.estimates == pytest.approx(each.estimates)
