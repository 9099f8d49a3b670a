"""What a capture can be made of: traced graphs, exported programs, autocast and checkpoint regions, compiled models."""

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from tests import zoo
from tests.capturing.models import AutocastBlock
from tests.helpers import agrees
from tests.paper_block import paper_block
from tests.zoo import vmamba_scan_fn
from vmeanba_fx import transform
from vmeanba_fx.capturing.capture import capture
from vmeanba_fx.errors import CaptureError
from vmeanba_fx.graph import scan_nodes
from vmeanba_fx.sites import find_sites


class Mixer(nn.Module):
    """A scan over a sequence (B, D, L) that plain ``torch.fx`` can trace; the scan call is a leaf."""

    def __init__(self, seed, dim=6, state=3):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.norm = nn.LayerNorm(dim)
        self.dt, self.B, self.C = weight(dim, dim), weight(state, dim), weight(state, dim)
        self.A_log, self.D, self.bias = weight(dim, state), weight(dim), weight(dim)

    def arguments(self, x):
        return x, self.dt @ x, -torch.exp(self.A_log), (self.B @ x)[:, None], (self.C @ x)[:, None], self.D

    def forward(self, x):
        y = vmamba_scan_fn(*self.arguments(x), self.bias)
        return x + self.norm(y.transpose(1, 2)).transpose(1, 2)


class OpMixer(Mixer):
    """The same through our op."""

    def forward(self, x):
        y = torch.ops.vmeanba_fx.selective_scan(*self.arguments(x), None, self.bias, True)
        return x + self.norm(y.transpose(1, 2)).transpose(1, 2)


class LeafTracer(fx.Tracer):
    def __init__(self):
        super().__init__(autowrap_functions=(vmamba_scan_fn,))


@pytest.mark.parametrize("kind", [Mixer, OpMixer])
def test_symbolically_traced_graph(kind):
    """``torch.fx`` with the scan, or our op, as a leaf: sites keep the module paths that fx knows."""
    model = nn.Sequential(nn.Sequential(kind(1), kind(2)), kind(3)).eval()
    traced = fx.GraphModule(model, LeafTracer().trace(model))
    leaf = vmamba_scan_fn if kind is Mixer else torch.ops.vmeanba_fx.selective_scan
    assert [n.target for n in traced.graph.nodes].count(leaf) == 3
    gm = capture(traced, torch.randn(3, 6, 9))
    assert [s.name for s in find_sites(gm)] == ["0.0", "0.1", "1"]
    assert agrees(gm, model, torch.randn(5, 6, 9))


def test_several_scans_of_one_module_are_numbered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Mixer(1)

        def forward(self, x):
            first = vmamba_scan_fn(*self.mixer.arguments(x), self.mixer.bias)
            return first + vmamba_scan_fn(*self.mixer.arguments(x.flip(-1)), self.mixer.bias).flip(-1)

    model = nn.Sequential(Twice()).eval()
    for given in (model, fx.GraphModule(model, LeafTracer().trace(model))):
        assert [s.name for s in find_sites(capture(given, torch.randn(3, 6, 9)))] == ["0#0", "0#1"]


def test_exported_program_with_our_op():
    model = zoo.tiny(1)
    gm = capture(model, zoo.images(3))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(gm, (zoo.images(3),), dynamic_shapes=({0: batch},))
    for args in ((), (zoo.images(2),)):
        again = capture(program, args)
        assert [s.name for s in find_sites(again)] == ["blocks.0.op"]
        assert agrees(again, model, zoo.images(5))


def test_exported_program_without_our_op_is_refused():
    class Unrolled(nn.Module):
        def forward(self, x):
            return x.cumsum(-1)

    program = torch.export.export(Unrolled(), (torch.randn(2, 3),))
    with pytest.raises(CaptureError, match=r"holds no vmeanba_fx op.*capture\(\) on the nn.Module"):
        capture(program)


def autocast_net():
    model = zoo.live()
    model.blocks = nn.ModuleList(AutocastBlock(6, block.op) for block in model.blocks)
    return model.eval()


def test_scans_inside_autocast_regions_are_found():
    model = autocast_net()
    gm = capture(model, zoo.images(3))
    sites = find_sites(gm)
    assert [s.name for s in sites] == ["blocks.0.op", "blocks.1.op"]
    assert all(owner is not gm for owner, _ in scan_nodes(gm)) and not any(s.annihilated for s in sites)
    assert agrees(gm, model, zoo.images(5), bound=2e-2)


def test_sites_come_in_order_of_execution():
    """Also where the first scan lies in a sub-graph and the second does not."""
    model = zoo.live()
    model.blocks = nn.ModuleList([AutocastBlock(6, model.blocks[0].op), model.blocks[1]]).eval()
    assert [s.name for s in find_sites(capture(model, zoo.images(3)))] == ["blocks.0.op", "blocks.1.op"]


class Island(zoo.SS2D):
    """Keeps its scan out of the autocast region around the whole model."""

    def scan(self, *args):
        with torch.autocast("cpu", enabled=False):
            return super().scan(*(t.float() for t in args))


class Autocast(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)


def test_regions_inside_of_regions():
    model = zoo.live(2)
    for block in model.blocks:
        block.op.__class__ = Island
    model = Autocast(model)
    gm = capture(model, zoo.images(3))
    assert [s.name for s in find_sites(gm)] == ["net.blocks.0.op", "net.blocks.1.op"]
    assert agrees(transform(gm, [zoo.images(3)], k=0), model, zoo.images(5), bound=2e-2)
    replaced = transform(gm, [zoo.images(3)], sites="*")
    for block in model.net.blocks:
        block.op.call = paper_call
    assert agrees(replaced, model, zoo.images(5), bound=2e-2)


def paper_call(u, delta, A, B, C, D, bias):
    return paper_block(u, delta, A, B, C, D, None, bias, True)


def test_modes_around_the_call_do_not_enter_the_graph():
    model = zoo.tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agrees(capture(model, zoo.images(3)).eval(), model, zoo.images(2), bound=2e-2)
        gm = capture(model, zoo.images(3))
    assert agrees(gm, model, zoo.images(2))
    with torch.inference_mode():
        assert agrees(capture(model, zoo.images(3)), model, zoo.images(2))


def test_compiled_models_are_unwrapped():
    """Nothing is compiled on the way, and the sites have the names they have without ``torch.compile``."""

    def must_not_run(gm, inputs):
        raise AssertionError("compiled while capturing")

    model = zoo.tiny()
    gm = capture(model, zoo.images(3))
    model.blocks[1].op.compile(backend=must_not_run)
    again = capture(torch.compile(model, backend=must_not_run), zoo.images(3))
    assert again.code == gm.code and [s.name for s in find_sites(again)] == ["blocks.0.op", "blocks.1.op"]


def test_models_that_recompute_activations():
    class Checkpointed(zoo.Block):
        def forward(self, x):
            return x + checkpoint(self.op, self.norm(x), use_reentrant=False)

    model = zoo.live()
    model.blocks = nn.ModuleList(Checkpointed(6, block.op) for block in model.blocks).eval()
    gm = capture(model, zoo.images(3))
    assert [s.name for s in find_sites(gm)] == ["blocks.0.op", "blocks.1.op"]
    assert agrees(gm, model, zoo.images(5))
