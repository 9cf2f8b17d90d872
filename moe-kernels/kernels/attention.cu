// Attention in tiles, for every element type, head size, mask and layout. Sums are formed in Acc, in a fixed order.
//
// A block of 16 x 16 threads owns a tile of the result; thread (ty, tx) holds its rows ty + 16 i and columns tx + 16 j.
// Result columns beyond SPAN are other blocks' work, which form the scores again.

#ifdef T_F64
constexpr int TILE = 32;  // queries and keys of a tile of scores
constexpr int SPAN = 64;  // columns of the result that a block owns
#else
constexpr int TILE = 64;
constexpr int SPAN = 128;
#endif
constexpr int SIDE = 16;
constexpr int THREADS = SIDE * SIDE;
constexpr int DEPTH = 32;  // columns of an operand that are multiplied at a time
constexpr int STAGE = 16;  // rows of an operand that are multiplied at a time
constexpr int ROWS = TILE / SIDE;
constexpr int COLS = SPAN / SIDE;

// What hides keys from queries: `window` is 0 where a query sees all keys, else the number of keys that it sees up to its own.
struct Sight {
    const int* first_keys;
    i64 first_query;
    i64 window;
    int batch;
    int sequence;
    int kv_len;

    // Keys [lo, hi) that `query` sees.
    __device__ void of(int query, int& lo, int& hi) const {
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
        lo = (int)(start < end ? start : end);
        hi = (int)end;
    }
};

// Rows `0..rows` of a head, `stride` elements apart, of which columns `0..cols` exist.
struct Operand {
    const T* at;
    i64 stride;
    int rows;
    int cols;
};

__device__ Operand head_rows(const T* m, i64 stride, int batch, int sequence, int head, int dim, int from, int len) {
    i64 row = (i64)from * batch + sequence;
    int rows = len - from < TILE ? len - from : TILE;
    return {m + row * stride + (i64)head * dim, stride * batch, rows, dim};
}

__device__ Operand columns(Operand m, int from) {
    m.at += from;
    m.cols = m.cols > from ? (m.cols - from < SPAN ? m.cols - from : SPAN) : 0;
    return m;
}

__device__ Acc element(const Operand& m, int row, int col) {
    return row < m.rows && col < m.cols ? widen(m.at[(i64)row * m.stride + col]) : Acc(0);
}

struct Shared {
    union {
        struct {
            Acc a[TILE][DEPTH + 1];
            Acc b[TILE][DEPTH + 1];
        };
        Acc stage[STAGE][SPAN];
    };
    Acc p[TILE][TILE + 1];
    Acc lse[TILE];
    Acc delta[TILE];
    int lo[TILE];
    int hi[TILE];
};

// s = a bᵀ.
__device__ void dots(Acc (&s)[ROWS][ROWS], Shared& sh, const Operand& a, const Operand& b) {
    int tid = threadIdx.x, tx = tid % SIDE, ty = tid / SIDE;
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < ROWS; j++) s[i][j] = Acc(0);
    for (int from = 0; from < a.cols; from += DEPTH) {
        __syncthreads();
        for (int e = tid; e < TILE * DEPTH; e += THREADS) {
            int row = e / DEPTH, col = e % DEPTH;
            sh.a[row][col] = element(a, row, from + col);
            sh.b[row][col] = element(b, row, from + col);
        }
        __syncthreads();
#pragma unroll 8
        for (int d = 0; d < DEPTH; d++) {
            Acc x[ROWS], y[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) x[i] = sh.a[ty + SIDE * i][d];
#pragma unroll
            for (int j = 0; j < ROWS; j++) y[j] = sh.b[tx + SIDE * j][d];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < ROWS; j++) s[i][j] += x[i] * y[j];
        }
    }
}

