// One-channel scans with one state over whole maps, merged: what shared_scan.cu computes with MERGE, for maps whose arrays fit
// into shared memory together and that are read along columns, rows or both, each forwards and backwards (an axis).
//
// A block takes one batch item and one axis at a time, a thread ITEMS neighbours of it. The two senses share addresses and u,
// and their chains of dependent instructions hide each other's latency. PRODUCERS more warps ask for all arrays at once, in the
// order of their use. Barriers count the bytes of delta and u, of B, and of C, per axis: one axis is scanned while the other
// arrives.
//
// Columns come first. Their y changes threads in shared memory once, on its way to the rows. In the arrays of columns there is
// a gap of GAP elements every GAP_LINES map lines (in y one of 4 floats every ITEMS lines), which spreads a column over the
// banks. Sums are made in a fixed order: deterministic.
//
// Macros: U_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, OUT_TYPE; HEIGHT, WIDTH; COLUMNS, ROWS: 1 for an axis that is read; ORDER: the
// numbers of the directions, columns before rows, forwards before backwards, four bits each; OWN_U: each direction has its own
// u; ITEMS (4 or 8; divides HEIGHT if COLUMNS); PRODUCERS; SOFTPLUS.
#include "common.cuh"
#include "shared_scan_params.cuh"
#include "bulk.cuh"

#define AXES (COLUMNS + ROWS)
#define LENGTH (HEIGHT * WIDTH)
#define BLOCKS (LENGTH / ITEMS)  // of ITEMS neighbours
#define WARPS ((BLOCKS + 31) / 32)
#define SCANNERS (32 * WARPS)
#define THREADS (SCANNERS + 32 * PRODUCERS)
#define FULL 0xffffffffu
#define GAP_LINES 8
#define GAP 8
#define PARTS ((HEIGHT + GAP_LINES - 1) / GAP_LINES)
#define CAP (LENGTH + GAP * PARTS)  // elements of an array with its gaps
#define EACH (6 + 2 * OWN_U)        // arrays of an axis; where u is shared, it comes before them
#define ARRAYS (EACH * AXES + !OWN_U)
#define CUT_ARRAYS (COLUMNS * (EACH + !OWN_U))  // those of columns (and u) are copied in parts, others whole
#define PIECES (CUT_ARRAYS * PARTS + ARRAYS - CUT_ARRAYS)
#define U_BYTES Element<U_TYPE>::bytes
#define DELTA_BYTES Element<DELTA_TYPE>::bytes
#define B_BYTES Element<B_TYPE>::bytes
#define C_BYTES Element<C_TYPE>::bytes
#define AXIS_BYTES (CAP * 2 * (OWN_U * U_BYTES + DELTA_BYTES + B_BYTES + C_BYTES))
#define SUMS_AT (CAP * !OWN_U * U_BYTES + AXES * AXIS_BYTES)

enum Kind { U, DELTA, B_, C_ };

// Where the array of an axis lies that is read forwards; the one that is read backwards follows it.
__device__ __forceinline__ int offset_of(int axis, int kind) {
    const int in_axis = (kind > U) * (1 + OWN_U) * U_BYTES + (kind > DELTA) * 2 * DELTA_BYTES + (kind > B_) * 2 * B_BYTES;
    return (OWN_U || kind != U ? axis * AXIS_BYTES : 0) + CAP * in_axis;
}

// The barrier that counts the bytes of an axis and kind, u and delta together. `arrivals`: the first of all.
__device__ __forceinline__ uint_t barrier_of(uint_t arrivals, int axis, int kind) {
    return arrivals + 8 * (3 * axis + max(kind - 1, 0));
}

// Starts a copy: number `piece` in the order in which they are needed.
__device__ __forceinline__ void ask(const Params &p, int piece, char *shared, uint_t arrivals) {
    const bool cut = piece < CUT_ARRAYS * PARTS;
    const int number = cut ? piece / PARTS : piece - CUT_ARRAYS * (PARTS - 1), part = cut ? piece % PARTS : 0;
    const int after_u = max(number - !OWN_U, 0), axis = after_u / EACH;
    const int nth = OWN_U ? after_u % EACH : number ? after_u % EACH + 2 : 0, kind = nth / 2, backwards = nth % 2;
    const int64 b = blockIdx.x, k = ORDER >> (8 * axis + 4 * backwards) & 15;
    int64 from;
    int bytes;
    if (kind == U) from = p.u + (b * p.u_b + k * p.u_k) * U_BYTES, bytes = U_BYTES;
    else if (kind == DELTA) from = p.delta + (b * p.delta_b + k * p.delta_k) * DELTA_BYTES, bytes = DELTA_BYTES;
    else if (kind == B_) from = p.B + (b * p.B_b + k * p.B_k) * B_BYTES, bytes = B_BYTES;
    else from = p.C + (b * p.C_b + k * p.C_k) * C_BYTES, bytes = C_BYTES;
    const uint_t barrier = barrier_of(arrivals, axis, kind);
    if (part == 0) arrival_expect(barrier, LENGTH * bytes);
    const int first = part * GAP_LINES * WIDTH, count = cut ? min(GAP_LINES * WIDTH, LENGTH - first) : LENGTH;
    char *const to = shared + offset_of(axis, kind) + (backwards * CAP + first + GAP * part) * bytes;
    bulk_copy(to, from + first * bytes, count * bytes, barrier);
}

