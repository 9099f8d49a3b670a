"""The measured score: the metric of every image with one site replaced, for one site after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from ..capturing.capture import capture_info
from ..capturing.examples import shapes_of
from ..errors import CalibrationError, PlanError
from ..graph import args_of
from ..sites import Site
from .batches import Batches
from .execute import Executor, State
from .metrics import Batch, Metric, kl, values_of
from .replacing import Point, Replacer
from .resume import Saved
from .tally import Tally


class Runner:
    """Runs a captured graph on batches, as it is and with sites replaced, and sees that all numbers are finite."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[Site], metric: Metric, replacer: Replacer) -> None:
        self.gm = gm
        self.sites = sites
        self.metric = metric
        self.replacer = replacer
        self.executor = Executor(gm, replacer.nodes)

    def base(self, index: int, batch: Batch) -> Run:
        """The unchanged model on batch ``index``."""
        batch = batch.to(self.executor.device)
        try:
            outputs, state = self.executor.run(*batch.args, **batch.kwargs)
        except Exception as error:  # guards of the graph and operators raise whatever they like
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            sizes, notes = shapes_of((batch.args, batch.kwargs)), capture_info(self.gm).notes
            raise CalibrationError(
                f"batch {index} ({sizes}) does not fit the captured graph: {'; '.join((why, *notes))}"
            ) from error
        require_finite(outputs, f"the model's outputs on calibration batch {index}", lambda: self._first_bad(batch))
        values, weight = values_of(self.metric, outputs, batch, outputs)
        require_numbers(values, f"the metric {self.metric.name!r} of the unchanged model on batch {index}")
        return Run(self, index, batch, outputs, state, values, weight)

    def _first_bad(self, batch: Batch) -> str:
        """Where in the graph the values stop being finite, as far as the scans tell."""
        bad: list[str] = []

        def look(point: Point, env: Mapping[fx.Node, Any]) -> None:
            for what, node in (("input", args_of(point.scan)[0]), ("output", point.scan)):
                if not bad and not bool(torch.isfinite(env[node]).all()):
                    bad.append(f", first seen in the {what} of the scan at {point.site.name}")

        readers = {point.scan: partial(look, point) for point in self.replacer.points if point.body is None}
        self.executor.visit(readers, *batch.args, **batch.kwargs)
        return "".join(bad)


class Run:
    """One batch through the unchanged model; ``values`` (n,) of the metric, each for ``weight`` images."""

    def __init__(
        self, runner: Runner, index: int, batch: Batch, outputs: Any, state: State, values: Tensor, weight: int
    ) -> None:
        self.runner, self.index, self.batch, self.outputs = runner, index, batch, outputs
        self.state, self.values, self.weight = state, values, weight

    def replaced(self, chosen: Sequence[int]) -> tuple[Any, Tensor]:
        """Outputs and metric (n,) of the batch with the sites ``chosen`` replaced together."""
        runner = self.runner
        outputs = runner.executor.rerun(self.state, runner.replacer.overrides(chosen))
        name = ", ".join(runner.sites[i].name for i in chosen)
        this = "this site" if len(chosen) == 1 else "these sites"
        require_finite(outputs, f"{name}: with {this} replaced, the outputs on batch {self.index}")
        values, weight = values_of(runner.metric, outputs, self.batch, self.outputs)
        require_numbers(values, f"{name}: the metric {runner.metric.name!r} on batch {self.index}")
        if (values.numel(), weight) != (self.values.numel(), self.weight):
            raise CalibrationError(
                f"metric {runner.metric.name!r} gave {values.numel()} values where it gave {self.values.numel()} before"
            )
        return outputs, values

    def shift(self, outputs: Any) -> Tensor | None:
        """KL of the outputs, as many values as the metric has; None where they are no class scores."""
        try:
            found = kl(outputs, self.outputs)
        except CalibrationError:
            return None
        return found if found.numel() == self.values.numel() else found.mean().expand(self.values.numel())


SINGLES = "singles"


def measure_sites(runner: Runner, batches: Batches, saved: Saved, bar: Any) -> Tally:
    """All batches, each with every site replaced on its own.

    Columns of the tally: the unchanged model, every site, then every site's KL where the outputs are class scores: a
    small calibration set leaves many sites with equal accuracy, and the shift of the outputs tells them apart.
    """
    n = len(runner.sites)
    measure = measure_each(runner, [[i] for i in range(n)], bar, shifts=True)
    return whole_pass(measure, (1 + n, 1 + 2 * n), batches, saved, SINGLES, lambda: bar.update(n))


def measure_each(
    runner: Runner, sets: Sequence[Sequence[int]], bar: Any, *, shifts: bool
) -> Callable[[int, Batch], tuple[Tensor, int]]:
    """(values (columns, n), weight) of a batch: the unchanged model, every set of sites replaced, then their KL with
    ``shifts`` where the outputs are class scores."""

    def measure(index: int, batch: Batch) -> tuple[Tensor, int]:
        run = runner.base(index, batch)
        columns: list[Tensor] = [run.values]
        moved: list[Tensor | None] = []
        for chosen in sets:
            outputs, values = run.replaced(chosen)
            columns.append(values)
            moved.append(run.shift(outputs) if shifts else None)
            bar.update()
        known = [m for m in moved if m is not None]
        if len(known) == len(sets):
            columns += known
        return torch.stack([c.cpu() for c in columns]), run.weight

    return measure


def whole_pass(
    measure: Callable[[int, Batch], tuple[Tensor, int]],
    widths: Sequence[int],
    batches: Batches,
    saved: Saved,
    name: str,
    skipped: Callable[[], Any],
) -> Tally:
    """``measure`` on all batches in order, added up and saved after each; those of the state file are not run again.

    Reads the loader where nobody has yet, and goes through its batches again where somebody has.

    Args:
        measure: (values (columns, n), weight) of a batch.
        widths: numbers of columns that ``measure`` may give.
        skipped: called for each batch that the state file knows already.

    Raises:
        PlanError: the state file was made from other data.
    """

    def parse(section: Any) -> tuple[Tally, str]:
        columns = section["columns"]
        if columns not in widths:
            raise PlanError(f"{saved.path} belongs to another run (other sites): remove it to start again")
        return Tally.from_dict(section["tally"], columns), str(section["chain"])

    tally, known = saved.read(name, parse) or (None, "")
    done = tally.batches if tally is not None else 0
    stream = batches.again(lambda _: True) if len(batches) else enumerate(batches)
    for index, batch in stream:
        if index < done:
            if index + 1 == done and batches.chain_of(done) != known:
                raise PlanError(f"{saved.path} belongs to other calibration data: remove it, or give the same data")
            skipped()
            continue
        values, weight = measure(index, batch)
        if tally is None:
            tally = Tally(len(values))
        tally.add(values, weight)
        saved.write(**{name: {"columns": tally.columns, "chain": batches.chain_of(index + 1), "tally": tally.to_dict()}})
    if len(batches) < done:
        raise PlanError(
            f"{saved.path} was made from more batches than the loader gives now: remove it, or give the same data"
        )
    assert tally is not None
    return tally


def require_finite(outputs: Any, what: str, where: Callable[[], str] = str) -> None:
    """Raise ``CalibrationError`` where an output is nan or inf."""
    for t in pytree.tree_leaves(outputs):
        if isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise CalibrationError(f"{what} are not finite (nan or inf){where()}; no plan was made")


def require_numbers(values: Tensor, what: str) -> None:
    """Raise ``CalibrationError`` where a value is nan or inf."""
    total = float(values.sum())
    if not math.isfinite(total):
        raise CalibrationError(f"{what} is not finite ({total})")
