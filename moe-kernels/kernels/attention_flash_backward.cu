// Backward of attention on Hopper's tensor cores.
//
// A block has a tile of keys and walks the blocks of queries that see it: scores and their gradients are formed once, transposed, in the
// registers of the warpgroup whose keys they are, and go from there into dv and dk. Their product with the keys is the tile's part of dq,
// which the copy engine adds to a sum in float, tile after tile in ascending order, so that two runs give the same bits: a counter for each
// block of queries says whose turn it is. Whoever waits waits for a tile with a lower index, and indices are given out in the order in which
// blocks start, so that tile runs or has run. All tiles walk the queries from the last on, heads innermost: with a causal mask they keep in
// step, and those that end first are the last in the order.

constexpr int ADDERS = 3;  // threads that add parts of dq to the sums, in turn
constexpr int BUFFERS = WIDE ? 1 : 2;  // of dS and of parts of dq

// d = aᵀ b for 16 rows of a [columns 64] and b, both in shared memory with their columns along the panel.
__device__ __forceinline__ void product_step_of_rows(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32 "}, %32, %33, p, 1, 1, 1, 1;\n}\n"
        : D32(0)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void product_step_of_rows(float (&d)[16], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" R16 "}, %16, %17, p, 1, 1, 1, 1;\n}\n"
        : D8(0), D8(8)
        : "l"(a), "l"(b), "r"(add));
}

// d = aᵀ b: a [LEN, 64 columns of a panel], b [LEN, N columns of a panel].
template <int LEN, int N>
__device__ __forceinline__ void multiply_of_rows(float (&d)[N / 2], const char* a, const char* b) {
    Descriptor x(a, 0), y(b, 0);
#pragma unroll
    for (int row = 0; row < LEN; row += 16) product_step_of_rows(d, x + row * 128, y + row * 128, row > 0);
}

struct GradientShared {
    char k[ROWS * DIM * 2];
    char v[ROWS * V_DIM * 2];
    char q[2][STEP * DIM * 2];
    char d_o[2][STEP * V_DIM * 2];
    char ds[BUFFERS][ROWS * STEP * 2];
    float dq[BUFFERS][STEP * DIM];
    Statistics stats[2];
    u64 k_full;
    Ring<2> ring;
    u64 dq_full[ADDERS], dq_free[BUFFERS];
    int first, last, index;
    u64 ds_full, ds_free;  // of WIDE
};

// dSᵀ of a warpgroup for the product with the keys of both, as the copy engine would have placed it.
__device__ __forceinline__ void place_ds(char* tile, const u32 (&ds)[STEP / 16][4], int warp, int lane) {
    char* place = tile + (warp * 16 + lane / 4) * 128 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < STEP / 16; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) *(u32*)(place + e % 2 * 1024 + ((2 * i + e / 2) ^ (lane / 4)) * 16) = ds[i][e];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A panel of a part of dq.
__device__ __forceinline__ void place_panel(float* part, const float (&d)[STEP / 2], int panel) {
    float* to = part + panel * (STEP * PANEL) + threadIdx.x % 128 * 4;
#pragma unroll
    for (int j = 0; j < PANEL / 8; j++) *(float4*)(to + j * 512) = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
}

// The steps of a tile: blocks of queries from the last on, query heads that share the tile's keys innermost.
struct Walk {
    int block, head, heads;

    __device__ __forceinline__ Walk(int last, int heads, int skip) : block(last), head(0), heads(heads) { advance(skip); }
    __device__ __forceinline__ void advance(int steps) {
        for (head += steps; head >= heads; head -= heads) block--;
    }
};

// Waits until a counter has come to `turn`; what the copy engine does from here on comes after what it did for whoever passed the turn.
__device__ __forceinline__ void wait_for_turn(const int* counter, int turn) {
    int now;
    do asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    while (now != turn);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Waits until the copy engine has written, and sets a counter.
__device__ __forceinline__ void pass_turn(int* counter, int turn) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.global;" ::: "memory");
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(counter), "r"(turn) : "memory");
}

