// Sparse W on AMX tiles: a strip of 16 rows is expanded into the first-level cache while the strip before it is
// multiplied. Included inside a namespace behind linear_amx.h and sparse_kernel.h.

constexpr int STRIP = 4;  // tiles of W

// 16 rows of W on their way along K.
struct Expanding {
    const u32* masks[ROWS];
    const bf16* values[ROWS];
    i64 words;

    Expanding() = default;
    Expanding(const Sparse& w, i64 n0, i64 gap) : words(w.words) {
        for (i64 r = 0; r < ROWS; r++) {
            masks[r] = w.masks + (n0 + r * gap) * w.words;
            values[r] = static_cast<const bf16*>(w.values) + w.starts[n0 + r * gap];
        }
    }

    // `count` tiles from `word` on, each with rows and pairs of columns in each other's places.
    void transposed(i64 word, i64 count, u32 (*to)[TILE_K / 2][ROWS]) {
        for (i64 r = 0; r < ROWS; r++) __builtin_prefetch(masks[r] + word + 64);
        for (i64 i = 0; i < count; i++) {
            V tile[ROWS];
            for (i64 r = 0; r < ROWS; r++) {
                const u32 mask = masks[r][word + i];
                __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + AHEAD_BYTES);
                tile[r] = Spread<bf16>::pairs(mask, values[r]);
                values[r] += __builtin_popcount(mask);
            }
            transpose(tile);
            for (i64 pair = 0; pair < TILE_K / 2; pair++) store(reinterpret_cast<float*>(to[i][pair]), tile[pair]);
        }
    }

    // `count` tiles from `word` on.
    void strip(i64 word, i64 count, bf16 (*to)[ROWS][TILE_K]) {
        for (i64 r = 0; r < ROWS; r++) {
            const bf16* next = values[r];
            __builtin_prefetch(reinterpret_cast<const char*>(next) + AHEAD_BYTES);
            __builtin_prefetch(reinterpret_cast<const char*>(next) + AHEAD_BYTES + 64);
            __builtin_prefetch(masks[r] + word + 64);
            for (i64 i = 0; i < count; i++) {
                const u32 mask = masks[r][word + i];
                Spread<bf16>::put(to[i][r], mask, next);
                next += __builtin_popcount(mask);
            }
            values[r] = next;
        }
    }
};

// As `tiles` of linear_amx.h.
template <int TILES>
static void sparse_tiles(const SparseLinear& a, i64 m0, i64 n0, i64 gap, i64 done) {
    const u32* x = a.packed + m0 * row_pairs(a.k);
    const i64 ld = row_words(a.m);
    alignas(64) bf16 strips[2][STRIP][ROWS][TILE_K];
    Expanding rows(a.sparse, n0, gap);
    zero_sums();
    rows.strip(0, least(STRIP, rows.words), strips[0]);
    for (i64 word = 0; word < rows.words; word += STRIP) {
        const int at = word / STRIP % 2;
        const i64 left = rows.words - word;
        if (left > STRIP) rows.strip(word + STRIP, least(STRIP, left - STRIP), strips[1 - at]);
        for (i64 i = 0; i < least(STRIP, left); i++)
            step<TILES>(strips[at][i], 2 * TILE_K, x + (word + i) * TILE_K / 2 * ld, ld);
    }
    alignas(64) float sums[TILES][ROWS][TILE_M];
    take_sums<TILES>(sums);
    for (i64 m = m0; m < least(a.m, m0 + TILES * TILE_M); m++)
        for (i64 r = done; r < ROWS; r++)
            put<bf16>(a, m, n0 + r * gap, sums[(m - m0) / TILE_M][r][(m - m0) % TILE_M]);
}

static void sparse_sixteen(const SparseLinear& a, i64 m, i64 n, i64 gap, i64 done) {
    switch (ceil_div(least(a.m - m, BLOCK_M), TILE_M)) {
        case 1: return sparse_tiles<1>(a, m, n, gap, done);
        case 2: return sparse_tiles<2>(a, m, n, gap, done);
        case 3: return sparse_tiles<3>(a, m, n, gap, done);
        default: sparse_tiles<4>(a, m, n, gap, done);
    }
}

// Many rows of x: they are tiles as they lie in memory or copied (Tiles), and W's strips are transposed while they are
// expanded. A panel of W, 32 rows by DEPTH tiles, lies in the first-level cache and is multiplied with up to MOST_M rows
// of x. All panels of a chunk of W go one step along K before any takes the next, so that the second-level cache holds
// what they read of x; their sums wait there as well.
constexpr i64 DEPTH = 18;
constexpr i64 MOST_M = 512;
constexpr i64 PANELS = MANY_ROWS / PANEL_ROWS;
constexpr i64 SQUARE = 32 * TILE_K;  // elements of 32 rows of x that two tiles hold

// Where x lies: elements from row to row and from word to word of the 32 rows from m on.
struct Tiles {
    const bf16* x;
    i64 m, row, word;
};
static inline Tiles tiles_from(const SparseLinear& a, i64 m) {
    if (a.packed) return {reinterpret_cast<const bf16*>(a.packed) + m * a.sparse.words * TILE_K, m, TILE_K, SQUARE};
    const i64 last = least(m, a.m - 32);  // reaches back
    return {static_cast<const bf16*>(a.x) + last * a.x_stride, last, a.x_stride, TILE_K};
}

