"""Which sites to replace: what the user asks for, checked, and answered from what a plan holds."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .errors import PlanError, SiteError
from .files import is_number
from .sites import Site

if TYPE_CHECKING:
    from .calibration.curve import Unit
    from .plan import Plan
    from .timing import Times


@dataclass(frozen=True)
class Choice:
    """One way of choosing (``k``, ``max_drop``, ``speedup`` or ``sites``) and what must stay; see :meth:`Plan.choose`."""

    k: int | None = None
    max_drop: float | None = None
    speedup: float | None = None
    sites: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()
    group_by: str | None = None

    def check(self, plan: Plan) -> tuple[set[str], set[str]]:
        """The names that ``sites`` and ``exclude`` match; needs no scores.

        Raises:
            SiteError: the choice cannot be made on this plan.
        """
        if sum(option is not None for option in (self.k, self.max_drop, self.speedup, self.sites)) != 1:
            raise SiteError("say how to choose: give exactly one of k=, max_drop=, speedup= and sites=")
        check_group_by(self.group_by)
        named = match(plan.sites, self.sites, "sites") if self.sites is not None else set()
        kept_out = match(plan.sites, self.exclude, "exclude")
        if named and named <= kept_out:
            raise SiteError(f"exclude= keeps all that sites= names: {', '.join(sorted(named))}")
        if self.k is not None:
            by = self._group_by(plan)
            free, what = len(units_of(plan.sites, by, kept_out)), "sites" if by is None else f"{by}s"
            if not isinstance(self.k, Integral) or isinstance(self.k, bool):
                raise SiteError(f"k={self.k!r}: give a whole number")
            if not 0 <= self.k <= free:
                besides = " besides the excluded ones" if kept_out else ""
                raise SiteError(f"k={self.k}: this model has {free} {what} to replace{besides}, so k can be 0 to {free}")
        if self.max_drop is not None and not (is_number(self.max_drop) and self.max_drop >= 0):
            raise SiteError(
                f"max_drop={self.max_drop!r}: give a number of at least 0, in units of the metric {plan.metric!r}"
            )
        if self.speedup is not None and not (is_number(self.speedup) and self.speedup >= 1):
            raise SiteError(f"speedup={self.speedup!r}: give a number of at least 1, as in speedup=1.3")
        return named, kept_out

    def names(self, plan: Plan, times: Callable[[], Times]) -> list[str]:
        """Names of the chosen sites, in graph order; ``times`` is called where measured times are needed.

        Raises:
            SiteError: see :meth:`check`, or the speedup cannot be reached.
            PlanError: the plan does not hold what the choice needs.
        """
        named, kept_out = self.check(plan)
        if self.sites is not None:
            return [s.name for s in plan.sites if s.name in named and s.name not in kept_out]
        units = units_of(plan.sites, self._group_by(plan), kept_out)
        if self.k is not None:
            trivial = self.k in (0, len(units))
            picked = units[: self.k] if trivial else self._ranked(plan, units)[: self.k]
        elif self.max_drop is not None:
            picked = self._within(plan, kept_out, self.max_drop)
        else:
            assert self.speedup is not None  # the only one left, says check()
            picked = self._fast(plan, units, times(), self.speedup)
        chosen = {i for unit in picked for i in unit}
        return [s.name for i, s in enumerate(plan.sites) if i in chosen]

    def _group_by(self, plan: Plan) -> str | None:
        return plan.group_by if self.group_by is None else self.group_by

    def _ranked(self, plan: Plan, units: list[Unit]) -> list[Unit]:
        """``units``, least harmful first: in the greedy order where the plan has one, else by their impacts."""
        if plan.curve is None or not plan.curve.greedy:
            return by_impact(units, plan.impacts(), plan.tiebreaks)
        self._require_same_units(plan)
        ranked = [unit for unit in plan.curve.order if unit in units]
        if len(ranked) < min(self.k or 0, len(units)):
            raise PlanError(
                f"k={self.k}: the greedy order of this plan has {len(ranked)} of these {len(units)}, the others were "
                "excluded when it was made: calibrate without exclude="
            )
        return ranked

    def _within(self, plan: Plan, kept_out: set[str], max_drop: float) -> list[Unit]:
        """The longest start of the plan's curve on which the metric never falls further than ``max_drop``."""
        plan.impacts()  # a plan without scores says so
        if plan.curve is None or plan.curve.base is None:
            raise PlanError(
                "max_drop= needs the metric measured with several sites replaced together on images that were held "
                "out, which this plan does not have: calibrate with held_out=True and at least two batches"
            )
        self._require_same_units(plan)
        picked: list[Unit] = []
        for unit, drop in zip(plan.curve.order, plan.drops(), strict=True):
            if drop > max_drop:
                break
            stays = [plan.sites[i].name for i in unit if plan.sites[i].name in kept_out]
            if stays:
                raise PlanError(
                    f"max_drop= with exclude=: {', '.join(stays)} is among the sites that were replaced together when "
                    "this plan was measured: give exclude= to calibrate"
                )
            picked.append(unit)
        return picked

    def _fast(self, plan: Plan, units: list[Unit], times: Times, speedup: float) -> list[Unit]:
        impacts = plan.impacts()
        saved = [sum(times.saved[i] for i in unit) for unit in units]
        costs = [sum(impacts[i] for i in unit) for unit in units]
        picked = knapsack(costs, saved, times.base * (1 - 1 / speedup))
        if picked is None:
            most = times.speedup([i for unit, gain in zip(units, saved, strict=True) if gain > 0 for i in unit])
            raise SiteError(
                f"speedup={speedup}: the most that replacing sites reaches is {most:.3f}, by the times measured on "
                f"{times.device} ({times.base * 1e3:.3g} ms unchanged)"
            )
        return [units[j] for j in picked]

    def _require_same_units(self, plan: Plan) -> None:
        if self._group_by(plan) != plan.group_by:
            raise PlanError(
                f"this plan was measured with group_by={plan.group_by!r}: calibrate with group_by={self.group_by!r}"
            )


