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
// -DOP=2 wgrad    g_e += dy_eT x_e A = dy [n, out] columns of k, B = x [n, in] columns of k; k are the group's rows; or g_e = dy_eT x_e
// -DGLU=1 (SiLU) or 2 (GELU's tanh approximation), with the gated activation: forward `out` is gate and up, and a tile has the columns
//  of both that belong together; the input gradient is that of the activation, whose backward follows.
// -DBN=192|256 (columns of a tile) -DSTAGES= -DBUFFERS= (sets of slices of the result, each warpgroup) -DCLUSTER=2 -DPINGPONG=0|1
// What the crate does not build, BN=128 and CLUSTER=1, is there to be measured beside (benchmarks/grouped_gemm.py).

// A stage goes back under the first product of the next block, not the last, and the next tile's place is found while stages are full.
// By measurement this pays with the activation's backward and costs elsewhere (docs/benchmarks.md).
constexpr bool EAGER = GLU && OP == 1;

/// One warp: fills stages for all tiles of this block.
__device__ __forceinline__ void produce(const Grid &g, const TensorMap *map_a, const TensorMap *map_b, u32 smem, u32 full, u32 empty,
                                        int rank) {
    Ring ring;
    bool one = (threadIdx.x & 31) == 0;
    int index = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    Tile next;
    if (EAGER && index < g.total) next = tile_at(g, index, rank);
    for (; index < g.total; index += step) {
        Tile t = EAGER ? next : tile_at(g, index, rank);
        int after = index + step;
        if (EAGER && t.k_blocks == 0 && after < g.total) next = tile_at(g, after, rank);
        for (int kb = 0; kb < t.k_blocks; kb++) {
            barrier_wait(empty + ring.stage * 8, ring.phase ^ 1);
            if (one) {
                u32 bar = full + ring.stage * 8;
                u32 a = smem + ring.stage * STAGE_BYTES, b = a + A_BYTES;
                int k = kb * BK;
                barrier_expect(bar, STAGE_BYTES);
                if (OP == 2) {
                    for (int c = 0; c < BM / 64; c++)
                        load4(a + c * CHUNK_BYTES, map_a, bar, false, t.m + c * 64, RAGGED - t.len + k, t.first + t.len, RAGGED);
                } else {
                    load2(a, map_a, bar, k, t.first + t.m);
                }
                // Where the pieces are odd in number, the blocks take the larger part in turns.
                int from = t.shared ? (rank + kb) % CLUSTER : 0, by = t.shared ? CLUSTER : 1;
#pragma unroll 1
                for (int piece = from; piece < PIECES; piece += by) {
                    u32 at = b + piece * PIECE_ROWS * 128;
                    int n = t.n + piece * (B_COLUMNS ? 64 : PAIRS ? g.n : PIECE_ROWS);
                    if (OP == 2)
                        load4(at, map_b, bar, t.shared, n, RAGGED - t.len + k, t.first + t.len, RAGGED);
                    else
                        load3(at, map_b, bar, t.shared, B_COLUMNS ? n : k, B_COLUMNS ? k : n, t.expert);
                }
            }
            __syncwarp();
            ring.advance(1);
            if (EAGER && kb == 0 && after < g.total) next = tile_at(g, after, rank);
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
                bool last_step = k == BK / 16 - 1;
                if (EAGER || last_step) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                if (EAGER ? k == 0 : last_step) {
                    // The products of the block before are done: its stage is free.
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    if (kb > 0) release(last);
                }
            }
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
__device__ __forceinline__ void consume(const Grid &g, const Result &result, u32 smem, u32 full, u32 empty, int rank, int group) {
    Consumer c = {{}, smem, full, empty, group};
    Slices slices = {smem + OUTPUT_OFFSET + group * BUFFERS * SET_BYTES, empty + STAGES * 8 + group * BUFFERS * 8, group, 0};
    bool turn = !PINGPONG || group == 0;
    if (group == 1) c.hand_over();
    for (int index = blockIdx.x / CLUSTER; index < g.total; index += gridDim.x / CLUSTER) {
        Tile t = tile_at(g, index, rank);
        if (t.k_blocks == 0) {
#if OP == 2
            // No turn is taken: each warpgroup has half of the rows.
            if (!result.add && t.rows > group * 64) write_zeros(result, g, t, t.m + group * 64, slices);
#endif
            continue;
        }
        if (PINGPONG) {
            bool mine = turn;
            turn = !turn;
            if (!mine) {
                c.ring.advance(t.k_blocks);
                continue;
            }
        }
        int m = PINGPONG ? 0 : group * 64;
#if GLU && OP == 1
        // What the epilogue begins with comes while the products are summed up.
        if (t.rows > m && (threadIdx.x & 127) == 0) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            load_set(result, t, t.m + m, t.n, slices, 0);
            load_next(result, g, t, t.m + m, t.n, 0, slices);
        }
        __syncwarp();
#endif
        c.await_turn();
        if (t.rows <= m) {
            c.pass(t.k_blocks);
            continue;
        }
        // Less work where the tile passes the end of the group or the last column.
        float d[UNITS][BN / 2];
        int columns = g.n - t.n;
        if (!PAIRS && columns <= 64)
            c.sum<UNITS, 64>(d, m, t.k_blocks);
        else if (!PAIRS && columns <= 128)
            c.sum<UNITS, 128>(d, m, t.k_blocks);
        else if (UNITS > 1 && t.rows <= 64)
            c.sum<1, BN>(d, m, t.k_blocks);
        else
            c.sum<UNITS, BN>(d, m, t.k_blocks);
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            if (t.rows > m + u * 64) epilogue(d[u], result, g, t, t.m + m + u * 64, u, slices);
        }
    }
    if ((threadIdx.x & 127) == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#if GLU && OP == 0
#define MAPS_OF_RESULT \
    const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap y, \
        const float *probabilities
#elif GLU
#define MAPS_OF_RESULT \
    const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap dgate, \
        const __grid_constant__ TensorMap dup, const float *probabilities, float *partial
#elif OP == 2
#define MAPS_OF_RESULT const __grid_constant__ TensorMap map_c, i64 add
#else
#define MAPS_OF_RESULT const __grid_constant__ TensorMap map_c
#endif

/// `m` (wgrad only), `n` and `k` (not for wgrad) are the sizes of one group's product (`n` without up), `rows` those of the ragged
/// operands.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
grouped_hopper(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, MAPS_OF_RESULT, const i32 *offsets,
               i64 experts, i64 rows, i64 m, i64 n, i64 k, Fault fault) {
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
    g.n_tiles = (g.n + TILE_COLUMNS - 1) / TILE_COLUMNS;

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
        for (int s = 0; s < 2 * BUFFERS; s++) barrier_init(empty + STAGES * 8 + s * 8, 1);
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
#if GLU && OP == 0
        Result result = {{&gate, &up, &y}, probabilities};
#elif GLU
        Result result = {{&dgate, &dup}, probabilities, {&gate, &up}, partial, rows};
#elif OP == 2
        Result result = {{&map_c}, add != 0};
#else
        Result result = {{&map_c}};
#endif
        consume(g, result, smem, full, empty, rank, warpgroup - 1);
    }
    // The neighbour may still signal this block's barriers or write what it shares into its stages.
    if (CLUSTER > 1) cluster_sync();
}

#if GLU && OP == 1
/// The gradients of the probabilities: of each row of a group, the sums of its tiles in their order.
extern "C" __global__ void probability_gradients(float *__restrict__ dp, const float *__restrict__ partial, const i32 *offsets, i64 experts,
                                                 i64 rows, i64 tiles) {
    i64 end = min(i64(offsets[experts]), rows);
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < end; i += i64(gridDim.x) * blockDim.x) {
        float sum = partial[i];
        for (i64 t = 1; t < tiles; t++) sum += partial[t * rows + i];
        dp[i] = sum;
    }
}
#endif