// out += p m, with p in shared memory; p is read after a barrier, and may be written again after the next.
__device__ void add_product(Acc (&out)[ROWS][COLS], Shared& sh, const Operand& m) {
    int tid = threadIdx.x, tx = tid % SIDE, ty = tid / SIDE;
    for (int from = 0; from < m.rows; from += STAGE) {
        __syncthreads();
        for (int e = tid; e < STAGE * SPAN; e += THREADS) {
            int row = e / SPAN, col = e % SPAN;
            sh.stage[row][col] = element(m, from + row, col);
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < STAGE; k++) {
            Acc x[ROWS], y[COLS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) x[i] = sh.p[ty + SIDE * i][from + k];
#pragma unroll
            for (int j = 0; j < COLS; j++) y[j] = sh.stage[k][tx + SIDE * j];
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLS; j++) out[i][j] += x[i] * y[j];
        }
    }
    __syncthreads();
}

__device__ void fill(Acc (&out)[ROWS][COLS]) {
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLS; j++) out[i][j] = Acc(0);
}

// Writes a tile of a result, times `factor[i]` for row ty + 16 i.
__device__ void store(T* m, i64 stride, int batch, int sequence, int head, int dim, int from, int len, int column,
                      const Acc (&out)[ROWS][COLS], const Acc (&factor)[ROWS]) {
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        int row = from + ty + SIDE * i;
        if (row >= len) continue;
        T* at = m + ((i64)row * batch + sequence) * stride + (i64)head * dim;
#pragma unroll
        for (int j = 0; j < COLS; j++) {
            int col = column + tx + SIDE * j;
            if (col < dim) at[col] = narrow<T>(out[i][j] * factor[i]);
        }
    }
}

// Sums and maxima over the 16 threads of a row.
__device__ Acc row_sum(Acc x) {
    for (int lane = SIDE / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}
__device__ Acc row_max(Acc x) {
    for (int lane = SIDE / 2; lane > 0; lane /= 2) {
        Acc y = __shfl_xor_sync(FULL_MASK, x, lane);
        x = y > x ? y : x;
    }
    return x;
}

// What the queries from `from` on see, into shared memory; `first` and `last` bound the keys that any of them sees.
__device__ void look(Shared& sh, const Sight& sight, int from, int q_len, int& first, int& last) {
    int tid = threadIdx.x;
    if (tid < TILE) {
        int lo = 0, hi = 0;
        if (from + tid < q_len) sight.of(from + tid, lo, hi);
        sh.lo[tid] = lo;
        sh.hi[tid] = hi;
    }
    __syncthreads();
    first = sight.kv_len;
    last = 0;
    for (int i = 0; i < TILE; i++) {
        if (sh.lo[i] == sh.hi[i]) continue;
        first = sh.lo[i] < first ? sh.lo[i] : first;
        last = sh.hi[i] > last ? sh.hi[i] : last;
    }
}

// Whether any of the queries in shared memory sees any of the keys of a tile.
__device__ bool meets(const Shared& sh, int keys) {
    int tid = threadIdx.x;
    bool sees = tid < TILE && sh.lo[tid] < sh.hi[tid] && sh.lo[tid] < keys + TILE && sh.hi[tid] > keys;
    return __syncthreads_or(sees) != 0;
}

// The parts of a grid: tiles of rows fastest, then spans of columns, heads, sequences.
struct Task {
    int tile, column, head, sequence;

    __device__ Task(int len, int dim, int heads) {
        i64 rest = blockIdx.x;
        int tiles = (len + TILE - 1) / TILE, spans = (dim + SPAN - 1) / SPAN;
        tile = (int)(rest % tiles) * TILE;
        rest /= tiles;
        column = (int)(rest % spans) * SPAN;
        rest /= spans;
        head = (int)(rest % heads);
        sequence = (int)(rest / heads);
    }
};

// o = softmax(scale q kᵀ) v with a streaming softmax, and its log-sum-exp.
extern "C" __global__ void __launch_bounds__(THREADS)
attention(T* o, i64 o_stride, Acc* lse, i64 lse_stride, const T* q, i64 q_stride, const T* k,
          i64 k_stride, const T* v, i64 v_stride, const int* first_keys, int batch, int q_len, int kv_len,
          i64 first_query, i64 window, int heads, int kv_heads, int head_dim, int v_head_dim, double scale_) {
    __shared__ Shared sh;
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    Task task(q_len, v_head_dim, heads);
    Sight sight{first_keys, first_query, window, batch, task.sequence, kv_len};
    int first, last, kv = task.head / (heads / kv_heads);
    Acc scale = Acc(scale_);
    look(sh, sight, task.tile, q_len, first, last);
    Operand queries = head_rows(q, q_stride, batch, task.sequence, task.head, head_dim, task.tile, q_len);
    Acc out[ROWS][COLS], max[ROWS], sum[ROWS];
    fill(out);
    for (int i = 0; i < ROWS; i++) {
        max[i] = -Acc(INF_F32);
        sum[i] = Acc(0);
    }
    for (int keys = first / TILE * TILE; keys < last; keys += TILE) {
        if (!meets(sh, keys)) continue;
        Acc s[ROWS][ROWS];
        dots(s, sh, queries, head_rows(k, k_stride, batch, task.sequence, kv, head_dim, keys, kv_len));
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int row = ty + SIDE * i, lo = sh.lo[row], hi = sh.hi[row];
            Acc most = max[i];
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                int key = keys + tx + SIDE * j;
                s[i][j] = key >= lo && key < hi ? s[i][j] * scale : -Acc(INF_F32);
                most = s[i][j] > most ? s[i][j] : most;
            }
            most = row_max(most);
            // A query that has seen nothing yet has nothing to rescale, and no difference of infinities is formed.
            Acc base = most == -Acc(INF_F32) ? Acc(0) : most;
            Acc rescale = exp(max[i] - base);
            max[i] = most;
            sum[i] *= rescale;
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                Acc p = exp(s[i][j] - base);
                sum[i] += p;
                sh.p[row][tx + SIDE * j] = p;
            }
#pragma unroll
            for (int j = 0; j < COLS; j++) out[i][j] *= rescale;
        }
        Operand values = head_rows(v, v_stride, batch, task.sequence, kv, v_head_dim, keys, kv_len);
        add_product(out, sh, columns(values, task.column));
    }
    Acc factor[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        int row = task.tile + ty + SIDE * i;
        Acc total = row_sum(sum[i]);
        factor[i] = total == Acc(0) ? Acc(0) : Acc(1) / total;
        if (tx == 0 && task.column == 0 && row < q_len) {
            Acc l = total == Acc(0) ? -Acc(INF_F32) : max[i] + log(total);
            lse[((i64)row * batch + task.sequence) * lse_stride + task.head] = l;
        }
    }
    store(o, o_stride, batch, task.sequence, task.head, v_head_dim, task.tile, q_len, task.column, out, factor);
}

