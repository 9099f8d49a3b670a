"""Symbolic tracing: scans as nodes however they are referenced, leaves, sharing, and whole models.

The truth is the eager model, bit for bit: both run the same kernels in the same order.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vmeanba_fx
from tests.helpers import make_scan_matter
from tests.official import load_official
from tests.symbolic.models import (
    ByDefaultArgument,
    ByGlobal,
    ByKeyword,
    ByLocalWrapper,
    ByMethod,
    Doubled,
    HidingFunction,
    Parent,
    ScanFunction,
    ScanModule,
    Small,
    Wrapped,
    assert_equal,
    calls_of,
    decorated,
    guards_of,
    images,
    make_closure,
    pad_to_even,
    scan_fn,
)
from vmeanba_fx import models
from vmeanba_fx.symbolic import GuardError, SymbolicTraceError, is_scan_signature, symbolic_trace

# einops scripts its layers at import; one test scripts a module itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

decorated_scan = decorated(scan_fn)
closure_scan = make_closure(True)
REFERENCES = {
    "module global": (ByGlobal, scan_fn),
    "keywords": (ByKeyword, scan_fn),
    "default argument": (ByDefaultArgument, scan_fn),
    "instance attribute": (lambda: Wrapped(scan_fn), scan_fn),
    "partial": (lambda: Wrapped(functools.partial(scan_fn, delta_softplus=True)), scan_fn),
    "lambda": (lambda: Wrapped(lambda *args: scan_fn(*args)), scan_fn),
    "closure": (lambda: Wrapped(closure_scan), closure_scan),
    "decorated": (lambda: Wrapped(decorated_scan), decorated_scan),
    "method": (lambda: Parent(ByMethod()), ByMethod.selective_scan),
    "local wrapper": (ByLocalWrapper, scan_fn),
    "forward on the instance": (lambda: Parent(Parent(ByGlobal())), scan_fn),
    "captured apply": (lambda: Wrapped(ScanFunction.apply), "ScanFunction"),
    "dictionary": (lambda: Wrapped({"v0": scan_fn}["v0"]), scan_fn),
    "module": (lambda: Wrapped(ScanModule()), ScanModule.forward),
    "hidden in a Function": (lambda: Wrapped(lambda u, d, *rest: HidingFunction.apply(u, *rest)), scan_fn),
}


# Compiled since PyTorch 2.14: what holds `SomeFunction.apply` itself is not seen by symbolic_trace (by capture it is).
PYTHON_APPLY = hasattr(torch.autograd.Function.apply, "__func__")


@pytest.mark.parametrize("name", [name for name in REFERENCES if PYTHON_APPLY or name != "captured apply"])
def test_scan_is_one_node_however_it_is_referenced(name):
    make, target = REFERENCES[name]
    model = make().eval()
    gm = symbolic_trace(model, images())
    gm.graph.lint()
    assert len(calls_of(gm, target)) == 1
    assert not calls_of(gm, torch.exp), "the scan was traced into"
    for batch, height, width in ((1, 4, 6), (5, 4, 6), (2, 3, 3), (2, 1, 9)):
        assert_equal(gm, model, images(batch, height, width, seed=batch))


def test_a_program_may_have_frozen_its_objects():
    """`gc.get_objects` does not list what servers freeze before they fork; the scans are among it."""
    make, target = REFERENCES["module global"]
    gc.freeze()
    try:
        gm = symbolic_trace(make().eval(), images())
        frozen = gc.get_freeze_count()
    finally:
        gc.unfreeze()
    assert frozen > 0 and calls_of(gm, target) and not calls_of(gm, torch.exp)


def test_several_scans_keep_order_and_count():
    model = nn.Sequential(
        ByGlobal(), nn.Unflatten(1, (1, -1)), nn.Unflatten(2, (4, -1)), nn.Conv2d(1, 3, 1), ByGlobal()
    )
    gm = symbolic_trace(model.eval(), images())
    assert [n.meta["nn_module_stack"].popitem()[1][0] for n in calls_of(gm, scan_fn)] == ["0", "4"]
    assert_equal(gm, model, images(3))


def test_parameters_are_shared_and_keys_unchanged():
    model = Parent(nn.Sequential(ByGlobal(), nn.Identity()))
    model.unused = nn.Linear(2, 2)
    model.tied = model.unused
    model.register_buffer("kept", torch.ones(1))
    model.register_buffer("not_kept", torch.ones(1), persistent=False)
    gm = symbolic_trace(model.eval(), images())
    assert list(gm.state_dict()) == list(model.state_dict())
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        assert parameter is own.pop(name)
    assert not own
    with torch.no_grad():
        model.child[0].A.mul_(0.5)
    assert_equal(gm, model, images())


@pytest.mark.parametrize("fails", [False, True])
def test_caller_is_left_alone(fails):
    def process():
        apply = torch.autograd.Function.__dict__.get("apply")  # none of its own where it is compiled
        patched = torch.zeros, torch.is_grad_enabled, torch.autocast.__enter__, isinstance
        return scan_fn.__code__, apply, getattr(getattr(apply, "__func__", None), "__code__", None), *patched

    model = Parent(
        nn.Sequential(ByGlobal(), Small(lambda self, x: x * random.random()) if fails else nn.Identity())
    ).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [{**vars(m), "_modules": dict(m._modules)} for m in model.modules()]
    before, random_state, python_state = process(), torch.get_rng_state(), random.getstate()
    x = images()
    with pytest.raises(SymbolicTraceError) if fails else contextlib.nullcontext():
        symbolic_trace(model, x)
    assert process() == before
    assert torch.is_grad_enabled() and all(m.training for m in model.modules())
    assert [{**vars(m), "_modules": dict(m._modules)} for m in model.modules()] == attributes
    assert torch.equal(torch.get_rng_state(), random_state) and random.getstate() == python_state
    assert torch.equal(x, images())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_are_nodes_unless_a_scan_hides_in_them():
    class OwnLinear(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2) if len(x.shape) == 4 else x

    class ScanLayer(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x).flatten(2)
            ones = torch.ones(y.shape[0], 1, 1, y.shape[2])
            return scan_fn(y, y.abs(), self.weight[:, :, 0, 0], ones, ones)

    class NoWeights(nn.Module):
        def forward(self, x):
            return x.permute(0, 1, 3, 2)

    model = nn.Sequential(OwnLinear(6, 6), NoWeights(), ScanLayer(3, 1, 1), nn.Sequential(nn.Flatten())).eval()
    gm = symbolic_trace(model, images())
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0", "3.0"]
    assert len(calls_of(gm, scan_fn)) == 1
    assert_equal(gm, model, images(3, 2, 6))
    gm = symbolic_trace(model, images(), leaf_modules=[NoWeights, nn.Sequential])
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0", "1", "3"]
    assert_equal(gm, model, images(3, 2, 6))


def test_structured_results():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        maps: list

    model = Small(lambda self, x: Output(logits=x.mean(), maps=[x, {"twice": x * 2}]))
    result = symbolic_trace(model, images())(images(3))
    assert torch.equal(result.logits, images(3).mean()) and torch.equal(result.maps[1]["twice"], images(3) * 2)


def test_scripted_module_is_a_leaf():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())), Small(pad_to_even))
    gm = symbolic_trace(model, images())
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["0"]
    assert_equal(gm, model, images(3))


def test_custom_backward_survives():
    gm = symbolic_trace(Small(lambda self, x: Doubled.apply(x).sum()), images())
    x = images().requires_grad_()
    gm(x).backward()
    assert torch.equal(x.grad, torch.full_like(x, 100.0))


def helper(x, power):
    return x**power if x.sum() > 0 else x


def test_leaf_functions():
    model = Small(lambda self, x: helper(x, 2) + helper(-x, power=3))
    gm = symbolic_trace(model, images(), leaf_functions=[functools.partial(helper, power=2), ScanFunction.apply])
    assert len(calls_of(gm, helper)) == 2 and guards_of(gm) == []
    assert_equal(gm, model, -images().abs())


def test_einops_on_proxies():
    einops = pytest.importorskip("einops")
    layer = pytest.importorskip("einops.layers.torch").Rearrange("b c h w -> b w c h")
    model = nn.Sequential(layer, Small(lambda self, x: einops.rearrange(x, "b c (h p) w -> (b p) (h w) c", p=1)))
    gm = symbolic_trace(model, images())
    assert guards_of(gm) == []
    assert_equal(gm, model, images(3, 8, 5))


def test_scan_that_does_not_run_here():
    """A CUDA-only kernel: its example value comes from our op, so the model is traced on any machine."""

    def cuda_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        raise NotImplementedError("no CUDA here")

    gm = symbolic_trace(Wrapped(functools.partial(cuda_scan, delta_softplus=True)), images())
    assert len(calls_of(gm, cuda_scan)) == 1
    with pytest.raises(NotImplementedError, match="no CUDA here"):
        gm(images())


def test_is_scan_signature():
    assert is_scan_signature(scan_fn) and is_scan_signature(ScanFunction) and is_scan_signature(decorated_scan)
    assert is_scan_signature(functools.partial(scan_fn, D=None)) and is_scan_signature(ByMethod().selective_scan)
    assert not any(is_scan_signature(other) for other in (helper, Doubled, nn.Linear, 3, torch.exp, make_closure))


def test_graph_is_readable_and_usable():
    model = nn.Sequential(Small(pad_to_even), nn.Conv2d(6, 3, 1), ByGlobal()).eval()
    gm = symbolic_trace(model, images())
    x = images(3, 8, 8)
    expected = model(x)
    code = gm.code
    for text in ("scan_fn(", "vmeanba_fx_symbolic_check_guard(", 'getattr(self, "1")', "if (W % 2 != 0)", "'0"):
        assert text in code.replace("in 0,", "in '0',")
    assert "symbolic/models.py" in gm.print_readable(print_output=False)
    gm.recompile()
    loaded = pickle.loads(pickle.dumps(gm))
    variants = [gm, copy.deepcopy(gm), loaded, torch.compile(gm, backend="eager")]
    for variant in variants:
        assert torch.equal(variant(x), expected)
        with pytest.raises(GuardError):
            variant(images(3, 8, 9))
    assert len(calls_of(loaded, scan_fn)) == len(calls_of(gm, scan_fn)) == 1
    assert len(guards_of(torch.fx.symbolic_trace(symbolic_trace(Small(pad_to_even), images())))) == 3
    traced_twice = symbolic_trace(gm, images())
    assert len(guards_of(traced_twice)) == len(guards_of(gm)) and torch.equal(traced_twice(x), expected)


@pytest.mark.parametrize("name", ["module global", "captured apply", "method"])
def test_capture_takes_a_traced_graph(name):
    model = REFERENCES[name][0]().eval()
    captured = vmeanba_fx.capture(symbolic_trace(model, images()), (images(),))
    scan = torch.ops.vmeanba_fx.selective_scan.default
    assert len([n for n in captured.graph.nodes if n.target is scan]) == 1
    torch.testing.assert_close(captured(images(3)), model(images(3)))


def test_export_with_dynamic_batch():
    gm = symbolic_trace(ByGlobal().eval(), images())
    program = torch.export.export(gm, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    torch.testing.assert_close(program.module()(images(5)), gm(images(5)))


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="expected input"):  # the model's own error: it does not run on this input
        symbolic_trace(ByGlobal(), torch.zeros(1, 4, 5, 5))
    with pytest.raises(SymbolicTraceError, match=r"takes an nn\.Module, not function"):
        symbolic_trace(scan_fn, images())
    with pytest.raises(SymbolicTraceError, match="the model is compiled"):
        symbolic_trace(torch.compile(nn.Identity()), images())
    with pytest.raises(SymbolicTraceError, match="needs example inputs"):
        symbolic_trace(nn.Identity())
    with pytest.raises(SymbolicTraceError, match="2 example inputs were given"):
        symbolic_trace(nn.Identity(), images(), images())
    with pytest.raises(SymbolicTraceError, match="leaf_functions takes"):
        symbolic_trace(nn.Identity(), images(), leaf_functions=[nn.Linear])
    with pytest.raises(SymbolicTraceError, match="leaf_modules takes module classes"):
        symbolic_trace(nn.Identity(), images(), leaf_modules=[scan_fn])
    with pytest.raises(SymbolicTraceError, match="meta device"):
        symbolic_trace(nn.Linear(2, 2, device="meta"), images())


# Whole models.


@pytest.mark.parametrize("kind", ["v0", "v05", "v05_noz", "v05_onnone", "v05_onsoftmax", "v052d", "v052dc_noz"])
def test_our_models(kind):
    norm = "ln" if kind in ("v0", "v05") else "ln2d"
    version = "v1" if norm == "ln" else "v3"
    options = dict(forward_type=kind, norm_layer=norm, downsample_version=version, ssm_d_state=2, num_classes=5)
    model = make_scan_matter(models.VSSM(dims=[8, 16], depths=[1, 1], **options)).eval()
    gm = symbolic_trace(model, images(2, 32, 32))
    assert list(gm.state_dict()) == list(model.state_dict())
    scans = [n for n in gm.graph.nodes if n.op == "call_function" and n.target.__module__.startswith("vmeanba_fx.ops")]
    assert len(scans) == (4 if "dc" in kind else 2)
    for batch, height, width in ((1, 32, 32), (5, 32, 48)):
        assert_equal(gm, model, images(batch, height, width))


OFFICIAL = [
    "v0", "v0seq", "v01", "v05", "v05_noz", "v05_onnone", "v05_onsigmoid_noz", "v05_ondwconv3", "v05_onsoftmax",
    "v05_oncnorm_noz", "v051d_noz", "v052d_noz", "v04_nozact_oact",
]  # fmt: skip


@pytest.mark.parametrize("layout", ["ln", "ln2d"])
@pytest.mark.parametrize("kind", OFFICIAL)
def test_official_vmamba(kind, layout):
    official = load_official()
    if kind.startswith("v0") and kind in ("v0", "v0seq") and layout == "ln2d":
        pytest.skip("v0 is channel-last only")
    version = "v1" if layout == "ln" else "v3"
    model = official.VSSM(
        dims=16, depths=[1, 1], forward_type=kind, norm_layer=layout, downsample_version=version, ssm_d_state=2,
        num_classes=5, ssm_dt_rank=2,
    )  # fmt: skip
    make_scan_matter(model).eval()
    gm = symbolic_trace(model, images(2, 16, 16))
    gm.graph.lint()
    assert list(gm.state_dict()) == list(model.state_dict())
    assert len(calls_of(gm, official.selective_scan_fn)) == (8 if kind == "v0seq" else 2)
    for batch, height, width in ((1, 16, 16), (2, 16, 16), (5, 16, 24)):
        assert_equal(gm, model, images(batch, height, width))
    if layout == "ln":  # PatchMerge pads odd sizes
        with pytest.raises(GuardError, match=r"layers\.0\.downsample\.0, .*W % 2"):
            gm(images(2, 16, 20))
