// out[o, i] = sum over p of parts[o, p, i], in this order: what blocks of shared_scan.cu that share a map have made, put together.
//
// parts (outer, PARTS, inner) float, out (outer, inner); inner is a multiple of 4. A thread makes 4 consecutive elements.
//
// Macros: PARTS; OUT_TYPE.
#include "common.cuh"

struct Params {
    int64 parts, out, total, inner;
};

extern "C" __global__ void __launch_bounds__(256) add_parts(const Params p) {
    const int64 first = ((int64)blockIdx.x * 256 + threadIdx.x) * 4;
    if (first >= p.total) return;
    const int64 o = first / p.inner;
    const float *from = (const float *)p.parts + o * (PARTS - 1) * p.inner + first;
    float sum[4] = {};
#pragma unroll 8
    for (int part = 0; part < PARTS; ++part) {
        Pack<0, 4> pack;
        pack.load(from + part * p.inner);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += pack.get(i);
    }
    Pack<OUT_TYPE, 4> pack;
    pack.set(sum);
    pack.store((Element<OUT_TYPE>::type *)p.out + first);
}
