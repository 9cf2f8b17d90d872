// A vector for each of consecutive row groups. Offsets that do not ascend are reported; rows are never read outside `0..n`.

constexpr int N = 16 / sizeof(T);
constexpr int ROWS = 4;

// The group of row `i`, or -1: the last one that begins at or before it, if there are rows left in it.
__device__ __forceinline__ i64 group_of(const i32 *offsets, i64 groups, i64 i) {
    i64 low = 0, high = groups + 1;
    while (high - low > 1) {
        i64 middle = (low + high) / 2;
        if (offsets[middle] <= i)
            low = middle;
        else
            high = middle;
    }
    return offsets[low] <= i && low < groups ? low : -1;
}

// The first block looks at the offsets of all.
__device__ __forceinline__ void check_offsets(const i32 *offsets, i64 groups, i64 n, const Fault &unsound) {
    if (blockIdx.x + blockIdx.y + blockIdx.z > 0) return;
    for (i64 g = threadIdx.y * blockDim.x + threadIdx.x; g <= groups; g += blockDim.x * blockDim.y) {
        i32 before = g == 0 ? 0 : offsets[g - 1];
        bool sound = g == 0 ? offsets[0] == 0 : offsets[g] >= before;
        if (!sound || offsets[g] > n) unsound.raise(g);
    }
}

struct AddBias {
    T *y;
    i64 ys;
    const T *bias;
    i64 bs;
    const Acc *scale;
    const i32 *offsets;
    i64 groups;
    struct In {
        Words<T, N> y, bias;
        Acc scale;
        bool any;
    };

    __device__ __forceinline__ In read(i64 i, i64 j, int n, bool vectors) const {
        In in = {};
        i64 group = group_of(offsets, groups, i);
        in.any = group >= 0;
        if (in.any) {
            in.y = load_up_to<N>(y + i * ys + j, n, vectors);
            in.bias = load_up_to<N>(bias + group * bs + j, n, vectors);
            in.scale = scale ? scale[i] : Acc(1);
        }
        return in;
    }
    __device__ __forceinline__ void write(i64 i, i64 j, int n, bool vectors, const In &in) const {
        if (!in.any) return;
        Words<T, N> out = {};
#pragma unroll
        for (int k = 0; k < N; k++) out.set(k, narrow<T>(widen(in.y.get(k)) + in.scale * widen(in.bias.get(k))));
        store_up_to(y + i * ys + j, out, n, vectors);
    }
};

extern "C" __global__ void __launch_bounds__(256) grouped_add_bias(T *y, i64 ys, const T *bias, i64 bs, const Acc *scale,
                                                                   const i32 *offsets, i64 groups, i64 n, Fault unsound,
                                                                   Tiles tiles) {
    check_offsets(offsets, groups, n, unsound);
    for_tiles<N, ROWS>(tiles, AddBias{y, ys, bias, bs, scale, offsets, groups});
}

// parts[group · parts + part, c] = Σ scale[i] · dy[i, c] over one of `parts` equal parts of the rows of a group: blocks are
// (columns, part, group).
extern "C" __global__ void __launch_bounds__(256) grouped_bias_parts(Acc *y, const T *dy, i64 ds, const Acc *scale,
                                                                     const i32 *offsets, i64 groups, i64 n, i64 cols,
                                                                     Fault unsound, i32 vectors) {
    check_offsets(offsets, groups, n, unsound);
    i64 j = (i64(blockIdx.x) * 32 + threadIdx.x) * N;
    int count = int(max(i64(0), min(i64(N), cols - j)));
    for (i64 group = blockIdx.z; group < groups; group += gridDim.z) {
        i64 start = max(0, offsets[group]), rows = max(i64(0), min(n, i64(offsets[group + 1])) - start);
        i64 first = start + rows * blockIdx.y / gridDim.y, end = start + rows * (blockIdx.y + 1) / gridDim.y;
        Acc sum[N];
        sum_of_rows<N>(sum, dy, ds, first, end, j, count, vectors, scale);
        if (threadIdx.y == 0)
            for (int k = 0; k < count; k++) y[(group * gridDim.y + blockIdx.y) * cols + j + k] = sum[k];
        __syncthreads();
    }
}

// g[e] += Σ of the parts of group e, ascending.
extern "C" __global__ void __launch_bounds__(256) grouped_bias_add_parts(Acc *g, i64 gs, const Acc *parts, i64 groups,
                                                                         i64 cols, i64 parts_per_group) {
    for (i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x; at < groups * cols; at += i64(gridDim.x) * blockDim.x) {
        i64 group = at / cols, j = at % cols;
        Acc sum = 0;
        for (i64 part = 0; part < parts_per_group; part++) sum += parts[(group * parts_per_group + part) * cols + j];
        g[group * gs + j] += sum;
    }
}

// A warp per row.
extern "C" __global__ void __launch_bounds__(256)
    grouped_bias_scale_acc(Acc *d_scale, const T *dy, i64 ds, const T *bias, i64 bs, const i32 *offsets, i64 groups, i64 n,
                           i64 cols, Fault unsound, i32 vectors) {
    check_offsets(offsets, groups, n, unsound);
    for (i64 i = i64(blockIdx.x) * blockDim.y + threadIdx.y; i < n; i += i64(gridDim.x) * blockDim.y) {
        i64 group = group_of(offsets, groups, i);
        if (group < 0) continue;
        Acc sum = 0;
#pragma unroll 4
        for (i64 j = threadIdx.x * N; j < cols; j += 32 * N) {
            int count = int(min(i64(N), cols - j));
            Words<T, N> d = load_up_to<N>(dy + i * ds + j, count, vectors);
            Words<T, N> b = load_up_to<N>(bias + group * bs + j, count, vectors);
#pragma unroll
            for (int k = 0; k < N; k++) sum += widen(d.get(k)) * widen(b.get(k));
        }
        sum = warp_sum(sum);
        if (threadIdx.x == 0) d_scale[i] += sum;
    }
}
