// The core of an SS2D block in one launch: out = sum over directions k of unscan_k(scan_k(x)) + D*x.
//
//     dt = softplus?(weight_k r + bias);  h_t = exp(dt A) h_{t-1} + dt B x;  y_t = <C, h_t>
//
// x, out (B, D, H, W); feats (B, K, R + 2N, H, W): r, B, C of every position and direction; weight (K, D, R); A (K*D, N).
//
// A team owns 8 channels of one batch item for all K directions. It copies their x to shared memory and adds up y there in
// float, so that the K orders of reading and the merge cost no device memory traffic. A warp works on tiles of 8 * SEG steps:
// lane = 4 * segment + pair holds SEG consecutive steps of 2 channels. That is the layout of the result of mma.m16n8k16 (rows:
// steps, columns: channels), which forms weight_k r, and one more mma with a one-hot matrix gives every lane the B and C of
// its own steps as floats. Inside a lane the scan is sequential, across the 8 segments it takes three shuffles. Warp w of
// WARPS takes tiles w, w + WARPS, ..., and the state is handed on from tile to tile through shared memory: a warp waits only
// for the state that its predecessor publishes, so the warps drift apart, and the memory phases of some overlap the
// arithmetic of others. Between directions a warp waits for the others just before it first adds to y.
//
// FRONTS = 2: a team has twice WARPS warps, and the second half walks the reverse of the first half's direction meanwhile.
// They meet in the middle and wait for each other there; from then on each adds to the tiles that the other has left behind. That
// halves the number of turns.
//
// Steps are in base 2: dt / ln 2 = log2(1 + 2^(z log2 e)), which saves multiplications; y is scaled by ln 2 at the end.
//
// Macros, all integers:
//   X_TYPE, F_TYPE, W_TYPE, A_TYPE, D_TYPE, BIAS_TYPE, OUT_TYPE   0 float, 1 half, 2 bfloat16
//   RANK, NSTATE, SOFTPLUS
//   SEG, WARPS, FRONTS, TEAMS (in a block), MIN_BLOCKS
//   RING          slots for states under way: a power of 2, at least WARPS + 2
//   LINKS_BYTES   what the host takes the size of struct Links to be
//   HEIGHT        0: sizes and strides are in the arguments; else it and WIDTH, PITCH, PLANE, X_OFFSETS, Y_OFFSETS, F_STRIDE
//                 (of positions in feats), X_STRIDE (of channels in x) are known at compile time
//   WHOLE         SEG divides H and W, so that no segment turns a corner
//   SPECIAL       with WHOLE: the four directions of walking are compiled apart
//   STEADY        with WHOLE: tiles, and rounds of WARPS tiles, are whole lines
//   ORDER         positions come from a table
//   FULL          8 channels for every team
//   X_LAYOUT      0 any strides; with FULL: 1 unit stride along W, even sizes, aligned to 2 elements; 2 channels last, aligned to 8
//   OUT_LAYOUT    0 rows; 1 rows of even length; 2 channels last
//   MMA           tensor cores: half or bfloat16 features with unit stride along channels, R even
//   FETCH         4-byte words in a feature load
//   BC_APART      B and C are loaded by every lane, not picked by mma: for ranks that fill the lanes' loads without them
//   SPLIT         weights as sums of two F_TYPE values
//   SPILL         the team's x and y are in device memory (`work`), for maps too large for shared memory
#include "common.cuh"
#include "ss2d_parts.cuh"
#include "ss2d_maps.cuh"