// Rows begin .. end of x as tiles [ceil(m / 32), words, 32, TILE_K], zeros behind column k.
static void copy_tiles(const SparseLinear& a, bf16* tiles, i64 begin, i64 end) {
    const i64 words = a.sparse.words;
    const u32 behind = a.k % TILE_K ? (1u << a.k % TILE_K) - 1 : ~0u;
    for (i64 m = begin; m < end; m++) {
        const bf16* from = static_cast<const bf16*>(a.x) + m * a.x_stride;
        bf16* to = tiles + (m / 32 * words * 32 + m % 32) * TILE_K;
        for (i64 word = 0; word < words; word++)
            _mm512_store_si512(to + word * SQUARE, _mm512_maskz_loadu_epi16(word + 1 < words ? ~0u : behind, from + word * TILE_K));
    }
}

struct Workplace {
    alignas(64) u32 w[2][DEPTH][TILE_K / 2][ROWS];  // two neighbours along K are a number
    alignas(64) float sums[PANELS][MOST_M / TILE_M][2][TILE_M][ROWS];
};

// Two tiles of x against two of W, at `depth` neighbouring places along K.
static inline void square(const Workplace& at, const Tiles& tiles, i64 word, i64 depth, float (*sums)[2][TILE_M][ROWS]) {
    if (!word) {
        zero_sums();
    } else {
        _tile_loadd(0, sums[0][0], 4 * ROWS);
        _tile_loadd(1, sums[0][1], 4 * ROWS);
        _tile_loadd(2, sums[1][0], 4 * ROWS);
        _tile_loadd(3, sums[1][1], 4 * ROWS);
    }
    const bf16* x = tiles.x + word * tiles.word;
    for (i64 i = 0; i < depth; i++, x += tiles.word) {
        _tile_loadd(X_TILE, x, 2 * tiles.row);
        _tile_loadd(W_TILE, at.w[0][i], 4 * ROWS);
        _tile_dpbf16ps(0, X_TILE, W_TILE);
        _tile_loadd(W_TILE_2, at.w[1][i], 4 * ROWS);
        _tile_dpbf16ps(1, X_TILE, W_TILE_2);
        _tile_loadd(X_TILE_2, x + TILE_M * tiles.row, 2 * tiles.row);
        _tile_dpbf16ps(2, X_TILE_2, W_TILE);
        _tile_dpbf16ps(3, X_TILE_2, W_TILE_2);
    }
    _tile_stored(0, sums[0][0], 4 * ROWS);
    _tile_stored(1, sums[0][1], 4 * ROWS);
    _tile_stored(2, sums[1][0], 4 * ROWS);
    _tile_stored(3, sums[1][1], 4 * ROWS);
}

// As `put`, 32 neighbouring outputs of up to 16 rows of x. Sums of tiles are never subnormal, which the conversion would lose.
static inline void put_rows(const Linear& a, i64 m0, i64 n, const float (*sums)[TILE_M][ROWS]) {
    alignas(64) float bias[2 * ROWS];
    for (i64 i = 0; i < 2 * ROWS; i++) bias[i] = bias_at<bf16>(a.bias, a.bias_is_fp32, n + i);
    for (i64 m = 0; m < least(TILE_M, a.m - m0); m++) {
        const i64 at = (m0 + m) * a.y_stride + n;
        const V low = load(sums[0][m]) + load(bias), high = load(sums[1][m]) + load(bias + ROWS);
        if (a.y_is_fp32) {
            store(static_cast<float*>(a.y) + at, low);
            store(static_cast<float*>(a.y) + at + ROWS, high);
        } else {
            _mm512_storeu_si512(static_cast<bf16*>(a.y) + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
    }
}

// `panels` times 32 rows of W from n0 on against up to MOST_M rows of x from m0 on, a multiple of 32.
static void sparse_panels(const SparseLinear& a, i64 m0, i64 n0, i64 panels) {
    static thread_local Workplace at;
    const i64 words = a.sparse.words, step = ceil_div(words, ceil_div(words, DEPTH));
    const i64 squares = ceil_div(least(MOST_M, a.m - m0), 32);
    Expanding halves[PANELS][2];
    for (i64 p = 0; p < panels; p++)
        for (i64 half = 0; half < 2; half++) halves[p][half] = Expanding(a.sparse, n0 + (2 * p + half) * ROWS, 1);
    for (i64 word = 0; word < words; word += step) {
        const i64 depth = least(step, words - word);
        for (i64 p = 0; p < panels; p++) {
            for (i64 half = 0; half < 2; half++) halves[p][half].transposed(word, depth, at.w[half]);
            for (i64 s = 0; s < squares; s++) square(at, tiles_from(a, m0 + 32 * s), word, depth, at.sums[p] + 2 * s);
        }
    }
    for (i64 t = 0; t < 2 * squares; t++)  // neighbouring outputs of a row of x together: they share pages
        for (i64 p = 0; p < panels; p++) put_rows(a, tiles_from(a, m0 + t / 2 * 32).m + t % 2 * TILE_M, n0 + p * PANEL_ROWS, at.sums[p][t]);
}

// Rows begin .. end for few rows of x; what is left at W's end is a tile that reaches back.
static void sparse_rows_of(const SparseLinear& a, i64 begin, i64 end) {
    const i64 gap = (end - begin) / ROWS, left = (end - begin) % ROWS;
    for (i64 m = 0; m < a.m; m += BLOCK_M) {
        for (i64 n = begin; n < begin + gap; n++) sparse_sixteen(a, m, n, gap, 0);
        if (left) sparse_sixteen(a, m, end - ROWS, 1, ROWS - left);
    }
}

// The same for many.
static void sparse_rows_of_many(const SparseLinear& a, i64 begin, i64 end) {
    const i64 panels = (end - begin) / PANEL_ROWS;
    for (i64 m = 0; m < a.m; m += MOST_M) {
        if (panels) sparse_panels(a, m, begin, panels);
        if ((end - begin) % PANEL_ROWS) sparse_panels(a, m, end - PANEL_ROWS, 1);
    }
}
