"""``capture``: one graph that computes what the model computes, for any batch, with the caller's model left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from tests import zoo
from tests.zoo import vmamba_scan_fn
from vmeanba_fx.capture import capture, capture_info
from vmeanba_fx.errors import CaptureError, NoSitesError
from vmeanba_fx.graph import mutates, scan_nodes
from vmeanba_fx.sites import find_sites

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def agrees(gm, model, *args, bound=1e-5, **kwargs):
    """Relative error of the graph's first output tensor against the model's, under a bound."""
    with torch.no_grad():
        found, expected = gm(*args, **kwargs), model(*args, **kwargs)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = zoo.relative_error(found, expected)
    assert error <= bound, error
    return True


@pytest.fixture(scope="module")
def captured():
    """(model, its capture)."""
    model = zoo.tiny()
    return model, capture(model, zoo.images(3))


def test_the_scans_of_the_zoo_matter():
    """Otherwise every equality in these tests would hold whatever the scans compute."""
    for model in (zoo.tiny(), zoo.live()):
        with torch.no_grad():
            expected = model(zoo.images())
        assert zoo.relative_error(zoo.without_scan(model, zoo.images()), expected) > 0.1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch(captured, batch):
    model, gm = captured
    assert capture_info(gm).batch_dynamic
    assert agrees(gm, model, zoo.images(batch))


def test_batch_of_one_is_enough_to_capture():
    model = zoo.tiny(1)
    gm = capture(model, zoo.images(1))
    assert agrees(gm, model, zoo.images(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = zoo.tiny().to(dtype)
    gm = capture(model, zoo.images(3, dtype=dtype))
    sites = find_sites(gm)
    assert {s.dtype for s in sites} == {str(dtype).removeprefix("torch.")}
    assert agrees(gm, model, zoo.images(5, dtype=dtype), bound=BOUND[dtype])


def test_the_graph_is_flat_named_and_free_of_its_makers_traces(captured):
    _, gm = captured
    assert [node.meta["vmeanba_fx.site"] for _, node in scan_nodes(gm)] == ["blocks.0.op", "blocks.1.op"]
    assert not gm.training
    for node in gm.graph.nodes:
        assert not {"stack_trace", "from_node", "torch_fn"} & set(node.meta)
        if node.op == "call_function":
            assert "promote_types" not in str(node.target) and "_assert_tensor_metadata" not in str(node.target)


def test_dynamic_size():
    model = zoo.tiny(1)
    gm = capture(model, zoo.images(3), dynamic_size=True)
    assert {dim for _, dim in capture_info(gm).dynamic} == {0, 2, 3}
    for batch, height, width in [(1, 12, 20), (2, 8, 8), (5, 16, 24), (1, 13, 22)]:
        assert agrees(gm, model, torch.randn(batch, 3, height, width))


class StaticBatch(zoo.TinyNet):
    """Reads its batch size as a number, as MambaVision does."""

    def forward(self, x):
        return super().forward(x).reshape(int(x.shape[0]), -1)


class StaticSize(zoo.TinyNet):
    """Checks its image size, as Vim does."""

    def forward(self, x):
        if x.shape[2] != zoo.HEIGHT or x.shape[3] != zoo.WIDTH:
            raise ValueError("wrong image size")
        return super().forward(x)


def as_class(cls, model):
    model.__class__ = cls
    return model


def test_model_that_specialises_its_batch():
    model = as_class(StaticBatch, zoo.tiny(1))
    gm = capture(model, zoo.images(3))
    info = capture_info(gm)
    assert not info.batch_dynamic
    assert info.notes == ("the model specialises its batch size: the graph runs for batch 3 only",)
    assert agrees(gm, model, zoo.images(3))
    with pytest.raises(AssertionError, match=r"x.size\(\)\[0\] == 3"):
        gm(zoo.images(2))


def test_model_that_specialises_its_size():
    model = as_class(StaticSize, zoo.tiny(1))
    gm = capture(model, zoo.images(3), dynamic_size=True)
    info = capture_info(gm)
    assert info.dynamic == (("x", 0),)
    assert info.notes == ("the model specialises its height and width: the graph runs for the captured size only",)
    assert agrees(gm, model, zoo.images(2))
    with pytest.raises(AssertionError, match=r"x.size\(\)\[2\] == 12"):
        gm(torch.randn(2, 3, 16, 20))


class WithOptions(nn.Module):
    """Keyword inputs of several kinds, outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.net = zoo.tiny(1)

    def forward(self, pixel_values, *, scale=None, negate=False):
        logits = self.net(pixel_values)
        if scale is not None:
            logits = logits * scale[:, None]
        return {"logits": -logits if negate else logits, "more": (logits.sum(), [pixel_values.mean()])}


