"""Pointwise steps on channels-last maps work on three axes; what treats positions differently keeps its four."""

import torch
import torch.nn.functional as F
from torch import nn
from vmeanba_fx.passes import flatten_positions

import vmeanba_fx
from tests.helpers import relative_error
from tests.passes.cases import planned
from vmeanba_fx.graph import aten, value

MAPS = (aten.linear.default, aten.layer_norm.default, aten.add.Tensor, aten.gelu.default)


class Net(nn.Module):
    """Steps alike for all positions, then a sum with a map of positions, then a norm over the width as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)
        self.gain = nn.Parameter(torch.randn(6))
        self.places = nn.Parameter(torch.randn(1, 4, 5, 6))
        self.wide = nn.LayerNorm((5, 6))

    def forward(self, x):
        y = x + F.gelu(self.linear(self.norm(x))) * self.gain
        y = self.linear(2.0 * y + self.places)
        return self.wide(y).permute(0, 3, 1, 2)


def dims(gm, target) -> list[int]:
    return [value(n).dim() for n in gm.graph.find_nodes(op="call_function", target=target)]


def test_exact_and_only_where_positions_are_alike():
    model = Net().double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gm = flatten_positions(vmeanba_fx.capture(model, x))
    with torch.no_grad():
        assert relative_error(gm(x), model(x)) < 1e-14
        assert relative_error(gm(x[:1]), model(x[:1])) < 1e-14
    assert dims(gm, aten.linear.default) == [3, 3]
    assert dims(gm, aten.gelu.default) == [3]
    assert dims(gm, aten.layer_norm.default) == [3, 4], "a norm over width and channels is none over the channels"
    assert dims(gm, aten.add.Tensor) == [3, 4], "the second sum is different at every position"


def test_maps_of_any_size_stay_as_they_are():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)).double()
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    sizes = dict.fromkeys((0, 1, 2), torch.export.Dim.AUTO)
    program = torch.export.export(model, (x,), dynamic_shapes=[sizes], strict=False)
    gm = flatten_positions(program.module(check_guards=False))
    assert dims(gm, aten.linear.default) == [4]


def test_the_residual_stream_of_a_vmamba_has_three_axes():
    plan, _ = planned("v05_noz", torch.float32)
    for k in (0, len(plan.sites)):
        gm = plan.apply(k)
        assert {d for target in MAPS for d in dims(gm, target)} <= {2, 3}
        baked = vmeanba_fx.bake_autocast(gm)
        for conv in baked.graph.find_nodes(op="call_function", target=aten.conv2d.default):
            assert conv.args[0].target in (aten.permute.default, aten.to.dtype), "casts come before what only moves the map"
            if conv.args[0].target is aten.to.dtype:
                assert conv.args[0].args[0].op == "placeholder"
