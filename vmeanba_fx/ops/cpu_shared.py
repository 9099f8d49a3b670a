"""The kernels of scans whose channels share a decay; how a kernel is called, and what its arguments are: see `cpu_kernels`.

The lanes are 16 steps. The states of a block of steps are worked through one after another, while its outputs, which each of
them adds to, are in the cache.
"""

import numpy as np
from numba import njit

from .cpu_lanes import (
    ARGUMENTS,
    LANES,
    ROW,
    clear,
    deliver,
    enter,
    exp2,
    fma,
    get,
    get_half,
    last,
    load,
    load_some,
    position,
    put,
    read,
    read_rows,
    scan16,
    softplus,
    spread,
    store,
    store_some,
    table,
    take,
    window_decays,
    write_rows,
)
from .cpu_llvm import LOG2_E

BLOCK = 64 * LANES  # steps
BLOCK_ROW = 4 * BLOCK


def linear_scan_scratch(R: int, N: int, halves: bool) -> int:
    """`halves`: whether some tensor is in bfloat16."""
    return R * N * ROW + (2 + 2 * R) * BLOCK_ROW * halves


def linear_scan(data):
    """A piece is one group of one batch item. a, C (B, K, N, L) and b (B, K, R, N, L), all of `size`; out (B, K, R, L)."""
    (K, R, N, L, size, a, a_b, a_k, a_n, b, b_b, b_k, b_r, b_n, C, C_b, C_k, C_n, out, out_size) = table(data + ARGUMENTS, 20)
    pieces, piece, state = enter(data)
    a_t = state + R * N * ROW
    C_t, b_t, y_t = a_t + BLOCK_ROW, a_t + 2 * BLOCK_ROW, a_t + (2 + R) * BLOCK_ROW
    while piece < pieces:
        item, k = divmod(piece, K)
        clear(state, R * N)
        for begin in range(0, L, BLOCK):
            steps, out_at = min(BLOCK, L - begin), out + out_size * (piece * R * L + begin)
            y_at, y_r = (out_at, 4 * L) if out_size == 4 else (y_t, BLOCK_ROW)
            for n in range(N):
                at = size * begin
                a_at, _ = _in_float32(a + item * a_b + k * a_k + n * a_n + at, 0, 1, steps, size, a_t)
                C_at, _ = _in_float32(C + item * C_b + k * C_k + n * C_n + at, 0, 1, steps, size, C_t)
                b_at, b_row = _in_float32(b + item * b_b + k * b_k + n * b_n + at, b_r, R, steps, size, b_t)
                for t in range(0, steps, LANES):
                    count = min(LANES, steps - t)
                    a_now, C_now = load_some(a_at + 4 * t, count), load_some(C_at + 4 * t, count)
                    _steps(a_now, C_now, C_now, b_at + 4 * t, b_row, False, n, R, state, y_at + 4 * t, y_r, count)
            if out_size == 2:
                write_rows(y_t, BLOCK_ROW, R, steps, out_at, 2 * L, 2)
        piece = take(data)


def shared_scan_scratch(R: int, N: int, halves: bool) -> int:
    return R * N * ROW + BLOCK_ROW + (2 * R + 2 * N) * BLOCK_ROW * halves


def shared_scan(data):
    """As `linear_scan`, discretisation included. u, delta, B, C all of `size`; A (K, N); bias (K,); out (B, K, R, L)."""
    (K, R, N, L, softplus_, size, u, u_b, u_k, u_r, delta, delta_b, delta_k, A, B, B_b, B_k, B_n, C, C_b, C_k, C_n, bias, out,
     out_size) = table(data + ARGUMENTS, 25)  # fmt: skip
    pieces, piece, state = enter(data)
    dt_t = state + R * N * ROW
    u_t, y_t = dt_t + BLOCK_ROW, dt_t + (1 + R) * BLOCK_ROW
    B_t, C_t = dt_t + (1 + 2 * R) * BLOCK_ROW, dt_t + (1 + 2 * R + N) * BLOCK_ROW
    while piece < pieces:
        item, k = divmod(piece, K)
        shift = read(bias + 4 * k) if bias else spread(np.float32(0))
        clear(state, R * N)
        for begin in range(0, L, BLOCK):
            steps, at, out_at = min(BLOCK, L - begin), size * begin, out + out_size * (piece * R * L + begin)
            delta_at, _ = _in_float32(delta + item * delta_b + k * delta_k + at, 0, 1, steps, size, dt_t)
            u_at, u_row = _in_float32(u + item * u_b + k * u_k + at, u_r, R, steps, size, u_t)
            B_at, B_row = _in_float32(B + item * B_b + k * B_k + at, B_n, N, steps, size, B_t)
            C_at, C_row = _in_float32(C + item * C_b + k * C_k + at, C_n, N, steps, size, C_t)
            y_at, y_r = (out_at, 4 * L) if out_size == 4 else (y_t, BLOCK_ROW)
            _step_rows(delta_at, steps, shift, softplus_, dt_t)
            _shared_block(steps, R, N, dt_t, u_at, u_row, A + 4 * k * N, B_at, B_row, C_at, C_row, state, y_at, y_r)
            if out_size == 2:
                write_rows(y_t, BLOCK_ROW, R, steps, out_at, 2 * L, 2)
        piece = take(data)


