"""The official vmamba.py for the tests, which compare with it where VMEANBA_OFFICIAL_VMAMBA says where it is."""

import os
import types
from pathlib import Path

import pytest

from benchmarks import official

VARIABLE = "VMEANBA_OFFICIAL_VMAMBA"


def load_official() -> types.ModuleType:
    """The official module, or a skipped test that says how to get it."""
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"set {VARIABLE} to the path of vmamba.py from github.com/MzeroMiko/VMamba to compare with it")
    if not Path(path).is_file():
        pytest.fail(f"{VARIABLE}: no such file: {path}")
    return official.load_official(path, triton=False)
