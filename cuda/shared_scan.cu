// One-channel and rank-r scans: R channels share one step dt and one decay, in K directions over an H x W map.
//
//     dt = softplus?(delta + delta_bias);  h_t = exp(dt A) h_{t-1} + dt B u_r;  y_r = <C, h>
//
// or, with LINEAR, after discretisation: h_t = a_t h_{t-1} + b_{t,r}. Every array lies in spatial order and every direction walks
// over it in its own order (see vmeanba_fx/ops/directions.py, or an index table); y goes back to spatial order.
//
// There are few scans (batch x K), so a whole block works on one batch item. A team of TEAM_THREADS threads takes one direction
// at a time, each thread ITEMS consecutive steps of a tile. All of a tile's inputs go through shared memory: they are fetched in
// spatial order, coalesced and STAGES steps ahead (one step: one direction, tile and PAIR states); threads read them in scan
// order. Every SKEW_LINES map lines there is a gap of SKEW elements, which spreads a column over the banks. See shared_scan_copies.cuh.
// One barrier per step: before it a thread has scanned its own ITEMS from a zero state, after it the state that enters is known.
// Then the thread scans them again (RESCAN), or adds the state's share, C_t * (a_1 ... a_t) * h_in, which takes fewer registers.
//
// With MERGE y is summed over directions in shared memory, each team in its own buffer, and teams are added in a fixed order:
// deterministic. Without it a block works on one direction (and NSTATE of the states) and writes each tile as it comes.
//
// Index arithmetic would cost more than the scan itself: with BAKED the sizes are constants (HEIGHT, WIDTH, GROUPS, ROWS_TILE,
// COLUMNS_TILE, SKEW, SUM_CAP, DIRECTIONS), otherwise they are read from Params.
//
// Macros: BAKED; U_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, OUT_TYPE (LINEAR: DELTA_TYPE is a, B_TYPE is b, U_TYPE unused); LINEAR;
// NSTATE states per block; RANK channels per block; TEAM_THREADS, TEAMS, ITEMS (8 or 16); STAGES, 1 only with BULK; PAIR states per
// step; RESCAN; CAP: elements of a tile with its skew; COPY: bytes per cp.async, 0 for any strides; BULK: bulk copies; LOOPS: a team
// has more steps than stages (with BULK it then has a warp more, which fetches); SOFTPLUS; MERGE; TABLE: order given as an index table.
#include "common.cuh"
#include "shared_scan_params.cuh"
#include "shared_scan_sizes.cuh"
#if BULK
#include "bulk.cuh"
#endif
#include "shared_scan_parts.cuh"
#include "shared_scan_copies.cuh"
#include "shared_scan_ends.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) shared_scan(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    __shared__ float aggregate[TEAMS][2][PAIR][RANK + !SUMS][TEAM_WARPS];
#if SUMS
    __shared__ float totals[TEAMS][2][TEAM_WARPS];
#endif
#if BULK
    __shared__ __align__(8) int64 arrivals[TEAMS][STAGES];
#endif
    __shared__ float carry[TEAMS][2][NSTATE][RANK];
    const int after = (int)threadIdx.x - TEAMS * TEAM_THREADS;  // not negative: a producer
    const int team = PRODUCER && after >= 0 ? after / 32 : threadIdx.x / TEAM_THREADS;
    const int thread = PRODUCER && after >= 0 ? TEAM_THREADS + after % 32 : threadIdx.x % TEAM_THREADS;
    const int lane = thread % 32, warp = thread / 32;
    const int b = blockIdx.x, r0 = blockIdx.y * RANK, rank = min(RANK, (int)p.rank - r0);
    const int length = LENGTH_OF, width = WIDTH_OF, skew = SKEW_OF;
#if MERGE
    const int n0 = 0, k_first = team, k_step = TEAMS, k_end = GROUPS_OF;
#else
    const int n0 = (blockIdx.z % (int)p.parts) * NSTATE, k_first = blockIdx.z / (int)p.parts;
    const int k_step = GROUPS_OF, k_end = k_first + 1;
#endif
    const int k_base = MERGE ? 0 : k_first, sum_cap = SIZE(SUM_CAP, sum_cap);
    char *stages = shared + team * TEAM_BYTES, *fronts = stages + STAGES * STAGE_BYTES;
    float *const all_sums = (float *)(shared + TEAMS * TEAM_BYTES), *const sums = all_sums + team * RANK * sum_cap;
    float *const decays = all_sums + TEAMS * RANK * sum_cap;

    Cursor now = {k_first, 0, 0, 0, 0};
    Cursor ahead = now;

    uint_t arrival = 0;  // of the team's first stage; those of its other stages follow, 8 bytes apart
