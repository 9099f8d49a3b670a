"""Every way public code refers to its scan is found, redirected to one op while tracing, and put back afterwards."""

import functools
import sys
import threading
import types

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.zoo import ScanFunction, selective_scan_fn, vmamba_scan_fn
from vmeanba_fx import ops
from vmeanba_fx.capture import capture_info
from vmeanba_fx.families import canonical
from vmeanba_fx.intercept import cpu_device_guard, intercept
from vmeanba_fx.ops.last_state import last_state
from vmeanba_fx.registry import find_spec, parameter_names, registered_scans, unregister_scan

ARGUMENTS = zoo.scan_inputs(directions=2, length=11, dtype=torch.float32)
U, DELTA, A, B, C, D, BIAS = (ARGUMENTS[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias"))


def own_scan():
    """A scan that only its caller can reach: no module holds it."""

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        y, state = zoo.loop_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, state) if return_last_state else y

    return scan


def own_function():
    """The same as an ``autograd.Function`` class."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
            return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]

    return Own


class Caller(nn.Module):
    """``forward(u, delta)`` scans through ``call``; further attributes as given."""

    def __init__(self, call, **attributes):
        super().__init__()
        self.call = call
        self.__dict__.update(attributes)

    def forward(self, u, delta):
        return self.call(self, u, delta)


class WithMethod(nn.Module):
    def selective_scan(self, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
        return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]

    def forward(self, u, delta):
        return self.selective_scan(u, delta, A, B, C, D, BIAS)


class ScanModule(nn.Module):
    def forward(self, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
        return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


class ScanObject:
    def __call__(self, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
        return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


class Inherits(own_function()):
    """An ``autograd.Function`` whose forward is its base's."""


def with_default():
    def call(self, u, delta, scan=own_scan()):  # noqa: B008
        return scan(u, delta, A, B, C, D, None, BIAS, True)

    return Caller(call)


def with_keyword_default():
    def call(self, u, delta, *, scan=own_scan()):  # noqa: B008
        return scan(u, delta, A, B, C, D, None, BIAS, True)

    return Caller(call)


def in_closure():
    scan = own_scan()
    return Caller(lambda self, u, delta: scan(u, delta, A, B, C, D, None, BIAS, True))


def decorated(wrap):
    scan = own_scan()

    def passes_on(*args, **kwargs):
        return scan(*args, **kwargs)

    wrapped = functools.wraps(scan)(passes_on) if wrap else passes_on
    return Caller(lambda self, u, delta: wrapped(u, delta, A, B, C, D, None, BIAS, True))


def by_property():
    scan = own_scan()

    class Has(nn.Module):
        scan_fn = property(lambda self: scan)

        def forward(self, u, delta):
            return self.scan_fn(u, delta, A, B, C, D, None, BIAS, True)

    return Has()


def forward_on_instance():
    model = Caller(None, scan=own_scan())
    model.forward = functools.partial(lambda self, u, delta: self.scan(u, delta, A, B, C, D, None, BIAS, True), model)
    return model


SHORT = {"delta_softplus": True, "delta_bias": BIAS, "D": D}
WAYS = {
    "module global": lambda: Caller(lambda s, u, d: zoo.call_s1(u, d, A, B, C, D, BIAS)),
    "from import": lambda: Caller(lambda s, u, d: selective_scan_fn(u, d, A, B, C, D, None, BIAS, True)),
    "attribute of a module": lambda: Caller(lambda s, u, d: zoo.vmamba_scan_fn(u, d, A, B, C, D, BIAS)),
    "keywords in another order": lambda: Caller(
        lambda s, u, d: selective_scan_fn(C=C, B=B, A=A, delta=d, u=u, **SHORT)
    ),
    "instance attribute": lambda: Caller(
        lambda s, u, d: s.scan(u, d, A, B, C, D, None, BIAS, True), scan=own_scan()
    ),
    "partial": lambda: Caller(
        lambda s, u, d: s.scan(u, d, A, B, C), scan=functools.partial(own_scan(), **SHORT)
    ),
    "partial of a partial": lambda: Caller(
        lambda s, u, d: s.scan(u, d, A, B, C),
        scan=functools.partial(functools.partial(own_scan(), D=D), delta_bias=BIAS, delta_softplus=True),
    ),
    "closure": in_closure,
    "default argument": with_default,
    "keyword-only default": with_keyword_default,
    "dictionary": lambda: Caller(
        lambda s, u, d: s.variants["v1"](u, d, A, B, C, **SHORT), variants={"v0": None, "v1": own_scan()}
    ),
    "list": lambda: Caller(lambda s, u, d: s.variants[1](u, d, A, B, C, **SHORT), variants=[0, own_scan()]),
    "namespace": lambda: Caller(
        lambda s, u, d: s.kernels.scan(u, d, A, B, C, **SHORT), kernels=types.SimpleNamespace(scan=own_scan())
    ),
    "Function.apply": lambda: Caller(lambda s, u, d: ScanFunction.apply(u, d, A, B, C, D, BIAS, True, 1)),
    "captured Function.apply": lambda: Caller(
        lambda s, u, d: s.scan(u, d, A, B, C, D, BIAS, True), scan=own_function().apply
    ),
    "Function.apply of a base": lambda: Caller(lambda s, u, d: Inherits.apply(u, d, A, B, C, D, BIAS, True)),
    "method": WithMethod,
    "static method": lambda: Caller(
        lambda s, u, d: s.holder.scan(u, d, A, B, C, **SHORT),
        holder=type("Holder", (), {"scan": staticmethod(own_scan())}),
    ),
    "module": lambda: Caller(lambda s, u, d: s.inner[0](u, d, A, B, C, D, BIAS), inner=[ScanModule()]),
    "callable object": lambda: Caller(lambda s, u, d: s.scan(u, d, A, B, C, D, BIAS), scan=ScanObject()),
    "decorated": lambda: decorated(wrap=True),
    "decorated without wraps": lambda: decorated(wrap=False),
    "decorated by torch": lambda: Caller(
        lambda s, u, d: s.scan(u, d, A, B, C, **SHORT), scan=torch.no_grad()(own_scan())
    ),
    "property": by_property,
    "forward set on the instance": forward_on_instance,
}  # fmt: skip


class Recorder:
    """An ``emit`` that computes the call with our op and remembers it."""

    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        y = ops.selective_scan(
            call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias, call.delta_softplus,
            call.out_dtype,
        )  # fmt: skip
        if not call.return_last_state:
            return y
        return y, last_state(call.u, call.delta, call.A, call.B, call.delta_bias, call.delta_softplus)


def redirected(model, *args):
    """Output of ``model`` under interception, run twice: (output, calls of the second run)."""
    record = Recorder()
    with torch.no_grad(), intercept(model, record, lambda: ""):
        model(*args)
        record.calls.clear()  # the first call of a function is tried on a few steps before it is trusted
        return model(*args), record.calls


SMALL = zoo.images(2)[:, :, :8, :8]  # L = 4, for scans that export unrolls
EXPECTED = zoo.loop_scan(U, DELTA, A, B, C, D, None, BIAS, True)[0]


@pytest.mark.parametrize("way", WAYS)
def test_every_reference_is_redirected_and_put_back(way):
    model = WAYS[way]()
    found, calls = redirected(model, U, DELTA)
    assert len(calls) == 1
    torch.testing.assert_close(found, EXPECTED, rtol=1e-5, atol=1e-5)
    call = calls[0]
    assert call.u is U and call.delta is DELTA and call.D is D and call.delta_bias is BIAS and call.delta_softplus
    assert call.B.shape == B.shape and call.z is None
    # Afterwards the model runs its own code again.
    calls.clear()
    assert torch.equal(model(U, DELTA), EXPECTED)
    assert not calls


def test_functions_are_put_back_exactly():
    def state(fn):
        return fn.__code__, fn.__defaults__, fn.__kwdefaults__

    functions = [selective_scan_fn, vmamba_scan_fn]
    before, forward = [state(fn) for fn in functions], ScanFunction.__dict__["forward"]
    model = Caller(lambda s, u, d: selective_scan_fn(u, d, A, B, C, D, None, BIAS, True))
    with intercept(model, Recorder(), lambda: ""):
        assert [fn.__code__ for fn in functions] != [code for code, *_ in before]
        assert ScanFunction.__dict__["forward"] is not forward
    assert [state(fn) for fn in functions] == before
    assert ScanFunction.__dict__["forward"] is forward


def test_everything_is_put_back_after_an_exception():
    code, cuda_device = selective_scan_fn.__code__, torch.cuda.device
    model = zoo.tiny(1)
    with pytest.raises(ZeroDivisionError), intercept(model, Recorder(), lambda: ""):
        raise ZeroDivisionError

    def breaks(*args):
        selective_scan_fn(*args[:5])
        raise ZeroDivisionError("in the model")

    with pytest.raises(vmeanba_fx.CaptureError, match=r"does not run on the example input.*in the model"):
        vmeanba_fx.capture(zoo.tiny(1, call=breaks), zoo.images())
    assert selective_scan_fn.__code__ is code
    assert torch.cuda.device is cuda_device


def test_options_of_both_signatures_reach_the_op():
    """``oflex`` asks for float32 out of bfloat16; mamba-ssm's signature keeps the dtype, and takes z sixth."""
    u, delta, b, c, z = (ARGUMENTS[n].bfloat16() for n in ("u", "delta", "B", "C", "z"))
    wide = Caller(lambda s, u, d: vmamba_scan_fn(u, d, A, b, c, D, BIAS))
    found, calls = redirected(wide, u, delta)
    assert found.dtype == torch.float32 and calls[0].out_dtype == torch.float32 and calls[0].z is None
    narrow = Caller(lambda s, u, d: vmamba_scan_fn(u, d, A, b, c, D, BIAS, True, False))
    assert redirected(narrow, u, delta)[0].dtype == torch.bfloat16
    gated = Caller(lambda s, u, d: selective_scan_fn(u, d, A, b, c, D, z, BIAS, True, return_last_state=True))
    (y, state), calls = redirected(gated, u, delta)
    assert calls[0].z is z and y.dtype == torch.bfloat16
    expected, expected_state = selective_scan_fn(u, delta, A, b, c, D, z, BIAS, True, return_last_state=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4)


def test_three_dimensional_B_and_C_become_one_group():
    b, c = B[:, 0], C[:, 0]
    model = Caller(lambda s, u, d: selective_scan_fn(u, d, A, b, c, D, None, BIAS, True))
    found, calls = redirected(model, U, DELTA)
    assert calls[0].B.shape == (2, 1, *b.shape[1:])
    torch.testing.assert_close(found, zoo.loop_scan(U, DELTA, A, b, c, D, None, BIAS, True)[0], rtol=1e-5, atol=1e-5)


# -- a signature is not yet a scan -----------------------------------------------------------------------------------


def hides_its_options():
    def scan(u, delta, A, B, C, D, delta_bias):
        return selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, True)

    return Caller(lambda s, u, d: s.scan(u, d, A, B, C, D, BIAS), scan=scan)


