"""What the CPU kernels are written in: vectors of 16 float32 as a Numba type, and functions on them and on addresses.

Numba's cache only notices changes in the file of a kernel itself: after a change here or in `cpu_llvm.py`, touch
`cpu_kernels.py` and `cpu_shared.py` as well.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from . import cpu_llvm as llvm
from .cpu_llvm import LANES

ROW = 4 * LANES  # bytes of one vector
TILE = LANES * ROW  # bytes of 16 vectors
ARGUMENTS = 5 * 8  # where the arguments begin in the table that a kernel is given


class Lanes(types.Type):
    """Sixteen float32 in registers."""

    def __init__(self):
        super().__init__(name="vmeanba_fx.lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, frontend_type):
        super().__init__(manager, frontend_type, llvm.vector)


def _lower(build):
    def lower(context, builder, signature, values):
        result = build(builder, *values)
        return context.get_dummy_value() if result is None else result

    return lower


@intrinsic
def load(context, address):
    """16 floats."""
    return lanes(types.int64), _lower(lambda b, address: b.load(llvm.at(b, address, llvm.vector), align=4, typ=llvm.vector))


@intrinsic
def load_part(context, address, count):
    """The first `count` of 16 floats, then zeros."""

    def build(b, address, count):
        return llvm.load_part(b, address, count, llvm.vector, "v16f32")

    return lanes(types.int64, types.int64), _lower(build)


@intrinsic
def load_half(context, address, count):
    """The first `count` of 16 bfloat16, then zeros."""

    def build(b, address, count):
        return llvm.widen(b, llvm.load_part(b, address, count, llvm.halves, "v16i16"))

    return lanes(types.int64, types.int64), _lower(build)


@intrinsic
def store(context, address, value):
    def build(b, address, value):
        b.store(value, llvm.at(b, address, llvm.vector), align=4)

    return types.void(types.int64, lanes), _lower(build)


@intrinsic
def store_part(context, address, value, count):
    def build(b, address, value, count):
        llvm.store_part(b, address, value, count, "v16f32")

    return types.void(types.int64, lanes, types.int64), _lower(build)


@intrinsic
def store_half(context, address, value, count):
    """The first `count` of 16 floats as bfloat16."""

    def build(b, address, value, count):
        llvm.store_part(b, address, llvm.narrow(b, value), count, "v16i16")

    return types.void(types.int64, lanes, types.int64), _lower(build)


@intrinsic
def prefetch(context, address):
    """Ask for the cache line at an address, which need not exist."""

    def build(b, address):
        llvm.call(b, "llvm.prefetch.p0", ir.VoidType(), llvm.at(b, address, llvm.vector), llvm.i32(0), llvm.i32(2), llvm.i32(1))

    return types.void(types.int64), _lower(build)


@intrinsic
def read(context, address):
    """One float in all lanes."""
    return lanes(types.int64), _lower(lambda b, address: llvm.splat(b, b.load(llvm.at(b, address, llvm.f32), typ=llvm.f32)))


@intrinsic
def position(context, address):
    """One int64."""
    return types.int64(types.int64), _lower(lambda b, address: b.load(llvm.at(b, address, llvm.i64), typ=llvm.i64))


@intrinsic
def put_position(context, address, value):
    """Store one int64."""

    def build(b, address, value):
        b.store(value, llvm.at(b, address, llvm.i64))

    return types.void(types.int64, types.int64), _lower(build)


@intrinsic
def take(context, address):
    """Add one to an int64, of which other threads may do the same, and return what it was before."""

    def build(b, address):
        return b.atomic_rmw("add", llvm.at(b, address, llvm.i64), llvm.i64(1), "monotonic")

    return types.int64(types.int64), _lower(build)


@intrinsic(prefer_literal=True)
def table(context, address, count):
    """`count` int64, a literal, as a tuple."""
    result = types.UniTuple(types.int64, count.literal_value)

    def lower(context, b, signature, values):
        numbers = [b.load(llvm.at(b, values[0], llvm.i64, 8 * i), typ=llvm.i64) for i in range(count.literal_value)]
        return context.make_tuple(b, signature.return_type, numbers)

    return result(types.int64, count), lower


@intrinsic
def put(context, address, value):
    """Store one float."""

    def build(b, address, value):
        b.store(value, llvm.at(b, address, llvm.f32))

    return types.void(types.int64, types.float32), _lower(build)


@intrinsic
def get(context, address):
    """One float."""
    return types.float32(types.int64), _lower(lambda b, address: b.load(llvm.at(b, address, llvm.f32), typ=llvm.f32))


@intrinsic
def get_half(context, address):
    """One bfloat16, widened."""

    def build(b, address):
        bits = b.load(llvm.at(b, address, ir.IntType(16)), typ=ir.IntType(16))
        return b.bitcast(b.shl(b.zext(bits, llvm.i32), llvm.i32(16)), llvm.f32)

    return types.float32(types.int64), _lower(build)


@intrinsic
def spread(context, value):
    """A float in all lanes."""
    return lanes(types.float32), _lower(llvm.splat)


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
    return lanes(lanes, lanes, lanes), _lower(llvm.fma)


@intrinsic
def exp2(context, x):
    return lanes(lanes), _lower(llvm.exp2)


@intrinsic
def softplus(context, x):
    return lanes(lanes), _lower(llvm.softplus)


@intrinsic
def silu(context, x):
    return lanes(lanes), _lower(llvm.silu)


@intrinsic
def window_decays(context, a):
    """For the lanes as 16 steps: the decay over all steps up to each, from the first on."""

    def build(b, a):
        for steps in (1, 2, 4, 8):
            a = b.fmul(a, llvm.shift(b, a, steps, 1.0))
        return a

    return lanes(lanes), _lower(build)


@intrinsic
def scan16(context, a, h):
    """For the lanes as 16 steps: h_t = a_t h_{t-1} + h_t from a state of zero."""

    def build(b, a, h):
        for steps in (1, 2, 4, 8):
            h = llvm.fma(b, a, llvm.shift(b, h, steps, 0.0), h)
            if steps < 8:
                a = b.fmul(a, llvm.shift(b, a, steps, 1.0))
        return h

    return lanes(lanes, lanes), _lower(build)


@intrinsic
def last(context, x):
    """The last lane in all lanes."""
    return lanes(lanes), _lower(lambda b, x: b.shuffle_vector(x, x, llvm.indices([LANES - 1] * LANES)))


@intrinsic
def transpose(context, source, target):
    """16 x 16 floats in 16 successive vectors, from one address to another."""

    def build(b, source, target):
        rows = [b.load(llvm.at(b, source, llvm.vector, ROW * i), align=4, typ=llvm.vector) for i in range(LANES)]
        for i, row in enumerate(llvm.transpose(b, rows)):
            b.store(row, llvm.at(b, target, llvm.vector, ROW * i), align=4)

    return types.void(types.int64, types.int64), _lower(build)


@njit(nogil=True)
def enter(data):
    """For a thread that begins on a kernel's table: the number of pieces, its first one, and the address of its own scratch
    memory, which only threads that have a piece to do own."""
    pieces, piece = position(data + 8), take(data)
    seat = take(data + 16) if piece < pieces else 0
    return pieces, piece, position(data + 24) + position(data + 32) * seat


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
def read_rows(source, source_stride, rows, count, target, target_stride, size=4):
    """Copy `rows` rows of `count` numbers to scratch memory, in whole vectors: zeros fill up the last one."""
    for i in range(rows):
        for t in range(0, count, LANES):
            x = fetch(source + source_stride * i + size * t, min(LANES, count - t), size)
            store(target + target_stride * i + 4 * t, x)


@njit(nogil=True)
def prefetch_vectors(source, source_stride, rows):
    """Ask for a vector of each of `rows` rows."""
    for i in range(rows):
        prefetch(source + source_stride * i)


@njit(nogil=True)
def write_rows(source, source_stride, rows, count, target, target_stride, size):
    """Copy `rows` rows of `count` numbers, and no more."""
    for i in range(rows):
        for t in range(0, count, LANES):
            x = load(source + source_stride * i + 4 * t)
            deliver(target + target_stride * i + size * t, x, min(LANES, count - t), size)


@njit(nogil=True)
def clear(target, count):
    for i in range(count):
        store(target + ROW * i, spread(np.float32(0)))


@njit(nogil=True)
def load_columns(source, stride, rows, target):
    """target[t], a vector for each of 16 columns = source[row, t] for up to 16 rows; it is zero for the rest."""
    for i in range(LANES):
        store(target + ROW * i, load(source + stride * i) if i < rows else spread(np.float32(0)))
    transpose(target, target)
