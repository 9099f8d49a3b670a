"""The compiled CPU kernels and the PyTorch code that does the same without Numba."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.ops import problems
from vmeanba_fx import ops
from vmeanba_fx.ops import cpu_jit, naive

CALLS = {
    "selective_scan": problems.selective_scan,
    "linear_scan": problems.linear_scan,
    "shared_scan": problems.shared_scan,
}
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}


def need_numba():
    pytest.importorskip("numba")


@pytest.fixture(params=["numba", "torch"])
def implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu_jit, "_kernels", lambda: None)
    else:
        need_numba()


def check(name: str, arguments: dict, limit: float = 2e-6):
    out = getattr(ops, name)(**arguments)
    expected = getattr(naive, name)(**problems.doubled(arguments))
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error <= limit, f"relative error {error:.1e}"
    return out


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("length", [1, 7, 1000])
@pytest.mark.parametrize("channels, states", [(1, 1), (3, 16), (17, 2), (40, 3)])
def test_sizes(name, length, channels, states, implementation):
    arguments = CALLS[name](2, 2, channels, states, length, torch.float32)
    check(name, arguments)
    check(name, problems.strided(arguments))


@pytest.mark.parametrize("channels, rank, states", [(1, 1, 1), (3, 17, 16), (33, 6, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (8, 5), (40, 25)], ids=str)
@pytest.mark.parametrize("directions", [[0, 1, 2, 3], [7, 4], 3], ids=str)
def test_ss2d_sizes(channels, rank, states, size, directions, implementation):
    arguments = problems.ss2d(2, directions, channels, rank, states, *size, torch.float32)
    check("ss2d", arguments)
    check("ss2d", problems.strided(arguments))
    arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    assert check("ss2d", arguments).stride() == torch.empty_like(arguments["x"]).stride()


@pytest.mark.parametrize("channels, states", [(1, 1), (3, 16)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (40, 50)], ids=str)
@pytest.mark.parametrize("own_u, merge", [(True, True), (False, False)])
def test_shared_scan2d_sizes(channels, states, size, own_u, merge, implementation):
    for directions in ([0, 1, 2, 3], 3):
        arguments = problems.shared_scan2d(2, directions, channels, states, *size, torch.float32, own_u=own_u, merge=merge)
        check("shared_scan2d", arguments)
        check("shared_scan2d", problems.strided(arguments))


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision(dtype, limit, implementation):
    """Only the inputs and the output are rounded."""
    check("selective_scan", problems.selective_scan(2, 2, 17, 3, 100, dtype), limit)
    check("linear_scan", problems.linear_scan(2, 2, 3, 3, 100, dtype), limit)
    check("shared_scan", problems.shared_scan(2, 2, 3, 3, 100, dtype), limit)
    check("shared_scan2d", problems.shared_scan2d(2, [0, 1, 2, 3], 3, 2, 9, 7, dtype), limit)
    check("ss2d", problems.ss2d(2, [0, 1, 2, 3], 17, 3, 2, 9, 7, dtype), limit)


def large() -> dict[str, dict]:
    """Enough work for several threads."""
    return {
        "selective_scan": problems.selective_scan(2, 2, 40, 4, 300, torch.float32),
        "linear_scan": problems.linear_scan(2, 4, 3, 16, 300, torch.float32),
        "shared_scan": problems.shared_scan(2, 4, 3, 16, 300, torch.float32),
        "shared_scan2d": problems.shared_scan2d(2, [0, 1, 2, 3], 3, 16, 15, 20, torch.float32),
        "ss2d": problems.ss2d(2, [0, 1, 2, 3], 40, 3, 2, 20, 20, torch.float32),
    }


@pytest.mark.parametrize("pool", [False, True], ids=["OpenMP", "pool"])
def test_threads(pool, monkeypatch):
    """One thread and two, PyTorch's or our own, and several callers at once: bit for bit the same."""
    need_numba()
    arguments = large()
    assert all(cpu_jit.usable(*(x for x in a.values() if torch.is_tensor(x))) for a in arguments.values())
    expected = {name: getattr(ops, name)(**a) for name, a in arguments.items()}
    if pool:
        monkeypatch.setattr(cpu_jit, "_openmp", lambda: None)

    def run(_) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(getattr(ops, name)(**a), expected[name]) for name, a in arguments.items())

    assert run(0)
    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(run, range(40)))
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["selective_scan", "ss2d"])
def test_memory(name):
    """Beside the output only tables of the parameters' size: nothing of B * D * N * L, and no copy in scan order."""
    need_numba()
    if name == "ss2d":
        arguments = problems.ss2d(1, [0, 1, 2, 3], 64, 4, 16, 40, 40, torch.float32)
        for maps in ("x", "feats"):
            arguments[maps] = arguments[maps].movedim(-3, -1).contiguous().movedim(-1, -3)
    else:
        arguments = problems.selective_scan(1, 4, 64, 16, 1600, torch.float32)
    getattr(ops, name)(**arguments)  # the table of the directions is kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = getattr(ops, name)(**arguments)
    events = profile.profiler.kineto_results.events()
    allocated = sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")
    parameters = sum(4 * arguments[weights].numel() for weights in ("A", "dt_weight") if weights in arguments)
    kernels = cpu_jit._kernels()
    scratch = kernels.ss2d_scratch(4, 16, 1600, 0) if name == "ss2d" else kernels.selective_scan_scratch(16)
    assert 4 * out.numel() <= allocated <= 4 * out.numel() + parameters + scratch + 4096


