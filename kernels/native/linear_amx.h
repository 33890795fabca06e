// bf16 on AMX tiles: 16 rows of W are a tile as they lie in memory, so nothing is repacked but the few rows of x.
// One reduction order for every M: a row of x gets the same result in any company. Included inside a namespace.

// Tile registers, macros because the intrinsics paste them into assembly; 0 to 3 hold sums.
#define W_TILE 4
#define X_TILE 5
#define W_TILE_2 6
#define X_TILE_2 7

constexpr i64 TILE_K = 32;       // bf16 columns of a tile of W
constexpr i64 TILE_M = 16;       // rows of x in a tile, transposed
constexpr i64 BLOCK_M = 64;      // rows of x that are packed side by side, and multiplied at once
constexpr i64 AHEAD_BYTES = 512; // prefetched in each of the 16 rows

struct TileConfig {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    u16 column_bytes[16] = {};
    unsigned char rows[16] = {};
};

static inline void configure(i64 columns, i64 depth) {
    TileConfig config;
    for (int t = 0; t <= X_TILE_2; t++) {
        const bool w = t == W_TILE || t == W_TILE_2, x = t == X_TILE || t == X_TILE_2;
        config.rows[t] = (unsigned char)(x ? depth / 2 : 16);
        config.column_bytes[t] = u16(w ? 2 * depth : 4 * columns);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));  // GCC's intrinsic owns up to 8 bytes, and loses the others
}
static inline void release() { _tile_release(); }

// The words from one pair of columns to the next, the pairs, and all words.
static inline i64 row_words(i64 m) { return m <= TILE_M ? m : least(BLOCK_M, ceil_div(m, TILE_M) * TILE_M); }
static inline i64 row_pairs(i64 k) { return ceil_div(k, TILE_K) * TILE_K / 2; }
static inline i64 packed_words(i64 m, i64 k) { return ceil_div(m, BLOCK_M) * row_words(m) * row_pairs(k); }

// Pairs of columns of one row from `pair` on, zeros behind column k.
static inline void pack_row(const bf16* from, const int* order, i64 k, i64 pair, i64 ld, u32* to) {
    const auto column = [&](i64 i) { return order ? order[i] : i; };
    for (; pair < k / 2; pair++) to[pair * ld] = from[column(2 * pair)].bits | u32(from[column(2 * pair + 1)].bits) << 16;
    if (k % 2) to[pair++ * ld] = from[column(k - 1)].bits;
    for (; pair < row_pairs(k); pair++) to[pair * ld] = 0;
}

// As many pairs of 16 rows as there are blocks of 16; returns how many.
static inline i64 pack_rows(const bf16* from, i64 x_stride, i64 k, i64 ld, u32* to) {
    i64 pair = 0;
    for (; pair + W <= k / 2; pair += W) {
        V block[W];
        for (i64 r = 0; r < W; r++) block[r] = load(reinterpret_cast<const float*>(from + r * x_stride + 2 * pair));
        transpose(block);
        for (i64 r = 0; r < W; r++) store(reinterpret_cast<float*>(to + (pair + r) * ld), block[r]);
    }
    return pair;
}

// Two neighbours along K of up to 64 rows of x, side by side: packed [ceil(m / 64), ceil(k / 32) * 16, row_words], zeros
// behind column k.
static void pack(const bf16* x, i64 x_stride, const int* order, i64 m, i64 k, u32* packed, i64 begin, i64 end) {
    const i64 ld = row_words(m);
    for (i64 row = begin; row < end;) {
        const i64 rows = !order && row % W == 0 && end - row >= W ? W : 1;
        const bf16* from = x + row * x_stride;
        u32* to = packed + row / BLOCK_M * row_pairs(k) * ld + row % BLOCK_M;
        const i64 done = rows == W ? pack_rows(from, x_stride, k, ld, to) : 0;
        for (i64 r = 0; r < rows; r++) pack_row(from + r * x_stride, order, k, done, ld, to + r);
        row += rows;
    }
}

