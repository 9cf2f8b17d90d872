// What gated activations do with one element.

// Both functions of a gate are g · σ(v): SiLU with v = g, GELU's tanh approximation with v = 2·√(2/π)·(g + 0.044715·g³).
constexpr Acc GELU = 1.5957691216057308;
constexpr Acc GELU_CUBIC = 0.044715;

__device__ __forceinline__ float sigmoid(float x) { return fast_inverse(1.0f + fast_exp(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

struct Silu {
    static __device__ __forceinline__ Acc argument(Acc g) { return g; }
    static __device__ __forceinline__ Acc slope(Acc) { return 1; }
};
struct GeluTanh {
    static __device__ __forceinline__ Acc argument(Acc g) { return GELU * g * (1 + GELU_CUBIC * g * g); }
    static __device__ __forceinline__ Acc slope(Acc g) { return GELU * (1 + 3 * GELU_CUBIC * g * g); }
};

template <typename F> __device__ __forceinline__ Acc gated(Acc g, Acc u, Acc probability) {
    return g * sigmoid(F::argument(g)) * u * probability;
}

// With s = σ(v(g)): dup = dy·p·g·s, dgate = dy·p·u·s·(1 + g·(1 − s)·v′(g)), and dp is the sum of dy·g·s·u.
template <typename F>
__device__ __forceinline__ void gated_backward(Acc d, Acc g, Acc u, Acc probability, Acc &dgate, Acc &dup, Acc &sum) {
    Acc s = sigmoid(F::argument(g));
    Acc by_s = d * s;
    sum += by_s * g * u;
    by_s *= probability;
    dup = by_s * g;
    dgate = by_s * u * (1 + g * (1 - s) * F::slope(g));
}
