// Instructions of Hopper for products of tiles: barriers and copies of the copy engine (TMA), wgmma in bf16.
//
// -DOP= says how operands lie (see grouped_hopper.cu), -DBN= columns of a tile, -DCLUSTER= blocks that share copies.

// 64 rows of 128 bytes: how operands lie whose columns are k.
constexpr int CHUNK_BYTES = 64 * 128;

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

/// Arrives at the barrier at the same place in block `cta` of the cluster.
__device__ __forceinline__ void barrier_arrive(u32 bar, u32 cta) {
    if (CLUSTER == 1)
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
    else
        asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                     "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(bar),
                     "r"(cta)
                     : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
    u32 done;
#ifdef SPIN_LIMIT
    int spins = 0;
#endif
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
#ifdef SPIN_LIMIT
        if (++spins > SPIN_LIMIT) asm volatile("trap;");
#endif
    } while (!done);
}

// TMA loads of 2, 3 or 4 coordinates; with `mask`, to both blocks of the cluster.
__device__ __forceinline__ void load2(u32 to, const TensorMap *map, u32 bar, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1)
                 : "memory");
}

__device__ __forceinline__ void load3(u32 to, const TensorMap *map, u32 bar, bool both, int c0, int c1, int c2) {
    if (CLUSTER > 1 && both)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
                     "{%3, %4, %5}], [%2], %6;" ::"r"(to),
                     "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "h"((u16)3)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                     "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
                     : "memory");
}

__device__ __forceinline__ void load4(u32 to, const TensorMap *map, u32 bar, bool both, int c0, int c1, int c2, int c3) {
    if (CLUSTER > 1 && both)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
                     "{%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
                     "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"((u16)3)
                     : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
            "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
            : "memory");
}

__device__ __forceinline__ void store_rows(const TensorMap *map, u32 from, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(from),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

/// Writes rows of a group, or adds them to what is there.
__device__ __forceinline__ void put_rows(const TensorMap *map, u32 from, bool add, int c0, int c1, int c2) {
    if (add)
        asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                     "r"(from), "r"(c0), "r"(c1), "r"(c2)
                     : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from),
                     "r"(c0), "r"(c1), "r"(c2)
                     : "memory");
}

// A shared-memory descriptor of an operand with 128-byte swizzle. Rows of k: 8 rows of 128 bytes repeat every 1024 bytes.
// Columns of k: 64 elements of one k are 128 bytes, 8 ks repeat every 1024 bytes, the next 64 elements follow after 64 ks.
template <bool COLUMNS> __device__ __forceinline__ u64 operand(u32 address) {
    constexpr u64 layout = (1ull << 62) | ((u64)(1024 >> 4) << 32) | ((u64)(COLUMNS ? CHUNK_BYTES >> 4 : 1) << 16);
    return layout | (u64)((address & 0x3ffff) >> 4);
}

// 16 ks further.
template <bool COLUMNS> constexpr u32 STEP = COLUMNS ? 16 * 128 : 32;

#define F8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)
#define R0 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define R1 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R2 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define R3 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
    "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#if OP == 0
#define MAJORS "0, 0"
#elif OP == 1
#define MAJORS "0, 1"
#else
#define MAJORS "1, 1"
#endif

/// `d = a · b`, or `d += a · b`, for 64 rows, `N` of BN columns and 16 ks.
template <int N> __device__ __forceinline__ void multiply(float (&d)[BN / 2], u64 a, u64 b, u32 add) {
    static_assert(N == 64 || N == 128 || N == BN, "other widths have no instruction here");
    if constexpr (N == 64)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" R0
                     "}, %32, %33, p, 1, 1, " MAJORS ";\n}"
                     : F32(d, 0)
                     : "l"(a), "l"(b), "r"(add));
    else if constexpr (N == 128)
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" R0 ", " R1
                     "}, %64, %65, p, 1, 1, " MAJORS ";\n}"
                     : F32(d, 0), F32(d, 32)
                     : "l"(a), "l"(b), "r"(add));
#if BN == 192
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\nwgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" R0 ", " R1
                     ", " R2 "}, %96, %97, p, 1, 1, " MAJORS ";\n}"
                     : F32(d, 0), F32(d, 32), F32(d, 64)
                     : "l"(a), "l"(b), "r"(add));
#elif BN == 256
    else
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" R0 ", " R1
                     ", " R2 ", " R3 "}, %128, %129, p, 1, 1, " MAJORS ";\n}"
                     : F32(d, 0), F32(d, 32), F32(d, 64), F32(d, 96)
                     : "l"(a), "l"(b), "r"(add));
#endif
}

__device__ __forceinline__ void group_sync(int name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }
