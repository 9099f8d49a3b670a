"""Gradients of every op: against finite differences, and against autograd through the plain loops."""

import pytest
import torch
from torch.autograd import gradcheck

from tests.ops import problems
from vmeanba_fx import ops
from vmeanba_fx.ops import naive

SMALL = {
    "selective_scan": problems.selective_scan(2, 2, 2, 2, 4),
    "selective_scan, nothing optional": problems.selective_scan(1, 2, 2, 2, 3, full=False),
    "linear_scan": problems.linear_scan(2, 1, 2, 2, 4),
    "shared_scan": problems.shared_scan(1, 2, 2, 2, 4),
    "shared_scan2d": problems.shared_scan2d(1, [0, 7], 2, 1, 2, 3, own_u=False),
    "shared_scan2d, not merged": problems.shared_scan2d(1, 2, 2, 1, 2, 3, merge=False),
    "ss2d": problems.ss2d(1, [1, 6], 2, 2, 1, 2, 3),
    "ss2d, by table": problems.ss2d(1, 2, 2, 1, 2, 2, 2, full=False),
    "broadcast_add": problems.broadcast_add(2, 2, 3, 4),
}
LARGER = {
    "selective_scan": problems.selective_scan(3, 2, 3, 3, 31),
    "selective_scan, many channels": problems.selective_scan(2, 2, 24, 16, 33),
    "selective_scan, one step": problems.selective_scan(1, 1, 3, 1, 1),
    "selective_scan, long": problems.selective_scan(1, 1, 2, 1, 500),
    "selective_scan, no gate": problems.selective_scan(2, 2, 3, 2, 33) | {"z": None},
    "linear_scan": problems.linear_scan(2, 2, 3, 2, 33),
    "shared_scan": problems.shared_scan(2, 2, 3, 2, 33),
    "shared_scan2d": problems.shared_scan2d(3, [0, 1, 2, 3], 3, 2, 5, 7, own_u=False),
    "shared_scan2d, own u": problems.shared_scan2d(3, 3, 3, 2, 5, 7),
    "ss2d": problems.ss2d(3, [0, 1, 2, 3], 5, 3, 2, 5, 7),
    "broadcast_add": problems.broadcast_add(3, 2, 5, 33),
    "broadcast_add, no skip": problems.broadcast_add(3, 2, 5, 33, skip=False),
}


def call(namespace, case: str, arguments: dict):
    return getattr(namespace, case.split(",")[0])(**arguments)


def gradients(namespace, case: str, arguments: dict, weight_dtype=None):
    """d/d(each tensor) of the output weighted with fixed random numbers."""
    copies, leaves = problems.with_grad(arguments)
    out = call(namespace, case, copies)
    weights = problems.Maker(1, weight_dtype or out.dtype).normal(*out.shape)
    return torch.autograd.grad(out, leaves, weights, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("case", SMALL)
def test_finite_differences(case):
    names = [k for k, v in SMALL[case].items() if torch.is_tensor(v) and v.is_floating_point()]
    leaves = [SMALL[case][k].clone().requires_grad_() for k in names]
    assert gradcheck(lambda *tensors: call(ops, case, SMALL[case] | dict(zip(names, tensors, strict=True))), leaves)


@pytest.mark.parametrize("case", LARGER)
def test_autograd_through_the_loops(case):
    torch.testing.assert_close(gradients(ops, case, LARGER[case]), gradients(naive, case, LARGER[case]))


@pytest.mark.parametrize("case", LARGER)
def test_tiles(case, small_tiles):
    torch.testing.assert_close(gradients(ops, case, LARGER[case]), gradients(naive, case, LARGER[case]))


@pytest.mark.parametrize("case", LARGER)
def test_strided_inputs(case):
    arguments = problems.strided(LARGER[case])
    leaves = {
        k: v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()
    }
    out = call(ops, case, leaves)
    weights = problems.Maker(1, out.dtype).normal(*out.shape, 2)[..., 0]
    wanted = [v for v in leaves.values() if torch.is_tensor(v) and v.requires_grad]
    grads = torch.autograd.grad(out, wanted, weights, allow_unused=True, materialize_grads=True)
    copies, plain = problems.with_grad(LARGER[case])
    expected = torch.autograd.grad(call(naive, case, copies), plain, weights, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("case", LARGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(case, dtype):
    """Each gradient has its tensor's dtype, and is right to that dtype's rounding."""
    low = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in LARGER[case].items()}
    grads = gradients(ops, case, low)
    expected = gradients(naive, case, problems.doubled(low), weight_dtype=dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert (grad.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_gradients_are_finite_where_all_is_forgotten():
    arguments = problems.selective_scan(1, 1, 4, 2, 100, torch.float32)
    arguments |= {"delta": arguments["delta"] * 20, "A": arguments["A"] * 100}
    assert all(grad.isfinite().all() for grad in gradients(ops, "selective_scan", arguments))


def test_only_some_tensors_need_gradients():
    arguments = problems.selective_scan(1, 2, 3, 2, 7)
    A = arguments["A"].requires_grad_()
    ops.selective_scan(**arguments).sum().backward()
    expected = A.grad.clone()
    A.grad = None
    naive.selective_scan(**arguments).sum().backward()
    torch.testing.assert_close(expected, A.grad)


def test_func_grad():
    arguments = problems.selective_scan(2, 2, 3, 2, 9)
    tensors = tuple(v for v in arguments.values() if torch.is_tensor(v))

    def loss(namespace):
        return lambda *x: namespace.selective_scan(*x, True).square().sum()

    every = tuple(range(len(tensors)))
    torch.testing.assert_close(
        torch.func.grad(loss(ops), every)(*tensors), torch.func.grad(loss(naive), every)(*tensors)
    )


def test_second_derivatives_are_refused():
    copies, leaves = problems.with_grad(problems.selective_scan(1, 1, 2, 1, 3))
    (grad,) = torch.autograd.grad(ops.selective_scan(**copies).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_forward_mode_is_refused_and_not_silently_zero():
    arguments = problems.selective_scan(1, 1, 2, 1, 3)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda u: ops.selective_scan(**arguments | {"u": u}), (arguments["u"],), (arguments["u"],))
