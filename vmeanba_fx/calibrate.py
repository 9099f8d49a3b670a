"""The paper's layer impact score: how much a metric changes when only that site is replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from tqdm.auto import tqdm

from .batches import Batches, describe_inputs, seeded
from .capture import capture
from .errors import CalibrationError
from .fingerprint import Fingerprint
from .fitting_sites import fit_sites, reachable
from .metrics import resolve_metric
from .passes.mean_scan import Mean, check_mean
from .plan import Plan
from .reduction import Reduce, Reduction
from .replacing import Replacer
from .resume import Saved
from .scoring import Runner, measure_sites
from .sites import find_sites

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    loader: Iterable[Any],
    *,
    metric: str | Callable[..., Any] | None = None,
    mean: Mean = "direction",
    reduce: Reduce = "mean",
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
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
        reduce: ``"mean"``, the paper's block, or ``"rank"``: scans of ``rank`` channels per direction with projections
            fitted to the data, see :mod:`vmeanba_fx.passes.rank_scan`. One more pass over the loader.
        rank: channels per direction (4), or ``"auto"``: the least of 1, 2, 4, 8, 16 that explains ``energy`` of a scan.
        energy: share of the scan's energy for ``rank="auto"`` (0.9).
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
    reduction = Reduction.of(reduce, rank, energy)
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise CalibrationError(f"max_batches={max_batches!r}: give a whole number of at least 1, or None for all")
    with seeded(seed):
        batches = Batches(loader, transform_fn, max_batches, seed)
        gm = capture(model, batches.first.args, batches.first.kwargs, dynamic_size=dynamic_size)
        sites = find_sites(gm)
        if reduction.kind == "rank":
            sites = reachable(gm, sites)
        chosen = resolve_metric(metric, batches.first.labels is not None)
        options = {"mean": mean, "metric": chosen.name, "dynamic_size": dynamic_size} | reduction.options()
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
            inputs=describe_inputs(batches.first),
            reduction=reduction,
            graph=gm,
            data=batches,
        )
        if before_scoring is not None:
            before_scoring(plan)
        if not score_sites:
            return plan
        if reduction.kind == "rank":
            plan.fits.update(fit_sites(gm, sites, batches, reduction))
            batches = batches.unread()
        saved = Saved(resume, plan.fingerprint)
        runner = Runner(gm, sites, chosen, Replacer(gm, sites, mean, plan.fits))
        total = batches.expected()
        bar = tqdm(
            total=None if total is None else total * len(sites), desc=f"scoring {len(sites)} sites",
            unit="run", disable=None if progress is None else not progress, leave=False,
        )  # fmt: skip
        with bar, torch.no_grad():
            tally = measure_sites(runner, batches, saved, bar)
    base, *rest = tally.all.means()
    return replace(
        plan,
        base=base,
        scores=rest[: len(sites)],
        tiebreaks=rest[len(sites) :],
        samples=tally.all.samples,
        fingerprint=plan.fingerprint.with_data(batches.chain),
    )
