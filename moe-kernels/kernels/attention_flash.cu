// Attention of bf16 heads of 64 or 128, or of 192 with values of 128, on Hopper's tensor cores: scores in registers, operands through
// the copy engine.
//
// Forward, dq, and dk with dv are a kernel each. A block is a producer warpgroup, one thread of which asks the copy engine for
// tiles, and two consumer warpgroups of 64 rows each. Every product has its left operand in shared memory or in the registers
// that hold the scores, so probabilities never leave the registers; the backward forms the scores twice, and needs no atomics.
//
// A matrix [len · batch, heads · dim] is a tensor of four dimensions (column, position, head, sequence) to the copy engine; a copy
// is a panel of 64 positions by 64 columns, 128 bytes a row, swizzled by 128 bytes; panels of more positions stack. What lies
// past the last position reads as 0.

struct __align__(64) TensorMap {
    u64 opaque[16];
};

constexpr int PANEL = 64;                    // positions and columns of a copy
constexpr int PANEL_BYTES = PANEL * PANEL * 2;
constexpr int CONSUMERS = 2;                 // warpgroups
constexpr int ROWS = CONSUMERS * 64;         // rows of a block's result
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr float LOG2_E = 1.44269504088896340736f;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- barriers of the copy engine -----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u64* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u64* bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(shared_address(bar)),
        "r"(parity)
        : "memory");
}

// One panel: 64 columns of `head` from `column` on, 64 positions of `sequence` from `position` on.
__device__ __forceinline__ void copy_panel(void* to, const TensorMap* map, u64* bar, int column, int head,
                                           int sequence, int position) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(column), "r"(position), "r"(head), "r"(sequence), "r"(shared_address(bar))
        : "memory");
}

// `bytes` (a multiple of 16) that lie one after the other.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
}

// A tile of LEN positions and DIM columns: DIM/64 panels of LEN rows.
template <int LEN, int DIM>
__device__ __forceinline__ void copy_tile(char* to, const TensorMap* map, u64* bar, int head, int sequence,
                                          int position) {
#pragma unroll
    for (int column = 0; column < DIM; column += PANEL)
#pragma unroll
        for (int row = 0; row < LEN; row += PANEL)
            copy_panel(to + (column / PANEL * (LEN / PANEL) + row / PANEL) * PANEL_BYTES, map, bar, column, head, sequence,
                       position + row);
}

// ---- warpgroup products --------------------------------------------------------------------------------------------

