"""A wrong argument is a sentence that names the op, the tensor and what was expected, eagerly and while exporting."""

import pytest
import torch

from tests.ops import problems
from vmeanba_fx import ops

SCAN = problems.selective_scan(2, 2, 3, 4, 7)
LINEAR = problems.linear_scan(2, 2, 3, 4, 7)
SHARED = problems.shared_scan(2, 2, 3, 4, 7)
MAPS = problems.shared_scan2d(2, [0, 1], 3, 4, 2, 5)
SS2D = problems.ss2d(2, [0, 1], 3, 2, 4, 2, 5)
ADD = problems.broadcast_add(2, 2, 3, 7)
z = torch.zeros

SHAPES = [
    ("selective_scan", SCAN, "u", z(6, 7), "u must have 3 dims (B, K*D, L), but has shape (6, 7)"),
    ("selective_scan", SCAN, "u", z(2, 5, 7), "u has 5 channels, which B's K = 2 groups do not divide"),
    ("selective_scan", SCAN, "delta", z(2, 6, 8), "delta must be (B, K*D, L) = (2, 6, 7), but has shape (2, 6, 8)"),
    ("selective_scan", SCAN, "A", z(3, 4), "A must be (K*D, N) = (6, 4), but has shape (3, 4)"),
    ("selective_scan", SCAN, "B", z(2, 2, 3, 7), "B must be (B, K, N, L) = (2, 2, 4, 7), but has shape (2, 2, 3, 7)"),
    ("selective_scan", SCAN, "B", z(2, 4, 7), "B must have 4 dims (B, K, N, L), but has shape (2, 4, 7)"),
    ("selective_scan", SCAN, "B", z(2, 0, 4, 7), "dim 1 of B (B, K, N, L) is empty"),
    ("selective_scan", SCAN, "C", z(2, 1, 4, 7), "C must be (B, K, N, L) = (2, 2, 4, 7), but has shape (2, 1, 4, 7)"),
    ("selective_scan", SCAN, "D", z(3), "D must be (K*D,) = (6,), but has shape (3,)"),
    ("selective_scan", SCAN, "z", z(2, 6, 1), "z must be (B, K*D, L) = (2, 6, 7), but has shape (2, 6, 1)"),
    ("selective_scan", SCAN, "delta_bias", z(6, 1), "delta_bias must be (K*D,) = (6,), but has shape (6, 1)"),
    ("linear_scan", LINEAR, "a", z(2, 2, 7), "a must have 4 dims (B, K, N, L), but has shape (2, 2, 7)"),
    ("linear_scan", LINEAR, "b", z(2, 2, 4, 7), "b must have 5 dims (B, K, R, N, L), but has shape (2, 2, 4, 7)"),
    ("linear_scan", LINEAR, "b", z(2, 2, 3, 4, 8), "b must be (B, K, R, N, L) = (2, 2, 3, 4, 7), but has shape"),
    ("linear_scan", LINEAR, "C", z(2, 2, 1, 7), "C must be (B, K, N, L) = (2, 2, 4, 7), but has shape (2, 2, 1, 7)"),
    ("shared_scan", SHARED, "u", z(2, 6, 7), "u must have 4 dims (B, K, R, L), but has shape (2, 6, 7)"),
    ("shared_scan", SHARED, "delta", z(2, 6, 7), "delta must be (B, K, L) = (2, 2, 7), but has shape (2, 6, 7)"),
    ("shared_scan", SHARED, "A", z(6, 4), "A must be (K, N) = (2, 4), but has shape (6, 4)"),
    ("shared_scan", SHARED, "B", z(2, 2, 1, 7), "B must be (B, K, N, L) = (2, 2, 4, 7), but has shape (2, 2, 1, 7)"),
    ("shared_scan", SHARED, "C", z(2, 2, 4, 1), "C must be (B, K, N, L) = (2, 2, 4, 7), but has shape (2, 2, 4, 1)"),
    ("shared_scan", SHARED, "delta_bias", z(6), "delta_bias must be (K,) = (2,), but has shape (6,)"),
    (
        "shared_scan2d",
        MAPS,
        "u",
        z(2, 3, 3, 2, 5),
        "u must have 1 or K = 2 groups in dim 1 (K is that of delta), but it",
    ),
    ("shared_scan2d", MAPS, "delta", z(2, 2, 5, 2), "delta must be (B, K, H, W) = (2, 2, 2, 5), but has shape"),
    ("shared_scan2d", MAPS, "A", z(1, 4), "A must be (K, N) = (2, 4), but has shape (1, 4)"),
    ("shared_scan2d", MAPS, "B", z(2, 2, 4, 10), "B must be (B, K, N, H, W) = (2, 2, 4, 2, 5), but has shape"),
    ("shared_scan2d", MAPS, "C", z(2, 2, 4, 10, 1), "C must be (B, K, N, H, W) = (2, 2, 4, 2, 5), but has shape"),
    ("shared_scan2d", MAPS, "delta_bias", z(1), "delta_bias must be (K,) = (2,), but has shape (1,)"),
    ("shared_scan2d", MAPS, "directions", [0], "directions must hold one code for each of the K = 2 groups, but has 1"),
    ("shared_scan2d", MAPS, "directions", [0, 8], "a direction code must be 0 to 7, but directions is [0, 8]"),
    ("ss2d", SS2D, "x", z(2, 3, 10), "x must have 4 dims (B, D, H, W), but has shape (2, 3, 10)"),
    ("ss2d", SS2D, "feats", z(2, 2, 9, 2, 5), "feats must be (B, K, R + 2N, H, W) = (2, 2, 10, 2, 5), but has shape"),
    ("ss2d", SS2D, "dt_weight", z(2, 4, 2), "dt_weight must be (K, D, R) = (2, 3, 2), but has shape (2, 4, 2)"),
    ("ss2d", SS2D, "A", z(3, 4), "A must be (K*D, N) = (6, 4), but has shape (3, 4)"),
    ("ss2d", SS2D, "D", z(6), "D must be (D,) = (3,), but has shape (6,)"),
    ("ss2d", SS2D, "delta_bias", z(3), "delta_bias must be (K*D,) = (6,), but has shape (3,)"),
    ("broadcast_add", ADD, "y", z(2, 2, 3, 7), "y must be (B, K, 1, L) = (2, 2, 1, 7), but has shape (2, 2, 3, 7)"),
    ("broadcast_add", ADD, "u", z(2, 5, 7), "u has 5 channels, which y's K = 2 groups do not divide"),
    ("broadcast_add", ADD, "D", z(3), "D must be (K*D,) = (6,), but has shape (3,)"),
]