def shared_scan2d_scratch(R: int, N: int, L: int, summed: bool) -> int:
    """R: the channels of a piece. `summed`: whether directions are summed into bfloat16."""
    return R * N * ROW + (1 + 2 * R + 2 * N) * BLOCK_ROW + R * -(-L // LANES) * ROW * summed


def shared_scan2d(data):
    """As `shared_scan` with the steps anywhere: u, delta, B, C have a stride u_p, ... from position to position of the map.

    A piece is up to `some` channels of one batch item, and one direction of it or, where `together`, the sum over all.
    order (K, L); out (B, K or 1, R, L), by position.
    """
    (K, R, N, L, softplus_, some, together, size, u, u_b, u_k, u_r, u_p, delta, delta_b, delta_k, delta_p, A, B, B_b, B_k, B_n,
     B_p, C, C_b, C_k, C_n, C_p, bias, order, out, out_size) = table(data + ARGUMENTS, 32)  # fmt: skip
    pieces, piece, state = enter(data)
    dt_t = state + some * N * ROW
    u_t, y_t = dt_t + BLOCK_ROW, dt_t + (1 + some) * BLOCK_ROW
    B_t, C_t = dt_t + (1 + 2 * some) * BLOCK_ROW, dt_t + (1 + 2 * some + N) * BLOCK_ROW
    sum_t, sum_r = C_t + N * BLOCK_ROW, -(-L // LANES) * ROW
    parts, cuts = 1 if together else K, (R + some - 1) // some
    while piece < pieces:
        group, cut = divmod(piece, cuts)
        item, part = divmod(group, parts)
        first = cut * some
        rows = min(some, R - first)
        out_at = out + out_size * (group * R + first) * L
        total, total_r, total_size = (sum_t, sum_r, 4) if together and out_size == 2 else (out_at, out_size * L, out_size)
        for k in range(0 if together else part, K if together else part + 1):
            shift = read(bias + 4 * k) if bias else spread(np.float32(0))
            clear(state, rows * N)
            for begin in range(0, L, BLOCK):
                steps, places = min(BLOCK, L - begin), order + 8 * (k * L + begin)
                _gather(delta + item * delta_b + k * delta_k, delta_p, places, steps, size, dt_t)
                for r in range(rows):
                    _gather(u + item * u_b + k * u_k + (first + r) * u_r, u_p, places, steps, size, u_t + r * BLOCK_ROW)
                for n in range(N):
                    _gather(B + item * B_b + k * B_k + n * B_n, B_p, places, steps, size, B_t + n * BLOCK_ROW)
                    _gather(C + item * C_b + k * C_k + n * C_n, C_p, places, steps, size, C_t + n * BLOCK_ROW)
                _step_rows(dt_t, steps, shift, softplus_, dt_t)
                A_at = A + 4 * k * N
                _shared_block(
                    steps, rows, N, dt_t, u_t, BLOCK_ROW, A_at, B_t, BLOCK_ROW, C_t, BLOCK_ROW, state, y_t, BLOCK_ROW
                )
                for r in range(rows):
                    _scatter(y_t + r * BLOCK_ROW, places, steps, total + r * total_r, total_size, together and k)
        if together and out_size == 2:
            write_rows(sum_t, sum_r, rows, L, out_at, 2 * L, 2)
        piece = take(data)


@njit(nogil=True)
def _in_float32(source, stride, rows, steps, size, target):
    """Address and stride of `rows` rows of a block in float32: where they are, or in scratch memory."""
    if size == 4:
        return source, stride
    read_rows(source, stride, rows, steps, target, BLOCK_ROW, size)
    return target, BLOCK_ROW


@njit(nogil=True)
def _gather(source, stride, places, steps, size, target):
    if size == 2:
        for i in range(steps):
            put(target + 4 * i, get_half(source + stride * position(places + 8 * i)))
    else:
        for i in range(steps):
            put(target + 4 * i, get(source + stride * position(places + 8 * i)))


@njit(nogil=True)
def _scatter(source, places, steps, target, size, added):
    """Put numbers in their places, or add them to what is there."""
    if size == 2:
        for i in range(steps):
            deliver(target + 2 * position(places + 8 * i), spread(get(source + 4 * i)), 1, 2)
    elif added:
        for i in range(steps):
            at = target + 4 * position(places + 8 * i)
            put(at, get(at) + get(source + 4 * i))
    else:
        for i in range(steps):
            put(target + 4 * position(places + 8 * i), get(source + 4 * i))


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
