"""CUDA implementations of the one-channel and rank-r scans: `linear_scan`, `shared_scan`, `shared_scan2d`.

All three are one kernel, `cuda/shared_scan.cu`, which walks over maps in spatial order: a plain sequence is a map of
height 1. A block works on one batch item (and up to 4 of the R channels), with its directions in parallel teams of
threads and their sum in shared memory. Where there are too few batch items to fill the GPU, or the map is too large for
that sum, blocks take single directions (or part of the states) and a second launch adds up their float32 outputs. Both
are deterministic.

Fastest are arrays whose (H, W) planes are contiguous and start at multiples of 16 bytes, as one projection's output
(B, features, H*W) has them.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import lcm

import torch
from torch import Tensor

from . import compose, cpu, cuda_runtime
from .cuda import LaunchCache, check_limits, layout, parameter, pointer, type_code, usable
from .cuda_merge import Merge
from .cuda_runtime import TYPE_CODES
from .library import LIBRARY

MAX_DIRECTIONS = 16
_MAX_TILE = 8192
_MIN_BULK = 2048  # steps of a map from which bulk copies pay
# Sizes of maps are compiled into the kernel, which makes it much faster. A process that meets more sizes than this gets
# kernels that take them as arguments for the rest, instead of one compilation each.
_MAX_BAKED = 48
_baked: set[tuple] = set()


@dataclass(frozen=True)
class _Problem:
    """What the choice of a kernel variant depends on."""

    linear: bool
    own_u: bool  # every direction has its own u
    table: bool
    merge: bool
    softplus: bool
    types: tuple[int, int, int, int]  # u, delta (or a), B (or b), C
    batch: int
    groups: int
    states: int
    rank: int
    height: int
    width: int
    codes: tuple[int, ...]
    bulk: bool  # the GPU has bulk copies (sm_90)
    copy: int  # bytes of one asynchronous copy that all arrays' alignment allows, 0 for none

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def columns(self) -> bool:
        return any(code & 1 for code in self.codes)

    @property
    def directions(self) -> int:
        """The codes as the kernel reads them, four bits each."""
        return sum((code & 7) << (4 * k) for k, code in enumerate(self.codes[:MAX_DIRECTIONS]))


@dataclass(frozen=True)
class _Plan:
    """A kernel variant. `parts` blocks share the states of one direction; `rows` and `columns` are sizes of tiles."""

    baked: bool
    merge: bool
    parts: int
    rank: int
    threads: int
    teams: int
    items: int
    stages: int
    one_u: bool  # all teams read the same u, which is fetched once
    pair: int  # states per step
    rescan: bool
    bulk: bool
    loops: bool  # there are more steps than stages
    rows: int
    columns: int
    copy: int
    skew: int
    cap: int
    sum_cap: int
    shared: int


@dataclass(frozen=True)
class _Launch:
    """A kernel with all that its launch needs but pointers."""

    kernel: cuda_runtime.Kernel
    grid: tuple[int, int, int]
    threads: int
    shared: int
    sizes: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_dtype: torch.dtype
    merge: Merge | None  # what is still to be done


_launches = LaunchCache()


def linear_scan(a, b, C):
    maps = (t.unsqueeze(-2) for t in (a, b, C))
    delta, B, C_map = maps
    out = _run(None, delta, None, B, C_map, None, None, None, False, False, a.dtype)
    return cpu.linear_scan(a, b, C) if out is None else out.squeeze(-2)


def shared_scan(u, delta, A, B, C, delta_bias=None, delta_softplus=False, out_dtype=None):
    maps = (t.unsqueeze(-2) for t in (u, delta, B, C))
    u_map, delta_map, B_map, C_map = maps
    out = _run(u_map, delta_map, A, B_map, C_map, delta_bias, None, None, delta_softplus, False, out_dtype or u.dtype)
    if out is None:
        return cpu.shared_scan(u, delta, A, B, C, delta_bias, delta_softplus, out_dtype)
    return out.squeeze(-2)


def shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype=None):
    if order is None and len(directions) > MAX_DIRECTIONS:
        raise ValueError(
            f"shared_scan2d on CUDA: at most {MAX_DIRECTIONS} directions by code, but there are {len(directions)}; "
            "give an index table (order) for more"
        )
    codes = tuple(directions) if order is None else None
    out = _run(u, delta, A, B, C, delta_bias, codes, order, delta_softplus, merge, out_dtype or u.dtype)
    if out is None:
        return compose.shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype)
    return out


def _simplest(code: int, height: int, width: int) -> int:
    """The code without what a map of one row or column makes void, so that such a map is read as a plain sequence."""
    if height == 1:
        return (code ^ (code >> 1)) & 2 if not code & 1 else code & 2
    if width == 1:
        return (code ^ (code >> 1)) & 2 if code & 1 else code & 2
    return code


def _run(u, delta, A, B, C, bias, codes, order, softplus, merge, out_dtype) -> Tensor | None:
    """The scan by a kernel; None where there is none for these arguments, and PyTorch has to do it.

    u (B, 1 or K, R, H, W), or None for a linear scan: delta is a (B, K, N, H, W) and B is b (B, K, R, N, H, W).
    `codes` None: every direction reads along rows.
    """
    key = (C.get_device(), codes, order is None, softplus, merge, out_dtype, layout(u, delta, B, C))
    launch = _launches.get(key)
    if launch is None:
        launch = _prepare(u, delta, B, C, codes, order is not None, softplus, merge, out_dtype)
        if launch is None:
            return None
        _launches.add(key, launch)
    A, bias = parameter(A), parameter(bias)
    table = None if order is None else order.to(torch.int32).contiguous()
    out = torch.empty(launch.out_shape, dtype=launch.out_dtype, device=C.device)
    pointers = (pointer(t) for t in (u, delta, A, B, C, bias, out, table))
    launch.kernel.launch(launch.grid, launch.threads, launch.shared, (*pointers, *launch.sizes))
    return out if launch.merge is None else launch.merge(out)


def _prepare(u, delta, B, C, codes, table, softplus, merge, out_dtype) -> _Launch | None:
    """Choose the kernel for these arguments; None where PyTorch has to do it."""
    linear = u is None
    batch, groups, height, width = *delta.shape[:2], *delta.shape[-2:]
    states, rank = C.shape[2], B.shape[2] if linear else u.shape[2]
    if not usable(u, delta, B, C) or out_dtype not in TYPE_CODES or 0 in (batch, groups, rank, states):
        return None
    check_limits("a scan with shared decay", height * width, states)
    arrays = (delta, B, C) if linear else (u, delta, B, C)
    codes = (0,) * groups if codes is None else tuple(_simplest(code, height, width) for code in codes)
    device = C.get_device()
    problem = _Problem(
        linear=linear,
        own_u=linear or u.shape[1] > 1,
        table=table,
        merge=merge,
        softplus=softplus,
        types=(type_code(u, 0), type_code(delta), type_code(B), type_code(C)),
        batch=batch,
        groups=groups,
        states=states,
        rank=rank,
        height=height,
        width=width,
        codes=codes,
        bulk=torch.cuda.get_device_capability(device) >= (9, 0),
        copy=_copy_bytes(arrays, height, width),
    )
    plan = _plan(
        problem,
        _bake(height, width, codes),
        cuda_runtime.shared_memory_limit(device),
        cuda_runtime.multiprocessors(device),
    )
    if plan is None:
        return None
    maps = groups * plan.parts  # as blocks make them
    addends = 1 if plan.merge else maps if merge else plan.parts
    shape, dtype, after = (batch, *(() if merge else (groups,)), rank, height, width), out_dtype, None
    if addends > 1:
        after = Merge.of(addends, shape, out_dtype, device)
        shape, dtype = (batch, maps, rank, height, width), torch.float32
    if linear:
        u_strides, delta_strides, B_strides = (0,) * 5, delta.stride(), B.stride()
    else:
        per_group = 0 if u.shape[1] == 1 else u.stride(1)
        u_strides = (u.stride(0), per_group, *u.stride()[2:])
        delta_strides = (*delta.stride()[:2], 0, *delta.stride()[2:])
        B_strides = (*B.stride()[:2], 0, *B.stride()[2:])
    sizes = (groups, states, plan.parts, rank, height, width, plan.rows, plan.columns, plan.skew, plan.sum_cap)
    return _Launch(
        kernel=_kernel(problem, plan, TYPE_CODES[dtype], device),
        grid=(batch, -(-rank // plan.rank), 1 if plan.merge else maps),
        threads=(plan.threads + 32 * (plan.bulk and plan.loops)) * plan.teams,
        shared=plan.shared,
        sizes=(problem.directions, *sizes, *u_strides, *delta_strides, *B_strides, *C.stride()),
        out_shape=shape,
        out_dtype=dtype,
        merge=after,
    )


def _copy_bytes(arrays, height: int, width: int) -> int:
    """Bytes (16, 8 or 4) of the copies that suit every array; 0 where strides or addresses forbid them."""
    copy = 16
    for tensor in arrays:
        size = tensor.element_size()
        *outer, step_h, step_w = tensor.stride()
        if (width > 1 and step_w != 1) or (height > 1 and step_h != width):
            return 0
        while copy >= 4 and (
            tensor.data_ptr() % copy
            or height * width * size % copy
            or any(n > 1 and s * size % copy for n, s in zip(tensor.shape, outer, strict=False))
        ):
            copy //= 2
    return copy if copy >= 4 else 0


def _bake(*sizes) -> bool:
    """Whether these sizes are compiled into the kernel."""
    if sizes not in _baked and len(_baked) < _MAX_BAKED:
        _baked.add(sizes)
    return sizes in _baked


@lru_cache(maxsize=512)
def _plan(problem: _Problem, baked: bool, shared_limit: int, multiprocessors: int) -> _Plan | None:
    """The first of the variants, best first, that fits into shared memory; None if a map cannot be cut into tiles."""
    rank = 1 if problem.rank == 1 else 2 if problem.rank == 2 else 4
    blocks = problem.batch * -(-problem.rank // rank)
    few = blocks * (1 if problem.merge else problem.groups) < multiprocessors // 2
    small = problem.states == 1 and problem.length <= 4096
    in_block = problem.merge and (small or not few)
    for merge in (True, False) if in_block else (False,):
        parts = 1
        if not merge and few:
            wanted = multiprocessors // (blocks * problem.groups)
            parts = max(p for p in range(1, problem.states + 1) if problem.states % p == 0 and p <= max(1, wanted))
        # With many blocks, two per multiprocessor: one computes while the other waits.
        budgets = (shared_limit // 2, shared_limit) if blocks > 2 * multiprocessors else (shared_limit,)
        items = _items(problem.states // parts, problem.length, rank)
        if merge and problem.states == 1 and rank == 1 and blocks <= 2 * multiprocessors:
            # All directions at once, each fetched whole: the first are scanned while the last still arrive.
            plan = _fit(problem, baked, merge, 1, rank, problem.groups, _MAX_TILE, 16, 1, 1, shared_limit)
            if plan is not None:
                return plan
        # Whole maps first, then more teams, then more stages.
        sizes = [(budget, _MAX_TILE) for budget in budgets if problem.length <= _MAX_TILE]
        sizes += product(budgets, (_MAX_TILE, 4096, 2048, 1024, 512))
        teams_counts = _team_counts(problem, merge, blocks, multiprocessors)
        plain = baked and not problem.linear and not problem.table and 0 not in problem.types
        pair = 2 if plain and items == 16 and problem.states // parts % 2 == 0 else 1
        # Other blocks on the same multiprocessor, or steps of two states, fill the waits as more stages would.
        depths = (2,) if pair == 2 or (problem.states == 1 and blocks > 2 * multiprocessors) else (4, 3, 2)
        for (budget, tile), teams, stages in product(sizes, teams_counts, depths):
            plan = _fit(problem, baked, merge, parts, rank, teams, tile, items, stages, pair, budget)
            if plan is not None:
                return plan
    return None


def _items(states: int, length: int, rank: int) -> int:
    """Steps per thread: sixteen spread the cost of a block-wide scan, eight leave more threads to hide waits."""
    return 16 if rank == 1 and length > (1024 if states > 2 else 4096) else 8


def _team_counts(problem: _Problem, merge: bool, blocks: int, multiprocessors: int) -> tuple[int, ...]:
    """How many directions a block scans at a time. With blocks to spare, one: other blocks fill the gaps as well. Many ranks
    and states need many registers."""
    if not merge or problem.groups == 1 or problem.rank > 2 or (problem.rank > 1 and problem.states > 1):
        return (1,)
    if blocks > 2 * multiprocessors:
        return (1,)
    return (2, 1) if problem.groups < 4 or problem.length > 1024 else (4, 2, 1)


def _fit(problem, baked, merge, parts, rank, teams, tile, items, stages, pair, shared_limit) -> _Plan | None:
    """The plan with these choices, or None if it does not fit into shared memory or a tile cannot hold a line."""
    height, width, length = problem.height, problem.width, problem.length
    states = problem.states // parts
    rows, columns = min(tile, length), width
    if length > tile:
        if problem.table:
            return None
        if any(code & 5 == 4 for code in problem.codes):
            whole = lcm(width, 8)  # lines that are read backwards must not be cut
            rows = tile // whole * whole
        rows = rows // 8 * 8
        if problem.columns:
            columns = tile // height
            columns = columns // 8 * 8 if columns >= 8 else columns
        if rows == 0 or columns == 0:
            return None
    used = max(rows, columns * height if problem.columns else 0)
    threads = -(-used // (32 * items)) * 32
    if not baked:
        threads = 1 << (threads - 1).bit_length()  # few variants, each for many sizes
    if threads * teams > 1024:
        return None
    sizes = [4 if code == 0 else 2 for code in problem.types]
    copy = problem.copy
    while copy >= 4 and any(
        rows * s % copy or (columns != width and (width * s % copy or columns * s % copy)) for s in sizes[:4]
    ):
        copy //= 2
    copy = copy if copy >= max(4, *sizes[:4]) else 0
    skew = 8 if width % 2 == 0 and height > 1 and (problem.columns or problem.table) else 0
    cap = -(-(threads * items + skew * (max(height, used // width) // 8 + 1)) // 8) * 8
    if not baked:
        cap = -(-cap // 1024) * 1024
    sum_cap = -(-(length + skew * (height // 8 + 1)) // 8) * 8 if merge else cap
    # Bulk copies are for long pieces.
    bulk = problem.bulk and baked and copy == 16 and columns == width and length >= _MIN_BULK
    tiles = max(-(-length // rows), -(-width // columns))
    steps = (-(-problem.groups // teams) if merge else 1) * tiles * states // pair
    stages = min(stages, max(steps, 1 if bulk else 2))
    loops = steps > stages
    if (threads + 32 * (bulk and loops)) * teams > 1024 or (stages == 1 and (loops or not bulk)):
        return None
    size_u, size_delta, size_B, size_C = sizes[:4]
    one_u = teams > 1 and stages == 1 and not problem.own_u
    if problem.linear:
        front, stage = 0, pair * (size_delta + rank * size_B + size_C)
    else:
        front, stage = -(-stages * pair // states) * (size_delta + (not one_u) * rank * size_u), pair * (size_B + size_C)
    shared = teams * (cap * (stages * stage + front) + rank * sum_cap * 4) + one_u * cap * rank * size_u
    shared += 4 * (problem.groups if merge else 1) * (states + 1)
    fixed = teams * 2 * 4 * (threads // 32 * (pair * rank + pair + 1) + states * rank + stages)
    if shared + fixed > shared_limit - 1024:
        return None
    return _Plan(
        *(baked, merge, parts, rank, threads, teams, items, stages, one_u, pair),
        *(rank == 1 and items == 8 and pair == 1, bulk, loops),
        *(rows, columns, copy, skew, cap, sum_cap, shared),
    )


@lru_cache(maxsize=512)
def _kernel(problem: _Problem, plan: _Plan, out_type: int, device: int):
    u, delta, B, C = problem.types
    macros = (
        *zip(("U_TYPE", "DELTA_TYPE", "B_TYPE", "C_TYPE", "OUT_TYPE"), (u, delta, B, C, out_type), strict=True),
        ("LINEAR", int(problem.linear)),
        ("TABLE", int(problem.table)),
        ("MERGE", int(plan.merge)),
        ("SOFTPLUS", int(problem.softplus)),
        ("NSTATE", problem.states // plan.parts),
        ("RANK", plan.rank),
        ("TEAM_THREADS", plan.threads),
        ("TEAMS", plan.teams),
        ("ITEMS", plan.items),
        ("STAGES", plan.stages),
        ("ONE_U", int(plan.one_u)),
        ("PAIR", plan.pair),
        ("RESCAN", int(plan.rescan)),
        ("BULK", int(plan.bulk)),
        ("LOOPS", int(plan.loops)),
        ("CAP", plan.cap),
        ("COPY", plan.copy),
        ("BAKED", int(plan.baked)),
    )
    if plan.baked:
        macros += (
            ("HEIGHT", problem.height),
            ("WIDTH", problem.width),
            ("GROUPS", problem.groups),
            ("ROWS_TILE", plan.rows),
            ("COLUMNS_TILE", plan.columns),
            ("SKEW", plan.skew),
            ("SUM_CAP", plan.sum_cap),
            ("DIRECTIONS", f"{problem.directions}ull"),
        )
    return cuda_runtime.kernel("shared_scan.cu", "shared_scan", macros, device)


for _op in (linear_scan, shared_scan, shared_scan2d):
    LIBRARY.impl(_op.__name__, _op, "CUDA")
