// The fused row operations around attention and the feed-forward layers.
#define KERNEL "fused_kernel.h"
#include "fused.h"

#include "every_level.h"

namespace {

template <class Arguments>
using Rows = void (*)(const Arguments&, i64 begin, i64 end);

constexpr i64 ELEMENTS_PER_PIECE = 8 << 10, ELEMENTS_PER_THREAD = 32 << 10;  // below, a second thread does not pay

template <class Arguments>
struct RowCall final : Call {
    Arguments a;
    Rows<Arguments> rows;
    i64 count, width;

    RowCall(const Arguments& a, Rows<Arguments> rows, i64 count, i64 width) : a(a), rows(rows), count(count), width(width) {}

    int useful_threads(int threads) const override {
        return int(most(1, least(threads, count * width / ELEMENTS_PER_THREAD)));
    }
    Span enqueue(Queue& queue, Span after) override {
        return queue.add(*this, 0, count, ceil_div(ELEMENTS_PER_PIECE, most(1, width)), after);
    }
    void run(int, i64 begin, i64 end) const override { rows(a, begin, end); }
};

// `count` rows of about `width` elements each.
template <class Arguments>
void submit_rows(const Arguments& a, Rows<Arguments> rows, i64 count, i64 width, int threads) {
    submit(RowCall<Arguments>(a, rows, count, width), threads);
}

}  // namespace

#define WIDEST_OF(level, dtype, name) \
    (dtype == BF16 ? WIDEST(level, name<bf16>) : dtype == FP16 ? WIDEST(level, name<fp16>) : WIDEST(level, name<float>))

extern "C" void pared_rms_norm(int level, int dtype, int threads, const void* x, const float* weight, void* y, i64 m, i64 d,
                               i64 stride, float eps) {
    const Norm a{x, nullptr, weight, nullptr, y, nullptr, m, d, stride, eps};
    submit_rows(a, WIDEST_OF(level, dtype, rms_norm), m, d, threads);
}

extern "C" void pared_add_rms_norm(int level, int dtype, int threads, const void* x, const void* residual,
                                   const float* weight, void* y, void* sum, i64 m, i64 d, float eps) {
    const Norm a{x, residual, weight, nullptr, y, sum, m, d, d, eps};
    submit_rows(a, WIDEST_OF(level, dtype, rms_norm), m, d, threads);
}

extern "C" void pared_layer_norm(int level, int dtype, int threads, const void* x, const float* weight, const float* bias,
                                 void* y, i64 m, i64 d, float eps) {
    const Norm a{x, nullptr, weight, bias, y, nullptr, m, d, d, eps};
    submit_rows(a, WIDEST_OF(level, dtype, layer_norm), m, d, threads);
}

extern "C" void pared_add_layer_norm(int level, int dtype, int threads, const void* x, const void* residual,
                                     const float* weight, const float* bias, void* y, void* sum, i64 m, i64 d, float eps) {
    const Norm a{x, residual, weight, bias, y, sum, m, d, d, eps};
    submit_rows(a, WIDEST_OF(level, dtype, layer_norm), m, d, threads);
}

extern "C" void pared_gated_act(int level, int dtype, int threads, int kind, const void* x, void* y, i64 m, i64 f) {
    submit_rows(Activation{kind, true, x, y, m, f}, WIDEST_OF(level, dtype, act), m, f, threads);
}

extern "C" void pared_act(int level, int dtype, int threads, int kind, const void* x, void* y, i64 m, i64 f) {
    submit_rows(Activation{kind, false, x, y, m, f}, WIDEST_OF(level, dtype, act), m, f, threads);
}

extern "C" void pared_rotary_cache(int level, int dtype, int threads, const void* qkv, const float* cos, const float* sin,
                                   const float* q_weight, const float* k_weight, void* k_pool, void* v_pool,
                                   const i64* slots, void* q, i64 tokens, i64 heads, i64 kv_heads, i64 head_dim,
                                   i64 rotated, float eps) {
    const Rotary a{qkv, cos,    sin,   q_weight, k_weight, k_pool,  v_pool, slots,
                   q,   tokens, heads, kv_heads, head_dim, rotated, eps};
    submit_rows(a, WIDEST_OF(level, dtype, rotary_cache), tokens, (heads + 2 * kv_heads) * head_dim, threads);
}

static void concat(const Concat& a, i64 begin, i64 end) {
    for (i64 m = begin; m < end; m++) {
        char* to = static_cast<char*>(a.y) + m * a.row;
        for (i64 i = 0; i < a.count; to += a.widths[i++])
            std::memcpy(to, static_cast<const char*>(a.parts[i]) + m * a.widths[i], a.widths[i]);
    }
}

// y [m, sum of widths] = parts [m, widths[i]] side by side; widths in bytes.
extern "C" void pared_concat(int threads, const void* const* parts, const i64* widths, i64 count, void* y, i64 m) {
    Concat a{};
    a.count = count, a.y = y;
    for (i64 i = 0; i < count; i++) a.parts[i] = parts[i], a.row += a.widths[i] = widths[i];
    submit_rows(a, concat, m, a.row, threads);
}