def test_not_finite_inputs_show(implementation):
    """Calibration reports outputs that are not finite, so they must not be hidden."""
    for value in (float("nan"), float("inf")):
        for name in ("u", "delta", "z", "A"):
            arguments = problems.selective_scan(1, 1, 20, 2, 40, torch.float32)
            index = (0, 3, 7)[-arguments[name].dim() :] if name != "A" else (3, 1)
            arguments[name][index] = value
            assert not ops.selective_scan(**arguments)[0, 3, 7].isfinite()


def test_large_and_small_steps(implementation):
    """softplus and exp over the whole range of float32."""
    arguments = problems.selective_scan(1, 1, 16, 2, 400, torch.float32, full=False)
    arguments["delta"] = torch.linspace(-110, 110, 16 * 400).view(1, 16, 400)
    check("selective_scan", arguments)
    forgotten = ops.selective_scan(**arguments | {"A": torch.full((16, 2), -1e30)})
    steps = torch.nn.functional.softplus(arguments["delta"])
    products = (arguments["B"] * arguments["C"]).sum(2) * arguments["u"] * steps
    torch.testing.assert_close(forgotten, products, rtol=1e-5, atol=1e-5)


def test_order_that_leaves_the_map(implementation):
    arguments = problems.ss2d(1, 2, 3, 2, 1, 4, 5, torch.float32)
    for wrong in (-1, 20):
        order = arguments["order"].clone()
        order[1, 3] = wrong
        with pytest.raises(ValueError, match="order must hold positions 0 to 19"):
            ops.ss2d(**arguments | {"order": order})


