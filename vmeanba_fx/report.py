"""What was done to a model: one object whose ``str()`` is the table and whose ``to_dict()`` is the JSON."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import fx

from .errors import VMeanbaError
from .graph import NOT_FUSED, SITE, graph_modules
from .passes.manager import PassRecord

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["Report", "report"]

_META = "vmeanba_fx.report"
_PLAN = "vmeanba_fx.plan"


@dataclass(frozen=True)
class Report:
    """``chosen``: names of the replaced sites. ``table``: all sites as printed. ``passes``: what each pass changed.

    ``ranks``: channels per direction of the replaced sites, with ``reduce="rank"``. ``refitted``: one sentence per layer.
    ``unfused``: why the exact passes left a site on the scanned copies of its map, by site.
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
    table: str = field(repr=False)
    ranks: dict[str, int] = field(default_factory=dict)
    refitted: tuple[str, ...] = ()
    unfused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, plan: Plan, chosen: list[str], records: list[PassRecord], gm: fx.GraphModule, refitted: Iterable[object] = ()
    ) -> Report:
        impacts = {s.name: plan.impact(i) for i, s in enumerate(plan.sites)} if plan.scores else {}
        # The literal block keeps its scan unless the exact pass removed it.
        cleaned = any(r.name == "drop_annihilated" for r in records)
        after = sum(s.flops() if s.name not in chosen else plan.flops_replaced(s, cleaned) for s in plan.sites)
        before = sum(s.flops() for s in plan.sites)
        return cls(
            tuple(chosen), plan.metric, plan.base, impacts, plan.mean, before, after, tuple(records), plan.table(chosen),
            {name: plan.fits[name].rank for name in chosen if name in plan.fits}, tuple(map(str, refitted)),
            reasons(gm),
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
        lines = [
            self.table,
            f"{total} site{'s' if total != 1 else ''} replaced (lossy, {self.how}); "
            f"scan FLOPs {self.flops_before:,} -> {self.flops_after:,} per image",
            *map(str, self.passes),
            *self.refitted,
            *(f"{site}: not fused, {why}" for site, why in self.unfused.items()),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": list(self.chosen), "metric": self.metric, "base": self.base, "impacts": self.impacts,
            "mean": self.mean, "ranks": self.ranks, "refitted": list(self.refitted),
            "flops_before": self.flops_before, "flops_after": self.flops_after,
            "passes": [p.to_dict() for p in self.passes], "unfused": self.unfused,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Report:
        """The report of :meth:`to_dict`, with its ``table`` added.

        Raises:
            ValueError: it is not that of a report.
        """
        kinds = {
            "chosen": list, "metric": str, "base": float | int | None, "impacts": dict, "mean": str, "flops_before": int,
            "flops_after": int, "passes": list, "table": str,
        }  # fmt: skip
        for name, kind in kinds.items():
            if not isinstance(d.get(name), kind):
                raise ValueError(f"a report whose {name} is {str(d.get(name))[:80]!r}")
        try:
            known = {f.name: d[f.name] for f in fields(cls) if f.name in d}
            passes = tuple(PassRecord(**record) for record in d["passes"])
            found = cls(
                **known | {"chosen": tuple(d["chosen"]), "passes": passes, "refitted": tuple(d.get("refitted", ()))}
            )
            str(found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a report of unknown form: {error}") from None
        return found


def reasons(gm: fx.GraphModule) -> dict[str, str]:
    """Sentences that the exact passes left at sites they could not fuse."""
    nodes = [n for owner in graph_modules(gm) for n in owner.graph.nodes if NOT_FUSED in n.meta]
    return {str(n.meta.get(SITE, n.name)): n.meta[NOT_FUSED] for n in nodes}


def report(gm: fx.GraphModule) -> Report:
    """The report of a rewritten model.

    Raises:
        VMeanbaError: ``gm`` was not made by :func:`vmeanba_fx.transform` or :meth:`Plan.apply`.
    """
    found = gm.meta.get(_META)
    if not isinstance(found, Report):
        raise VMeanbaError("this GraphModule carries no report: it was not made by vmeanba_fx.transform or Plan.apply")
    return found


def attach_report(gm: fx.GraphModule, found: Report) -> None:
    gm.meta[_META] = found


def attach_plan(gm: fx.GraphModule, plan: dict[str, Any]) -> None:
    """Let ``gm`` carry the plan it was made with, as ``Plan.to_dict`` gives it, for :func:`vmeanba_fx.export`."""
    gm.meta[_PLAN] = plan


def plan_of(gm: fx.GraphModule) -> dict[str, Any] | None:
    """The plan :func:`attach_plan` left on ``gm``."""
    return gm.meta.get(_PLAN)


def site_table(plan: Plan, chosen: set[str]) -> str:
    """tabulate table of a plan's sites; FLOPs are per image, as the paper's authors count them (millions)."""
    rows = []
    ranks = {i: r for r, i in enumerate(plan.order())} if plan.scores else {}
    for i, s in enumerate(plan.sites):
        impact = f"{plan.impact(i):+.5f}" if plan.scores else "-"
        rows.append(
            [s.name, s.groups, s.channels, s.state, s.length, s.kind, impact, ranks.get(i, "-"),
             f"{s.flops() / 1e6:.3g}", f"{plan.flops_replaced(s) / 1e6:.3g}", "replaced" if s.name in chosen else ""]
        )  # fmt: skip
    head = ["site", "K", "D", "N", "L", "kind", f"impact ({plan.metric})", "rank", "MFLOPs", "after", "chosen"]
    return tabulate(
        rows, head, disable_numparse=True, colalign=("left", *["right"] * 4, "left", *["right"] * 4, "left")
    )