// Adds every ADDERS-th part of dq, from number `own` on, to the sums; one thread.
__device__ __forceinline__ void add_parts(GradientShared& sh, float* dq, int* turns, const Bounds* bounds, const Task& task, int own,
                                          int steps, int blocks, const Sizes& s) {
    int from = task.tile * ROWS, heads = s.heads / s.kv_heads;
    Walk walk(sh.last, heads, own);
    for (int n = own; n < steps; n += ADDERS, walk.advance(ADDERS)) {
        i64 place = ((i64)task.sequence * s.heads + task.head * heads + walk.head) * blocks + walk.block;
        Bounds seen = bounds[walk.block];
        bool any = seen.lo < seen.hi && seen.lo < from + ROWS && seen.hi > from;
        int turn = task.tile - seen.lo / ROWS, tile = n % BUFFERS;
        if (any && turn > 0) wait_for_turn(turns + place, turn);
        barrier_wait(&sh.dq_full[own], n / ADDERS & 1);
        if (any) {
            float* to = dq + place * (STEP * DIM);
            if (turn == 0)
                asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(sh.dq[tile])),
                             "r"((int)sizeof(sh.dq[0]))
                             : "memory");
            else
                asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                             "r"(shared_address(sh.dq[tile])), "r"((int)sizeof(sh.dq[0]))
                             : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
        barrier_arrive(&sh.dq_free[tile]);
        if (any) pass_turn(turns + place, turn + 1);
    }
}

// What a warpgroup of WIDE heads does. One tile of 32 registers a thread is all that there is beside dk and dv: P is kept as the operand that
// dv took, and the product for dq of a step waits for the next one. A warpgroup has a panel of it, and every other time the middle one.
//
// Tensor cores, in order: dq of the step before, half of dv, dP, the other half, scores of the next step, dk; meanwhile the probabilities
// of the next step are made. `dk_out` and `dv_out` are whole when it returns.
__device__ __forceinline__ void gradients_of_wide(float (&dk_out)[DIM / 2], float (&dv_out)[V_DIM / 2], GradientShared& sh, int from, int row,
                                                  int steps, float scale) {
    int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32, warp = (threadIdx.x - 128) / 32, column = lane % 4 * 2;
    float scores[STEP / 2];
    u32 p[STEP / 16][4];  // dS takes the place of P
    auto probabilities = [&](const Statistics& at) {
        exponentials(scores, at, column, scale);
        if (some_hidden(at, from)) hide(scores, at, column, row);
        products_wait<0>();
        to_operand<STEP>(p, scores);
    };
    auto keys_of = [&](int panel) { return sh.k + panel * (ROWS * 128); };
    // The warpgroup's last panel of the part of step `n`, if it has one; nothing is to be in flight.
    auto middle = [&](int n) {
        if ((n + group) % 2 != 0) {
            float part[PANEL / 2];
            products_begin();
            multiply_of_rows<ROWS, PANEL>(part, sh.ds[0], keys_of(1));
            products_commit();
            products_wait<0>();
            settle(part);
            place_panel(sh.dq[0], part, 1);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&sh.ds_free);
            if (n >= 0) barrier_arrive(&sh.dq_full[n % ADDERS]);
        }
    };
    sh.ring.wait(0);
    products_begin();
    multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[0]);
    products_commit();
    products_wait<0>();
    settle(scores);
    probabilities(sh.stats[0]);
    for (int n = 0; n < steps; n++) {
        const Statistics& at = sh.stats[n % 2];
        {
            // Before the first step it is the product of whatever lies there, which goes nowhere: a branch would serialise the products.
            float part[PANEL / 2];
            barrier_wait(&sh.ds_full, (n + 1) & 1);
            products_begin();
            multiply_of_rows<ROWS, PANEL>(part, sh.ds[0], keys_of(group * 2));
            products_commit();
            multiply<STEP, V_DIM, 0, 32>(dv_out, p, sh.d_o[n % 2]);
            products_commit();
            products_wait<1>();
            settle(part);
            barrier_wait(&sh.dq_free[0], (max(n - 1, 0) + 1) & 1);
            place_panel(sh.dq[0], part, group * 2);
            products_wait<0>();
            middle(n - 1);
        }
        {
            float dp[STEP / 2];
            products_begin();
            multiply_transposed<ROWS, STEP, V_DIM>(dp, sh.v, group * 64, sh.d_o[n % 2]);
            products_commit();
            multiply<STEP, V_DIM, 32, 64>(dv_out, p, sh.d_o[n % 2]);
            products_commit();
            products_wait<1>();
            settle(dp);
            // dS of a hidden key is 0 whatever its value holds. The key itself meets that 0 in the product for dq, and has to be finite.
            bool hidden = some_hidden(at, from);
#pragma unroll
            for (int j = 0; j < STEP / 8; j++) {
                if (j == STEP / 16) products_wait<0>();
                float2 delta = *(const float2*)&at.delta[8 * j + column];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    u32& pair = p[j / 2][j % 2 * 2 + e];
                    float p0 = __uint_as_float(pair << 16), p1 = __uint_as_float(pair & 0xffff0000u);
                    float a = p0 * (dp[4 * j + 2 * e] - delta.x), b = p1 * (dp[4 * j + 2 * e + 1] - delta.y);
                    if (hidden) {
                        a = p0 == 0.0f ? 0.0f : a;
                        b = p1 == 0.0f ? 0.0f : b;
                    }
                    pair = pack(a, b);
                }
            }
        }
        // In the last step the same scores once more, for nothing.
        int next = min(n + 1, steps - 1);
        sh.ring.wait(next);
        products_begin();
        multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[next % 2]);
        products_commit();
        multiply<STEP, DIM>(dk_out, p, sh.q[n % 2]);
        products_commit();
        barrier_wait(&sh.ds_free, n & 1);
        place_ds(sh.ds[0], p, warp, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(&sh.ds_full);
        products_wait<1>();
        settle(scores);
        probabilities(sh.stats[next % 2]);
        sh.ring.release(n);
    }
    float part[PANEL / 2];
    barrier_wait(&sh.ds_full, (steps + 1) & 1);
    products_begin();
    multiply_of_rows<ROWS, PANEL>(part, sh.ds[0], keys_of(group * 2));
    products_commit();
    products_wait<0>();
    settle(part);
    barrier_wait(&sh.dq_free[0], steps & 1);
    place_panel(sh.dq[0], part, group * 2);
    middle(steps - 1);
    settle(dk_out);
    settle(dv_out);
}

