// The pieces of shared_scan.cu: tiles of a map, the order in which a thread meets its steps, a thread's own scan.
// Pasted into it after its macros and Params; no file of its own.

__device__ __forceinline__ void team_barrier(int team) {
    if (TEAMS == 1) __syncthreads();
    else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(TEAM_THREADS + 32 * PRODUCER) : "memory");
}

// Which positions of the map a tile holds. Along rows: a flat range from `origin`; along columns: all rows of some columns.
struct Tile {
    int count;   // positions
    int origin;  // flat position of the first
    int line;    // elements of one line of the tile; lines are a map's width apart in the map
    bool flat;   // lines follow each other in the map too

    // q / (unit * line + gap), by constants where that is possible: a division by a variable takes dozens of instructions.
    __device__ __forceinline__ int lines(int q, int unit, int gap = 0) const {
#if BAKED
        if (ONE_TILE || line == WIDTH) return (uint_t)q / (uint_t)(unit * WIDTH + gap);
        if (WIDTH % COLUMNS_TILE == 0 || line == COLUMNS_TILE) return (uint_t)q / (uint_t)(unit * COLUMNS_TILE + gap);
#endif
        return (uint_t)q / (uint_t)(unit * line + gap);
    }

    // Where the tile's q-th position is in shared memory, and in the map.
    __device__ __forceinline__ int index(int q, int skew) const { return skew ? q + skew * lines(q, SKEW_LINES) : q; }
    __device__ __forceinline__ int position(int q, int width) const {
        return flat ? origin + q : origin + lines(q, 1) * (width - line) + q;
    }
};

__device__ __forceinline__ Tile tile_at(const Params &p, int code, int tile) {
    const int length = LENGTH_OF, width = WIDTH_OF, height = HEIGHT_OF;
    if (ONE_TILE) return {length, 0, width, true};
    Tile r;
    if (code & 1) {
        const int first = tile * COLUMNS_OF;
        const int columns = width % COLUMNS_OF == 0 ? COLUMNS_OF : min(COLUMNS_OF, width - first);
        r.line = columns;
        r.count = columns * height;
        r.origin = code & 2 ? width - first - columns : first;
        r.flat = columns == width;
    } else {
        const int first = tile * ROWS_OF;
        r.line = width;
        r.count = min(ROWS_OF, length - first);
        r.origin = code & 2 ? length - first - r.count : first;
        r.flat = true;
    }
    return r;
}

// A thread's ITEMS steps of a tile. Where 8 steps are 8 neighbours of a line or of a column (`kind`), one index says where they
// are, and reversed directions keep them in ascending order and scan the thread's items downwards. Registers then hold items in
// the order of memory, and addresses are one register plus constants.
struct Steps {
    int block[ITEMS / 8];  // LINES, COLUMNS: index of the first of 8
    int index[ITEMS];      // SCATTERED: index of each step
    int kind, line;
    bool down;

    // `at`: the tile's arrays; `offset`: where in them this one is, in bytes.
    template <int CODE> __device__ __forceinline__ void read(float *v, const char *at, int offset) const {
        typedef typename Element<CODE>::type type;
        const int bytes = Element<CODE>::bytes;
        if (MAYBE_SCATTERED && kind == SCATTERED) {
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) v[i] = Element<CODE>::load((const type *)(at + index[i] * bytes + offset));
        } else if (MAYBE_COLUMNS && kind == COLUMNS) {
            const int step = COLUMN_LINE(line) * bytes;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
                v[i] = Element<CODE>::load((const type *)(at + block[i / 8] * bytes + (offset + i % 8 * step)));
        } else {
#pragma unroll
            for (int s = 0; s < ITEMS; s += 8) {
                Pack<CODE, 8> pack;
                pack.load(at + block[s / 8] * bytes + offset);
#pragma unroll
                for (int i = 0; i < 8; ++i) v[s + i] = pack.get(i);
            }
        }
    }

    // Whether item i of this thread lies within the tile.
    __device__ __forceinline__ bool has(int i, int thread, int count) const {
        return WHOLE_TILES || thread * ITEMS + (down ? ITEMS - 1 - i : i) < count;
    }
};