// delta = Σ d_o ⊙ o for every row and head, `[rows, heads]` without gaps; a warp each.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_delta(Acc* delta, const T* d_o, i64 d_o_stride, const T* o, i64 o_stride, i64 rows, int heads,
                int v_head_dim) {
    i64 task = ((i64)blockIdx.x * THREADS + threadIdx.x) / 32;
    if (task >= rows * heads) return;
    i64 row = task / heads, at = task % heads * v_head_dim;
    const T* x = d_o + row * d_o_stride + at;
    const T* y = o + row * o_stride + at;
    Acc sum = Acc(0);
    for (int d = threadIdx.x % 32; d < v_head_dim; d += 32) sum += widen(x[d]) * widen(y[d]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) delta[task] = sum;
}

// The log-sum-exps `[rows, heads]` as cuDNN reads them: `[batch, heads, q_len]` without gaps.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_lse_by_head(Acc* by_head, const Acc* lse, i64 lse_stride, int batch, int q_len, int heads) {
    i64 all = (i64)batch * heads * q_len;
    for (i64 at = (i64)blockIdx.x * THREADS + threadIdx.x; at < all; at += (i64)gridDim.x * THREADS) {
        i64 position = at % q_len, head = at / q_len % heads, sequence = at / q_len / heads;
        by_head[at] = lse[(position * batch + sequence) * lse_stride + head];
    }
}

