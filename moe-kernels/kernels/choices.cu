// What becomes of choices of experts: sorted, and dropped or kept. Choice `c`, of fewer than 2^31, is choice `c % k` of token
// `c / k`.

// The stable counting sort takes two launches over the same blocks of `each` choices: first what each block has of each expert,
// then the places. A block's choices go to its warps in equal consecutive parts.

__device__ __forceinline__ i32 expert_of(const i32 *experts, i64 es, u32 k, i64 c, i64 end) {
    return c < end ? experts[u32(c) / k * es + u32(c) % k] : -1;
}

// counts[block, e]
extern "C" __global__ void sort_count(i32 *counts, const i32 *experts, i64 es, u32 k, i64 choices, i64 each, i32 num_experts,
                                      Fault outside) {
    extern __shared__ i32 count[];
    for (i32 e = threadIdx.x; e < num_experts; e += blockDim.x) count[e] = 0;
    __syncthreads();
    i64 first = blockIdx.x * each, end = min(first + each, choices);
    for (i64 c = first + threadIdx.x; c < end; c += blockDim.x) {
        i32 e = expert_of(experts, es, k, c, end);
        if (e >= num_experts)
            outside.raise(u32(c) / k);
        else if (e >= 0)
            atomicAdd(&count[e], 1); // a count is the same in whatever order
    }
    __syncthreads();
    for (i32 e = threadIdx.x; e < num_experts; e += blockDim.x) counts[i64(blockIdx.x) * num_experts + e] = count[e];
}

// `rows` are those of `order` and `tokens`: with `rows_per_expert` so many for each, or less than 0 for experts side by side.
// `tokens` may be null. Needs shared memory for (2 + warps) · num_experts integers.
extern "C" __global__ void sort_place(i32 *order, i32 *tokens, i32 *position, i64 ps, i32 *offsets, const i32 *counts,
                                      const i32 *experts, i64 es, u32 k, i64 choices, i64 each, i32 num_experts, i64 rows,
                                      i64 rows_per_expert, Fault no_room) {
    extern __shared__ i32 shared[];
    // Choices of an expert; then: where the next one of this block goes.
    i32 *total = shared, *start = total + num_experts;
    i32 warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i32 *next = start + num_experts, *own = next + i64(warp) * num_experts;
    for (i32 e = threadIdx.x; e < (2 + warps) * num_experts; e += blockDim.x) shared[e] = 0;
    __syncthreads();

    // Sums over the blocks before this one and over all, several threads for each expert.
    i32 parts = max(1, i32(blockDim.x) / max(1, num_experts));
    for (i32 at = threadIdx.x; at < parts * num_experts; at += blockDim.x) {
        i32 e = at % num_experts, before = 0, all = 0;
#pragma unroll 8
        for (u32 b = at / num_experts; b < gridDim.x; b += parts) {
            i32 count = counts[i64(b) * num_experts + e];
            all += count;
            before += b < blockIdx.x ? count : 0;
        }
        atomicAdd(&total[e], all);
        atomicAdd(&start[e], before);
    }
    i64 per_warp = (each + warps - 1) / warps;
    i64 first = blockIdx.x * each + warp * per_warp;
    i64 end = min(min(first + per_warp, i64(blockIdx.x + 1) * each), choices);
    // What this warp has of each expert.
    for (i64 c = first; c < end; c += 32) {
        i32 e = expert_of(experts, es, k, c + lane, end);
        u32 peers = __match_any_sync(FULL_MASK, e);
        if (e >= 0 && e < num_experts && __ffs(peers) - 1 == lane) own[e] += __popc(peers);
        __syncwarp();
    }
    __syncthreads();

    // First rows of the experts.
    if (warp == 0) {
        i32 carry = 0;
        for (i32 at = 0; at < num_experts; at += 32) {
            i32 e = at + lane, x = e < num_experts ? total[e] : 0, sum = x;
#pragma unroll
            for (int up = 1; up < 32; up *= 2) {
                i32 y = __shfl_up_sync(FULL_MASK, sum, up);
                if (lane >= up) sum += y;
            }
            i32 row = rows_per_expert < 0 ? carry + sum - x : i32(e * rows_per_expert);
            if (e < num_experts) {
                start[e] += row;
                if (blockIdx.x == 0) offsets[e] = row;
                if (blockIdx.x == 0 && rows_per_expert >= 0 && x > rows_per_expert) no_room.raise(e);
            }
            carry += __shfl_sync(FULL_MASK, sum, 31);
        }
        if (blockIdx.x == 0 && lane == 0) offsets[num_experts] = rows_per_expert < 0 ? carry : i32(rows);
    }
    __syncthreads();
    for (i32 e = threadIdx.x; e < num_experts; e += blockDim.x) {
        i32 row = start[e];
        for (i32 w = 0; w < warps; w++) {
            i32 count = next[i64(w) * num_experts + e];
            next[i64(w) * num_experts + e] = row;
            row += count;
        }
    }
    __syncthreads();

    for (i64 c = first; c < end; c += 32) {
        i32 e = expert_of(experts, es, k, c + lane, end);
        bool routed = e >= 0 && e < num_experts;
        u32 peers = __match_any_sync(FULL_MASK, e);
        i64 row = routed ? own[e] + __popc(peers & ((1u << lane) - 1)) : -1;
        __syncwarp();
        if (routed && __ffs(peers) - 1 == lane) own[e] += __popc(peers);
        __syncwarp();
        if (routed && rows_per_expert >= 0 && row >= (e + 1) * rows_per_expert) row = -1;
        if (c + lane < end) {
            u32 token = u32(c + lane) / k;
            position[token * ps + u32(c + lane) % k] = i32(row);
            if (row >= 0) {
                order[row] = i32(c + lane);
                if (tokens) tokens[row] = i32(token);
            }
        }
    }

    // Rows without a choice.
    i64 routed = rows;
    if (rows_per_expert < 0) {
        routed = 0;
        for (i32 e = 0; e < num_experts; e++) routed += total[e];
    }
    for (i64 row = i64(blockIdx.x) * blockDim.x + threadIdx.x; row < rows; row += i64(gridDim.x) * blockDim.x) {
        bool empty = row >= routed;
        if (rows_per_expert > 0) empty = row % rows_per_expert >= total[row / rows_per_expert];
        if (!empty) continue;
        order[row] = -1;
        if (tokens) tokens[row] = -1;
    }
}

