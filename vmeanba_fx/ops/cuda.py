"""CUDA implementations of `selective_scan`, its backward and `broadcast_add`, on the kernels of `cuda/`.

This module only chooses: a kernel variant (macros), a grid, and when to leave a call to the PyTorch implementation
(float64, or no CuPy). What it chooses is kept per layout of the arguments, so that a call that was seen before costs a
look-up and a launch. The one-channel scans are in `cuda_shared`. Importing this touches neither CuPy nor CUDA.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import backward, cpu, cuda_runtime
from .cuda_runtime import TYPE_CODES
from .library import LIBRARY, empty_map, is_channels_last

MAX_STATES = 256
_MAX_ROWS = 2**31 - 1
_MAX_LENGTH = 2**30


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: float32, float16 and bfloat16 only, and CuPy is there."""
    return all(t is None or t.dtype in TYPE_CODES for t in tensors) and cuda_runtime.available()


def type_code(tensor: Tensor | None, absent: int = -1) -> int:
    """The kernels' number of the element type."""
    return absent if tensor is None else TYPE_CODES[tensor.dtype]


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for an argument that was not given."""
    return 0 if tensor is None else tensor.data_ptr()


def parameter(tensor: Tensor | None) -> Tensor | None:
    """A small per-channel tensor (A, D, delta_bias) as the kernels read it: float32, contiguous."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.float().contiguous()


def layout(*tensors: Tensor | None) -> tuple:
    """All that the choice of a kernel reads of these tensors."""
    return tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors)


class LaunchCache(dict):
    """What was chosen for a layout of arguments; emptied when ever-changing shapes have made it large."""

    def add(self, key: tuple, value):
        if len(self) >= 4096:
            self.clear()
        self[key] = value
        return value


_forward_launches = LaunchCache()
_tail_launches = LaunchCache()


