// Full selective scan, backward (without z: the host peels the gate off).
//
// With g_t the gradient of h_t and w_t = exp(dt A)_t g_t, backwards in time:
//
//     g_t = C_t dy_t + w_{t+1}          w_t = exp(dt A)_t g_t
//     du = D dy + sum_n g dt B          d(dt) = sum_n g (B u + exp(dt A) h_{t-1} A)
//     dA = sum_t g exp(dt A) h_{t-1} dt       dB = sum_d g dt u       dC = sum_d dy h       dD = sum_t dy u
//
// A block owns some channels of one group of one batch item and walks the chunks of L from the last to the first. Within a chunk
// each team of TPR threads takes one channel after another; a thread always holds the same ITEMS steps, so dB and dC sum over
// channels in place (in registers for one state, else in shared memory), and teams are added up in a fixed order at the end of the
// chunk. No atomics: the result is the same on every run. What blocks and batch items still have to add up (dB, dC over the
// splits of a group; dA, dD, dbias over the batch) is written as partial sums for the host to sum.
// The states at the ends of chunks come from selective_scan.cu with STATES and the same TPR and ITEMS.
//
// States are taken in tiles of TILE; with more than one tile du and ddelta are accumulated in place and must be float.
//
// Macros: THREADS, MIN_BLOCKS; U_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, GRAD_TYPE, DU_TYPE, DDELTA_TYPE; NSTATE, TILE (divides
// NSTATE); TPR (8, 16 or 32), ITEMS; SOFTPLUS; VECTOR as in selective_scan.cu.
#include "common.cuh"

struct Params {
    int64 grad, u, delta, A, B, C, D, delta_bias, states;
    int64 du, ddelta, dA, dB, dC, dD, dbias;
    int64 groups, per_group, per_block, splits, length;
    int64 grad_b, grad_c, grad_l, u_b, u_c, u_l, delta_b, delta_c, delta_l;
    int64 B_b, B_k, B_n, B_l, C_b, C_k, C_n, C_l;
};

#define CHUNK (TPR * ITEMS)
#define TEAMS (THREADS / TPR)
#define FULL 0xffffffffu

template <int CODE>
__device__ __forceinline__ void load(float *v, int64 base, int64 offset, int64 stride, int t, int length) {
    const typename Element<CODE>::type *p = (const typename Element<CODE>::type *)base + offset;
#if VECTOR
    Pack<CODE, ITEMS> pack;
    if (t < length) pack.load(p + t);
    else pack.zero();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) v[i] = pack.get(i);
#else
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) v[i] = t + i < length ? Element<CODE>::load(p + (t + i) * stride) : 0.f;
#endif
}

// Contiguous rows of the gradients; an existing partial sum is added when `add`.
template <int CODE>
__device__ __forceinline__ void put(const float *v, int64 base, int64 offset, int t, int length, bool add) {
    typename Element<CODE>::type *p = (typename Element<CODE>::type *)base + offset;
#if VECTOR
    if (t >= length) return;
    Pack<CODE, ITEMS> pack;
    float sum[ITEMS];
    if (add) pack.load(p + t);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) sum[i] = add ? v[i] + pack.get(i) : v[i];
    pack.set(sum);
    pack.store(p + t);
#else
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
        if (t + i < length) Element<CODE>::store(p + t + i, add ? v[i] + Element<CODE>::load(p + t + i) : v[i]);
#endif
}

