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

static void linear_bf16(int level, const Linear& a) {
    if (level < AVX512_BF16) return WIDEST(level, linear<bf16>)(a);
    // A lone row leaves tiles idle: eight streams of W then read 3 % faster than the sixteen of a tile.
    if (level < AMX || a.n < ROWS || a.m == 1) return avx512_bf16::linear<bf16>(a);
    thread_local std::vector<u32> packed;
    packed.resize(amx::packed_words(a));
    amx::linear(a, packed.data());
}
#else
static void linear_bf16(int, const Linear& a) { scalar::linear<bf16>(a); }
#endif

extern "C" void pared_linear(int level, int dtype, int threads, const void* x, const void* w, const void* bias, void* y,
                             int bias_is_fp32, i64 m, i64 n, i64 k) {
    const Linear a{threads, x, w, bias, y, bias_is_fp32 != 0, m, n, k};
    if (dtype == BF16) linear_bf16(level, a);
    else if (dtype == FP16) WIDEST(level, linear<fp16>)(a);
    else WIDEST(level, linear<float>)(a);
}
