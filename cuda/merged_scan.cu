// One-channel scans with one state over whole maps, merged: what shared_scan.cu computes with MERGE, for maps whose arrays fit
// into shared memory together.
//
// A block takes one batch item and one direction at a time; a thread takes ITEMS consecutive steps of it. All arrays are asked for
// at once, in the order of their use, and each has a barrier of its own: a direction is scanned while those after it still
// arrive, and what is left to do after the last bytes (C of the last direction) is a product and the store.
//
// Directions along columns come first. Forwards and backwards a thread meets the same positions, so y stays in registers; once,
// between columns and rows, it changes threads in shared memory. Every GAP_LINES map lines there is a gap of GAP elements (for y:
// every ITEMS lines one of 4 floats), which spreads a column over the banks. Sums are made in a fixed order: deterministic.
//
// Macros: U_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, OUT_TYPE; HEIGHT, WIDTH; GROUPS directions, of which COLUMNS are along columns; ORDER
// and CODES: which direction is scanned i-th, and its code, four bits each; OWN_U: each direction has its own u; ITEMS (4 or 8, a
// divisor of HEIGHT if COLUMNS); SOFTPLUS.
#include "common.cuh"
#include "shared_scan_params.cuh"
#include "bulk.cuh"

#define LENGTH (HEIGHT * WIDTH)
#define WARPS ((LENGTH / ITEMS + 31) / 32)
#define THREADS (32 * WARPS)
#define FULL 0xffffffffu
#define GAP_LINES 8
#define GAP 8
#define PARTS ((HEIGHT + GAP_LINES - 1) / GAP_LINES)
#define CAP (LENGTH + GAP * PARTS)  // elements of an array with its gaps
#define EACH (3 + OWN_U)  // arrays of a direction
#define ARRAYS (EACH * GROUPS + !OWN_U)
#define PIECES (ARRAYS * PARTS)
#define DELTA 0
#define U 1
#define B_ 2
#define C_ 3
#define U_BYTES Element<U_TYPE>::bytes
#define DELTA_BYTES Element<DELTA_TYPE>::bytes
#define B_BYTES Element<B_TYPE>::bytes
#define C_BYTES Element<C_TYPE>::bytes

// Arrays in the order of their use: delta, u, B, C of the first direction, and so on, u only once where all read the same.
struct Array {
    int turn, kind;  // of the direction that uses it first; DELTA ... C_

    static __device__ __forceinline__ Array of(int number) {
        if (OWN_U || number < 4) return {number / 4, number % 4};
        const int rest = (number - 1) % 3;
        return {(number - 1) / 3, rest ? rest + 1 : DELTA};
    }
    __device__ __forceinline__ int number() const {
        return OWN_U || turn == 0 ? 4 * turn + kind : 3 * turn + 1 + max(kind - 1, 0);
    }
    __device__ __forceinline__ int offset() const {
        const bool u_before = OWN_U ? kind > U : turn || kind > U;
        const int before = (OWN_U ? turn : 0) + u_before;
        const int in_turn = (kind > DELTA) * DELTA_BYTES + (kind > B_) * B_BYTES;
        return CAP * (before * U_BYTES + turn * (DELTA_BYTES + B_BYTES + C_BYTES) + in_turn);
    }
};
#define SUMS_AT (CAP * ((OWN_U ? GROUPS : 1) * U_BYTES + GROUPS * (DELTA_BYTES + B_BYTES + C_BYTES)))

__device__ __forceinline__ void fetch(const Params &p, int piece, char *shared, uint_t arrival) {
    const int number = piece / PARTS, part = piece % PARTS;
    const Array array = Array::of(number);
    const int64 b = blockIdx.x, k = (int)(ORDER >> (4 * array.turn)) & 15;
    int64 from;
    int bytes;
    if (array.kind == DELTA) from = p.delta + (b * p.delta_b + k * p.delta_k) * DELTA_BYTES, bytes = DELTA_BYTES;
    else if (array.kind == B_) from = p.B + (b * p.B_b + k * p.B_k) * B_BYTES, bytes = B_BYTES;
    else if (array.kind == C_) from = p.C + (b * p.C_b + k * p.C_k) * C_BYTES, bytes = C_BYTES;
    else from = p.u + (b * p.u_b + k * p.u_k) * U_BYTES, bytes = U_BYTES;
    const int first = part * GAP_LINES * WIDTH;
    const uint_t barrier = arrival + 8 * number;
    if (part == 0) arrival_expect(barrier, LENGTH * bytes);
    char *const to = shared + array.offset() + (first + GAP * part) * bytes;
    bulk_copy(to, from + first * bytes, min(GAP_LINES * WIDTH, LENGTH - first) * bytes, barrier);
}