// kept[c] = −1 for the choices of each expert (`order[offsets[e]..offsets[e + 1]]`) before which `capacity` others of the same unit
// go. A block for each expert looks for the last choice that stays, byte by byte of its weight and then of its slot: it counts what each
// byte has among those that agree so far. That is a number of passes over the choices for each unit. `keys` and `places` have
// room for all choices; `weights` may be null.
constexpr int DROP_THREADS = 1024;

// The least of what all threads have and of what is there.
__device__ __forceinline__ void lower(u32 *shared, u32 x) {
    for (int lane = 16; lane > 0; lane /= 2) x = min(x, __shfl_xor_sync(FULL_MASK, x, lane));
    if (threadIdx.x % 32 == 0) atomicMin(shared, x);
}

extern "C" __global__ void __launch_bounds__(DROP_THREADS)
    drop_excess(i32 *kept, i64 ks, Key *keys, u32 *places, const i32 *order, const i32 *offsets, const T *weights, i64 ws,
                const i32 *slots, u32 k, i64 n, i32 num_experts, u32 unit_slots, i64 capacity, Fault not_a_number,
                Fault negative) {
    constexpr u32 NO_UNIT = ~0u;
    constexpr int KEY_BYTES = sizeof(Key), BYTES = KEY_BYTES + 4;
    __shared__ u32 bins[256], next_unit;
    // Of the byte that is looked for: which it is, how many choices have it, and how many of these stay; and of how many choices.
    __shared__ i64 found, having, staying, among;
    i32 lane = threadIdx.x % 32;
    // What is wrong with weights and slots, also of choices that are routed nowhere.
    for (i64 i = i64(blockIdx.x) * DROP_THREADS + threadIdx.x; i < n; i += i64(gridDim.x) * DROP_THREADS) {
        if (slots[i] < 0) negative.raise(i);
        if (weights)
            for (u32 j = 0; j < k; j++)
                if (weights[i * ws + j] != weights[i * ws + j]) not_a_number.raise(i);
    }
    for (i32 e = blockIdx.x; e < num_experts; e += gridDim.x) {
        i64 first = offsets[e], end = offsets[e + 1];
        __syncthreads();
        if (threadIdx.x == 0) next_unit = NO_UNIT;
        __syncthreads();
        u32 least = NO_UNIT;
        for (i64 at = first + threadIdx.x; at < end; at += DROP_THREADS) {
            u32 choice = order[at], token = choice / k;
            u32 place = slots[token];
            places[at] = place;
            keys[at] = weights ? key_of(weights[token * ws + choice % k]) : 0;
            least = min(least, place / unit_slots);
        }
        lower(&next_unit, least);
        __syncthreads();
        for (u32 unit = next_unit; unit != NO_UNIT; unit = next_unit) {
            // The last choice that stays; all bytes that are not looked for are 0, so that any choice which agrees so far stays.
            Key key = 0;
            u32 early = 0;
            i64 stay = capacity;
            for (int byte = weights ? 0 : KEY_BYTES; byte < BYTES && stay > 0; byte++) {
                bool of_key = byte < KEY_BYTES;
                int shift = 8 * ((of_key ? KEY_BYTES : BYTES) - 1 - byte);
                for (int bin = threadIdx.x; bin < 256; bin += DROP_THREADS) bins[bin] = 0;
                __syncthreads();
                for (i64 start = first + threadIdx.x - lane; start < end; start += DROP_THREADS) {
                    u32 bin = 256;
                    if (start + lane < end) {
                        u32 place = places[start + lane];
                        Key own = keys[start + lane];
                        // Bytes before this one.
                        bool agrees = of_key ? shift + 8 == 8 * KEY_BYTES || (own ^ key) >> (shift + 8) == 0
                                             : own == key && (shift == 24 || (~place ^ early) >> (shift + 8) == 0);
                        if (agrees && place / unit_slots == unit) bin = u32(of_key ? own >> shift : ~place >> shift) & 255;
                    }
                    u32 peers = __match_any_sync(FULL_MASK, bin);
                    if (bin < 256 && __ffs(peers) - 1 == lane) atomicAdd(&bins[bin], __popc(peers));
                }
                __syncthreads();
                if (threadIdx.x < 32) {
                    // Lane 0 has the largest bins.
                    i64 own = 0;
                    for (int b = 0; b < 8; b++) own += bins[255 - 8 * lane - b];
                    i64 sum = own;
#pragma unroll
                    for (int up = 1; up < 32; up *= 2) {
                        i64 other = __shfl_up_sync(FULL_MASK, sum, up);
                        if (lane >= up) sum += other;
                    }
                    i64 before = sum - own;
                    if (before < stay && (sum >= stay || lane == 31)) {
                        int bin = 255 - 8 * lane;
                        for (; before + bins[bin] < stay && bin > 255 - 8 * lane - 7; bin--) before += bins[bin];
                        found = bin, having = bins[bin], staying = stay - before;
                    }
                    if (lane == 31) among = sum;
                }
                __syncthreads();
                if (among <= stay) break;
                if (of_key) key |= Key(found) << shift;
                else early |= u32(found) << shift;
                stay = staying;
                if (having == stay) break;
            }
            __syncthreads();
            if (threadIdx.x == 0) next_unit = NO_UNIT;
            __syncthreads();
            least = NO_UNIT;
            for (i64 at = first + threadIdx.x; at < end; at += DROP_THREADS) {
                u32 choice = order[at], place = places[at], of = place / unit_slots;
                if (of > unit) least = min(least, of);
                if (of != unit) continue;
                bool stays = keys[at] > key || (keys[at] == key && ~place >= early);
                kept[choice / k * ks + choice % k] = stays && capacity > 0 ? e : -1;
            }
            lower(&next_unit, least);
            __syncthreads();
        }
    }
}
