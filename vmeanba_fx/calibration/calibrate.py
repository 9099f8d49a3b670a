"""Scores of the sites of a model on calibration data, and the plan that comes of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from tqdm.auto import tqdm

from ..capturing.capture import capture
from ..choice import by_impact, check_group_by, match, units_of
from ..errors import CalibrationError
from ..fitting.rank_fits import fit_sites, reachable
from ..fitting.reduction import Fit, Reduce, Reduction
from ..fitting.refits import refit_each
from ..passes.mean_scan import Mean, check_mean
from ..plan import Plan
from ..sites import SiteList, find_sites
from .batches import Batches, describe_inputs, seeded
from .bootstrap import intervals, told_apart
from .cost import cost_table
from .curve import Curve, Unit, Walk
from .fingerprint import Fingerprint
from .gradient import estimate_sites
from .metrics import Batch, Metric, resolve_metric
from .replacing import Replacer
from .resume import Saved
from .scoring import Runner, measure_sites
from .tally import BlockSums, Tally

Score = Literal["measured", "gradient", "both"]

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module | fx.GraphModule | ExportedProgram,
    calib_loader: Iterable[Any],
    *,
    metric: str | Callable[..., Any] | None = None,
    mean: Mean = "direction",
    reduce: Reduce = "mean",
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    fit: Fit | None = None,
    score: Score = "measured",
    refitted: bool = False,
    greedy: bool = False,
    held_out: bool = True,
    exclude: str | Sequence[str] = (),
    group_by: str | None = None,
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
        calib_loader: batches of inputs, with or without labels (see :func:`.metrics.unpack`).
        metric: ``"accuracy"``, ``"loss"``, ``"kl"``, all three of class scores (batch, classes, ...), or
            ``callable(outputs, batch) -> float tensor``, for language models and regression; by default accuracy (with
            gradients, loss) where there are labels and kl where there are none. Labels of -100 are left out, boolean
            ones are the classes 0 and 1.
        mean: variant of the replacement that is scored, see :mod:`vmeanba_fx.passes.mean_scan`.
        reduce: ``"mean"``, the paper's block, or ``"rank"``: scans of ``rank`` channels per direction with projections
            fitted to the data, see :mod:`vmeanba_fx.passes.rank_scan`. Three more passes over the loader, whatever the
            number of sites. Scores are of the fitted site, see ``refitted``.
        rank: channels per direction (4), or ``"auto"``: the least of 1, 2, 4, 8, 16 that explains ``energy`` of a scan.
        energy: share of the scan's energy for ``rank="auto"`` (0.9).
        fit: what rank-r fits keep: ``"scan"`` (default), the scan's own output, or ``"outputs"``, of it what the class
            scores depend on (:mod:`vmeanba_fx.fitting.sensitivity`). That is one more pass, forwards and backwards.
        score: ``"measured"`` runs the model once per site and batch. ``"gradient"`` estimates all impacts from a few
            backward passes per batch (:mod:`.gradient`). ``"both"`` does both and tells their correlation.
        refitted: score each site with the layer that reads it out refitted, as ``apply(refit=True)`` will do: a site that
            costs much by itself may cost little then. One or two more passes per site.
        greedy: after every replacement, score the remaining sites again on top of those replaced, so that interactions
            count; ``apply(k=)`` then follows that order. About n/2 times the cost, for n sites.
        held_out: rank on one half of the data and measure on the other half what the first 1, 2, ... sites replaced
            together cost, as ``apply(max_drop=)`` needs. Half the batches are held out, of a single batch every second
            image. The scores themselves, and with them ``k=`` without ``greedy``, are of all data, and so are the fits of
            ``reduce="rank"``.
        exclude: names or globs of sites that ``greedy`` and ``held_out`` leave alone.
        group_by: ``"module"`` replaces the scans of a module together there, and in choosing by default.
        transform_fn: maps a batch of the loader to ``(inputs, labels)``, or to a :class:`vmeanba_fx.Batch`.
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
    check_group_by(group_by)
    _check_options(score, refitted, max_batches)
    reduction = Reduction.of(reduce, rank, energy, fit)
    with seeded(seed):
        batches = Batches(calib_loader, transform_fn, max_batches, seed)
        chosen = _metric(metric, score, batches.first.labels is not None)
        gm, sites = _captured(model, batches.first, dynamic_size, reduction)
        options = {"mean": mean, "metric": chosen.name, "dynamic_size": dynamic_size} | reduction.options()
        options |= {"refitted": True} if refitted else {}
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
            group_by=group_by,
            graph=gm,
            data=batches,
        )
        units = units_of(sites, group_by, match(sites, exclude, "exclude"))
        if before_scoring is not None:
            before_scoring(plan)
        if not score_sites:
            return plan
        saved = Saved(resume, plan.fingerprint)
        runner = Runner(gm, sites, chosen, _replacer(plan, gm, sites, batches, refitted))
        return _scored(plan, runner, batches, saved, units, _ways(score, greedy, held_out), seed, progress)


def _check_options(score: str, refitted: bool, max_batches: int | None) -> None:
    if score not in get_args(Score):
        raise CalibrationError(f"score={score!r}: choose one of {', '.join(map(repr, get_args(Score)))}")
    if refitted and score != "measured":
        raise CalibrationError(f"refitted=True needs score='measured', not {score!r}")
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise CalibrationError(f"max_batches={max_batches!r}: give a whole number of at least 1, or None for all")


def _captured(
    model: nn.Module | fx.GraphModule | ExportedProgram, first: Batch, dynamic_size: bool, reduction: Reduction
) -> tuple[fx.GraphModule, SiteList]:
    """The graph and its sites, those that the kind of replacement can be made at."""
    with torch.random.fork_rng(devices=[]):  # a second pass over the loader, without a capture, draws the same
        gm = capture(model, first.args, first.kwargs, dynamic_size=dynamic_size)
        sites = find_sites(gm)
    return gm, reachable(gm, sites) if reduction.kind == "rank" else sites


def _replacer(plan: Plan, gm: fx.GraphModule, sites: SiteList, batches: Batches, refitted: bool) -> Replacer:
    """What replaces single sites while they are scored. Rank-r replacements are fitted here, and refits on top of them."""
    if plan.reduction.kind == "rank":
        plan.fits.update(fit_sites(gm, sites, batches, plan.reduction))
    replacer = Replacer(gm, sites, plan.mean, plan.fits)
    return Replacer(gm, sites, plan.mean, plan.fits, refit_each(gm, sites, batches, replacer)) if refitted else replacer


def _scored(
    plan: Plan, runner: Runner, batches: Batches, saved: Saved, units: Sequence[Unit], ways: Sequence[str], seed: int,
    progress: bool | None,
) -> Plan:  # fmt: skip
    """``plan`` with scores and curve: all passes over the data, under one progress bar."""
    if progress or (progress is None and sys.stderr.isatty()):
        with torch.no_grad():
            text = cost_table(runner, batches.first, batches.expected(), ways, "held out" in ways)
        tqdm.write(text, file=sys.stderr)
    bar = tqdm(
        total=_runs(batches.expected(), len(plan.sites), len(units), ways), desc=f"scoring {len(plan.sites)} sites",
        unit="run", disable=None if progress is None else not progress, leave=False,
    )  # fmt: skip
    with bar:
        tallies: dict[str, Tally] = {}
        if "measured" in ways:
            with torch.no_grad():
                tallies["measured"] = measure_sites(runner, batches, saved, bar)
        if "gradient" in ways:
            tallies["gradient"] = estimate_sites(runner, batches, saved, bar, seed=seed)
        plan = _with_scores(plan, tallies, seed)
        tally = tallies.get("measured") or tallies["gradient"]
        judged = "held out" in ways and bool(tally.held_out.samples)
        walk = Walk(runner, batches, saved, bar, seed=seed, gradient="measured" not in ways)
        curve = None
        if "greedy" in ways and units:
            curve = walk.greedy(units, whole=not judged)
        if judged and units:
            order = _impacts(plan, tally.ranking)
            curve = curve or Curve(tuple(by_impact(units, *order)), False)
            with torch.no_grad():
                curve = walk.judge(curve, _span(plan))
    return replace(plan, curve=curve, fingerprint=plan.fingerprint.with_data(batches.chain))


def _metric(metric: str | Callable[..., Any] | None, score: Score, has_labels: bool) -> Metric:
    if score == "measured":
        return resolve_metric(metric, has_labels)
    found = resolve_metric(("loss" if has_labels else "kl") if metric is None else metric, has_labels)
    if found.name == "accuracy":
        raise CalibrationError(f"score={score!r}: the accuracy has no gradient; use metric='loss' or 'kl'")
    return found


def _ways(score: Score, greedy: bool, held_out: bool) -> list[str]:
    scored = ["measured", "gradient"] if score == "both" else [score]
    return scored + ["greedy"] * greedy + ["held out"] * held_out


def _runs(batches: int | None, sites: int, units: int, ways: Sequence[str]) -> int | None:
    """Steps of the progress bar."""
    if batches is None:
        return None
    half = (batches + 1) // 2
    steps = {"measured": batches * sites, "gradient": batches, "held out": max(batches - half, 1) * units}
    steps["greedy"] = (half if "held out" in ways else batches) * units * (units + 1) // 2
    return sum(steps[way] for way in ways)


def _with_scores(plan: Plan, tallies: dict[str, Tally], seed: int) -> Plan:
    """``plan`` with what was scored: means over all data, and how far they can be trusted."""
    n = len(plan.sites)
    for way, tally in tallies.items():
        base, *rest = tally.all.means()
        if way == "measured":
            plan = replace(plan, base=base, scores=rest[:n], tiebreaks=rest[n:], samples=tally.all.samples)
        else:
            plan = replace(plan, base=base if plan.base is None else plan.base, samples=tally.all.samples)
            plan = replace(plan, estimates=[plan.worse(value, base) for value in rest])
    counts, sums = (tallies.get("measured") or tallies["gradient"]).all.tensors()
    worse = sums[:, :1] - sums[:, 1 : 1 + n] if plan.higher_is_better else sums[:, 1 : 1 + n] - sums[:, :1]
    return replace(
        plan,
        intervals=intervals(counts, worse, seed=seed, span=_span(plan)),
        apart=told_apart(counts, worse, plan.order(), seed=seed),
    )


def _impacts(plan: Plan, half: BlockSums) -> tuple[list[float], list[float]]:
    """Impacts and tie breaks of the sites on one half of the data."""
    n = len(plan.sites)
    base, *rest = half.means()
    return [plan.worse(value, base) for value in rest[:n]], rest[n:]


def _span(plan: Plan) -> float | None:
    """The most that one image can change the metric by, where that is known."""
    return 1.0 if plan.metric == "accuracy" else None
