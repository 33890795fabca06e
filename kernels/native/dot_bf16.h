// One step along K with AVX512-BF16: 32 products of bf16 pairs into 16 fp32 sums. Included by linear_kernel.h.
template <>
struct Dot<bf16, bf16> {
    static constexpr int STEP = 32;
    using Operand = __m512bh;
    static inline Operand take(const bf16* p) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p)); }
    static inline Operand take(const bf16* p, i64 n) {
        return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
    }
    static inline V add(V acc, Operand x, Operand w) { return _mm512_dpbf16_ps(acc, x, w); }
};
