// What every kernel file shares: element types with their scalar conversions, and nothing that a level would inline
// differently. Functions here are compiled for the plain target, whatever level calls them.
#pragma once

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define PARED_X86 1
#include <immintrin.h>
#endif

using i64 = std::int64_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;

struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};

enum DType { FP32, BF16, FP16 };
enum Level { SCALAR, AVX2, AVX512, AVX512_BF16, AMX };

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 most(i64 a, i64 b) { return a < b ? b : a; }
static inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

static inline float from_bits(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline u32 to_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

using i8 = std::int8_t;

// For every byte of a mask the lane of packed values that each of eight lanes takes; negative where it takes none.
struct ExpandTable {
    i8 from[256][8] = {};
    constexpr ExpandTable() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, next = 0; lane < 8; lane++) from[mask][lane] = mask >> lane & 1 ? i8(next++) : i8(-1);
    }
};
inline constexpr ExpandTable EXPAND;

static inline float to_float(float x) { return x; }
static inline float to_float(i8 x) { return x; }
static inline float to_float(bf16 x) { return from_bits(u32(x.bits) << 16); }
static inline float to_float(fp16 x) {
    const u32 sign = u32(x.bits & 0x8000) << 16, magnitude = u32(x.bits & 0x7fff) << 13;
    if ((x.bits & 0x7c00) == 0x7c00) return from_bits(sign | 0x7f800000 | magnitude);
    return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));  // rebias; exact for subnormals too
}

// Round to nearest, ties to even, as torch does.
static inline void cast(float value, float* out) { *out = value; }
static inline void cast(float value, bf16* out) {
    const u32 bits = to_bits(value);
    out->bits = std::isnan(value) ? 0x7fc0 : u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void cast(float value, fp16* out) {
    const u32 bits = to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    u32 half;
    if (magnitude > 0x7f800000) half = 0x7e00;
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520 and above round to infinity
    else if (magnitude < 0x38800000) half = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);  // subnormal
    else half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    out->bits = u16(sign | half);
}

// A bias of its own type: fp32 or the weight's.
template <class T>
static inline float bias_at(const void* bias, bool is_fp32, i64 i) {
    if (!bias) return 0.0f;
    return is_fp32 ? static_cast<const float*>(bias)[i] : to_float(static_cast<const T*>(bias)[i]);
}
