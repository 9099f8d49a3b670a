"""What the CPU kernels are written in: vectors of 16 float32 as a Numba type, and functions on them and on addresses.

LLVM turns them into AVX-512, AVX2, SSE or NEON, whatever the machine has, and no speed hangs on what its loop vectoriser makes
of a loop. exp2 and log1p are polynomials, good to 1.3e-7 relative.

Numba's cache only notices changes in the file of a kernel itself: after a change here, touch `cpu_kernels.py` as well.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
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
LOG2_E = 1.4426950408889634
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits

_f32, _i32, _i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_vector, _integers, _halves = (ir.VectorType(kind, LANES) for kind in (_f32, _i32, ir.IntType(16)))


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
    t = _exp2(b, b.fmul(b.select(positive, b.fneg(x), x), _constant(LOG2_E)))
    return _fma(b, t, _polynomial(b, _LOG1P, t), b.select(positive, x, _constant(0.0)))


def _silu(b, x):
    e = _exp2(b, b.fmul(x, _constant(-LOG2_E)))
    return b.fdiv(x, b.fadd(e, _constant(1.0)))


def _widen(b, halves):
    """Sixteen bfloat16, as integers, to float32."""
    return b.bitcast(b.shl(b.zext(halves, _integers), _constant(16, _integers)), _vector)


def _narrow(b, x):
    """The nearest bfloat16, to even; NaN stays NaN."""
    bits = b.bitcast(x, _integers)
    odd = b.and_(b.lshr(bits, _constant(16, _integers)), _constant(1, _integers))
    rounded = b.add(b.add(bits, _constant(0x7FFF, _integers)), odd)
    rounded = b.select(b.fcmp_unordered("uno", x, x), _constant(0x7FC00000, _integers), rounded)
    return b.trunc(b.lshr(rounded, _constant(16, _integers)), _halves)


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


def _load_part(b, address, count, kind, name):
    """The first `count` of 16 numbers, then zeros."""
    arguments = _at(b, address, kind), _i32(1), _mask(b, count), _constant(0, kind)
    return _call(b, f"llvm.masked.load.{name}.p0", kind, *arguments)


def _store_part(b, address, value, count, name):
    """The first `count` of 16 numbers."""
    arguments = value, _at(b, address, value.type), _i32(1), _mask(b, count)
    _call(b, f"llvm.masked.store.{name}.p0", ir.VoidType(), *arguments)


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
    return lanes(types.int64, types.int64), _lower(lambda b, *values: _load_part(b, *values, _vector, "v16f32"))


@intrinsic
def load_half(context, address, count):
    """The first `count` of 16 bfloat16, then zeros."""
    return lanes(types.int64, types.int64), _lower(lambda b, *values: _widen(b, _load_part(b, *values, _halves, "v16i16")))


@intrinsic
def store(context, address, value):
    def build(b, address, value):
        b.store(value, _at(b, address, _vector), align=4)

    return types.void(types.int64, lanes), _lower(build)


@intrinsic
def store_part(context, address, value, count):
    return types.void(types.int64, lanes, types.int64), _lower(lambda b, *values: _store_part(b, *values, "v16f32"))


@intrinsic
def store_half(context, address, value, count):
    """The first `count` of 16 floats as bfloat16."""

    def build(b, address, value, count):
        _store_part(b, address, _narrow(b, value), count, "v16i16")

    return types.void(types.int64, lanes, types.int64), _lower(build)


@intrinsic
def prefetch(context, address):
    """Ask for the cache line at an address, which need not exist."""

    def build(b, address):
        _call(b, "llvm.prefetch.p0", ir.VoidType(), _at(b, address, _vector), _i32(0), _i32(2), _i32(1))

    return types.void(types.int64), _lower(build)


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
def load_some(address, count):
    return load(address) if count == LANES else load_part(address, count)


@njit(nogil=True)
def store_some(address, value, count):
    if count == LANES:
        store(address, value)
    else:
        store_part(address, value, count)


@njit(nogil=True)
def fetch(address, count, size):
    """`count` numbers of `size` bytes: float32, or bfloat16 widened."""
    return load_half(address, count) if size == 2 else load_some(address, count)


@njit(nogil=True)
def deliver(address, value, count, size):
    if size == 2:
        store_half(address, value, count)
    else:
        store_some(address, value, count)


@njit(nogil=True)
def read_rows(source, source_stride, rows, count, target, target_stride):
    """Copy `rows` rows of `count` floats to scratch memory, in whole vectors: zeros fill up the last one."""
    for i in range(rows):
        for t in range(0, count, LANES):
            store(target + target_stride * i + 4 * t, load_some(source + source_stride * i + 4 * t, min(LANES, count - t)))


@njit(nogil=True)
def prefetch_vectors(source, source_stride, rows):
    """Ask for a vector of each of `rows` rows."""
    for i in range(rows):
        prefetch(source + source_stride * i)


@njit(nogil=True)
def write_rows(source, source_stride, rows, count, target, target_stride):
    """Copy `rows` rows of `count` floats, and no more."""
    for i in range(rows):
        for t in range(0, count, LANES):
            store_some(target + target_stride * i + 4 * t, load(source + source_stride * i + 4 * t), min(LANES, count - t))


@njit(nogil=True)
def load_columns(source, stride, rows, target):
    """target[t], a vector for each of 16 columns = source[row, t] for up to 16 rows; it is zero for the rest."""
    for i in range(LANES):
        store(target + ROW * i, load(source + stride * i) if i < rows else spread(np.float32(0)))
    transpose(target, target)
