"""The paper's layer impact score: how much a metric changes when only that site is replaced."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from tqdm.auto import tqdm

from .capture import capture, capture_info
from .errors import CalibrationError, PlanError
from .execute import Executor, State
from .files import read_json, write_atomically
from .fingerprint import Fingerprint
from .graph import SITE, copy_graph, graph_modules, read_attribute, scan_nodes
from .metrics import Batch, Metric, kl, resolve_metric, score, unpack
from .passes.mean_scan import Mean, check_mean, mean_scan, mean_scan_tensors, scan_arguments
from .plan import Plan
from .sites import Site, find_sites

__all__ = ["calibrate"]

log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    loader: Iterable[Any],
    *,
    metric: str | Callable[..., Any] | None = None,
    mean: Mean = "direction",
    transform_fn: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    dynamic_size: bool = False,
    score_sites: bool = True,
    before_scoring: Callable[[Plan], None] | None = None,
) -> Plan:
    """Score every site of ``model`` on calibration data.

    Args:
        model: any model :func:`vmeanba_fx.capture` takes; it is not changed.
        loader: batches of inputs, with or without labels (see :func:`vmeanba_fx.metrics.unpack`).
        metric: ``"accuracy"``, ``"loss"``, ``"kl"`` or ``callable(outputs, batch) -> float tensor``; by default
            accuracy where there are labels and kl where there are none.
        mean: variant of the replacement that is scored, see :mod:`vmeanba_fx.passes.mean_scan`.
        transform_fn: maps a batch of the loader to ``(inputs, labels)``.
        max_batches: stop after so many batches.
        seed: seeds torch's generators while the loader runs, so that a shuffling loader gives the same data again.
        resume: a file that receives the state after every batch. A run that was killed goes on from it, and the
            resulting plan is the same; a file of another model, data set or option is refused.
        progress: show a progress bar; by default only on a terminal.
        dynamic_size: capture with dynamic height and width.
        score_sites: False makes a plan without scores, which can only be applied with ``k=0`` or by site names.
        before_scoring: called with the plan while it has no scores yet; may raise, so that nothing is scored in vain.

    Raises:
        CalibrationError: no batches, no labels for the metric, outputs or scores that are not finite (names the site).
        CaptureError, NoSitesError: see :func:`vmeanba_fx.capture` and :func:`vmeanba_fx.find_sites`.
        PlanError: ``resume`` holds the state of another run.
    """
    check_mean(mean)
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise CalibrationError(f"max_batches={max_batches!r}: give a whole number of at least 1, or None for all")
    with _seeded(seed):
        batches = _batches(loader, transform_fn, max_batches)
        try:
            first = next(batches)
        except StopIteration:
            raise CalibrationError("the calibration loader is empty: it gave no batch") from None
        gm = capture(model, first.args, first.kwargs, dynamic_size=dynamic_size)
        sites = find_sites(gm)
        chosen = resolve_metric(metric, first.labels is not None)
        options = {"mean": mean, "metric": chosen.name, "dynamic_size": dynamic_size}
        plan = Plan(
            sites=list(sites),
            refused=list(sites.refused),
            metric=chosen.name,
            higher_is_better=chosen.higher_is_better,
            mean=mean,
            base=None,
            scores=[],
            tiebreaks=[],
            samples=0,
            fingerprint=Fingerprint.of(gm, seed=seed, options=options),
            inputs=_describe_inputs(first),
            graph=gm,
        )
        if before_scoring is not None:
            before_scoring(plan)
        if not score_sites:
            return plan
        scorer = _Scorer(gm, list(sites), chosen, mean)
        total = _length(loader, max_batches)
        scorer.run(itertools.chain([first], batches), total, resume, plan.fingerprint, progress)
    return replace(
        plan,
        base=scorer.base_value,
        scores=scorer.values(),
        tiebreaks=scorer.tiebreak_values(),
        samples=scorer.samples,
        fingerprint=plan.fingerprint.with_data(scorer.chain.hex()),
    )


class _Scorer:
    """Sums of the metric per site, over batches."""

    def __init__(self, gm: fx.GraphModule, sites: list[Site], metric: Metric, mean: Mean) -> None:
        self.gm = gm
        self.sites = sites
        self.metric = metric
        self.mean = mean
        self.samples = 0
        self.batches = 0
        self.base_sum = 0.0
        self.sums = [0.0] * len(sites)
        self.tiebreaks: list[float] | None = [0.0] * len(sites)
        self.chain = b""
        self.points = [_Point(gm, site, mean) for site in sites]
        self.executor = Executor(gm, list({p.node: None for p in self.points}))

    @property
    def base_value(self) -> float | None:
        return self.base_sum / self.samples if self.samples else None

    def values(self) -> list[float]:
        return [s / self.samples for s in self.sums] if self.samples else []

    def tiebreak_values(self) -> list[float]:
        return [s / self.samples for s in self.tiebreaks] if self.samples and self.tiebreaks is not None else []

    def run(
        self, batches: Iterator[Batch], total: int | None, resume: Any, fingerprint: Fingerprint, progress: bool | None
    ) -> None:
        done = self._restore(resume, fingerprint)
        bar = tqdm(
            total=None if total is None else total * len(self.sites), desc=f"scoring {len(self.sites)} sites",
            unit="run", disable=None if progress is None else not progress, leave=False,
        )  # fmt: skip
        seen = 0
        with bar, torch.no_grad():
            for index, batch in enumerate(batches):
                seen += 1
                self.chain = hashlib.sha256(self.chain + batch.digest()).digest()
                if index < done["batches"]:
                    if index + 1 == done["batches"] and self.chain.hex() != done["chain"]:
                        raise PlanError(f"{resume} belongs to other calibration data: remove it, or give the same data")
                    bar.update(len(self.sites))
                    continue
                self._batch(index, batch, bar)
                if resume is not None:
                    self._save(resume, fingerprint)
        if seen < done["batches"]:
            raise PlanError(
                f"{resume} was made from more batches than the loader gives now: remove it, or give the same data"
            )

    def _batch(self, index: int, batch: Batch, bar: Any) -> None:
        batch = batch.to(self.executor.device)
        try:
            base, state = self.executor.run(*batch.args, **batch.kwargs)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            notes = capture_info(self.gm).notes
            raise CalibrationError(
                f"batch {index} ({_shapes(batch)}) does not fit the captured graph: {'; '.join((why, *notes))}"
            ) from error
        _require_finite(base, f"the model's outputs on calibration batch {index}", lambda: self._first_bad(state))
        value, count = score(self.metric, base, batch, base)
        _require_number(value, f"the metric {self.metric.name!r} of the unchanged model on batch {index}")
        self.base_sum += value
        for i, point in enumerate(self.points):
            outputs = self.executor.rerun(state, {point.node: point.replacement(state)})
            _require_finite(outputs, f"{point.site.name}: with this site replaced, the outputs on batch {index}")
            value, n = score(self.metric, outputs, batch, base)
            _require_number(value, f"{point.site.name}: the metric {self.metric.name!r} on batch {index}")
            if n != count:
                raise CalibrationError(f"metric {self.metric.name!r} gave {n} values where it gave {count} before")
            self.sums[i] += value
            if self.tiebreaks is not None:
                self._tiebreak(i, outputs, base)
            bar.update()
        self.samples += count
        self.batches += 1

    def _first_bad(self, state: State) -> str:
        """Where in the graph the values stop being finite, as far as the kept values tell."""
        for point in self.points:
            for what, node in (("input", point.scan.args[0]), ("output", point.scan)):
                values = state.env.get(node)
                if isinstance(values, Tensor) and not bool(torch.isfinite(values).all()):
                    return f", first seen in the {what} of the scan at {point.site.name}"
        return ""

    def _tiebreak(self, i: int, outputs: Any, base: Any) -> None:
        # A small calibration set leaves many sites with equal accuracy; the shift of the outputs tells them apart.
        try:
            shift = kl(outputs, base)
        except (CalibrationError, IndexError):
            self.tiebreaks = None
            return
        assert self.tiebreaks is not None
        self.tiebreaks[i] += float(shift.sum())

    def _restore(self, path: Any, fingerprint: Fingerprint) -> dict[str, Any]:
        if path is None or not Path(path).exists():
            return {"batches": 0, "chain": ""}
        state = read_json(path, "calibration state")
        try:
            reason = Fingerprint.from_dict(state["fingerprint"]).difference(fingerprint)
            sums, ties = [float(v) for v in state["sums"]], state["tiebreaks"]
            restored = {"batches": int(state["batches"]), "chain": str(state["chain"])}
            self.base_sum, self.samples = float(state["base_sum"]), int(state["samples"])
            self.tiebreaks = None if ties is None else [float(v) for v in ties]
            if min(restored["batches"], self.samples) < 1 or not all(map(math.isfinite, (self.base_sum, *sums))):
                raise ValueError("its sums are of nothing or not finite")
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"{path} is not a calibration state: {error!r}; remove it to start again") from None
        if reason or len(sums) != len(self.sites):
            raise PlanError(f"{path} belongs to another run ({reason or 'other sites'}): remove it to start again")
        self.sums, self.batches = sums, restored["batches"]
        log.info("resuming after %d batches from %s", self.batches, path)
        return restored

    def _save(self, path: Any, fingerprint: Fingerprint) -> None:
        state = {
            "format": "vmeanba_fx.calibration", "version": 1, "fingerprint": fingerprint.to_dict(),
            "batches": self.batches, "chain": self.chain.hex(), "samples": self.samples,
            "base_sum": self.base_sum, "sums": self.sums, "tiebreaks": self.tiebreaks,
        }  # fmt: skip
        write_atomically(path, json.dumps(state))


class _Point:
    """Where a site's replacement enters the graph: its scan node, or the sub-graph that holds it."""

    def __init__(self, gm: fx.GraphModule, site: Site, mean: Mean) -> None:
        self.site = site
        self.mean = mean
        owner, scan = next((o, n) for o, n in scan_nodes(gm) if n.meta[SITE] == site.name)
        self.scan = scan
        self.patched: fx.GraphModule | None = None
        if owner is gm:
            self.node = scan
            return
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                module = read_attribute(gm, str(node.target))
                if isinstance(module, fx.GraphModule) and any(o is owner for o in graph_modules(module)):
                    self.node = node
                    self.patched = mean_scan(copy_graph(module), [site.name], mean=mean)
                    return
        raise CalibrationError(f"{site.name}: its scan lies in a sub-graph that the top-level graph does not reach")

    def replacement(self, state: State) -> Any:
        if self.patched is not None:
            return self.patched
        args = {k: state.value(v) if isinstance(v, fx.Node) else v for k, v in scan_arguments(self.scan).items()}
        return mean_scan_tensors(self.mean, **args)


