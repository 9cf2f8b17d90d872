// Rotary position embedding.
//
// A row of threads works on one token. An item is `M` elements of pairs of halves, and as many of their partners; or `M` elements
// of adjacent pairs; or `M` elements that are copied. A thread does its item in up to `HEADS` heads, for which it reads the
// angles once.

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
