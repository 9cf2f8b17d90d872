// Grouped matrix products in bf16 for Hopper: wgmma fed by TMA.
//
// One block per multiprocessor walks over the tiles of all groups. Warpgroup 0 loads (one thread of it issues TMA into a
// ring of stages), warpgroups 1 and 2 multiply. Cooperative: each takes 64 of a tile's 128 rows. PINGPONG: each takes
// every other tile, so that one's epilogue runs under the other's products.
// The two blocks of a cluster take tiles one below the other and share what they load of B, unless the tiles are of two
// groups. No padding: rows past a group's end are clipped by the tensor map (see `ragged`), loads of them are zero.
// Every element of the output is written by one thread, after a sum over ascending k: no atomics in sums, same bits twice.
//
// -DOP=0 forward  y_e = x_e w_eT   A = x  [n, k] rows of k,  B = w [e, out, k] rows of k
// -DOP=1 dgrad    y_e = x_e w_e    A = x  [n, k] rows of k,  B = w [e, k, in] columns of k
// -DOP=2 wgrad    g_e += dy_eT x_e A = dy [n, out] columns of k, B = x [n, in] columns of k; k are the group's rows
// -DBN=128|192|256 (columns of a tile) -DSTAGES= -DBUFFERS= (of slices of the result, each warpgroup) -DCLUSTER=1|2 -DPINGPONG=0|1

struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

constexpr int BM = 128, BK = 64;
// Columns of tiles that are worked on side by side.
constexpr int BAND = 8;
// Blocks of 64 rows that a warpgroup holds.
constexpr int UNITS = PINGPONG ? 2 : 1;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
// 64 rows of 128 bytes: what one store to global memory takes, and how operands lie whose columns are k.
constexpr int SLICE_BYTES = 64 * 128;
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int BARRIER_OFFSET = OUTPUT_OFFSET + 2 * BUFFERS * SLICE_BYTES;
constexpr int ENDS_OFFSET = BARRIER_OFFSET + STAGES * 16;
constexpr bool A_COLUMNS = OP == 2, B_COLUMNS = OP != 0;
// Warps that have to be done with a stage before it is filled again.
constexpr int READERS = (PINGPONG ? 4 : 8) * CLUSTER;
constexpr int RAGGED = 1 << 30;

// B comes in pieces, which the blocks of a cluster load in turns: rows of k in CLUSTER pieces, columns of k in chunks of 64.
constexpr int PIECES = B_COLUMNS ? BN / 64 : CLUSTER;
constexpr int PIECE_ROWS = B_COLUMNS ? BK : BN / CLUSTER;

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

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

__device__ __forceinline__ void add_rows(const TensorMap *map, u32 from, int c0, int c1, int c2) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}

