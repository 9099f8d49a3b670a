// The tail of a replaced scan, one pass over memory: out[b, c, l] = y[b, c / (channels per group), l] + D[c] * u[b, c, l].
//
// u, out (B, K*D, L), y (B, K, L) float or any; D (K*D,) or none. A thread makes 8 elements of out that follow each other in memory.
//
// Macros: Y_TYPE, U_TYPE, OUT_TYPE; SKIP: D is given; LAST: out lies in memory as (B, L, K*D); VECTOR: u lies as out does and is
// aligned to 8 elements, and the size of out is a multiple of 8; WHOLE: so is the innermost size (with LAST: that of a group), and
// the rows of y (D) are aligned, so that 8 elements share a channel (a position).
#include "common.cuh"

struct Params {
    int64 y, u, D, out;
    int64 total, length, channels, per_group;
    int64 y_b, y_k, y_l, u_b, u_c, u_l;
};

#define THREADS 256

// Position of an element of out.
struct Place {
    int b, c, l;
    __device__ __forceinline__ Place(int64 element, int channels, int length) {
        const int inner = LAST ? channels : length, outer = LAST ? length : channels;
        const int64 row = element / inner;
        b = (int)(row / outer);
        const int i = (int)(element - row * inner), o = (int)(row - (int64)b * outer);
        c = LAST ? i : o;
        l = LAST ? o : i;
    }
    __device__ __forceinline__ void advance(int channels, int length) {
        int &i = LAST ? c : l, &o = LAST ? l : c;
        if (++i < (LAST ? channels : length)) return;
        i = 0;
        if (++o < (LAST ? length : channels)) return;
        o = 0;
        ++b;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) broadcast_add(const Params p) {
    typedef Element<Y_TYPE>::type y_type;
    typedef Element<U_TYPE>::type u_type;
    typedef Element<OUT_TYPE>::type out_type;
    const int64 first = ((int64)blockIdx.x * THREADS + threadIdx.x) * 8;
    if (first >= p.total) return;
    const int length = (int)p.length, channels = (int)p.channels, per_group = (int)p.per_group;
    const y_type *y = (const y_type *)p.y;
    const u_type *u = (const u_type *)p.u;
    const float *D = (const float *)p.D;
    out_type *out = (out_type *)p.out + first;
    Place at(first, channels, length);
#if VECTOR
    Pack<U_TYPE, 8> given;
    if (SKIP) given.load(u + first);
#endif
    float v[8];
#if VECTOR && WHOLE
    const y_type *row = y + at.b * p.y_b + at.c / per_group * p.y_k + at.l * p.y_l;
#if LAST
    const float shared = Element<Y_TYPE>::load(row);
    Pack<0, 8> scales;
    if (SKIP) scales.load(D + at.c);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = SKIP ? fmaf(scales.get(i), given.get(i), shared) : shared;
#else
    Pack<Y_TYPE, 8> shared;
    shared.load(row);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = SKIP ? fmaf(D[at.c], given.get(i), shared.get(i)) : shared.get(i);
#endif
#else
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (first + i < p.total) {
            v[i] = Element<Y_TYPE>::load(y + at.b * p.y_b + at.c / per_group * p.y_k + at.l * p.y_l);
#if SKIP
#if VECTOR
            const float x = given.get(i);
#else
            const float x = Element<U_TYPE>::load(u + at.b * p.u_b + at.c * p.u_c + at.l * p.u_l);
#endif
            v[i] = fmaf(D[at.c], x, v[i]);
#endif
#if !VECTOR
            Element<OUT_TYPE>::store(out + i, v[i]);
#endif
        }
        at.advance(channels, length);
    }
#endif
#if VECTOR
    Pack<OUT_TYPE, 8> result;
    result.set(v);
    result.store(out);
#endif
}
