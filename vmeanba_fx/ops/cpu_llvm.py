"""Vectors of 16 float32 in LLVM's terms: each function takes the builder and values, and returns a value.

LLVM turns them into AVX-512, AVX2, SSE or NEON, whatever the machine has, and no speed hangs on what its loop vectoriser makes
of a loop. exp2 and log1p are polynomials, good to 1.3e-7 relative.
"""

from llvmlite import ir
from numba.core import cgutils

LANES = 16

# 2**f on [-0.5, 0.5] and log1p(t)/t on [0, 1], interpolated at Chebyshev points in float64; exact at 0.
_EXP2 = (1.0, 0.6931471880601997, 0.24022650760568132, 0.0555035711422015, 0.00961808255728395, 0.0013390863364174759,
         0.00015453162941980736)  # fmt: skip
_LOG1P = (1.0, -0.49999892648073857, 0.33329710499147114, -0.249516162647367, 0.1966327426485181, -0.15269667092062955,
          0.10543623819424233, -0.05637361301767855, 0.019542527338241508, -0.003176057031149872)  # fmt: skip
LOG2_E = 1.4426950408889634
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits

f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
vector, integers, halves = (ir.VectorType(kind, LANES) for kind in (f32, i32, ir.IntType(16)))


def constant(value, kind=vector):
    return ir.Constant(kind, [value] * LANES)


def indices(values):
    return ir.Constant(integers, list(values))


def splat(b, value):
    one = b.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, i32(0))
    return b.shuffle_vector(one, one, indices([0] * LANES))


def call(b, name, result, *arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def fma(b, x, y, z):
    return call(b, "llvm.fmuladd.v16f32", vector, x, y, z)


def polynomial(b, coefficients, x):
    total = constant(coefficients[-1])
    for c in coefficients[-2::-1]:
        total = fma(b, total, x, constant(c))
    return total


def exp2(b, x):
    """2**x; 2**-126 below, infinite from 128 on; NaN stays NaN (a comparison with it is false)."""
    for limit, order in ((-126.0, "<"), (128.0, ">")):
        x = b.select(b.fcmp_ordered(order, x, constant(limit)), constant(limit), x)
    rounded = b.fadd(x, constant(_ROUND))
    part = b.fsub(x, b.fsub(rounded, constant(_ROUND)))
    power = b.shl(b.bitcast(rounded, integers), constant(23, integers))
    bits = b.bitcast(polynomial(b, _EXP2, part), integers)
    return b.bitcast(b.add(bits, power), vector)


def softplus(b, x):
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    positive = b.fcmp_ordered(">", x, constant(0.0))
    t = exp2(b, b.fmul(b.select(positive, b.fneg(x), x), constant(LOG2_E)))
    return fma(b, t, polynomial(b, _LOG1P, t), b.select(positive, x, constant(0.0)))


def silu(b, x):
    e = exp2(b, b.fmul(x, constant(-LOG2_E)))
    return b.fdiv(x, b.fadd(e, constant(1.0)))


def widen(b, halves):
    """Sixteen bfloat16, as integers, to float32."""
    return b.bitcast(b.shl(b.zext(halves, integers), constant(16, integers)), vector)


def narrow(b, x):
    """The nearest bfloat16, to even; NaN stays NaN."""
    bits = b.bitcast(x, integers)
    odd = b.and_(b.lshr(bits, constant(16, integers)), constant(1, integers))
    rounded = b.add(b.add(bits, constant(0x7FFF, integers)), odd)
    rounded = b.select(b.fcmp_unordered("uno", x, x), constant(0x7FC00000, integers), rounded)
    return b.trunc(b.lshr(rounded, constant(16, integers)), halves)


def shift(b, x, steps, fill):
    """x[i - steps], and `fill` in the first `steps`. Not one shuffle with `fill`: its code is slower."""
    turned = b.shuffle_vector(x, x, indices((i - steps) % LANES for i in range(LANES)))
    there = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [i >= steps for i in range(LANES)])
    return b.select(there, turned, constant(fill))


def transpose(b, rows):
    """16 vectors of 16: four times, interleave row i with row i + 8."""
    low, high = (indices(half * 8 + i // 2 + LANES * (i % 2) for i in range(LANES)) for half in (0, 1))
    for _ in range(4):
        rows = [b.shuffle_vector(rows[i], rows[i + 8], part) for i in range(8) for part in (low, high)]
    return rows


def at(b, address, kind, offset=0):
    return b.inttoptr(b.add(address, i64(offset)), kind.as_pointer())


def mask(b, count):
    return b.icmp_signed("<", indices(range(LANES)), splat(b, b.trunc(count, i32)))


def load_part(b, address, count, kind, name):
    """The first `count` of 16 numbers, then zeros."""
    arguments = at(b, address, kind), i32(1), mask(b, count), constant(0, kind)
    return call(b, f"llvm.masked.load.{name}.p0", kind, *arguments)


def store_part(b, address, value, count, name):
    """The first `count` of 16 numbers."""
    arguments = value, at(b, address, value.type), i32(1), mask(b, count)
    call(b, f"llvm.masked.store.{name}.p0", ir.VoidType(), *arguments)
