// Rotary position embedding.
//
// A row of threads works on one token. An item is `M` elements of pairs of halves, and as many of their partners; or `M` elements
// of adjacent pairs; or `M` elements that are copied. A thread does its item in up to `HEADS` heads, for which it reads the
// angles once.
//
// Below, whole heads of halves after their norms, in one pass.

constexpr int N = 16 / sizeof(T);
constexpr int HEADS = 4;
constexpr int THREADS = 128;

struct Head {
    i64 head_dim, first, half, heads;
};

// (re, im) turned.
__device__ __forceinline__ void turn(Acc &re, Acc &im, Acc c, Acc s) {
    Acc x = re;
    re = x * c - im * s;
    im = im * c + x * s;
}

template <bool HALVES, int M>
__device__ __forceinline__ void rope(T *y, i64 ys, const T *x, i64 xs, const Acc *cos, i64 cs, const Acc *sin, i64 ss,
                                     const i32 *positions, i64 n, i64 table, Head head, Acc sign, Fault outside) {
    // Pairs of an item; its vectors in one head, the second of them `apart` from the first. A single element has its partner beside
    // it where pairs are adjacent.
    constexpr int PAIRS = HALVES || M == 1 ? M : M / 2;
    constexpr int VECTORS = HALVES || M == 1 ? 2 : 1;
    i64 apart = HALVES ? head.half : 1;
    // Angles that are loaded at once.
    constexpr int A = PAIRS < 16 / int(sizeof(Acc)) ? PAIRS : 16 / int(sizeof(Acc));
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i >= n) return;
    i64 position = positions[i];
    if (position < 0 || position >= table) {
        if (threadIdx.x == 0) outside.raise(i);
        return;
    }
    x += i * xs, y += i * ys, cos += position * cs, sin += position * ss;
    int rotated = head.half / PAIRS, copied = (head.head_dim - 2 * head.half) / M, items = rotated + copied;
    int groups = (head.heads + HEADS - 1) / HEADS;
    // From one of a thread's heads to the next.
    i64 step = groups * head.head_dim;
    for (int item = threadIdx.x; item < items * groups; item += blockDim.x) {
        int group = item / items, j = item % items;
        if (j >= rotated) {
            i64 at = i64(j - rotated) * M;
            if (at >= head.first) at += 2 * head.half;
            at += group * head.head_dim;
#pragma unroll
            for (int k = 0; k < HEADS; k++)
                if (group + k * groups < head.heads) store<M>(y + at + k * step, load<M>(x + at + k * step));
            continue;
        }
        i64 at = group * head.head_dim + head.first + i64(j) * (HALVES ? M : 2 * PAIRS);
        Vec<T, M> v[HEADS][VECTORS];
#pragma unroll
        for (int k = 0; k < HEADS; k++)
            if (group + k * groups < head.heads)
#pragma unroll
                for (int l = 0; l < VECTORS; l++) v[k][l] = load<M>(x + at + k * step + l * apart);
        Acc c[PAIRS], s[PAIRS];
#pragma unroll
        for (int e = 0; e < PAIRS; e += A) {
            Vec<Acc, A> c_part = load<A>(cos + j * PAIRS + e), s_part = load<A>(sin + j * PAIRS + e);
#pragma unroll
            for (int l = 0; l < A; l++) c[e + l] = c_part.at[l], s[e + l] = s_part.at[l] * sign;
        }
#pragma unroll
        for (int k = 0; k < HEADS; k++)
            if (group + k * groups < head.heads) {
                Vec<Acc, M> wide[VECTORS];
#pragma unroll
                for (int l = 0; l < VECTORS; l++) wide[l] = widen(v[k][l]);
#pragma unroll
                for (int e = 0; e < PAIRS; e++)
                    if constexpr (VECTORS == 2) turn(wide[0].at[e], wide[1].at[e], c[e], s[e]);
                    else turn(wide[0].at[2 * e], wide[0].at[2 * e + 1], c[e], s[e]);
#pragma unroll
                for (int l = 0; l < VECTORS; l++) store<M>(y + at + k * step + l * apart, narrow<T>(wide[l]));
            }
    }
}

