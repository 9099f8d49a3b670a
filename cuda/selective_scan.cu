// Full selective scan, forward.
//
//     dt = softplus?(delta + delta_bias);  h_t = exp(dt A) h_{t-1} + dt B u;  y = <C, h> (+ D u) (* silu(z))
//
// u, delta, z, out (B, K*D, L); A (K*D, N); B, C (B, K, N, L). One row is one channel of one batch item. TPR threads work on a
// row, each on ITEMS consecutive steps, so a row advances TPR * ITEMS steps at a time and carries one state per n from chunk
// to chunk. Few threads per row mean few shuffles; more are taken only where there are too few rows to fill the GPU. Rows of a
// block share B and C through the L1 cache.
//
// With STATES the kernel writes, instead of y, the state at the end of every chunk: what the backward kernel restarts from.
//
// Macros: THREADS, MIN_BLOCKS (blocks per multiprocessor to leave registers for); U_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, Z_TYPE (-1: no z), OUT_TYPE: element types; NSTATE; TPR, ITEMS;
// SOFTPLUS; VECTOR: unit stride along L, rows aligned for packs of ITEMS, L a multiple of ITEMS; STATES.
#include "common.cuh"

struct Params {
    int64 u, delta, A, B, C, D, z, delta_bias, out;
    int64 rows, channels, per_group, length;
    int64 u_b, u_c, u_l, delta_b, delta_c, delta_l, z_b, z_c, z_l;
    int64 B_b, B_k, B_n, B_l, C_b, C_k, C_n, C_l;
};

#define CHUNK (TPR * ITEMS)
#define ROWS (THREADS / TPR)
#define WIDTH (TPR < 32 ? TPR : 32)
#define WARPS (TPR / WIDTH)