// A shared-memory descriptor of an operand with 128-byte swizzle. Rows of k: 8 rows of 128 bytes repeat every 1024 bytes.
// Columns of k: 64 elements of one k are 128 bytes, 8 ks repeat every 1024 bytes, the next 64 elements follow after 64 ks.
template <bool COLUMNS> __device__ __forceinline__ u64 operand(u32 address) {
    constexpr u64 layout = (1ull << 62) | ((u64)(1024 >> 4) << 32) | ((u64)(COLUMNS ? SLICE_BYTES >> 4 : 1) << 16);
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

struct Tile {
    int expert;
    // Its first row and column in the group's output.
    int m, n;
    // Rows of the output from `m` on; 0 for a block that only keeps its neighbour company.
    int rows;
    // The group's first row and its rows.
    int first, len;
    int k_blocks;
    // Both blocks of the cluster have the same columns of the same group.
    bool shared;
};

struct Grid {
    const int *offsets;
    // Ends of the groups' row tiles, counted over all groups (not for wgrad).
    const int *ends;
    int experts, m, n, k;
    int n_tiles, row_tiles;
    int per_expert, total;
};

/// The group of row tile `i`: as many as end at or before it. All lanes of a warp together.
__device__ __forceinline__ int group_of(const Grid &g, int i) {
    int e = 0;
    for (int base = 0; base < g.experts; base += 32) {
        int j = base + (threadIdx.x & 31);
        e += __popc(__ballot_sync(~0u, j < g.experts && g.ends[j] <= i));
    }
    return e;
}

/// Tile `index` of this cluster's: BAND column tiles wide bands from top to bottom, so that what runs at the same time
/// shares rows of A and B in the cache.
__device__ __forceinline__ Tile tile_at(const Grid &g, int index, int rank) {
    Tile t;
    int pairs = (g.row_tiles + CLUSTER - 1) / CLUSTER;
    if (OP == 2) {
        t.expert = index / g.per_expert;
        index -= t.expert * g.per_expert;
    }
    int band = index / (pairs * BAND);
    int in_band = index - band * pairs * BAND;
    int width = min(BAND, g.n_tiles - band * BAND);
    int pair = in_band / width;
    t.n = (band * BAND + in_band - pair * width) * BN;
    int i = pair * CLUSTER + rank;
    if (OP == 2) {
        t.m = i * BM;
        t.rows = max(g.m - t.m, 0);
        t.first = __ldg(g.offsets + t.expert);
        t.len = __ldg(g.offsets + t.expert + 1) - t.first;
        t.k_blocks = (t.len + BK - 1) / BK;
        t.shared = true;
    } else {
        t.expert = group_of(g, pair * CLUSTER);
        t.shared = CLUSTER > 1 && g.ends[t.expert] > pair * CLUSTER + 1;
        if (!t.shared && rank) t.expert = group_of(g, i);
        t.k_blocks = (g.k + BK - 1) / BK;
        if (t.expert < g.experts) {
            t.first = __ldg(g.offsets + t.expert);
            t.len = __ldg(g.offsets + t.expert + 1) - t.first;
            t.m = (i - (t.expert ? g.ends[t.expert - 1] : 0)) * BM;
            t.rows = t.len - t.m;
        } else {
            // Past the last tile: what it loads lies outside of the operands and is zero.
            t.m = t.rows = t.len = 0;
            t.first = RAGGED;
        }
    }
    return t;
}

struct Ring {
    u32 stage = 0, phase = 0;
    __device__ __forceinline__ void advance(u32 by) {
        stage += by;
        if (by == 1) {
            if (stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        } else {
            phase ^= (stage / STAGES) & 1;
            stage %= STAGES;
        }
    }
};

/// One warp: fills stages for all tiles of this block.
__device__ __forceinline__ void produce(const Grid &g, const TensorMap *map_a, const TensorMap *map_b, u32 smem, u32 full, u32 empty,
                                        int rank) {
    Ring ring;
    bool one = (threadIdx.x & 31) == 0;
    for (int index = blockIdx.x / CLUSTER; index < g.total; index += gridDim.x / CLUSTER) {
        Tile t = tile_at(g, index, rank);
        for (int kb = 0; kb < t.k_blocks; kb++) {
            barrier_wait(empty + ring.stage * 8, ring.phase ^ 1);
            if (one) {
                u32 bar = full + ring.stage * 8;
                u32 a = smem + ring.stage * STAGE_BYTES, b = a + A_BYTES;
                int k = kb * BK;
                barrier_expect(bar, STAGE_BYTES);
                if (OP == 2) {
                    for (int c = 0; c < BM / 64; c++)
                        load4(a + c * SLICE_BYTES, map_a, bar, false, t.m + c * 64, RAGGED - t.len + k, t.first + t.len, RAGGED);
                } else {
                    load2(a, map_a, bar, k, t.first + t.m);
                }
                // Where the pieces are odd in number, the blocks take the larger part in turns.
                int from = t.shared ? (rank + kb) % CLUSTER : 0, by = t.shared ? CLUSTER : 1;
#pragma unroll 1
                for (int piece = from; piece < PIECES; piece += by) {
                    u32 at = b + piece * PIECE_ROWS * 128;
                    int n = t.n + piece * (B_COLUMNS ? 64 : PIECE_ROWS);
                    if (OP == 2)
                        load4(at, map_b, bar, t.shared, n, RAGGED - t.len + k, t.first + t.len, RAGGED);
                    else
                        load3(at, map_b, bar, t.shared, B_COLUMNS ? n : k, B_COLUMNS ? k : n, t.expert);
                }
            }
            __syncwarp();
            ring.advance(1);
        }
    }
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ void group_sync(int name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

/// A warpgroup's 64 rows: slices of 128 bytes of columns go through shared memory to the output.
__device__ __forceinline__ void epilogue(const float (&d)[BN / 2], const TensorMap *map, const Grid &g, const Tile &t, int m, u32 buffers,
                                         int group, u32 &slice) {
    int thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp = thread >> 5;
    constexpr int COLUMNS = OP == 2 ? 32 : 64;
#pragma unroll
    for (int s = 0; s < BN / COLUMNS; s++) {
        if (t.n + s * COLUMNS < g.n) {
            u32 buffer = buffers + (slice % BUFFERS) * SLICE_BYTES;
            slice++;
            if (thread == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
            group_sync(group + 1);
            if (OP == 2) {
                int row = warp * 16 + lane / 4;
#pragma unroll
                for (int j = 0; j < COLUMNS / 8; j++) {
                    const float *v = d + s * (COLUMNS / 2) + j * 4;
                    int column = ((j * 2 + (lane & 3) / 2) ^ (row & 7)) * 16 + (lane & 1) * 8;
                    u32 at = buffer + row * 128 + column;
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v[0]), "f"(v[1]) : "memory");
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + 8 * 128), "f"(v[2]), "f"(v[3]) : "memory");
                }
            } else {
                int row = warp * 16 + (lane & 15);
#pragma unroll
                for (int j = 0; j < COLUMNS / 16; j++) {
                    const float *v = d + s * (COLUMNS / 2) + j * 8;
                    u32 at = buffer + row * 128 + ((j * 2 + lane / 16) ^ (row & 7)) * 16;
                    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(pack(v[0], v[1])),
                                 "r"(pack(v[2], v[3])), "r"(pack(v[4], v[5])), "r"(pack(v[6], v[7]))
                                 : "memory");
                }
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            group_sync(group + 1);
            if (thread == 0) {
                if (OP == 2)
                    add_rows(map, buffer, t.n + s * COLUMNS, m, t.expert);
                else
                    store_rows(map, buffer, t.n + s * COLUMNS, RAGGED - t.len + m, t.first + t.len, RAGGED);
                asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            }
        }
    }
}

struct Consumer {
    Ring ring;
    u32 smem, full, empty;
    // 0 or 1 of the two warpgroups.
    int group;

    __device__ __forceinline__ void release(u32 stage) {
        int lane = threadIdx.x & 31;
        if (lane < CLUSTER) barrier_arrive(empty + stage * 8, lane);
    }
    // Warpgroups that take turns hand the ring over when the last block of k has come: a parity tells only neighbouring rounds
    // apart, so that nobody may wait for a stage whose round before is not there yet.
    __device__ __forceinline__ void await_turn() {
        if (PINGPONG) asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory");
    }
    __device__ __forceinline__ void hand_over() {
        if (PINGPONG) asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory");
    }

    /// The sum over all blocks of k, for `U` times 64 rows from `m` on and `N` columns.
    template <int U, int N> __device__ __forceinline__ void sum(float (&d)[UNITS][BN / 2], int m, int k_blocks) {
        u32 last = 0;
        for (int kb = 0; kb < k_blocks; kb++) {
            barrier_wait(full + ring.stage * 8, ring.phase);
            if (kb == k_blocks - 1) hand_over();
            u32 a = smem + ring.stage * STAGE_BYTES, b = a + A_BYTES;
            u64 da = operand<A_COLUMNS>(a + m * 128), db = operand<B_COLUMNS>(b);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int k = 0; k < BK / 16; k++) {
#pragma unroll
                for (int u = 0; u < U; u++)
                    multiply<N>(d[u], da + (u64)((u * 64 * 128 + k * STEP<A_COLUMNS>) >> 4), db + (u64)((k * STEP<B_COLUMNS>) >> 4),
                                (kb | k) != 0);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            // The products of the block before are done: its stage is free.
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (kb > 0) release(last);
            last = ring.stage;
            ring.advance(1);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        release(last);
    }

    /// Nothing of the tile is this warpgroup's.
    __device__ __forceinline__ void pass(int k_blocks) {
        for (int kb = 0; kb < k_blocks; kb++) {
            barrier_wait(full + ring.stage * 8, ring.phase);
            if (kb == k_blocks - 1) hand_over();
            release(ring.stage);
            ring.advance(1);
        }
    }
};

/// One warpgroup: multiplies its rows of all tiles (or all rows of its tiles) of this block.
__device__ __forceinline__ void consume(const Grid &g, const TensorMap *map_c, u32 smem, u32 full, u32 empty, int rank, int group) {
    Consumer c = {{}, smem, full, empty, group};
    u32 slice = 0, buffers = smem + OUTPUT_OFFSET + group * BUFFERS * SLICE_BYTES;
    bool turn = !PINGPONG || group == 0;
    if (group == 1) c.hand_over();
    for (int index = blockIdx.x / CLUSTER; index < g.total; index += gridDim.x / CLUSTER) {
        Tile t = tile_at(g, index, rank);
        if (t.k_blocks == 0) continue;
        if (PINGPONG) {
            bool mine = turn;
            turn = !turn;
            if (!mine) {
                c.ring.advance(t.k_blocks);
                continue;
            }
        }
        c.await_turn();
        int m = PINGPONG ? 0 : group * 64;
        if (t.rows <= m) {
            c.pass(t.k_blocks);
            continue;
        }
        // Less work where the tile passes the end of the group or the last column.
        float d[UNITS][BN / 2];
        int columns = g.n - t.n;
        if (columns <= 64)
            c.sum<UNITS, 64>(d, m, t.k_blocks);
        else if (columns <= 128)
            c.sum<UNITS, 128>(d, m, t.k_blocks);
        else if (UNITS > 1 && t.rows <= 64)
            c.sum<1, BN>(d, m, t.k_blocks);
        else
            c.sum<UNITS, BN>(d, m, t.k_blocks);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            if (t.rows > m + u * 64) epilogue(d[u], map_c, g, t, t.m + m + u * 64, buffers, group, slice);
        }
    }
    if ((threadIdx.x & 127) == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/// `m` (wgrad only), `n` and `k` (not for wgrad) are the sizes of one group's product, `rows` those of the ragged operands.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
grouped_hopper(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_c,
               const i32 *offsets, i64 experts, i64 rows, i64 m, i64 n, i64 k, Fault fault) {
    extern __shared__ __align__(1024) unsigned char memory[];
    u32 smem = shared_address(memory);
    u32 full = smem + BARRIER_OFFSET, empty = full + STAGES * 8;
    int *ends = (int *)(memory + ENDS_OFFSET);
    int rank = CLUSTER > 1 ? cluster_rank() : 0;

    Grid g;
    g.offsets = offsets;
    g.ends = ends;
    g.experts = int(experts);
    g.m = int(m);
    g.n = int(n);
    g.k = int(k);
    g.n_tiles = (g.n + BN - 1) / BN;

    // Offsets that do not ascend from 0 to at most `rows` would address what is not the operands'.
    bool sound = threadIdx.x > 0 || offsets[0] == 0;
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int from = offsets[e], to = offsets[e + 1];
        sound = sound && from <= to && from >= 0 && to <= rows;
        if (OP != 2) ends[e] = (to - from + BM - 1) / BM;
    }
    sound = __syncthreads_and(sound);
    if (OP != 2 && threadIdx.x < 32) {
        int sum = 0;
        for (int base = 0; base < experts; base += 32) {
            int e = base + threadIdx.x;
            int v = e < experts ? ends[e] : 0;
            for (int by = 1; by < 32; by *= 2) {
                int lower = __shfl_up_sync(~0u, v, by);
                if ((int)threadIdx.x >= by) v += lower;
            }
            if (e < experts) ends[e] = sum + v;
            sum += __shfl_sync(~0u, v, 31);
        }
    }
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(full + s * 8, 1);
            barrier_init(empty + s * 8, READERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_sync();
    if (OP == 2) {
        g.row_tiles = (g.m + BM - 1) / BM;
        g.per_expert = (g.row_tiles + CLUSTER - 1) / CLUSTER * g.n_tiles;
        g.total = g.per_expert * g.experts;
    } else {
        g.row_tiles = ends[experts - 1];
        g.per_expert = 0;
        g.total = (g.row_tiles + CLUSTER - 1) / CLUSTER * g.n_tiles;
    }
    if (!sound) {
        if (blockIdx.x == 0 && threadIdx.x == 0) fault.raise(0);
        g.total = 0;
    }

    int warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < 32) produce(g, &map_a, &map_b, smem, full, empty, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(g, &map_c, smem, full, empty, rank, warpgroup - 1);
    }
    // The neighbour may still signal this block's barriers or write what it shares into its stages.
    if (CLUSTER > 1) cluster_sync();
}
