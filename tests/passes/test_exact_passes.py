"""The exact passes change no result, leave nothing of what they claim to remove, and leave near misses alone."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vmeanba_fx.passes import channels_last, cleanup

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.passes.cases import BOUND, EXACT, OURS, VARIANTS, Walks, planned, targets
from vmeanba_fx import ops
from vmeanba_fx.analysis.cross_scan import find_cross_scan
from vmeanba_fx.analysis.evaluate import Unprovable, evaluate
from vmeanba_fx.graph import NOT_FUSED, arguments, aten, copy_graph, scan_nodes
from vmeanba_fx.ops.directions import direction_table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_exact_on_every_kind_of_vmamba(name, dtype):
    if name == "v0" and dtype == torch.float64:
        pytest.skip("v0 casts to float32 by itself")
    plan, x = planned(name, dtype)
    n = len(plan.sites)
    with torch.no_grad():
        kept = plan.apply(0, skip_passes=EXACT)(x)
        replaced = plan.apply(n, skip_passes=EXACT)(x)
        assert relative_error(replaced, kept) > 0.02, "the scans do not matter here, so equality would prove nothing"
        assert relative_error(plan.apply(0)(x), kept) < BOUND[dtype]
        assert relative_error(plan.apply(n)(x), replaced) < BOUND[dtype]
        mixed = plan.choose(sites=plan.sites[0].name)
        literal = plan.apply(sites=mixed, skip_passes=EXACT)(x)
        assert relative_error(plan.apply(sites=mixed)(x), literal) < BOUND[dtype]


@pytest.mark.parametrize("build", [zoo.tiny, zoo.live])
def test_rounding_is_no_worse_than_the_models_own(build):
    """In float32 the rewritten model is as near to the float64 model as the model itself, over several weights and images."""
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        model, x = build(3, seed=seed, dim=24).eval(), zoo.images(8, seed=seed + 4)
        gm = vmeanba_fx.transform(model, [x], k=0)
        assert OURS.ss2d.default in targets(gm)
        with torch.no_grad():
            outputs = torch.stack([model(x), gm(x)])
            errors += (outputs - model.double()(x.double())).square().sum((1, 2))
    own, rewritten = errors.sqrt()
    assert 0 < rewritten < 1.5 * own


@pytest.mark.parametrize("name", VARIANTS)
def test_kept_sites_are_one_op_and_the_copies_are_gone(name):
    plan, x = planned(name, torch.float32)
    gm = plan.apply(0)
    found = targets(gm)
    assert found.count(OURS.ss2d.default) == len(plan.sites)
    gone = {aten.flip.default, aten.new_empty.default, aten.stack.default, aten.conv1d.default, aten.einsum.default,
            aten.slice_scatter.default, aten.select_scatter.default, aten.split_with_sizes.default}  # fmt: skip
    assert not gone & set(found), "parts of the cross scan or of its projections are left"
    assert gm(x[:1]).shape == (1, 5), "batch 1 runs too"


@pytest.mark.parametrize("name", ["v05_noz", "v05", "unidi", "bidi", "v0"])
def test_annihilated_sites_leave_only_aten(name):
    plan, _ = planned(name, torch.float32)
    gm = plan.apply(len(plan.sites))
    assert not [t for t in targets(gm) if "vmeanba_fx" in str(t)]
    names = [k for k, _ in (*gm.named_parameters(), *gm.named_buffers())]
    assert not [k for k in names if "x_proj" in k or "dt_proj" in k or "A_logs" in k], "dead weights are still carried"


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("state", [1, 3])
def test_stack_and_flip_cross_scans(directions, state):
    model = zoo.tiny(directions=directions, state=state).double()
    x = zoo.images(3, dtype=torch.float64)
    gm = vmeanba_fx.transform(model, [x], k=0)
    assert targets(gm).count(OURS.ss2d.default) == 2
    with torch.no_grad():
        assert relative_error(zoo.without_scan(model, x), model(x)) > 0.02
        assert relative_error(gm(x), model(x)) < 1e-12
        assert relative_error(gm(x[:1]), model(x[:1])) < 1e-12


def walk(x, code):
    """(B, D, H, W) in the order of a direction code, from the code's definition, one position at a time."""
    height, width = x.shape[2:]
    minor_length = height if code & 1 else width
    steps = []
    for t in range(height * width):
        s = height * width - 1 - t if code & 2 else t
        major, minor = divmod(s, minor_length)
        minor = minor_length - 1 - minor if code & 4 else minor
        h, w = (minor, major) if code & 1 else (major, minor)
        steps.append(x[:, :, h, w])
    return torch.stack(steps, dim=-1)


