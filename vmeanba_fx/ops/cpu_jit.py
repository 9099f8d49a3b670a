"""Calls the compiled CPU kernels of `cpu_kernels`, where Numba is installed: which calls they take, memory, and threads.

They compute in float32 (float16 is read through a copy, float64 stays with the PyTorch code) and in as many threads as PyTorch
is set to use. Numba is imported, and a kernel compiled or read from its cache, at the first call that needs it.
"""

import ctypes
import mmap
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .directions import direction_table, inverse_table

# What the kernels read and write as it is.
_READ = (torch.float32, torch.bfloat16)
# Bytes of a huge page.
_HUGE = 1 << 21
# States that a thread should have to work on: handing it less costs more time than it saves.
_LEAST_WORK = 1 << 15

_pool: ThreadPoolExecutor | None = None


@cache
def _kernels() -> Any:
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
    out = _output(*u.shape, dtype=out_dtype)
    (u,), (delta,), (z,), (B, C) = (_rows(*tensors) for tensors in ((u,), (delta,), (z,), (B, C)))
    arguments = (
        K, channels // K, N, length, delta_softplus, u, u.element_size(), *_strides(u, 2), delta, delta.element_size(),
        *_strides(delta, 2), _table(A), B.element_size(), B, *_strides(B, 3), C, *_strides(C, 3), _table(D), z,
        0 if z is None else z.element_size(), *_strides(z, 2), _table(delta_bias), out, out.element_size(),
    )  # fmt: skip
    kernels = _kernels()
    pieces = batch * K * -(-channels // (K * kernels.LANES))
    _run("selective_scan", kernels.selective_scan_scratch(N), pieces, out.numel() * N, arguments)
    return out.to(out_dtype)


def linear_scan(a, b, C) -> Tensor:
    """See `ops.linear_scan`."""
    batch, K, R, N, length = b.shape
    dtype = a.dtype
    out = _output(batch, K, R, length, dtype=dtype)
    a, b, C = _rows(a, b, C)
    sizes = a.element_size(), out.element_size()
    arguments = K, R, N, length, sizes[0], a, *_strides(a, 3), b, *_strides(b, 4), C, *_strides(C, 3), out, sizes[1]
    _run("linear_scan", _kernels().linear_scan_scratch(R, N, 2 in sizes), batch * K, out.numel() * N, arguments)
    return out.to(dtype)


def shared_scan(u, delta, A, B, C, delta_bias, delta_softplus, out_dtype) -> Tensor:
    """See `ops.shared_scan`."""
    batch, K, R, length = u.shape
    N = A.shape[1]
    out = _output(*u.shape, dtype=out_dtype)
    u, delta, B, C = _rows(u, delta, B, C)
    sizes = u.element_size(), out.element_size()
    arguments = (
        K, R, N, length, delta_softplus, sizes[0], u, *_strides(u, 3), delta, *_strides(delta, 2), _table(A), B,
        *_strides(B, 3), C, *_strides(C, 3), _table(delta_bias), out, sizes[1],
    )  # fmt: skip
    _run("shared_scan", _kernels().shared_scan_scratch(R, N, 2 in sizes), batch * K, out.numel() * N, arguments)
    return out.to(out_dtype)


def shared_scan2d(u, delta, A, B, C, delta_bias, directions, order, delta_softplus, merge, out_dtype) -> Tensor:
    """See `ops.shared_scan2d`."""
    batch, _, R, height, width = u.shape
    K, N, length = delta.shape[1], A.shape[1], height * width
    # The sum over directions is the kernel's, for every channel by one thread. A single channel is summed afterwards: its
    # directions are small beside B and C, and all the work there is to share out.
    together = merge and R > 1
    some = -(-R // min(R, -(-torch.get_num_threads() // batch))) if together else R
    out = _output(batch, 1 if together else K, R, height, width, dtype=torch.float32 if merge and not together else out_dtype)
    u, delta, B, C = _alike(*(x.flatten(-2) for x in (u, delta, B, C)))
    sizes = u.element_size(), out.element_size()
    u_strides = _strides(u.expand(-1, K, -1, -1), 4)
    arguments = (
        K, R, N, length, delta_softplus, some, together, sizes[0], u, *u_strides, delta, *_strides(delta, 3), _table(A), B,
        *_strides(B, 4), C, *_strides(C, 4), _table(delta_bias), _order(directions, order, height, width), out, sizes[1],
    )  # fmt: skip
    scratch = _kernels().shared_scan2d_scratch(some, N, length, together and sizes[1] == 2)
    _run("shared_scan2d", scratch, batch * (1 if together else K) * -(-R // some), batch * K * R * length * N, arguments)
    return (out.sum(1) if merge else out).to(out_dtype)


def ss2d(x, feats, dt_weight, A, D, delta_bias, directions, order, delta_softplus, out) -> None:
    """See `ops.ss2d`; fills `out`."""
    batch, channels, height, width = x.shape
    K, R, N, length = feats.shape[1], dt_weight.shape[2], A.shape[1], height * width
    (x,), (feats,) = _alike(x), _alike(feats)
    if not (_is_by_position(x) or x[0].is_contiguous()):
        x = x.contiguous()
    if not _is_by_position(feats):
        feats = feats.movedim(2, -1).contiguous().movedim(-1, 2)
    if 4 * feats.numel() <= x.nbytes:
        feats = feats.float()  # faster than in the kernel, anew for every 16 channels, where the copy is a small one
    target = out if out.dtype in _READ else torch.empty_like(out, dtype=torch.float32)
    arguments = (
        K, channels, R, N, length, delta_softplus, x, x.element_size(), *_map_strides(x), feats, feats.element_size(),
        *_strides(feats, 2), _map_strides(feats)[-1], _table(dt_weight), _table(A), _table(D), _table(delta_bias),
        _order(directions, order, height, width), target, target.element_size(), *_map_strides(target),
    )  # fmt: skip
    kernels = _kernels()
    pieces, states = batch * -(-channels // kernels.LANES), batch * K * channels * length * N
    scratch = kernels.ss2d_scratch(R, N, length, 0 if _is_by_position(x) else x.element_size())
    _run("ss2d", scratch, pieces, states, arguments)
    if target is not out:
        out.copy_(target)


def _output(*shape: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor, in float32 where the kernels do not write `dtype`; a large one in huge pages where the system lends
    them on request.

    The C library gives memory of more than 32 MB back to the system and gets it anew, empty, at every call: then each page
    of 4 KB costs a fault, and all together as much time as a scan with N = 1. (MALLOC_MMAP_THRESHOLD_ and
    MALLOC_TRIM_THRESHOLD_ in the environment, of more bytes than any tensor has, end that for all of PyTorch.)
    """
    out = torch.empty(shape, dtype=dtype if dtype in _READ else torch.float32)
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


def _map_strides(maps: Tensor) -> list[int]:
    """In bytes: of the batch, from channel to channel (0 where they lie side by side) and from position to position."""
    channel, _, column = maps.stride()[-3:]
    row = maps.stride(-2)
    sizes = maps.stride(0), 0 if _is_by_position(maps) else channel, row if maps.shape[-1] == 1 else column
    return [maps.element_size() * stride for stride in sizes]


def _order(directions: list[int], order: Tensor | None, height: int, width: int) -> Tensor:
    """The table (K, L) of positions."""
    if order is None:
        return direction_table(directions, height, width)
    order = order.long().contiguous()
    inverse_table(order)  # raises where a position lies outside of the map: the kernels would read and write there
    return order


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that the kernels read together: all bfloat16 or, converted if need be, all float32."""
    as_they_are = tensors[0].dtype in _READ and all(x.dtype == tensors[0].dtype for x in tensors)
    return tensors if as_they_are else tuple(x.float() for x in tensors)


def _rows(*tensors: Any) -> tuple[Any, ...]:
    """`_alike`, and with the last dim contiguous; as they are where they are None."""
    if tensors[0] is None:
        return tensors
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in _alike(*tensors))


def _table(tensor: Tensor | None) -> Tensor | None:
    """Parameters, in float32."""
    return None if tensor is None else tensor.float().contiguous()


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
    _pool, _openmp = None, lambda: None  # type: ignore[assignment]  # no need to cache it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
