// Sparse W on AMX tiles: a strip of 16 rows is expanded into the first-level cache while the strip before it is
// multiplied. Included inside a namespace behind linear_amx.h and sparse_kernel.h.

constexpr int STRIP = 4;  // tiles of W

// 16 rows of W on their way along K.
struct Expanding {
    const u32* masks[ROWS];
    const bf16* values[ROWS];
    i64 words;

    Expanding(const Sparse& w, i64 n0, i64 gap) : words(w.words) {
        for (i64 r = 0; r < ROWS; r++) {
            masks[r] = w.masks + (n0 + r * gap) * w.words;
            values[r] = static_cast<const bf16*>(w.values) + w.starts[n0 + r * gap];
        }
    }

    // The strip from `word` on; what is left of a row may be less than a strip.
    void strip(i64 word, bf16 (*to)[ROWS][TILE_K]) {
        const i64 count = least(STRIP, words - word);
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
    rows.strip(0, strips[0]);
    for (i64 word = 0; word < rows.words; word += STRIP) {
        const int at = word / STRIP % 2;
        if (word + STRIP < rows.words) rows.strip(word + STRIP, strips[1 - at]);
        for (i64 i = 0; i < least(STRIP, rows.words - word); i++)
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

static void sparse_rows_of(const SparseLinear& a, i64 begin, i64 end) {
    const i64 gap = (end - begin) / ROWS, left = (end - begin) % ROWS;
    for (i64 m = 0; m < a.m; m += BLOCK_M) {
        for (i64 n = begin; n < begin + gap; n++) sparse_sixteen(a, m, n, gap, 0);
        if (left) sparse_sixteen(a, m, end - ROWS, 1, ROWS - left);
    }
}
