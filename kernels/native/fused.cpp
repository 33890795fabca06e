// The fused row operations around attention and the feed-forward layers.
#define KERNEL "fused_kernel.h"
#include "fused.h"

#include "every_level.h"

#define WIDEST_OF(level, dtype, name) \
    (dtype == BF16 ? WIDEST(level, name<bf16>) : dtype == FP16 ? WIDEST(level, name<fp16>) : WIDEST(level, name<float>))

extern "C" void pared_rms_norm(int level, int dtype, int threads, const void* x, const float* weight, void* y, i64 m, i64 d,
                               i64 stride, float eps) {
    WIDEST_OF(level, dtype, rms_norm)(Norm{threads, x, nullptr, weight, nullptr, y, nullptr, m, d, stride, eps});
}

extern "C" void pared_add_rms_norm(int level, int dtype, int threads, const void* x, const void* residual,
                                   const float* weight, void* y, void* sum, i64 m, i64 d, float eps) {
    WIDEST_OF(level, dtype, rms_norm)(Norm{threads, x, residual, weight, nullptr, y, sum, m, d, d, eps});
}

extern "C" void pared_layer_norm(int level, int dtype, int threads, const void* x, const float* weight, const float* bias,
                                 void* y, i64 m, i64 d, float eps) {
    WIDEST_OF(level, dtype, layer_norm)(Norm{threads, x, nullptr, weight, bias, y, nullptr, m, d, d, eps});
}

extern "C" void pared_gated_act(int level, int dtype, int threads, int kind, const void* x, void* y, i64 m, i64 f) {
    WIDEST_OF(level, dtype, act)(Activation{threads, kind, true, x, y, m, f});
}

extern "C" void pared_act(int level, int dtype, int threads, int kind, const void* x, void* y, i64 m, i64 f) {
    WIDEST_OF(level, dtype, act)(Activation{threads, kind, false, x, y, m, f});
}

extern "C" void pared_rotary_cache(int level, int dtype, int threads, const void* qkv, const float* cos, const float* sin,
                                   void* k_pool, void* v_pool, const i64* slots, void* q, i64 tokens, i64 heads, i64 kv_heads,
                                   i64 head_dim, i64 rotated) {
    WIDEST_OF(level, dtype, rotary_cache)
    (Rotary{threads, qkv, cos, sin, k_pool, v_pool, slots, q, tokens, heads, kv_heads, head_dim, rotated});
}
