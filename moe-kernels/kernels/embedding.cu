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
// Tokens are found by id, then every row of the table that has some is read and written once. Which token takes which of the slots
// of its id is left to atomics, and does not matter: they are put in ascending order before anything is added. An id of few tokens
// is added to the table at once; the tokens of one of many in chunks of `CHUNK`, whose sums are then added in order by whoever
// finishes the last of them.

// Slots of an id.
constexpr int SLOTS = 16;
constexpr int WARPS = 8;
constexpr int CHUNK = 64;

// What is known of the tokens of ids: how many there are by row of the table, and the first `SLOTS` of them that came; the rows that
// have some. Of rows of more than that: where their tokens begin in `members`, in ascending order; where the sums of their chunks
// begin in `partial`, if there are several; and of each slice of columns, how many chunks are done. Of chunks, the id (an index of
// `many`) and which of its chunks. One piece of scratch memory.
enum { DISTINCT, MANY, MEMBERS, CHUNKS, PARTIAL, USED };
struct Found {
    i32 *scratch;
    i64 rows, n;

    __device__ __forceinline__ i64 most() const { return n / (SLOTS + 1); }
    __device__ __forceinline__ i64 most_chunks() const { return most() + n / CHUNK; }
    __device__ __forceinline__ i32 *used() const { return scratch; }
    __device__ __forceinline__ i32 *count() const { return used() + USED; }
    __device__ __forceinline__ i32 *slots() const { return count() + rows; }
    __device__ __forceinline__ i32 *distinct() const { return slots() + rows * SLOTS; }
    __device__ __forceinline__ i32 *many() const { return distinct() + n; }
    __device__ __forceinline__ i32 *begin() const { return many() + most(); }
    __device__ __forceinline__ i32 *partial_begin() const { return begin() + most(); }
    __device__ __forceinline__ i32 *members() const { return partial_begin() + most(); }
    __device__ __forceinline__ i32 *chunk_id() const { return members() + n; }
    __device__ __forceinline__ i32 *chunk_part() const { return chunk_id() + most_chunks(); }
    __device__ __forceinline__ i32 *done() const { return chunk_part() + most_chunks(); }
};

extern "C" __global__ void embed_clear(i32 *scratch, const i32 *__restrict__ ids, i64 first, i64 rows, i64 n) {
    Found found = {scratch, rows, n};
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < USED) found.used()[i] = 0;
    i64 row = i < n ? row_of(ids[i], first, rows) : -1;
    if (row >= 0) found.count()[row] = 0;
}

extern "C" __global__ void embed_count(i32 *scratch, const i32 *__restrict__ ids, i64 first, i64 rows, i64 n,
                                       i64 padding) {
    Found found = {scratch, rows, n};
    i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    i32 id = i < n ? ids[i] : -1;
    i64 row = id == padding ? -1 : row_of(id, first, rows);
    // One of the threads with a row takes the slots for all of them.
    u32 equal = __match_any_sync(FULL_MASK, i32(row)), lane = threadIdx.x % 32, leader = __ffs(equal) - 1;
    i32 begin = 0;
    if (row >= 0 && lane == leader) begin = atomicAdd(found.count() + row, __popc(equal));
    i32 slot = __shfl_sync(FULL_MASK, begin, leader) + __popc(equal & ((1u << lane) - 1));
    if (row < 0) return;
    if (slot < SLOTS) found.slots()[row * SLOTS + slot] = i32(i);
    if (slot == 0) found.distinct()[atomicAdd(found.used() + DISTINCT, 1)] = i32(row);
    if (slot == SLOTS) found.many()[atomicAdd(found.used() + MANY, 1)] = i32(row);
}

// The tokens of every id of many, in ascending order, by looking at all ids; a block takes one id after the other.
constexpr int ORDER_WARPS = 32;
extern "C" __global__ void __launch_bounds__(ORDER_WARPS * 32)
    embed_order(i32 *scratch, const i32 *__restrict__ ids, i64 first, i64 rows, i64 n, i64 slices) {
    Found found = {scratch, rows, n};
    // Ids of a thread at once: those of a warp follow each other.
    constexpr int EACH = 16;
    __shared__ i32 matches[2][ORDER_WARPS], begin, chunks;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (i64 many = blockIdx.x; many < found.used()[MANY]; many += gridDim.x) {
        int row = found.many()[many], tokens = found.count()[row], parts = (tokens + CHUNK - 1) / CHUNK;
        __syncthreads();
        if (threadIdx.x == 0) {
            found.begin()[many] = begin = atomicAdd(found.used() + MEMBERS, tokens);
            chunks = atomicAdd(found.used() + CHUNKS, parts);
            if (parts > 1) found.partial_begin()[many] = atomicAdd(found.used() + PARTIAL, parts);
        }
        for (i64 slice = threadIdx.x; slice < slices; slice += blockDim.x) found.done()[many * slices + slice] = 0;
        i64 id = row + first, placed = 0;
        for (i64 start = 0, turn = 0; start < n; start += ORDER_WARPS * 32 * EACH, turn ^= 1) {
            i64 at = start + warp * 32 * EACH + lane;
            u32 here[EACH];
            i32 count = 0;
#pragma unroll
            for (int each = 0; each < EACH; each++) here[each] = at + each * 32 < n && ids[at + each * 32] == id;
#pragma unroll
            for (int each = 0; each < EACH; each++)
                count += __popc(here[each] = __ballot_sync(FULL_MASK, here[each]));
            if (lane == 0) matches[turn][warp] = count;
            __syncthreads();
            // A warp's tokens are placed behind those of the warps before it.
            i32 of_warp = matches[turn][lane];
            i64 to = begin + placed + warp_sum(lane < warp ? of_warp : 0);
            placed += warp_sum(of_warp);
#pragma unroll
            for (int each = 0; each < EACH; each++) {
                if (here[each] >> lane & 1)
                    found.members()[to + __popc(here[each] & ((1u << lane) - 1))] = i32(at + each * 32);
                to += __popc(here[each]);
            }
        }
        for (int part = threadIdx.x; part < parts; part += blockDim.x)
            found.chunk_id()[chunks + part] = i32(many), found.chunk_part()[chunks + part] = part;
    }
}