def in_process(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


MEMORY = """
import sys, torch, vmeanba_fx
from tests.ops import problems
from vmeanba_fx import ops
from vmeanba_fx.ops import cpu_jit
kind, dtype = sys.argv[1], getattr(torch, sys.argv[2])
if kind == "torch":
    cpu_jit._kernels = lambda: None
torch.set_num_threads(2)
four = [0, 1, 2, 3]
calls = {
    "selective_scan": problems.selective_scan(1, 2, 64, 1, 2**14, dtype),
    "linear_scan": problems.linear_scan(1, 4, 1, 4, 2**16, dtype),
    "shared_scan": problems.shared_scan(1, 4, 4, 4, 2**15, dtype),
    "shared_scan2d": problems.shared_scan2d(1, four, 16, 1, 256, 128, dtype, own_u=False),
    "shared_scan2d, one channel": problems.shared_scan2d(1, four, 1, 1, 512, 256, dtype, own_u=False),
    "broadcast_add": problems.broadcast_add(1, 2, 64, 2**15, dtype),
    "ss2d, rows": problems.ss2d(1, four, 96, 4, 16, 128, 128, dtype),
    "ss2d": problems.ss2d(1, four, 96, 4, 1, 256, 128, dtype),
}
x, feats = calls["ss2d"]["x"], calls["ss2d"]["feats"]
if kind == "torch":  # slow
    calls = {name: calls[name] for name in ("selective_scan", "shared_scan", "ss2d")}
calls["ss2d"] |= {"x": x.to(memory_format=torch.channels_last), "feats": feats.movedim(2, 4).contiguous().movedim(4, 2)}
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
for name, arguments in calls.items():
    with torch.inference_mode():
        getattr(ops, name.split(",")[0])(**arguments)  # compiles, and keeps the table of the directions
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = status("VmRSS")
        out = getattr(ops, name.split(",")[0])(**arguments)
        grown = status("VmHWM") - before
    given = sum(x.nbytes for x in arguments.values() if torch.is_tensor(x))
    print(f"{name}: {(given + grown) / (given + out.nbytes)}")
    del out
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures with Linux' /proc")
@pytest.mark.parametrize("kind, dtype", [("numba", "float32"), ("numba", "bfloat16"), ("torch", "float32")])
def test_memory_of_the_process(kind, dtype):
    """Inputs, output and all that is allocated meanwhile are at most twice the inputs and the output, mostly far less."""
    bounds = {"selective_scan": 2.0, "shared_scan": 2.0, "ss2d": 2.0}
    # What is freed goes back to the system, so that nothing is hidden in memory that was used before. (The PyTorch code
    # has work space of a fixed size, which it would wait for again and again.)
    environment = {}
    if kind == "numba":
        need_numba()
        bounds = {"shared_scan2d": 1.8, "shared_scan2d, one channel": 1.75, "ss2d": 1.6, "ss2d, rows": 1.8}
        bounds |= dict.fromkeys(("selective_scan", "linear_scan", "shared_scan", "broadcast_add"), 1.2)
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    code = MEMORY.replace("sys.argv[1]", repr(kind)).replace("sys.argv[2]", repr(dtype))
    report = in_process(code, **environment)
    peaks = {name: float(peak) for name, peak in (line.split(": ") for line in report.splitlines())}
    assert peaks.keys() == bounds.keys() and all(peaks[name] <= bounds[name] for name in peaks), peaks


BACKWARD = """
import sys, torch, vmeanba_fx
from tests.ops import problems
torch.set_num_threads(2)
arguments = problems.ss2d(8, [0, 1, 2, 3], 96, 6, 1, 56, 56, getattr(torch, sys.argv[2]))
x = arguments["x"]
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
def run(maps):
    given = {name: t[:maps] if name in ("x", "feats") else t for name, t in arguments.items()}
    given = [grad[:maps], *(given[name] for name in ("x", "feats", "dt_weight", "A", "D", "delta_bias"))]
    return given, torch.ops.vmeanba_fx.ss2d_backward.default(*given, [0, 1, 2, 3], None, True)
with torch.inference_mode():
    grad = torch.ones_like(x)
    run(1)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    given, made = run(8)
    grown = status("VmHWM") - before
given, made = (sum(t.nbytes for t in tensors) for tensors in (given, made))
print((given + grown) / (given + made))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures with Linux' /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_backward(dtype):
    """Of ss2d at the first stage of VMamba-T, eight images of 224 px: inputs, gradients and what is allocated meanwhile."""
    peak = float(in_process(BACKWARD.replace("sys.argv[2]", repr(dtype)), MALLOC_MMAP_THRESHOLD_="65536"))
    assert peak <= 2.0


RUN = """
import sys, torch, vmeanba_fx
from tests.ops import problems, test_cpu_kernels
from vmeanba_fx import ops
from vmeanba_fx.ops import cpu_jit
test_cpu_kernels.check("shared_scan", problems.shared_scan(2, 4, 3, 16, 300, torch.float32))
"""


ALL = """
for name, arguments in test_cpu_kernels.large().items():
    test_cpu_kernels.check(name, arguments)
"""


def test_nothing_is_used_after_it_is_freed():
    """The C library takes the pages away from what is freed, so that its use ends the process."""
    need_numba()
    in_process(RUN + "torch.set_num_threads(2)" + ALL, MALLOC_MMAP_THRESHOLD_="4096")


def test_without_numba():
    in_process(f"import sys; sys.modules['numba'] = None\n{RUN}\nassert cpu_jit._kernels() is None")


def test_nowhere_to_keep_compiled_kernels():
    need_numba()
    code = "from numba.core.caching import FunctionCache\nFunctionCache._impl_class._locator_classes = []"
    in_process(f"{code}\n{RUN}\nassert cpu_jit._kernels() is not None")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_forked_process(tmp_path):
    """Its parent's threads do not exist there. (Small tensors: PyTorch's operations hang where they would use them.)"""
    need_numba()
    code = """
torch.set_num_threads(2)
cases = {name: a for name, a in test_cpu_kernels.large().items() if name in ("shared_scan", "ss2d")}
expected = {name: getattr(ops, name)(**a) for name, a in cases.items()}
process = __import__("os").fork()
right = all(torch.equal(getattr(ops, name)(**a), expected[name]) for name, a in cases.items())
if process == 0:
    __import__("os")._exit(0 if right else 1)
assert __import__("os").waitpid(process, 0)[1] == 0 and right
"""
    (tmp_path / "file").touch()  # nor can a cache folder be made in it: Numba takes another one
    in_process(RUN + code, NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache"))


def test_nothing_to_scan(implementation):
    for channels, states in ((0, 2), (3, 0)):
        out = ops.linear_scan(**problems.linear_scan(2, 2, channels, states, 5, torch.float32))
        assert out.shape == (2, 2, channels, 5) and not out.any()
