// Building blocks of ss2d.cu, which describes the macros used here: arithmetic, tensor core operands, and what the warps of a
// team tell each other.

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

// Counts the threads of a team that have come by, in phases. An mbarrier where there are such: racecheck knows them.
typedef unsigned long long Arrivals;

// What the warps of a team tell each other, in shared memory.
struct __align__(16) Links {
    unsigned long long state[FRONTS][NSTATE][RING][8];  // published states of 8 channels, see publish()
    Arrivals passed;                                    // half a turn (with two fronts) or a turn, FRONTS times a turn
};
static_assert(sizeof(Links) == LINKS_BYTES, "the host reserves another size for Links");

__device__ __forceinline__ void init_arrivals(Arrivals *arrivals) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(arrivals)), "n"(MEMBERS) : "memory");
#else
    *arrivals = 0;
#endif
}

__device__ __forceinline__ void arrive(Arrivals *arrivals) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(arrivals)) : "memory");
#else
    __threadfence_block();
    atomicAdd(arrivals, 1ull);
#endif
}

// Until all have arrived in this phase. The phase before has been waited for.
__device__ __forceinline__ void await(Arrivals *arrivals, int phase) {
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait.parity.shared.b64"
#else
#define WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    uint_t done;
    do {
#if __CUDA_ARCH__ >= 800
        asm volatile("{.reg .pred p; " WAIT " p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(shared_address(arrivals)), "r"(phase & 1)
                     : "memory");
#else
        done = *(volatile Arrivals *)arrivals >= (Arrivals)MEMBERS * (phase + 1);
        __threadfence_block();
#endif
    } while (__any_sync(0xffffffffu, !done));
}

// A state and its tag are one 64-bit word, written and read in one access: a matching tag vouches for the state. Exchanged, not
// stored: racecheck takes an atomic write for no race with those who poll.
__device__ __forceinline__ void publish(uint_t slots, float h0, float h1, uint_t tag) {
    asm volatile(
        "{.reg .b64 lo, hi, old; mov.b64 lo, {%1, %3}; mov.b64 hi, {%2, %3};"
        "atom.shared.exch.b64 old, [%0], lo; atom.shared.exch.b64 old, [%0 + 8], hi;}" ::"r"(slots),
        "f"(h0), "f"(h1), "r"(tag)
        : "memory");
}

__device__ __forceinline__ void await_states(uint_t slots, uint_t tag, float &h0, float &h1) {
    uint_t tag0, tag1;
    do {
        asm volatile("{.reg .b64 lo, hi; ld.volatile.shared.v2.b64 {lo, hi}, [%4]; mov.b64 {%0, %1}, lo; mov.b64 {%2, %3}, hi;}"
                     : "=f"(h0), "=r"(tag0), "=f"(h1), "=r"(tag1)
                     : "r"(slots)
                     : "memory");
    } while (__any_sync(0xffffffffu, tag0 != tag || tag1 != tag));
}

__device__ __forceinline__ void team_barrier() {
#if MEMBERS == 32
    __syncwarp();
#else
    __syncthreads();
#endif
}
