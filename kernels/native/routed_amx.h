// Down on AMX tiles: 16 rows of hidden values against a tile of 16 outputs. Included inside a namespace.

#define HIDDEN_TILE 4
#define DOWN_TILE 5

constexpr i64 TILE_M = 16, BLOCK_M = 64;
constexpr i64 BATCH = 8;      // groups between fetching and putting back a tile of sums
constexpr i64 TILES_AHEAD = 2;  // of each of them, in the cache before they are needed

// What to fetch: the block of the list entry so many further on.
struct Ahead {
    i64 entries, block;
};

// One block of outputs and TILES * 16 rows of x from m0 on, over `count` groups of the list from `at` on.
template <int TILES>
static inline void block_of(const Routed& a, i64 at, i64 count, i64 block, i64 m0, Ahead ahead) {
    float* total = a.totals + (block * a.padded_m + m0) * TILE_N;
    const i64 step = TILE_M * TILE_N;
    _tile_loadd(0, total, 4 * TILE_N);
    if constexpr (TILES > 1) _tile_loadd(1, total + step, 4 * TILE_N);
    if constexpr (TILES > 2) _tile_loadd(2, total + 2 * step, 4 * TILE_N);
    if constexpr (TILES > 3) _tile_loadd(3, total + 3 * step, 4 * TILE_N);
    for (i64 i = at; i < at + count; i++) {
        const bf16* tile = tiles_of<bf16>(a, i) + block * TILE_N * a.size;
        const bf16* hidden = static_cast<const bf16*>(a.hidden) + (i * a.padded_m + m0) * a.size;
        const i64 rows = TILE_M * a.size;
        if (m0 == 0) {
            const bf16* next = tiles_of<bf16>(a, least(i + ahead.entries, a.listed() - 1)) + ahead.block * TILE_N * a.size;
            for (i64 j = 0; j < a.size; j += 2) __builtin_prefetch(next + j * TILE_N);
        }
        _tile_loadd(DOWN_TILE, tile, 4 * TILE_N);
        _tile_loadd(HIDDEN_TILE, hidden, 2 * a.size);
        _tile_dpbf16ps(0, HIDDEN_TILE, DOWN_TILE);
        if constexpr (TILES > 1) {
            _tile_loadd(HIDDEN_TILE, hidden + rows, 2 * a.size);
            _tile_dpbf16ps(1, HIDDEN_TILE, DOWN_TILE);
        }
        if constexpr (TILES > 2) {
            _tile_loadd(HIDDEN_TILE, hidden + 2 * rows, 2 * a.size);
            _tile_dpbf16ps(2, HIDDEN_TILE, DOWN_TILE);
        }
        if constexpr (TILES > 3) {
            _tile_loadd(HIDDEN_TILE, hidden + 3 * rows, 2 * a.size);
            _tile_dpbf16ps(3, HIDDEN_TILE, DOWN_TILE);
        }
    }
    _tile_stored(0, total, 4 * TILE_N);
    if constexpr (TILES > 1) _tile_stored(1, total + step, 4 * TILE_N);
    if constexpr (TILES > 2) _tile_stored(2, total + 2 * step, 4 * TILE_N);
    if constexpr (TILES > 3) _tile_stored(3, total + 3 * step, 4 * TILE_N);
}

static void down(const Routed& a, i64 begin, i64 end) {
    const i64 gap = a.padded_m * TILE_N;
    std::memset(a.totals + begin * gap, 0, (end - begin) * gap * sizeof(float));
    for (i64 at = 0; at < a.listed(); at += BATCH) {
        const i64 count = least(BATCH, a.listed() - at);
        for (i64 block = begin; block < end; block++) {
            const i64 next = block + TILES_AHEAD;
            const Ahead ahead = next < end ? Ahead{0, next} : Ahead{BATCH, least(begin + next - end, end - 1)};
            for (i64 m = 0; m < a.m; m += BLOCK_M) switch (ceil_div(least(a.m - m, BLOCK_M), TILE_M)) {
                    case 1: block_of<1>(a, at, count, block, m, ahead); break;
                    case 2: block_of<2>(a, at, count, block, m, ahead); break;
                    case 3: block_of<3>(a, at, count, block, m, ahead); break;
                    default: block_of<4>(a, at, count, block, m, ahead);
                }
        }
    }
}