// What a product reads of shared memory (PTX ISA, matrix descriptor): address, distance of panels, distance of 8 rows (1024
// bytes), swizzle of 128 bytes.
__device__ __forceinline__ u64 descriptor(const char* at, int panel_bytes) {
    u64 address = (shared_address(at) & 0x3ffff) >> 4;
    return address | (u64)(panel_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of an accumulator before the wait for it.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define R96 R64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"

// d (+)= a bᵀ for 16 columns of a [64 rows] and b [N rows], both in shared memory with their columns along the panel.
__device__ __forceinline__ void product_step(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : D32(0)
        : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void product_step(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : D32(0), D32(32)
        : "l"(a), "l"(b), "r"(add));
}

// d += a b for 16 columns of a, in registers, and 16 rows of b, in shared memory with its columns along the panel.
__device__ __forceinline__ void product_step(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
                 : D32(0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void product_step(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                 : D32(0), D32(32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void product_step(float (&d)[96], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" R96 "}, {%96,%97,%98,%99}, %100, 1, 1, 1, 1;\n"
                 : D32(0), D32(32), D32(64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// d = a bᵀ: 64 rows of a tile of A_LEN rows, from `row` on, by a tile of B_LEN rows; DIM columns.
template <int A_LEN, int B_LEN, int DIM>
__device__ __forceinline__ void multiply_transposed(float (&d)[B_LEN / 2], const char* a, int row, const char* b) {
#pragma unroll
    for (int column = 0; column < DIM; column += 16) {
        const char* x = a + column / PANEL * (A_LEN * 128) + row * 128 + column % PANEL * 2;
        const char* y = b + column / PANEL * (B_LEN * 128) + column % PANEL * 2;
        product_step(d, descriptor(x, 0), descriptor(y, 0), column > 0);
    }
}

// d += a b: a in registers, b a tile of LEN rows and DIM columns.
template <int LEN, int DIM>
__device__ __forceinline__ void multiply(float (&d)[DIM / 2], const u32 (&a)[LEN / 16][4], const char* b) {
#pragma unroll
    for (int row = 0; row < LEN; row += 16) product_step(d, a[row / 16], descriptor(b + row * 128, LEN * 128));
}

// Two neighbours as bf16.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Accumulators [64, LEN] as the left operand of a product. Thread t of a warpgroup has rows 16 (t / 32) + t % 32 / 4 and 8 more,
// columns 8 j + 2 (t % 4) and 1 more: elements 4 j to 4 j + 3, row by row.
template <int LEN>
__device__ __forceinline__ void to_operand(u32 (&a)[LEN / 16][4], const float (&d)[LEN / 2]) {
#pragma unroll
    for (int i = 0; i < LEN / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) a[i][j] = pack(d[8 * i + 2 * j], d[8 * i + 2 * j + 1]);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Maxima and sums over the four threads of a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

// ---- who sees what ---------------------------------------------------------------------------------------------------

// Keys [lo, hi) that a query sees; `window` as in attention.cu.
__device__ __forceinline__ int2 sees(int query, const int* first_keys, int batch, int sequence, int kv_len, i64 first_query,
                                     i64 window) {
    i64 start = 0, end = kv_len;
    if (window > 0) {
        end = first_query + query + 1;
        start = end > window ? end - window : 0;
        end = end < kv_len ? end : kv_len;
    }
    if (first_keys != nullptr) {
        i64 first = first_keys[(i64)query * batch + sequence];
        start = first > start ? first : start;
    }
    return make_int2((int)(start < end ? start : end), (int)end);
}

// What a set of queries sees together: keys outside [lo, hi) no query sees, keys in [all_lo, all_hi) every query does.
struct Bounds {
    int lo, hi, all_lo, all_hi;
};

__device__ __forceinline__ Bounds no_bounds() { return {0x7fffffff, 0, 0, 0x7fffffff}; }

__device__ __forceinline__ Bounds join(Bounds a, Bounds b) {
    return {min(a.lo, b.lo), max(a.hi, b.hi), max(a.all_lo, b.all_lo), min(a.all_hi, b.all_hi)};
}

__device__ __forceinline__ Bounds bounds_of(int2 seen) {
    bool any = seen.x < seen.y;
    return {any ? seen.x : 0x7fffffff, any ? seen.y : 0, any ? seen.x : 0x7fffffff, any ? seen.y : 0};
}

__device__ __forceinline__ Bounds join_warp(Bounds x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2)
        x = join(x, Bounds{__shfl_xor_sync(FULL_MASK, x.lo, lane), __shfl_xor_sync(FULL_MASK, x.hi, lane),
                           __shfl_xor_sync(FULL_MASK, x.all_lo, lane), __shfl_xor_sync(FULL_MASK, x.all_hi, lane)});
    return x;
}

// The sizes of a call.
struct Sizes {
    int batch, q_len, kv_len, heads, kv_heads;
    i64 first_query, window;
    float scale;
};

// Which tile of which head of which sequence a block works on: heads fastest, so that blocks side by side share keys.
struct Task {
    int tile, head, sequence;

    __device__ __forceinline__ Task(int heads, int batch) {
        int all = heads * batch;
        tile = blockIdx.x / all;
        int rest = blockIdx.x % all;
        head = rest % heads;
        sequence = rest / heads;
    }
};

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

// Whether `key` is one of those that `seen` names.
__device__ __forceinline__ bool visible(int key, int2 seen) { return (u32)(key - seen.x) < (u32)(seen.y - seen.x); }

// Registers of the producer and of a consumer thread: 24 · 128 + 240 · 256 = 64,512 of 65,536.
__device__ __forceinline__ void producer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ __forceinline__ void consumer_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }

// The barriers of a ring of STAGES tiles.
template <int STAGES>
struct Ring {
    u64 full[STAGES];
    u64 free[STAGES];

    __device__ __forceinline__ void init() {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&free[i], CONSUMERS * 4);
        }
    }
    // The producer's: waits until tile number `n` may be written, announces `bytes`.
    __device__ __forceinline__ u64* claim(int n, int bytes) {
        barrier_wait(&free[n % STAGES], (n / STAGES + 1) & 1);
        barrier_expect(&full[n % STAGES], bytes);
        return &full[n % STAGES];
    }
    // The consumers': waits for tile number `n`; gives it back, a warp at a time.
    __device__ __forceinline__ void wait(int n) { barrier_wait(&full[n % STAGES], n / STAGES & 1); }
    __device__ __forceinline__ void release(int n) {
        if (threadIdx.x % 32 == 0) barrier_arrive(&free[n % STAGES]);
    }
};

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

__device__ __forceinline__ void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Writes a warpgroup's 64 rows of DIM columns, each times its factor. `row` is the first of the thread's two rows.
template <int DIM>
__device__ __forceinline__ void store(bf16* m, i64 stride, int batch, int sequence, int head, int row, int len,
                                      const float (&d)[DIM / 2], const float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int position = row + 8 * half;
        if (position >= len) continue;
        bf16* at = m + ((i64)position * batch + sequence) * stride + head * DIM + threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++)
            *(u32*)(at + 8 * j) = pack(d[4 * j + 2 * half] * factor[half], d[4 * j + 2 * half + 1] * factor[half]);
    }
}

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

// Hides the scores of keys that the two rows do not see.
template <int N>
__device__ __forceinline__ void hide(float (&s)[N], int first_key, const int2 (&own)[2]) {
    int key = first_key + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < N / 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (!visible(key + 8 * j + e % 2, own[e / 2])) s[4 * j + e] = -INF_F32;
}

template <int DIM, int V_DIM>
__device__ __forceinline__ void forward(bf16* o, i64 o_stride, float* lse, i64 lse_stride, const TensorMap* q,
                                        const TensorMap* k, const TensorMap* v, const int* first_keys, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(ForwardShared<DIM, V_DIM>*)memory;
    int tid = threadIdx.x;
    Task task(s.heads, s.batch);
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
            if (keys < bounds.all_lo || keys + KEYS > bounds.all_hi) hide(scores, keys, own);
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

// ---- backward ------------------------------------------------------------------------------------------------------

// What the backward needs to know of 64 queries of one head. Hidden queries, and those past the last, have lse = ∞ and see nothing.
struct Statistics {
    float lse[PANEL];  // times log2 e
    float delta[PANEL];
    int lo[PANEL];
    int hi[PANEL];
};

// Statistics [batch, heads, blocks of 64 queries]; the bounds [batch, blocks] of what they see. A block of 256 threads each,
// four threads a query.
template <int V_DIM>
__device__ __forceinline__ void statistics(Statistics* stats, Bounds* bounds, const bf16* d_o, i64 d_o_stride, const bf16* o,
                                           i64 o_stride, const float* lse, i64 lse_stride, const int* first_keys,
                                           const Sizes& s) {
    int blocks = (s.q_len + PANEL - 1) / PANEL;
    int block = blockIdx.x % blocks, head = blockIdx.x / blocks % s.heads, sequence = blockIdx.x / blocks / s.heads;
    int in_block = threadIdx.x / 4, part = threadIdx.x % 4, query = block * PANEL + in_block;
    bool inside = query < s.q_len;
    i64 row = (i64)query * s.batch + sequence;
    float sum = 0.0f;
    if (inside) {
        const uint4* x = (const uint4*)(d_o + row * d_o_stride + head * V_DIM);
        const uint4* y = (const uint4*)(o + row * o_stride + head * V_DIM);
#pragma unroll
        for (int i = part; i < V_DIM / 8; i += 4) {
            uint4 a = x[i], b = y[i];
            const u32* a4 = &a.x;
            const u32* b4 = &b.x;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sum += __uint_as_float(a4[e] << 16) * __uint_as_float(b4[e] << 16);
                sum += __uint_as_float(a4[e] & 0xffff0000u) * __uint_as_float(b4[e] & 0xffff0000u);
            }
        }
    }
    sum = row_sum(sum);
    int2 seen = make_int2(0, 0);
    if (inside) seen = sees(query, first_keys, s.batch, sequence, s.kv_len, s.first_query, s.window);
    if (part == 0) {
        Statistics& to = stats[blockIdx.x];
        float l = inside ? lse[row * lse_stride + head] : -INF_F32;
        bool any = l != -INF_F32 && seen.x < seen.y;
        to.lse[in_block] = any ? l * LOG2_E : INF_F32;
        to.delta[in_block] = sum;
        to.lo[in_block] = any ? seen.x : 0;
        to.hi[in_block] = any ? seen.y : 0;
    }
    if (head == 0) {
        __shared__ Bounds parts[8];
        Bounds x = join_warp(inside ? bounds_of(seen) : no_bounds());
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < 8; i++) x = join(x, parts[i]);
            bounds[(i64)sequence * blocks + block] = x;
        }
    }
}

