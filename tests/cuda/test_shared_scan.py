"""The one-channel and rank-r scans on CUDA against float64."""

import pytest
import reference
import torch
from reference import TOLERANCE, assert_near, normal, poison

from vmeanba_fx import ops
from vmeanba_fx.ops import cuda_shared
from vmeanba_fx.ops.directions import direction_table

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def sequence_inputs(batch, groups, rank, states, length, dtype):
    return (
        normal(batch, groups, rank, length, dtype=dtype),
        normal(batch, groups, length, dtype=dtype),
        -torch.rand(groups, states, device="cuda") * 2 - 0.01,
        normal(batch, groups, states, length, dtype=dtype),
        normal(batch, groups, states, length, dtype=dtype),
        normal(groups) - 2,
    )


def check(batch, groups, rank, states, length, dtype, out_dtype=None):
    u, delta, A, B, C, bias = sequence_inputs(batch, groups, rank, states, length, dtype)
    poison(*u.shape, dtype=out_dtype or dtype)
    out = ops.shared_scan(u, delta, A, B, C, bias, True, out_dtype)
    assert out.dtype == (out_dtype or dtype)
    assert_near(out, reference.shared_scan(u, delta, A, B, C, bias, True), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 7, 31, 32, 33, 1000, 3136, 16384, 65536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths(length, dtype):
    check(3, 4, 1, 1, length, dtype)


@pytest.mark.parametrize("states", [2, 3, 8, 16, 64, 256])
def test_states(states):
    check(2, 2, 1, states, 200, torch.float32)
    check(200, 1, 1, states, 64, torch.float16, torch.float32)


@pytest.mark.parametrize("rank", [2, 3, 4, 16])
def test_ranks(rank):
    check(2, 2, rank, 2, 1000, torch.float32)
    check(300, 2, rank, 2, 56, torch.float16, torch.float32)


@pytest.mark.parametrize("groups", [1, 2, 4, 20])
def test_groups(groups):
    check(5, groups, 1, 2, 100, torch.float32)


def test_large_steps_and_decays():
    u, delta, A, B, C, bias = sequence_inputs(2, 3, 1, 3, 5000, torch.float32)
    A = torch.tensor([[0.0, -1e-3, -50.0]], device="cuda").expand(3, 3)
    delta = delta * 20
    assert_near(
        ops.shared_scan(u, delta, A, B, C, bias, True), reference.shared_scan(u, delta, A, B, C, bias, True), 1e-5
    )


@pytest.mark.parametrize(("rank", "states", "length"), [(1, 1, 7), (1, 16, 3136), (3, 2, 1000), (4, 1, 20000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_scan(rank, states, length, dtype):
    a = torch.rand(2, 3, states, length, device="cuda").mul(0.5).add(0.5).to(dtype)
    b = normal(2, 3, rank, states, length, dtype=dtype)
    C = normal(2, 3, states, length, dtype=dtype)
    poison(2, 3, rank, length, dtype=dtype)
    out = ops.linear_scan(a, b, C)
    assert out.dtype == dtype
    assert_near(out, reference.linear_scan(a, b, C), TOLERANCE[dtype])


def test_linear_scan_backward():
    a = torch.rand(2, 3, 2, 300, device="cuda").mul(0.5).add(0.5)
    b, C = normal(2, 3, 3, 2, 300), normal(2, 3, 2, 300)
    grad = normal(2, 3, 3, 300)
    leaves = [t.clone().requires_grad_() for t in (a, b, C)]
    ops.linear_scan(*leaves).backward(grad)
    twins = [t.clone().requires_grad_() for t in (a, b, C)]
    reference.linear_scan(*twins).backward(grad.double())
    for leaf, twin in zip(leaves, twins, strict=True):
        assert_near(leaf.grad, twin.grad.double(), 1e-5)


def map_inputs(batch, groups, rank, states, height, width, dtype, own_u=False):
    return (
        normal(batch, groups if own_u else 1, rank, height, width, dtype=dtype),
        normal(batch, groups, height, width, dtype=dtype),
        -torch.rand(groups, states, device="cuda") * 2 - 0.01,
        normal(batch, groups, states, height, width, dtype=dtype),
        normal(batch, groups, states, height, width, dtype=dtype),
        normal(groups) - 2,
    )


def check_maps(inputs, directions, merge, tolerance, order=None, out_dtype=torch.float32):
    u, delta, A, B, C, bias = inputs
    height, width = u.shape[-2:]
    poison(*delta.shape, u.shape[2])
    out = ops.shared_scan2d(u, delta, A, B, C, bias, directions, order, True, merge, out_dtype)
    table = direction_table(directions, height, width) if order is None else order
    assert out.dtype == out_dtype and out.is_contiguous()
    assert_near(out, reference.shared_scan2d(u, delta, A, B, C, bias, table, True, merge), tolerance)


SIZES = [
    (1, 1),
    (1, 13),
    (13, 1),
    (7, 7),
    (14, 14),
    (9, 7),
    (8, 24),
    (56, 56),
    (20, 30),
    (33, 70),
    (128, 128),
    (96, 120),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps(size, merge, dtype):
    check_maps(map_inputs(2, 4, 1, 1, *size, dtype), [0, 1, 2, 3], merge, TOLERANCE[dtype])


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (9, 7), (16, 24), (100, 100)])
def test_every_direction(size):
    check_maps(map_inputs(2, 8, 1, 2, *size, torch.float32, own_u=True), list(range(8)), False, 1e-5)
    check_maps(map_inputs(150, 8, 1, 1, *size, torch.float16), list(range(8)), True, 5e-3)


@pytest.mark.parametrize(("batch", "rank", "states"), [(140, 1, 16), (140, 3, 2), (600, 1, 1), (70, 5, 3)])
@pytest.mark.parametrize("size", [(14, 14), (28, 20)])
def test_many_maps(batch, rank, states, size):
    check_maps(map_inputs(batch, 4, rank, states, *size, torch.float32), [0, 1, 2, 3], True, 1e-5)
    check_maps(map_inputs(batch, 2, rank, states, *size, torch.float16), [1, 6], True, 5e-3)


def test_tiles_of_a_large_map_in_one_block():
    check_maps(map_inputs(140, 4, 1, 1, 128, 128, torch.float16), [0, 1, 2, 3], True, 5e-3)
    check_maps(map_inputs(70, 4, 1, 2, 90, 104, torch.float32), [7, 3, 5, 2], True, 1e-5)
    check_maps(map_inputs(70, 1, 1, 2, 91, 103, torch.float32), [1], True, 1e-5)


@pytest.mark.parametrize(("batch", "states", "size"), [(140, 16, (56, 56)), (2, 16, (128, 128)), (70, 6, (41, 33))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_states_a_step(batch, states, size, dtype):
    check_maps(map_inputs(batch, 4, 1, states, *size, dtype), [0, 1, 2, 3], True, 5e-3)
    check_maps(map_inputs(batch, 2, 1, states, *size, dtype), [3, 6], False, 5e-3, out_dtype=dtype)


@pytest.mark.parametrize("size", [(1, 65536), (256, 256), (9000, 2), (2, 9000), (3, 20001)])
def test_very_large_maps(size):
    check_maps(map_inputs(1, 4, 1, 1, *size, torch.float32), [0, 1, 2, 3], True, 1e-5)
    check_maps(map_inputs(1, 2, 1, 1, *size, torch.bfloat16), [4, 7], True, 5e-3)


@pytest.mark.parametrize("size", [(7, 7), (30, 20), (120, 100)])
@pytest.mark.parametrize("merge", [True, False])
def test_index_table(size, merge):
    length = size[0] * size[1]
    order = torch.stack([torch.randperm(length, device="cuda") for _ in range(3)])
    check_maps(map_inputs(3, 3, 2, 2, *size, torch.float32), [], merge, 1e-5, order)
    check_maps(map_inputs(150, 3, 1, 1, *size, torch.float16), [], merge, 5e-3, order.int())


def test_views_of_one_projection():
    """u, delta, B and C as they come: channels of one GEMM's output, channel-first or channels-last."""
    batch, groups, states, height, width = 3, 4, 2, 14, 16
    channels = groups * (1 + 2 * states) + 1
    first = normal(batch, channels, height, width, dtype=torch.float16)
    last = normal(batch, height, width, channels, dtype=torch.float16).permute(0, 3, 1, 2)
    odd = normal(batch, channels, height, width + 1, dtype=torch.float16)[..., 1:]
    A = -torch.rand(groups, states, device="cuda")
    for features in (first, last, odd):
        u = features[:, -1:].unsqueeze(1)
        delta, B, C = features[:, :-1].unflatten(1, (groups, 1 + 2 * states)).split([1, states, states], dim=2)
        check_maps((u, delta.squeeze(2), A, B, C, None), [0, 1, 2, 3], True, 5e-3)


WHOLE = [(56, 56), (28, 28), (12, 200), (64, 64), (100, 28), (24, 40), (72, 72), (8, 104), (200, 12)]


@pytest.mark.parametrize("size", WHOLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_maps_in_a_block(size, dtype):
    """`merged_scan.cu`; some sizes leave threads of the last warp idle, or lines of a map left over."""
    check_maps(map_inputs(3, 4, 1, 1, *size, dtype), [0, 1, 2, 3], True, TOLERANCE[dtype])
    inputs = map_inputs(3, 4, 1, 1, *size, dtype, own_u=True)
    check_maps(inputs, [2, 1, 3, 0], True, max(TOLERANCE[dtype], 5e-3), out_dtype=torch.float16)


@pytest.mark.parametrize("codes", [[0, 2], [2, 0], [3, 1], [1, 3], [3, 2, 1, 0], [0], [0, 2, 2, 1]])
@pytest.mark.parametrize("batch", [1, 300])
def test_whole_maps_in_some_directions(codes, batch):
    for size in ((28, 32), (56, 40), (1, 1600)):
        u, delta, A, B, C, _ = map_inputs(batch, len(codes), 1, 1, *size, torch.float16)
        check_maps((u, delta, A, B, C, None), codes, True, 5e-3)


def test_whole_maps_that_fade_and_last():
    """Decays of exactly 1, and of 0, and steps beyond softplus' threshold."""
    u, delta, _, B, C, bias = map_inputs(2, 4, 1, 1, 56, 56, torch.float32)
    A = torch.tensor([[0.0], [-1e-3], [-50.0], [-1.0]], device="cuda")
    check_maps((u, delta * 20, A, B, C, bias), [0, 1, 2, 3], True, 1e-5)
    out = [ops.shared_scan2d(u, delta, A, B, C, bias, [0, 1, 2, 3], None, True, True) for _ in range(2)]
    assert torch.equal(*out)
    raw = ops.shared_scan2d(u, delta.abs(), A, B, C, None, [0, 1, 2, 3], None, False, True)
    table = direction_table([0, 1, 2, 3], 56, 56)
    assert_near(raw, reference.shared_scan2d(u, delta.abs(), A, B, C, None, table, False, True), 1e-5)


def test_many_map_sizes_share_kernels(monkeypatch):
    monkeypatch.setattr(cuda_shared, "_MAX_BAKED", 0)
    monkeypatch.setattr(cuda_shared, "_baked", set())
    for size in ((9, 7), (16, 20), (40, 33), (128, 130)):
        check_maps(map_inputs(2, 4, 1, 2, *size, torch.float32), [0, 1, 2, 7], True, 1e-5)
        check_maps(map_inputs(150, 2, 3, 1, *size, torch.float16), [3, 4], True, 5e-3)


def test_same_result_every_run():
    u, delta, A, B, C, bias = map_inputs(150, 4, 2, 4, 28, 28, torch.float16)
    outs = [ops.shared_scan2d(u, delta, A, B, C, bias, [0, 1, 2, 3], None, True, True) for _ in range(2)]
    assert torch.equal(*outs)


def test_limits_are_named():
    u, delta, A, B, C, bias = map_inputs(1, 17, 1, 1, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="at most 16 directions"):
        ops.shared_scan2d(u, delta, A, B, C, bias, [0] * 17, None, True, True)
