// Sixteen lanes: AVX512 F, BW, DQ and VL. Included inside a namespace by every_level.h; see vec_scalar.h.
using V = __m512;
constexpr int W = 16;
constexpr int ACCUMULATORS = 16;

static inline V splat(float x) { return _mm512_set1_ps(x); }
static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
static inline V maximum(V a, V b) { return _mm512_max_ps(a, b); }
static inline V minimum(V a, V b) { return _mm512_min_ps(a, b); }
static inline float sum(V x) { return _mm512_reduce_add_ps(x); }
static inline float largest(V x) { return _mm512_reduce_max_ps(x); }

static inline __mmask16 first(i64 n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }
static inline V widen(__m256i half, bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline V widen(__m256i half, fp16) { return _mm512_cvtph_ps(half); }
static inline __m256i narrow(V x, bf16) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
static inline __m256i narrow(V x, fp16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

static inline V load(const float* p) { return _mm512_loadu_ps(p); }
static inline V load(const float* p, i64 n) { return _mm512_maskz_loadu_ps(first(n), p); }
template <class T>
static inline V load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T()); }
template <class T>
static inline V load(const T* p, i64 n) { return widen(_mm256_maskz_loadu_epi16(first(n), p), T()); }
static inline V load(const i8* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline V load(const i8* p, i64 n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}

static inline V load_even(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
static inline V load_odd(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))));
}

static inline V expand(u32 mask, V packed) { return _mm512_maskz_expand_ps(__mmask16(mask), packed); }

static inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
static inline void store(float* p, V x, i64 n) { _mm512_mask_storeu_ps(p, first(n), x); }
template <class T>
static inline void store(T* p, V x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T())); }
template <class T>
static inline void store(T* p, V x, i64 n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x, T())); }

static inline V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline V scale_by_power(V x, V n) { return _mm512_scalef_ps(x, n); }

static inline void transpose(V* row) {  // 16 x 16
    V t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // u[4 b + c]: lane group g holds column 4 g + c of rows 4 b .. 4 b + 3
        u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int c = 0; c < 4; c++) {
        const V even01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), odd01 = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
        const V even23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        const V odd23 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        row[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
        row[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        row[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
        row[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
    }
}