@pytest.mark.parametrize(
    "name, arguments, which, value, message", SHAPES, ids=[f"{s[0]}-{s[2]}-{i}" for i, s in enumerate(SHAPES)]
)
def test_shapes(name, arguments, which, value, message):
    wrong = arguments | {which: value.double() if torch.is_tensor(value) else value}
    for call in (getattr(ops, name), getattr(torch.ops.vmeanba_fx, name)):
        with pytest.raises(ValueError) as failure:
            call(**wrong)
        assert str(failure.value).startswith(f"{name}: {message}")
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in wrong.items()}
    with pytest.raises(ValueError) as failure:
        getattr(torch.ops.vmeanba_fx, name)(**meta)
    assert message in str(failure.value)


def raises(error, message, name, arguments):
    with pytest.raises(error) as failure:
        getattr(ops, name)(**arguments)
    assert str(failure.value) == message


def test_no_steps():
    empty = {k: v[..., :0] if torch.is_tensor(v) and k in "u delta B C z".split() else v for k, v in SCAN.items()}
    raises(ValueError, "selective_scan: u has length 0, but a scan needs at least one step", "selective_scan", empty)


@pytest.mark.parametrize(
    "dtype, hint", [(torch.complex64, "; complex scans are not supported"), (torch.int64, ""), (torch.bool, "")]
)
def test_dtype_of_a_tensor(dtype, hint):
    message = f"selective_scan: A must be float32, bfloat16, float16 or float64, but is {dtype}{hint}"
    raises(TypeError, message, "selective_scan", SCAN | {"A": SCAN["A"].to(dtype)})


def test_dtype_of_the_output():
    message = "ss2d: out_dtype must be float32, bfloat16, float16 or float64, but is torch.int32"
    raises(TypeError, message, "ss2d", SS2D | {"out_dtype": torch.int32})


def test_devices():
    message = "linear_scan: C is on meta, but a is on cpu"
    raises(ValueError, message, "linear_scan", LINEAR | {"C": LINEAR["C"].to("meta")})


@pytest.mark.parametrize("name, arguments", [("shared_scan2d", MAPS), ("ss2d", SS2D)])
def test_order_tables(name, arguments):
    table = problems.orders(2, 10)
    both = arguments | {"order": table}
    raises(ValueError, f"{name}: directions must be [] where order is given, but is [0, 1]", name, both)
    only = both | {"directions": []}
    short = only | {"order": table[:, :9]}
    raises(ValueError, f"{name}: order must be (K, L) = (2, 10), but has shape (2, 9)", name, short)
    floats = only | {"order": table.double()}
    raises(TypeError, f"{name}: order must be int32 or int64, but is torch.float64", name, floats)
    repeated = only | {"order": torch.zeros_like(table)}
    message = "each row of order must read every position exactly once, but one of them is missing positions"
    raises(ValueError, message, name, repeated)
    outside = only | {"order": table + 1}
    raises(ValueError, "order must hold positions 0 to 9, but it holds 1 to 10", name, outside)
