// Floats as integers in the same order.

#if defined(T_F32)
typedef u32 Key;
__device__ __forceinline__ Key bits_of(T x) { return __float_as_uint(x); }
#else
typedef u64 Key;
__device__ __forceinline__ Key bits_of(T x) { return __double_as_longlong(x); }
#endif

// Ordered as the numbers are, 0 and −0 equal.
__device__ __forceinline__ Key key_of(T x) {
    constexpr Key SIGN = Key(1) << (8 * sizeof(T) - 1);
    Key bits = bits_of(x + T(0));
    return bits & SIGN ? ~bits : bits | SIGN;
}
