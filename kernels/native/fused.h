// The arguments of the fused row operations, and when their rows are worth a second thread.
#pragma once
#include "common.h"

enum Kind { SILU, GELU, GELU_TANH, RELU };

struct Norm {
    int threads;
    const void *x, *residual;
    const float *weight, *bias;
    void *y, *sum;
    i64 m, d, stride;  // rows of x lie `stride` elements apart, all others d
    float eps;
};

struct Activation {
    int threads, kind;
    bool gated;
    const void* x;
    void* y;
    i64 m, f;  // gated: x [m, 2 f] = gate | up, y [m, f]; plain: x, y [m, f]
};

struct Rotary {
    int threads;
    const void* qkv;
    const float *cos, *sin;
    void *k_pool, *v_pool;
    const i64* slots;
    void* q;
    i64 tokens, heads, kv_heads, head_dim, rotated;
};

constexpr i64 ELEMENTS_PER_THREAD = 32 << 10;
static inline int row_threads(i64 elements, int threads) {
    return int(most(1, least(threads, elements / ELEMENTS_PER_THREAD)));
}