def fused(model, x):
    """(graph with k = 0, reasons why sites were not fused)."""
    gm = vmeanba_fx.transform(model, [x], k=0)
    return gm, [n.meta[NOT_FUSED] for _, n in scan_nodes(gm) if NOT_FUSED in n.meta]


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 5), width=st.integers(2, 5), channels=st.integers(3, 7), state=st.integers(1, 3),
    codes=st.lists(st.integers(0, 7), min_size=1, max_size=4), last=st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_directions(height, width, channels, state, codes, last):
    tables = direction_table(codes, height, width)
    model = Walks(tables, channels, state, last).double()
    shape = (2, height, width, channels) if last else (2, channels, height, width)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gm, reasons = fused(model, x)
    assert not reasons
    [node] = [n for n in gm.graph.nodes if n.target is OURS.ss2d.default]
    found = direction_table(list(node.args[6]), height, width)
    assert torch.equal(found, tables), "the codes it found walk another way"
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


def test_direction_codes_mean_what_they_say():
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    for code in range(8):
        table = direction_table([code], 4, 5)[0]
        assert torch.equal(x.flatten(2)[:, :, table], walk(x, code))


def test_an_order_that_is_no_direction_becomes_a_table():
    snake = torch.tensor([[0, 1, 2, 5, 4, 3, 6, 7, 8], [0, 3, 6, 7, 4, 1, 2, 5, 8]])
    model = Walks(snake, 5, 2).double()
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    gm, reasons = fused(model, x)
    assert not reasons
    [node] = [n for n in gm.graph.nodes if n.target is OURS.ss2d.default]
    assert list(node.args[6]) == [] and node.args[7] is not None
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


def test_a_bias_in_the_projection_and_one_in_the_call():
    class TwoBiases(Walks):
        def steps(self, dt):
            return super().steps(dt) + torch.linspace(-1, 1, len(self.bias), dtype=dt.dtype)[:, None]

    model = TwoBiases(direction_table([0, 3], 3, 4), 5, 2).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gm, reasons = fused(model, x)
    assert not reasons and OURS.ss2d.default in targets(gm)
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


# Near misses: each differs from the pattern in one thing, must stay unfused, and must still be right.


class GateBeforeMerge(Walks):
    def merge(self, y):
        return super().merge(torch.tanh(y))


class PositionWeights(Walks):
    def merge(self, y):
        weights = torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)
        return super().merge(y * weights)


class MissingDirection(Walks):
    def merge(self, y):
        return y[:, 0][:, :, self.inverse[0]]


class Observer(Walks):
    def merge(self, y):
        return super().merge(y) + y.abs().mean()


class NonlinearFeatures(Walks):
    def split(self, u):
        return tuple(F.relu(t) for t in super().split(u))


class NormalisedFeatures(Walks):
    """The step features, B and C are normalised, as Mamba variants with extra RMS norms do."""

    def split(self, u):
        return tuple(t * torch.rsqrt(t.square().mean(2, keepdim=True) + 1e-6) for t in super().split(u))


class SwappedMerge(Walks):
    """Puts the directions back with each other's order: legal, but not the merge of this cross scan."""

    def merge(self, y):
        return sum(y[:, k][:, :, self.inverse[1 - k]] for k in range(2))


class ShiftedProjection(Walks):
    """B and C of a position are those of its neighbour: not pointwise."""

    def split(self, u):
        return tuple(t.roll(1, -1) for t in super().split(u))


class OwnOrder(Walks):
    """One channel is scanned backwards; the features, and the other channels, walk as usual."""

    def scanned(self, u):
        return torch.cat([u[:, :, :1], u[:, :, 1:2].flip(-1), u[:, :, 2:]], dim=2)


@pytest.mark.parametrize(
    "kind",
    [GateBeforeMerge, PositionWeights, MissingDirection, Observer, NonlinearFeatures, NormalisedFeatures, SwappedMerge,
     ShiftedProjection, OwnOrder],
)  # fmt: skip
def test_near_misses_stay(kind):
    model = kind(direction_table([0, 3], 3, 4), 5, 2).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gm, reasons = fused(model, x)
    assert reasons and all(reasons), "a graph that is not the pattern was rewritten"
    assert OURS.ss2d.default not in targets(gm)
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


class Convolved(Walks):
    """Between 1x1 convolutions that are plain, grouped, strided and padded; some results are read by ``view``."""

    def __init__(self, tables):
        super().__init__(tables, 6, 2)
        self.before = torch.nn.Conv2d(6, 6, 1)
        options = ({}, {"groups": 3}, {"padding": 1}, {"stride": 2})
        self.after = torch.nn.ModuleList(torch.nn.Conv2d(6, 6, 1, **given) for given in options)

    def forward(self, x):
        x = self.before(x)
        y = super().forward(x.view(len(x), 6, -1).view(x.shape)).unflatten(2, (4, 4))
        for conv in self.after:
            y = torch.tanh(conv(y))
        return y.view(len(y), -1)


def test_convolutions_with_a_one_by_one_kernel_that_are_no_linear_layers():
    model = Convolved(direction_table([0, 3], 4, 4)).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gm, reasons = fused(model, x)
    assert not reasons
    convs = [n for n in gm.graph.nodes if n.target is aten.conv2d.default]
    assert len(convs) == 3, "the grouped, the padded and the strided one"
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


