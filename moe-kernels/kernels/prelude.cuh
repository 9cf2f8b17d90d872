// What every kernel file begins with: the Rust side puts this text before the file's own. No headers are included, neither
// here nor there: the compiler at run time has none.
//
// One of T_F64, T_F32, T_BF16, T_I64, T_I32, T_U8 says what `T` is. Of the floats, `Acc` is the type that sums are kept in.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define INF_F32 __int_as_float(0x7f800000)
#define INF_F64 __longlong_as_double(0x7ff0000000000000ll)
#define FULL_MASK 0xffffffffu

// bfloat16: the upper half of a float.
struct bf16 {
    u16 bits;
};

// --- conversions -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float bf16_to_f32(bf16 x) { return __int_as_float(u32(x.bits) << 16); }

// To the nearest, ties to even.
__device__ __forceinline__ bf16 bf16_from_f32(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two, the first of them in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// To the nearest, ties to even, once: cut off first with the last bit set where something was cut (rounding to odd), since a
// float has more than two bits more than a bf16.
__device__ __forceinline__ bf16 bf16_from_f64(double x) {
    float cut = __double2float_rz(x);
    if (double(cut) != x && x == x) cut = __int_as_float(__float_as_int(cut) | 1);
    return bf16_from_f32(cut);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return bf16_to_f32(x); }

__device__ __forceinline__ double to_f64(float x) { return x; }
__device__ __forceinline__ double to_f64(double x) { return x; }
__device__ __forceinline__ double to_f64(bf16 x) { return bf16_to_f32(x); }

template <typename To> __device__ __forceinline__ To narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return bf16_from_f32(x); }
template <typename To> __device__ __forceinline__ To narrow(double x);
template <> __device__ __forceinline__ double narrow<double>(double x) { return x; }
template <> __device__ __forceinline__ float narrow<float>(double x) { return __double2float_rn(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(double x) { return bf16_from_f64(x); }

#if defined(T_F64)
typedef double T;
typedef double Acc;
#elif defined(T_F32)
typedef float T;
typedef float Acc;
#elif defined(T_BF16)
typedef bf16 T;
typedef float Acc;
#elif defined(T_I64)
typedef i64 T;
#elif defined(T_I32)
typedef i32 T;
#elif defined(T_U8)
typedef u8 T;
#endif

// --- faults ----------------------------------------------------------------------------------------------------------

// Where a kernel says what is wrong with its data. The word keeps the smallest value: the first launch that found
// something, and of that the first row. The kernel must go on without touching memory outside its operands.
struct Fault {
    u64 *word;
    u64 code;
    __device__ __forceinline__ void raise(i64 row) const { atomicMin(word, code | (u64(row) & ((1ull << 40) - 1))); }
};

// --- vectors ---------------------------------------------------------------------------------------------------------

// `N` elements that are loaded and stored at once; the address must be a multiple of their size.
template <typename E, int N> struct alignas(sizeof(E) * N) Vec {
    E at[N];
};

template <int N, typename E> __device__ __forceinline__ Vec<E, N> load(const E *from) {
    return *reinterpret_cast<const Vec<E, N> *>(from);
}

template <int N, typename E> __device__ __forceinline__ void store(E *to, const Vec<E, N> &v) {
    *reinterpret_cast<Vec<E, N> *>(to) = v;
}

// All elements of a vector. Those of bf16 are taken two by two: one instruction for each (the compiler would cut every word in
// halves first).
template <int N> __device__ __forceinline__ Vec<float, N> widen(const Vec<float, N> &v) { return v; }
template <int N> __device__ __forceinline__ Vec<double, N> widen(const Vec<double, N> &v) { return v; }
template <int N> __device__ __forceinline__ Vec<float, N> widen(const Vec<bf16, N> &v) {
    Vec<float, N> wide;
    if constexpr (N % 2 == 0) {
        const u32 *words = reinterpret_cast<const u32 *>(&v);
#pragma unroll
        for (int e = 0; e < N; e += 2) {
            wide.at[e] = __uint_as_float(words[e / 2] << 16);
            wide.at[e + 1] = __uint_as_float(words[e / 2] & 0xffff0000u);
        }
    } else {
#pragma unroll
        for (int e = 0; e < N; e++) wide.at[e] = widen(v.at[e]);
    }
    return wide;
}

template <typename To, int N, typename A> __device__ __forceinline__ Vec<To, N> narrow(const Vec<A, N> &v) {
    Vec<To, N> rounded;
#pragma unroll
    for (int e = 0; e < N; e++) rounded.at[e] = narrow<To>(v.at[e]);
    return rounded;
}

// What instructions take for a place in shared memory.
__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// How the copy engine sees a matrix; a kernel takes it by value, `const __grid_constant__`.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// 16 bytes on their way to shared memory, past the registers; waited for by `cp.async.wait_group`.
__device__ __forceinline__ void copy_async(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
                 : "memory");
}

// Between two launches of which the second may begin before the first one's end (`Launch::early`): the first says that nothing but its
// blocks' ends keeps the second from beginning, and the second waits for what the first has written before it reads any of it.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- sums in a fixed order -------------------------------------------------------------------------------------------

template <typename A> __device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}

