"""Rank-r fits weighted by how much the model's outputs depend on a scan: gradients, what they buy, what is refused."""

import itertools

import pytest
import torch
from torch import nn
from vmeanba_fx.passes import rank_scan

import vmeanba_fx
from tests import zoo
from vmeanba_fx import CalibrationError, Plan
from vmeanba_fx.calibration.batches import Batches
from vmeanba_fx.calibration.execute import Executor, traced_bytes
from vmeanba_fx.calibration.gradient import curvature_probe
from vmeanba_fx.data import load_digits_images, make_loader
from vmeanba_fx.fitting import sensitivity
from vmeanba_fx.fitting.rank_fits import fit_sites
from vmeanba_fx.fitting.reduction import Reduction
from vmeanba_fx.fitting.sensitivity import output_gradients
from vmeanba_fx.graph import concrete_sizes, copy_graph, scan_nodes, value
from vmeanba_fx.models import vmamba_digits
from vmeanba_fx.sites import find_sites


def data_of(loader) -> Batches:
    return Batches(loader, None, None, 0)


def test_probes_have_the_curvature_of_the_class_probabilities(monkeypatch):
    """Over all sign vectors the mean of (L v)(L v)^T is exactly diag(p) - p p^T."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for bits in itertools.product((0, 1), repeat=3):
        monkeypatch.setattr(torch, "randint", lambda *_, bits=bits, **__: torch.tensor([bits], dtype=torch.float64))
        probe = curvature_probe(p[None], torch.Generator())[0]
        total += torch.outer(probe, probe) / 8
    torch.testing.assert_close(total, torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize(
    "build", [zoo.tiny, lambda n: zoo.live(n, directions=2), zoo.dense], ids=["annihilated", "live", "dense"]
)
def test_gradients_are_those_of_finite_differences(build):
    x = zoo.images(4, dtype=torch.float64)
    gm = vmeanba_fx.capture(build(2).double(), x)
    scans = [scan for _, scan in scan_nodes(gm)]
    [gradients] = output_gradients(gm, scans, data_of([x]))
    executor = Executor(gm, scans, keep=scans)
    with torch.no_grad():
        logits, state = executor.run(x)
        probe = curvature_probe(logits.softmax(1), torch.Generator().manual_seed(0))
        for scan, gradient in zip(scans, gradients, strict=True):
            y = state.value(scan)
            step = 1e-5 * torch.randn_like(y)
            moved = executor.rerun(state, {scan: y + step}) - executor.rerun(state, {scan: y - step})
            torch.testing.assert_close((gradient * step).sum(), (probe * moved).sum() / 2, rtol=1e-4, atol=1e-10)
    assert not any(p.grad is not None for p in gm.parameters())


class Detached(zoo.TinyNet):
    def forward(self, x):
        return self.head(self.features(x).detach())


class OneBatchSize(zoo.TinyNet):
    def forward(self, x):
        return super().forward(x.reshape(4, *x.shape[1:]))


def of_class(cls):
    model = zoo.tiny(1).double()
    model.__class__ = cls
    x = zoo.images(4, dtype=torch.float64)
    gm = vmeanba_fx.capture(model, x)
    return output_gradients(gm, [scan for _, scan in scan_nodes(gm)], data_of([x]))


def test_outputs_that_do_not_depend_on_a_scan_are_refused():
    with pytest.raises(CalibrationError, match=r"fit='outputs' does not work for this model .*use fit='scan'"):
        list(of_class(Detached))


def test_a_batch_of_one_size_stays_whole():
    [[gradient]] = of_class(OneBatchSize)
    assert len(gradient) == 4


def test_batches_are_cut_where_a_backward_pass_has_no_room(monkeypatch):
    """The probes of a part are those that the whole batch has for it."""
    x = zoo.images(5, dtype=torch.float64)
    gm = vmeanba_fx.capture(zoo.live(1).double(), x)
    [scan] = [scan for _, scan in scan_nodes(gm)]
    [whole] = output_gradients(gm, [scan], data_of([x]))
    [traced] = [concrete_sizes(value(node))[0] for node in gm.graph.find_nodes(op="placeholder")]
    monkeypatch.setattr(sensitivity, "BACKWARD_BYTES", 2.5 * sum(map(traced_bytes, gm.graph.nodes)) / traced)
    parts = [part for [part] in output_gradients(gm, [scan], data_of([x]))]
    assert [len(p) for p in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), whole[0])


def test_fits_to_the_outputs_change_them_less():
    """Rank 2 at the last four sites of the digits model, on images that took no part: 0.21 and 0.12 were measured."""
    (x, y), (unseen, _) = load_digits_images(train=True), load_digits_images(train=False)
    gm = vmeanba_fx.capture(vmamba_digits(pretrained=True), x[:2])
    sites = find_sites(gm)[-4:]
    changes = {}
    for fit in ("scan", "outputs"):
        fits = fit_sites(gm, sites, data_of(make_loader(x[:128], y[:128])), Reduction.of("rank", 2, fit=fit))
        with torch.no_grad():
            logits, wanted = (m(unseen).log_softmax(1) for m in (rank_scan(copy_graph(gm), fits), gm))
        changes[fit] = float(nn.functional.kl_div(logits, wanted, log_target=True, reduction="batchmean"))
    assert changes["outputs"] < 0.7 * changes["scan"]


def test_the_same_data_give_the_same_bytes():
    gm = vmeanba_fx.capture(zoo.tiny(2), zoo.images(3))
    reduction = Reduction.of("rank", 2, fit="outputs")
    a, b = (fit_sites(gm, find_sites(gm), data_of(zoo.labelled(2, 6)), reduction) for _ in range(2))
    assert all(torch.equal(a[name].W, b[name].W) and torch.equal(a[name].V, b[name].V) for name in a)


def test_plans_keep_the_choice(tmp_path):
    plan = vmeanba_fx.calibrate(
        zoo.live(2), zoo.labelled(2, 6), reduce="rank", rank=2, fit="outputs", metric="kl", progress=False
    )
    assert str(plan.reduction) == "rank 2, fitted to the outputs"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").reduction == plan.reduction


class _Features(nn.Module):
    """Two outputs, neither called logits."""

    def __init__(self):
        super().__init__()
        self.net = zoo.live(1)

    def forward(self, x):
        y = self.net(x)
        return y, 2 * y


def test_what_is_refused():
    with pytest.raises(CalibrationError, match="none is called logits"):
        vmeanba_fx.calibrate(
            _Features(), zoo.labelled(1, 4), reduce="rank", rank=1, fit="outputs", metric=lambda out, _: out[0].sum(1)
        )
    with pytest.raises(CalibrationError, match=r"fit=.* belong to reduce='rank'"):
        Reduction.of("mean", fit="outputs")
    with pytest.raises(CalibrationError, match="choose 'scan' or 'outputs'"):
        Reduction.of("rank", 2, fit="logits")