template <int CODE> struct Row {
    typedef typename Element<CODE>::type type;
    const type *base;
    int64 stride;

    __device__ __forceinline__ void load(Pack<CODE, ITEMS> &pack, int t, int length) const {
#if VECTOR
        if (t < length) pack.load(base + t);
        else pack.zero();
#else
        float v[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) v[i] = t + i < length ? Element<CODE>::load(base + (t + i) * stride) : 0.f;
        pack.set(v);
#endif
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) selective_scan(const Params p) {
    __shared__ float carry[ROWS * NSTATE];
#if WARPS > 1
    __shared__ float2 aggregate[2][WARPS];
    int parity = 0;
#endif
    const int lane = threadIdx.x % TPR, slot = threadIdx.x / TPR, warp_lane = lane % WIDTH;
    const int length = (int)p.length;
    int64 row = (int64)blockIdx.x * ROWS + slot;
    const bool live = row < p.rows;
    if (!live) row = p.rows - 1;  // a spare team repeats the last row and writes nothing, so that shuffles stay full
    const int b = (int)(row / p.channels), c = (int)(row - b * p.channels), k = c / (int)p.per_group;

    const Row<U_TYPE> u = {(const Element<U_TYPE>::type *)p.u + b * p.u_b + c * p.u_c, p.u_l};
    const Row<DELTA_TYPE> delta = {(const Element<DELTA_TYPE>::type *)p.delta + b * p.delta_b + c * p.delta_c, p.delta_l};
    Row<B_TYPE> B = {(const Element<B_TYPE>::type *)p.B + b * p.B_b + k * p.B_k, p.B_l};
    const float *A = (const float *)p.A + (int64)c * NSTATE;
    const float bias = p.delta_bias ? ((const float *)p.delta_bias)[c] : 0.f;
#if !STATES
    Row<C_TYPE> C = {(const Element<C_TYPE>::type *)p.C + b * p.C_b + k * p.C_k, p.C_l};
    const float skip = p.D ? ((const float *)p.D)[c] : 0.f;
    Element<OUT_TYPE>::type *out = (Element<OUT_TYPE>::type *)p.out + row * p.length;
#else
    const int chunks = (length + CHUNK - 1) / CHUNK;
    float *states = (float *)p.out + row * chunks * NSTATE;
#endif
    for (int i = lane; i < NSTATE; i += TPR) carry[slot * NSTATE + i] = 0.f;

    Pack<U_TYPE, ITEMS> u_next;
    Pack<DELTA_TYPE, ITEMS> delta_next;
    Pack<B_TYPE, ITEMS> B_next;
    u.load(u_next, lane * ITEMS, length);
    delta.load(delta_next, lane * ITEMS, length);
    B.load(B_next, lane * ITEMS, length);
#if !STATES
    Pack<C_TYPE, ITEMS> C_next;
    C.load(C_next, lane * ITEMS, length);
#endif

    for (int start = 0; start < length; start += CHUNK) {
        const int t = start + lane * ITEMS;
        float dt[ITEMS], dtu[ITEMS];
#if !STATES
        float y[ITEMS];
#endif
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            float x = u_next.get(i), step = delta_next.get(i) + bias;
#if SOFTPLUS
            step = softplus(step);
#endif
            // A step past the end is the identity: dt = 0 gives decay 1 and input 0.
            dt[i] = t + i < length ? step : 0.f;
            dtu[i] = dt[i] * x;
#if !STATES
            y[i] = skip * x;
#endif
        }
        if (start + CHUNK < length) {
            u.load(u_next, t + CHUNK, length);
            delta.load(delta_next, t + CHUNK, length);
        }
#if WARPS > 1
        __syncthreads();  // the carry of the last chunk is written by another warp
#else
        __syncwarp();
#endif
#pragma unroll 1
        for (int n = 0; n < NSTATE; ++n) {
            const float decay = A[n] * LOG2E;
            const float start_state = carry[slot * NSTATE + n];
            float a[ITEMS], in[ITEMS];
            float product = 1.f, h = lane == 0 ? start_state : 0.f;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                a[i] = exp2_fast(dt[i] * decay);
                in[i] = dtu[i] * B_next.get(i);
                h = fmaf(a[i], h, in[i]);
                product *= a[i];
            }
#if !STATES
            float read[ITEMS];
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) read[i] = C_next.get(i);
#endif
            // Loads of the next state, or of the next chunk's first, fly while this one is scanned.
            const bool last = n == NSTATE - 1;
            if (!last || start + CHUNK < length) {
                const int t_next = last ? t + CHUNK : t;
                B.base += last ? -(NSTATE - 1) * p.B_n : p.B_n;
                B.load(B_next, t_next, length);
#if !STATES
                C.base += last ? -(NSTATE - 1) * p.C_n : p.C_n;
                C.load(C_next, t_next, length);
#endif
            }
#pragma unroll
            for (int o = 1; o < WIDTH; o *= 2) {
                const float h_before = __shfl_up_sync(0xffffffffu, h, o, WIDTH);
                const float product_before = __shfl_up_sync(0xffffffffu, product, o, WIDTH);
                if (warp_lane >= o) {
                    h = fmaf(product, h_before, h);
                    product *= product_before;
                }
            }
            float before = __shfl_up_sync(0xffffffffu, h, 1, WIDTH);
            if (warp_lane == 0) before = lane == 0 ? start_state : 0.f;
#if WARPS > 1
            float product_before = __shfl_up_sync(0xffffffffu, product, 1, WIDTH);
            if (warp_lane == 0) product_before = 1.f;
            if (warp_lane == WIDTH - 1) aggregate[parity][lane / WIDTH] = make_float2(product, h);
            __syncthreads();
            float warp_state = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS - 1; ++w) {
                const float2 other = aggregate[parity][w];
                if (w < lane / WIDTH) warp_state = fmaf(other.x, warp_state, other.y);
            }
            before = fmaf(product_before, warp_state, before);
            h = fmaf(product, warp_state, h);
            parity ^= 1;
#endif
            __syncwarp();  // every lane has read the old carry
            if (lane == TPR - 1) {
                carry[slot * NSTATE + n] = h;
#if STATES
                if (live) states[(start / CHUNK) * NSTATE + n] = h;
#endif
            }
#if !STATES
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                before = fmaf(a[i], before, in[i]);
                y[i] = fmaf(read[i], before, y[i]);
            }
#endif
        }
#if !STATES
#if Z_TYPE >= 0
        const Row<Z_TYPE> z = {(const Element<Z_TYPE>::type *)p.z + b * p.z_b + c * p.z_c, p.z_l};
        Pack<Z_TYPE, ITEMS> gate;
        z.load(gate, t, length);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) y[i] *= gate.get(i) * sigmoid(gate.get(i));
#endif
        if (live) {
#if VECTOR
            if (t < length) {
                Pack<OUT_TYPE, ITEMS> pack;
                pack.set(y);
                pack.store(out + t);
            }
#else
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
                if (t + i < length) Element<OUT_TYPE>::store(out + t + i, y[i]);
#endif
        }
#endif
    }
}
