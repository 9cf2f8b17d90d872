// What kernels are made of that have a tile of queries each: which keys it sees.

// What the ROWS queries of a tile see; every thread of the block calls it. Also `own`: what the two rows of a consumer see.
__device__ __forceinline__ Bounds look(const Sizes& s, const int* first_keys, int sequence, int from, int2 (&own)[2]) {
    __shared__ int2 seen[ROWS];
    __shared__ Bounds parts[ROWS / 32];
    int tid = threadIdx.x;
    if (tid < ROWS) {
        int2 mine = make_int2(0, 0);
        Bounds x = no_bounds();
        if (from + tid < s.q_len) {
            mine = sees(from + tid, first_keys, s.batch, sequence, s.kv_len, s.first_query, s.window);
            x = bounds_of(mine);
        }
        seen[tid] = mine;
        x = join_warp(x);
        if (tid % 32 == 0) parts[tid / 32] = x;
    }
    __syncthreads();
    Bounds all = parts[0];
#pragma unroll
    for (int i = 1; i < ROWS / 32; i++) all = join(all, parts[i]);
    if (tid >= 128) {
        int row = (tid - 128) / 32 * 16 + tid % 32 / 4;
        own[0] = seen[row];
        own[1] = seen[row + 8];
    }
    return all;
}

// Hides the scores of keys that the two rows do not see.
template <int N>
__device__ __forceinline__ void hide_keys(float (&s)[N], int first_key, const int2 (&own)[2]) {
    int key = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (!visible(key + 8 * j + e % 2, own[e / 2])) s[4 * j + e] = -INF_F32;
}