constexpr int STEP = 64;  // keys, or queries, of a step of the backward

template <int DIM, int V_DIM>
struct QueryGradientShared {
    char q[ROWS * DIM * 2];
    char d_o[ROWS * V_DIM * 2];
    char k[3][STEP * DIM * 2];
    char v[3][STEP * V_DIM * 2];
    u64 q_full;
    Ring<3> ring;
};

// dq = scale · dS k.
template <int DIM, int V_DIM>
__device__ __forceinline__ void query_gradient(bf16* dq, i64 dq_stride, const TensorMap* d_o, const TensorMap* q,
                                               const TensorMap* k, const TensorMap* v, const Statistics* stats,
                                               const int* first_keys, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(QueryGradientShared<DIM, V_DIM>*)memory;
    int tid = threadIdx.x;
    Task task(s.heads, s.batch);
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
            if (keys < bounds.all_lo || keys + STEP > bounds.all_hi) hide(scores, keys, own);
#pragma unroll
            for (int i = 0; i < STEP / 2; i++) scores[i] = exp2_fast(fmaf(scores[i], scale, -lse[i / 2 % 2]));
            products_wait<0>();
            settle(dp);
            // A key that is hidden may hold anything, also what is no number.
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

template <int DIM, int V_DIM>
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

// dk = scale · Σ dSᵀ q, dv = Σ Pᵀ d_o over the query heads that read a head of keys and values; both, or one of them where the
// registers do not hold both.
template <int DIM, int V_DIM, bool OF_K, bool OF_V>
__device__ __forceinline__ void key_gradient(bf16* dk, i64 dk_stride, bf16* dv, i64 dv_stride, const TensorMap* d_o,
                                             const TensorMap* q, const TensorMap* k, const TensorMap* v, const Statistics* stats,
                                             const Bounds* bounds, const Sizes& s) {
    extern __shared__ __align__(1024) char memory[];
    auto& sh = *(KeyGradientShared<DIM, V_DIM>*)memory;
    int tid = threadIdx.x;
    Task task(s.kv_heads, s.batch);
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
    // The first and the last block of queries that see any of these keys.
    for (int block = tid; block < blocks; block += THREADS) {
        Bounds x = bounds[block];
        if (x.lo < x.hi && x.lo < from + ROWS && x.hi > from) {
            atomicMin(&sh.first, block);
            atomicMax(&sh.last, block);
        }
    }
    __syncthreads();
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
    float dk_out[DIM / 2], dv_out[V_DIM / 2];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) dk_out[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < V_DIM / 2; i++) dv_out[i] = 0.0f;
    float scale = s.scale * LOG2_E;
    if (steps > 0) {
        float scores[STEP / 2], dp[STEP / 2];
        u32 p[STEP / 16][4], ds[STEP / 16][4];
        barrier_wait(&sh.k_full, 0);
        sh.ring.wait(0);
        products_begin();
        multiply_transposed<ROWS, STEP, DIM>(scores, sh.k, group * 64, sh.q[0]);
        products_commit();
        products_wait<0>();
        settle(scores);
        for (int n = 0; n < steps; n++) {
            const Statistics& at = sh.stats[n % 2];
            if (OF_K) {
                products_begin();
                multiply_transposed<ROWS, STEP, V_DIM>(dp, sh.v, group * 64, sh.d_o[n % 2]);
                products_commit();
            }
            Bounds seen = bounds[first + n % count];
            int column = threadIdx.x % 4 * 2;
#pragma unroll
            for (int j = 0; j < STEP / 8; j++) {
                float2 lse = *(const float2*)&at.lse[8 * j + column];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    scores[4 * j + e] = exp2_fast(fmaf(scores[4 * j + e], scale, -(e % 2 ? lse.y : lse.x)));
            }
            if (from < seen.all_lo || from + ROWS > seen.all_hi) {
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
            if (OF_V) {
                to_operand<STEP>(p, scores);
                products_begin();
                multiply<STEP, V_DIM>(dv_out, p, sh.d_o[n % 2]);
                products_commit();
            }
            if (OF_K) {
                products_wait<OF_V ? 1 : 0>();
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
            }
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
        settle(dv_out);
    }
    float one[2] = {1.0f, 1.0f}, factor[2] = {s.scale, s.scale};
    if (OF_K) store<DIM>(dk, dk_stride, s.batch, task.sequence, task.head, row, s.kv_len, dk_out, factor);
    if (OF_V) store<V_DIM>(dv, dv_stride, s.batch, task.sequence, task.head, row, s.kv_len, dv_out, one);
}

// ---- entry points ----------------------------------------------------------------------------------------------------

// Sizes of heads: of queries and keys, of values and outputs.
constexpr int DIM = HEAD_DIM, V_DIM = V_HEAD_DIM;

#define SIZES int batch, int q_len, int kv_len, int heads, int kv_heads, i64 first_query, i64 window, float scale
#define SIZES_OF Sizes{batch, q_len, kv_len, heads, kv_heads, first_query, window, scale}
#define MAP const __grid_constant__ TensorMap

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_forward(bf16* o, i64 o_stride, float* lse, i64 lse_stride, MAP q, MAP k, MAP v, const int* first_keys, SIZES) {
    forward<DIM, V_DIM>(o, o_stride, lse, lse_stride, &q, &k, &v, first_keys, SIZES_OF);
}

extern "C" __global__ void __launch_bounds__(256)
flash_statistics(Statistics* stats, Bounds* bounds, const bf16* d_o, i64 d_o_stride, const bf16* o, i64 o_stride, const float* lse,
                 i64 lse_stride, const int* first_keys, SIZES) {
    statistics<V_DIM>(stats, bounds, d_o, d_o_stride, o, o_stride, lse, lse_stride, first_keys, SIZES_OF);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flash_backward_q(bf16* dq, i64 dq_stride, MAP d_o, MAP q, MAP k, MAP v, const Statistics* stats, const int* first_keys, SIZES) {
    query_gradient<DIM, V_DIM>(dq, dq_stride, &d_o, &q, &k, &v, stats, first_keys, SIZES_OF);
}

// Gradients of keys (OF_K) and values (OF_V).
#define KEYS_AND_VALUES(NAME, OF_K, OF_V)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                \
    NAME(bf16* dk, i64 dk_stride, bf16* dv, i64 dv_stride, MAP d_o, MAP q, MAP k, MAP v, const Statistics* stats,           \
         const Bounds* bounds, SIZES) {                                                                                     \
        key_gradient<DIM, V_DIM, OF_K, OF_V>(dk, dk_stride, dv, dv_stride, &d_o, &q, &k, &v, stats, bounds, SIZES_OF);      \
    }
#if HEAD_DIM + V_HEAD_DIM <= 256
KEYS_AND_VALUES(flash_backward_kv, true, true)
#else
KEYS_AND_VALUES(flash_backward_k, true, false)
KEYS_AND_VALUES(flash_backward_v, false, true)
#endif
