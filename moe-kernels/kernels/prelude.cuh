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
#define NAN_F32 __int_as_float(0x7fffffff)
#define INF_F64 __longlong_as_double(0x7ff0000000000000ll)
#define NAN_F64 __longlong_as_double(0x7fffffffffffffffll)
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

template <typename E> __device__ __forceinline__ bool aligned(const E *at, i64 stride, int bytes) {
    return u64(at) % bytes == 0 && (stride * i64(sizeof(E))) % bytes == 0;
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

template <int THREADS, typename A> __device__ __forceinline__ A block_max(A x, A *shared) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    A most = shared[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / 32; warp++) most = shared[warp] > most ? shared[warp] : most;
    return most;
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

// 1 / x to the last place of a float but one; of what is beyond 2^126, 0.
__device__ __forceinline__ float fast_inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
