"""What symbolic tracing makes of Python: decisions become guards, and what leaves no trace is refused.

The truth is the eager model, bit for bit: both run the same kernels in the same order.
"""

import copy
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.symbolic.models import Small, assert_equal, guards_of, images, pad_to_even
from vmeanba_fx.symbolic import GuardError, SymbolicTraceError, check_guard, symbolic_trace

# Decisions: (function, an input like the example, an input for which Python decides otherwise, text in the guard)


def dtype_by_identity(self, x):
    return x * 2 if x.dtype is torch.float64 else x + 1


def dtype_asserted(self, x):
    assert x.dtype == torch.float32
    return x + 1


def device_kind(self, x):
    return x + 1 if x.device.type == "cpu" and not x.is_cuda else x * 2


def number_of_dimensions(self, x):
    return x.sum() if len(x.shape) == 3 else x.mean()


def squeezed_dimensions(self, x):
    y = torch.relu(x).squeeze()
    return y.sum() if len(y.shape) == 3 else y.mean()


def squeezed_in_place(self, x):
    y = torch.relu(x)
    y.squeeze_()
    return y.sum() if y.ndim == 3 else y.mean()


def dtype_handed_on_and_decided_upon(self, x):
    y = torch.ones(3, 1, 1).to(x.dtype)
    return x + y if x.dtype is torch.float64 else x - y


def loop_over_size(self, x):
    for i in range(x.shape[-1]):
        x = x + i
    return x


def loop_over_parts(self, x):
    return sum(part.sum(-1) * i for i, part in enumerate(x.split(2, dim=-1)))


def iterate_tensor(self, x):
    return torch.cat([row * i for i, row in enumerate(x)])


def data_dependent(self, x):
    return x * 2 if x.sum() > 0 else x - 1


def item_of_data(self, x):
    return x[: int((x > 100).sum().item()) + 1]


def size_as_key(self, x):
    H, W = x.shape[-2:]
    return x * {(4, 6): 2.0}.get((H, W), 3.0)


def size_in_string(self, x):
    return x * {"6": 2.0}.get(f"{x.size(-1)}", 3.0)


def largest_size(self, x):
    return x * max(x.shape[-2:])


def truth_of_size(self, x):
    return x * 2 if x.shape[-1] // 4 else x + 1


def grad_mode(self, x):
    return x * 2 if torch.is_grad_enabled() else x + 1


def autocast_mode(self, x):
    return x * 2 if torch.is_autocast_enabled("cpu") else x + 1


DECISIONS = [
    (pad_to_even, images(3, 6, 8), images(2, 4, 5), "x.size(3) % 2) != 0"),
    (pad_to_even, images(3, 6, 8), images(2, 5, 6), "x.size(2) % 2) != 0"),
    (dtype_by_identity, images(1), images().double(), "x.dtype"),
    (dtype_asserted, images(1), images().double(), "x.dtype"),
    (device_kind, images(1), images(device="meta"), "x.device.type"),
    (number_of_dimensions, images(1), images()[0], "x.dim()"),
    (squeezed_dimensions, images(3, 5, 2), images(1), "squeeze.dim()"),
    (squeezed_in_place, images(3, 5, 2), images(1), "relu.dim()"),
    (dtype_handed_on_and_decided_upon, images(1), images().double(), "x.dtype"),
    (loop_over_size, images(1, 2, 6), images(1, 4, 7), "x.size(3)"),
    (loop_over_parts, images(1, 2, 5), images(1, 2, 7), "len(split)"),
    (iterate_tensor, images(2, 2, 5), images(3), "x.size(0)"),
    (data_dependent, images().abs(), -images().abs(), "gt"),
    (item_of_data, images(3), images().abs() + 200, "item"),
    (size_as_key, images(1), images(1, 6, 4), "x.size(2)"),
    (size_in_string, images(1, 9), images(1, 4, 7), "x.size(-1)"),
    (largest_size, images(2, 3, 7), images(1, 7, 4), "x.size(3) > x.size(2)"),
    (truth_of_size, images(2, 3, 7), images(1, 4, 3), "x.size(3) // 4"),
]


@pytest.mark.parametrize("function, like, unlike, text", DECISIONS, ids=lambda v: getattr(v, "__name__", ""))
def test_decisions_are_checked_when_the_graph_runs(function, like, unlike, text):
    model = Small(function).eval()
    example = images().abs() if function is data_dependent else images()
    gm = symbolic_trace(model, example)
    assert_equal(gm, model, like)
    with pytest.raises(GuardError, match="does not hold for this input") as caught:
        gm(unlike)
    assert text in str(caught.value) and Path(function.__code__.co_filename).name in str(caught.value)


def test_modes_are_guarded():
    x = images()
    gm = symbolic_trace(Small(grad_mode), x)
    with torch.no_grad():
        assert torch.equal(gm(x), x + 1)
    with torch.enable_grad(), pytest.raises(GuardError, match="is_grad_enabled"):
        gm(x)
    gm = symbolic_trace(Small(autocast_mode), x)
    assert torch.equal(gm(x), x + 1)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(GuardError, match="is_autocast_enabled"):
        gm(x)


