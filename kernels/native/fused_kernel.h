// Norms, activations and the rotary embedding, computed in fp32 and cast at the store. Included inside a namespace by
// every_level.h.

#include "activate.h"

// Row m of what is normalised: x, or the stored sum of x and the residual.
template <class T>
static inline const T* summed(const Norm& a, i64 m) {
    const T* x = static_cast<const T*>(a.x) + m * a.stride;
    if (!a.residual) return x;
    const T* residual = static_cast<const T*>(a.residual) + m * a.d;
    T* total = static_cast<T*>(a.sum) + m * a.d;
    for_lanes(a.d, [&](i64 i, i64 n) { some(total + i, some(x + i, n) + some(residual + i, n), n); });
    return total;
}

template <class T>
static void rms_norm(const Norm& a, i64 begin, i64 end) {
    for (i64 m = begin; m < end; m++) {
        const T* x = summed<T>(a, m);
        T* y = static_cast<T*>(a.y) + m * a.d;
        V squares = splat(0.0f);
        for_lanes(a.d, [&](i64 i, i64 n) { const V v = some(x + i, n); squares = fma(v, v, squares); });
        const V scale = splat(1.0f / std::sqrt(sum(squares) / float(a.d) + a.eps));
        for_lanes(a.d, [&](i64 i, i64 n) { some(y + i, some(x + i, n) * scale * some(a.weight + i, n), n); });
    }
}

template <class T>
static void layer_norm(const Norm& a, i64 begin, i64 end) {
    for (i64 m = begin; m < end; m++) {
        const T* x = summed<T>(a, m);
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

template <class T>
static void act(const Activation& a, i64 begin, i64 end) {
    const i64 gap = a.gated ? a.f : 0;  // from a gate to its up
    for (i64 m = begin; m < end; m++) {
        const T* x = static_cast<const T*>(a.x) + m * (a.f + gap);
        T* y = static_cast<T*>(a.y) + m * a.f;
        for_lanes(a.f, [&](i64 i, i64 n) {
            const V v = activate(a.kind, some(x + i, n));
            some(y + i, a.gated ? v * some(x + gap + i, n) : v, n);
        });
    }
}

// What the elements of a head are multiplied by before it turns: its RMSNorm, or 1.
template <class T>
struct HeadNorm {
    V scale = splat(1.0f);
    const float* weight;

    HeadNorm(const T* x, const float* weight, i64 head_dim, float eps) : weight(weight) {
        if (!weight) return;
        V squares = splat(0.0f);
        for_lanes(head_dim, [&](i64 i, i64 n) { const V v = some(x + i, n); squares = fma(v, v, squares); });
        scale = splat(1.0f / std::sqrt(sum(squares) / float(head_dim) + eps));
    }
    V take(const T* x, i64 i, i64 n) const { return weight ? some(x + i, n) * scale * some(weight + i, n) : some(x + i, n); }
};

// One head: its first `rotated` elements turn in pairs (i, i + rotated / 2), the others pass.
template <class T>
static inline void rotate(const Rotary& a, i64 token, const T* x, const float* weight, T* y) {
    const i64 half = a.rotated / 2;
    const float *cos = a.cos + token * half, *sin = a.sin + token * half;
    const HeadNorm<T> norm(x, weight, a.head_dim, a.eps);
    for_lanes(half, [&](i64 i, i64 n) {
        const V left = norm.take(x, i, n), right = norm.take(x, half + i, n), c = some(cos + i, n), s = some(sin + i, n);
        some(y + i, left * c - right * s, n);
        some(y + half + i, fma(right, c, left * s), n);
    });
    for_lanes(a.head_dim - a.rotated, [&](i64 i, i64 n) { some(y + a.rotated + i, norm.take(x, a.rotated + i, n), n); });
}

template <class T>
static void rotary_cache(const Rotary& a, i64 begin, i64 end) {
    const i64 q_width = a.heads * a.head_dim, kv_width = a.kv_heads * a.head_dim;
    for (i64 t = begin; t < end; t++) {
        const T* qkv = static_cast<const T*>(a.qkv) + t * (q_width + 2 * kv_width);
        T* q = static_cast<T*>(a.q) + t * q_width;
        T* k = static_cast<T*>(a.k_pool) + a.slots[t] * kv_width;
        for (i64 at = 0; at < q_width; at += a.head_dim) rotate(a, t, qkv + at, a.q_weight, q + at);
        for (i64 at = 0; at < kv_width; at += a.head_dim) rotate(a, t, qkv + q_width + at, a.k_weight, k + at);
        std::memcpy(static_cast<T*>(a.v_pool) + a.slots[t] * kv_width, qkv + q_width + kv_width, kv_width * sizeof(T));
    }
}