def _batches(loader: Iterable[Any], transform_fn: Callable[[Any], Any] | None, limit: int | None) -> Iterator[Batch]:
    if isinstance(loader, Tensor):
        raise CalibrationError("the loader is a tensor: wrap it in a list, [images], to make it one batch")
    for raw in itertools.islice(loader, limit):
        yield unpack(raw, transform_fn)


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        n = len(loader)
    except TypeError:
        return limit
    return n if limit is None else min(n, limit)


def _require_finite(outputs: Any, what: str, where: Callable[[], str] = str) -> None:
    for t in pytree.tree_leaves(outputs):
        if isinstance(t, Tensor) and t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise CalibrationError(f"{what} are not finite (nan or inf){where()}; no plan was made")


def _require_number(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise CalibrationError(f"{what} is not finite ({value})")


def _describe_inputs(batch: Batch) -> list[dict[str, Any]]:
    """What :meth:`Plan.apply` needs to capture a fresh model again; empty where an input is neither tensor nor plain.

    Tensors are described by shape and dtype, numbers, strings, flags and ``None`` by their value.
    """
    out: list[dict[str, Any]] = []
    for key, v in [*enumerate(batch.args), *batch.kwargs.items()]:
        if isinstance(v, Tensor):
            out.append({"key": key, "shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")})
        elif v is None or isinstance(v, (bool, int, float, str)):
            out.append({"key": key, "value": v})
        else:
            return []
    return out


def _shapes(batch: Batch) -> str:
    leaves = pytree.tree_leaves((batch.args, batch.kwargs))
    return ", ".join(str(tuple(t.shape)) for t in leaves if isinstance(t, Tensor))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise CalibrationError(f"seed={seed!r}: give a whole number that is not negative")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: while CUDA sleeps, that would decide the caller's numbers on the GPU once it wakes.
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield
