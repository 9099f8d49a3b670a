"""Calls the compiled CPU kernels of `cpu_kernels`, where Numba is installed: which calls they take, memory, and threads.

They compute in float32 (most read other dtypes through a copy, float64 stays with the PyTorch code) and in as many threads as
PyTorch is set to use. Numba is imported, and a kernel compiled or read from its cache, at the first call that needs it.
"""

import ctypes
import mmap
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .directions import direction_table, inverse_table

# What the kernels of the full scan, `selective_scan` and `ss2d`, read and write as it is.
_READ = (torch.float32, torch.bfloat16)
# Bytes of a huge page.
_HUGE = 1 << 21
# States that a thread should have to work on: handing it less costs more time than it saves.
_LEAST_WORK = 1 << 15

_pool: ThreadPoolExecutor | None = None


@cache
def _kernels() -> ModuleType | None:
    """The module of kernels, or None without Numba."""
    try:
        from . import cpu_kernels
    except ImportError:
        return None
    return cpu_kernels


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels take a call with these tensors: real CPU tensors, none empty, no float64, and Numba is there."""
    for x in tensors:
        if x is not None and not (
            x.is_cpu and x.dtype != torch.float64 and type(x) in (Tensor, torch.nn.Parameter) and x.numel()
        ):
            return False
    return _kernels() is not None


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """See `ops.selective_scan`."""
    batch, channels, length = u.shape
    K, N = B.shape[1:3]
    out = _output(*u.shape, dtype=out_dtype if out_dtype in _READ else torch.float32)
    u, delta, z = (x if x is None or (x.dtype in _READ and x.stride(-1) == 1) else _rows(x) for x in (u, delta, z))
    B, C = _rows(B), _rows(C)
    arguments = (
        K, channels // K, N, length, delta_softplus, u, u.element_size(), *_strides(u, 2), delta, delta.element_size(),
        *_strides(delta, 2), _table(A), B, *_strides(B, 3), C, *_strides(C, 3), _rows(D), z,
        0 if z is None else z.element_size(), *_strides(z, 2), _rows(delta_bias), out, out.element_size(),
    )  # fmt: skip
    kernels = _kernels()
    pieces = batch * K * -(-channels // (K * kernels.LANES))
    _run("selective_scan", kernels.selective_scan_scratch(N), pieces, out.numel() * N, arguments)
    return out.to(out_dtype)


def shared_scan(u, delta, A, B, C, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """See `ops.shared_scan`."""
    batch, K, R, length = u.shape
    N = A.shape[1]
    out = _output(*u.shape)
    u, delta, B, C = (_rows(x) for x in (u, delta, B, C))
    arguments = (
        K, R, N, length, delta_softplus, u, *_strides(u, 3), delta, *_strides(delta, 2), _table(A), B, *_strides(B, 3), C,
        *_strides(C, 3), _rows(delta_bias), out,
    )  # fmt: skip
    _run("shared_scan", _kernels().shared_scan_scratch(R, N), batch * K, out.numel() * N, arguments)
    return out.to(out_dtype)


def linear_scan(a, b, C) -> Tensor:
    """See `ops.linear_scan`."""
    batch, K, R, N, length = b.shape
    out = _output(batch, K, R, length)
    dtype = a.dtype
    a, b, C = (_rows(x) for x in (a, b, C))
    arguments = K, R, N, length, a, *_strides(a, 3), b, *_strides(b, 4), C, *_strides(C, 3), out
    _run("linear_scan", _kernels().linear_scan_scratch(R, N), batch * K, out.numel() * N, arguments)
    return out.to(dtype)


def shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype) -> Tensor:
    """See `ops.shared_scan2d`."""
    batch, _, R, height, width = u.shape
    K, N, length = delta.shape[1], A.shape[1], height * width
    out = _output(batch, K, R, height, width)
    u, delta, B, C = (x.float().flatten(-2) for x in (u, delta, B, C))
    u_strides = _strides(u.expand(-1, K, -1, -1), 4)
    arguments = (
        K, R, N, length, delta_softplus, u, *u_strides, delta, *_strides(delta, 3), _table(A), B, *_strides(B, 4), C,
        *_strides(C, 4), _rows(delta_bias), _order(directions, order, height, width), out,
    )  # fmt: skip
    _run("shared_scan2d", _kernels().shared_scan2d_scratch(R, N), batch * K, out.numel() * N, arguments)
    return (out.sum(1) if merge else out).to(out_dtype)


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out) -> None:
    """See `ops.ss2d`; fills `out`."""
    batch, channels, height, width = x.shape
    K, R, N, length = feats.shape[1], dt_weight.shape[2], A.shape[1], height * width
    x, feats = _by_position(x if x.dtype in _READ else x.float()), _by_position(feats.float())
    in_place = out.dtype in _READ and _is_by_position(out)
    target = out if in_place else torch.empty(batch, height, width, channels).permute(0, 3, 1, 2)
    arguments = (
        K, channels, R, N, length, delta_softplus, x, x.element_size(), *_position_strides(x), feats,
        *_position_strides(feats), _table(dt_weight), _table(A), _rows(D), _rows(delta_bias),
        _order(directions, order, height, width), target, target.element_size(), *_position_strides(target),
    )  # fmt: skip
    kernels = _kernels()
    pieces, states = batch * -(-channels // kernels.LANES), batch * K * channels * length * N
    _run("ss2d", kernels.ss2d_scratch(R, N, length), pieces, states, arguments)
    if not in_place:
        out.copy_(target)


def _output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor; a large one in huge pages where the system lends them on request.

    The C library gives memory of more than 32 MB back to the system and gets it anew, empty, at every call: then each page
    of 4 KB costs a fault, and all together as much time as a scan with N = 1. (MALLOC_MMAP_THRESHOLD_ and
    MALLOC_TRIM_THRESHOLD_ in the environment, of more bytes than any tensor has, end that for all of PyTorch.)
    """
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= 2 * _HUGE and (advise := _madvise()) is not None:
        begin, end = out.data_ptr() // mmap.PAGESIZE, (out.data_ptr() + out.nbytes) // mmap.PAGESIZE
        advise(begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return out


@cache
def _madvise() -> Callable | None:
    """The C library's function, on systems that know huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


def _is_by_position(maps: Tensor) -> bool:
    """Whether the channels of (..., C, H, W) lie side by side, and the positions at one distance."""
    height, width = maps.shape[-2:]
    channel, row, column = maps.stride()[-3:]
    return (channel == 1 or maps.shape[-3] == 1) and (height == 1 or width == 1 or row == width * column)


def _by_position(maps: Tensor) -> Tensor:
    """(..., C, H, W) that `_is_by_position`: itself or a copy."""
    return maps if _is_by_position(maps) else maps.movedim(-3, -1).contiguous().movedim(-1, -3)


def _position_strides(maps: Tensor) -> list[int]:
    """In bytes: of the dims before C, and from a position to the next."""
    *outer, _, row, column = maps.stride()
    return [maps.element_size() * stride for stride in (*outer, row if maps.shape[-1] == 1 else column)]


def _order(directions: list[int], order: Tensor | None, height: int, width: int) -> Tensor:
    """The table (K, L) of positions."""
    if order is None:
        return direction_table(directions, height, width)
    order = order.long().contiguous()
    inverse_table(order)  # raises where a position lies outside of the map: the kernels would read and write there
    return order


def _rows(tensor: Tensor | None) -> Tensor | None:
    """In float32 with the last dim contiguous: the tensor itself, or a copy."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.stride(-1) == 1):
        return tensor
    return tensor.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _table(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _strides(tensor: Tensor | None, dims: int) -> list[int]:
    """The first strides, in bytes."""
    return [0] * dims if tensor is None else [tensor.element_size() * stride for stride in tensor.stride()[:dims]]


def _run(name: str, scratch: int, pieces: int, states: int, arguments: tuple) -> None:
    """Call a kernel in as many threads as PyTorch uses, or in this one where there is too little to do.

    `scratch`: the bytes that each thread needs.
    """
    threads = 1 if pieces <= 1 or states < _LEAST_WORK else torch.get_num_threads()
    space = torch.empty(min(threads, pieces) * scratch // 4)
    table = 0, pieces, 0, space.data_ptr(), scratch, *[x if type(x) is int else _number(x) for x in arguments]
    data = array("q", table)
    address = data.buffer_info()[0]
    kernels = _kernels()
    function = kernels.compiled(getattr(kernels, name))
    if threads == 1:
        function(address)
    elif (parallel := _openmp()) is not None:
        parallel(function, address, threads, 0)
    else:
        _in_pool(function, address, threads)


def _number(argument: Tensor | bool | None) -> int:
    return 0 if argument is None else int(argument) if isinstance(argument, bool) else argument.data_ptr()


@cache
def _openmp() -> Callable | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library that PyTorch has loaded.

    Its threads are those PyTorch's own operations run on: they are awake, and do not compete with ours for the cores.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no such function, or a system on which None is no library
        return None
    parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return parallel


def _in_pool(function: Callable, address: int, threads: int) -> None:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="vmeanba_fx")
    try:
        helpers = [_pool.submit(function, address) for _ in range(threads - 1)]
    except RuntimeError:  # the interpreter is shutting down
        helpers = []
    try:
        function(address)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _after_fork() -> None:
    """A forked process has the pools of threads, but not the threads."""
    global _pool, _openmp
    _pool, _openmp = None, lambda: None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
