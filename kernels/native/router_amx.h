// Sixteen rows of an fp32 router against rows of x on tiles, as two bf16 halves: what is nearest to a weight, and what
// is nearest to the rest. Included inside a namespace, behind linear_amx.h.
//
// A logit from tiles and the fp32 sum that decides differ by slack(K) |x| |w| at most. In units of 2^-24 and of
// sum |x_k w_k| <= |x| |w|, as products of bf16 are exact in fp32:
//    64           both halves leave 2^-18 of a weight
//    K / 16 + 17  TDPBF16PS adds 16 products to each of two sums that begin at zero, one sum to the other and that to
//                 the total, always rounding to nearest; K / 32 tiles of either half add to a total
//    K / 16 + 6   the fp32 sum: a lane's share of K, then four levels of lanes
// The quarter that slack(K) has left is for products of these errors.

// Tiles and conversions take denormals for zero: up to 2^-126 for each operation, times |x_k| or |w_k| where an operand
// was one. No vector counts as shorter than sqrt(K SHORTEST), so that slack(K) of the lengths covers all that.
constexpr float SHORTEST = 0x1p-100f;
// Of a length's square, for its own roundings. So |x| |w| is infinite before a sum can be, and leaves nothing sure.
constexpr float SPARE = 1.02f;

static inline float slack(i64 k) { return float(k / 6 + 128) * 0x1p-24f; }
static inline float length(V squares, i64 k) { return __builtin_sqrtf(SPARE * sum(squares) + float(k) * SHORTEST); }

static void measure(const Router& a, i64 begin, i64 end) {
    const i64 k = a.fp32.k;
    for (i64 m = begin; m < end; m++) {
        const bf16* x = static_cast<const bf16*>(a.fp32.x) + m * k;
        V squares = splat(0.0f);
        for (i64 i = 0; i < k; i += W) {
            const V some = load(x + i, k - i);
            squares = fma(some, some, squares);
        }
        a.lengths[m] = length(squares, k);
    }
}

struct alignas(64) Halves {
    bf16 upper[ROWS][TILE_K], lower[ROWS][TILE_K];
};

static inline __m256i nearest(V x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

// W weights as two of bf16.
static inline void halve(V weights, bf16* upper, bf16* lower) {
    const __m256i half = nearest(weights);
    _mm256_store_si256(reinterpret_cast<__m256i*>(upper), half);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lower), nearest(weights - widen(half, bf16())));
}

// Columns from k on of 16 rows, of which `left` exist; their squares are added to those before.
static inline void halve_tile(const float* const* rows, i64 k, i64 left, Halves& to, V* squares) {
    for (i64 r = 0; r < ROWS; r++)
        for (i64 i = 0; i < TILE_K; i += W) {
            const float* row = rows[r] + k + i;
            __builtin_prefetch(reinterpret_cast<const char*>(row) + AHEAD_BYTES);
            const V weights = load(row, left - i);
            halve(weights, to.upper[r] + i, to.lower[r] + i);
            squares[r] = fma(weights, weights, squares[r]);
        }
}

// Which of 16 logits may lie on the other side of the threshold, NaN among them.
static inline u32 unsure(V logits, V error, float threshold) {
    const V distance = maximum(logits - splat(threshold), splat(threshold) - logits);
    return _mm512_cmp_ps_mask(distance, error, _CMP_NGT_UQ);
}

// Logits of 16 rows of x from m0 on and `count` groups of these lengths, from their sums [groups, rows of x].
static inline void settle(const Router& a, i64 m0, i64 group, i64 count, V lengths, const float (*sums)[TILE_M]) {
    V logits[W];
    for (i64 r = 0; r < W; r++) logits[r] = load(sums[r]);
    transpose(logits);
    for (i64 m = m0; m < least(a.fp32.m, m0 + TILE_M); m++) {
        if (a.awake && !a.awake[m]) continue;
        store(static_cast<float*>(a.fp32.y) + m * a.fp32.y_stride + group, logits[m - m0], count);
        const V error = lengths * splat(a.lengths[m]) * splat(slack(a.fp32.k));
        u32 left = unsure(logits[m - m0], error, a.threshold) & first(count);
        for (; left; left &= left - 1) sum_again(a, m, group + __builtin_ctz(left));
    }
}

// TILES * 16 rows of x from m0 on, and 16 groups of which `count` exist.
template <int TILES>
static void route(const Router& a, i64 m0, i64 group, i64 count) {
    const i64 k = a.fp32.k, ld = row_words(a.fp32.m);
    const u32* x = a.packed + m0 * row_pairs(k);
    const float* rows[ROWS];
    for (i64 r = 0; r < ROWS; r++) rows[r] = static_cast<const float*>(a.fp32.w) + (group + least(r, count - 1)) * k;
    V squares[ROWS];
    for (V& one : squares) one = splat(0.0f);
    Halves turns[2];  // no tile is loaded from where the next one is being written
    zero_sums();
    for (i64 at = 0; at < k; at += TILE_K) {
        Halves& halves = turns[at / TILE_K % 2];
        halve_tile(rows, at, k - at, halves, squares);
        step<TILES>(halves.upper, 2 * TILE_K, x + at / 2 * ld, ld);
        step<TILES>(halves.lower, 2 * TILE_K, x + at / 2 * ld, ld);
    }
    alignas(64) float sums[TILES][ROWS][TILE_M], lengths[ROWS];
    take_sums<TILES>(sums);
    for (i64 r = 0; r < ROWS; r++) lengths[r] = length(squares[r], k);
    for (i64 t = 0; t < TILES; t++) settle(a, m0 + t * TILE_M, group, count, load(lengths), sums[t]);
}

// All rows of x, and up to 16 groups.
static void route_sixteen(const Router& a, i64 group, i64 count) {
    for (i64 m = 0; m < a.fp32.m; m += BLOCK_M) switch (ceil_div(least(a.fp32.m - m, BLOCK_M), TILE_M)) {
            case 1: route<1>(a, m, group, count); break;
            case 2: route<2>(a, m, group, count); break;
            case 3: route<3>(a, m, group, count); break;
            default: route<4>(a, m, group, count);
        }
}
