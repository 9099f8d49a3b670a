"""Which sites are annihilated, which live: the verdict by structure against what a shifted scan does to the model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import zoo
from tests.families.models import OneByOne
from tests.helpers import relative_error
from vmeanba_fx import sites as sites_module
from vmeanba_fx.calibration.execute import Executor
from vmeanba_fx.capturing.capture import capture
from vmeanba_fx.errors import SiteError
from vmeanba_fx.graph import scan_nodes
from vmeanba_fx.sites import find_sites
from vmeanba_fx.symbolic import symbolic_trace

DIM = 6


class After(nn.Module):
    """``fn(y, self)`` on the merged scan y (B, H, W, D); ``modules`` become its submodules."""

    def __init__(self, fn, **modules):
        super().__init__()
        self.fn = fn
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, y):
        return self.fn(y, self)


def norm(size=DIM, **options):
    return nn.LayerNorm(size, **options)


def channel_first(y, layer):
    """``layer`` on (B, D, H, W), as convolutions and batch norms take it."""
    return layer(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def weight(*shape):
    return nn.Parameter(torch.linspace(0.5, 1.5, torch.Size(shape).numel()).reshape(shape))


ANNIHILATED = {
    "LayerNorm": lambda: norm(),
    "LayerNorm without weights": lambda: norm(elementwise_affine=False),
    "gate after the norm": lambda: After(lambda y, m: m.norm(y) * F.silu(m.gate), norm=norm(), gate=weight(DIM)),
    "norm over the last axis of (B, L, D)": lambda: After(
        lambda y, m: m.norm(y.flatten(1, 2)).unflatten(1, y.shape[1:3]), norm=norm()
    ),
    "channels first and back": lambda: After(
        lambda y, m: m.norm(y.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), norm=norm()
    ),
    "mean of the directions": lambda: After(lambda y, m: m.norm(0.25 * y / 3), norm=norm()),
    "one learned scale": lambda: After(lambda y, m: m.norm(y * m.scale), norm=norm(), scale=weight(1)),
    "casts": lambda: After(lambda y, m: m.norm(y.double().to(y.dtype)), norm=norm()),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), norm()),
    "another term": lambda: After(lambda y, m: m.norm(y - m.term), norm=norm(), term=weight(3, 5, DIM)),
    "channels reversed": lambda: After(lambda y, m: m.norm(y.flip(-1).roll(1, -1)), norm=norm()),
    "some of the channels": lambda: After(
        lambda y, m: torch.cat([m.norm(y[..., :4]), m.norm(y[..., 2:])], -1)[..., :DIM], norm=norm(4)
    ),
    "two norms": lambda: After(lambda y, m: m.one(y) + m.two(y.flip(1)).abs(), one=norm(), two=norm()),
    "scaled per position": lambda: After(lambda y, m: m.norm(y * m.scale), norm=norm(), scale=weight(3, 5, 1)),
}
LIVE = {
    "nothing": (lambda: nn.Identity(), "linear"),
    "RMSNorm": (lambda: zoo.RMSNorm(DIM), "reads it before any LayerNorm"),
    "gate before the norm": (
        lambda: After(lambda y, m: m.norm(y * F.silu(m.gate)), norm=norm(), gate=weight(DIM)), "differently"
    ),
    "scale per channel": (lambda: After(lambda y, m: m.norm(m.s * y), norm=norm(), s=weight(DIM)), "differently"),
    "norm over the width": (
        lambda: After(lambda y, m: m.norm(y.transpose(2, 3)).transpose(2, 3), norm=norm(5)), "differently"
    ),
    "norm over all axes": (lambda: norm((3, 5, DIM)), "LayerNorm over 3 axes"),
    "group norm": (lambda: After(lambda y, m: channel_first(y, m.norm), norm=nn.GroupNorm(2, DIM)), "group_norm"),
    "batch norm": (lambda: After(lambda y, m: channel_first(y, m.norm), norm=nn.BatchNorm2d(DIM)), "batch_norm"),
    "second reader": (lambda: After(lambda y, m: m.norm(y) + 0.3 * y, norm=norm()), "linear"),
    "concatenation": (
        lambda: After(lambda y, m: m.norm(torch.cat([y, m.b.expand_as(y)], -1))[..., :6], norm=norm(12), b=weight(6)),
        "differently",
    ),
    "half of it set to zero": (
        lambda: After(lambda y, m: m.norm(torch.cat([y[..., :3], 0 * y[..., 3:]], -1)), norm=norm()), "differently"
    ),
    "depthwise convolution": (
        lambda: After(lambda y, m: m.norm(channel_first(y, m.conv)), norm=norm(),
                      conv=nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)), "conv2d"
    ),
    "activation": (lambda: nn.Sequential(nn.ReLU(), norm()), "relu"),
    "mixed channels": (lambda: nn.Sequential(nn.Linear(DIM, DIM), norm()), "linear"),
    "absolute value": (lambda: After(lambda y, m: m.norm(y.abs()), norm=norm()), "abs"),
    "times itself": (lambda: After(lambda y, m: m.norm(y * y), norm=norm()), "mul"),
    "product of two readers": (lambda: After(lambda y, m: m.norm(y) * y.sigmoid(), norm=norm()), "sigmoid"),
    "channels moved to space": (
        lambda: After(lambda y, m: m.norm(y.flatten(2).unflatten(2, (DIM, 5)).transpose(2, 3)), norm=norm()),
        "differently",
    ),
}  # fmt: skip
BUILDERS = ANNIHILATED | {name: build for name, (build, _) in LIVE.items()}


@pytest.fixture(scope="module")
def everything():
    """One model with a block per case, its capture, and its sites by case."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ops = [zoo.SS2D(DIM, directions=2, state=2, after=build()) for build in BUILDERS.values()]
        model = zoo.TinyNet(ops, DIM).double().eval()
    gm = capture(model, zoo.images(2, dtype=torch.float64))
    sites = find_sites(gm)
    assert [s.name for s in sites] == [f"blocks.{i}.op" for i in range(len(BUILDERS))]
    return model, gm, dict(zip(BUILDERS, sites, strict=True))


