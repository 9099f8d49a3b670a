// How shared_scan.cu brings tiles into shared memory. Pasted into it after its parts; no file of its own.
//
// BULK (sm_90, 16-byte alignment, whole lines): a lane starts a bulk copy of each piece that is contiguous on both sides, and a
// barrier in shared memory counts the bytes that have come. It leaves nearly all of the issue slots to the scan. Else cp.async, by
// all threads; else, where strides or addresses forbid it (COPY is 0) or before sm_80, plain loads and stores.

template <int PENDING> __device__ __forceinline__ void wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

__device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int BYTES> __device__ __forceinline__ void copy(void *to, const void *from) {
#if __CUDA_ARCH__ >= 800
    const uint_t address = shared_address(to);
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
#else
#pragma unroll
    for (int i = 0; i < BYTES / 4; ++i) ((uint_t *)to)[i] = ((const uint_t *)from)[i];
#endif
}

// Which pieces of bulk copies a thread starts: number `first` and every `step`-th after it, none if `first` is not below `step`.
// They are counted from array to array. A warp starts its lanes' copies one by one, in a hundred cycles each (H200).
struct Share {
    int first, step, done;
};

// Copies a tile of one array into shared memory. `from` is the array's first map element.
template <int CODE>
__device__ __forceinline__ void fetch(char *to, int64 from, int64 stride_h, int64 stride_w, const Tile &tile, const Params &p,
                                      int thread, Share &share, uint_t barrier) {
    typedef typename Element<CODE>::type type;
    const int skew = SKEW_OF, width = WIDTH_OF;
#if BULK
    const int piece = !tile.flat ? tile.line : skew ? SKEW_LINES * tile.line : tile.count;
    const int pieces = (int)((uint_t)(tile.count + piece - 1) / (uint_t)piece), start = share.done % share.step;
    share.done += pieces;
    if (share.first >= share.step) return;
#pragma unroll 1
    for (int i = (share.first - start + share.step) % share.step; i < pieces; i += share.step) {
        const int q = i * piece, bytes = min(piece, tile.count - q) * Element<CODE>::bytes;
        bulk_copy((type *)to + tile.index(q, skew), from + (int64)tile.position(q, width) * Element<CODE>::bytes, bytes, barrier);
    }
#elif COPY
    const int pack = COPY / Element<CODE>::bytes;
#pragma unroll
    for (int i = 0; i < ITEMS / pack; ++i) {
        const int q = (i * TEAM_THREADS + thread) * pack;
        if (q < tile.count) copy<COPY>((type *)to + tile.index(q, skew), (const type *)from + tile.position(q, width));
    }
#else
#pragma unroll 1
    for (int q = thread; q < tile.count; q += TEAM_THREADS) {
        const int position = tile.position(q, width), h = position / width, w = position - h * width;
        ((type *)to)[tile.index(q, skew)] = ((const type *)from)[h * stride_h + w * stride_w];
    }
#endif
}