#define ROPE(NAME, HALVES, M)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                        \
        T *__restrict__ y, i64 ys, const T *__restrict__ x, i64 xs, const Acc *__restrict__ cos, i64 cs,               \
        const Acc *__restrict__ sin, i64 ss, const i32 *__restrict__ positions, i64 n, i64 table, i64 head_dim,        \
        i64 first, i64 half, i64 heads, Acc sign, Fault outside) {                                                     \
        rope<HALVES, M>(y, ys, x, xs, cos, cs, sin, ss, positions, n, table, {head_dim, first, half, heads}, sign,     \
                        outside);                                                                                      \
    }
ROPE(rope_halves, true, N)
ROPE(rope_halves_any, true, 1)
ROPE(rope_adjacent, false, N)
ROPE(rope_adjacent_any, false, 1)

// --- after a norm ------------------------------------------------------------------------------------------------------
//
// y = rope(x · r · w) for each head, r = rsqrt(mean(x²) + eps): `lanes` threads beside each other have a head, a power of two up to
// a warp, each with a vector of either half of it, and that in up to `COUNT` heads.

struct Heads {
    int lanes, groups, heads, head_dim;
};

// The sum over the lanes of a head.
template <int COUNT> __device__ __forceinline__ void head_sums(Acc (&sum)[COUNT], int lanes) {
    for (int lane = lanes / 2; lane > 0; lane /= 2)
#pragma unroll
        for (int k = 0; k < COUNT; k++) sum[k] += __shfl_xor_sync(FULL_MASK, sum[k], lane);
}

// `N` angles of a thread; a half of the head has at least a vector.
__device__ __forceinline__ Vec<Acc, N> angles(const Acc *from) {
    constexpr int A = N < 16 / int(sizeof(Acc)) ? N : 16 / int(sizeof(Acc));
    Vec<Acc, N> all;
#pragma unroll
    for (int e = 0; e < N; e += A) *reinterpret_cast<Vec<Acc, A> *>(all.at + e) = load<A>(from + e);
    return all;
}

extern "C" __global__ void __launch_bounds__(THREADS, 5) norm_rope(
    T *__restrict__ y, i64 ys, Acc *__restrict__ rstd, const T *__restrict__ x, i64 xs, const T *__restrict__ w,
    const Acc *__restrict__ cos, i64 cs, const Acc *__restrict__ sin, i64 ss, const i32 *__restrict__ positions, i64 n,
    i64 table, Heads head, Acc eps, Fault outside) {
    i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y;
    bool live = i < n;
    i64 position = live ? positions[i] : 0;
    if (live && (position < 0 || position >= table)) {
        if (threadIdx.x == 0) outside.raise(i);
        live = false;
    }
    int half = head.head_dim / 2, j = threadIdx.x % head.lanes * N;
    Acc share = Acc(1) / Acc(head.head_dim);
    Vec<Acc, N> c = {}, s = {};
    if (live) c = angles(cos + position * cs + j), s = angles(sin + position * ss + j);
    Vec<T, N> weight[2] = {load<N>(w + j), load<N>(w + half + j)};
    // All threads take part in all steps, since sums are over lanes.
    for (int first = 0; first < head.groups; first += blockDim.x / head.lanes) {
        int group = first + threadIdx.x / head.lanes;
        Vec<T, N> v[HEADS][2];
        bool has[HEADS];
#pragma unroll
        for (int k = 0; k < HEADS; k++) {
            int at = group + k * head.groups;
            has[k] = live && group < head.groups && at < head.heads;
            if (has[k])
#pragma unroll
                for (int l = 0; l < 2; l++) v[k][l] = load<N>(x + i * xs + at * head.head_dim + l * half + j);
        }
        Acc sum[HEADS] = {};
#pragma unroll
        for (int k = 0; k < HEADS; k++)
            if (has[k])
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    Vec<Acc, N> a = widen(v[k][l]);
#pragma unroll
                    for (int e = 0; e < N; e++) sum[k] += a.at[e] * a.at[e];
                }
        head_sums(sum, head.lanes);
#pragma unroll
        for (int k = 0; k < HEADS; k++)
            if (has[k]) {
                int at = group + k * head.groups;
                Acc r = inverse_root(sum[k] * share + eps);
                if (j == 0) rstd[i * head.heads + at] = r;
                Vec<Acc, N> a = widen(v[k][0]), b = widen(v[k][1]), by_a = widen(weight[0]), by_b = widen(weight[1]);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    a.at[e] *= r * by_a.at[e], b.at[e] *= r * by_b.at[e];
                    turn(a.at[e], b.at[e], c.at[e], s.at[e]);
                }
                T *to = y + i * ys + at * head.head_dim + j;
                store<N>(to, narrow<T>(a));
                store<N>(to + half, narrow<T>(b));
            }
    }
}