template <typename A> __device__ __forceinline__ A warp_max(A x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        A y = __shfl_xor_sync(FULL_MASK, x, lane);
        x = y > x ? y : x;
    }
    return x;
}

// Over a block of `THREADS` threads (a multiple of 32), the same value in all of them. `shared` has room for
// `THREADS / 32` values; it may be used again after another `__syncthreads()`.
template <int THREADS, typename A> __device__ __forceinline__ A block_sum(A x, A *shared) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    A sum = shared[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) sum += shared[warp];
    return sum;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// Over the `blockDim.x` lanes of each of the `blockDim.y` rows of a block, the same value in all of them. Lanes are a power of
// two up to 32 (and fill whole warps together), or a multiple of 32 and then the block has one row.
template <typename A> __device__ __forceinline__ A group_sum(A x) {
    __shared__ A part[32];
    if (blockDim.x <= 32) {
        for (int lane = blockDim.x / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
        return x;
    }
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : A(0));
}

// e^x. Of floats by the unit for powers of two, with a relative error below 2^-22 · (1 + |x|); what is below the normal
// numbers is 0.
__device__ __forceinline__ float fast_exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}
__device__ __forceinline__ double fast_exp(double x) { return exp(x); }

// x^(−1/2).
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

// 1 / x to the last place of a float but one; of what is beyond 2^126, 0.
__device__ __forceinline__ float fast_inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- matrices element by element ---------------------------------------------------------------------------------------

// `N` elements, of 4 bytes together at least, as the words that are loaded and stored. They are taken apart where they are used, not
// where they are loaded, so that nothing waits for one load before the next is under way.
template <typename E, int N> struct Words {
    static constexpr int COUNT = N * sizeof(E) / 4;
    u32 at[COUNT];

    __device__ __forceinline__ E get(int k) const {
        union {
            E element;
            u32 words[sizeof(E) < 4 ? 1 : sizeof(E) / 4];
        } one;
        if constexpr (sizeof(E) < 4) {
            constexpr int EACH = 4 / sizeof(E);
            one.words[0] = at[k / EACH] >> (k % EACH * 8 * sizeof(E));
        } else {
#pragma unroll
            for (int w = 0; w < sizeof(E) / 4; w++) one.words[w] = at[k * (sizeof(E) / 4) + w];
        }
        return one.element;
    }

    // Of words that are 0 there.
    __device__ __forceinline__ void set(int k, E x) {
        union {
            E element;
            u32 words[sizeof(E) < 4 ? 1 : sizeof(E) / 4];
        } one;
        one.words[0] = 0;
        one.element = x;
        if constexpr (sizeof(E) < 4) {
            constexpr int EACH = 4 / sizeof(E);
            at[k / EACH] |= one.words[0] << (k % EACH * 8 * sizeof(E));
        } else {
#pragma unroll
            for (int w = 0; w < sizeof(E) / 4; w++) at[k * (sizeof(E) / 4) + w] = one.words[w];
        }
    }
};

// The first `n` of `N` consecutive elements, zeros after them; at once if all are there and `vectors` says that they may be.
template <int N, typename E> __device__ __forceinline__ Words<E, N> load_up_to(const E *from, int n, bool vectors) {
    Words<E, N> x = {};
    if (vectors && n == N) {
        if constexpr (Words<E, N>::COUNT == 1) {
            x.at[0] = *reinterpret_cast<const u32 *>(from);
        } else if constexpr (Words<E, N>::COUNT == 2) {
            uint2 part = *reinterpret_cast<const uint2 *>(from);
            x.at[0] = part.x, x.at[1] = part.y;
        } else {
#pragma unroll
            for (int w = 0; w < Words<E, N>::COUNT; w += 4) {
                uint4 part = reinterpret_cast<const uint4 *>(from)[w / 4];
                x.at[w] = part.x, x.at[w + 1] = part.y, x.at[w + 2] = part.z, x.at[w + 3] = part.w;
            }
        }
    } else {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < n) x.set(k, from[k]);
    }
    return x;
}

