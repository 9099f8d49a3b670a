"""Reading a ``.pt2`` file that may come from anywhere: what could run code or exhaust memory is refused first.

``torch.export.load`` trusts its file: it falls back to full pickle, evaluates size expressions and guards as Python and
builds function signatures from names. So every record is looked at before it sees them: plain tensors only, names that
are names, operators of known namespaces, expressions and guards of sizes and numbers alone.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import ExportError
from ..tensor_files import read_torch, record_size

_MAX_GRAPH = 64 * 2**20  # bytes of JSON; VMamba-B's graph takes about 2 MiB
_MAX_EXTRA = 4 * 2**20
_MAX_DEPTH = 200
_MAX_RECORDS = 100_000
_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|\.data/(version|serialization_id)"
    r"|models/model\.json|data/(weights|constants)/(model\.pt|model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/model\.pt|extra/[\w.\-]+"
)
_NAME = re.compile(r"[\w.+\- ]*")
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|vmeanba_fx)\.(?!from_file)\w+\.\w+|_operator\.\w+|math\.\w+|torch\.sym_\w+"
    r"|torch\.ops\.higher_order\.(wrap_with_\w+|tag_activation_checkpoint|cond)"
    r"|torch\._C\._set_grad_enabled|torch\.amp\.autocast_mode\._(enter|exit)_autocast"
)
_FREE_TEXT = {"metadata", "as_string", "torch_version"}
_TREE_TYPES = {None, "builtins.list", "builtins.tuple", "builtins.dict", "collections.OrderedDict"}
_FUNCTIONS = set(
    "Symbol Integer Float Rational Add Mul Max Min Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing Where "
    "CeilToInt FloorToInt IntTrueDiv FloatTrueDiv TruncToInt ToFloat Eq Ne Equality Unequality Lt Le Gt Ge "
    "StrictLessThan LessThan StrictGreaterThan GreaterThan And Or Not Abs".split()
)
_METHODS = {"size", "stride", "storage_offset", "dim", "numel"}
_OPERATIONS = (
    ast.Expression, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div,
    ast.FloorDiv, ast.Mod, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.cmpop, ast.keyword,
)  # fmt: skip


def read_program(content: bytes, what: str) -> tuple[ExportedProgram, dict[str, str]]:
    """The program in a ``.pt2`` file's ``content`` and its extra files by name. ``what`` names the file in errors.

    Raises:
        ExportError: damaged, or not what ``torch.export.save`` writes for a model without code of its own.
    """
    try:
        extra = _vet(content)
    except _Refused as refusal:
        raise ExportError(f"{what} is refused: {refusal}") from None
    except Exception as error:  # the readers raise a dozen types on damaged files
        raise ExportError(f"{what} is not a readable .pt2 file (corrupt or truncated?): {_first_line(error)}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(io.BytesIO(content)), extra
    except Exception as error:  # whatever torch raises for a file of another version, or a graph that makes no sense
        raise ExportError(f"{what} cannot be loaded by torch {torch.__version__}: {_first_line(error)}") from error


class _Refused(Exception):
    pass


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _vet(content: bytes) -> dict[str, str]:
    if content.count(b"PK\x01\x02") > _MAX_RECORDS:  # to list them would take seconds
        raise _Refused(f"it holds more than {_MAX_RECORDS:,} records")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = _records(archive.infolist(), len(content))
    # From here on torch's own reader: what is looked at must be what is loaded.
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    if set(reader.get_all_records()) != set(records):
        raise _Refused("its two tables of contents differ")
    for name, size in records.items():
        if record_size(reader, name) != size:
            raise _Refused(f"two sizes are given for {name}")
    if "models/model.json" not in records:
        raise _Refused("it holds no model")
    _vet_model(_json(reader, records, "models/model.json"))
    for kind, prefix in (("weights", "weight_"), ("constants", "tensor_")):
        config = f"data/{kind}/model_{kind}_config.json"
        if config in records:
            _vet_payloads(_json(reader, records, config), records, f"data/{kind}/", prefix)
    for name in records:
        if name.endswith(".pt"):
            _vet_pickle(reader.get_record(name), name)
    extra = {name.removeprefix("extra/"): size for name, size in records.items() if name.startswith("extra/")}
    for name, size in extra.items():
        if size > _MAX_EXTRA:
            raise _Refused(f"its extra file {name} is larger than {_MAX_EXTRA // 2**20} MiB")
    return {name: reader.get_record(f"extra/{name}").decode("utf-8") for name in extra}


def _records(infos: list[zipfile.ZipInfo], available: int) -> dict[str, int]:
    """Sizes of the records by name, without the folder that torch puts all of them into."""
    records: dict[str, int] = {}
    for info in infos:
        _, _, name = info.filename.partition("/")
        if name.startswith("data/aotinductor/"):
            raise _Refused("it is an AOTInductor package, which is machine code: torch._inductor.aoti_load_package")
        if not _RECORDS.fullmatch(name) or name in records or info.filename.startswith(("/", "..")):
            raise _Refused(f"it holds a record {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise _Refused(f"its record {name} is compressed")
        records[name] = info.file_size
    if len({info.filename.partition("/")[0] for info in infos}) != 1:
        raise _Refused("its records lie in several folders")
    if sum(records.values()) > available:
        raise _Refused("its records are larger than the file")
    return records


def _json(reader: Any, records: dict[str, int], name: str) -> Any:
    if records[name] > _MAX_GRAPH:
        raise _Refused(f"{name} is larger than {_MAX_GRAPH // 2**20} MiB")
    try:
        return json.loads(reader.get_record(name))
    except RecursionError:
        raise _Refused(f"{name} is nested too deep") from None


def _vet_pickle(content: bytes, name: str) -> None:
    try:
        read_torch(io.BytesIO(content)) if content else None
    except Exception:
        raise _Refused(f"{name} holds Python objects, which could run code") from None


def _vet_payloads(config: Any, records: dict[str, int], folder: str, prefix: str) -> None:
    for name, payload in config["config"].items():
        path, meta = payload["path_name"], payload["tensor_meta"]
        if payload["use_pickle"] is not False or not isinstance(meta, dict):
            raise _Refused(f"{name} is a Python object, which could run code")
        if not _NAME.fullmatch(name) or not str(path).startswith(prefix) or folder + path not in records:
            raise _Refused(f"{name[:80]!r} is said to be in {str(path)[:80]!r}")
        sizes = [size["as_int"] for size in meta["sizes"]]
        if not all(type(size) is int and 0 <= size < 2**40 for size in sizes):
            raise _Refused(f"{name} has the shape {str(sizes)[:80]}")
        if records[folder + path] == 0 and math.prod(sizes):  # torch would allocate it
            raise _Refused(f"{name} has a shape but no data")


def _vet_model(model: Any) -> None:
    if not isinstance(model, dict):
        raise _Refused("its model is not an object")
    for key, text in _strings(model):
        if key in ("expr_str", "guards_code"):
            _vet_expression(text, guard=key == "guards_code")
        elif key in ("in_spec", "out_spec"):
            _vet_tree(text)
        elif key in ("target", "as_operator"):
            if not _OPERATOR.fullmatch(text):
                raise _Refused(f"it calls {text[:80]!r}, which is no operator of PyTorch or of ours")
        elif not _NAME.fullmatch(text):
            raise _Refused(f"it holds the name {text[:80]!r}")


def _strings(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(the key it stands under, text) of every string and every key, but for text that is never interpreted."""
    if depth > _MAX_DEPTH:
        raise _Refused(f"its model is nested more than {_MAX_DEPTH} deep")
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, list):
        for item in content:
            yield from _strings(item, key, depth + 1)
    elif isinstance(content, dict):
        for name, item in content.items():
            yield "", name
            if name not in _FREE_TEXT:
                yield from _strings(item, name, depth + 1)