// One direction; KIND = column + 2 * mirrored at compile time, or -1.
template <int KIND> __device__ __forceinline__ void scan_direction(const Params &p, const Site &site, int height, int width, int pitch) {
    const int pair = site.lane & 3, segment = site.lane >> 2, k = site.k, channels = (int)p.channels;
    const int64 f_p = HEIGHT ? F_STRIDE : p.f_p;
    const f_type *feats = (const f_type *)p.feats + site.batch * p.f_b + k * p.f_k;
#if !ORDER
    const int code = (int)(p.codes >> (4 * k)) & 7;
    const bool column = KIND >= 0 ? KIND & 1 : code & 1, mirrored = KIND >= 0 ? KIND & 2 : ((code >> 2) ^ (code >> 1)) & 1;
    const Walk walk(column, code & 2, mirrored, height, width, pitch);
#endif
    const int length = site.stage.length;
    const x_couple *const x_of_lane = site.stage.x_of(pair);
    float2 *const y_of_lane = site.stage.y_of(pair);
    auto steps_of = [&](int tile) {
        const int start = (tile * 8 + segment) * SEG;
#if ORDER
        Steps steps;
#pragma unroll
        for (int i = 0; i < SEG; ++i) {
            const int position = ((const int *)p.order)[(int64)k * length + min(start + i, length - 1)];
            steps.at_[i] = steps.place_[i] = min(max(position, 0), length - 1);
        }
        return steps;
#else
        return walk.steps(start, length, height, width);
#endif
    };
#if MMA
    uint_t words[2 * PAIRS_OF_STEPS][LANE_WORDS];
    auto fetch = [&](const Steps &steps) {
        const f_type *record = feats + steps.first() * f_p;
#pragma unroll
        for (int i = 0; i < 2 * PAIRS_OF_STEPS; ++i) {
            if (i < SEG) fetch_words(words[i], record + steps.from_first(i) * f_p, pair);
            else
#pragma unroll
                for (int j = 0; j < LANE_WORDS; ++j) words[i][j] = 0u;
        }
    };
#endif

    Steps next = steps_of(site.warp);
#if MMA && SMALL
    fetch(next);
#endif

    // Channels past the end compute on the last one's parameters and on x = 0, and are not written.
    const int row0 = k * channels + min(site.first_channel + 2 * pair, channels - 1);
    const int row1 = k * channels + min(site.first_channel + 2 * pair + 1, channels - 1);
    float bias[4] = {0.f, 0.f, 0.f, 0.f};
    if (p.bias) {
        const Element<BIAS_TYPE>::type *source = (const Element<BIAS_TYPE>::type *)p.bias;
        bias[0] = bias[2] = Element<BIAS_TYPE>::load(source + row0) * (SCALED ? LOG2E : 1.f);
        bias[1] = bias[3] = Element<BIAS_TYPE>::load(source + row1) * (SCALED ? LOG2E : 1.f);
    }
    const Element<A_TYPE>::type *A0 = (const Element<A_TYPE>::type *)p.A + row0 * NSTATE, *A1 = A0 + (row1 - row0) * NSTATE;
    float A[2] = {Element<A_TYPE>::load(A0), Element<A_TYPE>::load(A1)};
    const w_type *weight = (const w_type *)p.weight;

#if MMA
    // Column `segment` of the right-hand operand: the weights of channel first_channel + segment.
    const int column_channel = site.first_channel + segment;
    const w_type *weight_row = column_channel < channels ? weight + (k * channels + column_channel) * RANK : nullptr;
    uint_t high[2 * KSTEPS], low[2 * KSTEPS], one_hot[2] = {0u, 0u};
#pragma unroll
    for (int j = 0; j < 2 * KSTEPS; ++j) {
        high[j] = j < LANE_WORDS ? weight_word(weight_row, word_of(j, pair), false) : 0u;
        low[j] = SCALED && j < LANE_WORDS ? weight_word(weight_row, word_of(j, pair), true) : 0u;
    }
    // B is the low half of feature word RANK/2, C the high half: even columns pick B, odd ones C.
    constexpr int BC = (RANK / 2) / (4 * FETCH) * FETCH + (RANK / 2) % FETCH;
    if (BC_BY_MMA && word_of(BC, pair) == RANK / 2)
        one_hot[BC & 1] = (uint_t)Element<F_TYPE>::narrow(1.f) << (segment & 1 ? 16 : 0);
#else
    const w_type *w0 = weight + row0 * RANK, *w1 = weight + row1 * RANK;
#endif

    const uint_t chain = shared_address(site.links->state[site.front][0][0] + 2 * pair);  // slots of this pair's channels
#if WARPS == 1 && NSTATE == 1
    float carry[2] = {0.f, 0.f};
#endif
    Arrivals *const passed = &site.links->passed;
    const int own_tiles = FRONTS == 2 ? (site.tiles + 1 - site.front) / 2 : site.tiles;  // to which this front is the first to add
    bool past_own = FRONTS == 1;
    for (int tile = site.warp; tile < site.tiles; tile += WARPS) {
        const int start = (tile * 8 + segment) * SEG;
        const Steps steps = next;
        const f_type *record = feats + steps.first() * f_p;

        // ---- z; with one state also its B and C
        float dt[SEG][2], dx[SEG][2], b_of[SEG], c_of[SEG];
#if MMA
#if !SMALL
        fetch(steps);
#endif
#if BC_APART
        uint_t bc_words[SEG];
#pragma unroll
        for (int i = 0; i < SEG; ++i) bc_words[i] = __ldg((const uint_t *)(record + steps.from_first(i) * f_p) + RANK / 2);
#endif
#pragma unroll
        for (int i = 0; i < PAIRS_OF_STEPS; ++i) {
            const uint_t *even = words[2 * i], *odd = words[2 * i + 1];
            float z[4], bc[4] = {0.f, 0.f, 0.f, 0.f};
#if SMALL
            mma8(z, even[0], odd[0], high[0], bias);
            mma8(z, even[0], odd[0], low[0], z);
            if (BC_BY_MMA) mma8(bc, even[0], odd[0], one_hot[0], bc);
#else
#pragma unroll
            for (int s = 0; s < KSTEPS; ++s) {
                constexpr int LAST = LANE_WORDS - 1;
                const bool whole = 2 * s < LAST;  // else the second half of this k-step is zeros
                const int more = whole ? 2 * s + 1 : 0;
                const uint_t a[4] = {even[2 * s], odd[2 * s], whole ? even[more] : 0u, whole ? odd[more] : 0u};
                mma16(z, a, high[2 * s], high[2 * s + 1], s == 0 ? bias : z);
                if (SPLIT) mma16(z, a, low[2 * s], low[2 * s + 1], z);
                if (BC_BY_MMA && s == BC / 2) mma16(bc, a, one_hot[0], one_hot[1], bc);
            }
#endif
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (2 * i + half < SEG) {
                    dt[2 * i + half][0] = z[2 * half];
                    dt[2 * i + half][1] = z[2 * half + 1];
                    b_of[2 * i + half] = bc[2 * half];
                    c_of[2 * i + half] = bc[2 * half + 1];
                }
        }
#else
#pragma unroll
        for (int i = 0; i < SEG; ++i) {
            dt[i][0] = bias[0];
            dt[i][1] = bias[1];
        }
#pragma unroll 4
        for (int r = 0; r < RANK; ++r) {
            const float v0 = Element<W_TYPE>::load(w0 + r), v1 = Element<W_TYPE>::load(w1 + r);
#pragma unroll
            for (int i = 0; i < SEG; ++i) {
                const float f = Element<F_TYPE>::load(record + steps.from_first(i) * f_p + r * p.f_r);
                dt[i][0] = fmaf(v0, f, dt[i][0]);
                dt[i][1] = fmaf(v1, f, dt[i][1]);
            }
        }
        if (NSTATE == 1) {
#pragma unroll
            for (int i = 0; i < SEG; ++i) {
                b_of[i] = Element<F_TYPE>::load(record + steps.from_first(i) * f_p + RANK * p.f_r);
                c_of[i] = Element<F_TYPE>::load(record + steps.from_first(i) * f_p + (RANK + 1) * p.f_r);
            }
        }
#endif

#if MMA && BC_APART
#pragma unroll
        for (int i = 0; i < SEG; ++i) {
            const float2 bc = Couple<F_TYPE>::widen(bc_words[i]);
            b_of[i] = bc.x;
            c_of[i] = bc.y;
        }
#endif
        if (tile + WARPS < site.tiles) {
#if !ORDER && WHOLE
            if (STEADY) {
                next.at_ += walk.lines_in(WARPS) * walk.line_p;
                next.place_ += walk.lines_in(WARPS) * walk.line_q;
            } else
#endif
                next = steps_of(tile + WARPS);
#if MMA && SMALL
            fetch(next);  // one word a step: the registers of the words just used, filled a tile ahead
#endif
        }

        // ---- dt (in base 2) and dt x
#pragma unroll
        for (int i = 0; i < SEG; ++i) {
            const float2 x = XCouple::widen(x_of_lane[steps.place(i)]);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float z = SCALED ? dt[i][c] : dt[i][c] * LOG2E;
                dt[i][c] = SOFTPLUS ? softplus_log2(z) : z;
                dx[i][c] = dt[i][c] * (c ? x.y : x.x);
            }
        }

        // ---- the scan of every state
        float a[SEG][2], b[SEG][2], h[2];
#if NSTATE > 1
        float y[SEG][2];
#endif
#pragma unroll 1
        for (int n = 0; n < NSTATE; ++n) {
            float decay[2] = {1.f, 1.f}, state[2] = {0.f, 0.f};
            if (NSTATE > 1) {
                A[0] = Element<A_TYPE>::load(A0 + n);
                A[1] = Element<A_TYPE>::load(A1 + n);
            }
#pragma unroll
            for (int i = 0; i < SEG; ++i) {
                if (NSTATE > 1) {
                    const f_type *b_and_c = record + steps.from_first(i) * f_p + (RANK + n) * p.f_r;
                    b_of[i] = Element<F_TYPE>::load(b_and_c);
                    c_of[i] = Element<F_TYPE>::load(b_and_c + NSTATE * p.f_r);
                }
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    a[i][c] = exp2_fast(dt[i][c] * A[c]);
                    b[i][c] = dx[i][c] * b_of[i];
                    decay[c] *= a[i][c];
                    state[c] = fmaf(a[i][c], state[c], b[i][c]);
                }
            }
            float before_decay[2], before[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                take_in_left<4>(decay[c], state[c]);
                take_in_left<8>(decay[c], state[c]);
                take_in_left<16>(decay[c], state[c]);
                before_decay[c] = decay[c];
                before[c] = state[c];
                shift_right(before_decay[c], before[c]);
            }
#if WARPS > 1 || NSTATE > 1
            const uint_t tag = (uint_t)(site.turn * site.tiles + tile);  // of the state before this tile
            h[0] = h[1] = 0.f;
            if (tile > 0) await_states(chain + (n * RING + (tag & (RING - 1))) * 64, tag, h[0], h[1]);
            const float exit0 = fmaf(decay[0], h[0], state[0]), exit1 = fmaf(decay[1], h[1], state[1]);
            if (segment == 7 && tile + 1 < site.tiles)
                publish(chain + (n * RING + ((tag + 1) & (RING - 1))) * 64, exit0, exit1, tag + 1);
#pragma unroll
            for (int c = 0; c < 2; ++c) h[c] = fmaf(before_decay[c], h[c], before[c]);
#else
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                h[c] = fmaf(before_decay[c], carry[c], before[c]);
                carry[c] = __shfl_sync(0xffffffffu, fmaf(decay[c], carry[c], state[c]), 28 + pair);
            }