// In assembly, since the compiler would merge vectors with the same elements one by one.
template <int N, typename E>
__device__ __forceinline__ void store_up_to(E *to, const Words<E, N> &x, int n, bool vectors) {
    if (vectors && n == N) {
        if constexpr (Words<E, N>::COUNT == 1) {
            asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(x.at[0]) : "memory");
        } else if constexpr (Words<E, N>::COUNT == 2) {
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.at[0]), "r"(x.at[1]) : "memory");
        } else {
#pragma unroll
            for (int w = 0; w < Words<E, N>::COUNT; w += 4)
                asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(reinterpret_cast<u32 *>(to) + w), "r"(x.at[w]),
                             "r"(x.at[w + 1]), "r"(x.at[w + 2]), "r"(x.at[w + 3])
                             : "memory");
        }
        return;
    }
#pragma unroll
    for (int k = 0; k < N; k++)
        if (k < n) to[k] = x.get(k);
}

// How the blocks of a launch lie over a matrix: `across` of them beside each other, each thread with `N` consecutive
// columns of some rows. A matrix without gaps comes as one of other rows, of which the last one may be shorter.
struct Tiles {
    i64 rows, cols, last;
    i32 across, vectors;

    // Columns that row `i` has from `j` on, at most `n`.
    __device__ __forceinline__ int left(i64 i, i64 j, int n) const {
        i64 end = i + 1 < rows ? cols : i + 1 == rows ? last : 0;
        return int(max(i64(0), min(end - j, i64(n))));
    }
};

// `ROWS` rows of one thread: everything is read before anything is written, so that many reads are under way.
template <int N, int ROWS, typename Work> __device__ __forceinline__ void for_tiles(const Tiles &tiles, const Work &work) {
    u32 down = blockIdx.x / u32(tiles.across), across = blockIdx.x % u32(tiles.across);
    i64 j = (i64(across) * blockDim.x + threadIdx.x) * N;
    i64 first = i64(down) * blockDim.y * ROWS + threadIdx.y;
    typename Work::In in[ROWS];
    // Whole vectors of all rows: no branches between one read and the next.
    if (tiles.vectors && tiles.left(first, j, N) == N && tiles.left(first + (ROWS - 1) * i64(blockDim.y), j, N) == N) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) in[r] = work.read(first + r * i64(blockDim.y), j, N, true);
#pragma unroll
        for (int r = 0; r < ROWS; r++) work.write(first + r * i64(blockDim.y), j, N, true, in[r]);
        return;
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        i64 i = first + r * blockDim.y;
        int n = tiles.left(i, j, N);
        if (n > 0) in[r] = work.read(i, j, n, tiles.vectors);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        i64 i = first + r * blockDim.y;
        int n = tiles.left(i, j, N);
        if (n > 0) work.write(i, j, n, tiles.vectors, in[r]);
    }
}

// --- pieces of rows ---------------------------------------------------------------------------------------------------

// Row `first` of each of `large` pieces of `each` rows, and then of pieces of `rest` rows.
struct Pieces {
    i64 large, each, rest;

    __device__ __forceinline__ i64 first(i64 piece) const {
        return min(piece, large) * each + max(piece - large, i64(0)) * rest;
    }
};

// --- sums over rows ----------------------------------------------------------------------------------------------------

// A block of 32 · 8 threads sums 32 · N columns.
enum { SUM_ROWS = 8 };

// `sum[k]` = Σ factor[i] · x[i, j + k] for the `n` columns from `j` on and rows `first..end`, in an order that depends on
// nothing but their number: every eighth row ascending, then these eight. Only threads of row 0 get it. `factor` may be null.
template <int N, typename E, typename A>
__device__ __forceinline__ void sum_of_rows(A (&sum)[N], const E *x, i64 xs, i64 first, i64 end, i64 j, int n,
                                            bool vectors, const A *factor) {
    __shared__ A parts[SUM_ROWS - 1][N][32];
#pragma unroll
    for (int k = 0; k < N; k++) sum[k] = 0;
    // Two loops, of which the first has no branches, so that many reads are under way.
    i64 i = first + threadIdx.y;
    if (vectors && n == N && !factor) {
#pragma unroll 8
        for (; i < end; i += SUM_ROWS) {
            Words<E, N> v = load_up_to<N>(x + i * xs + j, N, true);
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += widen(v.get(k));
        }
    }
    if (n > 0) {
        for (; i < end; i += SUM_ROWS) {
            Words<E, N> v = load_up_to<N>(x + i * xs + j, n, vectors);
            A by = factor ? factor[i] : A(1);
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += by * widen(v.get(k));
        }
    }
    if (threadIdx.y > 0) {
#pragma unroll
        for (int k = 0; k < N; k++) parts[threadIdx.y - 1][k][threadIdx.x] = sum[k];
    }
    __syncthreads();
    if (threadIdx.y == 0) {
#pragma unroll
        for (int part = 0; part < SUM_ROWS - 1; part++)
#pragma unroll
            for (int k = 0; k < N; k++) sum[k] += parts[part][k][threadIdx.x];
    }
}
