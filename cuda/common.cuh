// What the kernels share. No other header is included: NVRTC then needs none at run time, and compiles in a fraction of a
// second. Element types are chosen by -D macros: 0 float, 1 half, 2 bfloat16 (never a macro named T: NVRTC's own headers
// use that name). Arithmetic is float.

typedef unsigned short ushort_t;
typedef unsigned int uint_t;
typedef long long int64;

__device__ __forceinline__ uint_t shared_address(const void *p) { return (uint_t)__cvta_generic_to_shared(p); }

template <int CODE> struct Element;

template <> struct Element<0> {
    typedef float type;
    static const int bytes = 4;
    static __device__ __forceinline__ float load(const float *p) { return *p; }
    static __device__ __forceinline__ void store(float *p, float v) { *p = v; }
};

template <> struct Element<1> {
    typedef ushort_t type;
    static const int bytes = 2;
    static __device__ __forceinline__ float widen(ushort_t v) {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
        return f;
    }
    static __device__ __forceinline__ ushort_t narrow(float f) {
        ushort_t v;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
        return v;
    }
    static __device__ __forceinline__ float load(const ushort_t *p) { return widen(*p); }
    static __device__ __forceinline__ void store(ushort_t *p, float v) { *p = narrow(v); }
};

template <> struct Element<2> {
    typedef ushort_t type;
    static const int bytes = 2;
    static __device__ __forceinline__ float widen(ushort_t v) { return __uint_as_float((uint_t)v << 16); }
    static __device__ __forceinline__ ushort_t narrow(float f) {
#if __CUDA_ARCH__ >= 800
        ushort_t v;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
        return v;
#else
        uint_t bits = __float_as_uint(f);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
        return (ushort_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
#endif
    }
    static __device__ __forceinline__ float load(const ushort_t *p) { return widen(*p); }
    static __device__ __forceinline__ void store(ushort_t *p, float v) { *p = narrow(v); }
};

// COUNT consecutive elements, aligned to the smaller of 16 bytes and the whole: raw words first (for prefetching), floats later.
template <int CODE, int COUNT> struct Pack {
    static const int words = COUNT * Element<CODE>::bytes / 4;
    uint_t raw[words];

    __device__ __forceinline__ void load(const void *p) {
        if constexpr (words % 4 == 0) {
#pragma unroll
            for (int i = 0; i < words / 4; ++i) {
                uint4 v = ((const uint4 *)p)[i];
                raw[4 * i] = v.x; raw[4 * i + 1] = v.y; raw[4 * i + 2] = v.z; raw[4 * i + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < words / 2; ++i) {
                uint2 v = ((const uint2 *)p)[i];
                raw[2 * i] = v.x; raw[2 * i + 1] = v.y;
            }
        }
    }
    __device__ __forceinline__ void store(void *p) const {
        if constexpr (words % 4 == 0) {
#pragma unroll
            for (int i = 0; i < words / 4; ++i)
                ((uint4 *)p)[i] = make_uint4(raw[4 * i], raw[4 * i + 1], raw[4 * i + 2], raw[4 * i + 3]);
        } else {
#pragma unroll
            for (int i = 0; i < words / 2; ++i) ((uint2 *)p)[i] = make_uint2(raw[2 * i], raw[2 * i + 1]);
        }
    }
    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < words; ++i) raw[i] = 0u;
    }
    __device__ __forceinline__ float get(int i) const {
        if constexpr (CODE == 0) return __uint_as_float(raw[i]);
        else if constexpr (CODE == 1) return Element<1>::widen((ushort_t)(i & 1 ? raw[i / 2] >> 16 : raw[i / 2] & 0xffffu));
        else return __uint_as_float(i & 1 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16);
    }
    __device__ __forceinline__ void set(const float *v) {
        if constexpr (CODE == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) raw[i] = __float_as_uint(v[i]);
        } else {
#pragma unroll
            for (int i = 0; i < words; ++i)
                raw[i] = (uint_t)Element<CODE>::narrow(v[2 * i]) | ((uint_t)Element<CODE>::narrow(v[2 * i + 1]) << 16);
        }
    }
};

static const float LOG2E = 1.4426950408889634f;
static const float LN2 = 0.6931471805599453f;

// 2^x by the special-function unit, relative error 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)). log1p(e) = e P(e) on [0, 1] (a minimax fit) keeps the relative accuracy (3e-7) for large
// negative x, where log(1 + e) loses it. Above 20 this equals x in float, as torch's threshold has it.
__device__ __forceinline__ float softplus(float x) {
    float e = exp2_fast(-fabsf(x) * LOG2E);
    float p = -0.008539096f;
    p = fmaf(p, e, 0.04408924f);
    p = fmaf(p, e, -0.10768117f);
    p = fmaf(p, e, 0.17745204f);
    p = fmaf(p, e, -0.2449545f);
    p = fmaf(p, e, 0.3327548f);
    p = fmaf(p, e, -0.49997404f);
    p = fmaf(p, e, 0.9999998f);
    return fmaf(e, p, fmaxf(x, 0.f));
}

// The same in base 2: log2(1 + 2^x). What comes as half (CODE 1 or 2) is known to 2^-12 at best: a shorter fit (6e-5) will do.
template <int CODE> __device__ __forceinline__ float softplus_base2(float x) {
    const float e = exp2_fast(-fabsf(x));
    float p;
    if constexpr (CODE == 0) {
        p = -0.0123193804f;
        p = fmaf(p, e, 0.0636075437f);
        p = fmaf(p, e, -0.155351356f);
        p = fmaf(p, e, 0.25600931f);
        p = fmaf(p, e, -0.353394657f);
        p = fmaf(p, e, 0.480063677f);
        p = fmaf(p, e, -0.721310079f);
        p = fmaf(p, e, 1.44269478f);
    } else {
        p = 0.0596515089f;
        p = fmaf(p, e, -0.227119371f);
        p = fmaf(p, e, 0.441898793f);
        p = fmaf(p, e, -0.716987431f);
        p = fmaf(p, e, 1.44261324f);
    }
    return fmaf(e, p, fmaxf(x, 0.f));
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(-x * LOG2E)); }