__device__ __forceinline__ void find_steps(Steps &steps, const Params &p, const Tile &tile, int code, int k, int thread) {
    const int skew = SKEW_OF, height = HEIGHT_OF, width = WIDTH_OF;
    const bool scattered = TABLE || code & 4 || (code & 1 ? height % 8 : code & 2 ? LENGTH_OF % 8 : 0);
    steps.kind = scattered ? SCATTERED : code & 1 ? COLUMNS : LINES;
    steps.down = !scattered && code & 2;
    steps.line = tile.line;
    if (!MAYBE_SCATTERED || !scattered) {
#pragma unroll
        for (int s = 0; s < ITEMS / 8; ++s) {
            // Blocks past the end read the last block, or the first: something readable that nothing depends on.
            const int last = (tile.count - 1) / 8 * 8;
            int q = steps.down ? max(tile.count - (thread + 1) * ITEMS + 8 * s, 0) : min(thread * ITEMS + 8 * s, last);
            if (MAYBE_COLUMNS && code & 1) {
                const int w = (int)((uint_t)q / (uint_t)height);
                q = (q - w * height) * tile.line + w;
            }
            steps.block[s] = tile.index(q, skew);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int step = min(thread * ITEMS + i, tile.count - 1);
        int q = code & 2 ? tile.count - 1 - step : step;
#if TABLE
        q = ((const int *)p.table)[(int64)k * tile.count + step];
#else
        if (code & 1) {
            const int w = (int)((uint_t)q / (uint_t)height), h = q - w * height;
            q = (code & 4 ? height - 1 - h : h) * tile.line + w;
        } else if (code & 4) {
            const int h = (int)((uint_t)q / (uint_t)width), w = q - h * width;
            q = h * width + width - 1 - w;
        }
#endif
        steps.index[i] = tile.index(q, skew);
    }
}

// The thread's own steps from a zero state: h is the state it leaves, `product` what it multiplies a state with. Without RESCAN, y
// gets its share and `reach` comes as C and leaves as what a state that enters adds to y: C times the product of decays so far.
template <bool DOWN>
__device__ __forceinline__ void scan_own(float (&y)[RANK][ITEMS], float (&h)[RANK], float &product, float (&reach)[ITEMS],
                                         const float (&a)[ITEMS], const float (&in)[RANK][ITEMS]) {
    product = 1.f;
#pragma unroll
    for (int r = 0; r < RANK; ++r) h[r] = 0.f;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const int i = DOWN ? ITEMS - 1 - j : j;
#pragma unroll
        for (int r = 0; r < RANK; ++r) {
            h[r] = fmaf(a[i], h[r], in[r][i]);
            if (!RESCAN) y[r][i] = fmaf(reach[i], h[r], y[r][i]);
        }
        product *= a[i];
        if (!RESCAN) reach[i] *= product;
    }
}

// The same steps once more, from the state that enters.
template <bool DOWN>
__device__ __forceinline__ void scan_again(float (&y)[ITEMS], float state, const float (&C)[ITEMS], const float (&a)[ITEMS],
                                           const float (&in)[ITEMS]) {
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const int i = DOWN ? ITEMS - 1 - j : j;
        state = fmaf(a[i], state, in[i]);
        y[i] = fmaf(C[i], state, y[i]);
    }
}

struct Cursor {
    int k, tile, n, step, front;

    __device__ __forceinline__ int code(const Params &p) const {
#if TABLE
        return 0;
#elif BAKED
        return (int)(DIRECTIONS >> (4 * min(k, 15))) & 7;
#else
        return (int)(p.directions >> (4 * min(k, 15))) & 7;
#endif
    }
    __device__ __forceinline__ int tiles(const Params &p) const {
        if (ONE_TILE) return 1;
        return code(p) & 1 ? (WIDTH_OF + COLUMNS_OF - 1) / COLUMNS_OF : (LENGTH_OF + ROWS_OF - 1) / ROWS_OF;
    }
    __device__ __forceinline__ void advance(const Params &p, int k_step) {
        ++step;
        n += PAIR;
        if (n < NSTATE) return;
        n = 0;
        ++front;
        if (++tile < tiles(p)) return;
        tile = 0;
        k += k_step;
    }
};
