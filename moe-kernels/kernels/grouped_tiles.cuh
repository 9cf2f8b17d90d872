// Which tile of which group a block works on, and where operands stand in shared memory.

constexpr int BM = 128, BK = 64;
// Columns of tiles that are worked on side by side.
constexpr int BAND = 8;
// Blocks of 64 rows that a warpgroup holds.
constexpr int UNITS = PINGPONG ? 2 : 1;
// Rows of k of a gate and of its counterpart stand in one tile.
constexpr bool PAIRS = GLU && OP == 0;
// Columns of the result that a tile has.
constexpr int TILE_COLUMNS = PAIRS ? BN / 2 : BN;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
// What one copy to global memory takes of a result: 64 rows of so many columns. A set of slices goes at a time: gate, up and their
// product, or the gradients of gate and up.
constexpr int SLICE_COLUMNS = OP == 2 || PAIRS ? 32 : 64;
constexpr int SLICE_ROW = SLICE_COLUMNS * (OP == 2 ? 4 : 2), SLICE_BYTES = 64 * SLICE_ROW;
constexpr int SET = PAIRS ? 3 : GLU ? 2 : 1, SET_BYTES = SET * SLICE_BYTES;
constexpr int OUTPUT_OFFSET = STAGES * STAGE_BYTES;
constexpr int BARRIER_OFFSET = OUTPUT_OFFSET + 2 * BUFFERS * SET_BYTES;
// Two barriers of each stage, one of each set.
constexpr int ENDS_OFFSET = BARRIER_OFFSET + STAGES * 16 + 2 * BUFFERS * 8;
constexpr bool A_COLUMNS = OP == 2, B_COLUMNS = OP != 0;
// Warps that have to be done with a stage before it is filled again.
constexpr int READERS = (PINGPONG ? 4 : 8) * CLUSTER;
constexpr int RAGGED = 1 << 30;

// B comes in pieces, which the blocks of a cluster load in turns: rows of k in CLUSTER pieces (or those of gate and of up), columns of k
// in chunks of 64.
constexpr int PIECES = B_COLUMNS ? BN / 64 : PAIRS ? 2 : CLUSTER;
constexpr int PIECE_ROWS = B_COLUMNS ? BK : BN / PIECES;

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
    t.n = (band * BAND + in_band - pair * width) * TILE_COLUMNS;
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
