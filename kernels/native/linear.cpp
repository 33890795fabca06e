// The dense linear layer for few rows of x.
#define KERNEL "linear_kernel.h"
#include "linear.h"

#include "every_level.h"

#include <vector>

#if PARED_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vec_avx512.h"
#define PARED_DOT_BF16 1
#include "linear_kernel.h"
}  // namespace avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
namespace amx {
#include "linear_amx.h"
}  // namespace amx
#pragma GCC pop_options

// A lone row leaves tiles idle: eight streams of W then read 3 % faster than the sixteen of a tile.
bool on_tiles(int level, int dtype, i64 m, i64 n) { return level == AMX && dtype == BF16 && m > 1 && n >= ROWS; }
i64 packed_words(i64 m, i64 k) { return amx::packed_words(m, k); }
void pack(const void* x, i64 x_stride, const int* order, i64 m, i64 k, u32* packed, i64 begin, i64 end) {
    amx::pack(static_cast<const bf16*>(x), x_stride, order, m, k, packed, begin, end);
}
Tiles::Tiles(i64 m) : m(m) { if (m) amx::configure(least(m, amx::TILE_M)); }
Tiles::~Tiles() { if (m) amx::release(); }

static Rows rows_of_bf16(int level, const Linear& a) {
    if (a.packed) return amx::rows_of;
    return level < AVX512_BF16 ? WIDEST(level, rows_of<bf16>) : avx512_bf16::rows_of<bf16>;
}
#else
bool on_tiles(int, int, i64, i64) { return false; }
i64 packed_words(i64, i64) { return 0; }
void pack(const void*, i64, const int*, i64, i64, u32*, i64, i64) {}
Tiles::Tiles(i64 m) : m(m) {}
Tiles::~Tiles() {}
static Rows rows_of_bf16(int, const Linear&) { return scalar::rows_of<bf16>; }
#endif

Rows rows_of(int level, int dtype, const Linear& a) {
    if (dtype == BF16) return rows_of_bf16(level, a);
    return dtype == FP16 ? WIDEST(level, rows_of<fp16>) : WIDEST(level, rows_of<float>);
}

extern "C" void pared_linear(int level, int dtype, int threads, const void* x, const void* w, const void* bias, void* y,
                             int bias_is_fp32, int y_is_fp32, i64 m, i64 n, i64 k) {
    if (!m || !n) return;
    Linear a{x, w, bias, y, bias_is_fp32 != 0, y_is_fp32 != 0, m, n, k, k, 0, n, nullptr};
    const i64 row_bytes = k * element_bytes(dtype);
    const bool tiles = on_tiles(level, dtype, m, n);
    thread_local std::vector<u32> packed;
    if (tiles) {
        packed.resize(most(packed.size(), packed_words(m, k)));  // never less: what grows again is zeroed again
        pack(x, k, nullptr, m, k, packed.data(), 0, m);
        a.packed = packed.data();
    }
    const Rows rows = rows_of(level, dtype, a);
    threads = useful_threads(n * row_bytes, threads);
    const i64 chunk = rows_per_chunk(row_bytes, n, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Tiles mine(tiles ? m : 0);
#pragma omp for schedule(dynamic, 1) nowait
        for (i64 begin = 0; begin < n; begin += chunk) rows(a, begin, least(n, begin + chunk));
    }
}
