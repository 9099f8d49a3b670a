"""Cutting a scan over batch, groups and channels into tiles whose work space stays small and in cache."""

from collections.abc import Iterator

Tile = tuple[slice, slice, slice]


def tiles(batch: int, groups: int, channels: int, cost: int, budget: int) -> Iterator[Tile]:
    """Slices of (B, K, D) that cover everything once, each of at most `budget` where one channel counts `cost`.

    Whole batch items if they fit, else whole groups of one item, else channels of one group; at least one channel.
    """
    every = slice(None)
    if groups * channels * cost <= budget:
        for rows in blocks(batch, budget // max(1, groups * channels * cost)):
            yield rows, every, every
        return
    for item in range(batch):
        if channels * cost <= budget:
            for rows in blocks(groups, budget // (channels * cost)):
                yield slice(item, item + 1), rows, every
        else:
            for group in range(groups):
                for rows in blocks(channels, max(1, budget // cost)):
                    yield slice(item, item + 1), slice(group, group + 1), rows


def blocks(total: int, size: int) -> Iterator[slice]:
    """`total` in blocks of at most `size`, as equal as they can be."""
    if total == 0:
        return
    count = -(-total // size)
    for i in range(count):
        yield slice(i * total // count, (i + 1) * total // count)
