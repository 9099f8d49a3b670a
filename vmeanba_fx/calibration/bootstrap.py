"""How far impacts on a small calibration set can be trusted: bootstrap intervals, and the rank correlation of two scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONFIDENCE = 0.95
_DRAWS = 2000
_CHUNK = 1 << 22  # resampled indices held at once


def resampled_means(counts: Tensor, sums: Tensor, *, seed: int = 0, draws: int = _DRAWS) -> Tensor:
    """Means (draws, columns) of blocks drawn with replacement; ``counts`` (n,) images per block, ``sums`` (n, columns).

    The same blocks are drawn for all columns, so that differences between columns keep their pairing.
    """
    n = len(counts)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, draws, max(_CHUNK // n, 1)):
        rows = min(max(_CHUNK // n, 1), draws - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        times = torch.zeros(rows, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(rows, n, dtype=torch.float64))
        out.append((times @ sums) / (times @ counts)[:, None])
    return torch.cat(out)


def intervals(
    counts: Tensor, sums: Tensor, *, seed: int = 0, confidence: float = CONFIDENCE, span: float | None = None
) -> list[tuple[float, float]]:
    """(low, high) of the mean of every column: percentile bootstrap, widened by sqrt(n / (n - 1)); none of one block.

    Args:
        span: the most that one image can change by, where that is known. A column of zeros then gets +-3 * span / n (the
            rule of three) instead of an interval of no width.
    """
    n = len(counts)
    if n < 2:
        return []
    means = sums.sum(0) / counts.sum()
    tail = (1 - confidence) / 2
    drawn = resampled_means(counts, sums, seed=seed)
    edges = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0) - means
    edges *= (n / (n - 1)) ** 0.5
    if span is not None:
        still = (sums == 0).all(0)
        room = torch.tensor([-3.0, 3.0], dtype=torch.float64)[:, None] * span / float(counts.sum())
        edges = torch.where(still, room, edges)
    return [(_short(a), _short(b)) for a, b in (edges + means).T.tolist()]


def told_apart(counts: Tensor, sums: Tensor, order: Sequence[int], *, seed: int = 0) -> list[bool]:
    """For each neighbouring pair of columns in ``order``: whether 0 lies outside the interval of their difference."""
    if len(counts) < 2 or len(order) < 2:
        return []
    first, second = sums[:, list(order[:-1])], sums[:, list(order[1:])]
    return [low > 0 or high < 0 for low, high in intervals(counts, second - first, seed=seed)]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation of two scores, with average ranks for ties; None where one of them does not vary."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    return None if len(a) < 2 or bool((norms == 0).any()) else float(ranks[0] @ ranks[1] / norms.prod())


def _ranks(values: Sequence[float]) -> Tensor:
    v = torch.tensor(list(values), dtype=torch.float64)
    return (v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2


def _short(value: float) -> float:
    """Six digits: more mean nothing here, and the last ones may differ between machines."""
    return float(f"{value:.6g}")
