"""find, score, apply and export. Each takes the parsed arguments and returns what to print."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.calibrate import calibrate
from ..capturing.capture import capture
from ..exporting.export import check_target, export
from ..files import unwritable
from ..plan import Plan
from ..report import report
from ..sites import Site, find_sites
from .arguments import CommandError, build_model


@dataclass(frozen=True)
class Outcome:
    """What a command did, as text and as JSON-ready data."""

    text: str
    data: dict[str, Any]


def find(args: argparse.Namespace) -> Outcome:
    """The sites of a model."""
    model = build_model(args.model, args.weights, seed=args.seed)
    loader = args.data.loader(batch=args.batch, size=args.size, seed=args.seed, batches=1, like=model)
    first = next(iter(loader))
    gm = capture(model, first if not isinstance(first, tuple | list) else first[0])
    sites = find_sites(gm)
    described = [_describe(s) for s in sites]
    data = {"model": args.model.text, "sites": described, "refused": [list(r) for r in sites.refused]}
    return Outcome(f"{sites}\n{len(sites)} sites", data)


def _describe(site: Site) -> dict[str, Any]:
    return site.to_dict() | {"flops": site.flops(), "flops_replaced": site.flops_replaced()}


def score(args: argparse.Namespace) -> Outcome:
    """Calibrate and write the plan."""
    if reason := unwritable(Path(args.out)):
        raise CommandError(reason)
    model = build_model(args.model, args.weights, seed=args.seed, device=args.device)
    plan = _calibrate(args, model, resume=args.resume, held_out=not args.no_held_out)
    plan.save(args.out)
    names = [s.name for s in plan.sites]
    data = {
        "out": args.out, "order": [names[i] for i in plan.order()],
        "impacts": {name: plan.impact(i) for i, name in enumerate(names)}, "plan": plan.to_dict(),
        "drops": plan.drops(), "correlation": plan.correlation(),
    }  # fmt: skip
    return Outcome(f"{plan}\nwritten to {args.out}", data)


def apply(args: argparse.Namespace) -> Outcome:
    """Apply a plan, or a choice made now, and write the model; ``export`` is the same with k = 0 by default."""
    check_target(args.out, args.format)
    model = build_model(args.model, args.weights, seed=args.seed, device=args.device)
    names = ("k", "max_drop", "speedup", "sites")
    choice = {name: getattr(args, name) for name in (*names, "exclude", "group_by")}
    if all(choice[name] is None for name in names):
        choice["k"] = 0
    if args.plan is None and args.calibration is not None:
        raise CommandError("--calibration goes with --plan: without a plan, --data is what everything is fitted to")
    refit = args.refit or False
    if args.plan is not None:
        _refuse_scoring_options(args)
        plan = Plan.load(args.plan)
        if args.calibration is None and (refit or plan.reduction.kind == "rank") and choice["k"] != 0:
            what = "--refit" if refit else "a plan of rank-r scans"
            raise CommandError(f"{what} needs the calibration data, which a plan file does not hold: --calibration DATA")
        loader = None if args.calibration is None else _loader(args, args.calibration, model)
        gm = plan.apply(model=model, calib_loader=loader, refit=refit, **choice)
    else:
        scored = choice["sites"] is None and choice["k"] != 0
        plan = _calibrate(args, model, score_sites=scored, held_out=choice["max_drop"] is not None)
        gm = plan.apply(refit=refit, **choice)
    found = report(gm)
    written = export(gm, None, args.out, args.format)
    return Outcome(f"{found}\n{written}", written.to_dict() | {"report": found.to_dict()})


def _calibrate(args: argparse.Namespace, model: nn.Module, **options: Any) -> Plan:
    return calibrate(
        model,
        _loader(args, args.data, model),
        metric=args.metric,
        mean=args.mean or "direction",
        reduce=args.reduce or "mean",
        rank=args.rank,
        energy=args.energy,
        fit=args.fit,
        score=args.score or "measured",
        refitted=bool(args.refitted),
        greedy=bool(args.greedy),
        group_by=args.group_by,
        exclude=args.exclude,
        max_batches=args.batches,
        seed=args.seed,
        **options,
    )


def _loader(args: argparse.Namespace, data: Any, model: nn.Module) -> Any:
    return data.loader(batch=args.batch, size=args.size, seed=args.seed, batches=args.batches, like=model)


def _refuse_scoring_options(args: argparse.Namespace) -> None:
    for name in ("metric", "mean", "reduce", "rank", "energy", "fit", "batches", "size", "score", "refitted", "greedy"):
        if getattr(args, name) is not None:
            raise CommandError(f"--{name} belongs to scoring and has no effect on a plan that is already there")
