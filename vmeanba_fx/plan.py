"""The plan: what calibration found, what a choice of sites would do, and the step from there to a rewritten model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .calibration.batches import Batches
from .calibration.bootstrap import spearman
from .calibration.curve import Curve
from .calibration.fingerprint import Fingerprint
from .capturing.capture import capture, capture_info, is_captured
from .capturing.confinement import one_at_a_time
from .capturing.copies import device_of, to_device
from .choice import Choice, by_impact
from .errors import PlanError
from .files import parse_json, read_json, write_atomically
from .fitting.least_squares import AUTO_RANKS
from .fitting.rank_fits import fit_sites
from .fitting.reduction import Reduction
from .fitting.refits import REFIT, Refit, refit_sites
from .graph import SITE, copy_graph, scan_nodes
from .passes import (
    Pass,
    RankFit,
    channels_last,
    cleanup,
    drop_annihilated,
    flatten_positions,
    fuse_means,
    fuse_shared,
    fuse_ss2d,
    join_scans,
    mean_scan,
    merge_skips,
    rank_scan,
    run_passes,
)
from .passes.mean_scan import Mean
from .plan_file import dtype_of, plan_dict, plan_fields
from .report import Report, Speed, attach_plan, attach_report, plan_text, site_table
from .sites import Site
from .timing import Times, device_name, measure_times

__all__ = ["Plan"]

_NO_SCORES = "this plan has no scores: calibrate the model first"


@dataclass
class Plan:
    """Sites with their impact scores, and how to apply a choice of them.

    ``scores[i]`` is the metric with only site i replaced, ``base`` that of the unchanged model; :meth:`impact` is the
    paper's layer impact score, positive where the metric got worse. ``estimates[i]`` is the gradient score: what the
    impact of site i would be by the derivatives of the unchanged model. Either may be empty. ``samples`` is how many
    samples were scored, ``intervals[i]`` the 95 % bootstrap interval (low, high) of impact i, ``apart[r]`` whether the
    impacts of the sites ranked r and r+1 differ beyond chance. ``curve`` is the metric with several sites replaced
    together, in units of ``group_by``.
    """

    sites: list[Site]
    refused: list[tuple[str, str]]
    metric: str
    higher_is_better: bool
    mean: Mean
    base: float | None
    scores: list[float]
    tiebreaks: list[float]
    samples: int
    fingerprint: Fingerprint
    inputs: list[dict[str, Any]] = field(default_factory=list)
    reduction: Reduction = field(default_factory=Reduction)
    estimates: list[float] = field(default_factory=list)
    intervals: list[tuple[float, float]] = field(default_factory=list)
    apart: list[bool] = field(default_factory=list)
    group_by: str | None = None
    curve: Curve | None = None
    graph: fx.GraphModule | None = field(default=None, compare=False)
    data: Batches | None = field(default=None, compare=False)
    fits: dict[str, RankFit] = field(default_factory=dict, compare=False)
    times: Times | None = field(default=None, compare=False)

    # -- scores and choice ------------------------------------------------------------------------------------------

    @property
    def scored(self) -> bool:
        """Whether sites can be ranked."""
        return self.base is not None and bool(self.scores or self.estimates)

    def impact(self, index: int) -> float:
        """Layer impact score of site ``index``: how much worse the metric gets when only that site is replaced.

        Measured where the plan holds measured scores, estimated by gradients where it does not.
        """
        if not self.scored:
            raise PlanError(_NO_SCORES)
        return self.worse(self.scores[index]) if self.scores else self.estimates[index]

    def impacts(self) -> list[float]:
        """:meth:`impact` of every site."""
        return [self.impact(i) for i in range(len(self.sites))] if self.sites else []

    def drops(self) -> list[float]:
        """How much worse the metric is on the held-out images with the first 1, 2, ... units of ``curve`` replaced."""
        return [] if self.curve is None else [self.worse(v, self.curve.base) for v in self.curve.values]

    def worse(self, value: float, base: float | None = None) -> float:
        """By how much ``value`` of the metric is worse than ``base`` (by default, that of the unchanged model)."""
        base = self.base if base is None else base
        if base is None:
            raise PlanError(_NO_SCORES)
        change = base - value
        return change if self.higher_is_better else -change

    def correlation(self) -> float | None:
        """Spearman's rank correlation of measured and gradient scores; None where one is missing or does not vary."""
        if not (self.scores and self.estimates):
            return None
        return spearman([self.worse(v) for v in self.scores], self.estimates)

    def order(self) -> list[int]:
        """Site indices from least to most harmful. Ties go to the smaller shift of the outputs (KL), then by position."""
        return [i for (i,) in by_impact([(i,) for i in range(len(self.sites))], self.impacts(), self.tiebreaks)]

    def choose(
        self,
        k: int | None = None,
        *,
        max_drop: float | None = None,
        speedup: float | None = None,
        sites: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        group_by: str | None = None,
    ) -> list[str]:
        """Names of the sites to replace, in graph order. Give one of ``k``, ``max_drop``, ``speedup`` and ``sites``.

        Args:
            k: replace the k sites of least impact; the first k of the greedy order where the plan has one.
            max_drop: replace sites one after the other, least harmful first, and stop before the metric falls by more
                than this, in units of the metric. Judged by measurements of the first 1, 2, 3, ... sites replaced
                together, on images that had no part in the ranking.
            speedup: the sites that together make the model this many times faster with the least sum of impacts, by
                times measured now on the model's device (:mod:`vmeanba_fx.timing`).
            sites: names or globs of the sites to replace.
            exclude: names or globs of sites that must stay.
            group_by: ``"module"`` replaces all scans of a module together, and ``k`` counts modules. By default what
                the plan was calibrated with.

        Raises:
            SiteError: ``k`` is not an int, negative or larger than what can be replaced; a name or glob matches
                nothing; not exactly one way of choosing is given; the speedup cannot be reached.
            PlanError: the plan does not hold what the choice needs.
        """
        return Choice(k, max_drop, speedup, sites, exclude, group_by).names(self, self.measure_times)

    def flops_replaced(self, site: Site, cleaned: bool = True) -> int:
        """Operations of the replaced site; ``cleaned``: the exact passes remove what a LayerNorm absorbs."""
        if self.reduction.kind == "mean":
            return (site if cleaned else replace(site, annihilated=False)).flops_replaced()
        fit = self.fits.get(site.name)
        rank = fit.rank if fit is not None else self.reduction.rank
        return site.flops_rank(rank if isinstance(rank, int) else min(AUTO_RANKS[-1], site.channels))

    def check_choice(self, k: int | None = None, **choice: Any) -> None:
        """Raise what :meth:`choose` raises for a choice that cannot be made; needs no scores."""
        Choice(k, **choice).check(self)

    def measure_times(self, model: nn.Module | None = None) -> Times:
        """Time the optimised model on its device, as it is and with sites replaced; measured once, then remembered.

        Inputs have the size of the first calibration batch.
        """
        return self._times_of(self._graph_for(model))

    def _times_of(self, gm: fx.GraphModule, loader: Iterable[Any] | None = None) -> Times:
        if self.times is None or self.times.device != device_name(gm):
            info = capture_info(gm)
            example = self._example_inputs() if self.inputs else (info.args, info.kwargs)
            args, kwargs = to_device(example, device_of(gm))

            def rewrite(names: list[str]) -> fx.GraphModule:
                return run_passes(copy_graph(gm), self._steps(gm, names, loader=loader))[0]

            ranks = {name: fit.rank for name, fit in self.fits.items()}
            self.times = measure_times(self.sites, rewrite, args, kwargs, ranks)
        return self.times

    # -- applying ---------------------------------------------------------------------------------------------------

    @one_at_a_time
    def apply(
        self,
        k: int | None = None,
        *,
        max_drop: float | None = None,
        speedup: float | None = None,
        sites: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        group_by: str | None = None,
        refit: Refit = False,
        model: nn.Module | None = None,
        calib_loader: Iterable[Any] | None = None,
        skip_passes: Iterable[str] = (),
        verify: bool = False,
        dump: str | os.PathLike[str] | None = None,
    ) -> fx.GraphModule:
        """A new ``GraphModule`` with the chosen sites replaced (see :meth:`choose`). Plan and model stay as they are.

        Args:
            refit: True, or ``"sites"``, gives the layer that reads each replaced site out new weights, fitted to the original
                model's values on the calibration data (see :mod:`vmeanba_fx.passes.refit`); ``"all"`` also every later
                layer that writes into a residual sum, and the last one. No cost at run time.
            model: where the plan was loaded from a file, the model to rewrite. Its graph and weights must be those
                the plan was made from.
            calib_loader: calibration batches for ``refit`` and for ``reduce="rank"``, where the plan was loaded from a
                file (it keeps the scores, not the data and fits) or other data are wanted.
            skip_passes: names of passes to leave out, for instance ``"drop_annihilated"`` to keep the literal block.
            verify: run every exact pass before and after on the captured inputs and name the one that moved an output.
            dump: folder for the readable graph after each pass.

        Raises:
            SiteError: see :meth:`choose`.
            PlanError: no model is at hand, or it is not the one of this plan; or no data are, where they are needed.
        """
        gm = self._graph_for(model)
        choice = Choice(k, max_drop, speedup, sites, exclude, group_by)
        chosen = choice.names(self, lambda: self._times_of(gm, calib_loader))
        info = capture_info(gm)
        passes = self._steps(gm, chosen, refit, calib_loader)
        args = to_device((info.args, info.kwargs), device_of(gm)) if verify else None
        gm, records = run_passes(gm, passes, skip=skip_passes, verify_args=args, dump=dump)
        speed = None
        if speedup is not None and self.times is not None:
            predicted = self.times.speedup(i for i, s in enumerate(self.sites) if s.name in chosen)
            speed = Speed(speedup, predicted, self.times.against(gm), self.times.device)
        attach_report(gm, Report.of(self, chosen, records, gm, gm.meta.pop(REFIT, ()), speed, max_drop))
        attach_plan(gm, self.to_dict())
        return gm

    def _steps(
        self, gm: fx.GraphModule, chosen: list[str], refit: Refit = False, loader: Iterable[Any] | None = None
    ) -> list[Pass]:
        passes = self._passes(chosen)
        if not chosen or not (refit or self.reduction.kind == "rank"):
            return passes
        return [*self._fitted(gm, chosen, refit, loader), *(step for step in passes if step.name != "mean_scan")]

    def _passes(self, chosen: list[str]) -> list[Pass]:
        lossy = [Pass("mean_scan", partial(mean_scan, sites=chosen, mean=self.mean), exact=False)] if chosen else []
        exact = (
            drop_annihilated, merge_skips, fuse_ss2d, join_scans, fuse_shared, fuse_means, channels_last, flatten_positions,
            cleanup,
        )  # fmt: skip
        return [*lossy, *(Pass(run.__name__, run, exact=True) for run in exact)]

    def _fitted(
        self, gm: fx.GraphModule, chosen: list[str], refit: Refit, loader: Iterable[Any] | None
    ) -> list[Pass]:
        """The lossy steps that need calibration data."""
        if refit not in (False, True, "sites", "all"):
            raise PlanError(f"refit={refit!r}: give False, True (the same as 'sites') or 'all'")
        data = self.data if loader is None else Batches(loader, None, None, self.fingerprint.seed)
        ranked = self.reduction.kind == "rank"
        if data is None:
            raise PlanError(
                f"{f'refit={refit!r}' if refit else 'a rank-r scan'} is fitted to calibration data, which a plan loaded from "
                "a file does not hold: plan.apply(..., calib_loader=loader)"
            )
        steps = [Pass("mean_scan", partial(mean_scan, sites=chosen, mean=self.mean), exact=False)]
        if ranked:
            fits = self.fits if loader is None else {}
            missing = [s for s in self.sites if s.name in chosen and s.name not in fits]
            self.fits = fits = fits | fit_sites(gm, missing, data, self.reduction)
            steps = [Pass("rank_scan", partial(rank_scan, fits={name: fits[name] for name in chosen}), exact=False)]
        if refit:
            run = partial(refit_sites, original=copy_graph(gm), sites=chosen, data=data, how=refit)
            steps.append(Pass("refit", run, exact=False))
        return steps

    def _graph_for(self, model: nn.Module | None) -> fx.GraphModule:
        if model is None:
            if self.graph is None:
                raise PlanError("this plan was loaded from a file: pass the model too, plan.apply(..., model=model)")
            return copy_graph(self.graph)
        if not self.inputs and not is_captured(model):
            raise PlanError(
                "the plan does not describe the model's nested inputs: "
                "plan.apply(..., model=vmeanba_fx.capture(model, example_inputs))"
            )
        gm = capture(model, *self._example_inputs(), dynamic_size=self.fingerprint.options.get("dynamic_size") is True)
        scans = {node.meta[SITE] for _, node in scan_nodes(gm)}
        missing = [s.name for s in self.sites if s.name not in scans]
        if missing:
            raise PlanError(f"the plan is of another model: it has no site named {', '.join(missing)[:300]}")
        mine = Fingerprint.of(gm, seed=self.fingerprint.seed, options=self.fingerprint.options)
        reason = self.fingerprint.difference(mine)
        if reason:
            raise PlanError(f"the plan is of another model ({reason}): calibrate this one")
        return gm

    def _example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = [], {}
        for item in self.inputs:
            example = item["value"] if "value" in item else torch.zeros(item["shape"], dtype=dtype_of(item["dtype"]))
            if isinstance(item["key"], int):
                args.append(example)
            else:
                kwargs[item["key"]] = example
        return tuple(args), kwargs

    # -- printing and files -----------------------------------------------------------------------------------------

    def table(self, chosen: Iterable[str] = ()) -> str:
        """The sites with shape, kind, impact and FLOPs; with ``chosen``, which of them are replaced."""
        return site_table(self, set(chosen))

    def __str__(self) -> str:
        return plan_text(self)

    __repr__ = __str__  # what a notebook shows

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graph and times, JSON-ready."""
        return plan_dict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is complete or not there at all."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan. Nothing in the file is executed; everything is checked.

        Raises:
            PlanError: the file is missing, damaged, too large, too deep, or not a plan of this version.
        """
        return cls._checked(read_json(path, "plan"), str(Path(path)))

    @classmethod
    def loads(cls, text: str, name: str = "the text") -> Plan:
        """The same from a file's content; ``name`` stands for it in errors."""
        return cls._checked(parse_json(text.encode(), name, "plan"), name)

    @classmethod
    def _checked(cls, content: dict[str, Any], name: str) -> Plan:
        try:
            return cls(**plan_fields(content))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"{name} is not a valid plan: {str(error)[:300]}") from None
