// Where shared_scan.cu's threads meet: the state that enters a thread, and y on its way out. Pasted into it after its parts.

// What a state is multiplied with on its way to this thread.
struct Entry {
    float whole;     // from the start of the tile to this warp
    float entering;  // from the start of this warp to this thread
    float through;   // in the last lane: over the warp
#if SUMS
    float spans[6];        // sums of dt over 1, 2, 4 ... 32 threads up to this one, or as many as there are in the warp
    float before_thread;   // over the lower lanes
    float gap, from_tile;  // lane w: from the end of warp w to this warp; from the start of the tile to this warp
    float fade;            // lane w: what warp w's state is multiplied with on its way to this warp

    __device__ __forceinline__ void spans_of(const float (&dt)[ITEMS], int lane) {
        spans[0] = 0.f;
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) spans[0] += dt[i];
#pragma unroll
        for (int j = 0; j < 5; ++j) {
            const float before = __shfl_up_sync(FULL, spans[j], 1 << j);
            spans[j + 1] = lane >= 1 << j ? spans[j] + before : spans[j];
        }
        before_thread = __shfl_up_sync(FULL, spans[5], 1);
        if (lane == 0) before_thread = 0.f;
    }

    // From the warps' totals.
    __device__ __forceinline__ void gaps(const float *totals, int lane, int warp) {
        const int slot = lane % WARP_SLOTS;
        float sum = slot < warp ? totals[min(slot, TEAM_WARPS - 1)] : 0.f;
#pragma unroll
        for (int o = 1; o < WARP_SLOTS; o *= 2) {
            const float after = __shfl_down_sync(FULL, sum, o, WARP_SLOTS);
            if (slot + o < WARP_SLOTS) sum += after;
        }
        from_tile = __shfl_sync(FULL, sum, 0);
        gap = __shfl_down_sync(FULL, sum, 1, WARP_SLOTS);
        if (slot == WARP_SLOTS - 1) gap = 0.f;
    }

    __device__ __forceinline__ void factors(float decay, float, const float *, int, int) {
        fade = exp2_fast(gap * decay);
        entering = exp2_fast(before_thread * decay);
        whole = exp2_fast(from_tile * decay);
        through = exp2_fast(spans[5] * decay);
    }

    // The state before this warp, from the states that all warps leave on their own.
    __device__ __forceinline__ float before_warp(const float *left, int lane, int warp) const {
        const int slot = lane % WARP_SLOTS;
        float state = slot < warp ? left[min(slot, TEAM_WARPS - 1)] * fade : 0.f;
#pragma unroll
        for (int o = 1; o < WARP_SLOTS; o *= 2) state += __shfl_xor_sync(FULL, state, o);
        return state;
    }
#else
    float levels[5];  // lane w: the product over 1, 2, 4 ... warps up to warp w

    __device__ __forceinline__ void factors(float, float product, const float *products, int lane, int warp) {
        float all = products[min(lane, TEAM_WARPS - 1)];
#pragma unroll
        for (int o = 1, j = 0; o < TEAM_WARPS; o *= 2, ++j) {
            const float before = __shfl_up_sync(FULL, all, o);
            levels[j] = all;
            if (lane >= o) all *= before;
        }
        whole = __shfl_sync(FULL, all, max(warp - 1, 0));
        if (warp == 0) whole = 1.f;
        through = product;
        entering = __shfl_up_sync(FULL, product, 1);
        if (lane == 0) entering = 1.f;
    }

    __device__ __forceinline__ float before_warp(const float *left, int lane, int warp) const {
        float state = left[min(lane, TEAM_WARPS - 1)];
#pragma unroll
        for (int o = 1, j = 0; o < TEAM_WARPS; o *= 2, ++j) {
            const float before = __shfl_up_sync(FULL, state, o);
            if (lane >= o) state = fmaf(levels[j], before, state);
        }
        state = __shfl_sync(FULL, state, max(warp - 1, 0));
        return warp == 0 ? 0.f : state;
    }
#endif
};

__device__ __forceinline__ void put(float *to, float value, bool add) { *to = add ? *to + value : value; }

// y to its place in spatial order, or added to what is there. Sums of the whole map have gaps after lines of the map, those of one
// tile after lines of the tile.
__device__ __forceinline__ void place(float *sums, int sum_cap, const float (&y)[RANK][ITEMS], const Steps &steps,
                                      const Tile &tile, const Params &p, int thread, bool not_first) {
    const int skew = SKEW_OF, width = WIDTH_OF, count = tile.count;
    const int line = !MERGE || ONE_TILE ? COLUMN_LINE(tile.line) : width;
    const bool add = MERGE && not_first;
    auto at = [&](int index) {
        const bool of_tile = !MERGE || ONE_TILE;
        if (SUM_SKEW == SKEW_OF && of_tile) return index;
        const int q = index - tile.lines(index, SKEW_LINES, skew) * skew;
        if (of_tile) return tile.index(q, SUM_SKEW);
        const int position = tile.position(q, width);
        return position + SUM_SKEW * (int)((uint_t)position / (uint_t)(SKEW_LINES * width));
    };
#pragma unroll
    for (int r = 0; r < RANK; ++r) {
        float *sum = sums + r * sum_cap;
        if (MAYBE_SCATTERED && steps.kind == SCATTERED) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                if (steps.has(i, thread, count)) put(sum + at(steps.index[i]), y[r][i], add);
            }
            continue;
        }
#pragma unroll
        for (int s = 0; s < ITEMS; s += 8) {
            float *to = sum + at(steps.block[s / 8]);
            if (!steps.has(s, thread, count)) continue;  // in reverse, blocks are whole: sizes are multiples of 8
            if (MAYBE_COLUMNS && steps.kind == COLUMNS) {
#pragma unroll
                for (int i = 0; i < 8; ++i) put(to + i * line, y[r][s + i], add);
            } else if (steps.has(s + 7, thread, count)) {
                float v[8];
                Pack<0, 8> pack;
                if (add) pack.load(to);
                else pack.zero();
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] = pack.get(i) + y[r][s + i];
                pack.set(v);
                pack.store(to);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (steps.has(s + i, thread, count)) put(to + i, y[r][s + i], add);
                }
            }
        }
    }
}
