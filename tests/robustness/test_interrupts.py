"""Kill -9 during a calibration, a full disk, a read-only folder: the plan comes out the same, old files stay whole."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vmeanba_fx
from tests import zoo
from vmeanba_fx import Plan, calibrate, files

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = 20

# Runs in a process of its own that has one thread and forks: a child calibrates and is killed, another goes on.
WORKER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import vmeanba_fx
from tests import zoo
from vmeanba_fx import files

folder, moments = sys.argv[1], int(sys.argv[2])
model = vmeanba_fx.capture(zoo.live(3, directions=1, state=1), zoo.images(2))
loader = zoo.labelled(6, 3)
state, out = f"{folder}/state.json", f"{folder}/plan.json"


def work():
    vmeanba_fx.calibrate(model, loader, metric="loss", resume=state).save(out)


def child(prepare=lambda: None):
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


def finish(pid):
    return os.waitpid(pid, 0)[1]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_event(count, half):
    # Die at the count-th write or rename: before it, or with half of the text written.
    left = [count]
    replace, fdopen = os.replace, os.fdopen

    def dying_replace(*args):
        left[0] -= 1
        if left[0] == 0:
            if half:
                replace(*args)
            die()
        return replace(*args)

    class File:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, text):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    self.file.write(text[: len(text) // 2])
                    self.file.flush()
                die()
            return self.file.write(text)

    def prepare():
        files.os.replace = dying_replace
        files.os.fdopen = lambda *args, **kwargs: File(fdopen(*args, **kwargs))

    return prepare


def clear():
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")


start = time.perf_counter()
assert finish(child()) == 0
whole = time.perf_counter() - start
expected = open(out, "rb").read()
generator = random.Random(7)
killed = 0
for moment in range(moments):
    clear()
    if moment % 2:
        pid = child(at_event(generator.randint(1, 14), generator.random() < 0.5))
    else:
        pid = child()
        time.sleep(generator.uniform(0.02, 0.95) * whole)
        os.kill(pid, signal.SIGKILL)
    status = finish(pid)
    killed += os.WIFSIGNALED(status)
    seen = os.path.exists(state)
    assert finish(child()) == 0, "the run that resumes failed"
    found = open(out, "rb").read()
    print(moment, "killed" if os.WIFSIGNALED(status) else "was faster", "with a state" if seen else "without one", flush=True)
    assert found == expected, f"moment {moment}: another plan"
print("killed", killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    """Half of the kills come from outside at a random time, half are in the middle of a write or a rename."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", WORKER, str(tmp_path), str(MOMENTS)]
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stdout + said.stderr[-2000:]
    killed = int(said.stdout.split("killed")[-1])
    assert killed >= MOMENTS * 0.7, said.stdout
    assert "with a state" in said.stdout and "without one" in said.stdout


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured():
    return vmeanba_fx.capture(zoo.live(1, directions=1, state=1), zoo.images(2))


def full(path, monkeypatch, number, after=100):
    """A disk that takes ``after`` characters of any file in the folder of ``path`` and then fails."""
    fdopen = os.fdopen

    class File:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def write(self, text):
            self.file.write(text[:after])
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fdopen", lambda *args, **kwargs: File(fdopen(*args, **kwargs)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk(captured, tmp_path, monkeypatch, number):
    loader = zoo.labelled(2, 3)
    plan = calibrate(captured, loader[:1], metric="loss", resume=tmp_path / "state.json")
    plan.save(tmp_path / "plan.json")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    full(tmp_path, monkeypatch, number)
    for run in (
        lambda: plan.save(tmp_path / "plan.json"),
        lambda: calibrate(captured, loader, metric="loss", resume=tmp_path / "state.json"),
    ):
        with pytest.raises(OSError, match=f"cannot write {tmp_path}.*{os.strerror(number)}") as error:
            run()
        assert error.value.errno == number
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.undo()
    assert Plan.load(tmp_path / "plan.json") == plan
    assert calibrate(captured, loader, metric="loss", resume=tmp_path / "state.json").samples == 6


def test_files_that_may_not_grow(tmp_path):
    """The same from the kernel: RLIMIT_FSIZE."""
    (tmp_path / "plan.json").write_text("the old file")
    code = f"""
import resource, signal
from vmeanba_fx.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_atomically({str(tmp_path / "plan.json")!r}, "x" * 100000)
except OSError as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-B", "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert "cannot write" in said.stdout and os.strerror(errno.EFBIG) in said.stdout
    assert (tmp_path / "plan.json").read_text() == "the old file" and len(list(tmp_path.iterdir())) == 1


def test_a_read_only_file_system(captured, tmp_path, monkeypatch):
    plan = calibrate(captured, zoo.labelled(1, 3), metric="loss")
    (tmp_path / "plan.json").write_text(json.dumps("the old file"))
    before = (tmp_path / "plan.json").read_bytes()
    os_open = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return os_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(files.os, "open", read_only)
    with pytest.raises(OSError, match=f"cannot write {tmp_path}.*Read-only file system"):
        plan.save(tmp_path / "plan.json")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}.*Read-only file system"):
        calibrate(captured, zoo.labelled(1, 3), metric="loss", resume=tmp_path / "state.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"] and (tmp_path / "plan.json").read_bytes() == before