def aligned_rows(bytes_per_access: dict[int, int], *tensors: Tensor | None) -> bool:
    """Whether each tensor has unit stride in its last dim and every row starts at a multiple of the access size.

    `bytes_per_access` maps the element size to the size of one access in bytes.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        size = tensor.element_size()
        access = bytes_per_access[size]
        if tensor.data_ptr() % access or (tensor.stride(-1) != 1 and tensor.shape[-1] > 1):
            return False
        for extent, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if extent > 1 and stride * size % access:
                return False
    return True


def check_limits(op: str, length: int, states: int, rows: int = 0) -> None:
    """Sizes the kernels count with 32-bit integers, and the largest state that they keep in shared memory."""
    if states > MAX_STATES:
        raise ValueError(f"{op} on CUDA: the state size N may be at most {MAX_STATES}, but is {states}")
    if length > _MAX_LENGTH:
        raise ValueError(f"{op} on CUDA: the length may be at most {_MAX_LENGTH}, but is {length}")
    if rows > _MAX_ROWS:
        raise ValueError(f"{op} on CUDA: batch x channels may be at most {_MAX_ROWS}, but is {rows}")


def _pack_size(length: int, *tensors: Tensor | None) -> int:
    """Steps per thread that one access can fetch (8 or 4), or 0 where rows are not aligned or strided."""
    if length % 8 == 0 and aligned_rows({2: 16, 4: 16}, *tensors):
        return 8
    if length % 4 == 0 and aligned_rows({2: 8, 4: 16}, *tensors):
        return 4
    return 0


@lru_cache(maxsize=512)
def _forward_kernel(types, states, softplus, rows, length, pack, device):
    """The forward kernel for this problem, its rows per block, and its threads per block."""
    items = pack or 8
    most = -(-length // items)  # threads that a row can use
    wanted = cuda_runtime.multiprocessors(device) * 768 // rows
    # With rows to spare: more threads per row cost shuffles, fewer cost coalescing (found by timing on an H100).
    per_row = 8 if states > 1 or most < 32 else 16 if most < 128 else 32
    while per_row < 32 and per_row < most and per_row < wanted:
        per_row *= 2
    if wanted > 32 and most > 32:
        # Several warps per row, and no more of them than divide the row evenly into chunks.
        chunks = -(-most // min(1024, -(-wanted // 32) * 32))
        per_row = -(-most // (32 * chunks)) * 32
    threads = max(128, per_row) if per_row <= 32 else per_row
    names = ("U_TYPE", "DELTA_TYPE", "B_TYPE", "C_TYPE", "Z_TYPE", "OUT_TYPE")
    macros = (
        *zip(names, types, strict=True),
        ("NSTATE", states),
        ("SOFTPLUS", int(softplus)),
        ("TPR", per_row),
        ("ITEMS", items),
        ("THREADS", threads),
        ("MIN_BLOCKS", max(1, 768 // threads) if pack or per_row > 32 else 5),
        ("VECTOR", int(pack > 0)),
        ("STATES", 0),
    )
    return cuda_runtime.kernel("selective_scan.cu", "selective_scan", macros, device), threads // per_row, threads


def _forward_sizes(u, delta, B, C, z) -> tuple[int, ...]:
    """`Params` of selective_scan.cu after its pointers."""
    batch, channels, length = u.shape
    z_strides = (0, 0, 0) if z is None else z.stride()
    strides = (*u.stride(), *delta.stride(), *z_strides, *B.stride(), *C.stride())
    return batch * channels, channels, channels // B.shape[1], length, *strides


def _prepare_forward(u, delta, B, C, z, softplus, out_dtype):
    """(kernel, grid, threads, sizes) for these arguments, or None to leave them to PyTorch."""
    if not usable(u, delta, B, C, z) or out_dtype not in TYPE_CODES or u.numel() == 0:
        return None
    batch, channels, length = u.shape
    states = B.shape[2]
    check_limits("selective_scan", length, states, batch * channels)
    types = (*(type_code(t) for t in (u, delta, B, C, z)), TYPE_CODES[out_dtype])
    pack = _pack_size(length, u, delta, B, C, z)
    kernel, rows, threads = _forward_kernel(types, states, softplus, batch * channels, length, pack, u.get_device())
    return kernel, (-(-batch * channels // rows), 1, 1), threads, _forward_sizes(u, delta, B, C, z)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, out_dtype=None):
    key = (u.get_device(), delta_softplus, out_dtype, layout(u, delta, B, C, z))
    launch = _forward_launches.get(key)
    if launch is None:
        launch = _prepare_forward(u, delta, B, C, z, delta_softplus, out_dtype or u.dtype)
        if launch is None:
            return cpu.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype)
        _forward_launches.add(key, launch)
    kernel, grid, threads, sizes = launch
    A, D, delta_bias = parameter(A), parameter(D), parameter(delta_bias)
    out = torch.empty(u.shape, dtype=out_dtype or u.dtype, device=u.device)
    pointers = (pointer(t) for t in (u, delta, A, B, C, D, z, delta_bias, out))
    kernel.launch(grid, threads, 0, (*pointers, *sizes))
    return out


def selective_scan_backward(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Gradients of u, delta, A, B, C, D, z, delta_bias; an empty tensor for each of the last three that is None."""
    if not usable(grad, u, delta, A, B, C, D, z, delta_bias):
        return backward.selective_scan_backward(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    batch, channels, length = u.shape
    states = A.shape[1]
    check_limits("selective_scan_backward", length, states, batch * channels)
    empty = u.new_empty(0)
    dz = empty
    if z is not None:
        # out = y silu(z): recompute y, then the kernel sees the gradient of y.
        y = selective_scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus, torch.float32)
        gate, slope = z.float(), torch.sigmoid(z.float())
        dz = (grad * y * slope * (1 + gate * (1 - slope))).to(z.dtype)
        grad = grad * (gate * slope)
    du, ddelta, dA, dB, dC, dD, dbias = _core_backward(grad, u, delta, A, B, C, D, delta_bias, delta_softplus)
    return (
        du,
        ddelta,
        dA.to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        empty if D is None else dD.to(D.dtype),
        dz,
        empty if delta_bias is None else dbias.to(delta_bias.dtype),
    )


