"""Sites replaced one after the other and together: the order, and what the metric is after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..files import is_count, is_number
from .batches import Batches
from .bootstrap import intervals
from .gradient import Estimator
from .metrics import Batch
from .resume import Saved
from .scoring import Runner, measure_each
from .tally import BlockSums, half_of

Unit = tuple[int, ...]
"""Indices of sites that are replaced together: one site, or the sites of a module."""


@dataclass(frozen=True)
class Curve:
    """``order``: units of sites as they are replaced, after each other. ``greedy``: each was the best next one.

    ``ranked[j]``: the metric with the first j+1 units replaced together on the data that ``order`` was made from (greedy
    only). ``base``, ``values[j]``: the metric of the unchanged model and with the first j+1 replaced together, on
    ``samples`` images that had no part in the order; ``margins[j]``: half the 95 % interval of their difference. All
    empty where nothing was held out.
    """

    order: tuple[Unit, ...]
    greedy: bool
    ranked: tuple[float, ...] = ()
    base: float | None = None
    values: tuple[float, ...] = ()
    margins: tuple[float, ...] = ()
    samples: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Any, sites: int) -> Curve:
        """Raises ``ValueError`` where ``d`` is not what :meth:`to_dict` made for a plan of so many sites."""
        if not isinstance(d, dict) or set(d) != set(cls.__dataclass_fields__):
            raise ValueError("a curve with missing or unknown fields")
        order = d["order"]
        if not isinstance(order, list) or not all(isinstance(unit, list) and unit for unit in order):
            raise ValueError("the order of the curve is not a list of lists of sites")
        flat = [i for unit in order for i in unit]
        if len(set(map(str, flat))) != len(flat) or not all(type(i) is int and 0 <= i < sites for i in flat):
            raise ValueError("the order of the curve names a site twice, or one that is not there")
        for name in ("ranked", "values", "margins"):
            if not isinstance(d[name], list) or not all(map(is_number, d[name])) or len(d[name]) not in (0, len(order)):
                raise ValueError(f"{name} of the curve are not finite numbers, one per step")
        if any(margin < 0 for margin in d["margins"]):
            raise ValueError("a margin of the curve is negative")
        judged = d["base"] is not None
        if judged != bool(d["values"]) or (judged and not is_number(d["base"])):
            raise ValueError("base of the curve is missing or not a finite number")
        if not is_count(d["samples"]) or type(d["greedy"]) is not bool:
            raise ValueError("samples of the curve are no count, or greedy no flag")
        numbers = {name: tuple(map(float, d[name])) for name in ("ranked", "values", "margins")}
        base = float(d["base"]) if judged else None
        return cls(tuple(map(tuple, order)), d["greedy"], base=base, samples=d["samples"], **numbers)


class Walk:
    """Passes over one half of the data in which several sites are replaced at once; saved after every batch.

    ``gradient``: greedy steps are chosen by gradients and not by measuring.
    """

    def __init__(
        self, runner: Runner, batches: Batches, saved: Saved, bar: Any, *, seed: int, gradient: bool = False
    ) -> None:
        self.runner, self.batches, self.saved, self.bar = runner, batches, saved, bar
        self.seed, self.gradient = seed, gradient

    def greedy(self, units: Sequence[Unit], *, whole: bool) -> Curve:
        """Replace, again and again, the unit that costs least on top of those already replaced.

        Ties go to the smaller shift of the outputs, then by position. Judged on the ranking half, or on all data
        (``whole``).
        """
        key = {"units": [list(u) for u in units], "gradient": self.gradient, "whole": whole, "chain": self.batches.chain}
        known = self.saved.read("greedy", lambda d: d if d["key"] == key else None) or {}
        order = [tuple(u) for u in known.get("order", [])]
        ranked = [float(v) for v in known.get("ranked", [])]
        half = None if whole else 0
        while len(order) < len(units) or len(ranked) < len(units):
            left = [u for u in units if u not in order]
            head = {"key": key, "order": [list(u) for u in order], "ranked": ranked}
            if not self.gradient or not left:
                values, shifts = self._measured(left or [()], order, head, half)
                after = values
            else:
                now, values, shifts = self._estimated(left, order, head, half)
                after = None
                if order:
                    ranked.append(now)
            if not left:
                ranked.append(values[0])
                break
            sign = -1.0 if self.runner.metric.higher_is_better else 1.0
            best = min(range(len(left)), key=lambda j: (sign * values[j], shifts[j], left[j]))
            order.append(left[best])
            if after is not None:
                ranked.append(after[best])
        self.saved.write(greedy={"key": key, "order": [list(u) for u in order], "ranked": ranked})
        return Curve(tuple(order), True, tuple(ranked))

    def _measured(
        self, left: Sequence[Unit], order: Sequence[Unit], head: dict[str, Any], half: int | None
    ) -> tuple[list[float], list[float]]:
        """Metric and shift of the outputs with each unit of ``left`` replaced on top of ``order``."""
        taken = tuple(i for u in order for i in u)
        measure = measure_each(self.runner, [(*taken, *u) for u in left], self.bar, shifts=True)
        with torch.no_grad():
            found = self._pass("greedy", head, measure, half)
        _, *means = found.means()
        return means[: len(left)], means[len(left) :] or [0.0] * len(left)

    def _estimated(
        self, left: Sequence[Unit], order: Sequence[Unit], head: dict[str, Any], half: int | None
    ) -> tuple[float, list[float], list[float]]:
        """The metric with ``order`` replaced, and estimated with each unit of ``left`` on top; no shifts."""
        sites = [i for u in left for i in u]
        estimator = Estimator(self.runner, sites, [i for u in order for i in u], seed=self.seed)

        def measure(index: int, batch: Batch) -> tuple[Tensor, int]:
            self.bar.update(len(left))
            return estimator.columns(index, batch)

        now, *means = self._pass("greedy", head, measure, half).means()
        change = dict(zip(sites, (value - now for value in means), strict=True))
        return now, [now + sum(change[i] for i in u) for u in left], [0.0] * len(left)

    def judge(self, curve: Curve, span: float | None) -> Curve:
        """``curve`` with the metric after each step on the held-out half."""
        head = {"key": {"order": [list(u) for u in curve.order], "chain": self.batches.chain}}
        steps = [tuple(i for u in curve.order[: j + 1] for i in u) for j in range(len(curve.order))]
        found = self._pass("curve", head, measure_each(self.runner, steps, self.bar, shifts=False), 1)
        base, *values = found.means()
        counts, sums = found.tensors()
        edges = intervals(counts, sums[:, 1:] - sums[:, :1], seed=self.seed, span=span)
        margins = tuple((high - low) / 2 for low, high in edges)
        return Curve(curve.order, curve.greedy, curve.ranked, base, tuple(values), margins, found.samples)

    def _pass(
        self, name: str, head: dict[str, Any], measure: Callable[[int, Batch], tuple[Tensor, int]], half: int | None
    ) -> BlockSums:
        """``measure`` on the batches of one half, added up; what the state file has of exactly this pass is kept."""
        total = len(self.batches)

        def parse(section: Any) -> tuple[BlockSums | None, int]:
            if {k: section.get(k) for k in head} != head or not section.get("units"):
                return None, 0
            return BlockSums.from_dict(section["units"], int(section["columns"])), int(section["batches"])

        sums, done = self.saved.read(name, parse) or (None, 0)
        for index, batch in self.batches.again(lambda i: half is None or total == 1 or i % 2 == half):
            if index < done:
                continue
            values, weight = measure(index, batch)
            if half is not None:
                values = half_of(index, values, weight, total)[half]
            sums = BlockSums(len(values)) if sums is None else sums
            sums.add(values, weight)
            section = {"columns": sums.columns, "batches": index + 1, "units": sums.to_dict()}
            self.saved.write(**{name: head | section})
        assert sums is not None
        return sums
