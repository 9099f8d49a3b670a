"""Writing a model as a ``.pt2`` program: checked by loading and running it, complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import Dim, ShapesCollection

from ..capture import capture_info
from .arguments import CommandError

_BATCHES = (1, 3)  # batch sizes a program with a dynamic batch must run besides its own
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Written:
    """``error``: largest difference between the loaded program and the graph, relative to the largest output."""

    out: str
    bytes: int
    batches: tuple[int, ...]
    dynamic_batch: bool
    error: float

    def __str__(self) -> str:
        kind = "any batch size" if self.dynamic_batch else "this batch size only"
        tried = ", ".join(map(str, self.batches))
        return (
            f"written to {self.out} ({self.bytes / 1e6:.2f} MB, {kind}); loaded again and run at batch {tried}: "
            f"largest relative difference {self.error:.1e}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"format": "pt2"}


def write_program(gm: fx.GraphModule, out: str, extra: dict[str, Any] | None = None) -> Written:
    """Export ``gm`` with its dynamic dimensions, write it, load it, run it, compare; only then move it to ``out``.

    Args:
        extra: JSON-ready objects to keep inside the file, by name.

    Raises:
        CommandError: the graph cannot be exported, or the loaded program computes something else; nothing is written.
        OSError: ``out`` cannot be written.
    """
    args, kwargs = _random_inputs(gm)
    program = _export(gm, args, kwargs)
    target = Path(out)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=".pt2")
    os.close(handle)
    try:
        texts = {key: json.dumps(value) for key, value in (extra or {}).items()}
        torch.export.save(program, name, extra_files=texts)
        dynamic = capture_info(gm).batch_dynamic
        batches, error = _check(gm, name, args, kwargs, dynamic)
        size = os.path.getsize(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return Written(out, size, batches, dynamic, error)


def _random_inputs(gm: fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs like those of the capture with random values: zeros would make a comparison too easy."""
    info = capture_info(gm)
    device = next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return torch.randn(t.shape, generator=generator).to(device, t.dtype)
        return t.to(device)

    return pytree.tree_map_only(Tensor, draw, (info.args, info.kwargs))


def _export(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    dims: dict[str, dict[int, Any]] = {}
    for name, dim in capture_info(gm).dynamic:
        dims.setdefault(name, {})[dim] = Dim.DYNAMIC
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    shapes = ShapesCollection()
    for name, value in zip(names, pytree.tree_leaves((args, kwargs)), strict=True):
        if name in dims:
            shapes[value] = dims[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(gm, args, kwargs, dynamic_shapes=shapes if dims else None, strict=False)
    except Exception as error:
        first = str(error).strip().splitlines()[:2]
        raise CommandError(f"torch.export refuses the graph: {type(error).__name__}: {' '.join(first)}") from error


def _check(
    gm: fx.GraphModule, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool
) -> tuple[tuple[int, ...], float]:
    module = torch.export.load(name).module()
    own = next(t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim())
    batches = (own, *_BATCHES) if dynamic else (own,)
    worst = 0.0
    for batch in batches:
        a, k = pytree.tree_map_only(Tensor, lambda t, n=batch: _rows(t, own, n), (args, kwargs))
        with torch.no_grad():
            expected, found = pytree.tree_leaves(gm(*a, **k)), pytree.tree_leaves(module(*a, **k))
        for e, f in zip(expected, found, strict=True):
            if isinstance(e, Tensor) and e.is_floating_point():
                error = relative_error(f, e)
                if not error <= _TOLERANCE.get(e.dtype, 1e-2):
                    raise CommandError(
                        f"the program written differs from the graph by {error:.1e} (relative, batch {batch})"
                    )
                worst = max(worst, error)
    return batches, worst


def _rows(t: Tensor, own: int, batch: int) -> Tensor:
    return t[torch.arange(batch, device=t.device) % own] if t.dim() and t.shape[0] == own else t


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; nan where either is not finite."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
