// From router logits to choices and weights, and back. A warp has a token; its expert `e` belongs to lane `e % 32`.

constexpr u32 ALL = FULL_MASK;
constexpr i32 NONE = 0x7fffffff;

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
__device__ __forceinline__ float log1p_of(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_of(double x) { return log1p(x); }
__device__ __forceinline__ float root_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double root_of(double x) { return sqrt(x); }

#if defined(T_F32)
#define INFINITE INF_F32
__device__ __forceinline__ T of_bits(Key x) { return __uint_as_float(x); }
__device__ __forceinline__ Key largest_in_warp(Key x) { return __reduce_max_sync(ALL, x); }
#else
#define INFINITE INF_F64
__device__ __forceinline__ T of_bits(Key x) { return __longlong_as_double(x); }
__device__ __forceinline__ Key largest_in_warp(Key x) {
    u32 high = __reduce_max_sync(ALL, u32(x >> 32));
    u32 low = __reduce_max_sync(ALL, u32(x >> 32) == high ? u32(x) : 0);
    return Key(high) << 32 | low;
}
#endif

constexpr Key SIGN = Key(1) << (8 * sizeof(T) - 1);

// A key that is never 0, which stands for what cannot be chosen.
__device__ __forceinline__ Key choosable(T x) {
    Key key = key_of(x);
    return key > 0 ? key : 1;
}

__device__ __forceinline__ T value_of(Key key) { return of_bits(key & SIGN ? key ^ SIGN : ~key); }

// Chooses the largest of `count` keys one after the other, ties to the smaller index; what is chosen becomes 0.
struct Chooser {
    Key *keys;
    i32 count, lane;
    // The lane's own best, and the one after it, if it is known.
    Key most, second;
    i32 at, second_at;

    __device__ __forceinline__ Chooser(Key *keys, i32 count, i32 lane) : keys(keys), count(count), lane(lane) { look(); }

    __device__ __forceinline__ void look() {
        most = second = 0;
        at = second_at = NONE;
#pragma unroll 4
        for (i32 e = lane; e < count; e += 32) {
            Key key = keys[e];
            if (key > most) {
                second = most;
                second_at = at;
                most = key;
                at = e;
            } else if (key > second) {
                second = key;
                second_at = e;
            }
        }
    }

    __device__ __forceinline__ Key next(i32 &chosen) {
        Key key = largest_in_warp(most);
        chosen = __reduce_min_sync(ALL, most == key ? at : NONE);
        if (chosen == at && key > 0) {
            keys[at] = 0;
            most = second;
            at = second_at;
            second = 0;
            if (most == 0) look();
        }
        return key;
    }

    // By how much the last chosen is ahead of the best one left.
    __device__ __forceinline__ T margin(Key last) const {
        Key key = largest_in_warp(most);
        return key == 0 ? INFINITE : key == last ? T(0) : value_of(last) - value_of(key);
    }
};

enum Score { SOFTMAX, SIGMOID, SQRT_SOFTPLUS };

struct Scored {
    T score, slope;
};

// 1 / (1 + e^−x) and one less that, neither of them by cancellation.
__device__ __forceinline__ Scored sigmoid(T x) {
    T e = exp_of(x < 0 ? x : -x), near = 1 / (1 + e), far = e * near;
    return x < 0 ? Scored{far, near} : Scored{near, far};
}

// A score that is made of one logit alone, and its derivative.
__device__ __forceinline__ Scored separate(i32 score, T x) {
    if (score != SQRT_SOFTPLUS) {
        Scored s = sigmoid(x);
        return {s.score, s.score * s.slope};
    }
    // Where e^x is lost beside 1, ln(1 + e^x) is e^x, and its root is no subnormal number yet.
    if (x < -40) {
        T s = exp_of(x / 2);
        return {s, s / 2};
    }
    T e = exp_of(x < 0 ? x : -x), s = root_of((x < 0 ? T(0) : x) + log1p_of(e));
    return {s, sigmoid(x).score / (2 * s)};
}

// Added to sums of separate scores before they divide.
__device__ __forceinline__ T epsilon_of(i32 score) { return score == SOFTMAX ? T(0) : T(1e-20); }

struct Softmax {
    // The log-sum-exp, and what exponentials are multiplied by.
    T lse, inverse;
};

// The softmax of a token.
__device__ __forceinline__ Softmax softmax(T *probs, const T *logits, i32 count, i32 lane) {
    T most = -INFINITE;
    for (i32 e = lane; e < count; e += 32) {
        T x = logits[e];
        probs[e] = x;
        most = x > most ? x : most;
    }
    most = warp_max(most);
    T sum = 0;
    for (i32 e = lane; e < count; e += 32) {
        probs[e] = exp_of(probs[e] - most);
        sum += probs[e];
    }
    sum = warp_sum(sum);
    T inverse = 1 / sum;
    for (i32 e = lane; e < count; e += 32) probs[e] *= inverse;
    return {most + log_of(sum), inverse};
}

// The largest logit of the chosen. Those given may lie so far below the token's that no probability is left of them: a softmax
// over the chosen takes this off. It multiplies by the token's `inverse`, a factor that goes when its sum divides: where the
// token's largest is chosen, these are its probabilities.
__device__ __forceinline__ T most_of_chosen(const T *logits, const i32 *chosen, i32 k, i32 lane) {
    T most = -INFINITE;
    for (i32 j = lane; j < k; j += 32) {
        T x = logits[chosen[j]];
        most = x > most ? x : most;
    }
    return warp_max(most);
}

__device__ __forceinline__ bool is_finite(T x) { return x - x == 0; }

// How logits become choices and weights.
struct Scoring {
    i32 num_experts, k;
    // Groups, 0 for none; those kept; experts that make a group's score.
    i32 groups, kept, score_top_k;
    i32 score, normalize, by_logits;

    // Whether weights are a softmax over the chosen.
    __device__ __forceinline__ bool is_over_chosen() const { return score == SOFTMAX && normalize; }
};

// Of a token in shared memory: own scores, keys, keys of groups, choice. `unbiased`, `margins`, `bias`, `given` and `valid`
// may be null.
extern "C" __global__ void __launch_bounds__(256)
    route(T *all_weights, i64 ws, i32 *all_experts, i64 es, i32 *all_unbiased, i64 us, T *all_probs, i64 ps, T *all_lse,
          T *margins, const T *all_logits, i64 ls, const T *bias, const i32 *given, i64 gs, const i32 *valid, i64 n, Scoring r,
          T scale, Fault not_a_number, Fault no_expert) {
    extern __shared__ u64 shared[];
    i32 count = r.num_experts, lane = threadIdx.x;
    i64 per_warp = (i64(count) * 2 + r.groups + (r.k * sizeof(i32) + sizeof(T) - 1) / sizeof(T));
    T *own = reinterpret_cast<T *>(shared) + threadIdx.y * per_warp;
    Key *keys = reinterpret_cast<Key *>(own + count), *group_keys = keys + count;
    i32 *chosen = reinterpret_cast<i32 *>(group_keys + r.groups);
    bool is_separate = r.score != SOFTMAX;

    for (i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y; i < n; i += i64(gridDim.x) * blockDim.y) {
        const T *logits = all_logits + i * ls;
        T *probs = all_probs + i * ps, *weights = all_weights + i * ws;
        i32 *experts = all_experts + i * es, *unbiased = all_unbiased ? all_unbiased + i * us : nullptr;
        if (valid && valid[i] == 0) {
            for (i32 e = lane; e < count; e += 32) probs[e] = 0;
            for (i32 j = lane; j < r.k; j += 32) {
                weights[j] = 0;
                experts[j] = -1;
                if (unbiased) unbiased[j] = -1;
            }
            if (lane == 0) {
                all_lse[i] = 0;
                if (margins) margins[i] = INFINITE;
            }
            continue;
        }
        // Softmax keeps the order of the logits, which rounding does not blur.
        T most = -INFINITE;
#pragma unroll 4
        for (i32 e = lane; e < count; e += 32) {
            T x = logits[e];
            own[e] = x;
            most = x > most ? x : most;
            if (!is_separate) keys[e] = choosable(bias ? x + bias[e] : x);
        }
        most = warp_max(most);
        T exponentials = 0, scores = 0;
#pragma unroll 4
        for (i32 e = lane; e < count; e += 32) {
            T x = own[e], exponential = exp_of(x - most);
            exponentials += exponential;
            if (is_separate) {
                T s = separate(r.score, x).score;
                scores += s;
                keys[e] = choosable(bias ? s + bias[e] : s);
                own[e] = s;
            } else {
                own[e] = exponential;
            }
        }
        exponentials = warp_sum(exponentials);
        T lse = most + log_of(exponentials);
        if (!is_finite(lse)) {
            if (lane == 0) not_a_number.raise(i);
            continue;
        }
        T inverse = 1 / (is_separate ? warp_sum(scores) + epsilon_of(r.score) : exponentials);
#pragma unroll 4
        for (i32 e = lane; e < count; e += 32) {
            T p = own[e] * inverse;
            probs[e] = p;
            if (!is_separate) own[e] = p;
        }
        if (lane == 0) all_lse[i] = lse;
        __syncwarp();

        T margin = INFINITE;
        if (given) {
            bool good = true;
            for (i32 j = lane; j < r.k; j += 32) {
                chosen[j] = given[i * gs + j];
                good = good && chosen[j] >= 0 && chosen[j] < count;
            }
            if (!__all_sync(ALL, good)) {
                if (lane == 0) no_expert.raise(i);
                continue;
            }
        } else {
            if (r.groups > 0) {
                i32 size = count / r.groups;
                bool by_keys = is_separate || r.by_logits;
                // As many groups at once as the warp has lanes for, each with the same number of these.
                i32 members = 1;
                while (2 * members * r.groups <= 32) members *= 2;
                for (i32 first = 0; first < r.groups; first += 32 / members) {
                    i32 g = first + lane / members;
                    // The best in descending order: each the largest of those behind the one before.
                    Key last = ~Key(0);
                    i32 last_at = -1;
                    T score = 0;
                    for (i32 j = 0; j < r.score_top_k; j++) {
                        Key most = 0;
                        i32 at = NONE;
                        for (i32 e = g * size + lane % members; g < r.groups && e < (g + 1) * size; e += members) {
                            Key key = by_keys ? keys[e] : choosable(own[e]);
                            if (key > most && (key < last || (key == last && e > last_at))) {
                                most = key;
                                at = e;
                            }
                        }
                        for (i32 step = members / 2; step > 0; step /= 2) {
                            Key other = __shfl_xor_sync(ALL, most, step);
                            i32 other_at = __shfl_xor_sync(ALL, at, step);
                            if (other > most || (other == most && other_at < at)) {
                                most = other;
                                at = other_at;
                            }
                        }
                        score += value_of(most);
                        last = most;
                        last_at = at;
                    }
                    if (g < r.groups && lane % members == 0) group_keys[g] = choosable(score);
                }
                __syncwarp();
                Chooser groups(group_keys, r.groups, lane);
                Key last = 0;
                i32 group;
                for (i32 j = 0; j < r.kept; j++) last = groups.next(group);
                margin = groups.margin(last);
                __syncwarp();
                for (i32 g = 0; g < r.groups; g++) {
                    if (group_keys[g] == 0) continue;
                    for (i32 e = g * size + lane; e < (g + 1) * size; e += 32) keys[e] = 0;
                }
                __syncwarp();
            }
            Chooser choice(keys, count, lane);
            Key last = 0;
            i32 expert;
            for (i32 j = 0; j < r.k; j++) {
                last = choice.next(expert);
                if (lane == j % 32) chosen[j] = expert;
            }
            if (margins) {
                T own_margin = choice.margin(last);
                margin = own_margin < margin ? own_margin : margin;
            }
        }
        if (unbiased) {
            for (i32 e = lane; e < count; e += 32) keys[e] = choosable(is_separate ? own[e] : logits[e]);
            Chooser choice(keys, count, lane);
            Key last = 0;
            i32 expert;
            for (i32 j = 0; j < r.k; j++) {
                last = choice.next(expert);
                if (lane == j % 32) unbiased[j] = expert;
            }
            T plain_margin = choice.margin(last);
            margin = plain_margin < margin ? plain_margin : margin;
        }
        if (margins && lane == 0) margins[i] = margin;
        __syncwarp();
        if (r.is_over_chosen()) {
            T largest = most_of_chosen(logits, chosen, r.k, lane);
            if (!is_finite(largest)) {
                if (lane == 0) not_a_number.raise(i);
                continue;
            }
            // The experts of a token differ.
            for (i32 j = lane; j < r.k; j += 32) own[chosen[j]] = exp_of(logits[chosen[j]] - largest) * inverse;
            __syncwarp();
        }
        T total = epsilon_of(r.score);
        if (r.normalize)
            for (i32 j = 0; j < r.k; j++) total += own[chosen[j]];
        for (i32 j = lane; j < r.k; j += 32) {
            T w = own[chosen[j]];
            weights[j] = r.normalize ? w / total * scale : w * scale;
            experts[j] = chosen[j];
        }
        __syncwarp();
    }
}

// parts[block, e] = Σ softmax(logits[i] + bias)[e] over the `each` tokens of the block. `valid` may be null.
extern "C" __global__ void __launch_bounds__(256) softmax_sums(double *parts, const T *logits, i64 ls, const T *bias,
                                                               const i32 *valid, i64 n, i32 count, i64 each,
                                                               Fault not_a_number) {
    extern __shared__ u64 shared[];
    double *sums = reinterpret_cast<double *>(shared), *own = sums + i64(threadIdx.y) * count;
    T *probs = reinterpret_cast<T *>(sums + i64(blockDim.y) * count) + i64(threadIdx.y) * count;
    i32 lane = threadIdx.x;
    for (i32 e = lane; e < count; e += 32) own[e] = 0;
    i64 end = min((blockIdx.x + 1) * each, n);
    for (i64 i = blockIdx.x * each + threadIdx.y; i < end; i += blockDim.y) {
        if (valid && valid[i] == 0) continue;
        for (i32 e = lane; e < count; e += 32) probs[e] = logits[i * ls + e] + bias[e];
        T lse = softmax(probs, probs, count, lane).lse;
        if (!is_finite(lse)) {
            if (lane == 0) not_a_number.raise(i);
            continue;
        }
        for (i32 e = lane; e < count; e += 32) own[e] += probs[e];
    }
    __syncthreads();
    for (i32 e = threadIdx.y * 32 + lane; e < count; e += blockDim.y * 32) {
        double sum = 0;
        for (i32 warp = 0; warp < blockDim.y; warp++) sum += sums[i64(warp) * count + e];
        parts[i64(blockIdx.x) * count + e] = sum;
    }
}

// A softmax p, over all or the chosen, under the gradient d has p ⊙ (d − Σ p ⊙ d), and d lse / d logits = p. A separate score s
// under d has d · s'; its share s / Σ s under d has (d − Σ share ⊙ d) / Σ s. Of a token: softmax, scores, slopes, scores of the
// chosen and then gradients by them, choice.
extern "C" __global__ void __launch_bounds__(256)
    route_backward(T *all_dlogits, i64 ds, const T *all_dweights, i64 ws, const i32 *experts, i64 es, const T *all_logits,
                   i64 ls, const T *all_aux, i64 as, i64 sequences, i64 n, Scoring r, T scale, T two_z, Fault no_expert) {
    extern __shared__ u64 shared[];
    i32 count = r.num_experts, lane = threadIdx.x;
    bool is_separate = r.score != SOFTMAX;
    i64 per_warp = i64(count) * (is_separate ? 3 : 1) + r.k + (r.k * sizeof(i32) + sizeof(T) - 1) / sizeof(T);
    T *probs = reinterpret_cast<T *>(shared) + threadIdx.y * per_warp;
    T *own = is_separate ? probs + count : probs, *slopes = own + count;
    T *by_chosen = probs + i64(count) * (is_separate ? 3 : 1);
    i32 *chosen = reinterpret_cast<i32 *>(by_chosen + r.k);

    for (i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y; i < n; i += i64(gridDim.x) * blockDim.y) {
        T *dlogits = all_dlogits + i * ds;
        const T *dweights = all_dweights + i * ws, *logits = all_logits + i * ls;
        const T *aux = all_aux + i % sequences * as;
        bool padding = true, good = true;
        for (i32 j = lane; j < r.k; j += 32) {
            i32 e = experts[i * es + j];
            chosen[j] = e;
            padding = padding && e < 0;
            good = good && e >= 0 && e < count;
        }
        if (__all_sync(ALL, padding)) {
            for (i32 e = lane; e < count; e += 32) dlogits[e] = 0;
            continue;
        }
        if (!__all_sync(ALL, good)) {
            if (lane == 0) no_expert.raise(i);
            continue;
        }
        auto [lse, inverse] = softmax(probs, logits, count, lane);
        T sum = 0, mean = 0;
        for (i32 e = lane; e < count; e += 32) {
            if (is_separate) {
                Scored s = separate(r.score, logits[e]);
                own[e] = s.score;
                slopes[e] = s.slope;
                sum += s.score;
            }
            mean += own[e] * aux[e];
        }
        sum = warp_sum(sum) + epsilon_of(r.score);
        mean = warp_sum(mean);
        __syncwarp();

        if (r.is_over_chosen()) {
            T most = most_of_chosen(logits, chosen, r.k, lane);
            for (i32 j = lane; j < r.k; j += 32) by_chosen[j] = exp_of(logits[chosen[j]] - most) * inverse;
        } else {
            for (i32 j = lane; j < r.k; j += 32) by_chosen[j] = own[chosen[j]];
        }
        // The chosen: their sum, and the mean of the gradient over them.
        T total = 0, mean_chosen = 0;
        for (i32 j = lane; j < r.k; j += 32) {
            T s = by_chosen[j];
            total += s;
            mean_chosen += s * dweights[j];
        }
        total = warp_sum(total) + epsilon_of(r.score);
        mean_chosen = warp_sum(mean_chosen);
        if (r.normalize) mean_chosen = mean_chosen / total;
        mean_chosen *= scale;
        for (i32 j = lane; j < r.k; j += 32) {
            T d = dweights[j] * scale, slope = is_separate ? slopes[chosen[j]] : by_chosen[j];
            by_chosen[j] = r.normalize ? slope * (d - mean_chosen) / total : slope * d;
        }
        __syncwarp();
        if (is_separate)
            mean = mean / sum;
        else if (!r.normalize)
            mean += mean_chosen;
        for (i32 e = lane; e < count; e += 32) {
            T d = is_separate ? slopes[e] * (aux[e] - mean) / sum + probs[e] * two_z * lse
                              : probs[e] * (aux[e] - mean + two_z * lse);
            probs[e] = d;
        }
        __syncwarp();
        // The experts of a token differ.
        for (i32 j = lane; j < r.k; j += 32) probs[chosen[j]] += by_chosen[j];
        __syncwarp();
        for (i32 e = lane; e < count; e += 32) dlogits[e] = probs[e];
    }
}

// --- jitter ----------------------------------------------------------------------------------------------------------

struct Pair {
    double at[2];
};

// `uniform_pair` of the crate, to the bit: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
// 3", 2011).
__device__ __forceinline__ Pair uniform_pair(u64 key, u64 stream, u64 pair) {
    u32 a = u32(pair), b = u32(pair >> 32), c = u32(stream), d = u32(stream >> 32);
    u32 p = u32(key), q = u32(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u32 a_high = __umulhi(0xd2511f53u, a), a_low = 0xd2511f53u * a;
        u32 c_high = __umulhi(0xcd9e8d57u, c), c_low = 0xcd9e8d57u * c;
        a = c_high ^ b ^ p;
        b = c_low;
        c = a_high ^ d ^ q;
        d = a_low;
        p += 0x9e3779b9u;
        q += 0xbb67ae85u;
    }
    u64 first = (u64(b) << 32 | a) >> 11, second = (u64(d) << 32 | c) >> 11;
    constexpr double UNIT = 1.0 / (1ull << 53);
    return {{__dmul_rn(__dadd_rn(double(first), 0.5), UNIT), __dmul_rn(__dadd_rn(double(second), 0.5), UNIT)}};
}

struct Jitter {
    T *x;
    i64 xs;
    const i64 *tokens;
    u64 key;
    double epsilon;
    typedef Words<T, 2> In;

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        return load_up_to<2>(x + i * xs + j, n, vectors);
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        Pair u = uniform_pair(key, tokens[i], j / 2);
        Words<T, 2> out = {};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            double noise = __dmul_rn(epsilon, __dadd_rn(__dmul_rn(2.0, u.at[k]), -1.0));
            out.set(k, in.get(k) * narrow<T>(__dadd_rn(1.0, noise)));
        }
        store_up_to(x + i * xs + j, out, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) jitter(T *x, i64 xs, const i64 *tokens, u64 key, double epsilon,
                                                         Tiles tiles) {
    for_tiles<2, 2>(tiles, Jitter{x, xs, tokens, key, epsilon});
}
