// The dense linear layer for few rows of x.
#define KERNEL "linear_kernel.h"
#include "linear.h"

#include "every_level.h"

#if PARED_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vec_avx512.h"
#define PARED_DOT_BF16 1
#include "linear_kernel.h"
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
namespace amx {
#include "linear_amx.h"
}  // namespace amx
#pragma GCC pop_options
}  // namespace avx512_bf16
#pragma GCC pop_options
namespace amx = avx512_bf16::amx;

// A lone row leaves tiles idle: eight streams of W then read 3 % faster than the sixteen of a tile.
bool on_tiles(int level, int dtype, i64 m, i64 n) { return level == AMX && dtype == BF16 && m > 1 && n >= ROWS; }
i64 packed_words(i64 m, i64 k) { return amx::packed_words(m, k); }
void pack(const void* x, i64 x_stride, const int* order, i64 m, i64 k, u32* packed, i64 begin, i64 end) {
    amx::pack(static_cast<const bf16*>(x), x_stride, order, m, k, packed, begin, end);
}
static thread_local i64 held = 0;  // what the tiles are configured for: 64 columns + depth
void hold_tiles(i64 m, i64 depth) {
    const i64 columns = least(m, amx::TILE_M);
    if (64 * columns + depth == held) return;
    amx::configure(columns, depth);
    held = 64 * columns + depth;
}
void release_tiles() {
    if (held) amx::release();
    held = 0;
}

static Rows rows_of_bf16(int level, const Linear& a) {
    if (a.packed) return amx::rows_of;
    return level < AVX512_BF16 ? WIDEST(level, rows_of<bf16, bf16>) : avx512_bf16::rows_of<bf16, bf16>;
}
#else
bool on_tiles(int, int, i64, i64) { return false; }
i64 packed_words(i64, i64) { return 0; }
void pack(const void*, i64, const int*, i64, i64, u32*, i64, i64) {}
void hold_tiles(i64, i64) {}
void release_tiles() {}
static Rows rows_of_bf16(int, const Linear&) { return scalar::rows_of<bf16, bf16>; }
#endif

static Rows rows_of_int8(int level, int dtype) {
    if (dtype == BF16) return WIDEST(level, rows_of<bf16, i8>);
    return dtype == FP16 ? WIDEST(level, rows_of<fp16, i8>) : WIDEST(level, rows_of<float, i8>);
}

Rows rows_of(int level, int dtype, const Linear& a) {
    if (a.scale) return rows_of_int8(level, dtype);
    if (dtype == BF16) return rows_of_bf16(level, a);
    return dtype == FP16 ? WIDEST(level, rows_of<fp16, fp16>) : WIDEST(level, rows_of<float, float>);
}

Rows fp32_rows_of(int level, int dtype) {
    if (dtype == BF16) return WIDEST(level, rows_of<bf16, float>);
    return dtype == FP16 ? WIDEST(level, rows_of<fp16, float>) : WIDEST(level, rows_of<float, float>);
}

namespace {

struct LinearCall final : Call {
    Linear a;
    Rows rows;
    i64 row_bytes;
    int level, dtype;
    bool tiles;
    enum { PACK, MULTIPLY };

    LinearCall(int level, int dtype, const Linear& a)
        : a(a),
          row_bytes(a.k * (a.scale ? 1 : element_bytes(dtype))),
          level(level),
          dtype(dtype),
          tiles(!a.scale && on_tiles(level, dtype, a.m, a.n)) {}

    int useful_threads(int threads) const override { return ::useful_threads(a.n * row_bytes, threads); }

    void lay_out(Scratch& scratch) override {
        a.packed = scratch.take<u32>(tiles ? packed_words(a.m, a.k) * 4 : 0);
        rows = rows_of(level, dtype, a);
    }

    Span enqueue(Queue& queue, Span after) override {
        after = queue.add(*this, PACK, tiles ? a.m : 0, ROWS, after);
        return queue.add(*this, MULTIPLY, a.n, rows_per_chunk(row_bytes, a.n, queue.threads), after);
    }

    void run(int step, i64 begin, i64 end) const override {
        if (step == PACK) return pack(a.x, a.k, nullptr, a.m, a.k, const_cast<u32*>(a.packed), begin, end);
        if (tiles) hold_tiles(a.m);
        rows(a, begin, end);
    }
};

}  // namespace

extern "C" void pared_linear(int level, int dtype, int threads, const void* x, const void* w, const float* scale,
                             const void* bias, void* y, int bias_is_fp32, int y_is_fp32, i64 m, i64 n, i64 k) {
    if (!m || !n) return;
    const Linear a{x, w, bias, y, bias_is_fp32 != 0, y_is_fp32 != 0, m, n, k, k, 0, n, nullptr, scale};
    submit(LinearCall(level, dtype, a), threads);
}