// With u = dy turned back, g = u ⊙ w and m = mean(g ⊙ x): dx = r · g − x · r³ · m, and dw adds u ⊙ x · r over tokens and heads. A
// block works on a piece, some consecutive tokens, and leaves its sum of dw in a row of `partial: [gridDim.x, head_dim]`. As in the norm's
// backward pass, each thread copies its vectors of the next step to a place of its own while it works on this one; the angles are
// read a step ahead, too, and the positions that say which ones two.
extern "C" __global__ void __launch_bounds__(THREADS, 3) norm_rope_backward(
    T *__restrict__ dx, i64 dxs, Acc *__restrict__ partial, const T *__restrict__ dy, i64 dys, const T *__restrict__ x,
    i64 xs, const T *__restrict__ w, const Acc *__restrict__ rstd, const Acc *__restrict__ cos, i64 cs,
    const Acc *__restrict__ sin, i64 ss, const i32 *__restrict__ positions, i64 n, i64 table, Heads head,
    Pieces pieces, Fault outside) {
    constexpr int COUNT = 2, STAGES = 2;
    extern __shared__ __align__(16) unsigned char dynamic[];
    int thread = threadIdx.y * blockDim.x + threadIdx.x, half = head.head_dim / 2;
    Acc share = Acc(1) / Acc(head.head_dim);
    auto *place = reinterpret_cast<Vec<T, N> *>(dynamic) + thread;
    auto at = [&](int stage, int k, int l, int operand) {
        return place + (((stage * COUNT + k) * 2 + l) * 2 + operand) * THREADS;
    };
    let_next_begin();
    i64 first = pieces.first(blockIdx.x), end = min(n, pieces.first(blockIdx.x + 1));
    // A step is a group of heads of one token: tokens follow each other, and for each the groups that the block takes at once.
    int mine = threadIdx.x / head.lanes, at_once = blockDim.x / head.lanes, j = threadIdx.x % head.lanes * N;
    auto next = [&](i64 &i, int &group) {
        group += at_once;
        if (group - mine >= head.groups) group = mine, i += blockDim.y;
    };
    i64 fetched = first + threadIdx.y;
    int fetched_group = mine;
    auto fetch = [&](int stage) {
        if (fetched < end && fetched_group < head.groups)
#pragma unroll
            for (int k = 0; k < COUNT; k++) {
                int of = fetched_group + k * head.groups;
                if (of < head.heads)
#pragma unroll
                    for (int l = 0; l < 2; l++) {
                        int column = of * head.head_dim + l * half + j;
                        copy_async(at(stage, k, l, 0), dy + fetched * dys + column);
                        copy_async(at(stage, k, l, 1), x + fetched * xs + column);
                    }
            }
        asm volatile("cp.async.commit_group;" ::: "memory");
        next(fetched, fetched_group);
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) fetch(stage);
    Vec<T, N> weight[2] = {load<N>(w + j), load<N>(w + half + j)};
    Acc total[2][N] = {};
    i64 i = first + threadIdx.y, ahead = i;
    int group = mine, ahead_group = mine;
    auto position_ahead = [&] { return ahead < end && ahead_group < head.groups ? positions[ahead] : 0; };
    // What a step reads besides vectors; `has` of a head that is there.
    bool next_has[COUNT];
    Acc next_r[COUNT];
    Vec<Acc, N> next_c = {}, next_s = {};
    auto look_ahead = [&](i64 position) {
        bool live = ahead < end && ahead_group < head.groups;
        if (live && (position < 0 || position >= table)) {
            if (threadIdx.x == 0) outside.raise(ahead);
            live = false;
        }
        if (live) next_c = angles(cos + position * cs + j), next_s = angles(sin + position * ss + j);
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            int of = ahead_group + k * head.groups;
            next_has[k] = live && of < head.heads;
            next_r[k] = next_has[k] ? rstd[ahead * head.heads + of] : Acc(0);
        }
        next(ahead, ahead_group);
    };
    look_ahead(position_ahead());
    i64 next_position = position_ahead();
    for (int stage = 0; i - threadIdx.y < end; next(i, group), stage ^= 1) {
        Vec<Acc, N> c = next_c, s = next_s;
        bool has[COUNT];
        Acc r[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) has[k] = next_has[k], r[k] = next_r[k];
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        Vec<T, N> gradient[COUNT][2], input[COUNT][2];
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            if (has[k])
#pragma unroll
                for (int l = 0; l < 2; l++)
                    gradient[k][l] = *at(stage, k, l, 0), input[k][l] = *at(stage, k, l, 1);
        fetch(stage);
        look_ahead(next_position);
        next_position = position_ahead();
        Vec<Acc, N> u[COUNT][2];
        Acc mean[COUNT] = {};
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            if (has[k]) {
                u[k][0] = widen(gradient[k][0]), u[k][1] = widen(gradient[k][1]);
#pragma unroll
                for (int e = 0; e < N; e++) turn(u[k][0].at[e], u[k][1].at[e], c.at[e], -s.at[e]);
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    Vec<Acc, N> a = widen(input[k][l]), by = widen(weight[l]);
#pragma unroll
                    for (int e = 0; e < N; e++) mean[k] += u[k][l].at[e] * by.at[e] * a.at[e];
                }
            }
        head_sums(mean, head.lanes);
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            if (has[k]) {
                Acc back = r[k] * r[k] * r[k] * (mean[k] * share);
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    Vec<Acc, N> a = widen(input[k][l]), by = widen(weight[l]), d;
#pragma unroll
                    for (int e = 0; e < N; e++) {
                        Acc g = u[k][l].at[e] * r[k];
                        total[l][e] += g * a.at[e];
                        d.at[e] = g * by.at[e] - a.at[e] * back;
                    }
                    int column = (group + k * head.groups) * head.head_dim + l * half + j;
                    store<N>(dx + i * dxs + column, narrow<T>(d));
                }
            }
    }

    // A row for each `lanes` threads of the block, added in order.
    Acc *totals = reinterpret_cast<Acc *>(dynamic);
    __syncthreads();
#pragma unroll
    for (int l = 0; l < 2; l++)
#pragma unroll
        for (int e = 0; e < N; e++) totals[thread / head.lanes * head.head_dim + l * half + j + e] = total[l][e];
    __syncthreads();
    for (int column = thread; column < head.head_dim; column += THREADS) {
        Acc sum = totals[column];
        for (int row = 1; row < THREADS / head.lanes; row++) sum += totals[row * head.head_dim + column];
        partial[blockIdx.x * i64(head.head_dim) + column] = sum;
    }
}
