"""The plan: what calibration found, what a choice of sites would do, and the step from there to a rewritten model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .batches import Batches
from .capture import capture, capture_info, is_captured
from .choice import Choice
from .errors import PlanError
from .files import parse_json, read_json, write_atomically
from .fingerprint import Fingerprint
from .fitting import AUTO_RANKS
from .fitting_refit import REFIT, Refit, refit_sites
from .fitting_sites import fit_sites
from .graph import SITE, copy_graph, scan_nodes
from .passes import (
    Pass,
    RankFit,
    channels_last,
    cleanup,
    drop_annihilated,
    fuse_shared,
    fuse_ss2d,
    mean_scan,
    merge_skips,
    rank_scan,
    run_passes,
)
from .passes.mean_scan import Mean, check_mean
from .reduction import Reduction
from .report import Report, attach_plan, attach_report, site_table
from .sites import Site

__all__ = ["Plan"]

_FORMAT = "vmeanba_fx.plan"
_VERSION = 1


@dataclass
class Plan:
    """Sites with their impact scores, and how to apply a choice of them.

    ``scores[i]`` is the metric with only site i replaced, ``base`` that of the unchanged model; :meth:`impact` is the
    paper's layer impact score, positive where the metric got worse. ``samples`` is how many samples were scored.
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
    graph: fx.GraphModule | None = field(default=None, repr=False, compare=False)
    data: Batches | None = field(default=None, repr=False, compare=False)
    fits: dict[str, RankFit] = field(default_factory=dict, repr=False, compare=False)

    # -- scores and choice ------------------------------------------------------------------------------------------

    def impact(self, index: int) -> float:
        """Layer impact score of site ``index``: how much worse the metric gets when only that site is replaced."""
        if self.base is None or not self.scores:
            raise PlanError("this plan has no scores: calibrate the model first")
        change = self.base - self.scores[index]
        return change if self.higher_is_better else -change

    def order(self) -> list[int]:
        """Site indices from least to most harmful. Ties go to the smaller shift of the outputs (KL), then by position."""
        ties = self.tiebreaks or [0.0] * len(self.sites)
        return sorted(range(len(self.sites)), key=lambda i: (self.impact(i), ties[i], i))

    def choose(
        self,
        k: int | None = None,
        *,
        max_drop: float | None = None,
        sites: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> list[str]:
        """Names of the sites to replace, in graph order. Give exactly one of ``k``, ``max_drop`` and ``sites``.

        Args:
            k: replace the k sites of least impact.
            max_drop: replace as many sites, least harmful first, as keep the *sum of their impacts* at or below this,
                in units of the metric. Impacts are measured one by one, so the sum is an estimate.
            sites: names or globs of the sites to replace.
            exclude: names or globs of sites that must stay.

        Raises:
            SiteError: ``k`` is not an int, negative or larger than what can be replaced; a name or glob matches
                nothing; not exactly one way of choosing is given.
        """
        return Choice(k, max_drop, sites, exclude).names(self)

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

    # -- applying ---------------------------------------------------------------------------------------------------

    def apply(
        self,
        k: int | None = None,
        *,
        max_drop: float | None = None,
        sites: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        refit: Refit = False,
        model: nn.Module | None = None,
        calib_loader: Iterable[Any] | None = None,
        skip_passes: Iterable[str] = (),
        verify: bool = False,
        dump: str | os.PathLike[str] | None = None,
    ) -> fx.GraphModule:
        """A new ``GraphModule`` with the chosen sites replaced (see :meth:`choose`). Plan and model stay as they are.

        Args:
            refit: True gives the layer that reads each replaced site out new weights, fitted to the original model's
                values on the calibration data (see :mod:`vmeanba_fx.passes.refit`); ``"all"`` also every later layer that
                writes into a residual sum, and the last one. No cost at run time.
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
        chosen = self.choose(k, max_drop=max_drop, sites=sites, exclude=exclude)
        gm = self._graph_for(model)
        info = capture_info(gm)
        passes = self._passes(chosen)
        if chosen and (refit or self.reduction.kind == "rank"):
            exact = [step for step in passes if step.name != "mean_scan"]
            passes = [*self._fitted(gm, chosen, refit, calib_loader), *exact]
        device = next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
        args = pytree.tree_map_only(Tensor, lambda t: t.to(device), (info.args, info.kwargs)) if verify else None
        gm, records = run_passes(gm, passes, skip=skip_passes, verify_args=args, dump=dump)
        attach_report(gm, Report.of(self, chosen, records, gm, gm.meta.pop(REFIT, ())))
        attach_plan(gm, self.to_dict())
        return gm

    def _passes(self, chosen: list[str]) -> list[Pass]:
        lossy = [Pass("mean_scan", partial(mean_scan, sites=chosen, mean=self.mean), exact=False)] if chosen else []
        exact = (drop_annihilated, merge_skips, fuse_ss2d, fuse_shared, channels_last, cleanup)
        return [*lossy, *(Pass(run.__name__, run, exact=True) for run in exact)]

    def _fitted(
        self, gm: fx.GraphModule, chosen: list[str], refit: Refit, loader: Iterable[Any] | None
    ) -> list[Pass]:
        """The lossy steps that need calibration data."""
        if refit not in (False, True, "all"):
            raise PlanError(f"refit={refit!r}: give True, False or 'all'")
        data = self.data if loader is None else Batches(loader, None, None, self.fingerprint.seed)
        ranked = self.reduction.kind == "rank"
        if data is None:
            raise PlanError(
                f"{'refit=True' if refit else 'reduce=rank'} is fitted to calibration data, which a plan loaded from a "
                "file does not hold: plan.apply(..., calib_loader=loader)"
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
            raise PlanError(f"the plan is of another model: it has no site named {', '.join(missing)}")
        mine = Fingerprint.of(gm, seed=self.fingerprint.seed, options=self.fingerprint.options)
        reason = self.fingerprint.difference(mine)
        if reason:
            raise PlanError(f"the plan is of another model ({reason}): calibrate this one")
        return gm

    def _example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = [], {}
        for item in self.inputs:
            example = item["value"] if "value" in item else torch.zeros(item["shape"], dtype=_dtype(item["dtype"]))
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
        lines = [self.table()]
        if self.base is not None:
            lines.append(f"{self.metric} of the unchanged model: {self.base:.6g} ({self.samples} samples)")
        lines += [f"{name}: not a site, {why}" for name, why in self.refused]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graph, JSON-ready."""
        return {
            "format": _FORMAT, "version": _VERSION, "metric": self.metric, "higher_is_better": self.higher_is_better,
            "mean": self.mean, "base": self.base, "samples": self.samples, "scores": self.scores,
            "tiebreaks": self.tiebreaks, "sites": [s.to_dict() for s in self.sites],
            "refused": [list(r) for r in self.refused], "inputs": self.inputs,
            "fingerprint": self.fingerprint.to_dict(),
        } | ({} if self.reduction.kind == "mean" else {"reduction": self.reduction.to_dict()})  # fmt: skip

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
            return cls._from_dict(content)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"{name} is not a valid plan: {error}") from None

    @classmethod
    def _from_dict(cls, d: dict[str, Any]) -> Plan:
        if d.get("format") != _FORMAT:
            raise ValueError(f"its format is {d.get('format')!r}, expected {_FORMAT!r}")
        if d.get("version") != _VERSION:
            raise ValueError(f"its version is {d.get('version')!r}, this release reads {_VERSION}")
        sites = [_site(s) for s in _typed(d, "sites", list)]
        if not sites or len({s.name for s in sites}) != len(sites):
            raise ValueError("site names are missing or not unique")
        scores, ties = _numbers(d, "scores"), _numbers(d, "tiebreaks")
        for name, values in (("scores", scores), ("tiebreaks", ties)):
            if len(values) not in (0, len(sites)):
                raise ValueError(f"{len(values)} {name} for {len(sites)} sites")
        base = d["base"]
        if (base is None) != (not scores) or (base is not None and not _is_number(base)):
            raise ValueError("base is missing or not a finite number")
        check_mean(_typed(d, "mean", str))
        inputs = _typed(d, "inputs", list)
        _check_inputs(inputs)
        refused = [(str(a), str(b)) for a, b in _typed(d, "refused", list)]
        return cls(
            sites, refused, _typed(d, "metric", str), _typed(d, "higher_is_better", bool), d["mean"],
            None if base is None else float(base), scores, ties, _typed(d, "samples", int),
            Fingerprint.from_dict(d["fingerprint"]), inputs,
            Reduction.from_dict(d["reduction"]) if "reduction" in d else Reduction(),
        )  # fmt: skip


