"""Files made to do harm: refused within a second, nothing in them executed, nothing large allocated.

Here are programs (``.pt2``). Calibration states, checkpoints and data are in ``test_hostile_inputs.py``, plans in
``tests/test_plan.py``.
"""

import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch

import vmeanba_fx
from tests import zoo
from tests.helpers import relative_error
from tests.robustness.hostile import SECONDS, Harm, packed, pickled, records
from vmeanba_fx import ExportError, load

pytestmark = pytest.mark.usefixtures("own_objects_only")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(bytes of a whole .pt2 file, its graph)."""
    path = tmp_path_factory.mktemp("good") / "model.pt2"
    gm = vmeanba_fx.transform(zoo.live(1, directions=1, state=1), [zoo.images(2)], sites="*")
    vmeanba_fx.export(gm, None, path)
    return path.read_bytes(), gm


def refused(content, tmp_path, match=""):
    """That ``load`` refuses ``content`` with one sentence, within a second, with little memory."""
    path = tmp_path / "hostile.pt2"
    path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    start = time.process_time()
    with pytest.raises(ExportError, match=match) as error:
        load(path)
    assert time.process_time() - start < SECONDS
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
    assert sorted(tmp_path.iterdir()) == before, "something in the file was executed"


def graph_with(content, change):
    """The file with ``change(model, files)`` made to its graph."""
    files = records(content)
    name = next(n for n in files if n.endswith("models/model.json"))
    model = json.loads(files[name])
    change(model, files)
    files[name] = json.dumps(model).encode()
    return packed(files)


def test_the_file_itself_is_fine(good, tmp_path):
    (tmp_path / "good.pt2").write_bytes(packed(records(good[0])))
    x = zoo.images(3)
    with torch.no_grad():
        assert relative_error(load(tmp_path / "good.pt2")(x), good[1](x)) < 1e-5


# -- code -------------------------------------------------------------------------------------------------------------


def code(marker):
    return f"__import__('os').mkdir({str(marker)!r})"


def first_symbol(model):
    """Where the batch size is written as an expression."""
    for value in model["graph_module"]["graph"]["tensor_values"].values():
        for size in value["sizes"]:
            if "as_expr" in size:
                return size["as_expr"]
    raise AssertionError


def expression(text):
    return lambda model, marker: first_symbol(model).update(expr_str=text.replace("CODE", code(marker)))


def guard(text):
    return lambda model, marker: model.update(guards_code=[text.replace("CODE", code(marker))])


def spec(kind, context):
    def change(model, marker):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        tree = json.loads(signature["in_spec"])
        tree[1]["children_spec"][1].update(type=kind, context=context)
        signature["in_spec"] = json.dumps(tree)

    return change


def rename_input(text):
    def change(model, marker):
        found = json.dumps(model).replace('"name": "x"', f'"name": {json.dumps(text.replace("CODE", code(marker)))}')
        model.clear()
        model.update(json.loads(found))

    return change


def target(text):
    return lambda model, marker: model["graph_module"]["graph"]["nodes"][0].update(target=text)


CODE = {
    "size": (expression("CODE"), "expression"),
    "size, hidden in a call": (expression("Symbol('s77', positive=CODE)"), "expression"),
    "size, attribute": (expression("Symbol('s77').__class__.__mro__"), "expression"),
    "size, power": (expression("9**9**9**9"), "expression"),
    "size, long": (expression("+".join(["1"] * 10**5)), "expression"),
    "size, deep": (expression("-" * 3000 + "1"), "expression|cannot be loaded"),
    "guard": (guard("CODE"), "expression"),
    "guard, as a method": (guard("L['x'].size().__class__(CODE)"), "expression"),
    "guard that ends its string": (guard("L['x'].size()[0] != '\"), CODE, (\"'"), "expression"),
    "guard, lambda": (guard("(lambda: CODE)()"), "expression"),
    "inputs, enumeration": (spec("builtins.dict", json.dumps([{"__enum__": True, "fqn": "os:x", "name": "y"}])), "inputs"),
    "inputs, other type": (spec("collections.namedtuple", "[]"), "inputs"),
    "name of an input": (rename_input("x=CODE"), "the name"),
    "name of an input, statement": (rename_input("x):\n    CODE\n    return (x"), "the name"),
    "another function": (target("torch.hub.load"), "no operator"),
    "file access": (target("torch.ops.aten.from_file.default"), "no operator"),
    "another library": (target("torch.ops.evil.run.default"), "no operator"),
    "attribute walk": (target("_operator.__class__.mro"), "no operator"),
}  # fmt: skip


@pytest.mark.parametrize("name", CODE)
def test_code_in_the_graph(good, tmp_path, name):
    change, match = CODE[name]
    refused(graph_with(good[0], lambda model, _: change(model, tmp_path / "harm")), tmp_path, match)


def test_pytorch_itself_would_run_it(good, tmp_path):
    """Otherwise the tests above would test nothing."""
    ran = []
    for name in ("size", "guard"):
        change, _ = CODE[name]
        path = tmp_path / "hostile.pt2"
        path.write_bytes(graph_with(good[0], lambda model, _, change=change: change(model, tmp_path / "harm")))
        try:
            torch.export.load(path).module()
        except Exception:
            pass
        if (tmp_path / "harm").exists():
            ran.append(name)
            (tmp_path / "harm").rmdir()
    if not ran:
        pytest.skip(f"torch {torch.__version__} no longer evaluates what is in its files")


def payload(kind, **change):
    """The first payload of ``kind`` described otherwise."""

    def run(files, marker):
        name = next(n for n in files if n.endswith(f"data/{kind}/model_{kind}_config.json"))
        config = json.loads(files[name])
        entry = next(iter(config["config"].values()), None)
        if entry is None:
            entry = config["config"]["x"] = {"is_param": False, "use_pickle": False, "tensor_meta": {"sizes": []}}
        entry.update(change)
        files[name] = json.dumps(config).encode()
        files[name.replace(f"model_{kind}_config.json", "custom_obj_0")] = pickle.dumps(Harm(marker))

    return run


def add(name, data):
    def run(files, marker):
        folder = next(iter(files)).partition("/")[0]
        files[name.replace("ROOT", folder)] = data(marker) if callable(data) else data

    return run


def report(**change):
    """The report changed."""

    def run(files, marker):
        name = next(n for n in files if n.endswith("extra/report.json"))
        files[name] = json.dumps(json.loads(files[name]) | change).encode()

    return run


FILES = {
    "pickle for inputs": (add("ROOT/data/sample_inputs/model.pt", pickled), "Python objects"),
    "pickle for inputs, plain": (add("ROOT/data/sample_inputs/model.pt", lambda m: pickle.dumps(Harm(m))), "Python objects"),
    "pickle for weights": (add("ROOT/data/weights/model.pt", pickled), "Python objects"),
    "weight that is a pickle": (payload("weights", use_pickle=True), "Python object|a record"),
    "constant that is a pickle": (payload("constants", path_name="opaque_obj_0"), "said to be in|a record"),
    "object of C++": (payload("constants", path_name="custom_obj_0"), "said to be in|a record"),
    "weight outside of the file": (payload("weights", path_name="../../../etc/passwd"), "said to be in|a record"),
    "absolute name": (add("/etc/cron.d/harm", b"x"), "a record"),
    "name that climbs": (add("ROOT/../../harm", b"x"), "a record"),
    "name that climbs, extra": (add("ROOT/extra/../../harm", b"x"), "a record"),
    "machine code": (add("ROOT/data/aotinductor/model/x.so", b"\x7fELF"), "machine code"),
    "machine code of a second model": (add("ROOT/data/aotinductor/../x.so", b"\x7fELF"), "machine code"),
    "second model": (add("ROOT/models/other.json", b"{}"), "a record"),
    "second folder": (add("other/extra/x", b"{}"), "several folders|readable"),
    "old format": (add("serialized_state_dict.pt", pickled), "a record"),
    "report of another kind": (add("ROOT/extra/report.json", b'{"chosen": 1}'), "a report whose chosen is 1"),
    "report that clears the screen": (report(table="\x1b[2J"), "a report whose table is"),
    "report of a metric without end": (report(metric="x" * 10**6), "a report whose metric is"),
    "report of more than any number has": (report(flops_before=10**4000), "a report whose flops_before is"),
    "report of less than nothing": (report(flops_after=-1), "a report whose flops_after is -1"),
    "report of a flag": (report(base=True), "a report whose base is True"),
    "report of infinite impacts": (report(impacts={"a": 1e999}), "not a number"),
    "report of impacts that are lists": (report(impacts={"a": [1]}), "a report whose impacts"),
    "report of sites that are objects": (report(chosen=[{}]), "a report whose chosen"),
    "report of passes that are none": (report(passes=[None]), "a report whose passes"),
    "report of reasons in a list": (report(unfused=["a"]), "a report whose unfused"),
    "report of ranks in a list": (report(ranks=[1]), "a report whose ranks"),
    "report of another speed": (report(speed={"asked": 1}), "a report whose speed"),
    "record with a hidden name": (add("ROOT/extra/\u202eplan.json", b"{}"), "a record"),
    "report that is nested": (add("ROOT/extra/report.json", b"[" * 10**5), "nested more than 32 deep"),
    "plan that is none": (add("ROOT/extra/plan.json", b'{"format": "x"}'), "not a valid plan"),
    "extra file that is large": (add("ROOT/extra/plan.json", b" " * (5 * 2**20)), "larger than 4 MiB"),
    "extra file that is binary": (add("ROOT/extra/plan.json", b"\xff\xfe"), "readable"),
    "graph that is nested": (add("ROOT/models/model.json", b"[" * 10**6), "nested|readable"),
    "graph that is nested objects": (add("ROOT/models/model.json", b'{"a":' * 900 + b"1" + b"}" * 900), "nested"),
    "graph that is a list": (add("ROOT/models/model.json", b"[]"), "not an object"),
    "graph that is empty": (add("ROOT/models/model.json", b"{}"), "cannot be loaded"),
    "graph that is huge": (add("ROOT/models/model.json", b" " * (65 * 2**20)), "larger than 64 MiB"),
    "weights that are numbers": (add("ROOT/data/weights/model_weights_config.json", b'{"config": {"x": 1}}'), "readable"),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_records(good, tmp_path, name):
    change, match = FILES[name]
    files = records(good[0])
    change(files, tmp_path / "harm")
    refused(packed(files), tmp_path, match)


def test_weights_that_would_fill_the_memory(good, tmp_path):
    """A shape of 2^40 elements with no data behind it, which torch would allocate."""
    files = records(good[0])
    name = next(n for n in files if n.endswith("model_weights_config.json"))
    config = json.loads(files[name])
    entry = next(iter(config["config"].values()))
    entry["tensor_meta"]["sizes"] = [{"as_int": 2**20}, {"as_int": 2**19}]
    files[name] = json.dumps(config).encode()
    files[name.replace("model_weights_config.json", entry["path_name"])] = b""
    tracemalloc.start()
    refused(packed(files), tmp_path, "a shape but no data")
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def test_zip_bombs(good, tmp_path):
    files = records(good[0])
    files[next(n for n in files if n.endswith("weight_0"))] = bytes(2**26)
    refused(packed(files, zipfile.ZIP_DEFLATED), tmp_path, "is compressed")
    # A table of contents that promises more than the file has.
    content = bytearray(packed(records(good[0])))
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    refused(bytes(content), tmp_path, "")


def test_records_without_end(tmp_path):
    refused(b"PK\x01\x02" * 200_000 + packed({"a/x": b""}), tmp_path, "more than 100,000 records")


def test_what_is_no_plain_file(tmp_path):
    """Nothing is read of devices, pipes, folders, and of large files that are no archives."""
    (tmp_path / "zero.pt2").symlink_to("/dev/zero")
    (tmp_path / "folder.pt2").mkdir()
    os.mkfifo(tmp_path / "pipe.pt2")
    with open(tmp_path / "sparse.pt2", "wb") as file:
        file.truncate(2**40)
    for name in ("zero", "folder", "pipe", "sparse"):
        with pytest.raises(ExportError, match=f"{name}.pt2: it is no {'readable' if name == 'sparse' else 'plain'}"):
            load(tmp_path / f"{name}.pt2")


def test_truncated_and_damaged_programs(good, tmp_path):
    """Cut anywhere, or with bytes changed: refused, or the same numbers where the change is in a padding or a weight."""
    content = good[0]
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        refused(content[:size], tmp_path)
    refused(b"not a zip file", tmp_path, "readable")
    generator = random.Random(0)
    shape = good[1](zoo.images(2)).shape
    path = tmp_path / "damaged.pt2"
    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert load(path)(zoo.images(2)).shape == shape
        except ExportError as error:
            assert len(str(error).splitlines()) == 1
