"""What other threads see of a capture, and that nothing of it stays: interception swaps code for the whole process."""

import gc
import sys
import threading
import types

import pytest
import torch
from torch import nn

import vmeanba_fx
from tests import zoo
from tests.families.models import build
from vmeanba_fx.codeswap import CodeSwap
from vmeanba_fx.intercept import intercept
from vmeanba_fx.symbolic.leaves import LeafFunctions, Listener


def plain(a, b=2, *, c=3):
    return a + b + c


class Holder(nn.Module):
    """Reaches both signatures, a Function, and a helper with defaults."""

    def __init__(self):
        super().__init__()
        self.held = [zoo.selective_scan_fn, zoo.vmamba_scan_fn, zoo.ScanFunction]


def hammer(work, until):
    """Call ``work`` in another thread until ``until`` is done; errors come out here."""
    errors, stop = [], threading.Event()

    def loop():
        while not stop.is_set():
            try:
                work()
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=loop)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # switch in the middle of everything
    thread.start()
    try:
        until()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not errors, errors


def test_calls_of_other_threads_never_meet_a_half_swapped_function():
    given = zoo.scan_inputs(1, 1, 2, 1, 2)
    args = [given[n] for n in ("u", "delta", "A", "B", "C")]
    expected = zoo.selective_scan_fn(*args)

    def calls():
        assert torch.equal(zoo.selective_scan_fn(*args), expected)
        assert torch.equal(zoo.vmamba_scan_fn(*args, delta_softplus=False), expected)
        assert torch.equal(zoo.ScanFunction.apply(*args), expected)

    def swaps():
        for _ in range(25):
            with intercept(Holder(), lambda call: None, lambda: ""):
                pass

    hammer(calls, swaps)


def test_a_swap_is_for_the_thread_that_made_it():
    seen = []
    with CodeSwap([plain], lambda fn, original, args, kwargs: "swapped"):
        assert plain(1) == "swapped"
        thread = threading.Thread(target=lambda: seen.extend([plain(1), plain(1, 1, c=1)]))
        thread.start()
        thread.join()
    assert seen == [6, 3] and plain(1) == 6


def test_a_call_that_outlives_the_swap_finishes():
    """A generator of the swapped code that is still running when the swap ends runs the original from then on."""

    def handler(fn, original, args, kwargs):
        return "swapped"

    with CodeSwap([plain], handler):
        redirected = types.FunctionType(plain.__code__, plain.__globals__)
    assert redirected(1, 1, c=1) == 3


def test_symbolic_leaves_are_for_one_thread():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    class Deaf(Listener):
        def apply_called(self, cls, original, args, kwargs):
            return "heard"

    seen = []
    with LeafFunctions().intercepted(Deaf()):
        assert Twice.apply(torch.ones(1)) == "heard"
        thread = threading.Thread(target=lambda: seen.append(Twice.apply(torch.ones(1))))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], torch.full((1,), 2.0)) and torch.equal(Twice.apply(torch.ones(1)), seen[0])


@pytest.mark.parametrize("name", ["one call per direction", "checkpoint region"])
def test_the_model_runs_in_another_thread_while_it_is_captured(name):
    model, x = build(name, call=zoo.call_s1, depth=1), zoo.images(2)
    with torch.no_grad():
        expected = model(x)

    def forward():
        with torch.no_grad():
            assert zoo.relative_error(model(x), expected) < 1e-6

    hammer(forward, lambda: vmeanba_fx.capture(model, x))


def _alive():
    gc.collect()
    counts = {types.FunctionType: 0, types.CellType: 0, dict: 0}
    for obj in gc.get_objects():
        if type(obj) in counts:
            counts[type(obj)] += 1
    return counts


def test_nothing_is_left_of_many_interceptions():
    def once():
        with intercept(Holder(), lambda call: None, lambda: ""):
            pass

    codes = zoo.selective_scan_fn.__code__, zoo.vmamba_scan_fn.__code__, zoo.ScanFunction.__dict__["forward"]
    once()
    before = _alive()
    for _ in range(20):
        once()
    after = _alive()
    assert all(after[kind] <= before[kind] + 5 for kind in before), (before, after)
    assert codes == (zoo.selective_scan_fn.__code__, zoo.vmamba_scan_fn.__code__, zoo.ScanFunction.__dict__["forward"])
    assert zoo.selective_scan_fn.__defaults__[-1] is False


def test_nothing_is_left_after_an_interrupt():
    def interrupted():
        with intercept(Holder(), lambda call: None, lambda: ""):
            raise KeyboardInterrupt

    code = zoo.selective_scan_fn.__code__
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert zoo.selective_scan_fn.__code__ is code
