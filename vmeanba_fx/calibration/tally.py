"""What a pass over the calibration data adds up: values per image, or per block of images where there are many."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MOST_VALUES = 60_000  # kept by one BlockSums; with more, neighbouring images are added up


class BlockSums:
    """Sums of ``columns`` quantities over blocks of images, in order; a block is one image while there are few.

    Memory and file stay bounded: when too many values are held, neighbouring blocks are merged, two by two.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.block = 1
        self.counts: list[int] = []
        self.sums: list[list[float]] = []

    def add(self, values: Tensor, weight: int = 1) -> None:
        """``values`` (columns, n), each of which stands for ``weight`` images."""
        for row in (values.double() * weight).T.tolist():
            if self.counts and self.counts[-1] < self.block:
                self.counts[-1] += weight
                self.sums[-1] = [a + b for a, b in zip(self.sums[-1], row, strict=True)]
            else:
                self.counts.append(weight)
                self.sums.append(row)
            if len(self.counts) > max(_MOST_VALUES // self.columns, 2):
                self._halve()

    def _halve(self) -> None:
        self.block *= 2
        counts, sums, self.counts, self.sums = self.counts, self.sums, [], []
        for i in range(0, len(counts), 2):
            self.counts.append(sum(counts[i : i + 2]))
            self.sums.append([math.fsum(column) for column in zip(*sums[i : i + 2], strict=True)])

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def means(self) -> list[float]:
        """The mean per image of every column; none without images."""
        total = self.samples
        return [math.fsum(column) / total for column in zip(*self.sums, strict=True)] if total else []

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Counts (n,) and sums (n, columns), float64."""
        sums = torch.tensor(self.sums, dtype=torch.float64).reshape(-1, self.columns)
        return torch.tensor(self.counts, dtype=torch.float64), sums

    def __add__(self, other: BlockSums) -> BlockSums:
        both = BlockSums(self.columns)
        both.counts, both.sums = self.counts + other.counts, self.sums + other.sums
        return both

    def to_dict(self) -> dict[str, Any]:
        return {"block": self.block, "counts": self.counts, "sums": self.sums}

    @classmethod
    def from_dict(cls, d: dict[str, Any], columns: int) -> BlockSums:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where ``d`` is not what :meth:`to_dict` made."""
        found = cls(columns)
        found.block, found.counts = int(d["block"]), [int(n) for n in d["counts"]]
        found.sums = [[float(v) for v in row] for row in d["sums"]]
        if len(found.counts) != len(found.sums) or any(len(row) != columns for row in found.sums):
            raise ValueError("counts and sums do not fit")
        if min(found.counts, default=1) < 1 or not all(math.isfinite(v) for row in found.sums for v in row):
            raise ValueError("its sums are of nothing or not finite")
        return found


def half_of(index: int, values: Tensor, weight: int, batches: int) -> tuple[Tensor, Tensor]:
    """``values`` (columns, n) of batch ``index`` as (ranking half, held-out half); either may be empty.

    Every second batch is held out. Where there is one batch alone it is every second image; one value for the whole
    batch goes to the ranking half.
    """
    nothing = values[:, :0]
    if batches > 1:
        return (nothing, values) if index % 2 else (values, nothing)
    return (values, nothing) if weight > 1 else (values[:, ::2], values[:, 1::2])


class Tally:
    """Both halves of the data, while batches come in. The first batch waits until it is known not to be the only one."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.batches = 0
        self._head: tuple[Tensor, int] | None = None
        self._halves = (BlockSums(columns), BlockSums(columns))

    def add(self, values: Tensor, weight: int) -> None:
        """The next batch: ``values`` (columns, n), each standing for ``weight`` images."""
        if self.batches == 0:
            self._head = (values.double(), weight)
        else:
            if self._head is not None:
                self._halves[0].add(*self._head)
                self._head = None
            self._halves[self.batches % 2].add(values, weight)
        self.batches += 1

    @property
    def ranking(self) -> BlockSums:
        return self._half(0)

    @property
    def held_out(self) -> BlockSums:
        return self._half(1)

    @property
    def all(self) -> BlockSums:
        return self.ranking + self.held_out

    def _half(self, which: int) -> BlockSums:
        if self._head is None:
            return self._halves[which]
        values, weight = self._head
        found = BlockSums(self.columns)
        found.add(half_of(0, values, weight, 1)[which], weight)
        return found

    def to_dict(self) -> dict[str, Any]:
        head = None if self._head is None else {"values": self._head[0].tolist(), "weight": self._head[1]}
        return {"batches": self.batches, "head": head, "halves": [half.to_dict() for half in self._halves]}

    @classmethod
    def from_dict(cls, d: dict[str, Any], columns: int) -> Tally:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where ``d`` is not what :meth:`to_dict` made."""
        found = cls(columns)
        found.batches = int(d["batches"])
        first, second = d["halves"]
        found._halves = BlockSums.from_dict(first, columns), BlockSums.from_dict(second, columns)
        if d["head"] is not None:
            values = torch.tensor(d["head"]["values"], dtype=torch.float64)
            if values.dim() != 2 or len(values) != columns or not bool(torch.isfinite(values).all()):
                raise ValueError("its first batch is not finite or of other columns")
            found._head = values, int(d["head"]["weight"])
        if found.batches < 1 or found.all.samples < 1:
            raise ValueError("its sums are of nothing or not finite")
        return found
