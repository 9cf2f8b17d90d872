// Lookup in one block of a vocabulary, and its gradient.

constexpr int N = 16 / sizeof(T);

// The row of a block of the vocabulary that holds `id`, or −1.
__device__ __forceinline__ i64 row_of(i32 id, i64 first, i64 rows) {
    i64 row = i64(id) - first;
    return id >= 0 && row >= 0 && row < rows ? row : -1;
}

template <int M>
__device__ __forceinline__ void embed(T *y, i64 ys, const T *table, i64 ts, const i32 *ids, i64 first, i64 rows, i64 n,
                                      i64 h) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= n) return;
    i64 row = row_of(ids[i], first, rows);
    table += row * ts, y += i * ys;
#pragma unroll 2
    for (i64 j = threadIdx.x * M; j < h; j += blockDim.x * M) {
        Vec<T, M> v = {};
        if (row >= 0) v = load<M>(table + j);
        store<M>(y + j, v);
    }
}

#define EMBED(NAME, M)                                                                                                 \
    extern "C" __global__ void NAME(T *__restrict__ y, i64 ys, const T *__restrict__ table, i64 ts,                    \
                                    const i32 *__restrict__ ids, i64 first, i64 rows, i64 n, i64 h) {                  \
        embed<M>(y, ys, table, ts, ids, first, rows, n, h);                                                            \
    }
EMBED(embed, N)
EMBED(embed_any, 1)

// --- backward --------------------------------------------------------------------------------------------------------
//
// Tokens are found by id, then every row of the table is read and written once. Which token takes which of the slots of its id
// is left to atomics, and does not matter: they are put in ascending order before anything is added. An id of few tokens is
// a warp's work; the rows of one of many are added in `PARTS` contiguous parts, these then in order.

// Slots of an id.
constexpr int SLOTS = 16;
constexpr int WARPS = 8;
constexpr int PARTS = WARPS;

// What is known of the tokens of ids: how many there are by row of the table, and the first `SLOTS` of them that came; of ids of
// more than that, the row, and where its tokens begin in `members`, in ascending order. One piece of scratch memory.
struct Found {
    // Of `many` and of `members`.
    i32 *used;
    i32 *count, *slots;
    i32 *many, *begin;
    i32 *members;

    __device__ __forceinline__ Found(i32 *scratch, i64 rows, i64 n) {
        i64 most = n / (SLOTS + 1);
        used = scratch;
        count = used + 2, slots = count + rows;
        many = slots + rows * SLOTS, begin = many + most;
        members = begin + most;
    }
};

extern "C" __global__ void embed_clear(i32 *scratch, const i32 *__restrict__ ids, i64 first, i64 rows, i64 n) {
    Found found(scratch, rows, n);
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i == 0) found.used[0] = found.used[1] = 0;
    i64 row = i < n ? row_of(ids[i], first, rows) : -1;
    if (row >= 0) found.count[row] = 0;
}

extern "C" __global__ void embed_count(i32 *scratch, const i32 *__restrict__ ids, i64 first, i64 rows, i64 n,
                                       i64 padding) {
    Found found(scratch, rows, n);
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n || ids[i] == padding) return;
    i64 row = row_of(ids[i], first, rows);
    if (row < 0) return;
    i32 slot = atomicAdd(found.count + row, 1);
    if (slot < SLOTS) found.slots[row * SLOTS + slot] = i32(i);
    if (slot == SLOTS) found.many[atomicAdd(found.used, 1)] = i32(row);
}

