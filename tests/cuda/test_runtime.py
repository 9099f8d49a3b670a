"""How kernels are compiled and launched: streams, graphs, torch.compile, threads, devices, and what happens without CuPy.

Everything holds for every op, so most tests run over `CALLS`.
"""

import threading
import warnings

import pytest
import torch
from reference import assert_near, normal, scan_inputs

from vmeanba_fx import ops
from vmeanba_fx.ops import cuda, cuda_runtime, cuda_shared, cuda_ss2d

FOUR = [0, 1, 2, 3]


def _selective_scan():
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 4, 6, 2, 196, torch.float16)
    return lambda *t: ops.selective_scan(*t, True, torch.float32), (u, delta, A, B, C, D, z, bias)


def _selective_scan_backward():
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 4, 6, 2, 196, torch.float16)
    grad = normal(*u.shape)
    return lambda *t: torch.ops.vmeanba_fx.selective_scan_backward(*t, True), (grad, u, delta, A, B, C, D, z, bias)


def _linear_scan():
    a = torch.rand(2, 4, 2, 196, device="cuda")
    return ops.linear_scan, (a, normal(2, 4, 3, 2, 196), normal(2, 4, 2, 196))


def _shared_scan():
    B = normal(2, 4, 2, 196)
    arguments = normal(2, 4, 3, 196), normal(2, 4, 196), -torch.rand(4, 2, device="cuda"), B, B.flip(0)
    return lambda *t: ops.shared_scan(*t, None, True, torch.float32), arguments


def _shared_scan2d():
    B = normal(2, 4, 1, 14, 14)
    arguments = normal(2, 1, 1, 14, 14), normal(2, 4, 14, 14), -torch.rand(4, 1, device="cuda"), B, B.flip(0)
    return lambda *t: ops.shared_scan2d(*t, None, FOUR, None, True, True, torch.float32), arguments


def _ss2d():
    feats = normal(2, 4, 8, 14, 14, dtype=torch.float16)
    weight, A = normal(4, 16, 6, dtype=torch.float16), -torch.rand(64, 1, device="cuda")
    arguments = normal(2, 16, 14, 14, dtype=torch.float16), feats, weight, A, normal(16), normal(64)
    return lambda *t: ops.ss2d(*t, FOUR, None, True, torch.float32), arguments


def _broadcast_add():
    return ops.broadcast_add, (normal(2, 4, 1, 196), normal(2, 24, 196, dtype=torch.float16), normal(24))


CALLS = {
    make.__name__[1:]: make
    for make in (
        _selective_scan, _selective_scan_backward, _linear_scan, _shared_scan, _shared_scan2d, _ss2d, _broadcast_add
    )
}  # fmt: skip


@pytest.fixture(params=list(CALLS))
def call(request):
    """(function, arguments); the function returns a tuple of tensors."""
    function, arguments = CALLS[request.param]()
    return lambda *tensors: _tuple(function(*tensors)), arguments


def _tuple(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def forget_launches(monkeypatch):
    """Let every op choose its kernel anew."""
    for module, name in (
        (cuda, "_forward_launches"), (cuda, "_tail_launches"), (cuda_shared, "_launches"), (cuda_ss2d, "_launches")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, cuda.LaunchCache())


def same(found, expected) -> bool:
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_runs_on_the_current_stream(call):
    function, (first, *others) = call
    expected = function(first, *others)
    stream = torch.cuda.Stream()
    target = torch.zeros_like(first)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        target.copy_(first)  # late: a launch on another stream would read zeros
        out = function(target, *others)
    stream.synchronize()
    assert same(out, expected)


def test_cuda_graph(call):
    function, arguments = call
    expected = function(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*arguments)
    for out in captured:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, expected)
    # New numbers in the captured inputs give new results.
    arguments[0].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, function(*arguments))