def doubles():
    inner = own_scan()

    @functools.wraps(inner)
    def scan(*args, **kwargs):
        return 2 * inner(*args, **kwargs)

    return Caller(lambda s, u, d: s.scan(u, d, A, B, C, **SHORT), scan=scan)


def casts():
    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        return vmamba_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus).double()

    return Caller(lambda s, u, d: s.scan(u, d, A, B, C, **SHORT), scan=scan)


def reads_other_layout():
    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        y = selective_scan_fn(
            u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, None, delta_bias, delta_softplus
        )  # fmt: skip
        return y.transpose(1, 2)

    return Caller(
        lambda s, u, d: s.scan(u.transpose(1, 2), d.transpose(1, 2), A, B, C, **SHORT).transpose(1, 2), scan=scan
    )


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        return 2 * selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


WRAPPERS = {
    "hides its options": (hides_its_options, 1),
    "doubles the result": (doubles, 2),
    "casts the result": (casts, 1),
    "reads another layout": (reads_other_layout, 1),
    "autograd.Function that doubles": (
        lambda: Caller(lambda s, u, d: Doubling.apply(u, d, A, B, C, D, BIAS, True)), 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True], ids=["", "on zeros"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_with_a_scans_signature_is_seen_through(name, zeros):
    """It computes something else, so it stays, and the scan inside it is what is replaced. Also tried on a zero input."""
    make, factor = WRAPPERS[name]
    model = make()
    record = Recorder()
    with torch.no_grad(), intercept(model, record, lambda: ""):
        model(0 * U if zeros else U, DELTA)
        record.calls.clear()
        found = model(U, DELTA)
    assert len(record.calls) == 1
    call = record.calls[0]
    assert call.u.shape == U.shape and call.delta_softplus
    assert found.dtype == model(U, DELTA).dtype
    torch.testing.assert_close(found, (factor * EXPECTED).to(found.dtype), rtol=1e-5, atol=1e-5)


def test_lower_precision_inside_is_no_other_function():
    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        halves = (t.bfloat16() for t in (u, delta, A, B, C))
        return zoo.loop_scan(*halves, D, None, delta_bias, delta_softplus)[0].to(u.dtype)

    u, delta = U.bfloat16(), DELTA.bfloat16()
    model = Caller(lambda s, u, d: s.scan(u, d, A.bfloat16(), B.bfloat16(), C.bfloat16(), **SHORT), scan=scan)
    assert len(redirected(model, u, delta)[1]) == 1


def fails(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True):
    """A kernel for another device."""
    raise RuntimeError("no kernel image is available")


def test_a_scan_that_cannot_be_tried_is_believed_and_noted():
    model, x = zoo.tiny(1, call=fails), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    assert any("fails does not run on the CPU" in note for note in capture_info(gm).notes)
    torch.testing.assert_close(gm(x), zoo.tiny(1)(x), rtol=1e-5, atol=1e-6)


def test_a_method_that_cannot_be_tried_is_not_believed():
    """It has values of its own, which its arguments do not tell: an error is better than a wrong graph."""

    def unknown_kernel(x, step, more):
        raise RuntimeError("no kernel image is available")

    model = zoo.tiny(1, call=lambda u, delta, A, *rest: unknown_kernel(u, delta, A))
    with pytest.raises(vmeanba_fx.CaptureError, match="no kernel image"):
        vmeanba_fx.capture(model, zoo.images(3))


# -- pybind modules --------------------------------------------------------------------------------------------------

PYBIND = {
    "selective_scan_cuda": "(u, delta, A, B, C, D, Z, bias, True)",
    "selective_scan_cuda_core": "(u, delta, A, B, C, D, bias, True, 1)",
    "selective_scan_cuda_oflex": "(u, delta, A, B, C, D, bias, True, 1, OFLEX)",
}


def pybind_model(module, **names):
    """A model whose code calls ``module.fwd``; the name is what an ``import`` at its top would have made."""
    scope = {"A": A, "B": B, "C": C, "D": D, "bias": BIAS, "Z": None, "OFLEX": True, **names}
    exec(f"def forward(self, u, delta):\n    return {module}.fwd{PYBIND[module]}", scope)
    return Caller(scope["forward"]), scope


def needs_cuda(*args):
    raise RuntimeError("Expected u.is_cuda() to be true, but got false.")


@pytest.mark.parametrize("present", [True, False], ids=["present", "absent"])
@pytest.mark.parametrize("module", PYBIND)
def test_pybind_modules(module, present, monkeypatch):
    model, scope = pybind_model(module)
    extension = types.SimpleNamespace(fwd=needs_cuda)
    if present:
        monkeypatch.setitem(sys.modules, module, extension)
        scope[module] = extension
    (y, states), calls = redirected(model, U, DELTA)
    assert len(calls) == 1
    torch.testing.assert_close(y, EXPECTED, rtol=1e-5, atol=1e-5)
    state = zoo.loop_scan(U, DELTA, A, B, C, D, None, BIAS, True)[1]
    torch.testing.assert_close(states[:, :, -1, 1::2], state, rtol=1e-5, atol=1e-5)  # how callers read it
    assert extension.fwd is needs_cuda
    assert (module in scope) == present and (module in sys.modules) == present
    with pytest.raises(RuntimeError if present else NameError):
        model(U, DELTA)


def test_pybind_gate_and_output_dtype():
    half = {"u": U.bfloat16(), "delta": DELTA.bfloat16(), "z": ARGUMENTS["z"].bfloat16()}
    model, _ = pybind_model("selective_scan_cuda", Z=half["z"])
    (y, _, gated), _ = redirected(model, half["u"], half["delta"])
    expected = selective_scan_fn(half["u"], half["delta"], A, B, C, D, None, BIAS, True)
    torch.testing.assert_close(y, expected)
    expected = selective_scan_fn(half["u"], half["delta"], A, B, C, D, half["z"], BIAS, True)
    torch.testing.assert_close(gated, expected, rtol=2e-2, atol=2e-2)
    model, _ = pybind_model("selective_scan_cuda_oflex")
    assert redirected(model, half["u"], half["delta"])[0][0].dtype == torch.float32
    model, _ = pybind_model("selective_scan_cuda_oflex", OFLEX=False)
    assert redirected(model, half["u"], half["delta"])[0][0].dtype == torch.bfloat16


def test_mamba_ssm_that_could_not_be_imported_is_supplied():
    scope = {"A": A, "B": B, "C": C, "D": D, "bias": BIAS}
    exec("def forward(self, u, delta):\n    return selective_scan_fn(u, delta, A, B, C, D, None, bias, True)", scope)
    found, calls = redirected(Caller(scope["forward"]), U, DELTA)
    assert len(calls) == 1 and "selective_scan_fn" not in scope
    torch.testing.assert_close(found, EXPECTED, rtol=1e-5, atol=1e-5)


# -- whole captures --------------------------------------------------------------------------------------------------


def pybind_call(u, delta, A, B, C, D, bias):
    return selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)[0]  # noqa: F821


CALLS = {
    "VMamba's function": vmamba_scan_fn,
    "captured apply": lambda u, d, a, b, c, D, bias: ScanFunction.apply(u, d, a, b, c, D, bias, True, 1),
    "partial": functools.partial(vmamba_scan_fn, backend="mamba"),
}


@pytest.mark.parametrize("name", CALLS)
def test_captured_scans_are_nodes(name):
    model, x = zoo.tiny(1, call=CALLS[name]), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    sites = vmeanba_fx.find_sites(gm)
    shapes = [(s.name, s.groups, s.channels, s.state, s.length, s.skip) for s in sites]
    assert shapes == [("blocks.0.op", 4, 6, 3, 15, True)]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_captured_pybind_scan_is_a_site():
    """The pybind call always returns the last state as well; nobody reads it here, so the scan is a site."""
    model, x = zoo.tiny(1, call=pybind_call), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    assert [s.name for s in vmeanba_fx.find_sites(gm)] == ["blocks.0.op"]
    torch.testing.assert_close(gm(x), zoo.tiny(1)(x), rtol=1e-5, atol=1e-6)


def test_two_threads():
    """Captures in two threads both come out right, and what a third thread runs meanwhile is the model's own code."""
    models = [zoo.tiny(1, seed=1, call=vmamba_scan_fn), zoo.tiny(1, seed=2)]
    x = zoo.images(3)
    expected = [m(x).detach() for m in models]
    results, errors, stop = {}, [], threading.Event()

    def capture(i):
        try:
            results[i] = vmeanba_fx.capture(models[i], x)
        except Exception as error:
            errors.append(error)

    def bystander():
        while not stop.is_set():
            with torch.no_grad():
                if any(zoo.relative_error(m(x), y) > 1e-5 for m, y in zip(models, expected, strict=True)):
                    errors.append(AssertionError("a capture in another thread changed the model's output"))

    code = vmamba_scan_fn.__code__
    other = threading.Thread(target=bystander)
    threads = [threading.Thread(target=capture, args=(i,)) for i in range(2)]
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert not errors
    for i, gm in results.items():
        assert [s.name for s in vmeanba_fx.find_sites(gm)] == ["blocks.0.op"]
        torch.testing.assert_close(gm(x), expected[i], rtol=1e-5, atol=1e-6)
    assert vmamba_scan_fn.__code__ is code


def test_other_threads_run_the_original():
    model, seen = in_closure(), []
    record = Recorder()
    with intercept(model, record, lambda: ""):
        thread = threading.Thread(target=lambda: seen.append(model(U, DELTA)))
        thread.start()
        thread.join()
    assert not record.calls and torch.equal(seen[0], EXPECTED)


def test_other_threads_keep_their_device_guard():
    original, seen = torch.cuda.device, []
    with cpu_device_guard():
        with torch.cuda.device(torch.device("cpu")):  # would raise
            pass
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.device(0)))
        thread.start()
        thread.join()
    assert type(seen[0]) is original is torch.cuda.device