def check_group_by(group_by: Any) -> None:
    """Raise ``SiteError`` unless sites can be grouped by this."""
    if group_by not in (None, "module"):
        raise SiteError(f"group_by={group_by!r}: give 'module' or None")


def units_of(sites: Sequence[Site], group_by: str | None, kept_out: Iterable[str] = ()) -> list[Unit]:
    """Indices of the sites that are replaced together; a group of which one site must stay, stays whole."""
    groups: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        groups.setdefault(site.name if group_by is None else site.module, []).append(i)
    stays = set(kept_out)
    return [tuple(unit) for unit in groups.values() if not any(sites[i].name in stays for i in unit)]


def by_impact(units: Sequence[Unit], impacts: Sequence[float], tiebreaks: Sequence[float]) -> list[Unit]:
    """``units`` by the sum of their sites' impacts, least harmful first; ties by ``tiebreaks``, then by position."""
    ties = tiebreaks or [0.0] * len(impacts)
    return sorted(units, key=lambda u: (sum(impacts[i] for i in u), sum(ties[i] for i in u), u))


def knapsack(costs: Sequence[float], gains: Sequence[float], needed: float) -> list[int] | None:
    """The items of least total cost that gain at least ``needed``; None where all together do not.

    Exact, over the Pareto front of gain and cost. A negative cost pays for no other item's; it only breaks ties, and so
    does then the number of items. Items that gain nothing are never taken.
    """
    enough = needed * (1 - 1e-12)
    front: list[tuple[float, tuple[float, float, int], tuple[int, ...]]] = [(0.0, (0.0, 0.0, 0), ())]  # gain, cost, items
    for i, (cost, gain) in enumerate(zip(costs, gains, strict=True)):
        if gain <= 0:
            continue
        taken = [
            (min(g + gain, needed), (c + max(cost, 0.0), below + min(cost, 0.0), n + 1), (*items, i))
            for g, (c, below, n), items in front
        ]  # fmt: skip
        merged = sorted(front + taken, key=lambda s: (-s[0], *s[1:]))
        front = []
        for state in merged:
            if not front or state[1] < front[-1][1]:
                front.append(state)
    reached = [state for state in front if state[0] >= enough]
    return list(min(reached, key=lambda s: s[1])[2]) if reached else None


def match(sites: Sequence[Site], patterns: str | Sequence[str], what: str) -> set[str]:
    """Names of sites that equal a pattern or match it as a glob.

    Raises:
        SiteError: a pattern matches nothing, or is no string.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else patterns:
        if not isinstance(pattern, str):
            raise SiteError(f"{what}: {pattern!r} is neither the name of a site nor a glob")
        names = [s.name for s in sites if s.name == pattern or fnmatch.fnmatchcase(s.name, pattern)]
        if not names:
            raise SiteError(f"{what}: {pattern!r} matches no site; the sites are {', '.join(s.name for s in sites)}")
        found.update(names)
    return found