def test_optional_and_flag_inputs_are_guarded():
    class Model(nn.Module):
        def forward(self, x, mask=None, double=False, *more):
            x = x if mask is None else x * mask
            return x * 2 if double else x + sum(more)

    gm = symbolic_trace(Model(), images(), None, False, images(), 3)
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "mask", "double", "more_0", "more_1"]
    assert_equal(gm, Model(), images(4), None, False, images(4), 5)
    with pytest.raises(GuardError, match="`mask`"):
        gm(images(), images(), False, images(), 3)
    with pytest.raises(GuardError, match="`double`"):
        gm(images(), None, True, images(), 3)


def test_constants_leave_no_guard():
    def function(self, x):
        N = self.weight.shape[0]
        odd = self.weight.ndim == 1 and self.weight.size(0) % 2
        wide = torch.promote_types(torch.half, torch.float) is torch.float
        if len(self.weight) == 3 and odd and wide and torch.zeros(2, 5).numel() == 10:
            return x[:, :N] * self.weight.view(1, N, 1, 1)
        return x

    gm = symbolic_trace(Small(function), images())
    assert guards_of(gm) == []
    assert_equal(gm, Small(function), images(3))


def test_same_decision_is_checked_once():
    gm = symbolic_trace(Small(lambda self, x: pad_to_even(self, x) + pad_to_even(self, x)), images())
    assert len(guards_of(gm)) == 3  # dimensions, width, height


def test_dtype_of_the_weights_is_read_when_the_graph_runs():
    def function(self, x):
        weight = next(self.parameters())
        x = x.to(weight.dtype) + torch.zeros(1, device=weight.device)
        return x * 2 if weight.dtype is torch.float64 and weight.is_floating_point() else x + weight[0]

    gm = symbolic_trace(Small(function), images())
    assert_equal(gm, Small(function), images().double())
    with pytest.raises(GuardError, match=r"`weight.dtype`"):
        copy.deepcopy(gm).double()(images())


def test_dtype_handed_on_stays_symbolic():
    def function(self, x):
        table = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype)
        return (x.float() * self.weight[0]).to(x.dtype) + table

    gm = symbolic_trace(Small(function), images())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert_equal(gm, Small(function), images(1, 3, 7, dtype=dtype))
    assert [guard.split(" in ")[0] for guard in guards_of(gm)] == ["`x.dim()`"]


# Python constructs that plain fx does not take. Each must hold for other sizes as well.


def star_unpacking(self, x):
    first, *rest = x.unbind(1)
    B, *_, W = x.shape
    return first.view(B, -1, W) + sum(rest)


def named_results(self, x):
    best = x.max(dim=1)
    values, indices = x.topk(2, dim=1)
    return best.values + values[:, 1] + indices[:, 0]


def item_assignment(self, x):
    B, C, H, W = x.shape
    y = x.new_empty((B, 2, C, H * W))
    y[:, 0] = x.flatten(2)
    y[:, 1] = torch.flip(y[:, 0], dims=[-1])
    return y


def in_place_through_views(self, x):
    y = x.clone()
    z = y
    y += 1
    y[0].mul_(3)  # the result is not used, the effect is
    row = y[:, 0]
    row -= 2
    return y + z


def turned_in_place(self, x):
    y = x.clone()
    H = y.shape[2]
    y.transpose_(2, 3)
    return y.flatten(1).view(y.shape[0], y.shape[3], -1) + H * y.shape[2]


def factories(self, x):
    B, C, H, W = x.shape
    y = torch.zeros(C, H, W)  # fresh in every call
    y += x.sum(0)
    z = torch.ones(B, 1, H, W) * torch.arange(W) + torch.full((H, 1), 2.0)
    return y + z + torch.tensor([1.0, 2.0, 3.0])[:, None, None] + torch.linspace(0, 1, W)