// dk = scale · Σ dSᵀ q and dv = Σ Pᵀ d_o over the query heads that read a head of keys and values; the sums dq / scale
// [batch, heads, blocks of 64 queries], each as the accumulators of its products lie: [PARTS][columns / 8][thread][4].
template <int WHOLE, int HALF>
__device__ __forceinline__ void gradient(bf16* dk, i64 dk_stride, bf16* dv, i64 dv_stride, float* dq, int* turns, const TensorMap* d_o,
                                         const TensorMap* q, const TensorMap* k, const TensorMap* v, const Statistics* stats,
                                         const Bounds* bounds, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(GradientShared*)memory;
    int tid = threadIdx.x, heads = s.heads / s.kv_heads, blocks = (s.q_len + PANEL - 1) / PANEL;
    if (tid == 0) {
        int index = atomicAdd(turns, 1);
        barrier_init(&sh.k_full, 1);
        sh.ring.init();
        for (int i = 0; i < ADDERS; i++) barrier_init(&sh.dq_full[i], CONSUMERS * 4);
        for (int i = 0; i < BUFFERS; i++) barrier_init(&sh.dq_free[i], 1);
        if (WIDE) {
            barrier_init(&sh.ds_full, CONSUMERS * 4);
            barrier_init(&sh.ds_free, CONSUMERS * 4);
        }
        barriers_ready();
        sh.first = blocks;
        sh.last = -1;
        sh.index = index;
    }
    turns += 1;
    __syncthreads();
    Task task(sh.index, s.kv_heads, s.batch);
    int from = task.tile * ROWS;
    if (tid == 0) {
        barrier_expect(&sh.k_full, sizeof(sh.k) + sizeof(sh.v));
        copy_tile<ROWS, DIM>(sh.k, k, &sh.k_full, task.head, task.sequence, from);
        copy_tile<ROWS, V_DIM>(sh.v, v, &sh.k_full, task.head, task.sequence, from);
    }
    bounds += (i64)task.sequence * blocks;
    blocks_that_see(sh.first, sh.last, bounds, blocks, from);
    int steps = max(sh.last - sh.first + 1, 0) * heads;
    if (tid < 128) {
        producer_registers();
        if (tid == 0) {
            Walk walk(sh.last, heads, 0);
            for (int n = 0; n < steps; n++, walk.advance(1)) {
                int head = task.head * heads + walk.head, block = walk.block;
                u64* full = sh.ring.claim(n, sizeof(sh.q[0]) + sizeof(sh.d_o[0]) + sizeof(Statistics));
                copy_tile<STEP, DIM>(sh.q[n % 2], q, full, head, task.sequence, block * STEP);
                copy_bytes(&sh.stats[n % 2], &stats[((i64)task.sequence * s.heads + head) * blocks + block], sizeof(Statistics), full);
                copy_tile<STEP, V_DIM>(sh.d_o[n % 2], d_o, full, head, task.sequence, block * STEP);
            }
        } else if (tid % 32 == 0) {
            add_parts(sh, dq, turns, bounds, task, tid / 32 - 1, steps, blocks, s);
        }
        return;
    }
    consumer_registers();
    int group = tid / 128 - 1, lane = tid % 32, warp = (tid - 128) / 32;
    int row = from + warp * 16 + lane / 4, column = lane % 4 * 2;
    float dk_out[DIM / 2], dv_out[V_DIM / 2];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) dk_out[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < V_DIM / 2; i++) dv_out[i] = 0.0f;
    float scale = s.scale * LOG2_E;
    barrier_wait(&sh.k_full, 0);
    if constexpr (WIDE) {
        if (steps > 0) gradients_of_wide(dk_out, dv_out, sh, from, row, steps, scale);
    } else if (steps > 0) {
        float scores[STEP / 2], dp[STEP / 2];
        u32 p[STEP / 16][4], ds[STEP / 16][4];
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
            exponentials(scores, at, column, scale);
            bool hidden = from < at.all.all_lo || from + ROWS > at.all.all_hi;
            if (hidden) hide(scores, at, column, row);
            to_operand<STEP>(p, scores);
            products_begin();
            multiply<STEP, V_DIM>(dv_out, p, sh.d_o[n % 2]);
            products_commit();
            products_wait<1>();
            settle(dp);
#pragma unroll
            for (int j = 0; j < STEP / 8; j++) {
                float2 delta = *(const float2*)&at.delta[8 * j + column];
#pragma unroll
                for (int e = 0; e < 4; e++) dp[4 * j + e] -= e % 2 ? delta.y : delta.x;
            }
            // dS of a hidden key is 0 whatever its value holds. The key itself meets that 0 in the product for dq, and has to be finite.
            if (hidden) {
#pragma unroll
                for (int i = 0; i < STEP / 2; i++) dp[i] = scores[i] == 0.0f ? 0.0f : dp[i];
            }
#pragma unroll
            for (int i = 0; i < STEP / 2; i++) scores[i] *= dp[i];
            to_operand<STEP>(ds, scores);
            products_begin();
            multiply<STEP, DIM>(dk_out, ds, sh.q[n % 2]);
            products_commit();
            char* tile = sh.ds[n % BUFFERS];
            place_ds(tile, ds, warp, lane);
            products_wait<1>();
            asm volatile("bar.sync 1, 256;" ::: "memory");
            float part[WHOLE > 0 ? WHOLE / 2 : 1], half[HALF > 0 ? HALF / 2 : 1];
            products_begin();
            if constexpr (WHOLE > 0) multiply_of_rows<ROWS, WHOLE>(part, tile, sh.k + group * (DIM / PANEL - 1) * (ROWS * 128));
            if constexpr (HALF > 0) multiply_of_rows<ROWS, HALF>(half, tile, sh.k + WHOLE / PANEL * (ROWS * 128) + group * 64);
            products_commit();
            // In the last step the same scores once more, for nothing: a branch here would serialise the products.
            int next = min(n + 1, steps - 1);
            sh.ring.wait(next);
            products_begin();
            multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[next % 2]);
            products_commit();
            products_wait<1>();
            if constexpr (WHOLE > 0) settle(part);
            if constexpr (HALF > 0) settle(half);
            sh.ring.release(n);
            barrier_wait(&sh.dq_free[n % BUFFERS], (n / 2 + 1) & 1);
            float* to = sh.dq[n % BUFFERS] + group * (STEP * DIM / 2) + tid % 128 * 4;
