"""Writing a rewritten model for where it will run, and reading it back.

Every format goes the same way: the graph is exported with its dynamic dimensions and written to a temporary file beside
the target; that file is loaded, run at several batch sizes and compared with the graph; only then it takes its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import stat
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from ..capturing.capture import capture, capture_info, is_captured, reopened
from ..capturing.confinement import one_at_a_time
from ..capturing.copies import device_of
from ..capturing.examples import batch_size, with_batch
from ..capturing.guards import failed_guard
from ..errors import ExportError, PlanError, VMeanbaError
from ..files import BAD_PATH, parse_json, reason, unwritable
from ..graph import copy_graph, graph_modules
from ..ops.chunked import Form
from ..ops.decompositions import decompose
from ..plan import Plan
from ..report import Report, attach_plan, attach_report, plan_of, report
from .archive import read_program
from .formats import FORMS, Run, write_aoti, write_onnx, write_pt2

__all__ = ["Exported", "Loaded", "export", "load"]

_BATCHES = (1, 3)  # batch sizes a file with a dynamic batch must run besides its own
_FORMATS = {"pt2": write_pt2, "aoti": write_aoti, "onnx": write_onnx}
_SUFFIX = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
# Largest difference, relative to the largest output. The files compute in another order than the graph does.
_TOLERANCE = {
    "pt2": {torch.float64: 1e-12, torch.float32: 1e-5},
    "aoti": {torch.float64: 1e-10, torch.float32: 1e-4},
    "onnx": {torch.float64: 1e-10, torch.float32: 1e-4},
}


@dataclass(frozen=True)
class Exported:
    """What was written. ``error``: largest difference between the loaded file and the graph, relative to the largest
    output, over the batch sizes ``batches``."""

    path: str
    format: str
    bytes: int
    batches: tuple[int, ...]
    dynamic_batch: bool
    error: float

    def __str__(self) -> str:
        kind = "any batch size" if self.dynamic_batch else "this batch size only"
        tried = ", ".join(map(str, self.batches))
        return (
            f"written to {self.path} ({self.format}, {self.bytes / 1e6:.2f} MB, {kind}); loaded again and run at batch "
            f"{tried}: largest relative difference {self.error:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": self.path, "format": self.format, "bytes": self.bytes, "batches": list(self.batches),
            "dynamic_batch": self.dynamic_batch, "error": self.error,
        }  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A ``.pt2`` file: the model, and the report and plan it was made with, where it holds them."""

    module: fx.GraphModule
    report: Report | None
    plan: Plan | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@one_at_a_time
def export(
    gm: fx.GraphModule | nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None,
    path: str | os.PathLike[str],
    format: str = "pt2",
) -> Exported:
    """Write ``gm`` to ``path``, verified; an existing file is replaced when the new one is complete, never before.

    Args:
        gm: what ``transform`` or ``Plan.apply`` returned, or any model ``capture`` takes. It is not changed.
        example_inputs: a tensor, a tuple of positional inputs or a mapping of keyword inputs, with which the written
            file is compared with the graph; ``None`` takes random ones like those of the capture.
        format: ``"pt2"``, a ``torch.export`` program that runs wherever ``import vmeanba_fx`` does and holds report and
            plan, see :func:`load`; ``"aoti"``, an AOTInductor package that runs in C++ without Python and without
            our ops; ``"onnx"``, opset 18, standard operators only.

    Raises:
        ExportError: unknown format, missing packages, a graph that cannot be exported, a target that cannot be
            written, or a file that computes something else. Nothing is left behind, an old file stays as it was.
    """
    check_target(path, format)
    graph = gm if is_captured(gm) else _captured(gm, example_inputs)
    args, kwargs = _inputs(graph, example_inputs)
    _refuse_dynamic_size(graph, format)
    extra = _extra(graph)
    with _new_file(Path(path).resolve()) as name:
        program = _program(graph, args, kwargs, FORMS.get(format))
        try:
            with warnings.catch_warnings(), torch.no_grad():  # with gradients, torch gives loops further results
                warnings.simplefilter("ignore")
                run = _FORMATS[format](program, name, extra)
        except (VMeanbaError, OSError, KeyboardInterrupt):
            raise
        except Exception as error:  # exporters and compilers raise whatever they like
            raise ExportError(f"the {format} file could not be made: {_sentence(error)}") from error
        batches, worst = _verify(graph, run, args, kwargs, format)
        size = os.path.getsize(name)
    return Exported(os.fspath(path), format, size, batches, capture_info(graph).batch_dynamic, worst)


