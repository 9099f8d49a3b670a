"""Which variant of `cuda/merged_scan.cu` suits a problem, if any: one channel, one state, directions summed, whole maps.

Its blocks scan columns, rows or both, each forwards and backwards (VMamba's four directions, or two of them).
"""

from dataclasses import dataclass
from functools import lru_cache

from . import cuda_runtime
from .cuda_shared_plan import Problem

_AXES = ((0, 2), (1, 3), (0, 1, 2, 3))  # codes of rows, of columns, of both
_PRODUCERS = 2  # warps that start copies
_MIN_LENGTH = 768


@dataclass(frozen=True)
class MergedPlan:
    """A variant: neighbours per thread, the order of directions, threads, bytes of shared memory."""

    items: int
    order: tuple[int, ...]
    threads: int
    shared: int


def choose(problem: Problem, baked: bool, shared_limit: int) -> MergedPlan | None:
    """The variant for this problem; None where `shared_scan.cu` has to do it."""
    one = problem.merge and problem.states == problem.rank == 1 and not (problem.linear or problem.table)
    copied = baked and problem.bulk and problem.copy == 16 and problem.length >= _MIN_LENGTH
    if not (one and copied) or tuple(sorted(problem.codes)) not in _AXES:
        return None
    sizes = problem.element_sizes
    maps_of_u = problem.groups if problem.own_u else 1
    gapped = problem.length + 8 * -(-problem.height // 8)
    for items in (8, 4) if problem.length > 1024 else (4, 8):
        threads = -(-problem.length // (32 * items)) * 32 + 32 * _PRODUCERS
        if problem.length % items or (problem.columns and problem.height % items) or threads > 1024:
            continue
        sums = problem.length + 4 * (problem.height // items + 1)
        shared = gapped * (maps_of_u * sizes[0] + problem.groups * sum(sizes[1:])) + 4 * sums
        if shared <= shared_limit - 2048:
            # Columns before rows, forwards before backwards.
            order = sorted(range(problem.groups), key=lambda k: (-(problem.codes[k] & 1), problem.codes[k]))
            return MergedPlan(items, tuple(order), threads, shared)
    return None


@lru_cache(maxsize=512)
def kernel(problem: Problem, plan: MergedPlan, out_type: int, device: int) -> cuda_runtime.Kernel:
    u, delta, B, C = problem.types
    macros: cuda_runtime.Macros = (
        *zip(("U_TYPE", "DELTA_TYPE", "B_TYPE", "C_TYPE", "OUT_TYPE"), (u, delta, B, C, out_type), strict=True),
        ("HEIGHT", problem.height),
        ("WIDTH", problem.width),
        ("COLUMNS", int(1 in problem.codes)),
        ("ROWS", int(0 in problem.codes)),
        ("ORDER", f"{sum(k << (4 * i) for i, k in enumerate(plan.order)):#x}"),
        ("OWN_U", int(problem.own_u)),
        ("ITEMS", plan.items),
        ("PRODUCERS", _PRODUCERS),
        ("SOFTPLUS", int(problem.softplus)),
    )
    return cuda_runtime.kernel("merged_scan.cu", "merged_scan", macros, device)
