// The router of a routed feed-forward layer on tiles.
#include "router.h"

#if PARED_X86
// The sum of one row and group that decides.
static void sum_again(const Router& a, i64 m, i64 group) {
    Linear one = a.fp32;
    one.m = 1;
    one.x = static_cast<const bf16*>(one.x) + m * one.x_stride;
    one.y = static_cast<float*>(one.y) + m * one.y_stride;
    a.rows(one, group, group + 1);
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
namespace amx {
#include "vec_avx512.h"
#include "linear_amx.h"
#include "router_amx.h"
}  // namespace amx
#pragma GCC pop_options

void measure(const Router& a, i64 begin, i64 end) { amx::measure(a, begin, end); }
void route_on_tiles(const Router& a, i64 begin, i64 end) {
    hold_tiles(a.fp32.m);
    for (i64 group = begin; group < end; group += ROWS) amx::route_sixteen(a, group, least(ROWS, end - group));
}
#else
void measure(const Router&, i64, i64) {}
void route_on_tiles(const Router&, i64, i64) {}
#endif
