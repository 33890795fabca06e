// Compiles the file named by KERNEL once per level, each in a namespace of its own under its own target. Nothing is
// included from inside but our own headers: a standard template instantiated under a wider target could be picked by
// the linker for the plain code as well.
#include "common.h"

namespace scalar {
#include "vec_scalar.h"
#include KERNEL
}  // namespace scalar

#if PARED_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "vec_avx2.h"
#include "vec_math.h"
#include KERNEL
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "vec_avx512.h"
#include "vec_math.h"
#include KERNEL
}  // namespace avx512
#pragma GCC pop_options
#else
namespace avx2 = scalar;
namespace avx512 = scalar;
#endif

// The function of the widest level that is not above `level`.
template <class Function>
static inline Function widest(int level, Function scalar_one, Function avx2_one, Function avx512_one) {
    return level >= AVX512 ? avx512_one : level == AVX2 ? avx2_one : scalar_one;
}
#define WIDEST(level, ...) widest(level, scalar::__VA_ARGS__, avx2::__VA_ARGS__, avx512::__VA_ARGS__)
