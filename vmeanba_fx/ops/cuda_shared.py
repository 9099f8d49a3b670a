"""CUDA implementations of the one-channel and rank-r scans: `linear_scan`, `shared_scan`, `shared_scan2d`.

All three are one kernel, `cuda/shared_scan.cu`, which walks over maps in spatial order: a plain sequence is a map of
height 1. A block works on one batch item (and up to 4 of the R channels), with its directions in parallel teams of
threads and their sum in shared memory. Where there are too few batch items to fill the GPU, or the map is too large for
that sum, blocks take single directions (or part of the states) and a second launch adds up their float32 outputs. Both
are deterministic. One channel with one state, summed over the directions of a map that fits into shared memory as a
whole, has a faster kernel, `cuda/merged_scan.cu` (see `cuda_merged`).

Fastest are arrays whose (H, W) planes are contiguous and start at multiples of 16 bytes, as one projection's output
(B, features, H*W) has them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import compose, cpu, cuda_merged, cuda_runtime
from .cuda import LaunchCache, check_limits, layout, parameter, pointer, type_code, usable
from .cuda_merge import Merge
from .cuda_runtime import TYPE_CODES
from .cuda_shared_plan import MAX_DIRECTIONS, Plan, Problem, choose
from .library import LIBRARY

# Sizes of maps are compiled into the kernel, which makes it much faster. A process that meets more sizes than this gets
# kernels that take them as arguments for the rest, instead of one compilation each.
_MAX_BAKED = 48
_baked: set[tuple] = set()


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
    empty = any(t is not None and t.numel() == 0 for t in (u, delta, B, C))
    if empty or not usable(u, delta, B, C) or out_dtype not in TYPE_CODES:
        return None
    problem, device = _problem(u, delta, B, C, codes, table, softplus, merge), C.get_device()
    check_limits("a scan with shared decay", problem.length, problem.states)
    baked = _bake(problem.height, problem.width, problem.codes)
    shared_limit, strides = cuda_runtime.shared_memory_limit(device), _strides(u, delta, B, C)
    merged = cuda_merged.choose(problem, baked, shared_limit)
    if merged is not None:
        return _Launch(
            kernel=cuda_merged.kernel(problem, merged, TYPE_CODES[out_dtype], device),
            grid=(problem.batch, 1, 1),
            threads=merged.threads,
            shared=merged.shared,
            sizes=(0,) * 11 + strides,  # its sizes are compiled in
            out_shape=(problem.batch, 1, problem.height, problem.width),
            out_dtype=out_dtype,
            merge=None,
        )
    plan = choose(problem, baked, shared_limit, cuda_runtime.multiprocessors(device))
    return None if plan is None else _shared_launch(problem, plan, strides, out_dtype, device)


def _problem(u, delta, B, C, codes, table, softplus, merge) -> Problem:
    linear = u is None
    (batch, groups), (height, width) = delta.shape[:2], delta.shape[-2:]
    return Problem(
        linear=linear,
        own_u=linear or u.shape[1] > 1,
        table=table,
        merge=merge,
        softplus=softplus,
        types=(type_code(u, 0), type_code(delta), type_code(B), type_code(C)),
        batch=batch,
        groups=groups,
        states=C.shape[2],
        rank=B.shape[2] if linear else u.shape[2],
        height=height,
        width=width,
        codes=(0,) * groups if codes is None else tuple(_simplest(code, height, width) for code in codes),
        bulk=torch.cuda.get_device_capability(C.device) >= (9, 0),
        copy=_copy_bytes((delta, B, C) if linear else (u, delta, B, C), height, width),
    )


def _shared_launch(problem: Problem, plan: Plan, strides: tuple[int, ...], out_dtype: torch.dtype, device: int) -> _Launch:
    """A launch of `shared_scan.cu`. Where several blocks make the same map, theirs are float32, and added up afterwards."""
    height, width = problem.height, problem.width
    maps = problem.groups * plan.parts  # as blocks make them
    addends = 1 if plan.merge else maps if problem.merge else plan.parts
    shape: tuple[int, ...] = (problem.batch, *(() if problem.merge else (problem.groups,)), problem.rank, height, width)
    dtype, after = out_dtype, None
    if addends > 1:
        after = Merge.of(addends, shape, out_dtype, device)
        shape, dtype = (problem.batch, maps, problem.rank, height, width), torch.float32
    return _Launch(
        kernel=_kernel(problem, plan, TYPE_CODES[dtype], device),
        grid=(problem.batch, -(-problem.rank // plan.rank), 1 if plan.merge else maps),
        threads=(plan.threads + 32 * (plan.bulk and plan.loops)) * plan.teams,
        shared=plan.shared,
        sizes=(
            *(problem.directions, problem.groups, problem.states, plan.parts, problem.rank, height, width),
            *(plan.rows, plan.columns, plan.skew, plan.sum_cap, *strides),
        ),
        out_shape=shape,
        out_dtype=dtype,
        merge=after,
    )


def _strides(u, delta, B, C) -> tuple[int, ...]:
    """As the kernels' struct has them: five each of u, delta and C, six of B, 0 where a tensor has no such dim."""
    if u is None:
        return (*(0,) * 5, *delta.stride(), *B.stride(), *C.stride())
    per_group = 0 if u.shape[1] == 1 else u.stride(1)
    delta_strides, B_strides = ((*t.stride()[:2], 0, *t.stride()[2:]) for t in (delta, B))
    return (u.stride(0), per_group, *u.stride()[2:], *delta_strides, *B_strides, *C.stride())


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
def _kernel(problem: Problem, plan: Plan, out_type: int, device: int):
    u, delta, B, C = problem.types
    macros: cuda_runtime.Macros = (
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
