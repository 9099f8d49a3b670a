"""Depthwise convolutions as sums of shifted maps: the same outputs, and only where it is one filter a channel, step by step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vmeanba_fx.passes import unroll_depthwise

import vmeanba_fx
from tests.helpers import relative_error
from tests.passes.cases import planned
from vmeanba_fx.graph import aten


class Net(nn.Module):
    """A convolution of a map whose channels are innermost, between steps that keep them so."""

    def __init__(self, computed: bool = False, **options) -> None:
        super().__init__()
        self.computed, self.norm = computed, nn.LayerNorm(6)
        self.conv = nn.Conv2d(6, **{"out_channels": 6, "kernel_size": 3, "groups": 6} | options)

    def forward(self, x):
        maps = self.norm(x).permute(0, 3, 1, 2)
        if not self.computed:
            return F.silu(self.conv(maps))
        return F.conv2d(maps, self.conv.weight.tanh(), None, 1, 1, 1, 6)


def unrolled(model, x):
    return unroll_depthwise(vmeanba_fx.capture(model, x))


def convolutions(gm) -> int:
    return sum(node.target in (aten.conv2d.default, aten.conv2d.padding) for node in gm.graph.nodes)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"kernel_size": 5, "bias": False}, {"kernel_size": (1, 4), "padding": (0, 2)}, {"padding": 3}]
)
def test_exact(options):
    model = Net(**options).double()
    x = torch.randn(3, 7, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = unrolled(model, x)
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-14
        assert relative_error(gm(x[:1]), model(x[:1])) < 1e-14
    assert convolutions(gm) == 0
    assert {p.shape[0] for p in gm.parameters() if p.dim() == 2} == {model.conv.weight[0].numel()}, "taps can be trained"


def test_maps_of_any_size():
    model = Net(padding=1).double()
    x = torch.randn(3, 7, 9, 6, dtype=torch.float64)
    sizes = dict.fromkeys((0, 1, 2), torch.export.Dim.AUTO)
    program = torch.export.export(model, (x,), dynamic_shapes=[sizes], strict=False)
    gm = unroll_depthwise(program.module(check_guards=False))
    with torch.no_grad():
        for images in (x, torch.cat([x, x], 2)):
            assert relative_error(gm(images), model(images)) < 1e-14
    assert convolutions(gm) == 0


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"groups": 1}, {"groups": 2}, {"out_channels": 12}, {"kernel_size": 6},
     {"padding": "same"}, {"computed": True}],
)  # fmt: skip
def test_other_convolutions_stay(options):
    assert convolutions(unrolled(Net(**options), torch.randn(2, 8, 9, 6))) == 1


def test_channel_first_maps_stay():
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6))
    assert convolutions(unrolled(model, torch.randn(2, 6, 8, 9))) == 1


def test_on_a_vmamba():
    plan, x = planned("v05_noz", torch.float32)
    for k in (0, len(plan.sites)):
        gm = plan.apply(k)
        new = vmeanba_fx.unroll_depthwise(gm)
        assert convolutions(gm) - convolutions(new) == len(plan.sites)
        assert "unroll_depthwise (exact)" in str(vmeanba_fx.report(new))
        half = vmeanba_fx.bake_autocast(gm, torch.bfloat16)
        with torch.no_grad():
            exact = gm(x)
            assert relative_error(new(x), exact) < 1e-5
            assert relative_error(vmeanba_fx.unroll_depthwise(half)(x), exact) < 1.5 * relative_error(half(x), exact)