@one_at_a_time
def load(path: str | os.PathLike[str]) -> Loaded:
    """Read a ``.pt2`` file that :func:`export` or ``torch.export.save`` wrote: the model, its report and its plan.

    The file may come from anywhere: it is checked before PyTorch reads it, and no code in it is executed.

    Raises:
        ExportError: the file is missing, damaged, hostile, or of another version of PyTorch.
    """
    program, extra = read_program(_content(path), str(path))
    try:
        gm = reopened(program)
        found = _report(extra["report.json"]) if "report.json" in extra else None
        plan = Plan.loads(extra["plan.json"], "plan.json") if "plan.json" in extra else None
    except (PlanError, ValueError) as error:
        raise ExportError(f"{path} is refused: {error}") from None
    if found is not None:
        attach_report(gm, found)
    if plan is not None:
        attach_plan(gm, plan.to_dict())
    return Loaded(gm, found, plan)


def _content(path: str | os.PathLike[str]) -> bytes:
    """What the file holds; of one that is no archive nothing is read, however large it is."""
    try:
        why = "it is no plain file"  # a device or a pipe, which may have no end
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                if zipfile.is_zipfile(file):
                    file.seek(0)
                    return file.read()
            why = "it is no readable .pt2 file (corrupt or truncated?)"
    except BAD_PATH as error:
        why = reason(error)
    raise ExportError(f"cannot read {path}: {why}")


def _report(text: str) -> Report:
    return Report.from_dict(parse_json(text.encode(), "report.json", "report"))


def check_target(path: str | os.PathLike[str], format: str) -> None:
    """Refuse before minutes of work what could not be written after them.

    Raises:
        ExportError: unknown format, missing packages, another suffix, or a folder that is missing or read-only.
    """
    if format not in _FORMATS:
        raise ExportError(f"unknown format {format!r}: choose one of {', '.join(_FORMATS)}")
    missing = [name for name in _PACKAGES.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"the format {format} needs {', '.join(missing)}, not installed here: pip install 'vmeanba-fx[{format}]'"
        )
    target = Path(path)
    if reason := unwritable(target):
        raise ExportError(reason)
    if target.suffix != _SUFFIX[format]:
        other = ", ".join(f for f, suffix in _SUFFIX.items() if suffix == target.suffix)
        hint = f" (the format of {target.suffix} is {other})" if other else ""
        raise ExportError(f"{target}: the name of a file of format {format} ends in {_SUFFIX[format]}{hint}")


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[str]:
    """The name of a file beside ``target``, which takes its place when the block ends well and goes where it does not."""
    name = str(target.parent / f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield name
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sentence(error: BaseException) -> str:
    """The type and the first lines of what an exporter raised; where it wraps another error, of that one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(' '.join(str(error).split()).split()[:60])}"


def _as_inputs(inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs)), {}


def _captured(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    if example_inputs is None:
        raise ExportError("example_inputs are needed to export a model that vmeanba_fx did not capture")
    return capture(model, *_as_inputs(example_inputs))


def _inputs(gm: fx.GraphModule, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs to export and compare with, at batch 2 or more where the batch is dynamic, on the graph's device."""
    info = capture_info(gm)
    captured = (info.args, info.kwargs)
    generator = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:  # zeros would make the comparison too easy
        return torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t

    inputs = pytree.tree_map_only(Tensor, draw, captured) if given is None else _as_inputs(given)
    if pytree.tree_structure(inputs) != pytree.tree_structure(captured):
        raise ExportError("the example inputs are not structured like those of the capture")
    for mine, theirs in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(captured), strict=True):
        if isinstance(mine, Tensor) != isinstance(theirs, Tensor) or (isinstance(mine, Tensor) and not mine.numel()):
            raise ExportError("the example inputs are empty or not tensors where those of the capture are")
    device = device_of(gm)
    # Copies: a slice of the data set would bring all of it into the file.
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), inputs)
    if guard := failed_guard(gm, args, kwargs):
        raise ExportError(f"the example inputs are not such as the graph takes: {guard} does not hold")
    own = batch_size(args, kwargs)
    return with_batch(args, kwargs, own, 2) if info.batch_dynamic and own == 1 else (args, kwargs)


