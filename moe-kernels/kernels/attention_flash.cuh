// What attention on Hopper's tensor cores is made of: tiles by the copy engine, products of warpgroups, who sees what.
//
// A matrix [len · batch, heads · dim] is a tensor of four dimensions (column, position, head, sequence) to the copy engine; a copy
// is a panel of 64 positions by 64 columns, 128 bytes a row, swizzled by 128 bytes; panels of more positions stack. What lies
// past the last position reads as 0.

constexpr int PANEL = 64;                    // positions and columns of a copy
constexpr int PANEL_BYTES = PANEL * PANEL * 2;
constexpr int CONSUMERS = 2;                 // warpgroups
constexpr int ROWS = CONSUMERS * 64;         // rows of a block's result
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr float LOG2_E = 1.44269504088896340736f;

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
struct Descriptor {
    u32 low;

    // The same value in all threads of a warp, by way of one of them: products take it from uniform registers.
    __device__ __forceinline__ Descriptor(const char* at, int panel_bytes)
        : low(__shfl_sync(FULL_MASK, (shared_address(at) & 0x3ffff) >> 4 | panel_bytes >> 4 << 16, 0)) {}

    __device__ __forceinline__ u64 operator+(int bytes) const { return (u64)(64 | 1 << 30) << 32 | (low + (bytes >> 4)); }
};

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
#define R16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
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
    Descriptor x(a + row * 128, 0), y(b, 0);
#pragma unroll
    for (int column = 0; column < DIM; column += 16) {
        int in_panel = column % PANEL * 2, panel = column / PANEL * 128;
        product_step(d, x + (panel * A_LEN + in_panel), y + (panel * B_LEN + in_panel), column > 0);
    }
}

// d += a b: a in registers, b a tile of LEN rows and DIM columns; of the rows, those from FROM to TO.
template <int LEN, int DIM, int FROM = 0, int TO = LEN>
__device__ __forceinline__ void multiply(float (&d)[DIM / 2], const u32 (&a)[LEN / 16][4], const char* b) {
    Descriptor x(b, LEN * 128);
#pragma unroll
    for (int row = FROM; row < TO; row += 16) product_step(d, a[row / 16], x + row * 128);
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

    __device__ __forceinline__ Task(int index, int heads, int batch) {
        int all = heads * batch;
        tile = index / all;
        int rest = index % all;
        head = rest % heads;
        sequence = rest / heads;
    }
};

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

// ---- parameters ------------------------------------------------------------------------------------------------------

// Sizes of heads: of queries and keys, of values and outputs.
constexpr int DIM = HEAD_DIM, V_DIM = V_HEAD_DIM;

#define SIZES int batch, int q_len, int kv_len, int heads, int kv_heads, i64 first_query, i64 window, float scale
#define SIZES_OF Sizes{batch, q_len, kv_len, heads, kv_heads, first_query, window, scale}
#define MAP const __grid_constant__ TensorMap
