"""`ss2d` on CUDA: one launch of `cuda/ss2d.cu`. This module chooses the kernel variant and its shared memory.

Layouts. `x` is fast as (B, D, H, W) contiguous and as channels-last; the output lies in memory as `x` does. `feats` is
fast in half or bfloat16 as records: the K * F values of a position next to each other, F >= R + 2N per direction: `feats`
is a view of a (B, H*W, K, F) tensor, as one GEMM `x @ weights` writes it. F a multiple of 8 is best (16-byte loads, whole
sectors): pad the GEMM's weights with rows of zeros, so that R + 2N = 14, 26, 50 become F = 16, 32, 56. Half features in
other layouts are copied to that one first. float32 features are read as they lie.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import compose, cuda_runtime
from .cuda import LaunchCache, layout, pointer, type_code, usable
from .cuda_runtime import TYPE_CODES, Macros
from .cuda_ss2d_plan import MAX_DIRECTIONS, Plan, Problem, Stage, choose
from .directions import direction_table
from .library import LIBRARY, empty_map, is_channels_last

_MAX_LENGTH = 2**30
_MAX_STATES = 128
# Maps whose size is compiled into the kernel; more sizes than this run on kernels that take it as an argument.
_MAX_BAKED = 48
_baked: set[tuple[int, int]] = set()


@dataclass(frozen=True)
class _Launch:
    """A kernel with all that its launch needs but pointers: what follows from shapes, strides and dtypes."""

    kernel: cuda_runtime.Kernel
    blocks: int
    threads: int
    shared: int
    workspace: int
    sizes: tuple[int, ...]


# By layout of the arguments; None where they must be copied to another layout first.
_launches = LaunchCache()


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out_dtype=None):
    tensors = (x, feats, dt_weight, A, D, delta_bias, order)
    # Where the storage of feats ends decides whether a load may go past its last record.
    end = feats.storage_offset(), feats.untyped_storage().nbytes()
    key = (x.get_device(), layout(*tensors), end, tuple(directions), delta_softplus, out_dtype)
    if key in _launches:
        launch = _launches[key]
    elif not usable(*tensors[:6]) or (out_dtype or x.dtype) not in TYPE_CODES or x.numel() == 0:
        return compose.ss2d(*tensors[:6], directions, order, delta_softplus, out_dtype)
    else:
        launch = None
        if all(a is b for a, b in zip(tensors, _readable(*tensors, directions), strict=True)):
            launch = _prepare(*tensors, tuple(directions), delta_softplus, out_dtype or x.dtype)
        _launches.add(key, launch)
    if launch is None:
        tensors = _readable(*tensors, directions)
        directions = directions if tensors[6] is None else []
        return ss2d(*tensors[:6], directions, tensors[6], delta_softplus, out_dtype)
    out = empty_map(x, out_dtype or x.dtype)
    workspace = torch.empty(launch.workspace, dtype=torch.uint8, device=x.device) if launch.workspace else None
    pointers = (pointer(t) for t in (*tensors[:6], out, order, workspace))
    launch.kernel.launch((launch.blocks, 1, 1), launch.threads, launch.shared, (*pointers, *launch.sizes))
    return out


def _readable(x, feats, dt_weight, A, D, delta_bias, order, directions) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    """The same tensors in layouts that the kernel reads; those that already are come back as they came."""
    if order is None and len(directions) > MAX_DIRECTIONS:
        order = direction_table(directions, *x.shape[2:]).to(x.device)
    if order is not None:
        order = order.to(torch.int32).contiguous()
    dt_weight, A = dt_weight.contiguous(), A.contiguous()
    if dt_weight.data_ptr() % 4:
        dt_weight = dt_weight.clone()
    D, delta_bias = (None if t is None else t.contiguous() for t in (D, delta_bias))
    return _flat_map(x), _records(_flat_map(feats), dt_weight.shape[2]), dt_weight, A, D, delta_bias, order


def _flat_map(tensor: Tensor) -> Tensor:
    """(..., H, W) whose positions lie at one stride, so that position h*W + w is `w_stride * (h*W + w)` away."""
    height, width = tensor.shape[-2:]
    if height == 1 or width == 1 or tensor.stride(-2) == width * tensor.stride(-1):
        return tensor
    return tensor.contiguous()


def _position_stride(tensor: Tensor) -> int:
    return tensor.stride(-2) if tensor.shape[-1] == 1 else tensor.stride(-1)


def _records(feats: Tensor, rank: int) -> Tensor:
    """Half features as records of a position. float32 features, and odd ranks, are read with any strides."""
    if feats.dtype == torch.float32 or rank % 2 or _loads_cover_records(feats, 1):
        return feats
    batch, directions, count, height, width = feats.shape
    padded = -(-count // 8) * 8
    records = feats.new_empty(batch, height, width, directions, padded)[..., :count]
    return records.copy_(feats.permute(0, 3, 4, 1, 2)).permute(0, 3, 4, 1, 2)


def _padding_is_readable(feats: Tensor) -> bool:
    """Whether the storage goes on far enough after the last record to round its length up to a multiple of 8."""
    last = sum((extent - 1) * stride for extent, stride in zip(feats.shape, feats.stride(), strict=True))
    needed = feats.storage_offset() + last + 1 + -feats.shape[2] % 8
    return bool(needed * feats.element_size() <= feats.untyped_storage().nbytes())


def _loads_cover_records(feats: Tensor, words: int) -> bool:
    """Whether loads of so many 4-byte words are aligned and may cover each record."""
    batch, directions, count, height, width = feats.shape
    strides: tuple[int, ...] = (feats.stride(0) if batch > 1 else 0, feats.stride(1) if directions > 1 else 0)
    strides += (_position_stride(feats) if height * width > 1 else 0,)
    if feats.stride(2) != 1 or any(stride % (2 * words) for stride in strides) or feats.data_ptr() % (4 * words):
        return False
    return count % (2 * words) == 0 or _padding_is_readable(feats)


def _prepare(x, feats, dt_weight, A, D, delta_bias, order, directions, softplus, out_dtype) -> _Launch:
    """Choose the kernel for these arguments, which lie as `_readable` leaves them."""
    device = x.get_device()
    problem = _problem(x, feats, dt_weight, A, order, directions)
    plan = choose(problem, cuda_runtime.shared_memory_limit(device), cuda_runtime.multiprocessors(device))
    stage, baked = plan.stage, _bake(problem)
    types = {"X": x, "F": feats, "W": dt_weight, "A": A, "D": D, "BIAS": delta_bias}
    macros = (
        *((f"{name}_TYPE", type_code(tensor, absent=0)) for name, tensor in types.items()),
        *(("OUT_TYPE", TYPE_CODES[out_dtype]), ("SOFTPLUS", int(softplus))),
        *(("X_LAYOUT", _x_layout(x) if plan.full else 0), ("OUT_LAYOUT", _out_layout(x))),
        ("SPLIT", int(dt_weight.dtype != feats.dtype)),
        *_macros(problem, plan),
        *((name, value if baked else 0) for name, value in _fixed_sizes(stage, x, feats).items()),
    )
    sizes = (
        *(problem.channels, problem.groups, _packed(directions, 4), _packed(plan.sequence, 4), problem.height, problem.width),
        *(*x.stride()[:2], _position_stride(x), *feats.stride()[:3], _position_stride(feats)),
        *(stage.pitch, stage.plane, _packed(stage.x_offsets, 8), _packed(stage.y_offsets, 8)),
        plan.blocks_at_once * cuda_runtime.multiprocessors(device),
    )
    return _Launch(
        kernel=cuda_runtime.kernel("ss2d.cu", "ss2d", macros, device),
        blocks=plan.blocks,
        threads=plan.team.threads,
        shared=plan.shared,
        workspace=plan.workspace,
        sizes=sizes,
    )


def _problem(x, feats, dt_weight, A, order, directions) -> Problem:
    (batch, channels, height, width), rank, states = x.shape, dt_weight.shape[2], A.shape[1]
    if height * width > _MAX_LENGTH:
        raise ValueError(f"ss2d on CUDA: the map may have at most {_MAX_LENGTH} positions, but is {height} x {width}")
    if states > _MAX_STATES:
        raise ValueError(f"ss2d on CUDA: the state size N may be at most {_MAX_STATES}, but is {states}")
    return Problem(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        groups=feats.shape[1],
        rank=rank,
        states=states,
        directions=directions,
        table=order is not None,
        bytes_of_x=x.element_size(),
        words=_words(feats, rank),
    )


def _words(feats: Tensor, rank: int) -> int:
    """How many 4-byte words a load for the tensor cores may have: 4, 2 or 1; 0 where they cannot be used."""
    if feats.dtype == torch.float32 or rank == 0 or rank % 2 or torch.cuda.get_device_capability(feats.device) < (8, 0):
        return 0
    return next((words for words in (4, 2, 1) if _loads_cover_records(feats, words)), 0)


def _macros(problem: Problem, plan: Plan) -> Macros:
    """What follows from problem and plan alone."""
    features, team = plan.features, plan.team
    return (
        *(("RANK", problem.rank), ("NSTATE", problem.states), ("ORDER", int(problem.table))),
        *(("SEG", plan.segment), ("WARPS", team.warps), ("FRONTS", team.fronts), ("TEAMS", team.teams)),
        *(("RING", team.ring), ("LINKS_BYTES", team.links_bytes(problem.states)), ("MIN_BLOCKS", plan.blocks_at_once)),
        *(("WHOLE", int(plan.whole)), ("SPECIAL", int(plan.special)), ("STEADY", int(plan.steady))),
        *(("FULL", int(plan.full)), ("SPILL", int(plan.spill))),
        *(("MMA", int(features.fetch > 0)), ("FETCH", features.fetch or 1), ("BC_APART", int(features.apart))),
    )


def _bake(problem: Problem) -> bool:
    """Whether the size of the map is compiled into the kernel."""
    size = problem.height, problem.width
    if not problem.table and len(_baked) < _MAX_BAKED:
        _baked.add(size)
    return not problem.table and size in _baked


def _fixed_sizes(stage: Stage, x: Tensor, feats: Tensor) -> dict[str, int]:
    """Macros of kernels that are made for one size of maps."""
    return {
        "HEIGHT": x.shape[2],
        "WIDTH": x.shape[3],
        "X_STRIDE": x.stride(1),
        "F_STRIDE": _position_stride(feats),
        "PITCH": stage.pitch,
        "PLANE": stage.plane,
        "X_OFFSETS": _packed(stage.x_offsets, 8),
        "Y_OFFSETS": _packed(stage.y_offsets, 8),
    }


def _x_layout(x: Tensor) -> int:
    """The kernel's X_LAYOUT: 1 rows of even length, 2 channels-last, 0 anything."""
    (batch, channels, _, width), step = x.shape, _position_stride(x)
    starts = (x.stride(0) if batch > 1 else 0, x.stride(1) if channels > 1 else 0)
    if step == 1 and width % 2 == 0 and not any(s % 2 for s in starts) and x.data_ptr() % (2 * x.element_size()) == 0:
        return 1
    starts = (starts[0], step)
    if x.stride(1) == 1 and channels % 8 == 0 and not any(s % 8 for s in starts) and x.data_ptr() % 16 == 0:
        return 2
    return 0


def _out_layout(x: Tensor) -> int:
    """The kernel's OUT_LAYOUT: 2 channels-last, 1 rows of even length, 0 other rows. The output lies as x does."""
    return 2 if is_channels_last(x) else int(x.shape[3] % 2 == 0)


def _packed(values, bits: int) -> int:
    """Small numbers in one signed 64-bit integer, the first in the lowest bits."""
    packed = sum(value << (bits * i) for i, value in enumerate(values))
    return packed - 2**64 if packed >= 2**63 else packed


LIBRARY.impl("ss2d", ss2d, "CUDA")