#if BULK
    arrival = shared_address(arrivals[team]);
    if (thread < STAGES) arrival_init(arrival + 8 * thread, 1);
    __syncthreads();
#endif

    // The next step. With BULK, before the loop each piece is fetched by another warp; in the loop (`all`), by the producer.
    auto issue = [&](bool all) {
        if (ahead.k < k_end) {
            const Tile tile = tile_at(p, ahead.code(p), ahead.tile);
            const int64 k = ahead.k;
            char *to = stages + ahead.step % STAGES * STAGE_BYTES;
            const uint_t barrier = arrival + 8 * (ahead.step % STAGES);
            Share share = {lane, 32, 0};
            if (!all) share = {lane ? TEAM_WARPS : warp, TEAM_WARPS, 0};
#if BULK
            if (share.first == 0) arrival_expect(barrier, tile.count * ((STAGE_BYTES + (ahead.n == 0 ? FRONT_BYTES : 0)) / CAP));
#endif
#pragma unroll
            for (int m = 0; m < PAIR; ++m) {
                const int64 n = n0 + ahead.n + m;
#if LINEAR
                fetch<DELTA_TYPE>(to, p.delta + (b * p.delta_b + k * p.delta_k + n * p.delta_n) * Element<DELTA_TYPE>::bytes,
                                  p.delta_h, p.delta_w, tile, p, thread, share, barrier);
                to += CAP * Element<DELTA_TYPE>::bytes;
#pragma unroll
                for (int r = 0; r < RANK; ++r) {
                    const int64 from = b * p.B_b + k * p.B_k + min(r0 + r, (int)p.rank - 1) * p.B_r + n * p.B_n;
                    fetch<B_TYPE>(to, p.B + from * Element<B_TYPE>::bytes, p.B_h, p.B_w, tile, p, thread, share, barrier);
                    to += CAP * Element<B_TYPE>::bytes;
                }
#else
                const int64 from = b * p.B_b + k * p.B_k + n * p.B_n;
                fetch<B_TYPE>(to, p.B + from * Element<B_TYPE>::bytes, p.B_h, p.B_w, tile, p, thread, share, barrier);
                to += CAP * Element<B_TYPE>::bytes;
#endif
                fetch<C_TYPE>(to, p.C + (b * p.C_b + k * p.C_k + n * p.C_n) * Element<C_TYPE>::bytes, p.C_h, p.C_w, tile, p,
                              thread, share, barrier);
                to += CAP * Element<C_TYPE>::bytes;
            }
#if !LINEAR
            if (ahead.n == 0) {
                to = fronts + ahead.front % FRONT_SLOTS * FRONT_BYTES;
                fetch<DELTA_TYPE>(to, p.delta + (b * p.delta_b + k * p.delta_k) * Element<DELTA_TYPE>::bytes, p.delta_h,
                                  p.delta_w, tile, p, thread, share, barrier);
                to += CAP * Element<DELTA_TYPE>::bytes;
#pragma unroll
                for (int r = 0; r < RANK; ++r) {
                    const int64 from = b * p.u_b + k * p.u_k + min(r0 + r, (int)p.rank - 1) * p.u_r;
                    fetch<U_TYPE>(to, p.u + from * Element<U_TYPE>::bytes, p.u_h, p.u_w, tile, p, thread, share, barrier);
                    to += CAP * Element<U_TYPE>::bytes;
                }
            }
#endif
            ahead.advance(p, k_step);
        }
        if (!BULK) commit();
    };

#pragma unroll
    for (int s = 0; s < STAGES; ++s) issue(false);
#if !LINEAR
    // A and the bias in base 2, per direction of this block: loads that every step would wait for. By the last threads: the first
    // are busy fetching, and behind what they fetch these loads would come late.
#pragma unroll 1
    for (int i = THREADS - 1 - (int)threadIdx.x; i < (MERGE ? GROUPS_OF : 1) * (NSTATE + 1); i += THREADS) {
        const int k = k_base + i / (NSTATE + 1), n = i % (NSTATE + 1);
        if (n < NSTATE) decays[i] = ((const float *)p.A)[k * p.states + n0 + n];
        else decays[i] = p.delta_bias ? ((const float *)p.delta_bias)[k] * LOG2E : 0.f;
    }
#endif
    if (!BULK) wait<STAGES - 1>();
    __syncthreads();

