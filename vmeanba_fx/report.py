"""What was done to a model: one object whose ``str()`` is the table and whose ``to_dict()`` is the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import fx

from .errors import VMeanbaError
from .files import fields_of, is_count, is_flag, is_name, is_number, is_text, list_of, names_to
from .graph import NOT_FUSED, REPORT, SITE, graph_modules
from .passes.manager import PassRecord

if TYPE_CHECKING:
    from .calibration.curve import Curve
    from .plan import Plan

__all__ = ["Report", "report"]

_PLAN = "vmeanba_fx.plan"


@dataclass(frozen=True)
class Speed:
    """How many times faster than the exactly optimised model: asked for, predicted and measured, on ``device``."""

    asked: float
    predicted: float
    measured: float
    device: str

    def __str__(self) -> str:
        return (
            f"speedup {self.asked:g} asked for, {self.predicted:.3f} predicted, {self.measured:.3f} measured "
            f"({self.device}, against the exact passes alone)"
        )


@dataclass(frozen=True)
class Report:
    """``chosen``: names of the replaced sites. ``table``: all sites as printed. ``passes``: what each pass changed.

    ``ranks``: channels per direction of the replaced sites, with ``reduce="rank"``. ``refitted``: one sentence per layer.
    ``unfused``: why the exact passes left a site on the scanned copies of its map, by site.
    ``speed`` and ``judged``: what came of ``speedup=`` and ``max_drop=``.
    ``flops_before``/``flops_after``: operations of all scans at batch 1, as the paper's authors count them.
    """

    chosen: tuple[str, ...]
    metric: str
    base: float | None
    impacts: dict[str, float]
    mean: str
    flops_before: int
    flops_after: int
    passes: tuple[PassRecord, ...]
    table: str
    ranks: dict[str, int] = field(default_factory=dict)
    refitted: tuple[str, ...] = ()
    unfused: dict[str, str] = field(default_factory=dict)
    speed: Speed | None = None
    judged: str = ""

    @classmethod
    def of(
        cls, plan: Plan, chosen: list[str], records: list[PassRecord], gm: fx.GraphModule,
        refitted: Iterable[object] = (), speed: Speed | None = None, max_drop: float | None = None,
    ) -> Report:  # fmt: skip
        impacts = {s.name: plan.impact(i) for i, s in enumerate(plan.sites)} if plan.scored else {}
        # The literal block keeps its scan unless the exact pass removed it.
        cleaned = any(r.name == "drop_annihilated" for r in records)
        after = sum(s.flops() if s.name not in chosen else plan.flops_replaced(s, cleaned) for s in plan.sites)
        before = sum(s.flops() for s in plan.sites)
        judgement = ""
        if max_drop is not None and plan.curve is not None:
            judgement = judged(plan, plan.curve, len(chosen), max_drop)
        return cls(
            tuple(chosen), plan.metric, plan.base, impacts, plan.mean, before, after, tuple(records), plan.table(chosen),
            {name: plan.fits[name].rank for name in chosen if name in plan.fits}, tuple(map(str, refitted)),
            reasons(gm), speed, judgement,
        )  # fmt: skip

    @property
    def how(self) -> str:
        """The replacement in words."""
        if not self.ranks:
            return f"mean={self.mean!r}"
        ranks = sorted(set(self.ranks.values()))
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} to {ranks[-1]}"

    def __str__(self) -> str:
        total = len(self.chosen)
        kind = f"{total} site{'s' if total != 1 else ''} replaced (lossy, {self.how})" if total else "no site replaced"
        lines = [
            self.table,
            f"{kind}; scan FLOPs {self.flops_before:,} -> {self.flops_after:,} per image",
            *([] if self.speed is None else [str(self.speed)]),
            *([self.judged] if self.judged else []),
            *map(str, self.passes),
            *self.refitted,
            *(f"{site}: not fused, {why}" for site, why in self.unfused.items()),
        ]
        return "\n".join(lines)

    __repr__ = __str__  # what a notebook shows

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": list(self.chosen), "metric": self.metric, "base": self.base, "impacts": self.impacts,
            "mean": self.mean, "ranks": self.ranks, "refitted": list(self.refitted),
            "flops_before": self.flops_before, "flops_after": self.flops_after,
            "passes": [p.to_dict() for p in self.passes], "unfused": self.unfused,
            "speed": None if self.speed is None else asdict(self.speed), "judged": self.judged,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Report:
        """The report of :meth:`to_dict`, with its ``table`` added.

        Raises:
            ValueError: it is not that of a report.
        """
        for name, ok in _FIELDS.items():
            if not ok(d[name]) if name in d else name in _NEEDED:
                raise ValueError(f"a report whose {name} is {repr(d.get(name))[:80]}")
        given = {name: d[name] for name in _FIELDS if name in d}
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        known["passes"] = tuple(PassRecord(**record) for record in d["passes"])
        if known.get("speed") is not None:
            known["speed"] = Speed(**known["speed"])
        return cls(**known)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "chosen": list_of(is_name), "metric": is_name, "base": lambda v: v is None or is_number(v), "impacts": names_to(is_number),
    "mean": is_name, "flops_before": is_count, "flops_after": is_count, "table": lambda v: is_text(v, 10**6),
    "passes": list_of(fields_of(
        name=is_name, exact=is_flag, nodes_before=is_count, nodes_after=is_count, seconds=is_number, changed=is_flag
    )),
    "ranks": names_to(is_count), "refitted": list_of(is_text), "unfused": names_to(is_text), "judged": is_text,
    "speed": lambda v: v is None or fields_of(asked=is_number, predicted=is_number, measured=is_number, device=is_name)(v),
}  # fmt: skip
_NEEDED = {f.name for f in fields(Report) if f.default is MISSING and f.default_factory is MISSING}


def reasons(gm: fx.GraphModule) -> dict[str, str]:
    """Sentences that the exact passes left at sites they could not fuse."""
    nodes = [n for owner in graph_modules(gm) for n in owner.graph.nodes if NOT_FUSED in n.meta]
    return {str(n.meta.get(SITE, n.name)): n.meta[NOT_FUSED] for n in nodes}


def judged(plan: Plan, curve: Curve, count: int, max_drop: float) -> str:
    """How a choice of ``count`` sites by ``max_drop`` came about, and whether the held-out half was large enough for it."""
    step = next((j for j in range(len(curve.order)) if sum(map(len, curve.order[: j + 1])) == count), None)
    text = f"max_drop {max_drop:g} on {curve.samples} held-out samples: "
    if step is None:
        return text + "already the least harmful site costs more"
    margin = curve.margins[step] if curve.margins else None
    text += f"worse by {_number(plan.drops()[step])}" + ("" if margin is None else f" +- {_number(margin)}")
    return text if margin is not None and margin <= max_drop else text + "; too few samples to be sure of it"


def report(gm: fx.GraphModule) -> Report:
    """The report of a rewritten model.

    Raises:
        VMeanbaError: ``gm`` was not made by :func:`vmeanba_fx.transform` or :meth:`Plan.apply`.
    """
    found = getattr(gm, "meta", {}).get(REPORT)
    if not isinstance(found, Report):
        raise VMeanbaError(
            f"this {type(gm).__name__} carries no report: it was not made by vmeanba_fx.transform or Plan.apply"
        )
    return found


def attach_report(gm: fx.GraphModule, found: Report) -> None:
    gm.meta[REPORT] = found


def attach_plan(gm: fx.GraphModule, plan: dict[str, Any]) -> None:
    """Let ``gm`` carry the plan it was made with, as ``Plan.to_dict`` gives it, for :func:`vmeanba_fx.export`."""
    gm.meta[_PLAN] = plan


def plan_of(gm: fx.GraphModule) -> dict[str, Any] | None:
    """The plan :func:`attach_plan` left on ``gm``."""
    return gm.meta.get(_PLAN)


def site_table(plan: Plan, chosen: set[str]) -> str:
    """tabulate table of a plan's sites; FLOPs are per image, as the paper's authors count them (millions)."""
    rows = []
    places = {i: place for place, i in enumerate(plan.order(), 1)} if plan.scored else {}
    for i, s in enumerate(plan.sites):
        impact = _number(plan.impact(i), "+") if plan.scored else "-"
        estimate = [_number(plan.estimates[i], "+")] if plan.scores and plan.estimates else []
        rows.append(
            [s.name, s.groups, s.channels, s.state, s.length, s.kind, impact, places.get(i, "-"), _margin(plan, i),
             *estimate, f"{s.flops() / 1e6:.3g}", f"{plan.flops_replaced(s) / 1e6:.3g}",
             "replaced" if s.name in chosen else ""]
        )  # fmt: skip
    what = f"impact ({plan.metric})" if plan.scores or not plan.scored else f"gradient impact ({plan.metric})"
    gradient = ["gradient"] if plan.scores and plan.estimates else []
    head = ["site", "K", "D", "N", "L", "kind", what, "order", "+-", *gradient, "MFLOPs", "after", "chosen"]
    align = ("left", *["right"] * 4, "left", *["right"] * (len(head) - 7), "left")
    return tabulate(rows, head, disable_numparse=True, colalign=align)


def _margin(plan: Plan, i: int) -> str:
    if not plan.intervals:
        return "-"
    low, high = plan.intervals[i]
    return _number((high - low) / 2)


def _number(v: float, sign: str = "") -> str:
    return f"{v:{sign}.5f}" if v == 0 or abs(v) >= 1e-4 else f"{v:{sign}.1e}"


def plan_text(plan: Plan) -> str:
    """What ``print(plan)`` shows."""
    lines = [plan.table()]
    if plan.base is not None:
        lines.append(f"{plan.metric} of the unchanged model: {plan.base:.6g} ({plan.samples} samples)")
    if plan.intervals:
        lines.append("+-: half of the 95 % bootstrap interval of the impact")
    if alike := _alike(plan):
        lines.append(f"cannot be told apart on these {plan.samples} samples: {alike}")
    if plan.scores and plan.estimates:
        found = plan.correlation()
        text = "one of them does not vary" if found is None else f"rank correlation {found:.2f} (Spearman)"
        lines.append(f"gradient against measured impact: {text}")
    if plan.curve is not None:
        lines.append(_curve_table(plan, plan.curve))
    lines += [f"{name}: not a site, {why}" for name, why in plan.refused]
    return "\n".join(lines)


def _alike(plan: Plan) -> str:
    """Runs of neighbours in the ranking whose impacts may be the same."""
    if not plan.scored or len(plan.apart) != len(plan.sites) - 1:
        return ""
    names = [plan.sites[i].name for i in plan.order()]
    runs = [[names[0]]]
    for name, apart in zip(names[1:], plan.apart, strict=True):
        if apart:
            runs.append([name])
        else:
            runs[-1].append(name)
    return "; ".join(" ~ ".join(run) for run in runs if len(run) > 1)


def _curve_table(plan: Plan, curve: Curve) -> str:
    """The metric with the first 1, 2, ... units of the curve replaced together."""
    how = "in greedy order" if curve.greedy else "in the order of their impacts on the other images"
    if curve.base is None:
        judged = "on the images that the order was chosen on (nothing was held out)"
        pairs = [(v, plan.worse(v), "-") for v in curve.ranked]
    else:
        judged = f"on {curve.samples} held-out samples, {plan.metric} of the unchanged model {curve.base:.6g}"
        margins = [_number(m) for m in curve.margins] or ["-"] * len(curve.order)
        pairs = list(zip(curve.values, plan.drops(), margins, strict=True))
    if not pairs:
        return ""
    rows = [
        [step, ", ".join(plan.sites[i].name for i in unit), f"{value:.6g}", _number(drop, "+"), margin]
        for step, (unit, (value, drop, margin)) in enumerate(zip(curve.order, pairs, strict=True), 1)
    ]
    table = tabulate(rows, ["replaced", "the last one", plan.metric, "worse by", "+-"], disable_numparse=True,
                     colalign=("right", "left", "right", "right", "right"))  # fmt: skip
    return f"replaced together {how}, {judged}:\n{table}"