def _typed(d: dict[str, Any], key: str, kind: type) -> Any:
    if key not in d:
        raise ValueError(f"{key} is missing")
    if not isinstance(d[key], kind) or (kind is int and isinstance(d[key], bool)):
        raise ValueError(f"{key} is a {type(d[key]).__name__}, expected {kind.__name__}")
    return d[key]


def _is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)


def _numbers(d: dict[str, Any], key: str) -> list[float]:
    values = _typed(d, key, list)
    if not all(map(_is_number, values)):
        raise ValueError(f"{key} holds something that is not a finite number")
    return [float(v) for v in values]


_FIELDS: dict[str, Callable[[Any], bool]] = {
    name: (lambda v, kind=kind: isinstance(v, kind) and (kind is bool or not isinstance(v, bool)))
    for name, kind in {
        "name": str, "groups": int, "channels": int, "state": int, "length": int, "dtype": str, "skip": bool,
        "gate": bool, "annihilated": bool, "reason": str,
    }.items()
}  # fmt: skip


def _site(d: Any) -> Site:
    if not isinstance(d, dict) or set(d) != set(_FIELDS):
        raise ValueError("a site with missing or unknown fields")
    for name, ok in _FIELDS.items():
        if not ok(d[name]):
            raise ValueError(f"a site whose {name} is {d[name]!r}")
    return Site(**d)


_MAX_ELEMENTS = 2**28  # of all example inputs together: reading a plan must not allocate without bound


def _check_inputs(inputs: list[Any]) -> None:
    elements = 0
    for item in inputs:
        if not isinstance(item, dict) or not isinstance(item.get("key"), (int, str)):
            raise ValueError(f"an input described as {str(item)[:80]}")
        if set(item) == {"key", "value"} and not isinstance(item["value"], (list, dict)):
            continue
        shape = item.get("shape")
        whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if set(item) != {"key", "shape", "dtype"} or not whole or _dtype(item["dtype"]) is None:
            raise ValueError(f"an input described as {str(item)[:80]}")
        elements += math.prod(shape)
    if elements > _MAX_ELEMENTS:
        raise ValueError(f"example inputs of {elements} elements")


def _dtype(name: Any) -> torch.dtype | None:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) else None
