"""Many transforms in one process: memory stays, and every function and class of the model is as it was.

CI runs a short form. The long one, in about ten minutes of one core:

    VMEANBA_TRANSFORMS=500 nice python -m pytest tests/robustness/test_long_run.py -s
"""

import gc
import logging
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import vmeanba_fx
from tests import zoo

COUNT = int(os.environ.get("VMEANBA_TRANSFORMS", "24"))
WARM = max(8, COUNT // 5)  # PyTorch's own caches fill up first
OBJECTS_PER_RUN, BYTES_PER_RUN = 40, 150_000


def resident():
    """Bytes of this process in memory."""
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


@pytest.fixture
def no_logs():
    """Otherwise pytest keeps what PyTorch logs about every trace."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")
def test_memory_stays_and_nothing_is_left_patched(no_logs):
    calls = (zoo.call_s1, lambda u, delta, A, B, C, D, bias: zoo.ScanFunction.apply(u, delta, A, B, C, D, bias, True))
    models = [zoo.tiny(1, directions=1, state=1, call=call) for call in calls]
    x = zoo.images(2)
    before, expected = patched_places(), [model(x) for model in models]
    marks = []
    for run in range(COUNT):
        gm = vmeanba_fx.transform(models[run % 2], [x], **({"k": 0} if run % 3 else {"sites": "*"}))
        gm(x)
        del gm
        assert patched_places() == before, f"after transform {run} something is still patched"
        if run in (WARM - 1, COUNT - 1):
            gc.collect()
            marks.append((resident(), len(gc.get_objects()), Counter(type(o).__name__ for o in gc.get_objects())))
    assert all(torch.equal(model(x), y) for model, y in zip(models, expected, strict=True))
    (bytes_then, objects_then, kinds_then), (bytes_now, objects_now, kinds_now) = marks
    runs = COUNT - WARM
    grown = (kinds_now - kinds_then).most_common(8)
    print(
        f"{runs} transforms: {(bytes_now - bytes_then) / runs:,.0f} bytes and {(objects_now - objects_then) / runs:.1f} "
        f"objects each; resident {bytes_then / 2**20:.0f} -> {bytes_now / 2**20:.0f} MiB; {grown}"
    )
    assert (objects_now - objects_then) / runs <= OBJECTS_PER_RUN, grown
    assert (bytes_now - bytes_then) / runs <= BYTES_PER_RUN