__device__ __forceinline__ float team_sum(float v) {
#pragma unroll
    for (int o = TPR / 2; o > 0; o /= 2) v += __shfl_xor_sync(FULL, v, o, TPR);
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) selective_scan_bwd(const Params p) {
    // sums[team][dB or dC][tile state][step of the chunk]; then per channel of the block: w and dA per state, dD and dbias.
    extern __shared__ __align__(16) float shared[];
    float *sums = shared;
    float *w_carry = sums + TEAMS * 2 * TILE * CHUNK;
    float *dA_sum = w_carry + p.per_block * NSTATE;
    float *dD_sum = dA_sum + p.per_block * NSTATE;
    float *dbias_sum = dD_sum + p.per_block;

    const int lane = threadIdx.x % TPR, team = threadIdx.x / TPR, length = (int)p.length;
    const int split = blockIdx.x, k = blockIdx.y, b = blockIdx.z;
    const int first = split * (int)p.per_block;
    const int count = min((int)p.per_block, (int)p.per_group - first);
    const int rounds = (count + TEAMS - 1) / TEAMS;
    const int chunks = (length + CHUNK - 1) / CHUNK;
    const int64 channels = p.groups * p.per_group;

    for (int i = threadIdx.x; i < count * NSTATE; i += THREADS) w_carry[i] = dA_sum[i] = 0.f;
    for (int i = threadIdx.x; i < count; i += THREADS) dD_sum[i] = dbias_sum[i] = 0.f;

    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        const int t = chunk * CHUNK + lane * ITEMS;
#pragma unroll 1
        for (int tile = 0; tile < NSTATE; tile += TILE) {
            __syncthreads();  // the sums of the last tile have been read
#if TILE == 1
            float dB_sum[ITEMS], dC_sum[ITEMS];
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) dB_sum[i] = dC_sum[i] = 0.f;
#else
            for (int i = threadIdx.x; i < TEAMS * 2 * TILE * CHUNK; i += THREADS) sums[i] = 0.f;
            __syncthreads();
#endif
#pragma unroll 1
            for (int round = 0; round < rounds; ++round) {
                // A team without a channel left works on the last one with a zero gradient and writes nothing.
                const bool live = round * TEAMS + team < count;
                const int local = live ? round * TEAMS + team : count - 1;
                const int64 c = k * p.per_group + first + local, row = b * channels + c;
                float u[ITEMS], dt[ITEMS], dy[ITEMS], slope[ITEMS], du[ITEMS], ddt[ITEMS];
                load<U_TYPE>(u, p.u, b * p.u_b + c * p.u_c, p.u_l, t, length);
                load<DELTA_TYPE>(dt, p.delta, b * p.delta_b + c * p.delta_c, p.delta_l, t, length);
                load<GRAD_TYPE>(dy, p.grad, b * p.grad_b + c * p.grad_c, p.grad_l, t, length);
                const float bias = p.delta_bias ? ((const float *)p.delta_bias)[c] : 0.f;
                const float skip = p.D && tile == 0 ? ((const float *)p.D)[c] : 0.f;
                float dD = 0.f;
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    float step = dt[i] + bias;
#if SOFTPLUS
                    slope[i] = sigmoid(step);
                    step = softplus(step);
#else
                    slope[i] = 1.f;
#endif
                    dt[i] = t + i < length ? step : 0.f;
                    dy[i] = live ? dy[i] : 0.f;
                    du[i] = skip * dy[i];
                    ddt[i] = 0.f;
                    dD = fmaf(dy[i], u[i], dD);
                }
#pragma unroll 1
                for (int m = 0; m < TILE; ++m) {
                    const int n = tile + m;
                    const float decay = ((const float *)p.A)[c * NSTATE + n];
                    const float start = chunk > 0 ? ((const float *)p.states)[(row * chunks + chunk - 1) * NSTATE + n] : 0.f;
                    const float w_end = live ? w_carry[local * NSTATE + n] : 0.f;
                    float B[ITEMS], C[ITEMS], a[ITEMS], kept[ITEMS];
                    load<B_TYPE>(B, p.B, b * p.B_b + k * p.B_k + n * p.B_n, p.B_l, t, length);
                    load<C_TYPE>(C, p.C, b * p.C_b + k * p.C_k + n * p.C_n, p.C_l, t, length);

                    float product = 1.f, h = lane == 0 ? start : 0.f;
#pragma unroll
                    for (int i = 0; i < ITEMS; ++i) {
                        a[i] = exp2_fast(dt[i] * decay * LOG2E);
                        h = fmaf(a[i], h, dt[i] * u[i] * B[i]);
                        product *= a[i];
                    }
                    float w = lane == TPR - 1 ? w_end : 0.f;
#pragma unroll
                    for (int i = ITEMS - 1; i >= 0; --i) w = a[i] * fmaf(C[i], dy[i], w);
                    float product_w = product;
#pragma unroll
                    for (int o = 1; o < TPR; o *= 2) {
                        const float h_before = __shfl_up_sync(FULL, h, o, TPR);
                        const float product_before = __shfl_up_sync(FULL, product, o, TPR);
                        const float w_after = __shfl_down_sync(FULL, w, o, TPR);
                        const float product_after = __shfl_down_sync(FULL, product_w, o, TPR);
                        if (lane >= o) {
                            h = fmaf(product, h_before, h);
                            product *= product_before;
                        }
                        if (lane + o < TPR) {
                            w = fmaf(product_w, w_after, w);
                            product_w *= product_after;
                        }
                    }
                    float before = __shfl_up_sync(FULL, h, 1, TPR);
                    if (lane == 0) before = start;
                    float after = __shfl_down_sync(FULL, w, 1, TPR);
                    if (lane == TPR - 1) after = w_end;
                    __syncwarp();  // every lane has read the old carry
                    if (lane == 0 && live) w_carry[local * NSTATE + n] = w;

                    float dA = 0.f;
#if TILE > 1
                    float *own = sums + (team * 2 * TILE + m) * CHUNK + lane * ITEMS;
                    Pack<0, ITEMS> dB_pack, dC_pack;
                    dB_pack.load(own);
                    dC_pack.load(own + TILE * CHUNK);
                    float dB_sum[ITEMS], dC_sum[ITEMS];
#pragma unroll
                    for (int i = 0; i < ITEMS; ++i) {
                        dB_sum[i] = dB_pack.get(i);
                        dC_sum[i] = dC_pack.get(i);
                    }
#endif
#pragma unroll
                    for (int i = 0; i < ITEMS; ++i) {
                        kept[i] = a[i] * before;  // the part of h_t that h_{t-1} gives
                        before = fmaf(dt[i] * u[i], B[i], kept[i]);
                        dC_sum[i] = fmaf(dy[i], before, dC_sum[i]);
                    }
#pragma unroll
                    for (int i = ITEMS - 1; i >= 0; --i) {
                        const float g = fmaf(C[i], dy[i], after);
                        after = a[i] * g;
                        const float gB = g * B[i], gk = g * kept[i];
                        du[i] = fmaf(gB, dt[i], du[i]);
                        ddt[i] = fmaf(gB, u[i], fmaf(gk, decay, ddt[i]));
                        dA = fmaf(gk, dt[i], dA);
                        dB_sum[i] = fmaf(g * dt[i], u[i], dB_sum[i]);
                    }
#if TILE > 1
                    dB_pack.set(dB_sum);
                    dB_pack.store(own);
                    dC_pack.set(dC_sum);
                    dC_pack.store(own + TILE * CHUNK);
#endif
                    dA = team_sum(dA);
                    if (lane == 0 && live) dA_sum[local * NSTATE + n] += dA;
                }
                float dbias = 0.f;
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    ddt[i] *= slope[i];
                    dbias += t + i < length ? ddt[i] : 0.f;
                }
                dbias = team_sum(dbias);
                dD = team_sum(dD);
                if (lane == 0 && live) {
                    dbias_sum[local] += dbias;
                    if (tile == 0) dD_sum[local] += dD;
                }
                if (live) {
                    put<DU_TYPE>(du, p.du, row * length, t, length, tile > 0);
                    put<DDELTA_TYPE>(ddt, p.ddelta, row * length, t, length, tile > 0);
                }
            }
#if TILE == 1
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                sums[(team * 2) * CHUNK + lane * ITEMS + i] = dB_sum[i];
                sums[(team * 2 + 1) * CHUNK + lane * ITEMS + i] = dC_sum[i];
            }
#endif
            __syncthreads();
            for (int i = threadIdx.x; i < 2 * TILE * CHUNK; i += THREADS) {
                const int step = chunk * CHUNK + i % CHUNK, n = tile + i / CHUNK % TILE;
                float total = 0.f;
#pragma unroll
                for (int other = 0; other < TEAMS; ++other) total += sums[other * 2 * TILE * CHUNK + i];
                float *to = (float *)(i < TILE * CHUNK ? p.dB : p.dC);
                if (step < length)
                    to[(((b * p.groups + k) * p.splits + split) * NSTATE + n) * p.length + step] = total;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * NSTATE; i += THREADS)
        ((float *)p.dA)[(b * channels + k * p.per_group + first) * NSTATE + i] = dA_sum[i];
    for (int i = threadIdx.x; i < count; i += THREADS) {
        ((float *)p.dD)[b * channels + k * p.per_group + first + i] = dD_sum[i];
        ((float *)p.dbias)[b * channels + k * p.per_group + first + i] = dbias_sum[i];
    }
}
