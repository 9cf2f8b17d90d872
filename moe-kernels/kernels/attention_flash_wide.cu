// Backward of attention with heads whose gradients of keys and values the registers do not hold together: of queries, of keys and of values
// in a kernel each, which forms the scores again.

struct QueryGradientShared {
    char q[ROWS * DIM * 2];
    char d_o[ROWS * V_DIM * 2];
    char k[3][STEP * DIM * 2];
    char v[3][STEP * V_DIM * 2];
    u64 q_full;
    Ring<3> ring;
};

// dq = scale · dS k.
__device__ __forceinline__ void query_gradient(bf16* dq, i64 dq_stride, const TensorMap* d_o, const TensorMap* q,
                                               const TensorMap* k, const TensorMap* v, const Statistics* stats,
                                               const int* first_keys, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(QueryGradientShared*)memory;
    int tid = threadIdx.x;
    Task task(blockIdx.x, s.heads, s.batch);
    int from = ((s.q_len - 1) / ROWS - task.tile) * ROWS;
    int kv = task.head / (s.heads / s.kv_heads);
    if (tid == 0) {
        barrier_init(&sh.q_full, 1);
        sh.ring.init();
        barriers_ready();
    }
    int2 own[2];
    Bounds bounds = look(s, first_keys, task.sequence, from, own);
    int first = bounds.lo < bounds.hi ? bounds.lo / STEP : 0;
    int steps = bounds.lo < bounds.hi ? (bounds.hi + STEP - 1) / STEP - first : 0;
    if (tid < 128) {
        producer_registers();
        if (tid == 0 && steps > 0) {
            barrier_expect(&sh.q_full, sizeof(sh.q) + sizeof(sh.d_o));
            copy_tile<ROWS, DIM>(sh.q, q, &sh.q_full, task.head, task.sequence, from);
            copy_tile<ROWS, V_DIM>(sh.d_o, d_o, &sh.q_full, task.head, task.sequence, from);
            for (int n = 0; n < steps; n++) {
                int keys = (first + steps - 1 - n) * STEP;
                u64* full = sh.ring.claim(n, sizeof(sh.k[0]) + sizeof(sh.v[0]));
                copy_tile<STEP, DIM>(sh.k[n % 3], k, full, kv, task.sequence, keys);
                copy_tile<STEP, V_DIM>(sh.v[n % 3], v, full, kv, task.sequence, keys);
            }
        }
        return;
    }
    consumer_registers();
    int group = tid / 128 - 1;
    int in_tile = (tid - 128) / 32 * 16 + tid % 32 / 4;
    float out[DIM / 2], lse[2], delta[2];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) out[i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int query = from + in_tile + 8 * half, blocks = (s.q_len + PANEL - 1) / PANEL;
        const Statistics& at = stats[(task.sequence * s.heads + task.head) * (i64)blocks + min(query / PANEL, blocks - 1)];
        lse[half] = query < s.q_len ? at.lse[query % PANEL] : INF_F32;
        delta[half] = query < s.q_len ? at.delta[query % PANEL] : 0.0f;
    }
    float scale = s.scale * LOG2_E;
    if (steps > 0) {
        float scores[STEP / 2], dp[STEP / 2];
        u32 ds[STEP / 16][4];
        barrier_wait(&sh.q_full, 0);
        sh.ring.wait(0);
        products_begin();
        multiply_transposed<ROWS, STEP, DIM>(scores, sh.q, group * 64, sh.k[0]);
        products_commit();
        products_wait<0>();
        settle(scores);
        for (int n = 0; n < steps; n++) {
            products_begin();
            multiply_transposed<ROWS, STEP, V_DIM>(dp, sh.d_o, group * 64, sh.v[n % 3]);
            products_commit();
            int keys = (first + steps - 1 - n) * STEP;
            if (keys < bounds.all_lo || keys + STEP > bounds.all_hi) hide_keys(scores, keys, own);
#pragma unroll
            for (int i = 0; i < STEP / 2; i++) scores[i] = exp2_fast(fmaf(scores[i], scale, -lse[i / 2 % 2]));
            products_wait<0>();
            settle(dp);
            // dS of a hidden key is 0 whatever its value holds. The key itself meets that 0 in the product, and has to be finite.
#pragma unroll
            for (int i = 0; i < STEP / 2; i++) scores[i] = scores[i] == 0.0f ? 0.0f : scores[i] * (dp[i] - delta[i / 2 % 2]);
            to_operand<STEP>(ds, scores);
            products_begin();
            multiply<STEP, DIM>(out, ds, sh.k[n % 3]);
            products_commit();
            // In the last step the same scores once more, for nothing: a branch here would serialise the products.
            int next = min(n + 1, steps - 1);
            sh.ring.wait(next);
            products_begin();
            multiply_transposed<ROWS, STEP, DIM>(scores, sh.q, group * 64, sh.k[next % 3]);
            products_commit();
            products_wait<0>();
            settle(scores);
            sh.ring.release(n);
        }
        settle(out);
    }
    float factor[2] = {s.scale, s.scale};
    store<DIM>(dq, dq_stride, s.batch, task.sequence, task.head, from + in_tile, s.q_len, out, factor);
}

