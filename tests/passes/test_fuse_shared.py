"""Live replaced sites leave the scanned copies: exactly, at any rank, and never where they are not provably the pattern."""

import functools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from vmeanba_fx.passes import fuse_means, fuse_shared

import vmeanba_fx
from tests.helpers import make_scan_matter, relative_error
from tests.passes.cases import COMMON, EXACT, OURS, VARIANTS, Walks, targets
from vmeanba_fx.graph import NOT_FUSED, aten
from vmeanba_fx.models import VSSM
from vmeanba_fx.ops.directions import direction_table


class RankWalks(Walks):
    """A rank-r site as the lossy pass leaves it: W, shared step and decay, V, a bias, and a skip of its own."""

    def __init__(self, tables, channels, state, r, bias=True, last=False):
        super().__init__(tables, channels, state, last)
        K, g = len(tables), torch.Generator().manual_seed(r)
        self.r, self.channels = r, channels
        self.W = torch.nn.Parameter(torch.randn(K, r, channels, generator=g))
        self.V = torch.nn.Parameter(torch.randn(K, channels, r, generator=g))
        self.b = torch.nn.Parameter(torch.randn(K * channels, 1, generator=g)) if bias else None

    def widen(self, yr):
        return torch.matmul(self.V, yr)

    def forward(self, x):
        x = torch.nn.functional.silu(x)
        K, D = len(self.tables), self.channels
        flat = x.flatten(1, 2).transpose(1, 2) if self.last else x.flatten(2)
        u = torch.stack([flat[:, :, table] for table in self.tables], dim=1)
        dt, B, C = self.split(u)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj) + self.bias.view(K, D, 1)
        A = -self.A_log.exp().view(K, D, -1).mean(1)
        xs = u.flatten(1, 2)
        yr = OURS.shared_scan(torch.matmul(self.W, xs.unflatten(1, (K, D))), delta.mean(2), A, B, C, None, True)
        y = self.widen(yr).flatten(1, 2)
        y = y if self.b is None else y + self.b
        return self.merge((y + self.D[:, None] * xs).unflatten(1, (K, -1)))


def fused(model, x):
    """(rewritten graph, graph as captured, reasons)."""
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},), strict=False)
    before = program.module(check_guards=False)
    gm = fuse_shared(program.module(check_guards=False))
    return gm, before, [n.meta[NOT_FUSED] for n in gm.graph.nodes if NOT_FUSED in n.meta]


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    height=st.integers(2, 4), width=st.integers(2, 5), channels=st.integers(3, 6), state=st.integers(1, 2),
    r=st.integers(1, 3), codes=st.lists(st.integers(0, 7), min_size=1, max_size=4), last=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_any_shape_rank_and_directions(height, width, channels, state, r, codes, last, bias):
    model = RankWalks(direction_table(codes, height, width), channels, state, r, bias, last).double()
    shape = (2, height, width, channels) if last else (2, channels, height, width)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gm, _, reasons = fused(model, x)
    assert not reasons
    assert targets(gm).count(OURS.shared_scan2d.default) == 1
    assert not {OURS.shared_scan.default, aten.stack.default, aten.einsum.default} & set(targets(gm))
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


class GatedReadOut(RankWalks):
    def widen(self, yr):
        return torch.matmul(self.V, torch.tanh(yr))


class SecondReader(RankWalks):
    def widen(self, yr):
        return torch.matmul(self.V, yr) * yr.mean()


class GatedMerge(RankWalks):
    def merge(self, y):
        return super().merge(torch.sigmoid(y))


class NonlinearFeatures(RankWalks):
    def split(self, u):
        return tuple(torch.relu(t) for t in super().split(u))


class BiasedFeatures(RankWalks):
    def split(self, u):
        return tuple(t + 1.0 for t in super().split(u))


@pytest.mark.parametrize("kind", [GatedReadOut, SecondReader, GatedMerge, NonlinearFeatures, BiasedFeatures])
def test_near_misses_stay(kind):
    model = kind(direction_table([0, 3], 3, 4), 5, 2, 2).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gm, before, reasons = fused(model, x)
    assert reasons and all(reasons)
    assert targets(gm) == targets(before)
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


