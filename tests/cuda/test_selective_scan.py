"""The full selective scan on CUDA against float64, forward and backward."""

import pytest
import reference
import torch
from reference import TOLERANCE, assert_near, normal, poison, scan_inputs

from vmeanba_fx import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(batch, groups, per_group, states, length, dtype, out_dtype=None):
    u, delta, A, B, C, D, _, bias = scan_inputs(batch, groups, per_group, states, length, dtype)
    poison(batch, groups * per_group, length, dtype=out_dtype or dtype)
    out = ops.selective_scan(u, delta, A, B, C, D, None, bias, True, out_dtype)
    assert out.dtype == (out_dtype or dtype)
    assert_near(out, reference.selective_scan(u, delta, A, B, C, D, None, bias, True), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 49, 196, 1000, 3136])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(length, dtype):
    check(2, 4, 5, 1, length, dtype)


@pytest.mark.parametrize("length", [16384, 65536])
def test_long(length):
    check(1, 2, 3, 2, length, torch.float32)
    check(1, 2, 3, 2, length, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("states", [2, 3, 8, 16, 64, 256])
def test_states(states):
    check(2, 2, 3, states, 100, torch.float32)
    check(2, 1, 3, states, 128, torch.float16, torch.float32)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 300])
def test_groups_and_batch(groups, batch):
    check(batch, groups, 7, 1, 196, torch.float32)
    check(batch, groups, 48, 1, 64, torch.float16, torch.float32)


def test_enough_rows_for_one_warp_per_several_rows():
    check(64, 4, 96, 1, 784, torch.float16, torch.float32)
    check(64, 4, 96, 16, 196, torch.float32)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("given", ["none", "D", "z", "bias", "all"])
def test_options(softplus, given):
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 2, 5, 3, 72, torch.float32)
    delta = delta if softplus else delta.abs() * 0.1
    bias = bias if softplus else bias.abs() * 0.01
    arguments = (
        u, delta, A, B, C,
        D if given in ("D", "all") else None,
        z if given in ("z", "all") else None,
        bias if given in ("bias", "all") else None,
        softplus,
    )  # fmt: skip
    poison(*u.shape)
    assert_near(ops.selective_scan(*arguments), reference.selective_scan(*arguments), 1e-5)


def test_large_steps_pass_the_softplus_threshold():
    u, delta, A, B, C, D, _, bias = scan_inputs(2, 2, 3, 2, 200, torch.float32)
    delta = delta * 30
    assert_near(
        ops.selective_scan(u, delta, A, B, C, D, None, bias, True),
        reference.selective_scan(u, delta, A, B, C, D, None, bias, True),
        1e-5,
    )


@pytest.mark.parametrize("decay", [0.0, -1e-3, -50.0])
def test_slow_and_fast_decay(decay):
    u, delta, A, B, C, D, _, bias = scan_inputs(1, 2, 3, 2, 4000, torch.float32)
    A = torch.full_like(A, decay)
    assert_near(
        ops.selective_scan(u, delta, A, B, C, D, None, bias, True),
        reference.selective_scan(u, delta, A, B, C, D, None, bias, True),
        1e-5,
    )


def test_strides_and_misaligned_addresses():
    batch, groups, per_group, states, length = 2, 2, 6, 3, 96
    channels = groups * per_group
    u = normal(batch, length, channels).transpose(1, 2)
    delta = normal(batch, channels + 3, length + 1)[:, 2:-1, 1:]
    B = normal(batch, groups, length, states).transpose(2, 3)
    C = normal(groups, batch, states, 2 * length).transpose(0, 1)[..., ::2]
    A = -torch.rand(states, channels, device="cuda").t()
    z = normal(channels, batch, length).transpose(0, 1)
    out = ops.selective_scan(u, delta, A, B, C, None, z, None, True)
    assert out.is_contiguous()
    assert_near(out, reference.selective_scan(u, delta, A, B, C, None, z, None, True), 1e-5)