def _vet_tree(text: str) -> None:
    if not text:
        return
    version, tree = json.loads(text)
    pending = [tree]
    while pending:
        node = pending.pop()
        context = json.loads(node["context"]) if node["context"] is not None else None
        names = [] if context is None else context
        plain = isinstance(names, list) and all(isinstance(n, int) or _is_word(n) for n in names)
        if type(version) is not int or node["type"] not in _TREE_TYPES or not plain:
            raise _Refused(f"its inputs are structured as {text[:80]!r}")
        pending += node["children_spec"]


def _is_word(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"[\w.]*", text) is not None


def _vet_expression(text: str, guard: bool) -> None:
    """Sizes, numbers and arithmetic on them: both are evaluated as Python when the program is loaded."""
    refused = _Refused(f"it holds the expression {text[:80]!r}")
    if len(text) > 4000:
        raise refused
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise refused from None
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            ok = _is_word(node.value) or isinstance(node.value, float) or _is_small(node.value)
        elif isinstance(node, ast.Name):
            ok = node.id in _FUNCTIONS if id(node) in called else _is_size_name(node.id)
        elif isinstance(node, ast.Call):
            ok = isinstance(node.func, ast.Name) or (guard and isinstance(node.func, ast.Attribute))
        elif isinstance(node, ast.Attribute):
            ok = guard and id(node) in called and node.attr in _METHODS
        elif isinstance(node, ast.Subscript):
            ok = guard and isinstance(node.slice, ast.Constant)
        else:
            ok = isinstance(node, _OPERATIONS)
        if not ok:
            raise refused


def _is_small(number: Any) -> bool:
    return number is None or (isinstance(number, int) and abs(number) <= 2**63)


def _is_size_name(name: str) -> bool:
    return re.fullmatch(r"L|true|false|int_oo|inf|[suz]+\d+", name) is not None
