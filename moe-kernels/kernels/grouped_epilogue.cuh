// What becomes of a tile's sums: slices of columns go through shared memory to the output, as they are or with the gated activation.
//
// Forward, gate and up of the same columns are in the same thread: it writes both, rounded, and the activation of what it rounded.
// Backward, the sums are the activation's gradient: slices of gate and up come into the buffers that their gradients leave from, the
// first of them while the products are summed up.

/// What becomes of the sums.
struct Result {
    // Where the slices of a set go.
    const TensorMap *to[SET];
#if OP == 2
    // They are added to what is there. Else they are written, 0 where a group has no rows.
    bool add;
#endif
#if GLU
    // The probability of each row, if there are any.
    const float *probabilities;
#endif
#if GLU && OP == 1
    // Gate and up.
    const TensorMap *from[2];
    // Sums by which the probabilities' gradients are made, of each tile's columns and of all rows, if they are wanted.
    float *partial;
    i64 rows;
#endif
};

/// Where 16 bytes of a row stand in a slice, which is swizzled by as many bytes as a row has.
__device__ __forceinline__ u32 in_slice(u32 slice, int row, int chunk) {
    return slice + row * SLICE_ROW + (chunk ^ (SLICE_ROW == 128 ? row & 7 : (row >> 1) & 3)) * 16;
}

