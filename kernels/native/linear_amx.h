// bf16 on AMX tiles: 16 rows of W are a tile as they lie in memory, so nothing is repacked but the few rows of x.
// One reduction order for every M: a row of x gets the same result in any company. Included inside a namespace.

// Tile registers, macros because the intrinsics paste them into assembly; 0 to 3 hold sums.
#define W_TILE 4
#define X_TILE 5

constexpr i64 TILE_K = 32;       // bf16 columns of a tile of W
constexpr i64 TILE_M = 16;       // rows of x in a tile, transposed
constexpr i64 AHEAD_BYTES = 512; // prefetched in each of the 16 rows

struct TileConfig {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    u16 column_bytes[16] = {};
    unsigned char rows[16] = {};
};

static inline void configure(i64 columns) {
    TileConfig config;
    for (int t = 0; t <= X_TILE; t++) {
        config.rows[t] = 16;
        config.column_bytes[t] = u16(t == W_TILE ? 2 * TILE_K : 4 * columns);
    }
    _tile_loadconfig(&config);
}

static i64 row_words(const Linear& a) { return a.m <= TILE_M ? a.m : ceil_div(a.m, TILE_M) * TILE_M; }
static i64 row_pairs(const Linear& a) { return ceil_div(a.k, TILE_K) * TILE_K / 2; }
static i64 packed_words(const Linear& a) { return row_words(a) * row_pairs(a); }

// Two neighbours along K of every row of x, side by side: packed [ceil(k / 32) * 16, ld], zeros where x has nothing.
static void pack(const Linear& a, u32* packed, i64 ld) {
    std::memset(packed, 0, packed_words(a) * sizeof(u32));
    for (i64 m = 0; m < a.m; m++) {
        const bf16* x = static_cast<const bf16*>(a.x) + m * a.k;
        for (i64 pair = 0; pair < a.k / 2; pair++) std::memcpy(packed + pair * ld + m, x + 2 * pair, sizeof(u32));
        if (a.k % 2) packed[a.k / 2 * ld + m] = x[a.k - 1].bits;
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
static void tiles(const Linear& a, const u32* packed, i64 ld, i64 m0, i64 n0, i64 gap, i64 done) {
    const bf16* w = static_cast<const bf16*>(a.w) + n0 * a.k;
    const u32* x = packed + m0;
    const i64 stride = gap * a.k;
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
            cast(sums[(m - m0) / TILE_M][r][(m - m0) % TILE_M] + bias_at<bf16>(a.bias, a.bias_is_fp32, n0 + r * gap),
                 static_cast<bf16*>(a.y) + m * a.n + n0 + r * gap);
}

// 16 rows of W against all rows of x.
static void sixteen(const Linear& a, const u32* packed, i64 ld, i64 n, i64 gap, i64 done) {
    for (i64 m = 0; m < a.m; m += 4 * TILE_M) switch (ceil_div(least(a.m - m, 4 * TILE_M), TILE_M)) {
            case 1: tiles<1>(a, packed, ld, m, n, gap, done); break;
            case 2: tiles<2>(a, packed, ld, m, n, gap, done); break;
            case 3: tiles<3>(a, packed, ld, m, n, gap, done); break;
            default: tiles<4>(a, packed, ld, m, n, gap, done);
        }
}

// Rows begin .. end as 16 streams (see linear_kernel.h); what is left at W's end is a tile that reaches back.
static void rows_of(const Linear& a, const u32* packed, i64 ld, i64 begin, i64 end) {
    const i64 gap = (end - begin) / ROWS, left = (end - begin) % ROWS;
    for (i64 n = begin; n < begin + gap; n++) sixteen(a, packed, ld, n, gap, 0);
    if (left) sixteen(a, packed, ld, end - ROWS, 1, ROWS - left);
}

// packed: scratch of packed_words(a) words. Needs a.n >= 16.
static void linear(const Linear& a, u32* packed) {
    const i64 columns = least(a.m, TILE_M), ld = row_words(a);
    const int threads = useful_threads(a.n * a.k * 2, a.threads);
    const i64 chunk = rows_per_chunk(a.k * 2, a.n, threads);
    pack(a, packed, ld);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        configure(columns);
#pragma omp for schedule(dynamic, 1) nowait
        for (i64 n = 0; n < a.n; n += chunk) rows_of(a, packed, ld, n, least(a.n, n + chunk));
        _tile_release();
    }
}
