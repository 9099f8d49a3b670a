"""What leaves no trace, so that symbolic tracing refuses it: each refusal names the place and says what to do."""

import random

import pytest
import torch
from torch import nn

from tests.symbolic.models import Small, images
from vmeanba_fx.symbolic import SymbolicTraceError, symbolic_trace


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
    with pytest.raises(SymbolicTraceError, match=r"1 \(Small\) cannot be traced.*test_refusals.py:\d+ `.*np.sin.*`"):
        symbolic_trace(nn.Sequential(nn.Identity(), Small(to_numpy)), images())
