// 32 columns at once with AVX512-VBMI2. Included by sparse_kernel.h.
template <>
struct Spread<bf16> {
    static inline __m512i expanded(u32 mask, const void* values) {
        return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    }
    static inline __m512bh take(u32 mask, const bf16* values) { return reinterpret_cast<__m512bh>(expanded(mask, values)); }
    static inline V pairs(u32 mask, const bf16* values) { return _mm512_castsi512_ps(expanded(mask, values)); }
    static inline void put(bf16* to, u32 mask, const bf16* values) { _mm512_storeu_si512(to, expanded(mask, values)); }
    static inline void put(bf16* to, u32 mask, const bf16* values, i64 n) {
        _mm512_mask_storeu_epi16(to, (1u << n) - 1, expanded(mask, values));
    }
};