# -- the registry ----------------------------------------------------------------------------------------------------


def foreign_scan(x, step, decay, write, read, skip):
    """A scan under names of its own, batch and length first: (B, L, D)."""
    y, _ = zoo.loop_scan(x.mT, step.mT, decay, write, read, skip)
    return y.mT


def foreign_call(u, delta, A, B, C, D, bias):
    step = torch.nn.functional.softplus(delta + bias[:, None])
    return foreign_scan(u.mT, step.mT, A, B, C, D).mT


def adapt_foreign(a):
    return vmeanba_fx.ScanCall(a["x"].mT, a["step"].mT, a["decay"], a["write"], a["read"], a["skip"])


@pytest.fixture
def registered():
    """Names registered by a test are gone afterwards."""
    before = set(registered_scans())
    yield
    for name in set(registered_scans()) - before:
        unregister_scan(name)


def lookalike(x, dt, A, B, C, D):
    return 2 * zoo.loop_scan(x, dt, A, B, C, D)[0]


def test_unknown_signature_says_how_to_register_it():
    def call(u, delta, A, B, C, D, bias):
        return lookalike(u, delta + bias[:, None], A, B, C, D)

    gm = vmeanba_fx.capture(zoo.tiny(1, directions=1, call=call), SMALL)
    with pytest.raises(vmeanba_fx.NoSitesError, match=r"lookalike\(x, dt, A, B, C, D\), but.*register_scan"):
        vmeanba_fx.find_sites(gm)