struct KeyGradientShared {
    char k[ROWS * DIM * 2];
    char v[ROWS * V_DIM * 2];
    char q[2][STEP * DIM * 2];
    char d_o[2][STEP * V_DIM * 2];
    Statistics stats[2];
    u64 k_full;
    Ring<2> ring;
    int first, last;
};

// dk = scale · Σ dSᵀ q over the query heads that read a head of keys.
__device__ __forceinline__ void key_gradient(bf16* dk, i64 dk_stride, const TensorMap* d_o,
                                             const TensorMap* q, const TensorMap* k, const TensorMap* v, const Statistics* stats,
                                             const Bounds* bounds, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(KeyGradientShared*)memory;
    int tid = threadIdx.x;
    Task task(blockIdx.x, s.kv_heads, s.batch);
    int from = task.tile * ROWS, heads = s.heads / s.kv_heads, blocks = (s.q_len + PANEL - 1) / PANEL;
    bounds += (i64)task.sequence * blocks;
    if (tid == 0) {
        barrier_init(&sh.k_full, 1);
        sh.ring.init();
        barriers_ready();
        sh.first = blocks;
        sh.last = -1;
    }
    __syncthreads();
    blocks_that_see(sh.first, sh.last, bounds, blocks, from);
    int first = sh.first, count = max(sh.last - first + 1, 0), steps = count * heads;
    if (tid < 128) {
        producer_registers();
        if (tid == 0 && steps > 0) {
            barrier_expect(&sh.k_full, sizeof(sh.k) + sizeof(sh.v));
            copy_tile<ROWS, DIM>(sh.k, k, &sh.k_full, task.head, task.sequence, from);
            copy_tile<ROWS, V_DIM>(sh.v, v, &sh.k_full, task.head, task.sequence, from);
            for (int n = 0; n < steps; n++) {
                int head = task.head * heads + n / count, block = first + n % count;
                u64* full = sh.ring.claim(n, sizeof(sh.q[0]) + sizeof(sh.d_o[0]) + sizeof(Statistics));
                copy_tile<STEP, DIM>(sh.q[n % 2], q, full, head, task.sequence, block * STEP);
                copy_bytes(&sh.stats[n % 2], &stats[((i64)task.sequence * s.heads + head) * blocks + block],
                           sizeof(Statistics), full);
                copy_tile<STEP, V_DIM>(sh.d_o[n % 2], d_o, full, head, task.sequence, block * STEP);
            }
        }
        return;
    }
    consumer_registers();
    int group = tid / 128 - 1;
    int row = from + (tid - 128) / 32 * 16 + tid % 32 / 4;
    float dk_out[DIM / 2];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) dk_out[i] = 0.0f;
    float scale = s.scale * LOG2_E;
    if (steps > 0) {
        float scores[STEP / 2], dp[STEP / 2];
        u32 ds[STEP / 16][4];
        barrier_wait(&sh.k_full, 0);
        sh.ring.wait(0);
        products_begin();
        multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[0]);
        products_commit();
        products_wait<0>();
        settle(scores);
        for (int n = 0; n < steps; n++) {
            const Statistics& at = sh.stats[n % 2];
            products_begin();
            multiply_transposed<ROWS, STEP, V_DIM>(dp, sh.v, group * 64, sh.d_o[n % 2]);
            products_commit();
            int column = threadIdx.x % 4 * 2;
            exponentials(scores, at, column, scale);
            if (some_hidden(at, from)) hide(scores, at, column, row);
            products_wait<0>();
            settle(dp);
#pragma unroll
            for (int j = 0; j < STEP / 8; j++) {
                float2 delta = *(const float2*)&at.delta[8 * j + column];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float& x = scores[4 * j + e];
                    x = x == 0.0f ? 0.0f : x * (dp[4 * j + e] - (e % 2 ? delta.y : delta.x));
                }
            }
            to_operand<STEP>(ds, scores);
            products_begin();
            multiply<STEP, DIM>(dk_out, ds, sh.q[n % 2]);
            products_commit();
            int next = min(n + 1, steps - 1);
            sh.ring.wait(next);
            products_begin();
            multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[next % 2]);
            products_commit();
            products_wait<0>();
            settle(scores);
            sh.ring.release(n);
        }
        settle(dk_out);
    }
    float factor[2] = {s.scale, s.scale};
    store<DIM>(dk, dk_stride, s.batch, task.sequence, task.head, row, s.kv_len, dk_out, factor);
}

