"""The ops as PyTorch sees them: schema, fake tensors, autograd registration, compile, export, FLOPs."""

import shutil

import pytest
import torch
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops import problems
from vmeanba_fx import ops

CASES = {
    "selective_scan": problems.selective_scan(2, 2, 3, 2, 7, torch.float32),
    "selective_scan, nothing optional": problems.selective_scan(2, 2, 3, 2, 7, torch.bfloat16, full=False),
    "linear_scan": problems.linear_scan(2, 2, 3, 2, 7, torch.float32),
    "shared_scan": problems.shared_scan(2, 2, 3, 2, 7, torch.float32),
    "shared_scan2d": problems.shared_scan2d(2, [0, 3], 3, 2, 2, 3, torch.float32, own_u=False),
    "shared_scan2d, by table": problems.shared_scan2d(2, 2, 3, 2, 2, 3, torch.float32, merge=False),
    "ss2d": problems.ss2d(2, [1, 2], 3, 2, 2, 2, 3, torch.float32),
    "ss2d, nothing optional": problems.ss2d(2, 2, 3, 2, 2, 2, 3, torch.float32, full=False),
    "broadcast_add": problems.broadcast_add(2, 2, 3, 7, torch.float32),
    "broadcast_add, no skip": problems.broadcast_add(2, 2, 3, 7, torch.float32, skip=False),
}
BACKWARD = [case for case in CASES if not case.startswith("broadcast_add")]


def overload(name: str):
    return getattr(torch.ops.vmeanba_fx, name).default


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    arguments, _ = problems.with_grad(CASES[case])
    opcheck(overload(case.split(",")[0]), (), arguments)


@pytest.mark.parametrize("case", BACKWARD)
def test_opcheck_backward(case):
    name, arguments = case.split(",")[0], CASES[case]
    out = getattr(ops, name)(**arguments)
    if name == "selective_scan":
        optional = ("D", "z", "delta_bias")
        softplus = arguments["delta_softplus"]
        arguments = {k: v for k, v in arguments.items() if k not in (*optional, "delta_softplus")}
        arguments |= {k: CASES[case].get(k) for k in optional} | {"delta_softplus": softplus}
    opcheck(overload(f"{name}_backward"), (torch.ones_like(out), *arguments.values()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_gradients(case, dynamic):
    """`aot_eager` does all that the default backend does (capture, fake tensors, joint graph) but generate code."""
    torch._dynamo.reset()
    op = getattr(ops, case.split(",")[0])

    def run(arguments):
        return 2 * op(**arguments)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ours, our_leaves = problems.with_grad(CASES[case])
    theirs, their_leaves = problems.with_grad(CASES[case])
    out, expected = compiled(ours), run(theirs)
    torch.testing.assert_close(out, expected)
    options = {"allow_unused": True, "materialize_grads": True}
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), our_leaves, **options),
        torch.autograd.grad(expected.sum(), their_leaves, **options),
    )


def test_compiling_takes_the_tail_apart():
    y, u, D = problems.broadcast_add(2, 2, 3, 7, torch.float32).values()
    compiled = make_fx(lambda *tensors: torch.ops.vmeanba_fx.broadcast_add(*tensors))(y, u, D)
    assert overload("broadcast_add") not in {node.target for node in compiled.graph.nodes}
    torch.testing.assert_close(compiled(y, u, D), ops.broadcast_add(y, u, D))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_with_inductor():
    torch._dynamo.reset()
    arguments = problems.selective_scan(2, 2, 3, 2, 7, torch.float32)

    def run(arguments):
        return torch.relu(ops.selective_scan(**arguments)) + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(arguments), run(arguments))


class Sequence(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        y = ops.selective_scan(u, delta, A, B, C, delta_softplus=True)
        means = u.unflatten(1, (2, 3)).mean(2, keepdim=True), delta.unflatten(1, (2, 3)).mean(2)
        return ops.broadcast_add(ops.shared_scan(*means, A[:2], B, C), y, None)


class Maps(torch.nn.Module):
    def forward(self, x, feats, dt_weight, A):
        scan = ops.ss2d(x, feats, dt_weight, A, None, None, [0, 1, 2, 3], None, True)
        features = feats[:, :, :1], feats[:, :, 0], A[:4], feats[:, :, :2], feats[:, :, 2:4]
        return scan + ops.shared_scan2d(*features, None, [0, 1, 2, 3], None, True, True)


def test_export_with_dynamic_batch_and_length():
    def inputs(batch, length):
        return tuple(problems.selective_scan(batch, 2, 3, 2, length, full=False).values())[:5]

    batch, length = Dim("batch"), Dim("length")
    shapes = {0: batch, 2: length}, {0: batch, 2: length}, None, {0: batch, 3: length}, {0: batch, 3: length}
    program = export(Sequence(), inputs(2, 7), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes]
    assert overload("selective_scan") in targets and overload("broadcast_add") in targets
    for sizes in ((1, 1), (3, 33), (2, 7)):
        torch.testing.assert_close(program.module()(*inputs(*sizes)), Sequence()(*inputs(*sizes)))


def test_export_with_dynamic_height_and_width():
    def inputs(batch, height, width):
        arguments = problems.ss2d(batch, [0, 1, 2, 3], 3, 2, 2, height, width)
        return arguments["x"], arguments["feats"], arguments["dt_weight"], arguments["A"]

    b, h, w = Dim("batch"), Dim("height"), Dim("width")
    shapes = {0: b, 2: h, 3: w}, {0: b, 3: h, 4: w}, None, None
    example = inputs(2, 3, 5)
    program = export(Maps(), example, dynamic_shapes=shapes)
    for sizes in ((1, 1, 1), (3, 7, 2)):
        again = (*inputs(*sizes)[:2], *example[2:])
        torch.testing.assert_close(program.module()(*again), Maps()(*again))


def test_fake_output_has_the_real_shape_dtype_and_strides():
    from torch._subclasses import FakeTensorMode

    for case, arguments in CASES.items():
        real = getattr(ops, case.split(",")[0])(**arguments)
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
            fake = getattr(ops, case.split(",")[0])(**fakes)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), case


# B = 2, K = 2, D = 3, N = 5, L = 7, R = 4 and, on maps, H = 2, W = 3; by hand from the formulas.
FLOPS = {
    "selective_scan": (problems.selective_scan(2, 2, 3, 5, 7), 9 * 2 * 7 * 6 * 5 + 2 * (2 * 7 * 6)),
    "selective_scan, nothing optional": (problems.selective_scan(2, 2, 3, 5, 7, full=False), 9 * 2 * 7 * 6 * 5),
    "linear_scan": (problems.linear_scan(2, 2, 1, 5, 7), 10 * 2 * 7 * 2 * 5),
    "shared_scan": (problems.shared_scan(2, 2, 4, 5, 7), 10 * 2 * 7 * 2 * 4 * 5),
    "shared_scan2d": (problems.shared_scan2d(2, [0, 1], 4, 5, 2, 3, own_u=False), 10 * 2 * 6 * 2 * 4 * 5),
    "ss2d": (problems.ss2d(2, [0, 1], 3, 4, 5, 2, 3), 9 * 2 * 6 * 6 * 5 + 2 * 2 * 6 * 6 * 4 + 2 * 6 * 3),
}


@pytest.mark.parametrize("case", FLOPS)
def test_flops(case):
    arguments, expected = FLOPS[case]
    with FlopCounterMode(display=False) as counter:
        getattr(ops, case.split(",")[0])(**arguments)
    assert counter.get_total_flops() == expected