def test_mean_of_two_maps_is_refused():
    class TwoMaps(Walks):
        def forward(self, x):
            self.other = torch.tanh(x).flatten(2)
            return super().forward(x)

        def split(self, u):
            other = torch.stack([self.other[:, :, t] for t in self.tables], dim=1)
            return super().split(other)

    model = TwoMaps(direction_table([0, 1], 3, 4), 5, 2).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    gm, reasons = fused(model, x)
    assert reasons
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-12


def test_evaluate_refuses_what_depends_on_the_input():
    gm = vmeanba_fx.capture(zoo.tiny(), zoo.images())
    [(_, scan), *_] = scan_nodes(gm)
    with pytest.raises(Unprovable, match="depends on"):
        evaluate([scan], {}, 2)


def test_cross_scan_reports_where_it_comes_from():
    gm = vmeanba_fx.capture(zoo.tiny(), zoo.images())
    [(_, scan), *_] = scan_nodes(gm)
    found = find_cross_scan(scan.args[0], 4)
    assert found.source.target is aten.silu.default
    assert (found.height, found.width, found.directions) == (3, 5, (0, 1, 2, 3))


def test_lossless_export_and_compile():
    plan, x = planned("v05_noz", torch.float32)
    gm = plan.apply(0)
    with torch.no_grad():
        expected = gm(x)
        program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert relative_error(program.module()(x[:1]), expected[:1]) < 1e-5
        compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) < 1e-5


def test_convolutions_have_their_weights_in_the_layout_of_their_maps():
    """Else PyTorch converts them at every call. The caller's model and the plan's graph keep theirs."""
    plan, x = planned("v05_noz", torch.float32)
    gm = plan.apply(0)
    weight, before = (graph.get_parameter("layers.0.downsample.1.weight") for graph in (gm, plan.graph))
    assert weight.is_contiguous(memory_format=torch.channels_last) and before.is_contiguous()
    assert torch.equal(weight, before) and isinstance(weight, nn.Parameter)
    exported = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert torch.equal(exported(x[:1]), gm(x[:1]))


def test_slices_that_take_all_go():
    plan, _ = planned("v0", torch.float32)
    bounds = [
        [n.args[2:] for n in gm.graph.nodes if n.target is torch.ops.aten.slice.Tensor]
        for gm in (plan.apply(0, skip_passes=EXACT), plan.apply(0))
    ]
    assert (0, sys.maxsize) in bounds[0] and (0, sys.maxsize) not in bounds[1]
    assert (1, sys.maxsize, 2) in bounds[1]


def rewritten(step, model, *args):
    """The captured model, and after ``step``."""
    gm = vmeanba_fx.capture(model, args)
    return gm, step(copy_graph(gm))


def test_a_dropout_that_always_draws_stays():
    class Net(nn.Module):
        def forward(self, x):
            return F.dropout(F.dropout(x, 0.5, training=True), 0.5, training=False)

    x = torch.randn(2, 50)
    _, gm = rewritten(cleanup, Net(), x)
    assert targets(gm).count(aten.dropout.default) == 1
    assert (gm(x) == 0).any()


def test_a_copy_goes_only_behind_another():
    class Net(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2).contiguous(), (2 * x).transpose(1, 2).contiguous().clone()

    x = torch.randn(2, 3, 5)
    before, gm = rewritten(cleanup, Net(), x)
    copies = {aten.contiguous.default, aten.clone.default}
    assert [sum(t in copies for t in targets(g)) for g in (before, gm)] == [3, 2]
    for found, expected in zip(gm(x), before(x), strict=True):
        assert torch.equal(found, expected) and found.is_contiguous()


def test_a_map_with_its_channels_first_is_not_turned_for_a_sum():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.linear = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)

        def forward(self, x):
            return F.silu(self.near(x) + self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    x = torch.randn(2, 6, 4, 5)
    before, gm = rewritten(channels_last, Net().eval(), x)
    [conv] = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert [user.target for user in conv.users] == [aten.add.Tensor]
    torch.testing.assert_close(gm(x), before(x))


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_an_op_with_a_skip_of_its_own_keeps_its_dtype(out_dtype):
    """As a user calls it: ``lift_skip`` makes the skip a node, in float32."""
    given = {name: t.bfloat16() for name, t in zoo.scan_inputs(dtype=torch.float32).items()}

    class Net(nn.Module):
        def forward(self, u, delta):
            return ops.selective_scan(
                u, delta, given["A"], given["B"], given["C"], given["D"], None, given["delta_bias"], True, out_dtype
            )

    gm = vmeanba_fx.capture(Net(), (given["u"], given["delta"]))
    [(_, scan)] = scan_nodes(gm)
    assert arguments(scan)["D"] is None
    found, expected = (m(given["u"], given["delta"]) for m in (gm, Net()))
    assert found.dtype == expected.dtype == (out_dtype or torch.bfloat16)
    torch.testing.assert_close(found, expected)
