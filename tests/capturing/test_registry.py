"""The registry of scans: known signatures, those a user adds, and what a call of a wrong shape says."""

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.capturing.interception import BIAS, DELTA, A, B, C, D, U
from tests.zoo import selective_scan_fn, vmamba_scan_fn
from vmeanba_fx.capturing.families import canonical
from vmeanba_fx.capturing.registry import find_spec, parameter_names, registered_scans

SMALL = zoo.images(2)[:, :, :8, :8]  # L = 4, for scans that export unrolls


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
        vmeanba_fx.unregister_scan(name)


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
    """``foreign_scan`` returns (B, L, D), the adapter promises (B, D, L): the function is left as it is, with a reason."""
    vmeanba_fx.register_scan("foreign", foreign_scan, adapt=adapt_foreign)
    model = zoo.tiny(1, directions=1, call=foreign_call)
    gm = vmeanba_fx.capture(model, SMALL)
    torch.testing.assert_close(gm(SMALL), model(SMALL), rtol=1e-5, atol=1e-6)
    with pytest.raises(vmeanba_fx.NoSitesError, match=r"blocks.0.op: foreign_scan was registered as 'foreign', but it returns"):
        vmeanba_fx.find_sites(gm)


@pytest.mark.parametrize(
    ("adapt", "sentence"),
    [
        (lambda a: vmeanba_fx.ScanCall(a["u"], a["dt"], a["A"], a["B"], a["C"]), r"fails for foreign_scan\(\): KeyError: 'u'"),
        (lambda a: None, "gives a NoneType for foreign_scan"),
    ],
)
def test_adapter_that_fails_is_named(registered, adapt, sentence):
    vmeanba_fx.register_scan("foreign", foreign_scan, adapt=adapt)
    with pytest.raises(vmeanba_fx.CaptureError, match=f"the adapter of 'foreign' {sentence}"):
        vmeanba_fx.capture(zoo.tiny(1, directions=1, call=foreign_call), SMALL)


def test_register_scan_refuses(registered):
    with pytest.raises(ValueError, match=r"registered already.*unregister_scan"):
        vmeanba_fx.register_scan("selective_scan", foreign_scan, adapt=adapt_foreign)
    with pytest.raises(ValueError, match="parameters"):
        vmeanba_fx.register_scan("nothing to go by", adapt=adapt_foreign)
    with pytest.raises(TypeError, match="target=3 is not callable"):
        vmeanba_fx.register_scan("of a number", 3, adapt=adapt_foreign)
    with pytest.raises(TypeError, match="is not callable"):
        vmeanba_fx.register_scan("without code", foreign_scan, adapt="foreign_scan")
    with pytest.raises(ValueError, match="no scan named 'never registered' is registered; these are: "):
        vmeanba_fx.unregister_scan("never registered")


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