// The statistics of the queries from `from` on, into shared memory.
__device__ void load_statistics(Shared& sh, const Acc* lse, i64 lse_stride, const Acc* delta, int batch, int sequence,
                                int heads, int head, int from, int q_len) {
    int tid = threadIdx.x;
    if (tid < TILE) {
        bool inside = from + tid < q_len;
        i64 row = (i64)(from + tid) * batch + sequence;
        sh.lse[tid] = inside ? lse[row * lse_stride + head] : -Acc(INF_F32);
        sh.delta[tid] = inside ? delta[row * heads + head] : Acc(0);
    }
}

// The probability of one score, 0 if the key is hidden or the query sees no key at all.
__device__ Acc probability(const Shared& sh, Acc score, int query, int key, bool& seen) {
    Acc lse = sh.lse[query];
    seen = key >= sh.lo[query] && key < sh.hi[query] && lse != -Acc(INF_F32);
    return seen ? exp(score - lse) : Acc(0);
}

// dq = dS k with dS = P ⊙ (d_o vᵀ − delta) · scale.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_q(T* dq, i64 dq_stride, const T* d_o, i64 d_o_stride, const T* q, i64 q_stride, const T* k,
                     i64 k_stride, const T* v, i64 v_stride, const Acc* lse, i64 lse_stride, const Acc* delta,
                     const int* first_keys, int batch, int q_len, int kv_len, i64 first_query, i64 window, int heads,
                     int kv_heads, int head_dim, int v_head_dim, double scale_) {
    __shared__ Shared sh;
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    Task task(q_len, head_dim, heads);
    Sight sight{first_keys, first_query, window, batch, task.sequence, kv_len};
    int first, last, kv = task.head / (heads / kv_heads);
    Acc scale = Acc(scale_);
    load_statistics(sh, lse, lse_stride, delta, batch, task.sequence, heads, task.head, task.tile, q_len);
    look(sh, sight, task.tile, q_len, first, last);
    Operand queries = head_rows(q, q_stride, batch, task.sequence, task.head, head_dim, task.tile, q_len);
    Operand gradients = head_rows(d_o, d_o_stride, batch, task.sequence, task.head, v_head_dim, task.tile, q_len);
    Acc out[ROWS][COLS], one[ROWS];
    fill(out);
    for (int i = 0; i < ROWS; i++) one[i] = Acc(1);
    for (int keys = first / TILE * TILE; keys < last; keys += TILE) {
        if (!meets(sh, keys)) continue;
        Operand part = head_rows(k, k_stride, batch, task.sequence, kv, head_dim, keys, kv_len);
        Acc s[ROWS][ROWS], dp[ROWS][ROWS];
        dots(s, sh, queries, part);
        dots(dp, sh, gradients, head_rows(v, v_stride, batch, task.sequence, kv, v_head_dim, keys, kv_len));
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                int row = ty + SIDE * i, col = tx + SIDE * j;
                bool seen;
                Acc p = probability(sh, s[i][j] * scale, row, keys + col, seen);
                sh.p[row][col] = seen ? p * (dp[i][j] - sh.delta[row]) * scale : Acc(0);
            }
        }
        add_product(out, sh, columns(part, task.column));
    }
    store(dq, dq_stride, batch, task.sequence, task.head, head_dim, task.tile, q_len, task.column, out, one);
}

