"""Which sites to replace: what the user asks for, checked, and answered from the scores of a plan."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import SiteError

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True)
class Choice:
    """One way of choosing (``k``, ``max_drop`` or ``sites``) and what must stay; see :meth:`Plan.choose`."""

    k: int | None = None
    max_drop: float | None = None
    sites: str | Sequence[str] | None = None
    exclude: str | Sequence[str] = ()

    def check(self, plan: Plan) -> tuple[set[str], set[str]]:
        """The names that ``sites`` and ``exclude`` match; needs no scores.

        Raises:
            SiteError: the choice cannot be made on this plan.
        """
        if sum(option is not None for option in (self.k, self.max_drop, self.sites)) != 1:
            raise SiteError("say how to choose: give exactly one of k=, max_drop= and sites=")
        named = _match(plan, self.sites, "sites") if self.sites is not None else set()
        kept_out = _match(plan, self.exclude, "exclude")
        if self.k is not None:
            free = len(plan.sites) - len(kept_out)
            if not isinstance(self.k, int) or isinstance(self.k, bool):
                raise SiteError(f"k={self.k!r}: give a whole number")
            if not 0 <= self.k <= free:
                raise SiteError(f"k={self.k}: this model has {free} sites to replace, so k can be 0 to {free}")
        if self.max_drop is not None:
            number = isinstance(self.max_drop, (int, float)) and not isinstance(self.max_drop, bool)
            if not number or not math.isfinite(self.max_drop) or self.max_drop < 0:
                raise SiteError(
                    f"max_drop={self.max_drop!r}: give a number of at least 0, in units of the metric {plan.metric!r}"
                )
        return named, kept_out

    def names(self, plan: Plan) -> list[str]:
        """Names of the chosen sites, in graph order.

        Raises:
            SiteError: see :meth:`check`.
            PlanError: the choice needs scores and the plan has none.
        """
        named, kept_out = self.check(plan)
        free = [s.name for s in plan.sites if s.name not in kept_out]
        if self.sites is not None:
            return [name for name in free if name in named]
        if self.k == 0:
            return []
        if self.k == len(free):
            return free
        ranked = [i for i in plan.order() if plan.sites[i].name not in kept_out]
        picked = set(ranked[: self.k]) if self.k is not None else _within(plan, ranked, self.max_drop)
        return [s.name for i, s in enumerate(plan.sites) if i in picked]


def _within(plan: Plan, ranked: list[int], max_drop: float) -> set[int]:
    total, picked = 0.0, set()
    for i in ranked:
        total += max(plan.impact(i), 0.0)
        if total > max_drop:
            break
        picked.add(i)
    return picked


def _match(plan: Plan, patterns: str | Sequence[str], what: str) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [s.name for s in plan.sites if s.name == pattern or fnmatch.fnmatchcase(s.name, pattern)]
        if not names:
            raise SiteError(
                f"{what}: {pattern!r} matches no site; the sites are {', '.join(s.name for s in plan.sites)}"
            )
        found.update(names)
    return found
