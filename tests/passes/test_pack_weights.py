"""Packed weights: the same outputs for any batch, fewer operations, and what cannot be packed stays as PyTorch has it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vmeanba_fx.passes import pack_weights as pack_pass

import vmeanba_fx
from tests.helpers import make_scan_matter, relative_error
from tests.passes.cases import COMMON, VARIANTS, planned, targets
from vmeanba_fx.graph import aten
from vmeanba_fx.models import VSSM

packed_ops = torch.ops.mkldnn
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def pack_small_layers(monkeypatch):
    monkeypatch.setitem(pack_pass.__globals__, "_LEAST_WORK", 0)


@pytest.mark.parametrize("name", ["v05_noz", "v05", "v0"])
def test_same_outputs_on_vmamba(name):
    plan, x = planned(name, torch.float32)
    for k in (0, len(plan.sites)):
        gm = plan.apply(k)
        packed = vmeanba_fx.pack_weights(gm)
        with torch.no_grad():
            for images in (x, x[:1]):
                assert relative_error(packed(images), gm(images)) < 1e-5
        assert aten.linear.default in targets(gm), "the graph it was made from must stay as it was"
        assert not {aten.linear.default, aten.conv2d.default} & set(targets(packed))
        assert len(targets(packed)) < len(targets(gm))
        assert "pack_weights (exact)" in str(vmeanba_fx.report(packed))


def test_bfloat16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this machine has no bfloat16 products")
    plan, x = planned("v05_noz", torch.float32)
    for k in (0, len(plan.sites)):
        gm = plan.apply(k)
        baked = vmeanba_fx.bake_autocast(gm, torch.bfloat16)
        with torch.no_grad():
            exact, packed = gm(x), vmeanba_fx.pack_weights(baked)(x)
            assert relative_error(packed.float(), exact) < 2 * relative_error(baked(x).float(), exact) + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_graph_that_was_cast(dtype):
    """What its nodes say of their values is of before the cast."""
    plan, x = planned("v05_noz", torch.float32)
    for k in (0, len(plan.sites)):
        gm, images = plan.apply(k).to(dtype), x.to(dtype)
        packed, unrolled = vmeanba_fx.pack_weights(gm), vmeanba_fx.unroll_depthwise(gm)
        assert all(n.meta["val"].dtype == dtype for n in packed.graph.find_nodes(op="placeholder"))
        with torch.no_grad():
            expected = gm(images)
            for found in (packed(images), unrolled(images)):
                assert found.dtype == dtype and relative_error(found, expected) < 10 * torch.finfo(dtype).eps


def test_open_height_and_width():
    model = make_scan_matter(VSSM(**COMMON, **VARIANTS["v05_noz"])).eval()
    x = torch.randn(2, 3, 28, 44, generator=torch.Generator().manual_seed(0))
    gm = vmeanba_fx.transform(vmeanba_fx.capture(model, x, dynamic_size=True), [x], k=1)
    packed = vmeanba_fx.pack_weights(gm)
    with torch.no_grad():
        for images in (x, torch.cat([x, x], 3)):
            assert relative_error(packed(images), gm(images)) < 1e-5


class Layers(nn.Module):
    """A scan, so that there is a graph to capture, and behind it a layer of each kind."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.randn(8, 1))
        self.expand, self.reduce = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.conv, self.deep = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 2, 2, groups=8)

    def forward(self, x):
        u = x.flatten(2)
        s = torch.ops.vmeanba_fx.selective_scan(u, u, -self.decay.exp(), u[:, None, :1], u[:, None, :1], None, None, None, True)
        rows = (s + u).transpose(1, 2)
        rows = (rows + self.reduce(rows)).contiguous()  # the other summand is not contiguous
        rows = rows + self.reduce(F.gelu(self.expand(rows)))  # both go in
        y = self.expand(rows)
        rows = F.silu(y) + y  # read twice
        rows = self.reduce(rows) + 1.0  # no tensor is added
        rows = self.reduce(rows) + rows[:, :1].contiguous()  # of another shape
        y = self.reduce(rows)
        rows = F.gelu(y + y, approximate="tanh")  # to itself
        rows = F.gelu(self.expand(rows), approximate="tanh")
        maps = F.silu(self.conv(rows.transpose(1, 2).unflatten(2, x.shape[2:])))
        return F.relu(self.deep(maps)) + F.conv2d(maps, self.deep.weight * maps.mean(), None, 2, 2, 2, 8)


def test_what_is_fused_and_what_is_not():
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 8, 6, 5)
    gm = vmeanba_fx.capture(model, x)
    packed = vmeanba_fx.pack_weights(gm)
    with torch.no_grad():
        assert relative_error(packed(x), model(x)) < 1e-5
    found = targets(packed)
    linear = [n for n in packed.graph.nodes if n.target is packed_ops._linear_pointwise.default]
    assert [n.args[3:] for n in linear if n.args[3] != "none"] == [("gelu", [], "none"), ("gelu", [], "tanh")]
    assert len(linear) == 7 and found.count(packed_ops._linear_pointwise.binary) == 1
    convolutions = [n.args[7] for n in packed.graph.nodes if n.target is packed_ops._convolution_pointwise.default]
    assert convolutions == ["swish", "relu"]
    assert found.count(aten.conv2d.default) == 1, "a weight that depends on the input is not packed"
    assert not list(packed.parameters()) and all("." not in str(n.target) for n in packed.graph.nodes if n.op == "get_attr")


def test_float64_stays():
    plan, x = planned("v05_noz", torch.float64)
    gm = plan.apply(0)
    packed = vmeanba_fx.pack_weights(gm)
    assert aten.linear.default in targets(packed)
    with torch.no_grad():
        assert relative_error(packed(x), gm(x)) < 1e-12


def test_refusals(monkeypatch):
    plan, _ = planned("v05_noz", torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(vmeanba_fx.GraphCheckError, match="no oneDNN"):
        vmeanba_fx.pack_weights(plan.apply(0))


def test_packed_graphs_only_run(tmp_path):
    plan, x = planned("v05_noz", torch.float32)
    packed = vmeanba_fx.pack_weights(plan.apply(0))
    before = targets(packed)
    steps = {
        "pack": lambda: vmeanba_fx.pack_weights(packed),
        "bake": lambda: vmeanba_fx.bake_autocast(packed, torch.bfloat16),
        "transform": lambda: vmeanba_fx.transform(packed, [x], k=0),
        "export": lambda: vmeanba_fx.export(packed, x, tmp_path / "packed.pt2"),
    }
    for step in steps.values():
        with pytest.raises(vmeanba_fx.VMeanbaError, match=r"^weights packed"):
            step()
    assert targets(packed) == before and not list(tmp_path.iterdir())