#endif
#if NSTATE > 1
#pragma unroll
            for (int i = 0; i < SEG; ++i)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    h[c] = fmaf(a[i][c], h[c], b[i][c]);
                    y[i][c] = fmaf(c_of[i], h[c], n == 0 ? 0.f : y[i][c]);
                }
#endif
        }

        // ---- add to y
        if (MEMBERS > 32 && tile == site.warp && site.turn > 0) await(passed, FRONTS * site.turn - 1);
        if (!past_own && tile >= own_tiles) {
            if (tile == site.warp) arrive(passed);
            await(passed, FRONTS * site.turn);
            past_own = true;
        }
#pragma unroll
        for (int from = 0; from < SEG; from += 7) {
            float2 sum[7];
            // Lanes past the end read, in vain, what another lane of the warp has written or is about to write.
            if (!STEADY && from > 0) __syncwarp();
#pragma unroll
            for (int i = 0; i < 7; ++i)
                if (from + i < SEG) sum[i] = y_of_lane[steps.place(from + i)];
            if (!STEADY) __syncwarp();
#pragma unroll
            for (int i = 0; i < 7; ++i)
                if (from + i < SEG) {
                    const int step = from + i;
#if NSTATE == 1
                    h[0] = fmaf(a[step][0], h[0], b[step][0]);
                    h[1] = fmaf(a[step][1], h[1], b[step][1]);
                    sum[i].x = fmaf(c_of[step], h[0], sum[i].x);
                    sum[i].y = fmaf(c_of[step], h[1], sum[i].y);
#else
                    sum[i].x += y[step][0];
                    sum[i].y += y[step][1];
#endif
                    if (STEADY || start + (WHOLE && !ORDER ? 0 : step) < length) y_of_lane[steps.place(step)] = sum[i];
                }
        }
        if (FRONTS == 2 && tile < own_tiles && tile + WARPS >= own_tiles) arrive(passed);
    }
    if (!past_own) await(passed, FRONTS * site.turn);
    if (MEMBERS > 32) arrive(passed);
    else __syncwarp();
}

