"""Which variant of `cuda/merged_scan.cu` suits a problem, if any: one channel, one state, directions summed, whole maps."""

from dataclasses import dataclass
from functools import lru_cache

from . import cuda_runtime
from .cuda_shared_plan import Problem

_MAX_GROUPS = 4  # directions are unrolled
_MIN_LENGTH = 2048


@dataclass(frozen=True)
class MergedPlan:
    """A variant: steps per thread, the order of directions (those along columns first), threads and shared memory."""

    items: int
    order: tuple[int, ...]
    threads: int
    shared: int


def choose(problem: Problem, baked: bool, shared_limit: int, multiprocessors: int) -> MergedPlan | None:
    """The variant for this problem; None where `shared_scan.cu` has to do it."""
    one = problem.merge and problem.states == problem.rank == 1 and not (problem.linear or problem.table)
    known = baked and problem.groups <= _MAX_GROUPS and max(problem.codes) <= 3
    copied = problem.bulk and problem.copy == 16 and problem.length >= _MIN_LENGTH
    if not (one and known and copied) or not multiprocessors // 2 <= problem.batch <= 2 * multiprocessors:
        return None
    for items in (4, 8):
        threads = -(-problem.length // (32 * items)) * 32
        if problem.length % items or (problem.columns and problem.height % items) or threads > 1024:
            continue
        sizes = [4 if code == 0 else 2 for code in problem.types]
        cap = problem.length + 8 * -(-problem.height // 8)
        maps_of_u = problem.groups if problem.own_u else 1
        sums = problem.length + 4 * (problem.height // items + 1)
        shared = cap * (maps_of_u * sizes[0] + problem.groups * sum(sizes[1:])) + 4 * sums
        if shared <= shared_limit - 1024:
            order = tuple(sorted(range(problem.groups), key=lambda k: 1 - problem.codes[k] % 2))
            return MergedPlan(items, order, threads, shared)
    return None


@lru_cache(maxsize=512)
def kernel(problem: Problem, plan: MergedPlan, out_type: int, device: int) -> cuda_runtime.Kernel:
    u, delta, B, C = problem.types
    macros = (
        *zip(("U_TYPE", "DELTA_TYPE", "B_TYPE", "C_TYPE", "OUT_TYPE"), (u, delta, B, C, out_type), strict=True),
        ("HEIGHT", problem.height),
        ("WIDTH", problem.width),
        ("GROUPS", problem.groups),
        ("COLUMNS", sum(code & 1 for code in problem.codes)),
        ("ORDER", f"{sum(k << (4 * i) for i, k in enumerate(plan.order)):#x}ull"),
        ("CODES", f"{sum(problem.codes[k] << (4 * i) for i, k in enumerate(plan.order)):#x}ull"),
        ("OWN_U", int(problem.own_u)),
        ("ITEMS", plan.items),
        ("SOFTPLUS", int(problem.softplus)),
    )
    return cuda_runtime.kernel("merged_scan.cu", "merged_scan", macros, device)
