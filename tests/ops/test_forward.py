"""Every op against the plain loops: sizes, dtypes, strides, extreme decays, tiles."""

import pytest
import torch

from tests.ops import problems
from vmeanba_fx import ops
from vmeanba_fx.ops import cpu, naive, recurrence

# float64 results agree to rounding; lower ones are compared with the float64 reference on the same (rounded) inputs.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def leading(name: str) -> str:
    """The argument whose dtype sets that of the arithmetic and of the output."""
    return {"linear_scan": "a", "ss2d": "x"}.get(name, "u")


def check(name: str, arguments: dict, out_dtype: torch.dtype | None = None, tolerance: float | None = None):
    first = arguments[leading(name)]
    options = {} if name == "linear_scan" else {"out_dtype": out_dtype}
    out = getattr(ops, name)(**arguments, **options)
    expected = getattr(naive, name)(**problems.doubled(arguments))
    assert out.dtype == (out_dtype or first.dtype)
    assert out.stride() == (torch.empty_like(first).stride() if name == "ss2d" else torch.empty(out.shape).stride())
    limit = tolerance or max(TOLERANCE[out.dtype], TOLERANCE[torch.float32] * (first.dtype != torch.float64))
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error <= limit, f"relative error {error:.1e} > {limit:.1e}"
    return out


@pytest.mark.parametrize("length", [1, 7, 31, 33, 1000])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 3, 1), (1, 4, 1, 3), (3, 1, 24, 2), (1, 4, 16, 16)], ids=str)
def test_selective_scan(sizes, length):
    check("selective_scan", problems.selective_scan(*sizes, length))
    check("selective_scan", problems.selective_scan(*sizes, length, full=False, softplus=False))


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias"])
def test_selective_scan_without_one_of_the_optional_arguments(missing):
    check("selective_scan", problems.selective_scan(2, 2, 3, 2, 33) | {missing: None})
    check("selective_scan", problems.selective_scan(2, 2, 32, 16, 33) | {missing: None})


@pytest.mark.parametrize("length", [1, 7, 33, 1000])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 2, 3, 2), (1, 4, 1, 16), (2, 1, 16, 3)], ids=str)
def test_one_channel_scans(sizes, length):
    check("linear_scan", problems.linear_scan(*sizes, length))
    check("shared_scan", problems.shared_scan(*sizes, length))
    check("shared_scan", problems.shared_scan(*sizes, length, bias=False) | {"delta_softplus": False})


@pytest.mark.parametrize("directions", [[0], [0, 1, 2, 3], [7, 4, 5, 6], 3], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (5, 7)], ids=str)
@pytest.mark.parametrize("own_u, merge", [(True, True), (False, True), (True, False)])
def test_shared_scan2d(directions, size, own_u, merge):
    check("shared_scan2d", problems.shared_scan2d(2, directions, 3, 2, *size, own_u=own_u, merge=merge))


@pytest.mark.parametrize("directions", [[0], [0, 1, 2, 3], [7, 4, 5, 6], 3], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (5, 7)], ids=str)
@pytest.mark.parametrize("N", [1, 16])
def test_ss2d(directions, size, N):
    check("ss2d", problems.ss2d(2, directions, 24, 3, N, *size))
    check("ss2d", problems.ss2d(1, directions, 3, 1, N, *size, full=False))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("length", [1, 33])
def test_broadcast_add(skip, length):
    check("broadcast_add", problems.broadcast_add(3, 2, 5, length, skip=skip))


EACH_OP = {
    "selective_scan": problems.selective_scan(2, 2, 3, 2, 33),
    "selective_scan by steps": problems.selective_scan(2, 2, 24, 16, 33),
    "linear_scan": problems.linear_scan(2, 2, 3, 2, 33),
    "shared_scan": problems.shared_scan(2, 2, 3, 2, 33),
    "shared_scan2d": problems.shared_scan2d(2, [0, 5], 3, 2, 5, 7),
    "ss2d": problems.ss2d(2, [0, 1, 6], 9, 3, 2, 5, 7),
    "broadcast_add": problems.broadcast_add(2, 2, 3, 33),
}
each_op = pytest.mark.parametrize("case", EACH_OP)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(case, dtype):
    arguments = {
        k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in EACH_OP[case].items()
    }
    name = case.split()[0]
    check(name, arguments)
    if name != "linear_scan":
        check(name, arguments, out_dtype=torch.float32, tolerance=1e-4)
        check(name, arguments, out_dtype=torch.bfloat16)


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixed_dtypes(case, dtype):
    """Under autocast, models keep A, D and the bias in float32."""
    name = case.split()[0]
    arguments = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in EACH_OP[case].items()}
    arguments[leading(name)] = arguments[leading(name)].to(dtype)
    check(name, arguments, tolerance=1e-6 if dtype == torch.float64 else None)


