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
from tests.robustness.disks import watched
from vmeanba_fx import Plan, calibrate, files

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path):
    """Half of the kills come from outside at a random time, half are in the middle of a write or a rename."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "tests.robustness.killed", str(tmp_path), str(MOMENTS)]
    said = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stdout + said.stderr[-2000:]
    killed = int(said.stdout.split("killed")[-1])
    assert killed >= MOMENTS * 0.7, said.stdout
    assert "with a state" in said.stdout and "without one" in said.stdout


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured():
    return vmeanba_fx.capture(zoo.live(1, directions=1, state=1), zoo.images(2))


def fill(monkeypatch, number, after=100):
    """Make the disk take ``after`` characters of any file and then fail."""

    def write(file, text):
        file.write(text[:after])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fdopen", watched(os.fdopen, write))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk(captured, tmp_path, monkeypatch, number):
    loader = zoo.labelled(2, 3)
    plan = calibrate(captured, loader[:1], metric="loss", resume=tmp_path / "state.json")
    plan.save(tmp_path / "plan.json")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fill(monkeypatch, number)
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
