"""The scans as machine code for the CPU, through Numba. Imported at the first use, never by `import vmeanba_fx`.

Arithmetic is on vectors of 16 float32, written out as such: a Numba type `lanes` and a few functions on it. LLVM turns them
into AVX-512, AVX2, SSE or NEON, whatever the machine has, and no speed hangs on what its loop vectoriser makes of a loop.
exp2 and log1p are polynomials, good to 1.3e-7 relative. Tensors come as addresses, with strides in bytes, so that each
kernel is compiled once; they are float32 (tables of positions int64), and contiguous in the last dim.

A kernel is a C function of one address: that of a table of int64 with a counter from zero, the number of pieces the work is
cut into, and the arguments named in the kernel. Any number of threads may run it on the same table at once: each takes the
next piece until none is left. Nothing here keeps a state or needs the GIL.

All that the kernels are made of is in this file: Numba's cache only notices changes in the file of the kernel itself.
"""

import operator
from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
ROW = 4 * LANES  # bytes of one vector
TILE = LANES * ROW  # bytes of 16 vectors

# 2**f on [-0.5, 0.5] and log1p(t)/t on [0, 1], interpolated at Chebyshev points in float64; exact at 0.
_EXP2 = (1.0, 0.6931471880601997, 0.24022650760568132, 0.0555035711422015, 0.00961808255728395, 0.0013390863364174759,
         0.00015453162941980736)  # fmt: skip
_LOG1P = (1.0, -0.49999892648073857, 0.33329710499147114, -0.249516162647367, 0.1966327426485181, -0.15269667092062955,
          0.10543623819424233, -0.05637361301767855, 0.019542527338241508, -0.003176057031149872)  # fmt: skip
LOG2_E = np.float32(1.4426950408889634)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits

_f32, _i32, _i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_vector, _integers = ir.VectorType(_f32, LANES), ir.VectorType(_i32, LANES)


class Lanes(types.Type):
    """Sixteen float32 in registers."""

    def __init__(self):
        super().__init__(name="vmeanba_fx.lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, frontend_type):
        super().__init__(manager, frontend_type, _vector)


# ---- LLVM values: each takes the builder and values, and returns a value ----------------------------------------------


def _constant(value, kind=_vector):
    return ir.Constant(kind, [value] * LANES)


def _indices(values):
    return ir.Constant(_integers, list(values))


def _splat(b, value):
    one = b.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, _i32(0))
    return b.shuffle_vector(one, one, _indices([0] * LANES))


