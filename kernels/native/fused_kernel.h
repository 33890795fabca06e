// Norms, activations and the rotary embedding, computed in fp32 and cast at the store. Included inside a namespace by
// every_level.h.

template <class Body>
static inline void for_lanes(i64 count, Body body) {
    i64 i = 0;
    for (; i + W <= count; i += W) body(i, W);
    if (i < count) body(i, count - i);
}
template <class T>
static inline V some(const T* p, i64 n) { return n == W ? load(p) : load(p, n); }
template <class T>
static inline void some(T* p, V x, i64 n) { n == W ? store(p, x) : store(p, x, n); }

template <class T>
static void rms_norm(const Norm& a) {
    const T* all = static_cast<const T*>(a.x);
#pragma omp parallel for num_threads(row_threads(a.m * a.d, a.threads)) if (row_threads(a.m * a.d, a.threads) > 1)
    for (i64 m = 0; m < a.m; m++) {
        const T* x = all + m * a.stride;
        T* y = static_cast<T*>(a.y) + m * a.d;
        T* total = a.residual ? static_cast<T*>(a.sum) + m * a.d : nullptr;
        if (total) {
            const T* residual = static_cast<const T*>(a.residual) + m * a.d;
            for_lanes(a.d, [&](i64 i, i64 n) { some(total + i, some(x + i, n) + some(residual + i, n), n); });
            x = total;
        }
        V squares = splat(0.0f);
        for_lanes(a.d, [&](i64 i, i64 n) { const V v = some(x + i, n); squares = fma(v, v, squares); });
        const V scale = splat(1.0f / std::sqrt(sum(squares) / float(a.d) + a.eps));
        for_lanes(a.d, [&](i64 i, i64 n) { some(y + i, some(x + i, n) * scale * some(a.weight + i, n), n); });
    }
}

template <class T>
static void layer_norm(const Norm& a) {
#pragma omp parallel for num_threads(row_threads(a.m * a.d, a.threads)) if (row_threads(a.m * a.d, a.threads) > 1)
    for (i64 m = 0; m < a.m; m++) {
        const T* x = static_cast<const T*>(a.x) + m * a.d;
        T* y = static_cast<T*>(a.y) + m * a.d;
        V total = splat(0.0f), squares = splat(0.0f);
        for_lanes(a.d, [&](i64 i, i64 n) { total = total + some(x + i, n); });
        const float average = sum(total) / float(a.d);
        const V mean = splat(average);
        const i64 whole = a.d / W * W;
        for (i64 i = 0; i < whole; i += W) {
            const V off = load(x + i) - mean;
            squares = fma(off, off, squares);
        }
        float variance = sum(squares);
        for (i64 i = whole; i < a.d; i++) {
            const float off = to_float(x[i]) - average;
            variance += off * off;
        }
        const V scale = splat(1.0f / std::sqrt(variance / float(a.d) + a.eps));
        for_lanes(a.d, [&](i64 i, i64 n) {
            const V shift = a.bias ? some(a.bias + i, n) : splat(0.0f);
            some(y + i, fma((some(x + i, n) - mean) * scale, some(a.weight + i, n), shift), n);
        });
    }
}

static inline V sigmoid(V x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

static inline V gelu(V x) {  // the exact form has no cheap vector code and few models ask for it
    float lanes[W];
    store(lanes, x);
    for (float& one : lanes) one = 0.5f * one * std::erfc(one * -0.70710678f);
    return load(lanes);
}

static inline V activate(int kind, V x) {
    if (kind == SILU) return x * sigmoid(x);
    if (kind == GELU) return gelu(x);
    if (kind == GELU_TANH) return x * sigmoid(splat(1.59576912f) * fma(x * x * x, splat(0.044715f), x));
    return maximum(splat(0.0f), x);
}

template <class T>
static void act(const Activation& a) {
    const i64 gap = a.gated ? a.f : 0;  // from a gate to its up
#pragma omp parallel for num_threads(row_threads(a.m * a.f, a.threads)) if (row_threads(a.m * a.f, a.threads) > 1)
    for (i64 m = 0; m < a.m; m++) {
        const T* x = static_cast<const T*>(a.x) + m * (a.f + gap);
        T* y = static_cast<T*>(a.y) + m * a.f;
        for_lanes(a.f, [&](i64 i, i64 n) {
            const V v = activate(a.kind, some(x + i, n));
            some(y + i, a.gated ? v * some(x + gap + i, n) : v, n);
        });
    }
}

// One head: its first `rotated` elements turn in pairs (i, i + rotated / 2), the others pass.
template <class T>
static inline void rotate(const T* x, T* y, const float* cos, const float* sin, i64 rotated, i64 head_dim) {
    const i64 half = rotated / 2;
    for_lanes(half, [&](i64 i, i64 n) {
        const V a = some(x + i, n), b = some(x + half + i, n), c = some(cos + i, n), s = some(sin + i, n);
        some(y + i, a * c - b * s, n);
        some(y + half + i, fma(b, c, a * s), n);
    });
    std::memcpy(y + rotated, x + rotated, (head_dim - rotated) * sizeof(T));
}

template <class T>
static void rotary_cache(const Rotary& a) {
    const i64 q_width = a.heads * a.head_dim, kv_width = a.kv_heads * a.head_dim, half = a.rotated / 2;
    const int threads = row_threads(a.tokens * (q_width + 2 * kv_width), a.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 t = 0; t < a.tokens; t++) {
        const T* qkv = static_cast<const T*>(a.qkv) + t * (q_width + 2 * kv_width);
        T* q = static_cast<T*>(a.q) + t * q_width;
        T* k = static_cast<T*>(a.k_pool) + a.slots[t] * kv_width;
        const float *cos = a.cos + t * half, *sin = a.sin + t * half;
        for (i64 at = 0; at < q_width; at += a.head_dim) rotate(qkv + at, q + at, cos, sin, a.rotated, a.head_dim);
        for (i64 at = 0; at < kv_width; at += a.head_dim)
            rotate(qkv + q_width + at, k + at, cos, sin, a.rotated, a.head_dim);
        std::memcpy(static_cast<T*>(a.v_pool) + a.slots[t] * kv_width, qkv + q_width + kv_width, kv_width * sizeof(T));
    }
}
