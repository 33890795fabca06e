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

// Many rows of x: a panel of W, 32 rows by DEPTH tiles, is expanded into the first-level cache and multiplied with up to
// MOST_M rows of x. All panels of a chunk of W go one step along K before any takes the next, so that the second-level
// cache holds what they read of x; their sums wait there as well.
constexpr i64 DEPTH = 8;
constexpr i64 MOST_M = 512;
constexpr i64 PANELS = 8;

struct Workplace {
    alignas(64) bf16 w[2][DEPTH][ROWS][TILE_K];
    alignas(64) float sums[PANELS][MOST_M / TILE_M][2][ROWS][TILE_M];
};

// Two tiles of W against two of x, at `depth` neighbouring places along K.
static inline void square(const Workplace& at, const u32* x, i64 ld, i64 depth, float (*sums)[2][ROWS][TILE_M], bool first) {
    if (first) {
        zero_sums();
    } else {
        _tile_loadd(0, sums[0][0], 4 * TILE_M);
        _tile_loadd(1, sums[0][1], 4 * TILE_M);
        _tile_loadd(2, sums[1][0], 4 * TILE_M);
        _tile_loadd(3, sums[1][1], 4 * TILE_M);
    }
    for (i64 i = 0; i < depth; i++, x += TILE_K / 2 * ld) {
        _tile_loadd(W_TILE, at.w[0][i], 2 * TILE_K);
        _tile_loadd(X_TILE, x, ld * 4);
        _tile_dpbf16ps(0, W_TILE, X_TILE);
        _tile_loadd(W_TILE_2, at.w[1][i], 2 * TILE_K);
        _tile_dpbf16ps(1, W_TILE_2, X_TILE);
        _tile_loadd(X_TILE_2, x + TILE_M, ld * 4);
        _tile_dpbf16ps(2, W_TILE, X_TILE_2);
        _tile_dpbf16ps(3, W_TILE_2, X_TILE_2);
    }
    _tile_stored(0, sums[0][0], 4 * TILE_M);
    _tile_stored(1, sums[0][1], 4 * TILE_M);
    _tile_stored(2, sums[1][0], 4 * TILE_M);
    _tile_stored(3, sums[1][1], 4 * TILE_M);
}

// As `put`, 16 neighbouring outputs of up to 16 rows of x.
static inline void put_tile(const Linear& a, i64 m0, i64 n, const float (*sums)[TILE_M]) {
    V rows[ROWS];
    for (i64 r = 0; r < ROWS; r++) rows[r] = load(sums[r]);
    transpose(rows);
    V bias = splat(0.0f);
    if (a.bias) bias = a.bias_is_fp32 ? load(static_cast<const float*>(a.bias) + n) : load(static_cast<const bf16*>(a.bias) + n);
    for (i64 m = m0; m < least(a.m, m0 + TILE_M); m++) {
        const i64 at = m * a.y_stride + n;
        if (a.y_is_fp32) store(static_cast<float*>(a.y) + at, rows[m - m0] + bias);
        else store(static_cast<bf16*>(a.y) + at, rows[m - m0] + bias);
    }
}

// `panels` times 32 rows of W from n0 on against MOST_M rows of x from m0 on.
static void sparse_panels(const SparseLinear& a, i64 m0, i64 n0, i64 panels) {
    static thread_local Workplace at;
    const i64 ld = row_words(a.m), rows = least(MOST_M, a.m - m0);
    Expanding halves[PANELS][2];
    for (i64 p = 0; p < panels; p++)
        for (i64 half = 0; half < 2; half++) halves[p][half] = Expanding(a.sparse, n0 + (2 * p + half) * ROWS, 1);
    for (i64 word = 0; word < a.sparse.words; word += DEPTH) {
        const i64 depth = least(DEPTH, a.sparse.words - word);
        for (i64 p = 0; p < panels; p++) {
            for (i64 half = 0; half < 2; half++) halves[p][half].strip(word, depth, at.w[half]);
            for (i64 m = m0; m < m0 + rows; m += 2 * TILE_M) {
                const u32* x = a.packed + m / BLOCK_M * BLOCK_M * row_pairs(a.k) + m % BLOCK_M + word * TILE_K / 2 * ld;
                square(at, x, ld, depth, at.sums[p] + (m - m0) / TILE_M, word == 0);
            }
        }
    }
    for (i64 p = 0; p < panels; p++)
        for (i64 m = 0; m < rows; m += TILE_M)
            for (i64 half = 0; half < 2; half++)
                put_tile(a, m0 + m, n0 + (2 * p + half) * ROWS, at.sums[p][m / TILE_M][half]);
}

// Rows begin .. end; what is left at W's end is a tile that reaches back.
static void sparse_rows_of(const SparseLinear& a, i64 begin, i64 end) {
    for (i64 panels; a.m > FEW_M && (panels = least(PANELS, (end - begin) / (2 * ROWS))); begin += panels * 2 * ROWS)
        for (i64 m = 0; m < a.m; m += MOST_M) sparse_panels(a, m, begin, panels);
    const i64 gap = (end - begin) / ROWS, left = (end - begin) % ROWS;
    for (i64 m = 0; m < a.m; m += BLOCK_M) {
        for (i64 n = begin; n < begin + gap; n++) sparse_sixteen(a, m, n, gap, 0);
        if (left) sparse_sixteen(a, m, end - ROWS, 1, ROWS - left);
    }
}