def sizes_everywhere(self, x):
    H, W = x.shape[2:]
    assert isinstance(H, int) and isinstance(x, torch.Tensor) and isinstance(x.shape, torch.Size)
    L = x.shape[2:].numel()
    y = x.reshape(*x.shape[:2], L)[:, :, : L // 2] * (L**-0.5)
    rows, left = divmod(H + W, 2)
    y = F.interpolate(x, size=(2 * H, W + 1)).flatten(2)[..., : L // 2] + y * rows + left
    return y.mean() + torch.tensor(H * W) + (H - W) / L


def real_tensors(self, x):
    weights = [p for p in self.parameters()]  # not read through the module, so no proxies at first
    return x * (weights[0] * 2).view(1, -1, 1, 1) + torch.exp(weights[0]).sum()


def shaped_by_data(self, x):
    kept = self.weight.nonzero()
    return x * kept.shape[0] + self.weight[self.weight > 1].numel()


def by_checkpoint(self, x):
    return checkpoint(lambda y, scale: y * scale, x, 3.0, use_reentrant=False)


def dictionaries(self, x):
    out = {"a": x, "b": [x + 1, (x.shape[0], x * 2)]}
    a = {**out}
    return {"sum": a["a"] + out["b"][1][1], "parts": out["b"][:1], "batch": out["b"][1][0]}


def functional(self, x):
    return F.dropout(F.softmax(x, dim=-1), 0.5, self.training) + torch.einsum("bchw,c->bhw", x, self.weight)[:, None]


def random_numbers(self, x):
    return x + torch.rand_like(x) + torch.rand(x.shape[-1])


@pytest.mark.parametrize(
    "function",
    [
        star_unpacking, named_results, item_assignment, in_place_through_views, turned_in_place, factories,
        sizes_everywhere, real_tensors, shaped_by_data, by_checkpoint, dictionaries, functional,
    ],
)  # fmt: skip
def test_python_constructs(function):
    model = Small(function).eval()
    gm = symbolic_trace(model, images())
    gm.graph.eliminate_dead_code()
    gm.recompile()
    gm.graph.lint()
    for sizes in ((2, 4, 6), (1, 4, 6), (5, 3, 8), (5, 3, 8)):
        assert_equal(gm, model, images(*sizes))
    with torch.no_grad():
        model.weight.mul_(torch.tensor([-1.5, 0.0, 2.0]))  # parameters are read when the graph runs
    assert_equal(gm, model, images())


def test_random_functions_are_nodes():
    gm = symbolic_trace(Small(random_numbers), images())
    torch.manual_seed(5)
    expected = Small(random_numbers)(images(3))
    torch.manual_seed(5)
    assert torch.equal(gm(images(3)), expected)


def test_lazily_built_and_plain_tensors_are_kept():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = None
            self.plain = torch.full((3, 1, 1), 2.0)

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0).view(3, 1, 1)
            return x * self.table + self.plain

    model = Lazy()
    gm = symbolic_trace(model, images())
    assert model.table is None and not gm.state_dict()
    assert_equal(gm, Lazy(), images(3))
    assert gm.double()(images().double()).dtype == torch.float64


# What cannot be traced.


def local_scan(self, x):
    def scan(u, delta, A, B, C):
        h = u[..., 0]
        for t in range(u.shape[-1]):
            h = h * A[:, 0] + delta[..., t] * B[:, 0, 0, t, None] * u[..., t]
        return h

    return scan(x.flatten(2), x.flatten(2), self.weight[:, None], x.flatten(2)[:, None], None)


def to_numpy(self, x):
    import numpy as np

    return x + torch.from_numpy(np.sin(x.numpy()))


def caught_error(self, x):
    try:
        return x.view(-1, 5)
    except RuntimeError:
        return x


def autocast_region(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.mT


def python_randomness(self, x):
    return x * random.random()


def kept_constant(self, x):
    CONSTANT.add_(1)
    return x + CONSTANT


def unseen_decision(self, x):
    return x * 2 if type(x) is torch.Tensor else x + 1


def state_between_calls(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    return x + self.calls


def foreign_module(self, x):
    return nn.BatchNorm2d(3).eval()(x)


CONSTANT = torch.zeros(1)


@pytest.mark.parametrize(
    "function, text",
    [
        (local_scan, "define it outside of forward"),
        (to_numpy, "NumPy"),
        (caught_error, "catches an error"),
        (autocast_region, "autocast region"),
        (python_randomness, "`random`"),
        (kept_constant, "kept between calls"),
        (unseen_decision, "does not reproduce the model"),
        (state_between_calls, "does not reproduce the model"),
        (foreign_module, "BatchNorm2d is called but is no submodule"),
    ],
)
def test_refusals_say_what_where_and_what_to_do(function, text):
    model = nn.Sequential(nn.Identity(), Small(function))
    with pytest.raises(SymbolicTraceError) as caught:
        symbolic_trace(model, images())
    message = str(caught.value)
    assert text in message and "vmeanba_fx.capture" in message
    assert "leaf_modules=" in message


def test_an_operation_that_fails_is_named():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3, 1, 1))
            self.inner = nn.Identity()

        def forward(self, x):
            self.mean = self.mean * 0.9 + x.mean((0, 2, 3))[:, None, None]
            return x - self.mean

    with pytest.raises(SymbolicTraceError, match=r"1\.mean is assigned in forward"):
        symbolic_trace(nn.Sequential(nn.Identity(), Stateful()), images())
    with pytest.raises(SymbolicTraceError, match=r"1 \(Small\) cannot be traced.*_python.py:\d+ `.*np.sin.*`"):
        symbolic_trace(nn.Sequential(nn.Identity(), Small(to_numpy)), images())


def test_guard_values():
    check_guard(torch.tensor([True]), True, "here")
    check_guard(None, None, "here")
    check_guard(3, 3, "here")
    for value, expected in ((torch.tensor(0), True), (torch.zeros(2), None), (4, 3), (torch.float16, torch.float32)):
        with pytest.raises(GuardError, match="here was"):
            check_guard(value, expected, "here")