// Adds rows of `dy`, of the tokens at `members`, to `sum`: columns from `j` on. `LOADS` of them are under way at once.
template <int M, int LOADS>
__device__ __forceinline__ void add_rows(Vec<Acc, M> &sum, const T *dy, i64 dys, i64 j, const i32 *members, int count) {
    for (int k = 0; k < count; k += LOADS) {
        Vec<T, M> v[LOADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            if (k + l < count) v[l] = load<M>(dy + members[k + l] * dys + j);
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            if (k + l < count) {
                Vec<Acc, M> wide = widen(v[l]);
#pragma unroll
                for (int e = 0; e < M; e++) sum.at[e] += wide.at[e];
            }
    }
}

// Sums are moved at most 16 bytes at a time, too.
template <int M> constexpr int ACCS = M < 16 / int(sizeof(Acc)) ? M : 16 / int(sizeof(Acc));

template <int M> __device__ __forceinline__ Vec<Acc, M> load_sums(const Acc *from) {
    constexpr int A = ACCS<M>;
    Vec<Acc, M> sums;
#pragma unroll
    for (int e = 0; e < M; e += A) *reinterpret_cast<Vec<Acc, A> *>(sums.at + e) = load<A>(from + e);
    return sums;
}

template <int M> __device__ __forceinline__ void store_sums(Acc *to, const Vec<Acc, M> &sums) {
    constexpr int A = ACCS<M>;
#pragma unroll
    for (int e = 0; e < M; e += A) store<A>(to + e, *reinterpret_cast<const Vec<Acc, A> *>(sums.at + e));
}

// Ids of few tokens, one warp for each token: that in the first slot of its id works for all of them.
template <int M>
__device__ __forceinline__ void add_few(Acc *dtable, i64 ts, const T *dy, i64 dys, const Found &found, const i32 *ids,
                                        i64 first, i64 rows, i64 n, i64 padding, i64 h, i64 block) {
    __shared__ i32 sorted[WARPS][SLOTS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 i = block * WARPS + warp;
    if (i >= n || ids[i] == padding) return;
    i64 row = row_of(ids[i], first, rows);
    if (row < 0 || found.slots[row * SLOTS] != i) return;
    int tokens = found.count[row];
    if (tokens > SLOTS) return;
    i32 member = lane < tokens ? found.slots[row * SLOTS + lane] : 0x7fffffff;
    int rank = 0;
    for (int k = 0; k < tokens; k++) rank += __shfl_sync(FULL_MASK, member, k) < member;
    if (lane < tokens) sorted[warp][rank] = member;
    __syncwarp();
    for (i64 j = lane * M; j < h; j += 32 * M) {
        Acc *to = dtable + row * ts + j;
        Vec<Acc, M> sum = load_sums<M>(to);
        add_rows<M, 4>(sum, dy, dys, j, sorted[warp], tokens);
        store_sums<M>(to, sum);
    }
}

// The tokens of every id of many, in ascending order, by looking at all ids; one block for each.
constexpr int ORDER_THREADS = 1024;
extern "C" __global__ void __launch_bounds__(ORDER_THREADS) embed_order(i32 *scratch, const i32 *__restrict__ ids,
                                                                        i64 first, i64 rows, i64 n) {
    Found found(scratch, rows, n);
    constexpr int EACH = 4, WORDS = ORDER_THREADS / 32 * EACH;
    __shared__ u32 matches[WORDS];
    __shared__ i32 begin;
    if (blockIdx.x >= found.used[0]) return;
    int row = found.many[blockIdx.x], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) found.begin[blockIdx.x] = begin = atomicAdd(found.used + 1, found.count[row]);
    i64 id = row + first;
    int placed = 0;
    for (i64 start = 0; start < n; start += WORDS * 32) {
        __syncthreads();
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            int word = warp * EACH + each;
            i64 at = start + word * 32 + lane;
            u32 here = __ballot_sync(FULL_MASK, at < n && ids[at] == id);
            if (lane == 0) matches[word] = here;
        }
        __syncthreads();
        // Each word's tokens are placed behind those of the words before it.
        int before = 0, all = 0;
        for (int word = lane; word < WORDS; word += 32) {
            int here = __popc(matches[word]);
            all += here;
            if (word < warp * EACH) before += here;
        }
        before = placed + warp_sum(before), placed += warp_sum(all);
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            u32 bits = matches[warp * EACH + each];
            if (bits >> lane & 1)
                found.members[begin + before + __popc(bits & ((1u << lane) - 1))] = i32(start + (warp * EACH + each) * 32 + lane);
            before += __popc(bits);
        }
    }
}

// Ids of many tokens: a block works on 32 · M columns of one of them after the other; each warp adds its part of the tokens.
template <int M>
__device__ __forceinline__ void add_many(Acc *dtable, i64 ts, const T *dy, i64 dys, const Found &found, i64 h, i64 block,
                                         i64 blocks) {
    __shared__ Vec<Acc, M> sums[PARTS][32];
    i64 pieces = (h + 32 * M - 1) / (32 * M);
    int part = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (i64 p = block; p < found.used[0] * pieces; p += blocks) {
        i64 id = p / pieces, j = (p % pieces * 32 + lane) * M, row = found.many[id];
        int tokens = found.count[row], each = (tokens + PARTS - 1) / PARTS, begin = min(tokens, part * each);
        Vec<Acc, M> sum = {};
        if (j < h)
            add_rows<M, 6>(sum, dy, dys, j, found.members + found.begin[id] + begin, min(each, tokens - begin));
        sums[part][lane] = sum;
        __syncthreads();
        if (part == 0 && j < h) {
            Acc *to = dtable + row * ts + j;
            sum = load_sums<M>(to);
            for (int q = 0; q < PARTS; q++)
#pragma unroll
                for (int e = 0; e < M; e++) sum.at[e] += sums[q][lane].at[e];
            store_sums<M>(to, sum);
        }
        __syncthreads();
    }
}

// The first `many` blocks work on ids of many tokens, which take longest; the others on those of few.
#define EMBED_ADD(NAME, M)                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) NAME(                                                  \
        Acc *__restrict__ dtable, i64 ts, const T *__restrict__ dy, i64 dys, i32 *scratch,                             \
        const i32 *__restrict__ ids, i64 first, i64 rows, i64 n, i64 padding, i64 h, i64 many) {                       \
        Found found(scratch, rows, n);                                                                                 \
        if (blockIdx.x < many) add_many<M>(dtable, ts, dy, dys, found, h, blockIdx.x, many);                           \
        else add_few<M>(dtable, ts, dy, dys, found, ids, first, rows, n, padding, h, blockIdx.x - many);               \
    }
EMBED_ADD(embed_add, N)
EMBED_ADD(embed_add_any, 1)
