// Building blocks of ss2d.cu, which describes the macros used here: arithmetic, tensor core operands, the hand-over of states
// between warps, and the copies between device memory and the team's shared memory.

struct Params {
    int64 x, feats, weight, A, D, bias, out, order, work;
    int64 channels, directions, codes, sequence, height, width;
    int64 x_b, x_c, x_p, f_b, f_k, f_r, f_p;
    int64 pitch, plane, x_offsets, y_offsets, ahead;
};

#define PAIRS_OF_STEPS ((SEG + 1) / 2)
#define BC_BY_MMA (NSTATE == 1 && !BC_APART)
#define MMA_WORDS ((RANK + (BC_BY_MMA ? 2 : 0)) / 2)
#define LANE_WORDS (FETCH * ((MMA_WORDS + 4 * FETCH - 1) / (4 * FETCH)))
#define KSTEPS ((LANE_WORDS + 1) / 2)
// One word per lane: mma.k8, with the weights' high and low parts one after the other.
#define SMALL (LANE_WORDS == 1)
// Weights and bias carry the factor log2 e; else z is multiplied by it.
#define SCALED (MMA && (SPLIT || SMALL))
#define MEMBERS (32 * WARPS * FRONTS)
#define MAX_TILES 64  // with two fronts

static const float LN2 = 0.6931471805599453f;

typedef Element<X_TYPE>::type x_type;
typedef Element<F_TYPE>::type f_type;
typedef Element<W_TYPE>::type w_type;

// Two channels of one position, or two positions of one channel.
template <int CODE> struct Couple {
    typedef uint_t type;
    static __device__ __forceinline__ uint_t make(ushort_t lo, ushort_t hi) { return (uint_t)lo | ((uint_t)hi << 16); }
    static __device__ __forceinline__ float2 widen(uint_t v) {
        return make_float2(Element<CODE>::widen((ushort_t)(v & 0xffffu)), Element<CODE>::widen((ushort_t)(v >> 16)));
    }
    static __device__ __forceinline__ void store(ushort_t *to, float a, float b) {
        *(uint_t *)to = make(Element<CODE>::narrow(a), Element<CODE>::narrow(b));
    }
    // Rows lo and hi of two channels at two positions: the couples of the first and of the second position.
    static __device__ __forceinline__ void transpose(uint_t lo, uint_t hi, uint_t &first, uint_t &second) {
        first = __byte_perm(lo, hi, 0x5410);
        second = __byte_perm(lo, hi, 0x7632);
    }
};
template <> struct Couple<0> {
    typedef float2 type;
    static __device__ __forceinline__ float2 make(float lo, float hi) { return make_float2(lo, hi); }
    static __device__ __forceinline__ float2 widen(float2 v) { return v; }
    static __device__ __forceinline__ void store(float *to, float a, float b) { *(float2 *)to = make_float2(a, b); }
    static __device__ __forceinline__ void transpose(float2 lo, float2 hi, float2 &first, float2 &second) {
        first = make_float2(lo.x, hi.x);
        second = make_float2(lo.y, hi.y);
    }
};
typedef Couple<X_TYPE> XCouple;
typedef XCouple::type x_couple;

// log2(1 + 2^z) = max(z, 0) + e P(e), e = 2^-|z|: P is a minimax fit of log2(1 + e) / e, relative error 8e-6 or 3e-7.
__device__ __forceinline__ float softplus_log2(float z) {
    float e;
    // Not -fabsf(z): with denormals flushed, C's abs and minus become two additions instead of modifiers of the operand.
    asm("{.reg .f32 t; abs.f32 t, %1; neg.f32 t, t; ex2.approx.ftz.f32 %0, t;}" : "=f"(e) : "f"(z));
#if F_TYPE == 0 && X_TYPE == 0
    float p = -0.0123194754f;
    p = fmaf(p, e, 0.0636079013f);
    p = fmaf(p, e, -0.155351892f);
    p = fmaf(p, e, 0.256009728f);
    p = fmaf(p, e, -0.353394836f);
    p = fmaf(p, e, 0.480063707f);
    p = fmaf(p, e, -0.721310079f);
    p = fmaf(p, e, 1.44269478f);
#else
    float p = -0.0344359092f;
    p = fmaf(p, e, 0.1460329f);
    p = fmaf(p, e, -0.303036213f);
    p = fmaf(p, e, 0.469174087f);
    p = fmaf(p, e, -0.720426142f);
    p = fmaf(p, e, 1.44268286f);
#endif
    return fmaf(e, p, fmaxf(z, 0.f));
}

