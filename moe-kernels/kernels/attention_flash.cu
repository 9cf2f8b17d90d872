// Attention of bf16 heads of 64 or 128, or of 192 with values of 128, on Hopper's tensor cores: scores in registers, operands through
// the copy engine.
//
// A block is a producer warpgroup, one thread of which asks the copy engine for tiles, and two consumer warpgroups of 64 rows each.
// Probabilities never leave the registers.

// The consumers take turns in asking for products, so that one forms its softmax while the other multiplies. It pays where that takes
// about as long as the products: with heads of 64.
template <bool ON>
struct Turns {
    int own;

    __device__ __forceinline__ Turns(int group) : own(1 + group) {
        if (group == 0) pass(own);
    }
    __device__ __forceinline__ void begin() {
        if (ON) asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory");
    }
    __device__ __forceinline__ void end() { pass(3 - own); }
    __device__ __forceinline__ void pass(int to) {
        if (ON) asm volatile("bar.arrive %0, 256;" ::"r"(to) : "memory");
    }
};

// ---- forward -------------------------------------------------------------------------------------------------------

constexpr int KEYS = 128;  // keys of a step of the forward

template <int DIM, int V_DIM>
struct ForwardShared {
    char q[ROWS * DIM * 2];
    char k[2][KEYS * DIM * 2];
    char v[2][KEYS * V_DIM * 2];
    u64 q_full;
    Ring<2> k_ring;
    Ring<2> v_ring;
};

// A streaming softmax of two rows.
struct Softmax {
    float max[2];
    float sum[2];

    // Scores to probabilities under the new maximum; what was summed before is to be multiplied by `rescale`.
    template <int N>
    __device__ __forceinline__ void step(float (&s)[N], float scale, float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = max[half];
#pragma unroll
            for (int j = 0; j < N / 4; j++) most = fmaxf(most, fmaxf(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
            most = row_max(most);
            // A query that has seen nothing yet: no difference of infinities is formed.
            float base = most == -INF_F32 ? 0.0f : most * scale;
            rescale[half] = exp2_fast(max[half] * scale - base);
            max[half] = most;
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < N / 4; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[4 * j + 2 * half + e];
                    x = exp2_fast(fmaf(x, scale, -base));
                    total += x;
                }
            sum[half] = sum[half] * rescale[half] + total;
        }
    }
};

template <int DIM, int V_DIM>
__device__ __forceinline__ void forward(bf16* o, i64 o_stride, float* lse, i64 lse_stride, const TensorMap* q,
                                        const TensorMap* k, const TensorMap* v, const int* first_keys, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(ForwardShared<DIM, V_DIM>*)memory;
    int tid = threadIdx.x;
    Task task(blockIdx.x, s.heads, s.batch);
    // The last queries see the most keys: they go first.
    int from = ((s.q_len - 1) / ROWS - task.tile) * ROWS;
    int kv = task.head / (s.heads / s.kv_heads);
    if (tid == 0) {
        barrier_init(&sh.q_full, 1);
        sh.k_ring.init();
        sh.v_ring.init();
        barriers_ready();
    }
    int2 own[2];
    Bounds bounds = look(s, first_keys, task.sequence, from, own);
    int first = bounds.lo < bounds.hi ? bounds.lo / KEYS : 0;
    int steps = bounds.lo < bounds.hi ? (bounds.hi + KEYS - 1) / KEYS - first : 0;

    if (tid < 128) {
        producer_registers();
        if (tid == 0 && steps > 0) {
            barrier_expect(&sh.q_full, sizeof(sh.q));
            copy_tile<ROWS, DIM>(sh.q, q, &sh.q_full, task.head, task.sequence, from);
            for (int n = 0; n < steps; n++) {
                int keys = (first + steps - 1 - n) * KEYS;
                copy_tile<KEYS, DIM>(sh.k[n % 2], k, sh.k_ring.claim(n, sizeof(sh.k[0])), kv, task.sequence, keys);
                copy_tile<KEYS, V_DIM>(sh.v[n % 2], v, sh.v_ring.claim(n, sizeof(sh.v[0])), kv, task.sequence, keys);
            }
        }
        return;
    }
    consumer_registers();
    int group = tid / 128 - 1;
    int row = from + (tid - 128) / 32 * 16 + tid % 32 / 4;
    float out[V_DIM / 2];
#pragma unroll
    for (int i = 0; i < V_DIM / 2; i++) out[i] = 0.0f;
    Turns<V_DIM == 64> turns(group);
    Softmax softmax{{-INF_F32, -INF_F32}, {0.0f, 0.0f}};
    float scale = s.scale * LOG2_E;
    if (steps > 0) {
        float scores[KEYS / 2], rescale[2];
        u32 p[KEYS / 16][4];
        auto mask = [&](int n) {
            int keys = (first + steps - 1 - n) * KEYS;
            if (keys < bounds.all_lo || keys + KEYS > bounds.all_hi) hide_keys(scores, keys, own);
        };
        barrier_wait(&sh.q_full, 0);
        sh.k_ring.wait(0);
        products_begin();
        multiply_transposed<ROWS, KEYS, DIM>(scores, sh.q, group * 64, sh.k[0]);
        products_commit();
        products_wait<0>();
        settle(scores);
        sh.k_ring.release(0);
        mask(0);
        softmax.step(scores, scale, rescale);
        to_operand<KEYS>(p, scores);
        for (int n = 1; n < steps; n++) {
            sh.k_ring.wait(n);
            turns.begin();
            products_begin();
            multiply_transposed<ROWS, KEYS, DIM>(scores, sh.q, group * 64, sh.k[n % 2]);
            products_commit();
            sh.v_ring.wait(n - 1);
            products_begin();
            multiply<KEYS, V_DIM>(out, p, sh.v[(n - 1) % 2]);
            products_commit();
            turns.end();
            products_wait<1>();
            settle(scores);
            sh.k_ring.release(n);
            mask(n);
            softmax.step(scores, scale, rescale);
            products_wait<0>();
            settle(out);
            sh.v_ring.release(n - 1);
            to_operand<KEYS>(p, scores);
#pragma unroll
            for (int i = 0; i < V_DIM / 2; i++) out[i] *= rescale[i / 2 % 2];
        }
        sh.v_ring.wait(steps - 1);
        products_begin();
        multiply<KEYS, V_DIM>(out, p, sh.v[(steps - 1) % 2]);
        products_commit();
        products_wait<0>();
        settle(out);
    }
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = row_sum(softmax.sum[half]);
        factor[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
        int position = row + 8 * half;
        if (tid % 4 == 0 && position < s.q_len) {
            float l = sum == 0.0f ? -INF_F32 : softmax.max[half] * s.scale + logf(sum);
            lse[((i64)position * s.batch + task.sequence) * lse_stride + task.head] = l;
        }
    }
    store<V_DIM>(o, o_stride, s.batch, task.sequence, task.head, row, s.q_len, out, factor);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_forward(bf16* o, i64 o_stride, float* lse, i64 lse_stride, MAP q, MAP k, MAP v, const int* first_keys, SIZES) {
    forward<DIM, V_DIM>(o, o_stride, lse, lse_stride, &q, &k, &v, first_keys, SIZES_OF);
}
