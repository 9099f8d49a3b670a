// The tail of a replaced scan, one pass over memory: out[b, c, l] = y[b, c / (channels per group), l] + D[c] * u[b, c, l].
//
// u, out (B, K*D, L), y (B, K, L) float or any; D (K*D,) or none. A thread makes 8 consecutive elements of the flattened output.
//
// Macros: Y_TYPE, U_TYPE, OUT_TYPE; SKIP: D is given; VECTOR: u is contiguous and aligned to 8 elements, and the size of out is a
// multiple of 8; WHOLE: L is a multiple of 8 too and y is aligned, so that 8 elements lie in one row.
#include "common.cuh"

struct Params {
    int64 y, u, D, out;
    int64 total, length, channels, per_group;
    int64 y_b, y_k, y_l, u_b, u_c, u_l;
};

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS) broadcast_add(const Params p) {
    typedef Element<Y_TYPE>::type y_type;
    typedef Element<U_TYPE>::type u_type;
    typedef Element<OUT_TYPE>::type out_type;
    const int64 first = ((int64)blockIdx.x * THREADS + threadIdx.x) * 8;
    if (first >= p.total) return;
    const int length = (int)p.length, channels = (int)p.channels, per_group = (int)p.per_group;
    int row = (int)(first / length), l = (int)(first - (int64)row * length);
    int b = row / channels, c = row - b * channels;
    const u_type *u = (const u_type *)p.u;
    out_type *out = (out_type *)p.out + first;
    float v[8];
#if VECTOR
#if SKIP
    Pack<U_TYPE, 8> pack;
    pack.load(u + first);
#endif
#if WHOLE
    Pack<Y_TYPE, 8> shared_row;
    shared_row.load((const y_type *)p.y + b * p.y_b + c / per_group * p.y_k + l);
#if SKIP
    const float scale = ((const float *)p.D)[c];
#endif
#endif
#endif
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#if VECTOR && WHOLE
        v[i] = shared_row.get(i);
#if SKIP
        v[i] = fmaf(scale, pack.get(i), v[i]);
#endif
#else
        if (first + i < p.total) {
            v[i] = Element<Y_TYPE>::load((const y_type *)p.y + b * p.y_b + c / per_group * p.y_k + l * p.y_l);
#if SKIP
#if VECTOR
            const float x = pack.get(i);
#else
            const float x = Element<U_TYPE>::load(u + b * p.u_b + c * p.u_c + l * p.u_l);
#endif
            v[i] = fmaf(((const float *)p.D)[c], x, v[i]);
#endif
#if !VECTOR
            Element<OUT_TYPE>::store(out + i, v[i]);
#endif
        }
        if (++l == length) {
            l = 0;
            if (++c == channels) {
                c = 0;
                ++b;
            }
        }
#endif
    }
#if VECTOR
    Pack<OUT_TYPE, 8> result;
    result.set(v);
    result.store(out);
#endif
}