def test_mixed_types():
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 2, 5, 2, 64, torch.float32)
    u, B, C, z = u.half(), B.bfloat16(), C.half(), z.bfloat16()
    arguments = (u, delta, A.half(), B, C, D.bfloat16(), z, bias.half(), True)
    out = ops.selective_scan(*arguments, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert_near(out, reference.selective_scan(*arguments), 5e-3)


def gradients(function, arguments, grad):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in arguments]
    out = function(*leaves, True)
    out.backward(grad.to(out.dtype))
    return [None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def check_backward(batch, groups, per_group, states, length, dtype, gate=False, scale=1.0):
    u, delta, A, B, C, D, z, bias = scan_inputs(batch, groups, per_group, states, length, dtype)
    arguments = (u, delta * scale, A, B, C, D, z if gate else None, bias)
    grad = normal(*u.shape, dtype=dtype)
    poison(*u.shape, dtype=dtype)
    actual = torch.ops.vmeanba_fx.selective_scan_backward(grad, *arguments, True)
    expected = gradients(reference.selective_scan, arguments, grad)
    tolerance = 3e-5 if dtype == torch.float32 else 5e-3
    for name, argument, got, want in zip(
        "u delta A B C D z delta_bias".split(), arguments, actual, expected, strict=True
    ):
        if argument is None:
            assert got.shape == (0,)
            continue
        assert got.dtype == argument.dtype, name
        try:
            assert_near(got, want.double(), tolerance)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


@pytest.mark.parametrize("length", [1, 7, 33, 49, 196, 1000, 3136])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_lengths(length, dtype):
    check_backward(2, 2, 5, 1, length, dtype)


@pytest.mark.parametrize("states", [2, 3, 8, 16, 48, 256])
def test_backward_states(states):
    check_backward(2, 2, 9, states, 300, torch.float32)


@pytest.mark.parametrize(("batch", "groups", "per_group"), [(1, 1, 1), (3, 4, 96), (300, 1, 7)])
def test_backward_sizes(batch, groups, per_group):
    check_backward(batch, groups, per_group, 1, 200, torch.float32)
    check_backward(batch, groups, per_group, 4, 64, torch.float32)


def test_backward_gate_and_large_steps():
    check_backward(2, 2, 5, 2, 300, torch.float32, gate=True)
    check_backward(2, 2, 5, 2, 300, torch.float32, scale=20)


def test_backward_strides():
    batch, groups, per_group, states, length = 2, 2, 6, 3, 96
    channels = groups * per_group
    u = normal(batch, length, channels).transpose(1, 2)
    delta = normal(batch, channels, length + 1)[:, :, 1:]
    B = normal(batch, groups, length, states).transpose(2, 3)
    C = normal(batch, groups, states, length)
    A = -torch.rand(channels, states, device="cuda")
    grad = normal(1, 1, 1).expand(batch, channels, length)
    actual = torch.ops.vmeanba_fx.selective_scan_backward(grad, u, delta, A, B, C, None, None, None, True)
    expected = gradients(reference.selective_scan, (u, delta, A, B, C, None, None, None), grad)
    for got, want in zip(actual[:5], expected[:5], strict=True):
        assert_near(got, want.double(), 3e-5)


def test_same_result_every_run():
    u, delta, A, B, C, D, _, bias = scan_inputs(4, 4, 24, 4, 500, torch.float16)
    grad = normal(*u.shape)
    outs = [ops.selective_scan(u, delta, A, B, C, D, None, bias, True) for _ in range(2)]
    assert torch.equal(*outs)
    runs = [
        torch.ops.vmeanba_fx.selective_scan_backward(grad, u, delta, A, B, C, D, None, bias, True) for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("length", "skip"), [(49, True), (196, True), (784, False), (1000, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_add(length, skip, dtype):
    y = normal(3, 4, 1, length)
    u = normal(3, 4 * 6, length, dtype=dtype)
    D = normal(4 * 6) if skip else None
    poison(*u.shape, dtype=dtype)
    out = ops.broadcast_add(y, u, D)
    assert out.dtype == dtype
    expected = y.double().expand(-1, -1, 6, -1).reshape(u.shape)
    assert_near(out, expected + D.double()[:, None] * u.double() if skip else expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("groups", "channels", "length", "skip"), [(1, 192, 196, True), (4, 24, 49, True), (2, 6, 25, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_broadcast_add_channels_last(groups, channels, length, skip, dtype):
    y = normal(3, groups, 1, length)
    u = normal(3, length, channels, dtype=dtype).transpose(1, 2)
    D = normal(channels) if skip else None
    poison(*u.shape, dtype=dtype)
    out = ops.broadcast_add(y, u, D)
    assert out.dtype == dtype and out.stride() == u.stride()
    expected = y.double().expand(-1, -1, channels // groups, -1).reshape(u.shape)
    assert_near(out, expected + D.double()[:, None] * u.double() if skip else expected, TOLERANCE[dtype])


def test_broadcast_add_strides():
    y = normal(2, 3, 30)[..., ::2].unsqueeze(2)
    u = normal(2, 15, 9).transpose(1, 2)
    D = normal(9)
    expected = y.double().expand(-1, -1, 3, -1).reshape(2, 9, 15) + D.double()[:, None] * u.double()
    assert_near(ops.broadcast_add(y, u, D, torch.float32), expected, 1e-6)


def test_float64_takes_the_torch_implementation():
    u, delta, A, B, C, D, _, bias = (t.double() for t in scan_inputs(2, 2, 3, 2, 40, torch.float32))
    out = ops.selective_scan(u, delta, A, B, C, D, None, bias, True)
    assert out.dtype == torch.float64
    assert_near(out, reference.selective_scan(u, delta, A, B, C, D, None, bias, True), 1e-12)


def test_a_state_beyond_the_limit_is_refused():
    u, delta, A, B, C, D, _, bias = scan_inputs(1, 1, 2, 257, 8, torch.float32)
    with pytest.raises(ValueError, match="at most 256"):
        ops.selective_scan(u, delta, A, B, C, D, None, bias, True)