// ITEMS elements of an array, below each other (`columns`) or beside each other.
template <int CODE> __device__ __forceinline__ void read(float (&v)[ITEMS], const char *array, int index, bool columns) {
    typedef typename Element<CODE>::type type;
    const type *const from = (const type *)array + index;
    if (columns) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) v[i] = Element<CODE>::load(from + i * WIDTH);
    } else {
        Pack<CODE, ITEMS> pack;
        pack.load(from);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) v[i] = pack.get(i);
    }
}

__device__ __forceinline__ float from_before(float v, int distance, bool down) {
    return down ? __shfl_down_sync(FULL, v, distance) : __shfl_up_sync(FULL, v, distance);
}

// v * (what the lane `distance` before has of `v`); state + factor * (the state of that lane). Unchanged where there is no such lane:
// the shuffle's own predicate says so, and comparisons of lanes would cost as much as the rest.
__device__ __forceinline__ float times_before(float v, int distance, bool down) {
#define TIMES(SHUFFLE, END)                                                                                      \
    asm volatile("{.reg .pred p; .reg .f32 b; shfl.sync." SHUFFLE ".b32 b|p, %0, %1, " END ", -1; @p mul.f32 %0, %0, b;}" \
                 : "+f"(v)                                                                                       \
                 : "r"(distance))
    if (down) TIMES("down", "31");
    else TIMES("up", "0");
    return v;
}
__device__ __forceinline__ float after_before(float state, float factor, int distance, bool down) {
#define AFTER(SHUFFLE, END)                                                                                          \
    asm volatile("{.reg .pred p; .reg .f32 b; shfl.sync." SHUFFLE ".b32 b|p, %0, %1, " END ", -1; @p fma.rn.f32 %0, %2, b, %0;}" \
                 : "+f"(state)                                                                                       \
                 : "r"(distance), "f"(factor))
    if (down) AFTER("down", "31");
    else AFTER("up", "0");
    return state;
}

