// What the backward of attention does with every block of queries of every head: before the gradients, and after.

constexpr int STEP = 64;  // queries of a block, which are a step of the gradients

// What the backward needs to know of 64 queries of one head. Hidden queries, and those past the last, have lse = ∞ and see nothing.
struct Statistics {
    float lse[PANEL];  // times log2 e
    float delta[PANEL];
    int lo[PANEL];
    int hi[PANEL];
    Bounds all;  // of the block's queries
};

// Statistics [batch, heads, blocks of 64 queries]; the bounds [batch, blocks] of what they see. A block of 256 threads each, heads fastest:
// side by side in memory.
__device__ __forceinline__ void statistics(Statistics* stats, Bounds* bounds, const bf16* d_o, i64 d_o_stride, const bf16* o,
                                           i64 o_stride, const float* lse, i64 lse_stride, const int* first_keys,
                                           const Sizes& s) {
    constexpr int LANES = V_DIM / 8, QUERIES = 256 / LANES, TIMES = PANEL / QUERIES;  // threads of a query, queries at once, how often
    int blocks = (s.q_len + PANEL - 1) / PANEL, tid = threadIdx.x;
    Task task(blockIdx.x, s.heads, s.batch);
    Statistics& to = stats[((i64)task.sequence * s.heads + task.head) * blocks + task.tile];
    uint4 a[TIMES], b[TIMES];
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        int query = task.tile * PANEL + i * QUERIES + tid / LANES;
        i64 row = (i64)query * s.batch + task.sequence;
        a[i] = b[i] = make_uint4(0, 0, 0, 0);
        if (query < s.q_len) {
            a[i] = ((const uint4*)(d_o + row * d_o_stride + task.head * V_DIM))[tid % LANES];
            b[i] = ((const uint4*)(o + row * o_stride + task.head * V_DIM))[tid % LANES];
        }
    }
#pragma unroll
    for (int i = 0; i < TIMES; i++) {
        const u32* a4 = &a[i].x;
        const u32* b4 = &b[i].x;
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            sum += __uint_as_float(a4[e] << 16) * __uint_as_float(b4[e] << 16);
            sum += __uint_as_float(a4[e] & 0xffff0000u) * __uint_as_float(b4[e] & 0xffff0000u);
        }
#pragma unroll
        for (int lane = LANES / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(FULL_MASK, sum, lane);
        if (tid % LANES == 0) to.delta[i * QUERIES + tid / LANES] = sum;
    }
    __shared__ Bounds parts[PANEL / 32];
    if (tid < PANEL) {
        int query = task.tile * PANEL + tid;
        bool inside = query < s.q_len, any = false;
        float l = INF_F32;
        int2 seen = make_int2(0, 0);
        if (inside) {
            seen = sees(query, first_keys, s.batch, task.sequence, s.kv_len, s.first_query, s.window);
            l = lse[((i64)query * s.batch + task.sequence) * lse_stride + task.head];
            any = l != -INF_F32 && seen.x < seen.y;
        }
        to.lse[tid] = any ? l * LOG2_E : INF_F32;
        to.lo[tid] = any ? seen.x : 0;
        to.hi[tid] = any ? seen.y : 0;
        Bounds x = join_warp(inside ? bounds_of(seen) : no_bounds());
        if (tid % 32 == 0) parts[tid / 32] = x;
    }
    __syncthreads();
    if (tid == 0) {
        Bounds x = join(parts[0], parts[1]);
        to.all = x;
        if (task.head == 0) bounds[(i64)task.sequence * blocks + task.tile] = x;
    }
}

extern "C" __global__ void __launch_bounds__(256)
flash_statistics(Statistics* stats, Bounds* bounds, const bf16* d_o, i64 d_o_stride, const bf16* o, i64 o_stride, const float* lse,
                 i64 lse_stride, const int* first_keys, SIZES) {
    statistics(stats, bounds, d_o, d_o_stride, o, o_stride, lse, lse_stride, first_keys, SIZES_OF);
}

// Heads whose gradients of keys and values leave room for one tile of scores in registers, not for that and its gradient.
constexpr bool WIDE = DIM + V_DIM > 256;
// Products that dq of a block of queries is made of, and the columns of one: a panel, or half of one.
constexpr int PARTS = WIDE ? DIM / PANEL : CONSUMERS, WHOLE = DIM / PANEL / PARTS * PANEL, HALF = DIM / PARTS - WHOLE;

// Where column 8 j of a part of dq lies.
__device__ __forceinline__ int dq_column(int part, int j) {
    return j < WHOLE / 8 ? part * ((DIM - WHOLE) / (PARTS - 1)) + 8 * j : (WHOLE + part * HALF) + 8 * j - WHOLE;
}

// dq rounded, from the sums: a block of 256 threads for each block of queries of each head, heads fastest.
__device__ __forceinline__ void finish(bf16* dq, i64 stride, const float* sums, const Bounds* bounds, const Sizes& s) {
    int blocks = (s.q_len + PANEL - 1) / PANEL;
    Task task(blockIdx.x, s.heads, s.batch);
    Bounds seen = bounds[(i64)task.sequence * blocks + task.tile];
    sums += (((i64)task.sequence * s.heads + task.head) * blocks + task.tile) * (STEP * DIM);
    // Eight columns of rows `row` and `row` + 8 are the accumulators of four threads side by side.
#pragma unroll
    for (int i = threadIdx.x; i < STEP / 2 * (DIM / 8); i += 256) {
        int columns = i % (DIM / 8), pair = i / (DIM / 8), part = columns / (DIM / 8 / PARTS), j = columns % (DIM / 8 / PARTS);
        int query = task.tile * PANEL + pair / 8 * 16 + pair % 8;
        const float4* from = (const float4*)(sums + part * (STEP * DIM / PARTS) + j * 512 + pair * 16);
        uint4 rows[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
        if (seen.lo < seen.hi) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float4 x = from[e];
                (&rows[0].x)[e] = pack(x.x * s.scale, x.y * s.scale);
                (&rows[1].x)[e] = pack(x.z * s.scale, x.w * s.scale);
            }
        }
        bf16* to = dq + ((i64)query * s.batch + task.sequence) * stride + task.head * DIM + dq_column(part, j);
        if (query < s.q_len) *(uint4*)to = rows[0];
        if (query + 8 < s.q_len) *(uint4*)(to + 8 * stride * s.batch) = rows[1];
    }
}