#if PRODUCER
    if (after >= 0) {
#pragma unroll 1
        for (; now.k < k_end; now.advance(p, k_step)) {
            team_barrier(team);
            issue(true);
            if (!MERGE && now.n == NSTATE - PAIR) team_barrier(team);
        }
    }
#endif
    Steps steps;
    int count = 0;
    float y[RANK][ITEMS];
#if !LINEAR
    float dt[ITEMS], dtu[RANK][ITEMS];  // dt in base 2: times log2(e)
#endif
    Entry entry;
#pragma unroll 1
    while (now.k < k_end) {
#if BULK
        arrival_wait(arrival + 8 * (now.step % STAGES), now.step / STAGES & 1);
#endif
        if (now.n == 0) {
            const Tile tile = tile_at(p, now.code(p), now.tile);
            count = tile.count;
            find_steps(steps, p, tile, now.code(p), now.k, thread);
#pragma unroll
            for (int r = 0; r < RANK; ++r)
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) y[r][i] = 0.f;
#if !LINEAR
            const char *front = fronts + now.front % FRONT_SLOTS * FRONT_BYTES;
            const float bias = decays[(now.k - k_base) * (NSTATE + 1) + NSTATE];
            steps.read<DELTA_TYPE>(dt, front, 0);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                dt[i] = fmaf(dt[i], LOG2E, bias);
#if SOFTPLUS
                dt[i] = softplus_base2<DELTA_TYPE>(dt[i]);
#endif
                // A step past the end of a tile is the identity: dt = 0 gives decay 1 and input 0. (Past the end of the map it
                // may be anything.)
                if (!ONE_TILE) dt[i] = steps.has(i, thread, count) ? dt[i] : 0.f;
            }
#pragma unroll
            for (int r = 0; r < RANK; ++r) {
                steps.read<U_TYPE>(dtu[r], front, CAP * (Element<DELTA_TYPE>::bytes + r * Element<U_TYPE>::bytes));
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) dtu[r][i] *= dt[i];
            }
#endif
#if SUMS
            entry.spans_of(dt, lane);
            if (lane == 31) totals[team][now.front & 1][warp] = entry.spans[5];
#endif
        }

        const char *stage = stages + now.step % STAGES * STAGE_BYTES;
        float reach[PAIR][ITEMS], h[PAIR][RANK], product[PAIR], decay[PAIR];
#if RESCAN
        float a[ITEMS], in[RANK][ITEMS];
#endif
#pragma unroll
        for (int m = 0; m < PAIR; ++m) {
#if !RESCAN
            float a[ITEMS], in[RANK][ITEMS];
#endif
            const char *from = stage + m * STATE_BYTES;
#if LINEAR
            steps.read<DELTA_TYPE>(a, from, 0);
            steps.read<C_TYPE>(reach[m], from, CAP * (Element<DELTA_TYPE>::bytes + RANK * Element<B_TYPE>::bytes));
#pragma unroll
            for (int r = 0; r < RANK; ++r)
                steps.read<B_TYPE>(in[r], from, CAP * (Element<DELTA_TYPE>::bytes + r * Element<B_TYPE>::bytes));
            if (!ONE_TILE) {
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    const bool has = steps.has(i, thread, count);
                    a[i] = has ? a[i] : 1.f;
#pragma unroll
                    for (int r = 0; r < RANK; ++r) in[r][i] = has ? in[r][i] : 0.f;
                }
            }
#else
            decay[m] = decays[(now.k - k_base) * (NSTATE + 1) + now.n + m];
            float b_row[ITEMS];
            steps.read<B_TYPE>(b_row, from, 0);
            steps.read<C_TYPE>(reach[m], from, CAP * Element<B_TYPE>::bytes);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                a[i] = exp2_fast(dt[i] * decay[m]);
#pragma unroll
                for (int r = 0; r < RANK; ++r) in[r][i] = dtu[r][i] * b_row[i];
            }
#endif
            if (steps.down) scan_own<true>(y, h[m], product[m], reach[m], a, in);
            else scan_own<false>(y, h[m], product[m], reach[m], a, in);
        }

