"""Scans that only their callers can reach, modules that call them, and an interception that records what it caught."""

import torch
from torch import nn

from tests import zoo
from vmeanba_fx import ops
from vmeanba_fx.capturing.intercept import intercept
from vmeanba_fx.ops.last_state import last_state

ARGUMENTS = zoo.scan_inputs(directions=2, length=11, dtype=torch.float32)
U, DELTA, A, B, C, D, BIAS = (ARGUMENTS[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias"))


def own_scan():
    """A scan that only its caller can reach: no module holds it."""

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        y, state = zoo.loop_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, state) if return_last_state else y

    return scan


def own_function():
    """The same as an ``autograd.Function`` class."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
            return zoo.loop_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]

    return Own


class Caller(nn.Module):
    """``forward(u, delta)`` scans through ``call``; further attributes as given."""

    def __init__(self, call, **attributes):
        super().__init__()
        self.call = call
        self.__dict__.update(attributes)

    def forward(self, u, delta):
        return self.call(self, u, delta)


SHORT = {"delta_softplus": True, "delta_bias": BIAS, "D": D}
EXPECTED = zoo.loop_scan(U, DELTA, A, B, C, D, None, BIAS, True)[0]


class Recorder:
    """An ``emit`` that computes the call with our op and remembers it."""

    def __init__(self):
        self.calls = []

    def __call__(self, call):
        self.calls.append(call)
        y = ops.selective_scan(
            call.u, call.delta, call.A, call.B, call.C, call.D, call.z, call.delta_bias, call.delta_softplus,
            call.out_dtype,
        )  # fmt: skip
        if not call.return_last_state:
            return y
        return y, last_state(call.u, call.delta, call.A, call.B, call.delta_bias, call.delta_softplus)


def redirected(model, *args):
    """Output of ``model`` under interception, run twice: (output, calls of the second run)."""
    record = Recorder()
    with torch.no_grad(), intercept(model, record, lambda: ""):
        model(*args)
        record.calls.clear()  # the first call of a function is tried on a few steps before it is trusted
        return model(*args), record.calls