@pytest.mark.parametrize("by", ["target", "parameters"])
def test_register_scan(by, registered):
    def foreign(x, step, decay, write, read, skip):
        return zoo.loop_scan(x, step, decay, write, read, skip)[0]

    def call(u, delta, A, B, C, D, bias):
        return foreign(u, torch.nn.functional.softplus(delta + bias[:, None]), A, B, C, D)

    how = {"target": foreign} if by == "target" else {"parameters": ("x", "step", "decay", "write", "read", "skip")}
    vmeanba_fx.register_scan(
        "foreign", **how,
        adapt=lambda a: vmeanba_fx.ScanCall(a["x"], a["step"], a["decay"], a["write"], a["read"], a["skip"]),
    )  # fmt: skip
    model, x = zoo.tiny(1, call=call), zoo.images(3)
    gm = vmeanba_fx.capture(model, x)
    assert [s.name for s in vmeanba_fx.find_sites(gm)] == ["blocks.0.op"]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_registration_that_does_not_fit_the_function_changes_no_number(registered):
    """``foreign_scan`` returns (B, L, D), the adapter promises (B, D, L): the function is left as it is."""
    vmeanba_fx.register_scan("foreign", foreign_scan, adapt=adapt_foreign)
    model = zoo.tiny(1, directions=1, call=foreign_call)
    torch.testing.assert_close(vmeanba_fx.capture(model, SMALL)(SMALL), model(SMALL), rtol=1e-5, atol=1e-6)