def test_first_use_inside_a_capture_is_refused():
    x = normal(1, 1, 1, 17)
    delta, A, BC = normal(1, 1, 17), -torch.ones(1, 5, device="cuda"), normal(1, 1, 5, 17)
    torch.cuda.synchronize()
    with pytest.raises(cuda_runtime.KernelError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.shared_scan(x, delta, A, BC, BC)


def test_compile_without_graph_breaks(call):
    function, arguments = call

    def model(first, *others):
        return tuple(out + 1 for out in function(first * 1, *others))

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for out, expected in zip(compiled(*arguments), model(*arguments), strict=True):
        assert_near(out, expected.double(), 1e-5 if out.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("cold", [True, False])
def test_threads(call, cold, monkeypatch):
    function, arguments = call
    expected = function(*arguments)
    if cold:  # all threads choose and load the kernel at once
        forget_launches(monkeypatch)
        monkeypatch.setattr(cuda_runtime, "_kernels", {})
    torch.cuda.synchronize()
    start = threading.Barrier(8)
    results, failures = [None] * 8, []

    def work(i):
        try:
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                results[i] = [same(function(*arguments), expected) for _ in range(20)]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(all(result) for result in results)


def test_a_new_thread_on_cached_memory(call):
    function, arguments = call
    function(*arguments)
    failures = []

    def work():
        try:
            function(*arguments)
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_the_input(call):
    function, arguments = call
    expected = function(*arguments)
    moved = tuple(t.to("cuda:1") for t in arguments)
    for _ in range(2):
        out = function(*moved)
        assert torch.cuda.current_device() == 0
        assert all(t.device.index == 1 for t in out)
        assert same([t.cpu() for t in out], [t.cpu() for t in expected])
    # A stream of the other device, and both devices from two threads at once.
    with torch.cuda.device(1), torch.cuda.stream(torch.cuda.Stream(1)):
        out = function(*moved)
    torch.cuda.synchronize(1)
    assert same([t.cpu() for t in out], [t.cpu() for t in expected])
    results = {}

    def work(name, tensors):
        results[name] = [[t.cpu() for t in function(*tensors)] for _ in range(10)]

    threads = [threading.Thread(target=work, args=item) for item in (("first", arguments), ("second", moved))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(out, [t.cpu() for t in expected]) for outs in results.values() for out in outs)


def test_without_cupy_one_warning_and_the_torch_implementation(monkeypatch):
    prepared = [make() for make in CALLS.values()]
    expected = [_tuple(function(*arguments)) for function, arguments in prepared]

    def missing(name):
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(cuda_runtime, "import_module", missing)
    forget_launches(monkeypatch)
    cuda_runtime._cupy.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [[_tuple(function(*arguments)) for function, arguments in prepared] for _ in range(2)][-1]
    finally:
        cuda_runtime._cupy.cache_clear()
    messages = [str(w.message) for w in caught if "pip install vmeanba-fx[cuda" in str(w.message)]
    assert len(messages) == 1
    for outs, wanted in zip(found, expected, strict=True):
        for out, want in zip(outs, wanted, strict=True):
            assert out.dtype == want.dtype
            assert_near(out, want.double(), 1e-4 if out.dtype == torch.float32 else 5e-3)


def test_a_broken_source_is_a_sentence():
    with pytest.raises(cuda_runtime.KernelError, match=r"cuda/tail\.cu does not compile"):
        cuda_runtime.kernel("tail.cu", "broadcast_add", (("Y_TYPE", 9),), 0)


def test_an_impossible_launch_is_a_sentence():
    function, arguments = _broadcast_add()
    function(*arguments)
    kernel = next(k for k in cuda_runtime._kernels.values() if k.name == "broadcast_add")
    with pytest.raises(cuda_runtime.KernelError, match="broadcast_add could not be launched with grid"):
        kernel.launch((1, 1, 1), 2048, 0, (0,) * 16)


def test_sizes_beyond_a_limit_name_it():
    one = torch.ones(1, device="cuda")
    long = 2**30 + 1
    sequence, states = one.expand(1, 1, long), one.expand(1, 1, 1, long)
    A = -torch.ones(1, 1, device="cuda")
    with pytest.raises(ValueError, match=f"length may be at most {2**30}"):
        ops.selective_scan(sequence, sequence, A, states, states)
    with pytest.raises(ValueError, match=f"length may be at most {2**30}"):
        ops.shared_scan(states, sequence, A, states, states)
    rows = one.expand(2**16, 2**15, 1)
    with pytest.raises(ValueError, match="batch x channels may be at most"):
        ops.selective_scan(
            rows, rows, A.expand(2**15, 1), one.expand(2**16, 1, 1, 1), one.expand(2**16, 1, 1, 1)
        )
    wide = one.expand(1, 1, 257, 8)
    with pytest.raises(ValueError, match="state size N may be at most 256"):
        ops.shared_scan(one.expand(1, 1, 1, 8), one.expand(1, 1, 8), A.expand(1, 257), wide, wide)
    with pytest.raises(ValueError, match="state size N may be at most 128"):
        ops.ss2d(
            one.expand(1, 8, 2, 2), one.expand(1, 1, 2 + 258, 2, 2), one.expand(1, 8, 2), A.expand(8, 129), None, None,
            [0], None, True,
        )  # fmt: skip
