// The arguments of the fused row operations. Each of them does rows begin .. end.
#pragma once
#include "queue.h"

enum Kind { SILU, GELU, GELU_TANH, RELU };

struct Norm {
    const void *x, *residual;
    const float *weight, *bias;
    void *y, *sum;
    i64 m, d, stride;  // rows of x lie `stride` elements apart, all others d
    float eps;
};

struct Activation {
    int kind;
    bool gated;
    const void* x;
    void* y;
    i64 m, f;  // gated: x [m, 2 f] = gate | up, y [m, f]; plain: x, y [m, f]
};

struct Rotary {
    const void* qkv;
    const float *cos, *sin, *q_weight, *k_weight;  // weights [head_dim] of an RMSNorm of every head, or null
    void *k_pool, *v_pool;
    const i64* slots;
    void* q;
    i64 tokens, heads, kv_heads, head_dim, rotated;
    float eps;
};

constexpr i64 MOST_PARTS = 8;
struct Concat {
    const void* parts[MOST_PARTS];  // [m, widths[i]]
    i64 widths[MOST_PARTS], count;  // widths and y's row in bytes
    void* y;
    i64 row;
};
