"""How kernels are compiled and launched: streams, graphs, torch.compile, threads, and what happens without CuPy."""

import threading
import warnings

import pytest
import torch
from reference import assert_near, normal, scan_inputs

from vmeanba_fx import ops
from vmeanba_fx.ops import cuda, cuda_runtime


def call(arguments):
    u, delta, A, B, C, D, z, bias = arguments
    return ops.selective_scan(u, delta, A, B, C, D, z, bias, True, torch.float32)


def map_call(u, delta, A, B, C):
    return ops.shared_scan2d(u, delta, A, B, C, None, [0, 1, 2, 3], None, True, True, torch.float32)


@pytest.fixture
def arguments():
    return scan_inputs(2, 4, 6, 2, 196, torch.float16)


@pytest.fixture
def maps():
    return (
        normal(2, 1, 1, 14, 14),
        normal(2, 4, 14, 14),
        -torch.rand(4, 1, device="cuda"),
        normal(2, 4, 1, 14, 14),
        normal(2, 4, 1, 14, 14),
    )


def test_runs_on_the_current_stream(arguments):
    expected = call(arguments)
    stream = torch.cuda.Stream()
    source = arguments[0].clone()
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        target.copy_(source)  # late: a launch on another stream would read zeros
        out = call((target, *arguments[1:]))
    stream.synchronize()
    assert torch.equal(out, expected)


def test_cuda_graph(arguments, maps):
    eager = call(arguments), map_call(*maps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(arguments), map_call(*maps)
    for out in captured:
        out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for out, expected in zip(captured, eager, strict=True):
        assert torch.equal(out, expected)


def test_first_use_inside_a_capture_is_refused():
    x = normal(1, 1, 1, 17)
    delta, A, BC = normal(1, 1, 17), -torch.ones(1, 5, device="cuda"), normal(1, 1, 5, 17)
    torch.cuda.synchronize()
    with pytest.raises(cuda_runtime.KernelError, match="before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.shared_scan(x, delta, A, BC, BC)


def test_compile_without_graph_breaks(arguments, maps):
    def model(u, delta, A, B, C, D, z, bias, *maps):
        y = ops.selective_scan(u * 1, delta, A, B, C, D, z, bias, True, torch.float32) + 1
        return y, map_call(*maps) * 2

    compiled = torch.compile(model, fullgraph=True)
    for out, expected in zip(compiled(*arguments, *maps), model(*arguments, *maps), strict=True):
        assert_near(out, expected.double(), 1e-5)


def test_threads(arguments):
    expected = call(arguments)
    results = [None] * 8

    def work(i):
        results[i] = [torch.equal(call(arguments), expected) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(result) for result in results)


def test_a_new_thread_on_cached_memory(arguments):
    call(arguments)
    failures = []

    def work():
        try:
            call(arguments)
            torch.cuda.synchronize()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_the_input(arguments):
    expected = call(arguments)
    out = call(tuple(t.to("cuda:1") for t in arguments))
    assert out.device.index == 1
    assert torch.equal(out.cpu(), expected.cpu())


def test_without_cupy_one_warning_and_the_torch_implementation(arguments, monkeypatch):
    expected = call(arguments)

    def missing(name):
        raise ImportError("No module named 'cupy'")

    monkeypatch.setattr(cuda_runtime, "import_module", missing)
    monkeypatch.setattr(cuda, "_forward_launches", cuda.LaunchCache())
    cuda_runtime._cupy.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outs = [call(arguments) for _ in range(2)]
    finally:
        cuda_runtime._cupy.cache_clear()
    messages = [str(w.message) for w in caught if "pip install vmeanba-fx[cuda" in str(w.message)]
    assert len(messages) == 1
    for out in outs:
        assert_near(out, expected.double(), 1e-5)


def test_a_broken_source_is_a_sentence():
    with pytest.raises(cuda_runtime.KernelError, match=r"cuda/tail\.cu does not compile"):
        cuda_runtime.kernel("tail.cu", "broadcast_add", (("Y_TYPE", 9),), 0)