// One step along K: sums of 16 rows of W and TILES * 16 rows of x.
template <int TILES>
static inline void step(const void* w, i64 w_stride, const u32* x, i64 ld) {
    _tile_loadd(W_TILE, w, w_stride);
    _tile_loadd(X_TILE, x, ld * 4);
    _tile_dpbf16ps(0, W_TILE, X_TILE);
    if constexpr (TILES > 1) {
        _tile_loadd(X_TILE, x + TILE_M, ld * 4);
        _tile_dpbf16ps(1, W_TILE, X_TILE);
    }
    if constexpr (TILES > 2) {
        _tile_loadd(X_TILE, x + 2 * TILE_M, ld * 4);
        _tile_dpbf16ps(2, W_TILE, X_TILE);
    }
    if constexpr (TILES > 3) {
        _tile_loadd(X_TILE, x + 3 * TILE_M, ld * 4);
        _tile_dpbf16ps(3, W_TILE, X_TILE);
    }
}

template <int TILES>
static inline void take_sums(float (*sums)[ROWS][TILE_M]) {
    _tile_stored(0, sums[0], 4 * TILE_M);
    if constexpr (TILES > 1) _tile_stored(1, sums[1], 4 * TILE_M);
    if constexpr (TILES > 2) _tile_stored(2, sums[2], 4 * TILE_M);
    if constexpr (TILES > 3) _tile_stored(3, sums[3], 4 * TILE_M);
}

static inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// 16 rows of W, from n0 on and `gap` apart, against TILES * 16 rows of x from m0 on; the first `done` rows of W are
// not stored.
template <int TILES>
static void tiles(const Linear& a, i64 m0, i64 n0, i64 gap, i64 done) {
    const bf16* w = static_cast<const bf16*>(a.w) + n0 * a.k;
    const u32* x = a.packed + m0 * row_pairs(a.k);
    const i64 stride = gap * a.k, ld = row_words(a.m);
    zero_sums();
    i64 k = 0;
    for (; k + TILE_K <= a.k; k += TILE_K) {
        for (i64 r = 0; r < ROWS; r++) __builtin_prefetch(reinterpret_cast<const char*>(w + r * stride + k) + AHEAD_BYTES);
        step<TILES>(w + k, stride * 2, x + k / 2 * ld, ld);
    }
    if (k < a.k) {
        alignas(64) bf16 rest[ROWS][TILE_K] = {};
        for (i64 r = 0; r < ROWS; r++) std::memcpy(rest[r], w + r * stride + k, (a.k - k) * sizeof(bf16));
        step<TILES>(rest, 2 * TILE_K, x + k / 2 * ld, ld);
    }
    alignas(64) float sums[TILES][ROWS][TILE_M];
    take_sums<TILES>(sums);
    for (i64 m = m0; m < least(a.m, m0 + TILES * TILE_M); m++)
        for (i64 r = done; r < ROWS; r++)
            put<bf16>(a, m, n0 + r * gap, sums[(m - m0) / TILE_M][r][(m - m0) % TILE_M]);
}

// 16 rows of W against up to 64 rows of x.
static void sixteen(const Linear& a, i64 m, i64 n, i64 gap, i64 done) {
    switch (ceil_div(least(a.m - m, BLOCK_M), TILE_M)) {
        case 1: return tiles<1>(a, m, n, gap, done);
        case 2: return tiles<2>(a, m, n, gap, done);
        case 3: return tiles<3>(a, m, n, gap, done);
        default: tiles<4>(a, m, n, gap, done);
    }
}

// Rows begin .. end as 16 streams (see linear_kernel.h); what is left at W's end is a tile that reaches back, so W has
// 16 rows at least. The second 64 rows of x find these rows of W in the cache.
static void rows_of(const Linear& a, i64 begin, i64 end) {
    const i64 gap = (end - begin) / ROWS, left = (end - begin) % ROWS;
    for (i64 m = 0; m < a.m; m += BLOCK_M) {
        for (i64 n = begin; n < begin + gap; n++) sixteen(a, m, n, gap, 0);
        if (left) sixteen(a, m, end - ROWS, 1, ROWS - left);
    }
}
