"""What other threads see of a capture, and that nothing of it stays: interception swaps code for the whole process."""

import gc
import sys
import threading
import types

import pytest
import torch
from torch import nn
from torch.fx import _symbolic_trace

import vmeanba_fx
from tests import zoo
from tests.capturing.interception import DELTA, EXPECTED, SHORT, A, B, C, Caller, Recorder, U, own_scan
from tests.families.models import build
from tests.helpers import relative_error
from tests.zoo import vmamba_scan_fn
from vmeanba_fx.capturing.codeswap import CodeSwap
from vmeanba_fx.capturing.confinement import on_the_cpu
from vmeanba_fx.capturing.intercept import intercept
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
            assert relative_error(model(x), expected) < 1e-6

    hammer(forward, lambda: vmeanba_fx.capture(model, x))


def test_two_threads():
    """Captures in two threads both come out right, and what a third thread runs meanwhile is the model's own code."""
    models = [zoo.tiny(1, seed=1, call=vmamba_scan_fn), zoo.tiny(1, seed=2)]
    x = zoo.images(3)
    expected = [m(x).detach() for m in models]
    results, errors, stop = {}, [], threading.Event()

    def capture(i):
        try:
            results[i] = vmeanba_fx.capture(models[i], x)
        except Exception as error:
            errors.append(error)

    def bystander():
        while not stop.is_set():
            with torch.no_grad():
                if any(relative_error(m(x), y) > 1e-5 for m, y in zip(models, expected, strict=True)):
                    errors.append(AssertionError("a capture in another thread changed the model's output"))

    code = vmamba_scan_fn.__code__
    other = threading.Thread(target=bystander)
    threads = [threading.Thread(target=capture, args=(i,)) for i in range(2)]
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    other.join()
    assert not errors
    for i, gm in results.items():
        assert [s.name for s in vmeanba_fx.find_sites(gm)] == ["blocks.0.op"]
        torch.testing.assert_close(gm(x), expected[i], rtol=1e-5, atol=1e-6)
    assert vmamba_scan_fn.__code__ is code


def test_other_threads_run_the_original():
    scan, seen, record = own_scan(), [], Recorder()
    model = Caller(lambda self, u, delta: scan(u, delta, A, B, C, **SHORT))
    with intercept(model, record, lambda: ""):
        thread = threading.Thread(target=lambda: seen.append(model(U, DELTA)))
        thread.start()
        thread.join()
    assert not record.calls and torch.equal(seen[0], EXPECTED)


def test_other_threads_keep_their_device_guard():
    original, seen = torch.cuda.device, []
    with on_the_cpu():
        with torch.cuda.device(torch.device("cpu")):  # would raise
            pass
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.device(0)))
        thread.start()
        thread.join()
    assert type(seen[0]) is original is torch.cuda.device


class Shared(nn.Module):
    """Uses one block twice, which makes a trace follow the modules one by one."""

    def __init__(self):
        super().__init__()
        self.first = build("one call per direction", call=zoo.call_s1, depth=1)
        self.again = self.first

    def forward(self, x):
        return self.first(x) + self.again(x.flip(0))


class AsksTheCompiler(nn.Module):
    """Takes another way where it is compiled or exported, as many libraries do."""

    def forward(self, x):
        return -x if torch.compiler.is_compiling() or torch.compiler.is_exporting() else x


@pytest.mark.parametrize("other", ["the same", "another"])
def test_models_of_other_threads_are_not_traced_along(other):
    model, x = Shared().eval(), zoo.images(2)
    running = model if other == "the same" else nn.Sequential(zoo.tiny(1), AsksTheCompiler()).eval()
    with torch.no_grad():
        expected, own = running(x), model(x)

    def forward():
        with torch.no_grad():
            assert relative_error(running(x), expected) < 1e-6

    def captures():
        for _ in range(2):
            gm = vmeanba_fx.capture(model, x)
            assert len({site.name for site in vmeanba_fx.find_sites(gm)}) == 8
            assert relative_error(gm(x), own) < 1e-5

    call, patch, flag = nn.Module.__call__, _symbolic_trace._Patcher.patch_method, torch.compiler.is_compiling.__code__
    hammer(forward, captures)
    assert nn.Module.__call__ is call and _symbolic_trace._Patcher.patch_method is patch
    assert torch.compiler.is_compiling.__code__ is flag


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