#pragma unroll
            for (int j = 0; j < DIM / 16; j++) {
                const float* from = j < WHOLE / 8 ? part + 4 * j : half + 4 * j - WHOLE / 2;
                *(float4*)(to + j * 512) = make_float4(from[0], from[1], from[2], from[3]);
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (lane == 0) barrier_arrive(&sh.dq_full[n % ADDERS]);
            products_wait<0>();
            settle(scores);
        }
        settle(dk_out);
        settle(dv_out);
    }
    float one[2] = {1.0f, 1.0f}, factor[2] = {s.scale, s.scale};
    store<DIM>(dk, dk_stride, s.batch, task.sequence, task.head, row, s.kv_len, dk_out, factor);
    store<V_DIM>(dv, dv_stride, s.batch, task.sequence, task.head, row, s.kv_len, dv_out, one);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_backward(bf16* dk, i64 dk_stride, bf16* dv, i64 dv_stride, float* dq, int* turns, MAP d_o, MAP q, MAP k, MAP v,
               const Statistics* stats, const Bounds* bounds, SIZES) {
    gradient<WHOLE, HALF>(dk, dk_stride, dv, dv_stride, dq, turns, &d_o, &q, &k, &v, stats, bounds, SIZES_OF);
}

extern "C" __global__ void __launch_bounds__(256)
flash_backward_q(bf16* dq, i64 dq_stride, const float* sums, const Bounds* bounds, SIZES) {
    finish(dq, dq_stride, sums, bounds, SIZES_OF);
}
