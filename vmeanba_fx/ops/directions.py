"""Scan directions: from a small code to the table of positions that a direction reads.

A direction walks once over all positions of an H x W map. Its code is three bits:

    bit 0 (1)  column-major: down the columns instead of along the rows
    bit 1 (2)  the whole sequence reversed
    bit 2 (4)  the minor axis reversed (applied before bit 1)

Step t of the L = H*W steps reads position (h, w), found so:

    s = L-1-t if code & 2 else t
    major, minor = divmod(s, minor_length)          minor_length = H if code & 1 else W
    if code & 4: minor = minor_length-1-minor
    h, w = (minor, major) if code & 1 else (major, minor)

VMamba's four directions are [0, 1, 2, 3]. Example, H = 2, W = 3 (flat positions h*W + w):

    code 0: 0 1 2 3 4 5     code 1: 0 3 1 4 2 5     code 4: 2 1 0 5 4 3     code 6: 3 4 5 0 1 2
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

CODES = range(8)


def direction_table(directions: list[int] | tuple[int, ...], height: int, width: int) -> Tensor:
    """The flat position h*W + w that each direction reads at each step: int64, (K, H*W), on the CPU.

    Cached: the caller must not write into it. `height` and `width` are plain ints, so this belongs inside an op's
    implementation, where shapes are real, and not in traced code.
    """
    return _table(tuple(int(code) for code in directions), int(height), int(width))


def inverse_table(table: Tensor) -> Tensor:
    """For a table (K, L) of permutations, the step at which each position is read: inverse[k, table[k, t]] = t.

    Raises ValueError when a row is not a permutation of 0..L-1.
    """
    length = table.shape[1]
    if bool(((table < 0) | (table >= length)).any()):
        raise ValueError(
            f"order must hold positions 0 to {length - 1}, but it holds {int(table.min())} to {int(table.max())}"
        )
    inverse = _steps(table)
    if bool((inverse < 0).any()):
        raise ValueError(
            "each row of order must read every position exactly once, but one of them is missing positions"
        )
    return inverse


def _steps(table: Tensor) -> Tensor:
    """The step at which each position is read, -1 where none does."""
    steps = torch.arange(table.shape[1], device=table.device).expand(table.shape)
    return torch.full_like(table, -1).scatter(1, table, steps)


class ScanOrder:
    """The K orders in which a map (..., H, W) is read, from direction codes or a table (K, L) of positions.

    A table is looked at, to see that it reads every position once, unless `checked` is False: in traced code its values
    are not there.
    """

    def __init__(self, directions: list[int], order: Tensor | None, height: int, width: int, *, checked: bool = True):
        self.codes, self.height, self.width = directions, height, width
        self.table = None if order is None else order.long()
        self.count = len(directions) if order is None else len(order)
        self.inverse = None
        if self.table is not None:
            self.inverse = inverse_table(self.table) if checked else _steps(self.table)

    def read(self, maps: Tensor, k: int) -> Tensor:
        """(..., H, W) in spatial order -> (..., L) as direction k meets it; a view where that is possible."""
        if self.table is not None:
            return maps.flatten(-2).index_select(-1, self.table[k])
        code = self.codes[k]
        if code & 1:
            maps = maps.transpose(-1, -2)
        if code & 4:
            maps = maps.flip(-1)
        rows = maps.flatten(-2)
        return rows.flip(-1) if code & 2 else rows

    def rows_of(self, maps: Tensor) -> Iterator[Tensor]:
        """(B, 1 or K, C, H, W) -> (B, C, L) for each direction; one map serves all if there is only one."""
        own = maps.shape[1] == self.count
        return (self.read(maps[:, k if own else 0], k) for k in range(self.count))

    def put_back(self, rows: Tensor, k: int) -> Tensor:
        """The inverse of `read`: (..., L) -> (..., H, W)."""
        if self.inverse is not None:
            return rows.index_select(-1, self.inverse[k]).unflatten(-1, (self.height, self.width))
        code = self.codes[k]
        if code & 2:
            rows = rows.flip(-1)
        maps = rows.unflatten(-1, (self.width, self.height) if code & 1 else (self.height, self.width))
        if code & 4:
            maps = maps.flip(-1)
        return maps.transpose(-1, -2) if code & 1 else maps


@lru_cache(maxsize=256)
def _table(directions: tuple[int, ...], height: int, width: int) -> Tensor:
    rows = []
    with torch.inference_mode(False):  # a cached inference tensor could not be saved for a later backward
        for code in directions:
            positions = torch.arange(height * width).view(height, width)
            if code & 1:
                positions = positions.t()
            if code & 4:
                positions = positions.flip(1)
            row = positions.reshape(-1)
            rows.append(row.flip(0) if code & 2 else row)
        return torch.stack(rows)
