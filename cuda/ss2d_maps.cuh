// Where things lie in ss2d.cu, which describes the macros used here: the steps of a direction on the map, and the map in shared
// memory, with the copies between it and device memory.

// Where the segment's steps lie: `first() + from_first(i)` in the map, `place(i)` in shared memory. Split so that the offset
// from the first step is a constant of the load instruction where it can be.
struct Steps {
#if ORDER || !WHOLE
    int at_[SEG], place_[SEG];
    __device__ __forceinline__ int first() const { return 0; }
    __device__ __forceinline__ int from_first(int i) const { return at_[i]; }
    __device__ __forceinline__ int place(int i) const { return place_[i]; }
#else
    int at_, place_, step_at, step_place;
    __device__ __forceinline__ int first() const { return at_; }
    __device__ __forceinline__ int from_first(int i) const { return i * step_at; }
    __device__ __forceinline__ int place(int i) const { return place_ + i * step_place; }
#endif
};

// A direction as an affine map from (line, step in the line).
struct Walk {
    bool column;
    int minor_length, step_p, step_q, line_p, line_q, origin_p, origin_q;

    __device__ __forceinline__ Walk(bool column, bool back, bool mirrored, int height, int width, int pitch) : column(column) {
        minor_length = column ? height : width;
        const int lines = column ? width : height;
        step_p = (column ? width : 1) * (mirrored ? -1 : 1);
        step_q = (column ? pitch : 1) * (mirrored ? -1 : 1);
        line_p = (column ? 1 : width) * (back ? -1 : 1);
        line_q = (column ? 1 : pitch) * (back ? -1 : 1);
        origin_p = (back ? -(lines - 1) * line_p : 0) + (mirrored ? -(minor_length - 1) * step_p : 0);
        origin_q = (back ? -(lines - 1) * line_q : 0) + (mirrored ? -(minor_length - 1) * step_q : 0);
    }

    __device__ __forceinline__ int lines_in(int tiles) const { return tiles * 8 * SEG / minor_length; }

    __device__ __forceinline__ Steps steps(int start, int length, int height, int width) const {
        Steps s;
#if WHOLE
        const int t = min(start, length - SEG), line = column ? t / height : t / width, step = t - line * minor_length;
        s.at_ = origin_p + line * line_p + step * step_p;
        s.place_ = origin_q + line * line_q + step * step_q;
        s.step_at = step_p;
        s.step_place = step_q;
#else
        const int t = min(start, length - 1), line = column ? t / height : t / width;
        int step = t - line * minor_length;
        s.at_[0] = origin_p + line * line_p + step * step_p;
        s.place_[0] = origin_q + line * line_q + step * step_q;
#pragma unroll
        for (int i = 1; i < SEG; ++i) {
            const bool turn = ++step == minor_length, stop = start + i >= length;
            if (turn) step = 0;
            s.at_[i] = s.at_[i - 1] + (stop ? 0 : turn ? line_p - (minor_length - 1) * step_p : step_p);
            s.place_[i] = s.place_[i - 1] + (stop ? 0 : turn ? line_q - (minor_length - 1) * step_q : step_q);
        }
#endif
        return s;
    }
};

// Asks for x of the block that will follow this one on the multiprocessor, `ahead` blocks later, to be in the L2 cache then.
__device__ __forceinline__ void prefetch_later_block(const Params &p, int blocks_of_batch, int team, int member, int length) {
    const int64 block = blockIdx.x + p.ahead;
    if (p.ahead == 0 || block >= gridDim.x || p.x_c != length || p.x_p != 1) return;
    const int64 batch = block / blocks_of_batch, channel = ((block - batch * blocks_of_batch) * TEAMS + team) * 8;
    const char *from = (const char *)((const x_type *)p.x + batch * p.x_b + channel * p.x_c);
    const int bytes = (int)min((int64)8, p.channels - channel) * length * (int)sizeof(x_type);
    for (int i = member * 128; i < bytes; i += MEMBERS * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
}

// Shared memory of a team: the 4 channel pairs one after the other, map rows `pitch` apart. The pitch and the offsets of the
// pairs are chosen on the host so that the lanes of a warp seldom meet in a bank, by rows as by columns.
struct Stage {
    float2 *y;
    x_couple *x;
    int width, length, pad, plane;
    uint_t x_offsets, y_offsets;

    __device__ __forceinline__ x_couple *x_of(int pair) const { return x + pair * plane + (int)((x_offsets >> (8 * pair)) & 255); }
    __device__ __forceinline__ float2 *y_of(int pair) const { return y + pair * plane + (int)((y_offsets >> (8 * pair)) & 255); }
    __device__ __forceinline__ int place_of(int position) const { return position + position / width * pad; }

    __device__ __forceinline__ void clear_y(int member) const {
        for (int i = member; i < 2 * plane; i += MEMBERS) ((float4 *)y)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }

    // x (8 channels from `source`, `live` of them exist) to shared memory, and zeros to y.
    __device__ __forceinline__ void read(const Params &p, const x_type *source, int live, int member) const {
        const int64 x_c = HEIGHT ? X_STRIDE : p.x_c;
#if X_LAYOUT == 2
        clear_y(member);
#pragma unroll 4
        for (int position = member; position < length; position += MEMBERS) {
            Pack<X_TYPE, 8> pack;
            pack.load(source + position * p.x_p);
            const int place = place_of(position);
#pragma unroll
            for (int j = 0; j < 4; ++j) x_of(j)[place] = ((const x_couple *)pack.raw)[j];
        }
#elif X_LAYOUT == 1
        constexpr int BATCH = 4;
        for (int from = 2 * member; from == 2 * member || from < length; from += BATCH * 2 * MEMBERS) {
            x_couple rows[BATCH][8];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int position = from + i * 2 * MEMBERS;
                if (position < length) {
#pragma unroll
                    for (int c = 0; c < 8; ++c) rows[i][c] = __ldg((const x_couple *)(source + position + c * x_c));
                }
            }
            if (from == 2 * member) clear_y(member);  // while the loads are under way
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int position = from + i * 2 * MEMBERS, place = place_of(position);
                if (position < length) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        x_couple first, second;
                        XCouple::transpose(rows[i][2 * j], rows[i][2 * j + 1], first, second);
                        x_of(j)[place] = first;
                        x_of(j)[place + 1] = second;
                    }
                }
            }
        }