#if MMA
#if F_TYPE == 2
#define MMA_TYPES "f32.bf16.bf16.f32"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#endif

// d = a b + c for 16 x 16 and 16 x 8 operands; a[0], a[2]: row lane/4, a[1], a[3]: row lane/4 + 8.
__device__ __forceinline__ void mma16(float *d, const uint_t *a, uint_t b0, uint_t b1, const float *c) {
    asm("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ void mma8(float *d, uint_t a0, uint_t a1, uint_t b, const float *c) {
    asm("mma.sync.aligned.m16n8k8.row.col." MMA_TYPES " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Number of the j-th feature word of a lane: each load is FETCH consecutive words, the four lanes of a step cover 4 * FETCH.
__device__ __forceinline__ constexpr int word_of(int j, int pair) { return j / FETCH * 4 * FETCH + FETCH * pair + j % FETCH; }

__device__ __forceinline__ void fetch_words(uint_t *words, const f_type *record, int pair) {
    const uint_t *source = (const uint_t *)record + FETCH * pair;
#pragma unroll
    for (int j = 0; j < LANE_WORDS; j += FETCH) {
        const int first = word_of(j, pair);
        uint_t *to = words + j;
#pragma unroll
        for (int i = 0; i < FETCH; ++i) to[i] = 0u;
        if (first < MMA_WORDS) {
#if FETCH == 4
            const uint4 v = __ldg((const uint4 *)(source + 4 * j));
            to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
#elif FETCH == 2
            const uint2 v = __ldg((const uint2 *)(source + 4 * j));
            to[0] = v.x; to[1] = v.y;
#else
            to[0] = __ldg(source + 4 * j);
#endif
        }
        // Words past the record may hold anything, and 0 * NaN is NaN.
#pragma unroll
        for (int i = 1; i < FETCH; ++i)
            if (word_of(j, 3) + i >= MMA_WORDS && first + i >= MMA_WORDS) to[i] = 0u;
    }
}

// Two consecutive weights of one channel as an operand word: their values rounded to F_TYPE, or what the rounding left over.
__device__ __forceinline__ uint_t weight_word(const w_type *row, int word, bool rest) {
    if (row == nullptr || 2 * word >= RANK) return 0u;
#if W_TYPE == F_TYPE && !SCALED
    return __ldg((const uint_t *)row + word);
#else
    uint_t packed = 0u;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float v = Element<W_TYPE>::load(row + 2 * word + i) * (SCALED ? LOG2E : 1.f);
        f_type narrow = Element<F_TYPE>::narrow(v);
        if (rest) narrow = Element<F_TYPE>::narrow(v - Element<F_TYPE>::widen(narrow));
        packed |= (uint_t)narrow << (16 * i);
    }
    return packed;
#endif
}
#endif

// Takes in the (decay, state) of the lane `distance` to the left, if there is one.
template <int DISTANCE> __device__ __forceinline__ void take_in_left(float &decay, float &state) {
    asm volatile(
        "{.reg .pred in; .reg .f32 p, h; shfl.sync.up.b32 p|in, %0, %2, 0, 0xffffffff; shfl.sync.up.b32 h, %1, %2, 0, 0xffffffff;"
        "@in fma.rn.ftz.f32 %1, %0, h, %1; @in mul.ftz.f32 %0, %0, p;}"
        : "+f"(decay), "+f"(state)
        : "n"(DISTANCE));
}

// The (decay, state) of the segment to the left; (1, 0) for the first.
__device__ __forceinline__ void shift_right(float &decay, float &state) {
    asm volatile(
        "{.reg .pred in; .reg .f32 p, h; shfl.sync.up.b32 p|in, %0, 4, 0, 0xffffffff; shfl.sync.up.b32 h, %1, 4, 0, 0xffffffff;"
        "selp.f32 %0, p, 0f3f800000, in; selp.f32 %1, h, 0f00000000, in;}"
        : "+f"(decay), "+f"(state));
}

__device__ __forceinline__ uint_t shared_address(const void *p) { return (uint_t)__cvta_generic_to_shared(p); }

// What the warps of a team tell each other, in shared memory.
struct __align__(16) Links {
    unsigned long long state[FRONTS][NSTATE][RING][8];  // published states of 8 channels, see publish()
    uint_t visited[FRONTS > 1 ? MAX_TILES : 1];         // by tile of the map: how many rounds of directions have passed it once
    uint_t finished;                                    // how often a warp has finished a direction
};
static_assert(sizeof(Links) == LINKS_BYTES, "the host reserves another size for Links");

// A state and its tag are one 64-bit word, written and read in one access: a matching tag vouches for the state. All of this
// is free of branches that the compiler could take for divergent: behind one, every shuffle takes a slow path.
__device__ __forceinline__ void publish(uint_t slots, float h0, float h1, uint_t tag, bool writes) {
    asm volatile(
        "{.reg .pred writes; .reg .b64 lo, hi; setp.ne.u32 writes, %4, 0; mov.b64 lo, {%1, %3}; mov.b64 hi, {%2, %3};"
        "@writes st.volatile.shared.v2.b64 [%0], {lo, hi};}" ::"r"(slots),
        "f"(h0), "f"(h1), "r"(tag), "r"((uint_t)writes)
        : "memory");
}

__device__ __forceinline__ float await_state(uint_t slot, uint_t tag) {
    float h;
    uint_t seen;
    do {
        asm volatile("{.reg .b64 both; ld.volatile.shared.b64 both, [%2]; mov.b64 {%0, %1}, both;}" : "=f"(h), "=r"(seen) : "r"(slot) : "memory");
    } while (__any_sync(0xffffffffu, seen != tag));
    return h;
}

// By lane 0 alone, for all its warp has done.
__device__ __forceinline__ void store_release(uint_t *word, uint_t value, int lane) {
    __syncwarp();
    asm volatile("{.reg .pred first; setp.eq.s32 first, %2, 0; @first st.release.cta.shared.u32 [%0], %1;}" ::"r"(shared_address(word)),
                 "r"(value), "r"(lane)
                 : "memory");
}

__device__ __forceinline__ void add_release(uint_t *word, int lane) {
    __syncwarp();
    asm volatile("{.reg .pred first; setp.eq.s32 first, %1, 0; @first red.release.cta.shared.add.u32 [%0], 1;}" ::"r"(shared_address(word)),
                 "r"(lane)
                 : "memory");
}

__device__ __forceinline__ void await_at_least(const uint_t *word, uint_t value) {
    uint_t seen;
    do {
        asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(seen) : "r"(shared_address(word)) : "memory");
    } while (__any_sync(0xffffffffu, seen < value));
}

__device__ __forceinline__ void team_barrier() {
#if MEMBERS == 32
    __syncwarp();
#else
    __syncthreads();
#endif
}

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

    // y ln 2 + D x to device memory, `live` rows of `length` from `target` on.
    __device__ __forceinline__ void write(Element<OUT_TYPE>::type *target, const float *skip, int live, int member) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 *from = y_of(j);
            const x_couple *x_from = x_of(j);
            Element<OUT_TYPE>::type *lo = target + (int64)(2 * j) * length, *hi = lo + length;
#if OUT_PAIRS
#pragma unroll 2
            for (int position = 2 * member; position < length; position += 2 * MEMBERS) {
                const int place = place_of(position);
                const float2 v0 = from[place], v1 = from[place + 1];
                const float2 x0 = XCouple::widen(x_from[place]), x1 = XCouple::widen(x_from[place + 1]);
                const float skip_lo = skip[2 * j], skip_hi = skip[2 * j + 1];
                if (FULL || live > 2 * j) Couple<OUT_TYPE>::store(lo + position, fmaf(v0.x, LN2, skip_lo * x0.x), fmaf(v1.x, LN2, skip_lo * x1.x));
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
    }
};