// Adds rows of `dy`, of the tokens at `members`, to `sum`: columns from `j` on, `LOADS` rows at once.
constexpr int LOADS = 4;
template <int M>
__device__ __forceinline__ void add_rows(Vec<Acc, M> &sum, const T *dy, i64 dys, i64 j, const i32 *members, int count) {
    dy += j;
#pragma unroll 1
    for (int k = 0; k < count; k += LOADS) {
        Vec<T, M> v[LOADS];
#pragma unroll
        for (int l = 0; l < LOADS; l++)
            if (k + l < count) v[l] = load<M>(dy + i64(members[k + l]) * dys);
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

// One slice of the columns, a vector from `j` on for each lane, of all tokens of an id of few.
template <int M>
__device__ __forceinline__ void add_few(Acc *dtable, i64 ts, const T *dy, i64 dys, const Found &found, i64 row, i64 j,
                                        i64 h, i32 *sorted) {
    int lane = threadIdx.x % 32;
    int tokens = found.count()[row];
    i32 member = lane < SLOTS ? found.slots()[row * SLOTS + lane] : 0;
    Acc *to = dtable + row * ts + j;
    Vec<Acc, M> sum;
    if (j < h) sum = load_sums<M>(to);
    if (tokens > SLOTS) return;
    if (lane >= tokens) member = 0x7fffffff;
    int rank = 0;
    for (int k = 0; k < tokens; k++) rank += __shfl_sync(FULL_MASK, member, k) < member;
    __syncwarp();
    if (lane < tokens) sorted[rank] = member;
    __syncwarp();
    if (j >= h) return;
    add_rows<M>(sum, dy, dys, j, sorted, tokens);
    store_sums<M>(to, sum);
}

// One slice of one chunk of the tokens of an id of many.
template <int M>
__device__ __forceinline__ void add_chunk(Acc *dtable, i64 ts, const T *dy, i64 dys, Acc *partial, const Found &found,
                                          u32 chunk, i64 j, i64 h) {
    i64 many = found.chunk_id()[chunk], part = found.chunk_part()[chunk], row = found.many()[many];
    i64 tokens = found.count()[row], parts = (tokens + CHUNK - 1) / CHUNK;
    Acc *to = dtable + row * ts + j;
    Vec<Acc, M> sum = {};
    if (j < h)
        add_rows<M>(sum, dy, dys, j, found.members() + found.begin()[many] + part * CHUNK,
                       min(CHUNK, int(tokens - part * CHUNK)));
    if (parts > 1) {
        partial += found.partial_begin()[many] * h + j;
        if (j < h) store_sums<M>(partial + part * h, sum);
        __threadfence();
        __syncwarp();
        i32 before = 0;
        if (threadIdx.x % 32 == 0) before = atomicAdd(found.done() + many * gridDim.x + blockIdx.x, 1);
        if (__shfl_sync(FULL_MASK, before, 0) + 1 < parts) return;
        __threadfence();
    }
    if (j >= h) return;
    Vec<Acc, M> all = load_sums<M>(to);
    if (parts == 1) {
#pragma unroll
        for (int e = 0; e < M; e++) all.at[e] += sum.at[e];
    } else {
#pragma unroll 2
        for (i64 p = 0; p < parts; p++) {
            sum = load_sums<M>(partial + p * h);
#pragma unroll
            for (int e = 0; e < M; e++) all.at[e] += sum.at[e];
        }
    }
    store_sums<M>(to, all);
}

// A warp for each slice (`blockIdx.x`) of each chunk, which take longest, and of each id of few.
#define EMBED_ADD(NAME, M)                                                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 4) NAME(                                                  \
        Acc *dtable, i64 ts, const T *__restrict__ dy, i64 dys, Acc *partial, i32 *scratch, i64 rows, i64 n, i64 h) {  \
        __shared__ i32 sorted[WARPS][SLOTS];                                                                           \
        Found found = {scratch, rows, n};                                                                                 \
        int warp = threadIdx.x / 32;                                                                                   \
        i64 j = (i64(blockIdx.x) * 32 + threadIdx.x % 32) * M;                                                         \
        u32 chunks = found.used()[CHUNKS], all = chunks + found.used()[DISTINCT];                                      \
        for (u32 at = blockIdx.y * WARPS + warp; at < all; at += gridDim.y * WARPS) {                                  \
            if (at < chunks) add_chunk<M>(dtable, ts, dy, dys, partial, found, at, j, h);                              \
            else add_few<M>(dtable, ts, dy, dys, found, found.distinct()[at - chunks], j, h, sorted[warp]);            \
        }                                                                                                              \
    }
EMBED_ADD(embed_add, N)
EMBED_ADD(embed_add_any, 1)