#else
        clear_y(member);
#pragma unroll 2
        for (int position = member; position < length; position += MEMBERS) {
            x_type v[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) v[c] = c < live ? __ldg(source + c * x_c + position * p.x_p) : (x_type)0;
            const int place = place_of(position);
#pragma unroll
            for (int j = 0; j < 4; ++j) x_of(j)[place] = XCouple::make(v[2 * j], v[2 * j + 1]);
        }
#endif
    }

    // y ln 2 + D x to device memory, `live` of the 8 channels, the first from `target` on.
    __device__ __forceinline__ void write(Element<OUT_TYPE>::type *target, const float *skip, int live, int member, int channels) const {
#if OUT_LAYOUT == 2
        // Two threads a position, four channels each: then a warp writes whole sectors at a time.
        const int part = member & 1;
        const float2 *const from[2] = {y_of(2 * part), y_of(2 * part + 1)};
        const x_couple *const x_from[2] = {x_of(2 * part), x_of(2 * part + 1)};
        const float skip_of[4] = {part ? skip[4] : skip[0], part ? skip[5] : skip[1], part ? skip[6] : skip[2], part ? skip[7] : skip[3]};
#pragma unroll 4
        for (int position = member / 2; position < length; position += MEMBERS / 2) {
            const int place = place_of(position);
            Element<OUT_TYPE>::type *to = target + (int64)position * channels + 4 * part;
            float v[4];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 y = from[j][place], x = XCouple::widen(x_from[j][place]);
                v[2 * j] = fmaf(y.x, LN2, skip_of[2 * j] * x.x);
                v[2 * j + 1] = fmaf(y.y, LN2, skip_of[2 * j + 1] * x.y);
            }
#if FULL
            Pack<OUT_TYPE, 4> pack;
            pack.set(v);
            pack.store(to);
#else
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (live > 4 * part + c) Element<OUT_TYPE>::store(to + c, v[c]);
#endif
        }
#else
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 *from = y_of(j);
            const x_couple *x_from = x_of(j);
            Element<OUT_TYPE>::type *lo = target + (int64)(2 * j) * length, *hi = lo + length;
#if OUT_LAYOUT == 1
#pragma unroll 2
            for (int position = 2 * member; position < length; position += 2 * MEMBERS) {
                const int place = place_of(position);
                const float2 v0 = from[place], v1 = from[place + 1];
                const float2 x0 = XCouple::widen(x_from[place]), x1 = XCouple::widen(x_from[place + 1]);
                const float skip_lo = skip[2 * j], skip_hi = skip[2 * j + 1];
                if (FULL || live > 2 * j)
                    Couple<OUT_TYPE>::store(lo + position, fmaf(v0.x, LN2, skip_lo * x0.x), fmaf(v1.x, LN2, skip_lo * x1.x));
                if (FULL || live > 2 * j + 1)
                    Couple<OUT_TYPE>::store(hi + position, fmaf(v0.y, LN2, skip_hi * x0.y), fmaf(v1.y, LN2, skip_hi * x1.y));
            }
#else
#pragma unroll 2
            for (int position = member; position < length; position += MEMBERS) {
                const int place = place_of(position);
                const float2 v = from[place], x0 = XCouple::widen(x_from[place]);
                if (FULL || live > 2 * j) Element<OUT_TYPE>::store(lo + position, fmaf(v.x, LN2, skip[2 * j] * x0.x));
                if (FULL || live > 2 * j + 1) Element<OUT_TYPE>::store(hi + position, fmaf(v.y, LN2, skip[2 * j + 1] * x0.y));
            }
#endif
        }
#endif
    }
};

// What a warp knows when it starts on a direction.
struct Site {
    Stage stage;
    Links *links;
    int warp, front, lane, turn, k, first_channel, tiles;  // direction k is that of this front in turn `turn`
    int64 batch;
};
