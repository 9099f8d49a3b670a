"""Compiled scans, present or missing: their calls become nodes, and the modules are left as they were."""

import functools
import sys
import types

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.capturing.interception import ARGUMENTS, BIAS, DELTA, EXPECTED, A, B, C, Caller, D, U, redirected
from tests.zoo import ScanFunction, selective_scan_fn, vmamba_scan_fn
from vmeanba_fx.capturing.capture import capture_info

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


@pytest.mark.parametrize("call", ["selective_scan_fn(u, delta, A, B, C, D, None, bias, True)",
                                  "selective_scan_fn_v1(u, delta, A, B, C, D, bias, True)"])  # fmt: skip
def test_scans_that_could_not_be_imported_are_supplied(call):
    """Under the signature that the package of that name gives them: the sixth argument is z or the bias."""
    scope = {"A": A, "B": B, "C": C, "D": D, "bias": BIAS}
    exec(f"def forward(self, u, delta):\n    return {call}", scope)
    found, calls = redirected(Caller(scope["forward"]), U, DELTA)
    assert len(calls) == 1 and not any(name.startswith("selective_scan_fn") for name in scope)
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


class AroundAnotherKernel(torch.autograd.Function):
    """lrnnx's: a compiled module of mamba-ssm's name with parameters of its own."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, z=None, delta_bias=None, deltaA=None, delta_softplus=False,
                return_last_state=False, discretization=None):  # fmt: skip
        return selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, deltaA, delta_softplus, discretization)[0]  # noqa: F821


def test_another_kernel_under_a_known_name():
    """The Python function around it is taken for what its signature says; a bare call of it is an error that tells of that."""

    def wrapped(u, delta, A, B, C, D, bias):
        return AroundAnotherKernel.apply(u, delta, A, B, C, D, None, bias, None, True, False, "mamba")

    gm = vmeanba_fx.capture(zoo.tiny(1, call=wrapped), zoo.images(3))
    assert [s.name for s in vmeanba_fx.find_sites(gm)] == ["blocks.0.op"]
    assert "AroundAnotherKernel does not run on the CPU" in capture_info(gm).notes[0]
    torch.testing.assert_close(gm(zoo.images(3)), zoo.tiny(1)(zoo.images(3)), rtol=1e-5, atol=1e-6)

    def bare(u, delta, A, B, C, D, bias):
        return selective_scan_cuda.fwd(u, delta, A, B, C, D, None, bias, None, True, "mamba")[0]  # noqa: F821

    with pytest.raises(vmeanba_fx.CaptureError, match=r"given 11 arguments, and takes 9: .* vmeanba_fx\.register_scan"):
        vmeanba_fx.capture(zoo.tiny(1, call=bare), zoo.images(3))