// ITEMS elements of an array, below each other (`columns`) or beside each other.
template <int CODE> __device__ __forceinline__ void read(float (&v)[ITEMS], const char *array, int index, bool columns) {
    const typename Element<CODE>::type *const from = (const typename Element<CODE>::type *)array + index;
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

// What the lane `distance` before this one has, in the order of the scan: a lane above it if `backwards`.
__device__ __forceinline__ float from_before(float v, int distance, bool backwards) {
    return backwards ? __shfl_down_sync(FULL, v, distance) : __shfl_up_sync(FULL, v, distance);
}

// v times that, or v + factor times that; unchanged where there is no such lane. The shuffle's own predicate says so: comparing
// lanes would cost as much as the rest.
#define SHUFFLE(UP_OR_DOWN, END, REST)                                                                                       \
    asm volatile("{.reg .pred p; .reg .f32 b; shfl.sync." UP_OR_DOWN ".b32 b|p, %0, %1, " END ", -1; @p " REST "}" : "+f"(v) \
                 : "r"(distance), "f"(factor))
__device__ __forceinline__ float times_before(float v, int distance, bool backwards) {
    const float factor = 0.f;
    if (backwards) SHUFFLE("down", "31", "mul.f32 %0, %0, b;");
    else SHUFFLE("up", "0", "mul.f32 %0, %0, b;");
    return v;
}
__device__ __forceinline__ float after_before(float v, float factor, int distance, bool backwards) {
    if (backwards) SHUFFLE("down", "31", "fma.rn.f32 %0, %2, b, %0;");
    else SHUFFLE("up", "0", "fma.rn.f32 %0, %2, b, %0;");
    return v;
}

__device__ __forceinline__ void scanners_meet() { asm volatile("bar.sync 1, %0;" ::"n"(SCANNERS) : "memory"); }

// y of neighbours along a row: to its place in the output; as it was left by the threads of the columns.
__device__ __forceinline__ void store(const Params &p, float (&y)[ITEMS], int first) {
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) y[j] *= LN2;  // dt was in base 2
    Pack<OUT_TYPE, ITEMS> pack;
    pack.set(y);
    pack.store((Element<OUT_TYPE>::type *)p.out + (int64)blockIdx.x * LENGTH + first);
}

__device__ __forceinline__ void load_sums(float (&y)[ITEMS], const float *sums, int first) {
    Pack<0, ITEMS> pack;
    pack.load(sums + first + 4 * (first / (ITEMS * WIDTH)));
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) y[j] = pack.get(j);
}

// What all warps before this one leave, put together. `left`: of each warp, in the order of the scan, what it multiplies a
// state with and what it leaves of none. The result is in the lane with slot 0.
template <int SLOTS> __device__ __forceinline__ float put_together(const float2 *left, int warps, int slot) {
    float2 v = slot < warps ? left[slot] : make_float2(1.f, 0.f);
#pragma unroll
    for (int o = 1; o < SLOTS; o *= 2) {
        const float later = __shfl_down_sync(FULL, v.x, o), state = __shfl_down_sync(FULL, v.y, o);
        v.y = fmaf(later, v.y, state);
        v.x *= later;
    }
    return v.y;
}