extern "C" __global__ void __launch_bounds__(MEMBERS * TEAMS, MIN_BLOCKS) ss2d(const Params p) {
    extern __shared__ float4 dynamic_shared[];
    // The same in all lanes, and known to be: behind branches that could be divergent, shuffles take a slow path.
    const int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0), team = warp / (WARPS * FRONTS);
    const int member = threadIdx.x - team * MEMBERS;
    const int channels = (int)p.channels, directions = (int)p.directions;
    const int height = HEIGHT ? HEIGHT : (int)p.height, width = HEIGHT ? WIDTH : (int)p.width;
    const int pitch = HEIGHT ? PITCH : (int)p.pitch, plane = HEIGHT ? PLANE : (int)p.plane;
    const int groups = (channels + 7) / 8, blocks = (groups + TEAMS - 1) / TEAMS;

    Site site;
    site.batch = blockIdx.x / blocks;
    site.first_channel = 8 * ((int)(blockIdx.x - site.batch * blocks) * TEAMS + team);
    site.front = warp / WARPS % FRONTS;
    site.warp = warp % WARPS;
    site.lane = threadIdx.x & 31;
    site.tiles = (height * width + 8 * SEG - 1) / (8 * SEG);
    const int team_bytes = 4 * plane * (int)(sizeof(float2) + sizeof(x_couple));
    site.links = (Links *)dynamic_shared + team;