def test_register_scan_refuses(registered):
    with pytest.raises(ValueError, match=r"registered already.*unregister_scan"):
        vmeanba_fx.register_scan("selective_scan", foreign_scan, adapt=adapt_foreign)
    with pytest.raises(ValueError, match="parameters"):
        vmeanba_fx.register_scan("nothing to go by", adapt=adapt_foreign)
    with pytest.raises(KeyError):
        unregister_scan("never registered")


def test_later_registrations_win(registered):
    assert find_spec(selective_scan_fn, parameter_names(selective_scan_fn)).name == "selective_scan"
    mine = vmeanba_fx.register_scan("mine", selective_scan_fn, adapt=adapt_foreign)
    assert find_spec(selective_scan_fn, parameter_names(selective_scan_fn)) is mine
    assert find_spec(vmamba_scan_fn, parameter_names(vmamba_scan_fn)).name == "selective_scan"


def test_same_name_other_signature():
    """Six families are told apart by their parameters; nothing goes by a function's name."""

    def named(parameters):
        scope = {}
        exec(f"def selective_scan_fn({parameters}, delta_bias=None, delta_softplus=True): pass", scope)
        spec = find_spec(scope["selective_scan_fn"], parameter_names(scope["selective_scan_fn"]))
        return spec and spec.name

    assert named("u, delta, A, B, C, D=None, z=None") == "selective_scan"
    assert named("u, delta, A, B, C, D=None, oflex=True, backend=None") == "selective_scan"
    assert named("u, delta, A, B, D=None, z=None") == "state-returning scan"
    assert named("u, delta, A, B, C, D, z, return_last_state, HH, WW") == "2-D selective scan"
    assert named("us, dts, As, Bs, Cs, Ds") == "selective_scan (VMamba easy)"
    assert named("u, delta, a_matrix, b_matrix, c_matrix, d_vector=None") == "selective_scan (spelled-out names)"
    assert named("u, delta, A, B, C, initial_states") == "parts of a scan by their usual names"
    assert named("x, dt, A, B") is None
    assert named("q, k, v") is None


def test_canonical_refuses_sizes_that_do_not_fit():
    with pytest.raises(Exception, match="delta has 3 channels where u has 6"):
        canonical(U, DELTA[:, :3], A, B, C, D, None, BIAS, True)
    with pytest.raises(Exception, match=r"B has 5 dimensions"):
        canonical(U, DELTA, A, B[None], C, D, None, BIAS, True)