@functools.cache
def planned(name, dtype, mean):
    model = make_scan_matter(VSSM(**COMMON, **VARIANTS[name])).eval().to(dtype)
    x = torch.randn(3, 3, 28, 44, generator=torch.Generator().manual_seed(0)).to(dtype)
    return vmeanba_fx.calibrate(model, [x], score_sites=False, mean=mean), x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("mean", ["input", "direction", "all"])
@pytest.mark.parametrize("name", ["v05_onnone", "v05_ondwconv3"])
def test_live_sites_of_vmamba(name, mean, dtype):
    plan, x = planned(name, dtype, mean)
    n = len(plan.sites)
    gm = plan.apply(n)
    assert targets(gm).count(OURS.shared_scan2d.default if mean == "input" else OURS.linear_scan.default) == n
    assert targets(gm).count(OURS.broadcast_add.default) == n
    assert not vmeanba_fx.report(gm).unfused
    gone = {aten.flip.default, aten.stack.default, aten.conv1d.default, aten.split_with_sizes.default}
    assert not gone & set(targets(gm)), "parts of the cross scan or of its projections are left"
    with torch.no_grad():
        literal = plan.apply(n, skip_passes=EXACT)
        assert relative_error(gm(x), literal(x)) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert relative_error(gm(x[:1]), literal(x[:1])) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert relative_error(plan.apply(0)(x), literal(x)) > 0.02, "the replaced scans make no difference here"


def scaled_read_out(scan):
    """What the copies of the scanned channel are made of is twice its output."""
    with scan.graph.inserting_after(scan):
        double = scan.graph.call_function(aten.mul.Tensor, (scan, 2.0))
    double.meta = dict(scan.meta)
    scan.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)


def scaled_decay(scan):
    """The decay that the scan is given is half of what the block works out."""
    decay = scan.args[0]
    with scan.graph.inserting_before(scan):
        half = scan.graph.call_function(aten.mul.Tensor, (decay, 0.5))
    half.meta = dict(decay.meta)
    scan.update_arg(0, half)


@pytest.mark.parametrize("change, why", [(scaled_read_out, "no copy of the one"), (scaled_decay, "discretisation")])
def test_blocks_that_were_changed_stay(change, why):
    plan, x = planned("v05_onnone", torch.float64, "direction")
    gm = plan.apply(len(plan.sites), skip_passes=["fuse_means", "channels_last", "flatten_positions", "cleanup"])
    scans = list(gm.graph.find_nodes(op="call_function", target=OURS.linear_scan.default))
    change(scans[0])
    gm.recompile()
    with torch.no_grad():
        expected = gm(x)
        fuse_means(gm)
        gm.recompile()
        assert [why in n.meta.get(NOT_FUSED, "") for n in scans] == [True] + [False] * (len(scans) - 1)
        assert relative_error(gm(x), expected) < 1e-12


def test_report_says_why_a_site_was_not_fused():
    class Gated(Walks):
        def merge(self, y):
            return super().merge(torch.tanh(y))

    model = Gated(direction_table([0, 1], 3, 4), 5, 2)
    gm = vmeanba_fx.transform(model, [torch.randn(2, 5, 3, 4)], k=0)
    found = vmeanba_fx.report(gm)
    [(site, why)] = found.unfused.items()
    assert f"{site}: not fused, {why}" in str(found) and found.to_dict()["unfused"] == {site: why}


@pytest.mark.parametrize("name", ["v05_noz", "v05_onnone"])
def test_rank_sites_of_vmamba(name):
    """What calibration fits and rank_scan emits is the pattern, whether a LayerNorm follows or not."""
    model = make_scan_matter(VSSM(**COMMON, **VARIANTS[name])).eval()
    x = torch.randn(6, 3, 28, 44, generator=torch.Generator().manual_seed(0))
    plan = vmeanba_fx.calibrate(model, [x], score_sites=False, reduce="rank", rank=2)
    n = len(plan.sites)
    gm, literal = plan.apply(n), plan.apply(n, skip_passes=EXACT)
    assert targets(gm).count(OURS.shared_scan2d.default) == n and OURS.shared_scan.default not in targets(gm)
    with torch.no_grad():
        assert relative_error(gm(x), literal(x)) < 1e-5
