// Rows in lanes, and the activations. Included inside a namespace, after a vec_*.h.

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