#pragma unroll
        for (int j = 0; j < 5; ++j) {
            const int o = 1 << j;
#pragma unroll
            for (int m = 0; m < PAIR; ++m) {
#if SUMS
                const float factor = exp2_fast(entry.spans[j] * decay[m]);
#else
                const float factor = product[m], before = __shfl_up_sync(FULL, factor, o);
                if (lane >= o) product[m] *= before;
#endif
#pragma unroll
                for (int r = 0; r < RANK; ++r) {
                    const float h_before = __shfl_up_sync(FULL, h[m][r], o);
                    if (lane >= o) h[m][r] = fmaf(factor, h_before, h[m][r]);
                }
            }
        }
        float(*const shares)[RANK + !SUMS][TEAM_WARPS] = aggregate[team][now.step & 1];
        if (lane == 31) {
#pragma unroll
            for (int m = 0; m < PAIR; ++m) {
                if (!SUMS) shares[m][RANK - SUMS][warp] = product[m];
#pragma unroll
                for (int r = 0; r < RANK; ++r) shares[m][r][warp] = h[m][r];
            }
        }
        if (!BULK) wait<STAGES < 2 ? 0 : STAGES - 2>();
        team_barrier(team);  // aggregates are there, this stage has been read, and without BULK the next one has arrived
        if (!BULK) issue(true);

        // The state before this thread: what other warps and the last tile's carry leave, then what lower lanes leave.
        const bool more = !ONE_TILE && now.tile + 1 < now.tiles(p);
#if SUMS
        if (now.n == 0) entry.gaps(totals[team][now.front & 1], lane, warp);
#endif
#pragma unroll
        for (int m = 0; m < PAIR; ++m) {
            entry.factors(decay[m], product[m], shares[m][RANK - SUMS], lane, warp);
#pragma unroll
            for (int r = 0; r < RANK; ++r) {
                float *const carries = carry[team][0][now.n + m] + r;
                const int next = NSTATE * RANK;  // carries of odd tiles follow those of even ones
                float state = entry.before_warp(shares[m][r], lane, warp);
                if (!ONE_TILE && now.tile) state = fmaf(entry.whole, carries[(now.tile & 1) * next], state);
                if (more && warp == TEAM_WARPS - 1 && lane == 31)
                    carries[(now.tile + 1 & 1) * next] = fmaf(entry.through, state, h[m][r]);
                float own_h = __shfl_up_sync(FULL, h[m][r], 1);
                if (lane == 0) own_h = 0.f;
                state = fmaf(entry.entering, state, own_h);
#if RESCAN
                if (steps.down) scan_again<true>(y[r], state, reach[m], a, in[r]);
                else scan_again<false>(y[r], state, reach[m], a, in[r]);
#else
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) y[r][i] = fmaf(reach[m][i], state, y[r][i]);
#endif
            }
        }

        if (now.n == NSTATE - PAIR) {
            const Tile tile = tile_at(p, now.code(p), now.tile);
            place(sums, sum_cap, y, steps, tile, p, thread, now.k != k_first);
#if !MERGE
            team_barrier(team);
            typedef Element<OUT_TYPE>::type out_type;
            for (int r = 0; r < rank; ++r) {
                out_type *out = (out_type *)p.out + (((int64)b * gridDim.z + blockIdx.z) * p.rank + r0 + r) * length;
                for (int q = thread; q < tile.count; q += TEAM_THREADS)
                    Element<OUT_TYPE>::store(out + tile.position(q, width), sums[r * sum_cap + tile.index(q, SUM_SKEW)] * OUT_SCALE);
            }
#endif
        }
        // Before another thread adds to these sums lies the barrier of the next step.
        now.advance(p, k_step);
    }
#if MERGE
    __syncthreads();
    typedef Element<OUT_TYPE>::type out_type;
    const int teams = min(TEAMS, GROUPS_OF);
    for (int r = 0; r < rank; ++r) {
        out_type *out = (out_type *)p.out + ((int64)b * p.rank + r0 + r) * length;
        auto at = [&](int team, int q) {
            return all_sums + (team * RANK + r) * sum_cap + q + SUM_SKEW * (int)((uint_t)q / (SKEW_LINES * (uint_t)width));
        };
        const int whole = LENGTH_OF % 4 ? 0 : length;  // four at a time, which lie in the same 8 lines
        for (int q = 4 * threadIdx.x; q < whole; q += 4 * THREADS) {
            float v[4] = {};
            for (int other = 0; other < teams; ++other) {
                Pack<0, 4> pack;
                pack.load(at(other, q));
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] += pack.get(i);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] *= OUT_SCALE;
            Pack<OUT_TYPE, 4> pack;
            pack.set(v);
            pack.store(out + q);
        }
        for (int q = whole + threadIdx.x; q < length; q += THREADS) {
            float total = 0.f;
            for (int other = 0; other < teams; ++other) total += *at(other, q);
            Element<OUT_TYPE>::store(out + q, total * OUT_SCALE);
        }
    }
#endif
}
