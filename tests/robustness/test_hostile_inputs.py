"""Calibration states, checkpoints and data made to do harm: refused within a second, nothing executed, nothing large allocated.

Damaged checkpoints are in ``tests/models/test_checkpoints.py``.
"""

import gzip
import json
import pickle
import random
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

import vmeanba_fx
from tests import zoo
from tests.robustness.hostile import SECONDS, packed, pickled
from vmeanba_fx import PlanError
from vmeanba_fx.cli.arguments import CommandError, DataSpec
from vmeanba_fx.models import VSSM
from vmeanba_fx.models.checkpoints import CheckpointError, load_checkpoint

pytestmark = pytest.mark.usefixtures("own_objects_only")

# -- calibration states -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """(captured model, loader, text of the state after all batches)."""
    path = tmp_path_factory.mktemp("state") / "state.json"
    gm = vmeanba_fx.capture(zoo.live(2, directions=1, state=1), zoo.images(2))
    loader = zoo.labelled(2, 3)
    vmeanba_fx.calibrate(gm, loader, metric="loss", resume=path)
    return gm, loader, path.read_text()


def replaced_values(content, value):
    """Every variant of a JSON value with one of the values in it replaced."""
    if isinstance(content, dict):
        for key, item in content.items():
            yield content | {key: value}
            yield from (content | {key: inner} for inner in replaced_values(item, value))
    elif isinstance(content, list) and content:
        yield [value, *content[1:]]


def test_states_of_wrong_types_and_sizes(state, tmp_path):
    """Whatever stands in it, a state is refused with a sentence, or it gives the plan it should."""
    gm, loader, text = state
    path = tmp_path / "state.json"
    expected = vmeanba_fx.calibrate(gm, loader, metric="loss").to_dict()
    outcomes = {"refused": 0, "harmless": 0}
    variants = [v for value in ("x", None, -1, [], {}, 1e308) for v in replaced_values(json.loads(text), value)]
    for variant in random.Random(0).sample(variants, min(60, len(variants))):
        path.write_text(json.dumps(variant))
        before = path.read_bytes()
        try:
            found = vmeanba_fx.calibrate(gm, loader, metric="loss", resume=path)
        except PlanError as error:
            assert str(path) in str(error) and len(str(error)) < 500
            assert path.read_bytes() == before
            outcomes["refused"] += 1
        else:
            assert set(found.to_dict()) == set(expected)
            outcomes["harmless"] += 1
    assert outcomes["refused"] > 20, outcomes
    for cut in (1, len(text) // 2, len(text) - 1):
        path.write_text(text[:cut])
        with pytest.raises(PlanError, match="damaged"):
            vmeanba_fx.calibrate(gm, loader, metric="loss", resume=path)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def small():
    return VSSM(depths=[1], dims=8, in_chans=1, num_classes=2, imgsize=32, ssm_d_state=1)


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
CHECKPOINTS = {
    "header longer than the file": ("a.safetensors", safetensors(b"{}", length=2**62)),
    "header of 100 MB": ("a.safetensors", safetensors(b"{}", b" " * 10**6, length=10**8)),
    "tensor beyond the file": (
        "a.safetensors", safetensors({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    ),
    "offsets that run backwards": (
        "a.safetensors", safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"abcd")
    ),
    "nested header": ("a.safetensors", safetensors(b'{"x":' * 10**5)),
    "pickle": ("a.pt", None),
    "pickle with another name": ("a.safetensors", None),
    "pickle, old protocol": ("a.pth", b"cos\nsystem\n(S'true'\ntR."),
    "deep pickle": ("a.pt", b"\x80\x02" + b"(" * 10**5 + b"."),
    "header without end": ("a.safetensors", safetensors({f"x{i}": EMPTY for i in range(20_000)})),
    "pickle without end": ("a.pt", packed({"a/data.pkl": b"\x80\x02]" + b"K\x01a" * 400_000 + b".", "a/version": b"3"})),
    "pickle without end, old format": ("a.pt", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02]" + b"K\x01a" * 400_000),
    "zip without a pickle": ("a.pt", packed({"a/x": b"1"})),
    "zip that climbs": ("a.pt", packed({"../../a/data.pkl": b"\x80\x02}."})),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoints(name, tmp_path):
    file, content = CHECKPOINTS[name]
    path = tmp_path / file
    path.write_bytes(pickled(tmp_path / "harm") if content is None else content)
    model = small()
    before = sorted(tmp_path.iterdir())
    start = time.process_time()
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(model, path)
    assert time.process_time() - start < SECONDS and sorted(tmp_path.iterdir()) == before


# -- data -------------------------------------------------------------------------------------------------------------


def zeros_in(path, name, kind, shape):
    """A .npz file with ``shape`` zeros, which compress to a thousandth, and as many bytes that do not."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": kind, "fortran_order": False, "shape": shape})
            for _ in range(160):
                member.write(bytes(2**20))
            member.write(random.Random(0).randbytes(2 * 2**20))


def idx(*shape):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)


def gzipped(path, head):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(160):
            file.write(bytes(2**20))


DATA = {
    "bytes for images": ("a.npz", lambda p: zeros_in(p, "images.npy", "|u1", (162 * 2**20,)), "images are torch.uint8"),
    "more labels than images": (
        "a.npz", lambda p: (zeros_in(p, "images.npy", "<f4", (162, 2**18)), add_labels(p)), "expected one class number"
    ),
    "arrays without end": ("a.npz", lambda p: p.write_bytes(b"PK\x01\x02" * 200_000 + packed({"x": b""})), "1,000 arrays"),
    "header without end": (
        "a.safetensors", lambda p: p.write_bytes(safetensors({f"x{i}": EMPTY for i in range(20_000)})), "more than 1 MiB"
    ),
    "more than the header says": ("fashion", lambda p: gzipped(p, idx(5, 28, 28)), "the file has more"),
    "more than the data set has": ("fashion", lambda p: gzipped(p, idx(2**20, 28, 28)), "no file of the data set"),
}  # fmt: skip


def add_labels(path):
    with zipfile.ZipFile(path, "a") as archive:
        with archive.open("labels.npy", "w") as member:
            np.save(member, np.zeros(3, int))


@pytest.mark.parametrize("name", DATA)
def test_hostile_data(name, tmp_path):
    """Refused by what the file says of itself: nothing large is unpacked."""
    file, write, message = DATA[name]
    path = tmp_path / ("train-images-idx3-ubyte.gz" if file == "fashion" else file)
    write(path)
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(CommandError, match=message):
        DataSpec.parse(f"fashion-mnist:{tmp_path}" if file == "fashion" else str(path)).loader(
            batch=2, size=None, seed=0, batches=None, like=small()
        )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < SECONDS and peak < 50 * 2**20
