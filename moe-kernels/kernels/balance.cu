// How often experts are chosen, and the load-balancing losses made of that. Counts are rows of `count` choices and the number of
// tokens, one for each sequence.

constexpr int THREADS = 256;

// Adds to counts[i mod sequences] what token i chose. `in_shared` says that a block's counts fit its shared memory (as many i32 as
// there are counts). Counts are integers: the same in whatever order they are added.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_choices(u64 *counts, i64 cs, const i32 *experts, i64 es, i64 n, i32 k, i64 sequences, i32 count, i32 in_shared,
                  Fault outside) {
    extern __shared__ u32 own[];
    i64 width = count + 1, all = in_shared ? sequences * width : 0;
    for (i64 c = threadIdx.x; c < all; c += THREADS) own[c] = 0;
    __syncthreads();
    for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < n; i += i64(gridDim.x) * THREADS) {
        i64 s = i % sequences;
        auto add = [&](i32 at) {
            if (in_shared)
                atomicAdd(&own[s * width + at], 1u);
            else
                atomicAdd(&counts[s * cs + at], 1ull);
        };
        bool any = false;
        for (i32 j = 0; j < k; j++) {
            i32 e = experts[i * es + j];
            if (e >= count) outside.raise(i);
            if (e < 0 || e >= count) continue;
            add(e);
            any = true;
        }
        if (any) add(count);
    }
    __syncthreads();
    for (i64 c = threadIdx.x; c < all; c += THREADS)
        if (own[c] > 0) atomicAdd(&counts[c / width * cs + c % width], u64(own[c]));
}

// *dropped += how many choices are negative in `kept` alone. `counters` are 0 at first: how many were found so far, and how many
// blocks have ended, of which the last adds. Counts are integers: the same in whatever order they are added.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_dropped(double *dropped, u64 *counters, const i32 *experts, i64 es, const i32 *kept, i64 ks, i64 n, i64 k) {
    __shared__ double warps[THREADS / 32];
    i64 own = 0;
    for (i64 c = i64(blockIdx.x) * THREADS + threadIdx.x; c < n * k; c += i64(gridDim.x) * THREADS) {
        i64 i = c / k, j = c - i * k;
        own += experts[i * es + j] >= 0 && kept[i * ks + j] < 0;
    }
    double sum = block_sum<THREADS>(double(own), warps);
    if (threadIdx.x > 0) return;
    atomicAdd(&counters[0], u64(sum));
    __threadfence();
    if (atomicAdd(&counters[1], 1ull) + 1 < gridDim.x) return;
    __threadfence();
    *dropped += double(atomicAdd(&counters[0], 0ull));
}

__device__ __forceinline__ i64 column(const i64 *counts, i64 cs, i64 sequences, i32 at) {
    i64 sum = 0;
    for (i64 s = 0; s < sequences; s++) sum += counts[s * cs + at];
    return sum;
}

// factor / tokens², 0 without tokens.
__device__ __forceinline__ double per_token(double factor, i64 tokens) {
    return tokens == 0 ? 0.0 : factor / (double(tokens) * double(tokens));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_counts(i64 *sums, const i64 *counts, i64 cs, i64 sequences, i32 count) {
    i32 e = blockIdx.x * THREADS + threadIdx.x;
    if (e < count) sums[e] += column(counts, cs, sequences, e);
}

// sums += choices, choices that the losses count, shares of the scores; losses of the micro-batch and of its sequences. `chosen` may be
// null. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    balance_sums(double *sums, const i64 *own, i64 os, const i64 *unit, i64 us, const i64 *chosen, const T *probs, i64 ps,
                 i64 sequences, i32 count, double scale) {
    __shared__ double warps[THREADS / 32];
    double whole = 0, by_sequence = 0;
    for (i32 e = threadIdx.x; e < count; e += THREADS) {
        i64 counted = column(own, os, sequences, e);
        double share = 0;
        for (i64 s = 0; s < sequences; s++) share += to_f64(probs[s * ps + e]);
        sums[e] += double(chosen ? chosen[e] : counted);
        sums[count + e] += double(counted);
        sums[2 * i64(count) + e] += share;
        whole += share * double(column(unit, us, sequences, e));
    }
    for (i64 c = threadIdx.x; c < sequences * count; c += THREADS) {
        i64 s = c / count, e = c - s * count;
        by_sequence += per_token(scale, unit[s * us + count]) * (to_f64(probs[s * ps + e]) * double(unit[s * us + e]));
    }
    whole = block_sum<THREADS>(whole, warps);
    __syncthreads();
    by_sequence = block_sum<THREADS>(by_sequence, warps);
    if (threadIdx.x == 0) {
        sums[3 * i64(count)] += per_token(scale, column(unit, us, sequences, count)) * whole;
        sums[3 * i64(count) + 1] += by_sequence;
    }
}

// `BalanceTerm` of the Rust side; without counts there is none.
struct Term {
    const i64 *counts;
    double factor;
    i64 per_token;

    __device__ __forceinline__ double scale(i64 tokens) const { return per_token ? ::per_token(factor, tokens) : factor; }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    balance_gradient(T *gradient, i64 gs, const i64 *unit, i64 us, i64 sequences, i32 count, double micro_batch, double sequence,
                     Term step, Term model) {
    i64 tokens = column(unit, us, sequences, count);
    for (i64 c = i64(blockIdx.x) * THREADS + threadIdx.x; c < sequences * count; c += i64(gridDim.x) * THREADS) {
        i64 s = c / count, e = c - s * count;
        double sum = per_token(micro_batch, tokens) * double(column(unit, us, sequences, i32(e)));
        if (step.counts) sum += step.scale(tokens) * double(step.counts[e]);
        if (model.counts) sum += model.scale(tokens) * double(model.counts[e]);
        sum += per_token(sequence, unit[s * us + count]) * double(unit[s * us + e]);
        gradient[s * gs + e] = narrow<T>(sum);
    }
}

// One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    balance_dot(double *sum, const T *probs, i64 ps, const i64 *unit, i64 us, i64 sequences, i32 count, Term term) {
    __shared__ double warps[THREADS / 32];
    double own = 0;
    for (i32 e = threadIdx.x; e < count; e += THREADS) {
        double share = 0;
        for (i64 s = 0; s < sequences; s++) share += to_f64(probs[s * ps + e]);
        own += share * double(term.counts[e]);
    }
    own = block_sum<THREADS>(own, warps);
    if (threadIdx.x == 0) *sum += term.scale(column(unit, us, sequences, count)) * own;
}
