"""The scans as machine code for the CPU, through Numba. Imported at the first use, never by `import vmeanba_fx`.

A kernel is a C function of one address: that of a table of int64 with a counter from zero, the number of pieces the work is
cut into, a second counter, the address of scratch memory and the bytes of it that a thread needs (`..._scratch` gives them),
and the arguments named in the kernel. As many threads as there is scratch memory for may run it on the same table at once:
each takes the next piece until none is left. Nothing here keeps a state, allocates or needs the GIL.

The scratch memory is the caller's: an array that Numba allocates is freed after its last mention, not where addresses in it
are used for the last time.

Tensors come as addresses, with strides in bytes, so that each kernel is compiled once; they are float32 (tables of positions
int64), and contiguous in the last dim. Address 0: not given.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import cfunc, njit, types

from .cpu_lanes import (
    ARGUMENTS,
    LANES,
    ROW,
    TILE,
    deliver,
    enter,
    exp2,
    fetch,
    fma,
    get,
    last,
    load,
    load_columns,
    load_some,
    position,
    prefetch_vectors,
    put,
    read,
    read_rows,
    scan16,
    silu,
    softplus,
    spread,
    store,
    store_some,
    table,
    take,
    transpose,
    window_decays,
    write_rows,
)

LOG2_E = 1.4426950408889634
SPAN = 8 * ROW  # bytes of a row that the full scan copies at a time
BLOCK = 64 * LANES  # steps of a one-channel scan whose outputs stay in the cache while the states are summed


def selective_scan_scratch(N: int) -> int:
    return 4 * TILE + 3 * LANES * SPAN + 2 * N * (SPAN + ROW)


def selective_scan(data):
    """A piece is 16 channels of one group and one batch item; the lanes are channels.

    Rows are copied to and fro in spans of 128 steps: where L is a power of two, rows side by side share their place in the
    caches, and vectors taken from them one by one would throw each other out. The next span is asked for while this one is
    scanned: with 16 rows of each tensor on the way, the processor does not see what comes next.

    u, delta, z, out (B, K*D, L) with numbers of u_size, ... bytes (2: bfloat16); A (K*D, N) and `out` contiguous; B, C
    (B, K, N, L); skip, bias (K*D,).
    """
    (K, D, N, L, softplus_, u, u_size, u_b, u_c, delta, delta_size, delta_b, delta_c, A, B, B_b, B_k, B_n, C, C_b,
     C_k, C_n, skip, z, z_size, z_b, z_c, bias, out, out_size) = table(data + ARGUMENTS, 30)  # fmt: skip
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
            read_rows(B_at + 4 * begin, B_n, N, steps, B_rows, SPAN)
            read_rows(C_at + 4 * begin, C_n, N, steps, C_rows, SPAN)
            for t in range(0, steps, LANES):
                ahead = begin + t + SPAN // 4
                if ahead < L:
                    prefetch_vectors(u_at + u_size * ahead, u_c, rows)
                    prefetch_vectors(delta_at + delta_size * ahead, delta_c, rows)
                prefetch_vectors(out_at + out_size * (begin + t), row, rows)
                load_columns(u_rows + 4 * t, SPAN, rows, x_t)
                load_columns(delta_rows + 4 * t, SPAN, rows, dt_t)
                for i in range(LANES):
                    dt = load(dt_t + ROW * i) + shift
                    if softplus_:
                        dt = softplus(dt)
                    store(dt_t + ROW * i, dt)
                    store(du_t + ROW * i, dt * load(x_t + ROW * i))
                for i in range(min(LANES, steps - t)):
                    dt, du, y = load(dt_t + ROW * i), load(du_t + ROW * i), weight * load(x_t + ROW * i)
                    B_now, C_now = B_rows + 4 * (t + i), C_rows + 4 * (t + i)
                    y = advance(dt, du, y, N, decay, state, B_now, C_now, SPAN)
                    store(y_t + ROW * i, y)
                transpose(y_t, y_t)
                read_rows(y_t, ROW, rows, LANES, out_rows + 4 * t, SPAN)
            if z:
                read_rows(z_at + z_size * begin, z_c, rows, steps, u_rows, SPAN, z_size)
                for i in range(rows):
                    for t in range(0, 4 * steps, ROW):
                        gate = silu(load(u_rows + SPAN * i + t))
                        store(out_rows + SPAN * i + t, load(out_rows + SPAN * i + t) * gate)
            write_rows(out_rows, SPAN, rows, steps, out_at + out_size * begin, row, out_size)
        piece = take(data)


def ss2d_scratch(R: int, N: int, L: int) -> int:
    return L * ROW + TILE // 2 + 2 * N * ROW + -(-R // LANES) * TILE


def ss2d(data):
    """A piece is 16 channels of one batch item; the lanes are channels, and one position after another is read and added to.

    The sum over directions is kept for these channels alone, (L, 16), and the last direction writes it to `out`.

    x, out (B, L, D) with numbers of x_size, out_size bytes (2: bfloat16); feats (B, K, L, R + 2N); weight (K, D, R),
    A (K*D, N) and order (K, L) contiguous; skip (D,); bias (K*D,).
    """
    (K, D, R, N, L, softplus_, x, x_size, x_b, x_p, feats, f_b, f_k, f_p, weight, A, skip, bias, order, out,
     out_size, out_b, out_p) = table(data + ARGUMENTS, 23)  # fmt: skip
    pieces, piece, sum_t = enter(data)
    dt_t = sum_t + L * ROW
    decay, state = dt_t + TILE // 2, dt_t + TILE // 2 + N * ROW
    weight_r = state + N * ROW
    tiles = (D + LANES - 1) // LANES
    zero = spread(np.float32(0))
    while piece < pieces:
        item, tile = divmod(piece, tiles)
        channel = LANES * tile
        rows = min(LANES, D - channel)
        x_at, out_at = x + item * x_b + x_size * channel, out + item * out_b + out_size * channel
        scale = load_some(skip + 4 * channel, rows) if skip else zero
        for k in range(K):
            for r in range(0, R, LANES):
                read_rows(weight + 4 * ((k * D + channel) * R + r), 4 * R, rows, min(LANES, R - r), weight_r + ROW * r, ROW)
                load_columns(weight_r + ROW * r, ROW, rows, weight_r + ROW * r)
            read_decays(A + 4 * (k * D + channel) * N, N, rows, decay)
            clear(state, N)
            shift = load_some(bias + 4 * (k * D + channel), rows) if bias else zero
            f_at, order_at = feats + item * f_b + k * f_k, order + 8 * k * L
            for t in range(0, L, 8):
                _step_sizes(f_at, f_p, order_at + 8 * t, min(8, L - t), R, weight_r, shift, softplus_, dt_t)
                for i in range(min(8, L - t)):
                    p = position(order_at + 8 * (t + i))
                    B_at = f_at + f_p * p + 4 * R
                    x_now = fetch(x_at + x_p * p, rows, x_size)
                    y = scale * x_now if k == 0 else load(sum_t + ROW * p)
                    dt = load(dt_t + ROW * i)
                    y = advance(dt, dt * x_now, y, N, decay, state, B_at, B_at + 4 * N, 4)
                    if k < K - 1:
                        store(sum_t + ROW * p, y)
                    else:
                        deliver(out_at + out_p * p, y, rows, out_size)
        piece = take(data)


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
def _step_sizes(f_at, f_p, order_at, count, R, weight_r, shift, softplus_, dt_t):
    """softplus?(shift + weight @ features) of 8 positions in vectors of 16 channels; of fewer, with some repeated."""
    f0 = f_at + f_p * position(order_at)
    f1 = f_at + f_p * position(order_at + 8 * min(1, count - 1))
    f2 = f_at + f_p * position(order_at + 8 * min(2, count - 1))
    f3 = f_at + f_p * position(order_at + 8 * min(3, count - 1))
    f4 = f_at + f_p * position(order_at + 8 * min(4, count - 1))
    f5 = f_at + f_p * position(order_at + 8 * min(5, count - 1))
    f6 = f_at + f_p * position(order_at + 8 * min(6, count - 1))
    f7 = f_at + f_p * position(order_at + 8 * min(7, count - 1))
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


def shared_scan_scratch(R: int, N: int) -> int:
    return 4 * BLOCK + R * N * ROW


def shared_scan(data):
    """A piece is one group of one batch item; the lanes are 16 steps. A (K, N), bias (K,), out (B, K, R, L)."""
    (K, R, N, L, softplus_, u, u_b, u_k, u_r, delta, delta_b, delta_k, A, B, B_b, B_k, B_n, C, C_b, C_k, C_n, bias,
     out) = table(data + ARGUMENTS, 23)  # fmt: skip
    pieces, piece, dt_t = enter(data)
    state = dt_t + 4 * BLOCK
    while piece < pieces:
        item, k = divmod(piece, K)
        shift = read(bias + 4 * k) if bias else spread(np.float32(0))
        clear(state, R * N)
        for begin in range(0, L, BLOCK):
            u_at, delta_at = u + item * u_b + k * u_k + 4 * begin, delta + item * delta_b + k * delta_k + 4 * begin
            B_at, C_at = B + item * B_b + k * B_k + 4 * begin, C + item * C_b + k * C_k + 4 * begin
            out_at, steps = out + 4 * (piece * R * L + begin), min(BLOCK, L - begin)
            _step_rows(delta_at, steps, shift, softplus_, dt_t)
            _shared_block(steps, R, N, dt_t, u_at, u_r, A + 4 * k * N, B_at, B_n, C_at, C_n, state, out_at, 4 * L)
        piece = take(data)


def shared_scan2d_scratch(R: int, N: int) -> int:
    return (1 + 2 * R + 2 * N) * 4 * BLOCK + R * N * ROW


def shared_scan2d(data):
    """As `shared_scan` with the steps anywhere: u, delta, B, C have a stride u_p, ... from position to position of the map.

    order (K, L); out (B, K, R, L), by position.
    """
    (K, R, N, L, softplus_, u, u_b, u_k, u_r, u_p, delta, delta_b, delta_k, delta_p, A, B, B_b, B_k, B_n, B_p, C,
     C_b, C_k, C_n, C_p, bias, order, out) = table(data + ARGUMENTS, 28)  # fmt: skip
    pieces, piece, dt_t = enter(data)
    row = 4 * BLOCK
    u_t, y_t, B_t, C_t = dt_t + row, dt_t + (1 + R) * row, dt_t + (1 + 2 * R) * row, dt_t + (1 + 2 * R + N) * row
    state = C_t + N * row
    while piece < pieces:
        item, k = divmod(piece, K)
        shift = read(bias + 4 * k) if bias else spread(np.float32(0))
        clear(state, R * N)
        for begin in range(0, L, BLOCK):
            steps, places = min(BLOCK, L - begin), order + 8 * (k * L + begin)
            gather(delta + item * delta_b + k * delta_k, delta_p, places, steps, dt_t)
            for r in range(R):
                gather(u + item * u_b + k * u_k + r * u_r, u_p, places, steps, u_t + r * row)
            for n in range(N):
                gather(B + item * B_b + k * B_k + n * B_n, B_p, places, steps, B_t + n * row)
                gather(C + item * C_b + k * C_k + n * C_n, C_p, places, steps, C_t + n * row)
            _step_rows(dt_t, steps, shift, softplus_, dt_t)
            _shared_block(steps, R, N, dt_t, u_t, row, A + 4 * k * N, B_t, row, C_t, row, state, y_t, row)
            for r in range(R):
                for i in range(steps):
                    put(out + 4 * ((piece * R + r) * L + position(places + 8 * i)), get(y_t + r * row + 4 * i))
        piece = take(data)


@njit(nogil=True)
def clear(state, count):
    for i in range(count):
        store(state + ROW * i, spread(np.float32(0)))


@njit(nogil=True)
def gather(source, stride, places, steps, target):
    for i in range(steps):
        put(target + 4 * i, get(source + stride * position(places + 8 * i)))


@njit(nogil=True)
def _step_rows(delta_at, steps, shift, softplus_, dt_t):
    for t in range(0, steps, LANES):
        dt = load_some(delta_at + 4 * t, min(LANES, steps - t)) + shift
        store(dt_t + 4 * t, softplus(dt) if softplus_ else dt)


@njit(nogil=True)
def _shared_block(steps, R, N, dt_t, u_at, u_r, A_at, B_at, B_n, C_at, C_n, state, out_at, out_r):
    for n in range(N):
        decay = read(A_at + 4 * n) * spread(np.float32(LOG2_E))
        for t in range(0, steps, LANES):
            count = min(LANES, steps - t)
            dt = load(dt_t + 4 * t)
            drive = dt * load_some(B_at + n * B_n + 4 * t, count)
            C_now = load_some(C_at + n * C_n + 4 * t, count)
            _steps(exp2(dt * decay), drive, C_now, u_at + 4 * t, u_r, True, n, R, state, out_at + 4 * t, out_r, count)


def linear_scan_scratch(R: int, N: int) -> int:
    return R * N * ROW


def linear_scan(data):
    """As `shared_scan`, after the discretisation."""
    (K, R, N, L, a, a_b, a_k, a_n, b, b_b, b_k, b_r, b_n, C, C_b, C_k, C_n, out) = table(data + ARGUMENTS, 18)
    pieces, piece, state = enter(data)
    while piece < pieces:
        item, k = divmod(piece, K)
        clear(state, R * N)
        for begin in range(0, L, BLOCK):
            end = min(L, begin + BLOCK)
            for n in range(N):
                a_at, C_at = a + item * a_b + k * a_k + n * a_n, C + item * C_b + k * C_k + n * C_n
                b_at = b + item * b_b + k * b_k + n * b_n
                for t in range(begin, end, LANES):
                    count = min(LANES, end - t)
                    a_now, C_now = load_some(a_at + 4 * t, count), load_some(C_at + 4 * t, count)
                    out_at = out + 4 * (piece * R * L + t)
                    _steps(a_now, C_now, C_now, b_at + 4 * t, b_r, False, n, R, state, out_at, 4 * L, count)
        piece = take(data)


@njit(nogil=True)
def _steps(a, drive, C_now, b_at, b_r, scaled, n, R, state, out_at, out_r, count):
    """16 steps of state n of R channels that share the decay; `out` is begun by state 0 and added to by the others."""
    reach, held = window_decays(a), state + ROW * n * R
    _channel_steps(a, reach, drive, C_now, b_at, scaled, n, held, out_at, count)
    for r in range(1, R):
        _channel_steps(a, reach, drive, C_now, b_at + b_r * r, scaled, n, held + ROW * r, out_at + out_r * r, count)


@njit(nogil=True)
def _channel_steps(a, reach, drive, C_now, b_at, scaled, n, held, out_at, count):
    b = load_some(b_at, count)
    if scaled:
        b = b * drive
    before, h = load(held), scan16(a, b)
    # Not last(h) after the next line: from vector to vector there should be one multiply-add, and no more.
    store(held, fma(last(reach), before, last(h)))
    y = fma(reach, before, h) * C_now
    if n:
        y = y + load_some(out_at, count)
    store_some(out_at, y, count)


@cache
def compiled(kernel: Callable[[int], None]) -> Callable[[int], None]:
    """A kernel as a ctypes function, which calls it without the GIL.

    It is compiled once for each machine, where there is a folder to keep it in: beside this file, or the user's cache.
    """
    signature = types.void(types.int64)
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(kernel).ctypes
    except RuntimeError:  # no such folder
        return cfunc(signature, **options)(kernel).ctypes