extern "C" __global__ void __launch_bounds__(THREADS) merged_scan(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    __shared__ __align__(8) int64 arrivals[ARRAYS];
    __shared__ float2 left[2][32];  // what each warp multiplies a state with, and leaves of none; in the order of the scan
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const uint_t arrival = shared_address(arrivals);
    float *const sums = (float *)(shared + SUMS_AT);

    // Lanes hold A and the bias of the directions: loads that every warp would wait for.
    float A = 0.f, bias = 0.f;
    if (lane < GROUPS) {
        A = ((const float *)p.A)[lane];
        if (p.delta_bias) bias = ((const float *)p.delta_bias)[lane] * LOG2E;
    }
    if (thread < ARRAYS) arrival_init(arrival + 8 * thread);
    __syncthreads();
    if (lane == 0) {
#pragma unroll 1
        for (int piece = warp; piece < PIECES; piece += WARPS) fetch(p, piece, shared, arrival);
    }
    __syncwarp();

    const bool idle = thread * ITEMS >= LENGTH;
    const int first = min(thread * ITEMS, LENGTH - ITEMS);
    const int column = first / HEIGHT, line = first % HEIGHT;
    float y[ITEMS], u[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) y[j] = 0.f;
#pragma unroll
    for (int i = 0; i < GROUPS; ++i) {
        const int k = (int)(ORDER >> (4 * i)) & 15;
        const bool columns = i < COLUMNS, down = CODES >> (4 * i) & 2;
        const int at = columns ? line * WIDTH + column + GAP * (line / GAP_LINES) : first + GAP * (first / (GAP_LINES * WIDTH));
        const Array delta = {i, DELTA}, write = {i, B_}, read_out = {i, C_}, input = {OWN_U ? i : 0, U};
        const float A_k = __shfl_sync(FULL, A, k), bias_k = __shfl_sync(FULL, bias, k);
        float a[ITEMS], h[ITEMS], v[ITEMS];
        arrival_wait(arrival + 8 * delta.number(), 0);
        read<DELTA_TYPE>(h, shared + delta.offset(), at, columns);
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            h[j] = fmaf(h[j], LOG2E, bias_k);
#if SOFTPLUS
            h[j] = softplus_base2<DELTA_TYPE>(h[j]);
#endif
            a[j] = exp2_fast(h[j] * A_k);
        }
        float products[6];  // of the decays of 1, 2, 4 ... 32 threads up to this one, or as many as there are in the warp
        products[0] = a[0];
#pragma unroll
        for (int j = 1; j < ITEMS; ++j) products[0] *= a[j];
#pragma unroll
        for (int j = 0; j < 5; ++j) products[j + 1] = times_before(products[j], 1 << j, down);
        if (OWN_U || i == 0) arrival_wait(arrival + 8 * input.number(), 0);
        if (OWN_U || i == 0 || i == COLUMNS) read<U_TYPE>(u, shared + input.offset(), at, columns);
        arrival_wait(arrival + 8 * write.number(), 0);
        read<B_TYPE>(v, shared + write.offset(), at, columns);
        float state = 0.f;
#pragma unroll
        for (int s = 0; s < ITEMS; ++s) {
            const int j = down ? ITEMS - 1 - s : s;
            h[j] *= u[j] * v[j];
            state = s ? fmaf(a[j], state, h[j]) : h[j];
        }
        if (idle) state = 0.f;

        // Over the warp's threads, then over the warps.
        const int lane_order = down ? 31 - lane : lane, warp_order = down ? WARPS - 1 - warp : warp;
#pragma unroll
        for (int j = 0; j < 5; ++j) state = after_before(state, products[j], 1 << j, down);
        if (lane_order == 31) left[i & 1][warp_order] = make_float2(products[5], state);
        __syncthreads();
        float2 entering = lane < warp_order ? left[i & 1][lane] : make_float2(1.f, 0.f);
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const float later = __shfl_down_sync(FULL, entering.x, o), h_later = __shfl_down_sync(FULL, entering.y, o);
            entering.y = fmaf(later, entering.y, h_later);
            entering.x *= later;
        }
        const float before_warp = __shfl_sync(FULL, entering.y, 0);
        state = from_before(state, 1, down);
        const float product = from_before(products[5], 1, down);
        state = lane_order ? fmaf(product, before_warp, state) : before_warp;
#pragma unroll
        for (int s = 0; s < ITEMS; ++s) {
            const int j = down ? ITEMS - 1 - s : s;
            state = fmaf(a[j], state, h[j]);
            h[j] = state;
        }

        if (COLUMNS && i == COLUMNS) {  // the barrier above lies between these sums and the threads that made them
            Pack<0, ITEMS> pack;
            pack.load(sums + first + 4 * (first / (ITEMS * WIDTH)));
#pragma unroll
            for (int j = 0; j < ITEMS; ++j) y[j] = pack.get(j);
        }
        arrival_wait(arrival + 8 * read_out.number(), 0);
        read<C_TYPE>(v, shared + read_out.offset(), at, columns);
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) y[j] = fmaf(v[j], h[j], y[j]);
        if (i == COLUMNS - 1 && !idle) {
            float *const to = sums + line * WIDTH + column + 4 * (line / ITEMS);
#pragma unroll
            for (int j = 0; j < ITEMS; ++j) to[j * WIDTH] = y[j];
        }
    }
#if COLUMNS == GROUPS
    __syncthreads();
    Pack<0, ITEMS> pack;
    pack.load(sums + first + 4 * (first / (ITEMS * WIDTH)));
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) y[j] = pack.get(j);
#endif
    if (idle) return;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) y[j] *= LN2;  // dt was in base 2
    Pack<OUT_TYPE, ITEMS> out;
    out.set(y);
    out.store((Element<OUT_TYPE>::type *)p.out + (int64)blockIdx.x * LENGTH + first);
}
