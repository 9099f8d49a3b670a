"""Measured times of whole models, on the user's device: what replacing a site saves there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.utils.benchmark as benchmark
from torch import fx

from .capturing.copies import device_of
from .sites import Site

_ROUNDS = 7
_ROUND_SECONDS = 0.03  # of each model in each round


@dataclass(frozen=True)
class Times:
    """Seconds per run: ``base`` of the exactly optimised model, ``saved[i]`` of it when site i is replaced.

    Sites of equal shape and kind are measured together, all of them replaced, and get equal shares.
    """

    device: str
    base: float
    saved: tuple[float, ...]
    original: fx.GraphModule = field(repr=False, compare=False)
    args: Sequence[Any] = field(default=(), repr=False, compare=False)
    kwargs: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def speedup(self, chosen: Iterable[int]) -> float:
        """Predicted for the sites ``chosen``."""
        return self.base / max(self.base - sum(self.saved[i] for i in chosen), 1e-3 * self.base)

    def against(self, gm: fx.GraphModule) -> float:
        """Measured: how many times faster ``gm`` is than the model that these times are of."""
        rounds = timed([self.original, gm], self.args, self.kwargs)
        return median(a / b for a, b in zip(*rounds, strict=True))


def measure_times(
    sites: Sequence[Site],
    rewrite: Callable[[list[str]], fx.GraphModule],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    ranks: Mapping[str, int],
) -> Times:
    """Time the model that ``rewrite([])`` gives against ``rewrite(names)``, once per shape (and rank) of site.

    Whole models, run eagerly in turns: times of single nodes miss what the exact passes do around a site, and a
    difference between models that ran at other moments is mostly the weather.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, s in enumerate(sites):
        shape = (s.groups, s.channels, s.state, s.length, s.dtype, s.skip, s.gate, s.annihilated, ranks.get(s.name))
        kinds.setdefault(shape, []).append(i)
    original = rewrite([])
    forms = [original, *(rewrite([sites[i].name for i in members]) for members in kinds.values())]
    rounds = timed(forms, args, kwargs)
    saved = [0.0] * len(sites)
    for members, column in zip(kinds.values(), rounds[1:], strict=True):
        share = median(a - b for a, b in zip(rounds[0], column, strict=True)) / len(members)
        for i in members:
            saved[i] = share
    return Times(device_name(original), median(rounds[0]), tuple(saved), original, args, kwargs)


def timed(
    forms: Sequence[Callable[..., Any]], args: Sequence[Any], kwargs: dict[str, Any], rounds: int = _ROUNDS
) -> list[list[float]]:
    """Seconds per run of each of ``forms``, in ``rounds`` rounds in which each has its turn."""
    timers = [
        benchmark.Timer(
            "with torch.no_grad(): form(*args, **kwargs)",
            globals={"torch": torch, "form": form, "args": args, "kwargs": kwargs},
            num_threads=torch.get_num_threads(),
        )
        for form in forms
    ]
    runs = []
    for timer in timers:
        timer.timeit(1)  # compiles kernels
        runs.append(max(1, round(_ROUND_SECONDS / max(timer.timeit(2).mean, 1e-7))))
    found: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for column, timer, number in zip(found, timers, runs, strict=True):
            column.append(timer.timeit(number).mean)
    return found


def device_name(gm: fx.GraphModule) -> str:
    """Of the parameters: the GPU's name, or cpu and the number of threads."""
    device = device_of(gm)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
