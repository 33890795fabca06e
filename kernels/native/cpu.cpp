// What this CPU can run.
#include "common.h"

#if PARED_X86 && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// The kernel gives tile registers only to a process that asks for them.
static bool tiles_granted() {
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
static bool has_tiles() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    unsigned a, b, c, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return (d & AMX_BF16) && (d & AMX_TILE) && tiles_granted();
}
#else
static bool has_tiles() { return false; }
#endif

extern "C" int pared_best_level() {
#if PARED_X86
    const auto all = [](auto... has) { return (has && ...); };
    if (!all(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("f16c"))) return SCALAR;
    if (!all(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
             __builtin_cpu_supports("avx512vl")))
        return AVX2;
    if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
    return has_tiles() ? AMX : AVX512_BF16;
#else
    return SCALAR;
#endif
}