struct ValueGradientShared {
    char k[ROWS * DIM * 2];
    char q[2][STEP * DIM * 2];
    char d_o[2][STEP * V_DIM * 2];
    Statistics stats[2];
    u64 k_full;
    Ring<2> ring;
    int first, last;
};

// dv = Σ Pᵀ d_o over the query heads that read a head of values.
__device__ __forceinline__ void value_gradient(bf16* dv, i64 dv_stride, const TensorMap* d_o, const TensorMap* q, const TensorMap* k,
                                               const Statistics* stats, const Bounds* bounds, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(ValueGradientShared*)memory;
    int tid = threadIdx.x;
    Task task(blockIdx.x, s.kv_heads, s.batch);
    int from = task.tile * ROWS, heads = s.heads / s.kv_heads, blocks = (s.q_len + PANEL - 1) / PANEL;
    bounds += (i64)task.sequence * blocks;
    if (tid == 0) {
        barrier_init(&sh.k_full, 1);
        sh.ring.init();
        barriers_ready();
        sh.first = blocks;
        sh.last = -1;
    }
    __syncthreads();
    blocks_that_see(sh.first, sh.last, bounds, blocks, from);
    int first = sh.first, count = max(sh.last - first + 1, 0), steps = count * heads;
    if (tid < 128) {
        producer_registers();
        if (tid == 0 && steps > 0) {
            barrier_expect(&sh.k_full, sizeof(sh.k));
            copy_tile<ROWS, DIM>(sh.k, k, &sh.k_full, task.head, task.sequence, from);
            for (int n = 0; n < steps; n++) {
                int head = task.head * heads + n / count, block = first + n % count;
                u64* full = sh.ring.claim(n, sizeof(sh.q[0]) + sizeof(sh.d_o[0]) + sizeof(Statistics));
                copy_tile<STEP, DIM>(sh.q[n % 2], q, full, head, task.sequence, block * STEP);
                copy_bytes(&sh.stats[n % 2], &stats[((i64)task.sequence * s.heads + head) * blocks + block],
                           sizeof(Statistics), full);
                copy_tile<STEP, V_DIM>(sh.d_o[n % 2], d_o, full, head, task.sequence, block * STEP);
            }
        }
        return;
    }
    consumer_registers();
    int group = tid / 128 - 1;
    int row = from + (tid - 128) / 32 * 16 + tid % 32 / 4;
    float dv_out[V_DIM / 2];
#pragma unroll
    for (int i = 0; i < V_DIM / 2; i++) dv_out[i] = 0.0f;
    float scale = s.scale * LOG2_E;
    if (steps > 0) {
        float scores[STEP / 2];
        u32 p[STEP / 16][4];
        barrier_wait(&sh.k_full, 0);
        sh.ring.wait(0);
        products_begin();
        multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[0]);
        products_commit();
        products_wait<0>();
        settle(scores);
        for (int n = 0; n < steps; n++) {
            const Statistics& at = sh.stats[n % 2];
            int column = threadIdx.x % 4 * 2;
            exponentials(scores, at, column, scale);
            if (some_hidden(at, from)) hide(scores, at, column, row);
            to_operand<STEP>(p, scores);
            products_begin();
            multiply<STEP, V_DIM>(dv_out, p, sh.d_o[n % 2]);
            products_commit();
            int next = min(n + 1, steps - 1);
            sh.ring.wait(next);
            products_begin();
            multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[next % 2]);
            products_commit();
            products_wait<0>();
            settle(scores);
            sh.ring.release(n);
        }
        settle(dv_out);
    }
    float one[2] = {1.0f, 1.0f};
    store<V_DIM>(dv, dv_stride, s.batch, task.sequence, task.head, row, s.kv_len, dv_out, one);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_backward_q(bf16* dq, i64 dq_stride, MAP d_o, MAP q, MAP k, MAP v, const Statistics* stats, const int* first_keys, SIZES) {
    query_gradient(dq, dq_stride, &d_o, &q, &k, &v, stats, first_keys, SIZES_OF);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_backward_k(bf16* dk, i64 dk_stride, MAP d_o, MAP q, MAP k, MAP v, const Statistics* stats, const Bounds* bounds, SIZES) {
    key_gradient(dk, dk_stride, &d_o, &q, &k, &v, stats, bounds, SIZES_OF);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_backward_v(bf16* dv, i64 dv_stride, MAP d_o, MAP q, MAP k, const Statistics* stats, const Bounds* bounds, SIZES) {
    value_gradient(dv, dv_stride, &d_o, &q, &k, stats, bounds, SIZES_OF);
}