def _core_backward(grad, u, delta, A, B, C, D, delta_bias, softplus):
    """The backward kernels without a gate. dA, dB, dC, dD and dbias come in float32."""
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    device = u.device
    if u.numel() == 0:
        return (*(torch.zeros_like(t) for t in (u, delta, A, B, C)), A.new_zeros(channels), A.new_zeros(channels))
    A, D, delta_bias = parameter(A), parameter(D), parameter(delta_bias)
    pack = _pack_size(length, grad, u, delta, B, C)
    if pack == 8 and states > 1:
        pack = 4  # sums of dB and dC in shared memory: half the steps leave room for twice the blocks
    types = tuple(type_code(t) for t in (u, delta, B, C, grad))
    plan = _backward_plan(types, states, softplus, batch, groups, channels // groups, length, pack, device.index)

    def fresh(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=device)

    kept_states = None
    if plan.states is not None:
        kept_states = fresh(batch * channels, plan.chunks, states)
        pointers = (pointer(t) for t in (u, delta, A, B, None, None, None, delta_bias, kept_states))
        fields = (*pointers, *_forward_sizes(u, delta, B, C, None))
        plan.states.launch((-(-batch * channels // plan.states_rows), 1, 1), 128, 0, fields)
    du = fresh(*u.shape, dtype=u.dtype if plan.tiles == 1 else torch.float32)
    ddelta = fresh(*u.shape, dtype=delta.dtype if plan.tiles == 1 else torch.float32)
    dA, dD, dbias = fresh(batch, channels, states), fresh(batch, channels), fresh(batch, channels)
    dB, dC = (fresh(batch, groups, plan.splits, states, length) for _ in range(2))
    fields = (
        *(pointer(t) for t in (grad, u, delta, A, B, C, D, delta_bias, kept_states, du, ddelta, dA, dB, dC, dD, dbias)),
        *(groups, channels // groups, plan.per_block, plan.splits, length),
        *(stride for t in (grad, u, delta, B, C) for stride in t.stride()),
    )
    plan.backward.launch((plan.splits, groups, batch), plan.threads, plan.shared, fields)
    dB, dC = (t.squeeze(2) if plan.splits == 1 else t.sum(2) for t in (dB, dC))
    return du.to(u.dtype), ddelta.to(delta.dtype), dA.sum(0), dB, dC, dD.sum(0), dbias.sum(0)


@dataclass(frozen=True)
class _BackwardPlan:
    """Kernel variants and sizes for one shape. With `tiles` > 1 du and ddelta are float32 sums over tiles of states."""

    backward: cuda_runtime.Kernel
    states: cuda_runtime.Kernel | None  # keeps the state after each chunk; None where there is one chunk
    states_rows: int  # of a block of it
    tiles: int
    chunks: int
    per_block: int  # channels
    splits: int  # blocks that share the channels of a group
    threads: int
    shared: int


@lru_cache(maxsize=512)
def _backward_plan(types, states, softplus, batch, groups, per_group, length, pack, device) -> _BackwardPlan:
    items = pack or (8 if states == 1 else 4)
    per_row = 8
    while per_row < 32 and per_row * items < length:
        per_row *= 2
    threads, minimum = 128, 5 if length > 256 else 4
    teams, chunk = threads // per_row, per_row * items
    tile = max(t for t in range(1, min(states, 16) + 1) if states % t == 0)
    tiles, chunks = states // tile, -(-length // chunk)
    # Fewer channels per block until the GPU is full, or the block's per-channel sums fit.
    rounds = -(-per_group // teams)
    enough = 2 * minimum * cuda_runtime.multiprocessors(device)
    while rounds > 1 and (
        batch * groups * -(-per_group // (rounds * teams)) < enough or rounds * teams * (states + 1) * 8 > 16384
    ):
        rounds = -(-rounds // 2)
    per_block = min(rounds * teams, per_group)
    u, delta, B, C, grad = types
    common = (
        ("NSTATE", states),
        ("SOFTPLUS", int(softplus)),
        ("TPR", per_row),
        ("ITEMS", items),
        ("THREADS", threads),
        ("VECTOR", int(pack > 0)),
        *zip(("U_TYPE", "DELTA_TYPE", "B_TYPE", "C_TYPE"), (u, delta, B, C), strict=True),
    )
    keeping = (*common, ("Z_TYPE", -1), ("OUT_TYPE", 0), ("MIN_BLOCKS", 6), ("STATES", 1))
    macros = (
        *common,
        ("GRAD_TYPE", grad),
        ("DU_TYPE", u if tiles == 1 else 0),
        ("DDELTA_TYPE", delta if tiles == 1 else 0),
        ("TILE", tile),
        ("MIN_BLOCKS", minimum),
    )
    return _BackwardPlan(
        backward=cuda_runtime.kernel("selective_scan_bwd.cu", "selective_scan_bwd", macros, device),
        states=cuda_runtime.kernel("selective_scan.cu", "selective_scan", keeping, device) if chunks > 1 else None,
        states_rows=teams,
        tiles=tiles,
        chunks=chunks,
        per_block=per_block,
        splits=-(-per_group // per_block),
        threads=threads,
        shared=teams * 2 * tile * chunk * 4 + per_block * (states + 1) * 8,
    )


def _prepare_tail(y, u, D, out_dtype):
    """(kernel, grid, sizes) for these arguments, or None to leave them to PyTorch."""
    if not usable(y, u) or out_dtype not in TYPE_CODES or u.numel() == 0:
        return None
    channels, length = u.shape[1:]
    check_limits("broadcast_add", length, 1, u.shape[0] * channels)
    rows, per_group, last = y.squeeze(2), channels // y.shape[1], is_channels_last(u)
    vector = (last or u.is_contiguous()) and u.data_ptr() % 16 == 0 and u.numel() % 8 == 0
    whole = vector and (per_group if last else length) % 8 == 0 and aligned_rows({2: 16, 4: 16}, D if last else rows)
    macros = (
        ("Y_TYPE", type_code(y)),
        ("U_TYPE", type_code(u)),
        ("OUT_TYPE", TYPE_CODES[out_dtype]),
        ("SKIP", int(D is not None)),
        ("LAST", int(last)),
        ("VECTOR", int(vector)),
        ("WHOLE", int(whole)),
    )
    kernel = cuda_runtime.kernel("tail.cu", "broadcast_add", macros, u.get_device())
    sizes = (u.numel(), length, channels, per_group, *rows.stride(), *u.stride())
    return kernel, (-(-u.numel() // 2048), 1, 1), sizes


def broadcast_add(y, u, D, out_dtype=None):
    skip = parameter(D)
    key = (u.get_device(), out_dtype, layout(y, u, skip))
    launch = _tail_launches.get(key)
    if launch is None:
        launch = _prepare_tail(y, u, skip, out_dtype or u.dtype)
        if launch is None:
            return cpu.broadcast_add(y, u, D, out_dtype)
        _tail_launches.add(key, launch)
    kernel, grid, sizes = launch
    out = empty_map(u, out_dtype or u.dtype)
    kernel.launch(grid, 256, 0, (y.data_ptr(), u.data_ptr(), pointer(skip), out.data_ptr(), *sizes))
    return out


for _op in (selective_scan, selective_scan_backward, broadcast_add):
    LIBRARY.impl(_op.__name__, _op, "CUDA")
