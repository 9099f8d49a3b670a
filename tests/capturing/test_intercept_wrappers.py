"""A signature is not yet a scan: functions are tried before they are taken, and those inside of others are found."""

import functools

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.capturing.interception import BIAS, DELTA, EXPECTED, SHORT, A, B, C, Caller, D, Recorder, U, own_scan, redirected
from tests.zoo import selective_scan_fn, vmamba_scan_fn
from vmeanba_fx.capturing.capture import capture_info
from vmeanba_fx.capturing.intercept import intercept


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


def test_rounding_hides_no_skip_of_the_functions_own():
    """In half precision a few percent look like rounding; with the same arguments in float32 they do not."""

    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        y = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        return y + 0.05 * y.abs().amax()

    halves = [t.bfloat16() for t in (U, DELTA, A, B, C)]
    model = Caller(lambda s, u, d: s.scan(u, d, *halves[2:], **SHORT), scan=scan)
    found, calls = redirected(model, *halves[:2])
    expected = scan(*halves, **SHORT)
    assert len(calls) == 1, "the scan inside of it is taken"
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_bare_scan_that_overflows_is_not_the_functions():
    """A helper with a softplus of its own: without it, delta is so negative that the bare scan overflows."""

    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        return selective_scan_fn(u, torch.nn.functional.softplus(delta), A, B, C, D, None, delta_bias, delta_softplus)

    negative = -1e3 * DELTA.abs() - 1e3
    found, calls = redirected(Caller(lambda s, u, d: s.scan(u, d, A, B, C), scan=scan), U, negative)
    assert len(calls) == 1, "the scan inside of it is taken"
    assert torch.equal(found, scan(U, negative, A, B, C))


def negated_bias(scan, u, delta, A, B, C, D, bias):
    return scan(u, delta, A, B, C, D, -bias)


def larger_skip(scan, u, delta, A, B, C, D, bias):
    return scan(u, delta, A, B, C, 1.1 * D, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("own", [negated_bias, larger_skip])
def test_a_small_part_beside_a_large_scan_is_seen(own, dtype):
    """A tenth of a skip is 0.1 % of these outputs, far below the rounding of half precision."""

    def inner(u, delta, A, B, C, D, bias):
        return zoo.loop_scan(u, delta, A, B, C, D, None, bias, True)[0].to(u.dtype)

    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        return own(inner, u, delta, A, B, C, D, delta_bias)

    large = [t.to(dtype) for t in (U, DELTA + 10, A, 30 * B, C)]
    model = Caller(lambda s, u, d: s.scan(u, d, *large[2:], **SHORT), scan=scan)
    found, calls = redirected(model, *large[:2])
    assert not calls and torch.equal(found, scan(*large, **SHORT))


@pytest.mark.parametrize("factor", [1, 2])
def test_values_that_overflow_prove_nothing(factor):
    """A scan whose own inputs give infinity is tried on smaller ones."""

    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        return factor * zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]

    growing = -1e3 * DELTA.abs() - 1e3
    assert not scan(U, growing, A, B, C).isfinite().all()
    found, calls = redirected(Caller(lambda s, u, d: s.scan(u, d, A, B, C, D), scan=scan), U, growing)
    assert len(calls) == (factor == 1) and found.shape == U.shape


def test_a_function_that_is_never_finite_is_refused():
    def scan(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
        return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0] / 0

    model, x = zoo.tiny(2), zoo.images(3)
    model.blocks[1].op.call = lambda u, delta, A, B, C, D, bias: scan(u, delta, A, B, C, D, bias, True).nan_to_num(0, 0, 0)
    [(where, why)] = vmeanba_fx.find_sites(vmeanba_fx.capture(model, x)).refused
    assert where == "blocks.1.op" and "but it gives values that are not finite" in why


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
