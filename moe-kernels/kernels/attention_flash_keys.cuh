// What kernels are made of that have a tile of keys each and walk the blocks of queries that see it: scores are transposed, the queries along
// a row.

// Scores [keys, queries] of a warpgroup to probabilities. `column` is the first of the thread's queries.
__device__ __forceinline__ void exponentials(float (&scores)[STEP / 2], const Statistics& at, int column, float scale) {
#pragma unroll
    for (int j = 0; j < STEP / 8; j++) {
        float2 lse = *(const float2*)&at.lse[8 * j + column];
#pragma unroll
        for (int e = 0; e < 4; e++) scores[4 * j + e] = exp2_fast(fmaf(scores[4 * j + e], scale, -(e % 2 ? lse.y : lse.x)));
    }
}

// Whether a query of the block does not see one of the keys of the tile that begins with key `from`.
__device__ __forceinline__ bool some_hidden(const Statistics& at, int from) {
    return from < at.all.all_lo || from + ROWS > at.all.all_hi;
}

// Probabilities of keys that queries do not see are 0. `row` is the first of the thread's two keys.
__device__ __forceinline__ void hide(float (&scores)[STEP / 2], const Statistics& at, int column, int row) {
#pragma unroll
    for (int j = 0; j < STEP / 8; j++) {
        int2 lo = *(const int2*)&at.lo[8 * j + column], hi = *(const int2*)&at.hi[8 * j + column];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int2 keys = e % 2 ? make_int2(lo.y, hi.y) : make_int2(lo.x, hi.x);
            if (!visible(row + e / 2 * 8, keys)) scores[4 * j + e] = 0.0f;
        }
    }
}

// The first and the last block of queries of a sequence that see any key of the tile that begins with key `from`; as they were where none
// does. Every thread of the block calls it; the results are shared.
__device__ __forceinline__ void blocks_that_see(int& first, int& last, const Bounds* bounds, int blocks, int from) {
    for (int block = threadIdx.x; block < blocks; block += THREADS) {
        Bounds x = bounds[block];
        if (x.lo < x.hi && x.lo < from + ROWS && x.hi > from) {
            atomicMin(&first, block);
            atomicMax(&last, block);
        }
    }
    __syncthreads();
}
