"""Runs passes one after the other: checks the graph after each, logs what it changed, and can prove exactness on inputs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import fx

from vmeanba_fx.errors import GraphCheckError, PassError
from vmeanba_fx.graph import computes_in_half, graph_modules

from .verification import compare_outputs, outputs_of

log = logging.getLogger("vmeanba_fx.passes")


@dataclass(frozen=True)
class Pass:
    """A named step ``run(gm) -> gm``. ``exact``: it may change no result, beyond floating-point error."""

    name: str
    run: Callable[[fx.GraphModule], fx.GraphModule]
    exact: bool


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: node counts before and after (sub-graphs included) and its time."""

    name: str
    exact: bool
    nodes_before: int
    nodes_after: int
    seconds: float
    changed: bool

    def __str__(self) -> str:
        kind = "exact" if self.exact else "lossy"
        what = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.changed else "unchanged"
        return f"{self.name} ({kind}): {what}, {1e3 * self.seconds:.0f} ms"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    skip: str | Iterable[str] = (),
    verify_args: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    dump: str | os.PathLike[str] | None = None,
) -> tuple[fx.GraphModule, list[PassRecord]]:
    """Run ``passes`` over ``gm`` in order.

    Args:
        skip: name or names of passes to leave out.
        verify_args: (args, kwargs) to run before and after every exact pass; the outputs must agree.
        dump: a folder that receives the readable graph after every pass (``00_mean_scan.py``, ...).

    Returns:
        The graph, and a record of every pass.

    Raises:
        PassError: ``skip`` names a pass that does not exist.
        GraphCheckError: a pass left a malformed graph, or an exact pass changed the outputs; names the pass.
    """
    skip = {skip} if isinstance(skip, str) else set(skip)
    unknown = skip - {p.name for p in passes}
    if unknown:
        known = ", ".join(p.name for p in passes)
        raise PassError(f"no pass named {', '.join(sorted(map(str, unknown)))} to skip; the passes are: {known}")
    records: list[PassRecord] = []
    expected = outputs_of(gm, verify_args)
    for i, step in enumerate(p for p in passes if p.name not in skip):
        before, code = _count(gm), _code(gm)
        start = time.perf_counter()
        gm = step.run(gm)
        seconds = time.perf_counter() - start
        check_graph(gm, step.name)
        record = PassRecord(step.name, step.exact, before, _count(gm), seconds, _code(gm) != code)
        log.info("%s", record)
        records.append(record)
        if dump is not None:
            folder = Path(dump)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}_{step.name}.py").write_text(f"# {record}\n{_code(gm)}")
        if verify_args is not None and record.changed:
            found = outputs_of(gm, verify_args)
            if step.exact:
                compare_outputs(expected, found, step.name, computes_in_half(gm))
            expected = found
    return gm, records


def check_graph(gm: fx.GraphModule, after: str) -> None:
    """Raise :class:`GraphCheckError` unless ``gm`` is well formed: fx's own lint, attributes that exist, known values.

    Every node that is used must know its value (``meta["val"]``), as later passes decide on shapes and dtypes.
    """
    for owner in graph_modules(gm):
        try:
            owner.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise GraphCheckError(f"after {after}: {error}") from error
        for node in owner.graph.nodes:
            if node.op == "get_attr":
                _resolve(owner, str(node.target), after)
            if node.op == "call_function" and node.users and "val" not in node.meta:
                raise GraphCheckError(
                    f"after {after}: node {node.name} does not know its value (meta['val'] is missing)"
                )


def _resolve(owner: fx.GraphModule, target: str, after: str) -> None:
    found: Any = owner
    for part in target.split("."):
        if not hasattr(found, part):
            raise GraphCheckError(f"after {after}: the graph reads {target!r}, which the module does not have")
        found = getattr(found, part)


def _count(gm: fx.GraphModule) -> int:
    return sum(len(owner.graph.nodes) for owner in graph_modules(gm))


def _code(gm: fx.GraphModule) -> str:
    return "\n".join(owner.code for owner in graph_modules(gm))