extern "C" __global__ void __launch_bounds__(THREADS) merged_scan(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    __shared__ __align__(8) int64 barriers[3 * AXES];
    __shared__ float2 left[AXES][2][WARPS];  // see put_together
    // The warp is the same in all lanes, and known to be: behind branches that could be divergent, shuffles take a slow path.
    const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(FULL, thread / 32, 0);
    const uint_t arrivals = shared_address(barriers);
    float *const sums = (float *)(shared + SUMS_AT);
#pragma unroll 1
    for (int i = warp; i < 3 * AXES; i += THREADS / 32) {
        const int arrays = i % 3 ? 2 : OWN_U ? 4 : i == 0 ? 3 : 2;
        if (lane == 0) arrival_init(arrivals + 8 * i, arrays);
    }
    __syncthreads();
    if (warp >= WARPS) {
        // The lanes of a warp start their copies one after the other, in a hundred cycles each.
        const int nth = lane * PRODUCERS + warp - WARPS;
#pragma unroll 1
        for (int piece = nth; piece < PIECES; piece += 32 * PRODUCERS) ask(p, piece, shared, arrivals);
        return;
    }
    // Lanes hold A and the bias of the directions.
    float A = 0.f, bias = 0.f;
    if (lane < 2 * AXES) {
        const int k = ORDER >> (4 * lane) & 15;
        A = ((const float *)p.A)[k];
        if (p.delta_bias) bias = ((const float *)p.delta_bias)[k] * LOG2E;
    }

    const bool idle = thread >= BLOCKS;
    const int first = min(thread, BLOCKS - 1) * ITEMS;
#pragma unroll 1
    for (int axis = 0; axis < AXES; ++axis) {
        const bool columns = axis < COLUMNS;
        const int column = first / HEIGHT, line = columns ? first - column * HEIGHT : first / WIDTH;
        const int position = columns ? line * WIDTH + column : first;
        const int gapped = position + GAP * (line / GAP_LINES), at = columns ? gapped : position;
        float a[2][ITEMS], h[2][ITEMS], v[ITEMS];
        float products[2][6];  // of the decays of 1, 2, 4 ... 32 threads up to this one, or as many as there are in the warp

        arrival_wait(barrier_of(arrivals, axis, DELTA), 0);
        if (!OWN_U) read<U_TYPE>(v, shared, COLUMNS ? gapped : at, columns);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const float A_k = __shfl_sync(FULL, A, 2 * axis + s), bias_k = __shfl_sync(FULL, bias, 2 * axis + s);
            if (OWN_U) read<U_TYPE>(v, shared + offset_of(axis, U) + s * CAP * U_BYTES, at, columns);
            read<DELTA_TYPE>(h[s], shared + offset_of(axis, DELTA) + s * CAP * DELTA_BYTES, at, columns);
#pragma unroll
            for (int j = 0; j < ITEMS; ++j) {
                float dt = fmaf(h[s][j], LOG2E, bias_k);
#if SOFTPLUS
                dt = softplus_base2<DELTA_TYPE>(dt);
#endif
                a[s][j] = exp2_fast(dt * A_k);
                h[s][j] = dt * v[j];
            }
            products[s][0] = a[s][0];
#pragma unroll
            for (int j = 1; j < ITEMS; ++j) products[s][0] *= a[s][j];
        }
#pragma unroll
        for (int j = 0; j < 5; ++j)
#pragma unroll
            for (int s = 0; s < 2; ++s) products[s][j + 1] = times_before(products[s][j], 1 << j, s);

        arrival_wait(barrier_of(arrivals, axis, B_), 0);
        float state[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            read<B_TYPE>(v, shared + offset_of(axis, B_) + s * CAP * B_BYTES, at, columns);
#pragma unroll
            for (int n = 0; n < ITEMS; ++n) {
                const int j = s ? ITEMS - 1 - n : n;
                h[s][j] *= v[j];
                state[s] = n ? fmaf(a[s][j], state[s], h[s][j]) : h[s][j];
            }
        }
        if (idle) state[1] = 0.f;  // backwards, threads past the end come first
#pragma unroll
        for (int j = 0; j < 5; ++j)
#pragma unroll
            for (int s = 0; s < 2; ++s) state[s] = after_before(state[s], products[s][j], 1 << j, s);
        if (lane == 31) left[axis][0][warp] = make_float2(products[0][5], state[0]);
        if (lane == 0) left[axis][1][WARPS - 1 - warp] = make_float2(products[1][5], state[1]);
        scanners_meet();

        // The states that enter this warp, and then those that enter this thread.
        float entering[2];
        if (WARPS <= 16) {  // both senses at once, in half of the lanes each
            const int s = lane / 16;
            const float both = put_together<16>(left[axis][s], s ? WARPS - 1 - warp : warp, lane % 16);
            entering[0] = __shfl_sync(FULL, both, 0);
            entering[1] = __shfl_sync(FULL, both, 16);
        } else {
            entering[0] = __shfl_sync(FULL, put_together<32>(left[axis][0], warp, lane), 0);
            entering[1] = __shfl_sync(FULL, put_together<32>(left[axis][1], WARPS - 1 - warp, lane), 0);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const float before = from_before(state[s], 1, s), factor = from_before(products[s][5], 1, s);
            state[s] = lane != 31 * s ? fmaf(factor, entering[s], before) : entering[s];
#pragma unroll
            for (int n = 0; n < ITEMS; ++n) {
                const int j = s ? ITEMS - 1 - n : n;
                h[s][j] = state[s] = fmaf(a[s][j], state[s], h[s][j]);
            }
        }

        float y[ITEMS];
        if (COLUMNS && !columns) {  // between these sums and the threads that made them lies the barrier above
            load_sums(y, sums, first);
        } else {
#pragma unroll
            for (int j = 0; j < ITEMS; ++j) y[j] = 0.f;
        }
        arrival_wait(barrier_of(arrivals, axis, C_), 0);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            read<C_TYPE>(v, shared + offset_of(axis, C_) + s * CAP * C_BYTES, at, columns);
#pragma unroll
            for (int j = 0; j < ITEMS; ++j) y[j] = fmaf(v[j], h[s][j], y[j]);
        }
        if (!idle && columns) {
            float *const to = sums + position + 4 * (line / ITEMS);
#pragma unroll
            for (int j = 0; j < ITEMS; ++j) to[j * WIDTH] = y[j];
        } else if (!idle) {
            store(p, y, first);
        }
    }
#if !ROWS
    scanners_meet();
    float y[ITEMS];
    load_sums(y, sums, first);
    if (!idle) store(p, y, first);
#endif
}
