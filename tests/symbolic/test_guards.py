"""What symbolic tracing makes of decisions in Python: guards, which refuse an input that would be decided upon otherwise."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.symbolic.models import Small, assert_equal, guards_of, images, pad_to_even
from vmeanba_fx.symbolic import GuardError, check_guard, symbolic_trace

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


def test_guard_values():
    check_guard(torch.tensor([True]), True, "here")
    check_guard(None, None, "here")
    check_guard(3, 3, "here")
    for value, expected in ((torch.tensor(0), True), (torch.zeros(2), None), (4, 3), (torch.float16, torch.float32)):
        with pytest.raises(GuardError, match="here was"):
            check_guard(value, expected, "here")
