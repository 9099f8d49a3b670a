"""Scans that are operators of their own, as ``torch.library`` and C++ extensions register them."""

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.capturing.interception import DELTA, EXPECTED, SHORT, A, B, C, Caller, U
from vmeanba_fx.capturing.capture import capture_info
from vmeanba_fx.graph import scan_nodes

PARAMETERS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? delta_bias=None, *, "
    "bool delta_softplus=False"
)


@pytest.fixture
def define():
    """``define(name, run, returns)``: an operator with the parameters of a scan; all are gone at the end."""
    with torch.library._scoped_library("vmeanba_test", "FRAGMENT") as library:

        def add(name, run, returns="Tensor", fake=lambda u, *_, **__: torch.empty_like(u)):
            library.define(f"{name}({PARAMETERS}) -> {returns}")
            library.impl(name, run, "CPU")
            torch.library.register_fake(f"vmeanba_test::{name}", fake, lib=library)
            return getattr(torch.ops.vmeanba_test, name)

        yield add


def scan(u, delta, A, B, C, D=None, delta_bias=None, *, delta_softplus=False):
    return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]


def captured(operator):
    model = Caller(lambda _, u, d: operator(u, d, A, B, C, **SHORT))
    gm = vmeanba_fx.capture(model, (U, DELTA))
    with torch.no_grad():
        torch.testing.assert_close(gm(U, DELTA), model(U, DELTA), rtol=1e-4, atol=1e-5)
    return gm


@pytest.mark.parametrize("overload", [False, True])
def test_an_operator_is_one_scan(define, overload):
    operator = define("scan", scan)
    gm = captured(operator.default if overload else operator)
    assert len(scan_nodes(gm)) == len(vmeanba_fx.find_sites(gm)) == 1 and "vmeanba_test" not in gm.code
    torch.testing.assert_close(operator(U, DELTA, A, B, C, **SHORT), EXPECTED)  # and itself again afterwards


def test_an_operator_is_tried_as_a_function_is(define):
    gm = captured(define("scan", lambda *args, **options: 2 * scan(*args, **options)))
    assert not scan_nodes(gm) and "vmeanba_test.scan" in gm.code
    ((_, why),) = capture_info(gm).refused
    assert why.startswith("vmeanba_test::scan has the parameters of 'selective_scan', but on its own inputs it differs")


def test_an_operator_for_another_device_is_believed_and_noted(define):
    def nowhere(*_, **__):
        raise NotImplementedError("for GPUs only")

    model = Caller(lambda _, u, d: operator(u, d, A, B, C, **SHORT))
    operator = define("scan", nowhere)
    gm = vmeanba_fx.capture(model, (U, DELTA))
    torch.testing.assert_close(gm(U, DELTA), EXPECTED, rtol=1e-4, atol=1e-5)
    assert any("vmeanba_test::scan does not run on the CPU" in note for note in capture_info(gm).notes)


def test_an_operator_with_further_results_is_named(define):
    def with_state(u, *args, **options):
        return [scan(u, *args, **options), u.clone()]

    operator = define("fwd", with_state, "Tensor[]", lambda u, *_, **__: [torch.empty_like(u), torch.empty_like(u)])
    with pytest.raises(vmeanba_fx.NoSitesError, match=r"looks like one:.* torch.ops.vmeanba_test.fwd\(u, delta, A, B, C, D"):
        vmeanba_fx.find_sites(captured(lambda *args, **options: operator(*args, **options)[0]))