def _call(b, name, result, *arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _fma(b, x, y, z):
    return _call(b, "llvm.fmuladd.v16f32", _vector, x, y, z)


def _polynomial(b, coefficients, x):
    total = _constant(coefficients[-1])
    for c in coefficients[-2::-1]:
        total = _fma(b, total, x, _constant(c))
    return total


def _exp2(b, x):
    """2**x; 2**-126 below, infinite from 128 on; NaN stays NaN (a comparison with it is false)."""
    for limit, order in ((-126.0, "<"), (128.0, ">")):
        x = b.select(b.fcmp_ordered(order, x, _constant(limit)), _constant(limit), x)
    rounded = b.fadd(x, _constant(_ROUND))
    part = b.fsub(x, b.fsub(rounded, _constant(_ROUND)))
    power = b.shl(b.bitcast(rounded, _integers), _constant(23, _integers))
    bits = b.bitcast(_polynomial(b, _EXP2, part), _integers)
    return b.bitcast(b.add(bits, power), _vector)


def _softplus(b, x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    positive = b.fcmp_ordered(">", x, _constant(0.0))
    t = _exp2(b, b.fmul(b.select(positive, b.fneg(x), x), _constant(float(LOG2_E))))
    return _fma(b, t, _polynomial(b, _LOG1P, t), b.select(positive, x, _constant(0.0)))


def _silu(b, x):
    e = _exp2(b, b.fmul(x, _constant(-float(LOG2_E))))
    return b.fdiv(x, b.fadd(e, _constant(1.0)))


def _shift(b, x, steps, fill):
    """x[i - steps], and `fill` in the first `steps`. Not one shuffle with `fill`: its code is slower."""
    turned = b.shuffle_vector(x, x, _indices((i - steps) % LANES for i in range(LANES)))
    there = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [i >= steps for i in range(LANES)])
    return b.select(there, turned, _constant(fill))


def _transpose(b, rows):
    """16 vectors of 16: four times, interleave row i with row i + 8."""
    low, high = (_indices(half * 8 + i // 2 + LANES * (i % 2) for i in range(LANES)) for half in (0, 1))
    for _ in range(4):
        rows = [b.shuffle_vector(rows[i], rows[i + 8], part) for i in range(8) for part in (low, high)]
    return rows


def _at(b, address, kind, offset=0):
    return b.inttoptr(b.add(address, _i64(offset)), kind.as_pointer())


def _mask(b, count):
    return b.icmp_signed("<", _indices(range(LANES)), _splat(b, b.trunc(count, _i32)))


def _lower(build):
    def lower(context, builder, signature, values):
        result = build(builder, *values)
        return context.get_dummy_value() if result is None else result

    return lower


# ---- what kernels are written in --------------------------------------------------------------------------------------


@intrinsic
def load(context, address):
    """16 floats."""
    return lanes(types.int64), _lower(lambda b, address: b.load(_at(b, address, _vector), align=4, typ=_vector))


@intrinsic
def load_part(context, address, count):
    """The first `count` of 16 floats, then zeros."""

    def build(b, address, count):
        arguments = _at(b, address, _vector), _i32(4), _mask(b, count), _constant(0.0)
        return _call(b, "llvm.masked.load.v16f32.p0", _vector, *arguments)

    return lanes(types.int64, types.int64), _lower(build)


@intrinsic
def store(context, address, value):
    def build(b, address, value):
        b.store(value, _at(b, address, _vector), align=4)

    return types.void(types.int64, lanes), _lower(build)


@intrinsic
def store_part(context, address, value, count):
    def build(b, address, value, count):
        arguments = value, _at(b, address, _vector), _i32(4), _mask(b, count)
        _call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), *arguments)

    return types.void(types.int64, lanes, types.int64), _lower(build)


@intrinsic
def read(context, address):
    """One float in all lanes."""
    return lanes(types.int64), _lower(lambda b, address: _splat(b, b.load(_at(b, address, _f32), typ=_f32)))


@intrinsic
def position(context, address):
    """One int64."""
    return types.int64(types.int64), _lower(lambda b, address: b.load(_at(b, address, _i64), typ=_i64))


@intrinsic
def take(context, address):
    """Add one to an int64, of which other threads may do the same, and return what it was before."""

    def build(b, address):
        return b.atomic_rmw("add", _at(b, address, _i64), _i64(1), "monotonic")

    return types.int64(types.int64), _lower(build)


@intrinsic(prefer_literal=True)
def table(context, address, count):
    """`count` int64, a literal, as a tuple."""
    result = types.UniTuple(types.int64, count.literal_value)

    def lower(context, b, signature, values):
        numbers = [b.load(_at(b, values[0], _i64, 8 * i), typ=_i64) for i in range(count.literal_value)]
        return context.make_tuple(b, signature.return_type, numbers)

    return result(types.int64, count), lower


@intrinsic
def put(context, address, value):
    """Store one float."""

    def build(b, address, value):
        b.store(value, _at(b, address, _f32))

    return types.void(types.int64, types.float32), _lower(build)


@intrinsic
def get(context, address):
    """One float."""
    return types.float32(types.int64), _lower(lambda b, address: b.load(_at(b, address, _f32), typ=_f32))


@intrinsic
def spread(context, value):
    """A float in all lanes."""
    return lanes(types.float32), _lower(_splat)


@intrinsic
def multiply(context, x, y):
    return lanes(lanes, lanes), _lower(lambda b, x, y: b.fmul(x, y))


@intrinsic
def add(context, x, y):
    return lanes(lanes, lanes), _lower(lambda b, x, y: b.fadd(x, y))


@overload(operator.mul)
def _operator_mul(x, y):
    if x is lanes and y is lanes:
        return lambda x, y: multiply(x, y)


@overload(operator.add)
def _operator_add(x, y):
    if x is lanes and y is lanes:
        return lambda x, y: add(x, y)


@intrinsic
def fma(context, x, y, z):
    """x * y + z, in one rounding where the machine can."""
    return lanes(lanes, lanes, lanes), _lower(_fma)


@intrinsic
def exp2(context, x):
    return lanes(lanes), _lower(_exp2)


@intrinsic
def softplus(context, x):
    return lanes(lanes), _lower(_softplus)


@intrinsic
def silu(context, x):
    return lanes(lanes), _lower(_silu)


@intrinsic
def window_decays(context, a):
    """For the lanes as 16 steps: the decay over all steps up to each, from the first on."""

    def build(b, a):
        for steps in (1, 2, 4, 8):
            a = b.fmul(a, _shift(b, a, steps, 1.0))
        return a

    return lanes(lanes), _lower(build)


@intrinsic
def scan16(context, a, h):
    """For the lanes as 16 steps: h_t = a_t h_{t-1} + h_t from a state of zero."""

    def build(b, a, h):
        for steps in (1, 2, 4, 8):
            h = _fma(b, a, _shift(b, h, steps, 0.0), h)
            if steps < 8:
                a = b.fmul(a, _shift(b, a, steps, 1.0))
        return h

    return lanes(lanes, lanes), _lower(build)


@intrinsic
def last(context, x):
    """The last lane in all lanes."""
    return lanes(lanes), _lower(lambda b, x: b.shuffle_vector(x, x, _indices([LANES - 1] * LANES)))


@intrinsic
def transpose(context, source, target):
    """16 x 16 floats in 16 successive vectors, from one address to another."""

    def build(b, source, target):
        rows = [b.load(_at(b, source, _vector, ROW * i), align=4, typ=_vector) for i in range(LANES)]
        for i, row in enumerate(_transpose(b, rows)):
            b.store(row, _at(b, target, _vector, ROW * i), align=4)

    return types.void(types.int64, types.int64), _lower(build)


@njit(nogil=True)
def aligned(scratch):
    """The first address in an array that begins a cache line; the array has 16 floats more than are needed."""
    return (np.int64(scratch.ctypes.data) + 63) & ~63


@njit(nogil=True)
def load_columns(source, stride, rows, count, target):
    """target[t], a vector for each of 16 columns = source[row, t]; `rows`, `count` <= 16 are there, the rest is zero."""
    for i in range(rows):
        if count == LANES:
            store(target + ROW * i, load(source + stride * i))
        else:
            store(target + ROW * i, load_part(source + stride * i, count))
    for i in range(rows, LANES):
        store(target + ROW * i, spread(np.float32(0)))
    transpose(target, target)


@njit(nogil=True)
def store_columns(source, target, stride, rows, count):
    """The reverse, spoiling the source: target[row, t] = source[t]."""
    transpose(source, source)
    for i in range(rows):
        if count == LANES:
            store(target + stride * i, load(source + ROW * i))
        else:
            store_part(target + stride * i, load(source + ROW * i), count)


@njit(nogil=True)
def load_some(address, count):
    return load(address) if count == LANES else load_part(address, count)


@njit(nogil=True)
def store_some(address, value, count):
    if count == LANES:
        store(address, value)
    else:
        store_part(address, value, count)


# ---- kernels ----------------------------------------------------------------------------------------------------------


def selective_scan(data):
    """A piece is 16 channels of one group and one batch item; the lanes are channels.

    u, delta, z (B, K*D, L); A (K*D, N) times log2(e) and `out`, both contiguous; B, C (B, K, N, L); skip, bias (K*D,).
    Address 0: not given.
    """
    (_, pieces, K, D, N, L, softplus_, u, u_b, u_c, delta, delta_b, delta_c, A, B, B_b, B_k, B_n, C, C_b, C_k, C_n, skip, z,
     z_b, z_c, bias, out) = table(data, 28)  # fmt: skip
    scratch = np.empty((5 * TILE + 2 * N * ROW + 2 * N * ROW) // 4 + LANES, np.float32)
    x_t = aligned(scratch)
    dt_t, du_t, z_t, y_t = x_t + TILE, x_t + 2 * TILE, x_t + 3 * TILE, x_t + 4 * TILE
    decay, state = x_t + 5 * TILE, x_t + 5 * TILE + N * ROW
    B_n_t, C_n_t = state + N * ROW, state + 2 * N * ROW
    tiles = (D + LANES - 1) // LANES
    zero = spread(np.float32(0))
    for _ in range(pieces):
        piece = take(data)
        if piece >= pieces:
            break
        group, tile = divmod(piece, tiles)
        item, k = divmod(group, K)
        rows = min(LANES, D - LANES * tile)
        channel = k * D + LANES * tile
        u_at, delta_at = u + item * u_b + channel * u_c, delta + item * delta_b + channel * delta_c
        B_at, C_at, z_at = B + item * B_b + k * B_k, C + item * C_b + k * C_k, z + item * z_b + channel * z_c
        out_at = out + 4 * L * (item * K * D + channel)
        for n in range(N):
            store(state + ROW * n, zero)
            for i in range(LANES):
                put(decay + ROW * n + 4 * i, get(A + 4 * ((channel + min(i, rows - 1)) * N + n)))
        shift = load_some(bias + 4 * channel, rows) if bias else zero
        weight = load_some(skip + 4 * channel, rows) if skip else zero
        for t in range(0, L, LANES):
            count = min(LANES, L - t)
            load_columns(u_at + 4 * t, u_c, rows, count, x_t)
            load_columns(delta_at + 4 * t, delta_c, rows, count, dt_t)
            for i in range(LANES):
                dt = load(dt_t + ROW * i) + shift
                if softplus_:
                    dt = softplus(dt)
                store(dt_t + ROW * i, dt)
                store(du_t + ROW * i, dt * load(x_t + ROW * i))
            for n in range(N):
                store(B_n_t + ROW * n, load_some(B_at + B_n * n + 4 * t, count))
                store(C_n_t + ROW * n, load_some(C_at + C_n * n + 4 * t, count))
            for i in range(count):
                dt, du = load(dt_t + ROW * i), load(du_t + ROW * i)
                y = weight * load(x_t + ROW * i)
                for n in range(N):
                    drive = du * read(B_n_t + ROW * n + 4 * i)
                    h = fma(exp2(dt * load(decay + ROW * n)), load(state + ROW * n), drive)
                    store(state + ROW * n, h)
                    y = fma(h, read(C_n_t + ROW * n + 4 * i), y)
                store(y_t + ROW * i, y)
            if z:
                load_columns(z_at + 4 * t, z_c, rows, count, z_t)
                for i in range(count):
                    store(y_t + ROW * i, load(y_t + ROW * i) * silu(load(z_t + ROW * i)))
            store_columns(y_t, out_at + 4 * t, 4 * L, rows, count)


def ss2d(data):
    """A piece is 16 channels of one batch item; the lanes are channels, and one position after another is read and added to.

    x (B, L, D); feats (B, K, L, R + 2N); weight (K, D, R), A (K*D, N) times log2(e), order (K, L) and out (B, L, D) all
    contiguous; skip (D,); bias (K*D,). Address 0: not given.
    """
    (_, pieces, K, D, R, N, L, softplus_, x, x_b, x_p, feats, f_b, f_k, f_p, weight, A, skip, bias, order, out) = table(
        data, 21
    )
    R_rows = (R + LANES - 1) // LANES * LANES
    scratch = np.empty((TILE // 2 + 2 * N * ROW + R_rows * ROW) // 4 + LANES, np.float32)
    dt_t = aligned(scratch)
    decay, state = dt_t + TILE // 2, dt_t + TILE // 2 + N * ROW
    weight_r = state + N * ROW
    tiles = (D + LANES - 1) // LANES
    zero = spread(np.float32(0))
    for _ in range(pieces):
        piece = take(data)
        if piece >= pieces:
            break
        item, tile = divmod(piece, tiles)
        channel = LANES * tile
        rows = min(LANES, D - channel)
        x_at, out_at = x + item * x_b + 4 * channel, out + 4 * (item * L * D + channel)
        scale = load_some(skip + 4 * channel, rows) if skip else zero
        for k in range(K):
            for r in range(0, R, LANES):
                load_columns(weight + 4 * ((k * D + channel) * R + r), 4 * R, rows, min(LANES, R - r), weight_r + ROW * r)
            for n in range(N):
                store(state + ROW * n, zero)
                for i in range(LANES):
                    put(decay + ROW * n + 4 * i, get(A + 4 * ((k * D + channel + min(i, rows - 1)) * N + n)))
            shift = load_some(bias + 4 * (k * D + channel), rows) if bias else zero
            f_at, order_at = feats + item * f_b + k * f_k, order + 8 * k * L
            for t in range(0, L, 8):
                _step_sizes(f_at, f_p, order_at + 8 * t, min(8, L - t), R, weight_r, shift, softplus_, dt_t)
                for i in range(min(8, L - t)):
                    p = position(order_at + 8 * (t + i))
                    f = f_at + f_p * p + 4 * R
                    x_now = load_some(x_at + x_p * p, rows)
                    dt = load(dt_t + ROW * i)
                    du = dt * x_now
                    y = scale * x_now if k == 0 else load_some(out_at + 4 * D * p, rows)
                    for n in range(N):
                        drive = du * read(f + 4 * n)
                        h = fma(exp2(dt * load(decay + ROW * n)), load(state + ROW * n), drive)
                        store(state + ROW * n, h)
                        y = fma(h, read(f + 4 * (N + n)), y)
                    store_some(out_at + 4 * D * p, y, rows)


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


def shared_scan(data):
    """A piece is one group of one batch item; the lanes are 16 steps. A (K, N) times log2(e), bias (K,), out (B, K, R, L)."""
    (_, pieces, K, R, N, L, softplus_, u, u_b, u_k, u_r, delta, delta_b, delta_k, A, B, B_b, B_k, B_n, C, C_b, C_k, C_n, bias,
     out) = table(data, 25)  # fmt: skip
    block = 64 * LANES  # steps whose outputs stay in the cache while the states are summed
    scratch = np.empty(block + R * N * LANES + LANES, np.float32)
    dt_t = aligned(scratch)
    state = dt_t + 4 * block
    zero = spread(np.float32(0))
    for _ in range(pieces):
        piece = take(data)
        if piece >= pieces:
            break
        item, k = divmod(piece, K)
        shift = read(bias + 4 * k) if bias else zero
        u_at, delta_at = u + item * u_b + k * u_k, delta + item * delta_b + k * delta_k
        for i in range(R * N):
            store(state + ROW * i, zero)
        for begin in range(0, L, block):
            end = min(L, begin + block)
            for t in range(begin, end, LANES):
                dt = load_some(delta_at + 4 * t, min(LANES, end - t)) + shift
                store(dt_t + 4 * (t - begin), softplus(dt) if softplus_ else dt)
            for n in range(N):
                decay = read(A + 4 * (k * N + n))
                B_at, C_at = B + item * B_b + k * B_k + n * B_n, C + item * C_b + k * C_k + n * C_n
                for t in range(begin, end, LANES):
                    count = min(LANES, end - t)
                    dt = load(dt_t + 4 * (t - begin))
                    a = exp2(dt * decay)
                    drive, C_now = dt * load_some(B_at + 4 * t, count), load_some(C_at + 4 * t, count)
                    _steps(a, drive, C_now, u_at + 4 * t, u_r, True, n, R, state, out + 4 * (piece * R * L + t), 4 * L, count)


def linear_scan(data):
    """As `shared_scan`, after the discretisation."""
    (_, pieces, K, R, N, L, a, a_b, a_k, a_n, b, b_b, b_k, b_r, b_n, C, C_b, C_k, C_n, out) = table(data, 20)
    block = 64 * LANES
    scratch = np.empty(R * N * LANES + LANES, np.float32)
    state = aligned(scratch)
    zero = spread(np.float32(0))
    for _ in range(pieces):
        piece = take(data)
        if piece >= pieces:
            break
        item, k = divmod(piece, K)
        for i in range(R * N):
            store(state + ROW * i, zero)
        for begin in range(0, L, block):
            end = min(L, begin + block)
            for n in range(N):
                a_at, C_at = a + item * a_b + k * a_k + n * a_n, C + item * C_b + k * C_k + n * C_n
                b_at = b + item * b_b + k * b_k + n * b_n
                for t in range(begin, end, LANES):
                    count = min(LANES, end - t)
                    a_now, C_now = load_some(a_at + 4 * t, count), load_some(C_at + 4 * t, count)
                    out_at = out + 4 * (piece * R * L + t)
                    _steps(a_now, C_now, C_now, b_at + 4 * t, b_r, False, n, R, state, out_at, 4 * L, count)


@njit(nogil=True)
def _steps(a, drive, C_now, b_at, b_r, scaled, n, R, state, out_at, out_r, count):
    """16 steps of state n of R channels that share the decay; `out` is begun by state 0 and added to by the others."""
    reach = window_decays(a)
    for r in range(R):
        b = load_some(b_at + b_r * r, count)
        if scaled:
            b = b * drive
        held = state + ROW * (n * R + r)
        before, h = load(held), scan16(a, b)
        # Not last(h) after the next line: from vector to vector there should be one multiply-add, and no more.
        store(held, fma(last(reach), before, last(h)))
        y = fma(reach, before, h) * C_now
        if n:
            y = y + load_some(out_at + out_r * r, count)
        store_some(out_at + out_r * r, y, count)


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
