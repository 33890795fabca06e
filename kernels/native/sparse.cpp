// The sparse linear layer for few rows of x, and sparse weights made dense for many.
#define KERNEL "sparse_kernel.h"
#include "sparse.h"

#include "every_level.h"

// Multiplies rows begin .. end of W with every row of x; writes rows begin .. end of W densely.
using SparseRows = void (*)(const SparseLinear&, i64 begin, i64 end);
using SpreadRows = void (*)(const Sparse&, void* to, i64 k, i64 begin, i64 end);

#if PARED_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi2,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vec_avx512.h"
#define PARED_DOT_BF16 1
#define PARED_SPREAD_16 1
#include "sparse_kernel.h"
namespace amx {
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#include "linear_amx.h"
#include "sparse_amx.h"
#pragma GCC pop_options
}  // namespace amx
}  // namespace avx512_bf16
#pragma GCC pop_options

// Every CPU with AVX512-BF16 has VBMI2 as well, but for the very first.
static bool expands_16(int level, int dtype) {
    return level >= AVX512_BF16 && dtype == BF16 && __builtin_cpu_supports("avx512vbmi2");
}
static SparseRows sparse_rows_of_bf16(int level, bool even, bool tiles, bool many) {
    if (!expands_16(level, BF16)) return WIDEST(level, sparse_rows_of<bf16, false>);
    if (tiles) return many ? avx512_bf16::amx::sparse_rows_of_many : avx512_bf16::amx::sparse_rows_of;
    return even ? avx512_bf16::sparse_rows_of<bf16, true> : avx512_bf16::sparse_rows_of<bf16, false>;
}
static void copy_tiles(const SparseLinear& a, u32* to, i64 begin, i64 end) {
    avx512_bf16::amx::copy_tiles(a, reinterpret_cast<bf16*>(to), begin, end);
}
static SpreadRows spread_rows_of_bf16(int level) {
    return expands_16(level, BF16) ? avx512_bf16::spread_rows<bf16> : WIDEST(level, spread_rows<bf16>);
}
#else
static bool expands_16(int, int) { return false; }
static SparseRows sparse_rows_of_bf16(int, bool, bool, bool) { return scalar::sparse_rows_of<bf16, false>; }
static void copy_tiles(const SparseLinear&, u32*, i64, i64) {}
static SpreadRows spread_rows_of_bf16(int) { return scalar::spread_rows<bf16>; }
#endif

namespace {

SparseRows sparse_rows_of(int level, int dtype, bool even, bool tiles, bool many) {
    if (dtype == BF16) return sparse_rows_of_bf16(level, even, tiles, many);
    return dtype == FP16 ? WIDEST(level, sparse_rows_of<fp16, false>) : WIDEST(level, sparse_rows_of<float, false>);
}
SpreadRows spread_rows_of(int level, int dtype) {
    if (dtype == BF16) return spread_rows_of_bf16(level);
    return dtype == FP16 ? WIDEST(level, spread_rows<fp16>) : WIDEST(level, spread_rows<float>);
}

struct SparseCall final : Call {
    SparseLinear a;
    i64 bytes;
    bool tiles, many;  // rows of x
    SparseRows rows;
    enum { PACK, MULTIPLY };

    SparseCall(int level, int dtype, const SparseLinear& a)
        : a(a),
          bytes(row_bytes(a.sparse, a.n, a.k, element_bytes(dtype))),
          tiles(expands_16(level, dtype) && on_tiles(level, dtype, a.m, a.n)),
          many(tiles && a.m > (a.k > SHORT_K ? FEW_M : SHORT_FEW_M) && a.n >= PANEL_ROWS),
          rows(sparse_rows_of(level, dtype, a.sparse.per_word > 0, tiles, many)) {}

    int useful_threads(int threads) const override { return ::useful_threads(a.n * bytes, a.m, threads); }
    void lay_out(Scratch& scratch) override { a.packed = scratch.take<u32>(4 * words()); }
    // Many rows of x are tiles as they lie there, unless zeros have to follow them or they are whole pages apart, and so
    // in each other's way in every cache.
    i64 words() const {
        if (!many) return tiles ? packed_words(a.m, a.k) : 0;
        return a.k % WORD || 2 * a.k % PAGE == 0 ? ceil_div(a.m, PANEL_ROWS) * PANEL_ROWS * a.sparse.words * WORD / 2 : 0;
    }

    Span enqueue(Queue& queue, Span after) override {
        after = queue.add(*this, PACK, words() ? a.m : 0, ROWS, after);
        if (!many) return queue.add(*this, MULTIPLY, a.n, rows_per_chunk(bytes, a.n, queue.threads), after);
        const i64 fair = least(a.n / (4 * queue.threads), MANY_ROWS);
        return queue.add(*this, MULTIPLY, a.n, most(1, fair / PANEL_ROWS) * PANEL_ROWS, after);
    }

    void run(int step, i64 begin, i64 end) const override {
        if (step == PACK) return pack(const_cast<u32*>(a.packed), begin, end);
        if (tiles) hold_tiles(a.m);
        rows(a, begin, end);
    }
    void pack(u32* to, i64 begin, i64 end) const {
        if (many) copy_tiles(a, to, begin, end);
        else ::pack(a.x, a.k, nullptr, a.m, a.k, to, begin, end);
    }
};

struct SpreadCall final : Call {
    Sparse w;
    char* to;
    i64 first, count, k, row;
    SpreadRows rows;

    SpreadCall(int level, int dtype, const Sparse& w, void* to, i64 first, i64 count, i64 k)
        : w(w),
          to(static_cast<char*>(to)),
          first(first),
          count(count),
          k(k),
          row(k * element_bytes(dtype)),
          rows(spread_rows_of(level, dtype)) {}

    int useful_threads(int threads) const override { return ::useful_threads(count * row, 1, threads); }
    Span enqueue(Queue& queue, Span after) override {
        return queue.add(*this, 0, count, rows_per_chunk(row, count, queue.threads), after);
    }
    void run(int, i64 begin, i64 end) const override { rows(w, to + begin * row, k, first + begin, first + end); }
};

}  // namespace

// y [m, n] = x [m, k] W^T + bias for sparse W [n, k].
extern "C" void pared_sparse_linear(int level, int dtype, int threads, const void* x, const void* masks,
                                    const void* starts, const void* values, const void* bias, void* y, int bias_is_fp32,
                                    int y_is_fp32, i64 m, i64 n, i64 k, i64 per_word) {
    if (!m || !n) return;
    const Linear a{x, nullptr, bias, y, bias_is_fp32 != 0, y_is_fp32 != 0, m, n, k, k, 0, n, nullptr};
    submit(SparseCall(level, dtype, {a, sparse_of(masks, starts, values, k, per_word)}), threads);
}

// `count` rows of sparse W from `first` on, dense: to [count, k].
extern "C" void pared_spread(int level, int dtype, int threads, const void* masks, const void* starts, const void* values,
                             void* to, i64 first, i64 count, i64 k) {
    if (!count || !k) return;
    submit(SpreadCall(level, dtype, sparse_of(masks, starts, values, k, 0), to, first, count, k), threads);
}