def _refuse_dynamic_size(gm: fx.GraphModule, format: str) -> None:
    scans = any("vmeanba_fx" in str(n.target) for owner in graph_modules(gm) for n in owner.graph.nodes)
    if format != "pt2" and scans and any(dim > 0 for _, dim in capture_info(gm).dynamic):
        raise ExportError(
            f"the format {format} needs the length of every scan: capture the model without dynamic_size, one file per size"
        )


def _extra(gm: fx.GraphModule) -> dict[str, str]:
    """What goes into the file beside the model, as JSON by name."""
    found = {}
    with contextlib.suppress(VMeanbaError):  # a graph that was only captured has none
        found["report.json"] = json.dumps(report(gm).to_dict() | {"table": report(gm).table})
    if plan_of(gm) is not None:
        found["plan.json"] = json.dumps(plan_of(gm))
    return found


def _program(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], form: Form | None) -> ExportedProgram:
    dims: dict[str, dict[int, Any]] = {}
    for name, dim in capture_info(gm).dynamic:
        dims.setdefault(name, {})[dim] = Dim.DYNAMIC
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    shapes: Any = ShapesCollection()  # documented, but not in the annotations of export
    for name, value in zip(names, pytree.tree_leaves((args, kwargs)), strict=True):
        if name in dims:
            shapes[value] = dims[name]
    graph = copy_graph(gm)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if form is not None:
                decompose(graph, form)
            return torch.export.export(graph, args, kwargs, dynamic_shapes=shapes if dims else None, strict=False)
    except Exception as error:
        raise ExportError(f"torch.export refuses the graph: {_sentence(error)}") from error


def _verify(
    gm: fx.GraphModule, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], format: str
) -> tuple[tuple[int, ...], float]:
    """Batch sizes at which the file was run, and its largest error; raises ExportError where that is too large."""
    own = batch_size(args, kwargs)
    batches = tuple(dict.fromkeys((own, *_BATCHES))) if capture_info(gm).batch_dynamic else (own,)
    worst = 0.0
    for batch in batches:
        a, k = with_batch(args, kwargs, own, batch)
        with torch.no_grad():
            expected = [t for t in pytree.tree_leaves(gm(*a, **k)) if isinstance(t, Tensor)]
            try:
                found = run(*a, **k)
            except Exception as error:
                raise ExportError(f"the {format} file does not run at batch {batch}: {_sentence(error)}") from error
        if [f.shape for f in found] != [e.shape for e in expected]:
            raise ExportError(f"the {format} file gives other outputs than the graph at batch {batch}")
        for f, e in zip(found, expected, strict=True):
            off = relative_error(f.to(e.device), e)
            if not off <= _TOLERANCE[format].get(e.dtype, 2e-2):
                raise ExportError(f"the {format} file differs from the graph by {off:.1e} (relative, batch {batch})")
            worst = max(worst, off)
    return batches, worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; nan where either is not finite."""
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))
