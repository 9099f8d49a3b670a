"""Every way public code refers to its scan is found, redirected to one op while tracing, and put back afterwards."""

import functools
import types

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.capturing.interception import (
    ARGUMENTS,
    BIAS,
    DELTA,
    EXPECTED,
    SHORT,
    A,
    B,
    C,
    Caller,
    D,
    Recorder,
    U,
    own_function,
    own_scan,
    redirected,
)  # fmt: skip
from tests.zoo import ScanFunction, selective_scan_fn, vmamba_scan_fn
from vmeanba_fx.capturing.intercept import intercept


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