/// 16 columns of 16 rows of a warp, as the sums lie in registers: words of the upper and of the lower 8 rows, then those of the next
/// 8 columns.
__device__ __forceinline__ void put(u32 at, const u32 (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}
__device__ __forceinline__ void get(u32 at, u32 (&v)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void round_four(const float *v, u32 (&words)[4]) {
#pragma unroll
    for (int w = 0; w < 4; w++) words[w] = pack(v[2 * w], v[2 * w + 1]);
}

/// Where the slices of a warpgroup pass through shared memory, and how many did.
struct Slices {
    u32 buffers, loaded;
    int group;
    u32 count;

    __device__ __forceinline__ u32 buffer() const { return buffers + (count % BUFFERS) * SET_BYTES; }

    /// Before a set is written: its buffer has been read.
    __device__ __forceinline__ void begin() {
        if ((threadIdx.x & 127) == 0) asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(BUFFERS - 1) : "memory");
        group_sync(group + 1);
    }

    /// Sends the set on its way: 64 rows from `m` on, columns from `n` on.
    __device__ __forceinline__ void end(const Result &result, const Tile &t, int m, int n) {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        group_sync(group + 1);
        if ((threadIdx.x & 127) == 0) {
#pragma unroll
            for (int i = 0; i < SET; i++) {
#if OP == 2
                put_rows(result.to[i], buffer() + i * SLICE_BYTES, result.add, n, m, t.expert);
#else
                store_rows(result.to[i], buffer() + i * SLICE_BYTES, n, RAGGED - t.len + m, t.first + t.len, RAGGED);
#endif
            }
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
        count++;
    }
};

#if GLU
#if GLU == 1
typedef Silu Gate;
#else
typedef GeluTanh Gate;
#endif

__device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }

/// The probabilities of this thread's two rows of 64, which are `left` rows from row `first` of all on.
__device__ __forceinline__ void probabilities_of(float (&p)[2], const float *probabilities, i64 first, int left) {
    int row = (threadIdx.x >> 5 & 3) * 16 + (threadIdx.x & 31) / 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
        p[half] = !probabilities ? 1.0f : row + half * 8 < left ? __ldg(probabilities + first + row + half * 8) : 0.0f;
}
#endif

#if GLU && OP == 1
/// Reads gate and up, 64 rows from `m` on and columns from `n` on, into the set that is `ahead` of the one at work.
__device__ __forceinline__ void load_set(const Result &result, const Tile &t, int m, int n, const Slices &slices, u32 ahead) {
    u32 set = (slices.count + ahead) % BUFFERS;
    u32 to = slices.buffers + set * SET_BYTES, bar = slices.loaded + set * 8;
    barrier_expect(bar, SET_BYTES);
#pragma unroll
    for (int i = 0; i < 2; i++)
        load4(to + i * SLICE_BYTES, result.from[i], bar, false, n, RAGGED - t.len + m, t.first + t.len, RAGGED);
}

/// The same of what follows on the rows from `m` on and columns from `n` on, of this warpgroup's `unit`, if that is not the tile's last.
__device__ __forceinline__ void load_next(const Result &result, const Grid &g, const Tile &t, int m, int n, int unit,
                                          const Slices &slices) {
    n += SLICE_COLUMNS;
    if (n >= min(t.n + BN, g.n)) {
        n = t.n;
        m += 64;
        if (unit + 1 == UNITS || m >= t.len) return;
    }
    load_set(result, t, m, n, slices, 1);
}
#endif

/// A warpgroup's `unit` of 64 rows: slices of columns go through shared memory to the output. `m` is the first row in the group.
__device__ __forceinline__ void epilogue(const float (&d)[BN / 2], const Result &result, const Grid &g, const Tile &t, int m, int unit,
                                         Slices &slices) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
    int row = warp * 16 + (lane & 15);
#if GLU
    float p[2];
    probabilities_of(p, result.probabilities, i64(t.first) + m, t.len - m);
#endif
#if GLU && OP == 1
    float sums[2] = {0, 0};
#endif
#pragma unroll
    for (int s = 0; s < TILE_COLUMNS / SLICE_COLUMNS; s++) {
        int n = t.n + s * SLICE_COLUMNS;
        if (n < g.n) {
            const float *v = d + s * (SLICE_COLUMNS / 2);
#if GLU && OP == 1
            // What was worked at before leaves the other buffer, for what comes after.
            if (unit + s > 0 && (threadIdx.x & 127) == 0) {
                asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
                load_next(result, g, t, m, n, unit, slices);
            }
            __syncwarp();
            barrier_wait(slices.loaded + slices.count % BUFFERS * 8, slices.count / BUFFERS & 1);
            u32 buffer = slices.buffer();
#pragma unroll
            for (int j = 0; j < SLICE_COLUMNS / 16; j++) {
                u32 at = in_slice(buffer, row, j * 2 + lane / 16), gates[4], ups[4], by[4];
                get(at, gates);
                get(at + SLICE_BYTES, ups);
                round_four(v + j * 8, by);
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    float dgate[2], dup[2];
                    gated_backward<Gate>(low(by[w]), low(gates[w]), low(ups[w]), p[w & 1], dgate[0], dup[0], sums[w & 1]);
                    gated_backward<Gate>(high(by[w]), high(gates[w]), high(ups[w]), p[w & 1], dgate[1], dup[1], sums[w & 1]);
                    gates[w] = pack(dgate[0], dgate[1]);
                    ups[w] = pack(dup[0], dup[1]);
                }
                put(at, gates);
                put(at + SLICE_BYTES, ups);
            }
#else
            slices.begin();
            u32 buffer = slices.buffer();
            if (OP == 2) {
                int row = warp * 16 + lane / 4;
#pragma unroll
                for (int j = 0; j < SLICE_COLUMNS / 8; j++) {
                    u32 at = in_slice(buffer, row, j * 2 + (lane & 3) / 2) + (lane & 1) * 8;
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v[j * 4]), "f"(v[j * 4 + 1]) : "memory");
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + 8 * 128), "f"(v[j * 4 + 2]), "f"(v[j * 4 + 3]) : "memory");
                }
            } else {
#pragma unroll
                for (int j = 0; j < SLICE_COLUMNS / 16; j++) {
                    u32 at = in_slice(buffer, row, j * 2 + lane / 16), words[4];
                    round_four(v + j * 8, words);
                    put(at, words);
#if GLU
                    // Of gate and up as they are rounded, so that the activation can be made again from what is kept.
                    u32 ups[4];
                    round_four(v + j * 8 + BN / 4, ups);
                    put(at + SLICE_BYTES, ups);
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        float first = gated<Gate>(low(words[w]), low(ups[w]), p[w & 1]);
                        words[w] = pack(first, gated<Gate>(high(words[w]), high(ups[w]), p[w & 1]));
                    }
                    put(at + 2 * SLICE_BYTES, words);
#endif
                }
            }
#endif
            slices.end(result, t, m, n);
        }
    }
#if GLU && OP == 1
    // Over the four lanes that have a row's columns.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sums[half] += __shfl_xor_sync(~0u, sums[half], 1);
        sums[half] += __shfl_xor_sync(~0u, sums[half], 2);
        int at = m + warp * 16 + lane / 4 + half * 8;
        if (result.partial && (lane & 3) == 0 && at < t.len) result.partial[t.n / BN * result.rows + t.first + at] = sums[half];
    }
#endif
}

#if OP == 2
/// 64 rows from `m` on of a group that has no rows to sum over.
__device__ __forceinline__ void write_zeros(const Result &result, const Grid &g, const Tile &t, int m, Slices &slices) {
    for (int n = t.n; n < min(t.n + BN, g.n); n += SLICE_COLUMNS) {
        slices.begin();
        for (int i = threadIdx.x & 127; i < SLICE_BYTES / 16; i += 128)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(slices.buffer() + i * 16), "r"(0) : "memory");
        slices.end(result, t, m, n);
    }
}
#endif
