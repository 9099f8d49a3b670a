"""Many transforms in one process: memory stays, and every function and class of the model is as it was.

CI runs a short form. The long one, in about six minutes of one core:

    VMEANBA_TRANSFORMS=500 nice python -m pytest tests/robustness/test_long_run.py -s
"""

import ctypes
import gc
import json
import linecache
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx import graph_module

import vmeanba_fx
from tests import zoo
from vmeanba_fx.capturing.confinement import forget_sizes
from vmeanba_fx.graph import copy_graph

COUNT = int(os.environ.get("VMEANBA_TRANSFORMS", "16"))
ROOT = Path(__file__).resolve().parents[2]
# PyTorch's caches still fill up in the short form; a trace that stays takes 3,600 objects and 1.2 MB. Some wait in PyTorch's
# caches for the next capture to empty them (a dozen for a while), so these are emptied and the least of many moments counts.
OBJECTS_PER_RUN, BYTES_PER_RUN = (5, 5_000) if COUNT >= 200 else (1500, 1_000_000)


def resident():
    """Bytes of this process in memory; what the C library merely keeps for later is given back first."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def patched_places():
    """What captures exchange for their time: code, defaults, methods, functions of torch."""
    functions = (zoo.selective_scan_fn, zoo.vmamba_scan_fn, zoo.call_s1, zoo.loop_scan)
    return [
        *((f.__code__, f.__defaults__, f.__kwdefaults__, sorted(f.__dict__)) for f in functions),
        zoo.ScanFunction.__dict__["forward"], zoo.SS2D.__dict__["forward"], torch.cuda.device,
        torch.nn.Module.__call__, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
        [name for name in ("selective_scan_cuda", "selective_scan_cuda_core") if name in sys.modules],
    ]  # fmt: skip


def run(count, warm):
    """``count`` transforms; prints what grew after the first ``warm``, in which PyTorch's own caches fill up.

    Compared are the least values of an early and of a late half, so a steady growth counts half.
    """
    step = max(4, count // 40 // 4 * 4)
    calls = (zoo.call_s1, lambda u, delta, A, B, C, D, bias: zoo.ScanFunction.apply(u, delta, A, B, C, D, bias, True))
    models = [zoo.tiny(1, directions=1, state=1, call=call) for call in calls]
    x = zoo.images(2)
    before, expected = patched_places(), [model(x) for model in models]
    marks, sources = [], []
    for index in range(count):
        gm = vmeanba_fx.transform(models[index % 2], [x], **({"k": 0} if index % 4 < 2 else {"sites": "*"}))
        gm(x)
        del gm
        assert patched_places() == before, f"after transform {index} something is still patched"
        if index + 1 >= warm and (index + 1 - warm) % step == 0:
            forget_sizes()
            gc.collect()
            marks.append((resident(), len(gc.get_objects())))
            sources.append(len(graph_module._loader.eval_cache))
    assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    assert len(set(sources)) == 1 and sources[0] <= 2, "torch.fx still keeps sources of graphs that are gone"
    middle = len(marks) // 2
    early, late = ([min(values) for values in zip(*half, strict=True)] for half in (marks[:middle], marks[middle:]))
    print(json.dumps({
        "transforms": count - warm, "bytes": (late[0] - early[0]) / (count - warm),
        "objects": (late[1] - early[1]) / (count - warm), "resident": [early[0], late[0]],
    }))  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
def test_memory_stays_and_nothing_is_left_patched():
    code = f"from tests.robustness.test_long_run import run; run({COUNT}, {max(8, COUNT // 10 // 4 * 4)})"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-B", "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout.splitlines()[-1])
    print(found)
    assert found["objects"] <= OBJECTS_PER_RUN
    assert found["bytes"] <= BYTES_PER_RUN


def test_a_graph_keeps_its_source_as_long_as_it_lives():
    gm = vmeanba_fx.transform(zoo.tiny(1, directions=1, state=1), [zoo.images(2)], k=0)
    name = gm.forward.__code__.co_filename
    assert "def forward" in "".join(linecache.getlines(name))
    alive = copy_graph(gm)  # outside of our calls: torch.fx keeps its source
    assert "cache" not in vars(graph_module._loader)
    del gm
    gc.collect()
    assert not linecache.getlines(name) and linecache.getlines(alive.forward.__code__.co_filename)