def effect_of_a_shift(model, case):
    """Relative change of the output of a case's block when noise constant over the channels is added to its scan."""
    op = model.blocks[list(BUILDERS).index(case)].op
    generator = torch.Generator().manual_seed(5)

    def shifted(u, delta, A, B, C, D, bias):
        y = zoo.call_s1(u, delta, A, B, C, D, bias)
        noise = torch.randn(y.shape[0], op.directions, 1, y.shape[2], generator=generator, dtype=y.dtype)
        return y + noise.expand(-1, -1, DIM, -1).flatten(1, 2)

    tokens = torch.randn(2, 3, 5, DIM, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = op(tokens)
        op.call = shifted
        try:
            return relative_error(op(tokens), before)
        finally:
            op.call = None


@pytest.mark.parametrize("case", ANNIHILATED)
def test_annihilated(everything, case):
    model, _, sites = everything
    assert effect_of_a_shift(model, case) < 1e-10
    assert sites[case].annihilated and sites[case].kind == "annihilated", sites[case].reason
    assert "layer_norm" in sites[case].reason


@pytest.mark.parametrize("case", LIVE)
def test_live(everything, case):
    model, _, sites = everything
    assert effect_of_a_shift(model, case) > 1e-3
    assert not sites[case].annihilated and sites[case].kind == "live"
    assert LIVE[case][1] in sites[case].reason


def test_gate_and_skip_inside_the_call():
    def gated(u, delta, A, B, C, D, bias):
        return zoo.selective_scan_fn(u, delta, A, B, C, D, u * 0.5, bias, True)

    def bare(u, delta, A, B, C, D, bias):
        return zoo.selective_scan_fn(u, delta, A, B, C, None, None, bias, True)

    model = zoo.tiny(3)
    model.blocks[0].op.call, model.blocks[1].op.call = gated, bare
    found = [(s.skip, s.gate, s.annihilated) for s in find_sites(capture(model, zoo.images()))]
    assert found == [(True, True, False), (False, False, True), (True, False, True)]


def test_scan_that_is_also_an_output():
    class Shows(zoo.TinyNet):
        def forward(self, x):
            seen = []

            def call(*args):
                seen.append(zoo.call_s1(*args))
                return seen[-1]

            self.blocks[0].op.call = call
            return super().forward(x), seen[0]

    model = zoo.tiny()
    model.__class__ = Shows
    first, second = find_sites(capture(model, zoo.images()))
    assert not first.annihilated and "output" in first.reason
    assert second.annihilated


def test_scans_of_the_model_itself_are_those_of_one_module():
    model = OneByOne(6, directions=2).eval()
    traced = symbolic_trace(model, torch.randn(2, 3, 5, 6))
    for sites in (find_sites(capture(m, torch.randn(2, 3, 5, 6))) for m in (model, traced)):
        assert [site.name for site in sites] == ["selective_scan#0", "selective_scan#1"]
        assert {site.module for site in sites} == {"selective_scan"}


@pytest.mark.parametrize("directions, state", [(1, 1), (2, 4)])
def test_sizes_and_flops(directions, state):
    model = zoo.tiny(1, directions=directions, state=state, inner=8)
    (site,) = sites = find_sites(capture(model, zoo.images()))
    assert (site.groups, site.channels, site.state, site.length, site.dtype) == (directions, 8, state, 15, "float32")
    width = directions * 8 * 15
    # The authors' count: 9*B*L*D*N, of a replaced scan 10*B*L*N + B*L*D*N, and B*L*D for the skip of either.
    assert site.flops() == 9 * width * state + width
    assert site.flops(batch=3) == 3 * site.flops()
    assert site.flops_replaced() == width  # annihilated: only the skip is left
    live = type(site)(**site.to_dict() | {"annihilated": False, "skip": False})
    assert live.flops() == 9 * width * state
    assert live.flops_replaced(2) == 2 * (10 * directions * 15 * state + width * state)
    assert "blocks.0.op" in str(sites) and "annihilated" in str(sites)


def test_a_contradicted_verdict_is_an_error(monkeypatch):
    monkeypatch.setattr(sites_module, "is_annihilated", lambda node, groups: (True, "layer_norm_9"))
    gm = capture(zoo.live(1), zoo.images())
    with pytest.raises(SiteError, match=r"blocks.0.op: its structure says .*layer_norm_9.* moved the output"):
        find_sites(gm)
    assert find_sites(gm, probe=False)[0].annihilated


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_contradicts_nothing(dtype):
    """Channels that differ by little more than the rounding of the shift: a LayerNorm makes noise of them."""
    model = zoo.tiny(1, directions=1, state=1)
    op = model.blocks[0].op
    with torch.no_grad():
        for weight in (op.in_proj.weight, op.in_proj.bias, op.dt_proj[0], op.dt_bias, op.A_log, op.D):
            weight.copy_(weight[:1] + 1e-3 * weight)
        op.x_proj.mul_(8)
    outputs = {}
    for kind in (torch.float64, dtype):
        gm = capture(model.to(kind), zoo.images(dtype=kind))
        (site,) = find_sites(gm)
        assert site.annihilated
        scan = next(node for _, node in scan_nodes(gm))
        executor = Executor(gm, [scan], keep=[scan])
        with torch.no_grad():
            base, state = executor.run(zoo.images(dtype=kind))
            moved = executor.rerun(state, {scan: sites_module._shifted(state.value(scan), site)})
        outputs[kind] = sites_module._moved(base, moved, 0.0) or 0.0
    assert outputs[torch.float64] < 1e-9 and outputs[dtype] > 2e-2


def test_finding_changes_nothing(everything):
    _, gm, sites = everything
    code, rng = gm.code, torch.get_rng_state()
    assert list(find_sites(gm)) == list(sites.values())
    assert gm.code == code and len(scan_nodes(gm)) == len(sites)
    assert torch.equal(torch.get_rng_state(), rng)