#if SPILL
    char *memory = (char *)p.work + ((int64)blockIdx.x * TEAMS + team) * team_bytes;
#else
    char *memory = (char *)((Links *)dynamic_shared + TEAMS) + team * team_bytes;
#endif
    site.stage.y = (float2 *)memory;
    site.stage.x = (x_couple *)(memory + 4 * plane * sizeof(float2));
    site.stage.width = width;
    site.stage.length = height * width;
    site.stage.pad = pitch - width;
    site.stage.plane = plane;
    site.stage.x_offsets = HEIGHT ? X_OFFSETS : (uint_t)p.x_offsets;
    site.stage.y_offsets = HEIGHT ? Y_OFFSETS : (uint_t)p.y_offsets;
    const int live = channels - site.first_channel;
    site.stage.read(p, (const x_type *)p.x + site.batch * p.x_b + site.first_channel * p.x_c, live, member);
    prefetch_later_block(p, blocks, team, member, site.stage.length);
    for (int i = member; i < FRONTS * NSTATE * RING * 8; i += MEMBERS) site.links->state[0][0][0][i] = 0u;
    if (member == 0) init_arrivals(&site.links->passed);
    team_barrier();

#pragma unroll 1
    for (site.turn = 0; site.turn * FRONTS < directions; ++site.turn) {
        site.k = ORDER ? site.turn : (int)(p.sequence >> (4 * (site.turn * FRONTS + site.front))) & 15;
#if !SPECIAL
        scan_direction<-1>(p, site, height, width, pitch);
#else
        const int code = (int)(p.codes >> (4 * site.k)) & 7, kind = (code & 1) | (((code >> 2) ^ (code >> 1)) & 1) << 1;
        if (kind == 0) scan_direction<0>(p, site, height, width, pitch);
        else if (kind == 1) scan_direction<1>(p, site, height, width, pitch);
        else if (kind == 2) scan_direction<2>(p, site, height, width, pitch);
        else scan_direction<3>(p, site, height, width, pitch);
#endif
    }
    team_barrier();
    float skip[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const Element<D_TYPE>::type *source = (const Element<D_TYPE>::type *)p.D + min(site.first_channel + c, channels - 1);
        skip[c] = p.D ? Element<D_TYPE>::load(source) : 0.f;
    }
    const int64 rows = site.batch * channels * site.stage.length, step = OUT_LAYOUT == 2 ? 1 : site.stage.length;
    site.stage.write((Element<OUT_TYPE>::type *)p.out + rows + site.first_channel * step, skip, live, member, channels);
}