// dk = Σ dSᵀ q and dv = Σ Pᵀ d_o over the query heads that read a head of keys and values.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward_kv(T* dk, i64 dk_stride, T* dv, i64 dv_stride, const T* d_o, i64 d_o_stride, const T* q,
                      i64 q_stride, const T* k, i64 k_stride, const T* v, i64 v_stride, const Acc* lse,
                      i64 lse_stride, const Acc* delta, const int* first_keys, int batch, int q_len, int kv_len,
                      i64 first_query, i64 window, int heads, int kv_heads, int head_dim, int v_head_dim,
                      double scale_) {
    __shared__ Shared sh;
    int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    Task task(kv_len, head_dim > v_head_dim ? head_dim : v_head_dim, kv_heads);
    Sight sight{first_keys, first_query, window, batch, task.sequence, kv_len};
    int group = heads / kv_heads;
    Acc scale = Acc(scale_);
    Operand keys = head_rows(k, k_stride, batch, task.sequence, task.head, head_dim, task.tile, kv_len);
    Operand values = head_rows(v, v_stride, batch, task.sequence, task.head, v_head_dim, task.tile, kv_len);
    Acc dk_out[ROWS][COLS], dv_out[ROWS][COLS], one[ROWS];
    fill(dk_out);
    fill(dv_out);
    for (int i = 0; i < ROWS; i++) one[i] = Acc(1);
    for (int from = 0; from < q_len; from += TILE) {
        int first, last;
        look(sh, sight, from, q_len, first, last);
        if (!meets(sh, task.tile)) continue;
        for (int head = task.head * group; head < (task.head + 1) * group; head++) {
            load_statistics(sh, lse, lse_stride, delta, batch, task.sequence, heads, head, from, q_len);
            Operand queries = head_rows(q, q_stride, batch, task.sequence, head, head_dim, from, q_len);
            Operand gradients = head_rows(d_o, d_o_stride, batch, task.sequence, head, v_head_dim, from, q_len);
            Acc s[ROWS][ROWS], dp[ROWS][ROWS];
            dots(s, sh, keys, queries);
            dots(dp, sh, values, gradients);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
#pragma unroll
                for (int j = 0; j < ROWS; j++) {
                    int row = ty + SIDE * i, col = tx + SIDE * j;
                    bool seen;
                    Acc p = probability(sh, s[i][j] * scale, col, task.tile + row, seen);
                    dp[i][j] = seen ? p * (dp[i][j] - sh.delta[col]) * scale : Acc(0);
                    sh.p[row][col] = p;
                }
            }
            add_product(dv_out, sh, columns(gradients, task.column));
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < ROWS; j++) sh.p[ty + SIDE * i][tx + SIDE * j] = dp[i][j];
            add_product(dk_out, sh, columns(queries, task.column));
        }
    }
    store(dk, dk_stride, batch, task.sequence, task.head, head_dim, task.tile, kv_len, task.column, dk_out, one);
    store(dv, dv_stride, batch, task.sequence, task.head, v_head_dim, task.tile, kv_len, task.column, dv_out, one);
}

// o = o exp(lse − l) + o_part exp(lse_part − l), lse = l = log(exp(lse) + exp(lse_part)); a warp for every row and head.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_merge(Acc* o, i64 o_stride, Acc* lse, i64 lse_stride, const T* o_part, i64 o_part_stride,
                const Acc* lse_part, i64 lse_part_stride, i64 rows, int heads, int v_head_dim) {
    i64 task = ((i64)blockIdx.x * THREADS + threadIdx.x) / 32;
    if (task >= rows * heads) return;
    i64 row = task / heads;
    int head = (int)(task % heads), lane = threadIdx.x % 32;
    Acc* out = o + row * o_stride + (i64)head * v_head_dim;
    const T* part = o_part + row * o_part_stride + (i64)head * v_head_dim;
    Acc* l = lse + row * lse_stride + head;
    Acc l_part = lse_part[row * lse_part_stride + head], l_old = *l;
    Acc max = l_old < l_part ? l_part : l_old;
    if (max == -Acc(INF_F32)) {
        // Neither block has a key for this query.
        for (int d = lane; d < v_head_dim; d += 32) out[d] = Acc(0);
        return;
    }
    Acc a = exp(l_old - max), b = exp(l_part - max), sum = a + b;
    Acc old_weight = a / sum, part_weight = b / sum;
    // The first block overwrites what was there, whatever it was.
    for (int d = lane; d < v_head_dim; d += 32) {
        Acc kept = old_weight == Acc(0) ? Acc(0) : out[d] * old_weight;
        out[d] = kept + (part_weight == Acc(0) ? Acc(0) : widen(part[d]) * part_weight);
    }
    __syncwarp();
    if (lane == 0) *l = max + log(sum);
}