def test_keyword_inputs_and_structured_outputs():
    model = WithOptions()
    inputs = {"pixel_values": zoo.images(3), "scale": torch.rand(3), "negate": True}
    gm = capture(model, (), inputs)
    five = {"negate": True, "scale": torch.rand(5), "pixel_values": zoo.images(5)}
    with torch.no_grad():
        found, expected = gm(**five), model.eval()(**five)
    assert list(found) == ["logits", "more"] and isinstance(found["more"], tuple)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_positional_and_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = zoo.tiny(1)

        def forward(self, batch, offset):
            return self.net(batch["views"][0] + batch["views"][1]) + offset

    model = Nested().eval()

    def inputs(n):
        return ({"views": [zoo.images(n), zoo.images(n, seed=9)]}, torch.ones(n, 1))

    gm = capture(model, inputs(3))
    assert agrees(gm, model, *inputs(5))


# -- the caller's model stays as it is -------------------------------------------------------------------------------


class Lively(nn.Module):
    """Dropout, batch norm, a lambda that refers to the module itself, and a counter."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.net = zoo.tiny(1)
        self.calls = 0
        self.through = lambda x: self.net(self.drop(self.norm(x)))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.through(x)


def test_the_callers_model_is_not_touched():
    torch.manual_seed(3)
    model = Lively().train()
    model.net.eval()
    model.norm.running_mean.fill_(0.5)
    state, modes = copy.deepcopy(model.state_dict()), {n: m.training for n, m in model.named_modules()}
    attributes, rng = set(vars(model)), torch.get_rng_state()
    gm = capture(model, zoo.images(3))
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert set(vars(model)) == attributes and model.calls == 0
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the graph has weights of its own
    fresh = Lively().eval()
    fresh.load_state_dict(state)
    assert agrees(gm, fresh, zoo.images(3))


def test_capture_of_a_capture_is_a_copy(captured):
    model, gm = captured
    again = capture(gm, zoo.images(3))
    assert again is not gm and again.graph is not gm.graph
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert agrees(gm, model, zoo.images(2))


# -- other front doors -----------------------------------------------------------------------------------------------


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


class AutocastBlock(zoo.Block):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.op(self.norm(x))
        return x + y.float()


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


def test_modes_around_the_call_do_not_enter_the_graph(captured):
    model, _ = captured
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agrees(capture(model, zoo.images(3)).eval(), model, zoo.images(2), bound=2e-2)
        gm = capture(model, zoo.images(3))
    assert agrees(gm, model, zoo.images(2))
    with torch.inference_mode():
        assert agrees(capture(model, zoo.images(3)), model, zoo.images(2))


def test_compiled_models_are_unwrapped(captured):
    """Nothing is compiled on the way, and the sites have the names they have without ``torch.compile``."""

    def must_not_run(gm, inputs):
        raise AssertionError("compiled while capturing")

    _, gm = captured
    model = zoo.tiny()
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


# -- in-place operators ----------------------------------------------------------------------------------------------


class InPlaceBlock(zoo.Block):
    def forward(self, x):
        x = x.clone()
        x += self.op(self.norm(x))
        return F.relu_(x)


def in_place_net():
    model = zoo.live()
    model.blocks = nn.ModuleList(InPlaceBlock(6, block.op) for block in model.blocks)
    return model.eval()


def test_in_place_operators_become_data_flow():
    model = in_place_net()
    gm = capture(model, zoo.images(3))
    assert not any(mutates(node) for node in gm.graph.nodes)
    assert [s.name for s in find_sites(gm)] == ["blocks.0.op", "blocks.1.op"]
    assert agrees(gm, model, zoo.images(5))


# -- refusals --------------------------------------------------------------------------------------------------------


def with_state(u, delta, A, B, C, D, bias):
    y, state = zoo.selective_scan_fn(u, delta, A, B, C, D, None, bias, True, return_last_state=True)
    return y + 0.1 * state.sum(-1, keepdim=True)


def two_dimensional(u, delta, A, B, C, D, delta_bias, HH, WW):
    return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, True)[0]


def only_states(u, delta, A, B, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    return delta * u


def complex_scan(u, delta, A, B, C, D, bias):
    return zoo_complex(u, delta, torch.complex(A, A), B, C, D).real


def zoo_complex(u, delta, A, B, C, D=None, z=None, delta_bias=None):
    return (u + A.real.sum() + 0j) * 2


def constant(u, delta, A, B, C, D, bias):
    B, C = (t[0, 0, :, 0].expand(u.shape[1], -1) for t in (B, C))
    return zoo_constant(u, delta, A, B, C, D, bias)


def zoo_constant(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
    """B and C are (D, N), the same at every step."""
    B, C = (t[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2]) for t in (B, C))
    return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


REFUSED = {
    "last state": (with_state, "its last state is used"),
    "2-D": (lambda u, d, A, B, C, D, bias: two_dimensional(u, d, A, B, C, D, bias, 3, 5), "2-D recurrence"),
    "states only": (lambda u, d, A, B, C, D, bias: only_states(u, d, A, B, D, None, bias), "no C and returns the states"),
    "complex A": (complex_scan, "A is complex"),
    "constant B and C": (constant, "one channel per group"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scans_that_are_no_sites(name):
    """Refused with a sentence that names the module; a model with nothing else is an error, and still captured right."""
    call, sentence = REFUSED[name]
    model = zoo.tiny(1, directions=1, call=call)
    x = zoo.images(2)[:, :, :8, :8]
    gm = capture(model, x)
    assert agrees(gm, model, x)
    with pytest.raises(NoSitesError, match=rf"no selective scan to rewrite \(blocks.0.op: .*{sentence}"):
        find_sites(gm)


def test_refused_scans_stand_beside_sites():
    model = zoo.tiny()
    model.blocks[1].op.call = with_state
    sites = find_sites(capture(model, zoo.images(3)))
    assert [s.name for s in sites] == ["blocks.0.op"]
    assert sites.refused == [("blocks.1.op", "its last state is used, which a one-channel scan does not have")]
    assert "blocks.1.op: not a site, its last state is used" in str(sites)


def test_unread_last_state_is_no_reason():
    def call(u, delta, A, B, C, D, bias):
        return zoo.selective_scan_fn(u, delta, A, B, C, D, None, bias, True, return_last_state=True)[0]

    assert [s.name for s in find_sites(capture(zoo.tiny(1, call=call), zoo.images(3)))] == ["blocks.0.op"]


def test_model_without_scans():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with pytest.raises(NoSitesError, match=r"^the model has no selective scan to rewrite\. Teach"):
        find_sites(capture(model, zoo.images(2)))


# -- bad input -------------------------------------------------------------------------------------------------------


def test_meta_device():
    with pytest.raises(CaptureError, match="meta device: load its weights"):
        capture(zoo.tiny(1).to("meta"), zoo.images())


def test_inputs_that_do_not_fit():
    model = zoo.tiny(1)
    with pytest.raises(CaptureError, match=r"does not run on the example input \(\(2, 5, 8, 8\)\)"):
        capture(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(CaptureError, match="no example input"):
        capture(model, ())
    with pytest.raises(CaptureError, match="batch size 0"):
        capture(model, torch.randn(0, 3, 12, 20))


def test_model_that_cannot_be_copied():
    model = zoo.tiny(1)
    model.lock = type("Locked", (), {"__deepcopy__": lambda self, memo: 1 / 0})()
    with pytest.raises(CaptureError, match="cannot be deep-copied"):
        capture(model, zoo.images())


def test_plain_graph_modules_carry_no_capture():
    with pytest.raises(CaptureError, match="was not made by"):
        capture_info(fx.symbolic_trace(nn.ReLU()))
