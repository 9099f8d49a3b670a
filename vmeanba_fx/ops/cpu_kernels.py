"""The scans as machine code for the CPU, through Numba. Imported at the first use, never by `import vmeanba_fx`.

A kernel is a C function of one address: that of a table of int64 with a counter from zero, the number of pieces the work is
cut into, a second counter, the address of scratch memory and the bytes of it that a thread needs (`..._scratch` gives them),
and the arguments named in the kernel. As many threads as there is scratch memory for may run it on the same table at once:
each takes the next piece until none is left. Nothing here keeps a state, allocates or needs the GIL.

The scratch memory is the caller's: an array that Numba allocates is freed after its last mention, not where addresses in it
are used for the last time.

Tensors come as addresses, with strides in bytes, so that each kernel is compiled once; they are contiguous in the last dim.
Those with a `..._size` have numbers of that many bytes, 4 (float32) or 2 (bfloat16); tables of positions are int64, all else
is float32. Address 0: not given.

The kernels of the scans whose channels share a decay are in `cpu_shared`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from .cpu_lanes import (
    ARGUMENTS,
    LANES,
    ROW,
    TILE,
    clear,
    deliver,
    enter,
    exp2,
    fetch,
    fma,
    get,
    load,
    load_columns,
    load_some,
    position,
    prefetch_vectors,
    put,
    put_position,
    read,
    read_rows,
    silu,
    softplus,
    spread,
    store,
    table,
    take,
    transpose,
    write_rows,
)
from .cpu_llvm import LOG2_E

# All kernels are found in this module.
from .cpu_shared import (  # noqa: F401
    linear_scan,
    linear_scan_scratch,
    shared_scan,
    shared_scan2d,
    shared_scan2d_scratch,
    shared_scan_scratch,
)

SPAN = 8 * ROW  # bytes of a row that the full scan copies at a time


def selective_scan_scratch(N: int) -> int:
    return 4 * TILE + 3 * LANES * SPAN + 2 * N * (SPAN + ROW)


def selective_scan(data):
    """A piece is 16 channels of one group and one batch item; the lanes are channels.

    Rows are copied to and fro in spans of 128 steps: where L is a power of two, rows side by side share their place in the
    caches, and vectors taken from them one by one would throw each other out. The next span is asked for while this one is
    scanned: with 16 rows of each tensor on the way, the processor does not see what comes next.

    u, delta, z, out (B, K*D, L); B, C (B, K, N, L), both of BC_size; A (K*D, N) and `out` contiguous; skip, bias (K*D,).
    """
    (K, D, N, L, softplus_, u, u_size, u_b, u_c, delta, delta_size, delta_b, delta_c, A, BC_size, B, B_b, B_k, B_n, C, C_b, C_k,
     C_n, skip, z, z_size, z_b, z_c, bias, out, out_size) = table(data + ARGUMENTS, 31)  # fmt: skip
    pieces, piece, x_t = enter(data)
    dt_t, du_t, y_t, decay = x_t + TILE, x_t + 2 * TILE, x_t + 3 * TILE, x_t + 4 * TILE
    state, u_rows = decay + N * ROW, decay + 2 * N * ROW
    delta_rows, out_rows, B_rows = u_rows + LANES * SPAN, u_rows + 2 * LANES * SPAN, u_rows + 3 * LANES * SPAN
    C_rows = B_rows + N * SPAN
    tiles = (D + LANES - 1) // LANES
    zero = spread(np.float32(0))
    while piece < pieces:
        group, tile = divmod(piece, tiles)
        item, k = divmod(group, K)
        rows = min(LANES, D - LANES * tile)
        channel = k * D + LANES * tile
        u_at, delta_at = u + item * u_b + channel * u_c, delta + item * delta_b + channel * delta_c
        B_at, C_at, z_at = B + item * B_b + k * B_k, C + item * C_b + k * C_k, z + item * z_b + channel * z_c
        out_at, row = out + out_size * L * (item * K * D + channel), out_size * L
        read_decays(A + 4 * channel * N, N, rows, decay)
        clear(state, N)
        shift = load_some(bias + 4 * channel, rows) if bias else zero
        weight = load_some(skip + 4 * channel, rows) if skip else zero
        for begin in range(0, L, SPAN // 4):
            steps = min(SPAN // 4, L - begin)
            read_rows(u_at + u_size * begin, u_c, rows, steps, u_rows, SPAN, u_size)
            read_rows(delta_at + delta_size * begin, delta_c, rows, steps, delta_rows, SPAN, delta_size)
            read_rows(B_at + BC_size * begin, B_n, N, steps, B_rows, SPAN, BC_size)
            read_rows(C_at + BC_size * begin, C_n, N, steps, C_rows, SPAN, BC_size)
            for t in range(0, steps, LANES):
                ahead = begin + t + SPAN // 4
                if ahead < L:
                    prefetch_vectors(u_at + u_size * ahead, u_c, rows)
                    prefetch_vectors(delta_at + delta_size * ahead, delta_c, rows)
                prefetch_vectors(out_at + out_size * (begin + t), row, rows)
                load_columns(u_rows + 4 * t, SPAN, rows, x_t)
                load_columns(delta_rows + 4 * t, SPAN, rows, dt_t)
                _drives(x_t, shift, softplus_, dt_t, du_t)
                for i in range(min(LANES, steps - t)):
                    dt, du, y = load(dt_t + ROW * i), load(du_t + ROW * i), weight * load(x_t + ROW * i)
                    B_now, C_now = B_rows + 4 * (t + i), C_rows + 4 * (t + i)
                    y = advance(dt, du, y, N, decay, state, B_now, C_now, SPAN)
                    store(y_t + ROW * i, y)
                transpose(y_t, y_t)
                read_rows(y_t, ROW, rows, LANES, out_rows + 4 * t, SPAN)
            if z:
                read_rows(z_at + z_size * begin, z_c, rows, steps, u_rows, SPAN, z_size)
                _gate(u_rows, rows, steps, out_rows)
            write_rows(out_rows, SPAN, rows, steps, out_at + out_size * begin, row, out_size)
        piece = take(data)


@njit(nogil=True)
def _drives(x_t, shift, softplus_, dt_t, du_t):
    """In place, dt = softplus?(dt + shift) of 16 steps, a vector of channels each; to du_t, dt * x."""
    for i in range(LANES):
        dt = load(dt_t + ROW * i) + shift
        if softplus_:
            dt = softplus(dt)
        store(dt_t + ROW * i, dt)
        store(du_t + ROW * i, dt * load(x_t + ROW * i))


@njit(nogil=True)
def _gate(z_rows, rows, steps, out_rows):
    """out *= silu(z), both (rows, steps) in spans."""
    for i in range(rows):
        for t in range(SPAN * i, SPAN * i + 4 * steps, ROW):
            store(out_rows + t, load(out_rows + t) * silu(load(z_rows + t)))


def ss2d_scratch(R: int, N: int, L: int, x_size: int) -> int:
    """`x_size`: of x where it is turned, else 0."""
    R_whole, f_whole = -(-R // LANES) * LANES, -(-(R + 2 * N) // LANES) * LANES
    return TILE // 2 + (2 * N + R_whole) * ROW + 8 * 4 * f_whole + ROW + TILE + L * ROW + L * LANES * x_size


def ss2d(data):
    """A piece is 16 channels of one batch item; the lanes are channels, and one position after another is read and added to.

    The sum over directions is kept for these channels alone, (L, 16), and the last direction writes it to `out`. Where the
    channels of x or out do not lie side by side, they are turned for these channels, from or to rows of positions.

    x, out: (B, L, D) with x_c, out_c = 0, or (B, D, L) with the stride from channel to channel; feats (B, K, L, R + 2N);
    weight (K, D, R), A (K*D, N) and order (K, L) contiguous; skip (D,); bias (K*D,).
    """
    (K, D, R, N, L, softplus_, x, x_size, x_b, x_c, x_p, feats, f_size, f_b, f_k, f_p, weight, A, skip, bias, order, out,
     out_size, out_b, out_c, out_p) = table(data + ARGUMENTS, 26)  # fmt: skip
    pieces, piece, dt_t = enter(data)
    decay, state = dt_t + TILE // 2, dt_t + TILE // 2 + N * ROW
    weight_r, f_row = state + N * ROW, -(-(R + 2 * N) // LANES) * ROW
    f_t = weight_r - (-R // LANES) * TILE
    near_t, tile_t = f_t + 8 * f_row, f_t + 8 * f_row + ROW
    sum_t, x_t = tile_t + TILE, tile_t + TILE + L * ROW
    tiles = (D + LANES - 1) // LANES
    zero = spread(np.float32(0))
    while piece < pieces:
        item, tile = divmod(piece, tiles)
        channel = LANES * tile
        rows = min(LANES, D - channel)
        x_at, x_step = x + item * x_b + channel * (x_c if x_c else x_size), x_p
        out_at = out + item * out_b + channel * (out_c if out_c else out_size)
        if x_c:
            _turn_in(x_at, x_c, rows, L, x_size, tile_t, x_t)
            x_at, x_step = x_t, LANES * x_size
        scale = load_some(skip + 4 * channel, rows) if skip else zero
        for k in range(K):
            for r in range(0, R, LANES):
                read_rows(weight + 4 * ((k * D + channel) * R + r), 4 * R, rows, min(LANES, R - r), weight_r + ROW * r, ROW)
                load_columns(weight_r + ROW * r, ROW, rows, weight_r + ROW * r)
            read_decays(A + 4 * (k * D + channel) * N, N, rows, decay)
            clear(state, N)
            shift = load_some(bias + 4 * (k * D + channel), rows) if bias else zero
            f_at = feats + item * f_b + k * f_k
            for t in range(0, L, 8):
                places, count = order + 8 * (k * L + t), min(8, L - t)
                _find_features(f_at, f_size, f_p, places, count, R + 2 * N, f_t, f_row, near_t)
                _step_sizes(near_t, R, weight_r, shift, softplus_, dt_t)
                for i in range(count):
                    p, B_at = position(places + 8 * i), position(near_t + 8 * i) + 4 * R
                    x_now, dt = fetch(x_at + x_step * p, rows, x_size), load(dt_t + ROW * i)
                    y = scale * x_now if k == 0 else load(sum_t + ROW * p)
                    y = advance(dt, dt * x_now, y, N, decay, state, B_at, B_at + 4 * N, 4)
                    if k < K - 1 or out_c:
                        store(sum_t + ROW * p, y)
                    else:
                        deliver(out_at + out_p * p, y, rows, out_size)
        if out_c:
            _turn_out(sum_t, L, tile_t, rows, out_at, out_c, out_size)
        piece = take(data)


@njit(nogil=True)
def _turn_in(source, stride, rows, L, size, tile_t, target):
    """From (rows, L) to (L, 16), both with numbers of `size` bytes."""
    for t in range(0, L, LANES):
        count = min(LANES, L - t)
        read_rows(source + size * t, stride, rows, count, tile_t, ROW, size)
        load_columns(tile_t, ROW, rows, tile_t)
        for i in range(count):
            deliver(target + LANES * size * (t + i), load(tile_t + ROW * i), LANES, size)


@njit(nogil=True)
def _turn_out(source, L, tile_t, rows, target, stride, size):
    """From float32 (L, 16) to (rows, L) with numbers of `size` bytes."""
    for t in range(0, L, LANES):
        count = min(LANES, L - t)
        load_columns(source + ROW * t, ROW, count, tile_t)
        write_rows(tile_t, ROW, rows, count, target + size * t, stride, size)


@njit(nogil=True)
def read_decays(A_at, N, rows, decay):
    """For each state a vector of the A of `rows` channels, times log2(e); A (rows, N). Lanes beyond repeat the last one."""
    for n in range(N):
        for i in range(LANES):
            put(decay + ROW * n + 4 * i, get(A_at + 4 * (min(i, rows - 1) * N + n)))
        store(decay + ROW * n, load(decay + ROW * n) * spread(np.float32(LOG2_E)))


@njit(nogil=True)
def advance(dt, du, y, N, decay, state, B_at, C_at, stride):
    """One step of N states of 16 channels; returns y + <C, h>. `stride` leads from one state's B and C to the next one's."""
    for n in range(N):
        h = fma(exp2(dt * load(decay + ROW * n)), load(state + ROW * n), du * read(B_at + stride * n))
        store(state + ROW * n, h)
        y = fma(h, read(C_at + stride * n), y)
    return y


@njit(nogil=True)
def _find_features(f_at, f_size, f_p, places, count, features, f_t, f_row, near_t):
    """To near_t, where the features of 8 positions lie in float32: of fewer, with the last one repeated."""
    for i in range(8):
        source, target = f_at + f_p * position(places + 8 * min(i, count - 1)), f_t + f_row * i
        if f_size == 2:
            read_rows(source, 0, 1, features, target, 0, 2)
        put_position(near_t + 8 * i, target if f_size == 2 else source)


@njit(nogil=True)
def _step_sizes(near_t, R, weight_r, shift, softplus_, dt_t):
    """softplus?(shift + weight @ features) of 8 positions in vectors of 16 channels."""
    f0, f1, f2, f3, f4, f5, f6, f7 = table(near_t, 8)
    d0 = d1 = d2 = d3 = d4 = d5 = d6 = d7 = shift
    for r in range(R):
        w = load(weight_r + ROW * r)
        d0 = fma(w, read(f0 + 4 * r), d0)
        d1 = fma(w, read(f1 + 4 * r), d1)
        d2 = fma(w, read(f2 + 4 * r), d2)
        d3 = fma(w, read(f3 + 4 * r), d3)
        d4 = fma(w, read(f4 + 4 * r), d4)
        d5 = fma(w, read(f5 + 4 * r), d5)
        d6 = fma(w, read(f6 + 4 * r), d6)
        d7 = fma(w, read(f7 + 4 * r), d7)
    store(dt_t, d0)
    store(dt_t + ROW, d1)
    store(dt_t + 2 * ROW, d2)
    store(dt_t + 3 * ROW, d3)
    store(dt_t + 4 * ROW, d4)
    store(dt_t + 5 * ROW, d5)
    store(dt_t + 6 * ROW, d6)
    store(dt_t + 7 * ROW, d7)
    if softplus_:
        for i in range(8):
            store(dt_t + ROW * i, softplus(load(dt_t + ROW * i)))


@cache
def compiled(kernel: Callable[[int], None]) -> Callable[[int], None]:
    """A kernel as a ctypes function, which calls it without the GIL.

    It is compiled once for each machine, where there is a folder to keep it in: beside this file, or the user's cache.
    """
    signature = types.void(types.int64)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(kernel).ctypes
    except RuntimeError:  # no such folder
        return cfunc(signature, **options)(kernel).ctypes