@each_op
def test_strided_inputs(case):
    check(case.split()[0], problems.strided(EACH_OP[case]))


@each_op
def test_tiles(case, small_tiles):
    check(case.split()[0], EACH_OP[case])


def test_blocks_of_steps_have_their_own_gate(small_tiles):
    """A block has 64 steps or more."""
    check("selective_scan", problems.selective_scan(1, 4, 16, 16, 150))


@each_op
def test_output_is_fresh(case):
    """An output that shared memory with an input would break functionalisation."""
    arguments = EACH_OP[case]
    pointers = {v.untyped_storage().data_ptr() for v in arguments.values() if torch.is_tensor(v)}
    before = {k: v.clone() for k, v in arguments.items() if torch.is_tensor(v)}
    out = getattr(ops, case.split()[0])(**arguments)
    assert out.untyped_storage().data_ptr() not in pointers
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


@each_op
def test_empty_batch(case):
    arguments = dict(EACH_OP[case])
    for name, value in arguments.items():
        if torch.is_tensor(value) and name not in ("A", "D", "delta_bias", "dt_weight", "order"):
            arguments[name] = value[:0]
    assert getattr(ops, case.split()[0])(**arguments).shape[0] == 0


def test_channels_last_maps():
    arguments = problems.ss2d(2, [0, 1, 2, 3], 6, 2, 2, 5, 7)
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    arguments["feats"] = arguments["feats"].permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    check("ss2d", arguments)
    assert ops.ss2d(**arguments).is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.vmeanba_fx.ss2d.default, (*arguments.values(),), test_utils="test_faketensor")


def test_direction_codes_and_their_table_agree():
    from vmeanba_fx.ops.directions import direction_table

    codes = problems.ss2d(2, [1, 2, 4, 7], 6, 2, 2, 5, 7)
    for dtype in (torch.int32, torch.int64):
        table = codes | {"directions": [], "order": direction_table([1, 2, 4, 7], 5, 7).to(dtype)}
        assert torch.equal(ops.ss2d(**codes), ops.ss2d(**table))


EXTREMES = {
    "everything forgotten at once": (60.0, -100.0),
    "slow decay": (1e-4, -1e-3),
    "no decay": (0.5, 0.0),
    "growth": (0.05, 0.1),
    "steps of zero": (-200.0, -1.0),
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("sizes", [(1, 1, 3, 1), (2, 2, 32, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_decays(case, sizes, dtype):
    delta, decay = EXTREMES[case]
    arguments = problems.selective_scan(*sizes, 500, dtype)
    arguments["delta"] = arguments["delta"] * abs(delta) * 0.1 + delta
    arguments["A"] = torch.full_like(arguments["A"], decay)
    arguments["delta_bias"] = None
    arguments["delta_softplus"] = abs(delta) > 1
    check("selective_scan", arguments)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-38, 1.01])
def test_linear_scan_at_the_edges_of_the_decay(value):
    arguments = problems.linear_scan(2, 1, 2, 3, 500, torch.float32)
    check("linear_scan", arguments | {"a": torch.full_like(arguments["a"], value)})


@pytest.mark.parametrize("N", [1, 16])
def test_long_sequence_against_the_geometric_sum(N):
    """Constant inputs: h_t = b (1 - a^t) / (1 - a). No loop, so a length that the reference cannot do."""
    length, channels, step, decay = 65_536, 64, 0.01, -0.5
    y = ops.selective_scan(
        torch.ones(1, channels, length),
        torch.full((1, channels, length), step),
        torch.full((channels, N), decay),
        torch.ones(1, 1, N, length),
        torch.ones(1, 1, N, length),
    )
    t = torch.arange(1, length + 1, dtype=torch.float64)
    a = torch.tensor(step * decay, dtype=torch.float64).exp()
    expected = N * step * (1 - a**t) / (1 - a)
    torch.testing.assert_close(y.double(), expected.expand_as(y), rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("arguments", [(1, 4, 32, 16, 600), (2, 2, 3, 1, 100)], ids=str)
def test_steps_issued_one_by_one(arguments, monkeypatch):
    """What happens with a PyTorch whose foreach is not sequential."""
    monkeypatch.setattr(recurrence, "_foreach_is_sequential", lambda: False)
    check("selective_scan", problems.selective_scan(*arguments))


def test_both_layouts_agree(monkeypatch):
    arguments = problems.selective_scan(2, 2, 16, 8, 200)
    by_steps = ops.selective_scan(**arguments)
    monkeypatch.setattr(cpu, "_FEWEST_STATES", 10**12)
    torch.testing.assert_close(ops.selective_scan(**arguments), by_steps)
