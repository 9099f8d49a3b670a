"""``python -m tests.robustness.killed FOLDER MOMENTS``: calibrations that are killed, and others that go on from there.

A process of its own, with one thread, because it forks: a child calibrates and is killed, another resumes; its plan must be
that of a run nobody killed.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vmeanba_fx
from tests import zoo
from tests.robustness.disks import watched
from vmeanba_fx import files


def child(work: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> int:
    """The process id of a child that does ``work``; its exit code tells whether it came to an end."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            work()
            os._exit(0)
        except BaseException as error:
            print("child failed:", repr(error), flush=True)
            os._exit(1)
    return pid


def at_event(count: int, half: bool) -> Callable[[], None]:
    """Die at the count-th write or rename: before it, or with half of the text written."""
    left = count
    replace, fdopen = os.replace, os.fdopen

    def come_to(last_act: Callable[[], object]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if half:
                last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(*args):
        come_to(lambda: replace(*args))
        return replace(*args)

    def dying_write(file, text):
        come_to(lambda: (file.write(text[: len(text) // 2]), file.flush()))
        return file.write(text)

    def prepare() -> None:
        files.os.replace = dying_replace
        files.os.fdopen = watched(fdopen, dying_write)

    return prepare


def main(folder: Path, moments: int) -> None:
    """Print one line for every moment and then how many runs were killed."""
    torch.set_num_threads(1)
    model = vmeanba_fx.capture(zoo.live(3, directions=1, state=1), zoo.images(2))
    loader = zoo.labelled(6, 3)
    state, out = folder / "state.json", folder / "plan.json"

    def work() -> None:
        vmeanba_fx.calibrate(model, loader, metric="loss", resume=state).save(out)

    def finish(pid: int) -> int:
        return os.waitpid(pid, 0)[1]

    start = time.perf_counter()
    assert finish(child(work)) == 0
    whole = time.perf_counter() - start
    expected = out.read_bytes()
    generator = random.Random(7)
    killed = 0
    for moment in range(moments):
        for path in folder.iterdir():
            path.unlink()
        if moment % 2:
            pid = child(work, at_event(generator.randint(1, 14), generator.random() < 0.5))
        else:
            pid = child(work)
            time.sleep(generator.uniform(0.02, 0.95) * whole)
            os.kill(pid, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(finish(pid))
        killed += was_killed
        seen = state.exists()
        assert finish(child(work)) == 0, "the run that resumes failed"
        print(moment, "killed" if was_killed else "was faster", "with a state" if seen else "without one", flush=True)
        assert out.read_bytes() == expected, f"moment {moment}: another plan"
    print("killed", killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
