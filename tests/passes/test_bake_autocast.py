"""Autocast baked into the graph: the same roundings as autocast, half the weights, no cast left to run time."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vmeanba_fx
from tests.helpers import relative_error
from tests.passes.cases import planned, targets
from vmeanba_fx.graph import aten, value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["v05_noz", "v05", "v05_onsoftmax", "v0"])
def test_close_to_float32_and_to_autocast(name, dtype):
    plan, x = planned(name, torch.float32)
    for k in (0, len(plan.sites)):
        gm = plan.apply(k)
        baked = vmeanba_fx.bake_autocast(gm, dtype)
        with torch.no_grad():
            exact, found = gm(x), baked(x)
            with torch.autocast("cpu", dtype):
                autocast = gm(x)
        assert found.dtype == autocast.dtype == dtype
        bound = 0.02 if dtype == torch.float16 else 0.12
        assert relative_error(found.float(), exact) < bound
        assert relative_error(found.float(), autocast.float()) < bound
        assert "bake_autocast (lossy)" in str(vmeanba_fx.report(baked))
        assert gm(x[:1]).dtype == torch.float32, "the graph it was made from must stay as it was"


def test_weights_are_halved_and_norms_are_not():
    plan, x = planned("v05_noz", torch.float32)
    gm = vmeanba_fx.bake_autocast(plan.apply(2))
    for node in gm.graph.nodes:
        if node.target in (aten.linear.default, aten.conv2d.default):
            assert {value(a).dtype for a in node.args[:3] if isinstance(a, torch.fx.Node)} == {torch.float16}
        if node.target is aten.layer_norm.default:
            assert len({value(a).dtype for a in node.all_input_nodes}) == 1, "LayerNorm takes one dtype on CUDA"
    assert gm(x[:1]).shape == (1, 5)


class Half(nn.Module):
    """A LayerNorm of a half map read by products alone, one also read by a sum, one of a float32 map."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.site = nn.Parameter(torch.randn(8, 1))

    def forward(self, x):
        y = self.inner(self.a(x))
        y = self.outer(self.b(y)) + 1.0
        z = self.c(y)
        dt = F.linear(z, self.inner.weight).transpose(1, 2)
        u = z.transpose(1, 2)
        s = torch.ops.vmeanba_fx.selective_scan(u, dt, -self.site.exp(), u[:, None, :1], u[:, None, :1], None, None, None, True)
        return s.transpose(1, 2) + z


def test_a_half_norm_that_products_alone_read_stays_half():
    model = Half()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    gm = vmeanba_fx.bake_autocast(vmeanba_fx.capture(model, x))
    norms = [value(n).dtype for n in gm.graph.nodes if n.target is aten.layer_norm.default]
    assert norms == [torch.float32, torch.float16, torch.float32]
    with torch.no_grad():
        assert relative_error(gm(x).float(), model(x)) < 0.02
    assert targets(gm).count(aten.to.dtype) <= 3


def test_the_recommended_compile_option_is_known():
    options = {"realize_reads_threshold": 2}
    assert f"options={json.dumps(options)}" in vmeanba_fx.bake_autocast.__doc__
    torch.compile(nn.Identity(), options=options)  # names that Inductor does not know are refused here


def test_refusals():
    plan, _ = planned("v05_noz", torch.float32)
    with pytest.raises(ValueError, match="autocast runs in"):
        vmeanba_fx.bake_autocast(plan.apply(0), torch.float64)
