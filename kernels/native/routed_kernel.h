// Hidden values and down of the groups that are awake. Included inside a namespace by every_level.h.
#include "activate.h"

// Some neurons of a tile of down for W of its outputs; a tile is [size / STEP, TILE_N, STEP].
template <class T>
struct Neurons {
    static constexpr i64 STEP = 1;
    static inline V add(V acc, const T* hidden, const T* tile) { return fma(splat(to_float(*hidden)), load(tile), acc); }
};
template <>
struct Neurons<bf16> {
    static constexpr i64 STEP = 2;
    static inline V add(V acc, const bf16* hidden, const bf16* tile) {
#if defined(PARED_DOT_BF16)
        int pair;
        std::memcpy(&pair, hidden, 4);
        const __m512i both = _mm512_set1_epi32(pair);
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(_mm512_loadu_si512(tile)));
#else
        return fma(splat(to_float(hidden[1])), load_odd(tile), fma(splat(to_float(hidden[0])), load_even(tile), acc));
#endif
    }
};

template <class T>
static void hide(const Routed& a, i64 at, const float* sums) {
    const i64 group = a.list[at], first = group * a.size, to_up = a.gated ? a.size : 0;
    const T *gate_bias = static_cast<const T*>(a.gate_bias), *up_bias = static_cast<const T*>(a.up_bias);
    T* hidden = static_cast<T*>(a.hidden) + at * a.padded_m * a.size;
    for (i64 m = 0; m < a.m; m++, hidden += a.size, sums += a.rows()) {
        if (!a.chosen[m * a.groups + group]) {
            std::memset(hidden, 0, a.size * sizeof(T));
            continue;
        }
        for_lanes(a.size, [&](i64 i, i64 n) {
            V up = some(sums + to_up + i, n);
            if (up_bias) up = up + some(up_bias + first + i, n);
            V gate = up;
            if (a.gated) gate = some(sums + i, n);
            if (gate_bias) gate = gate + some(gate_bias + first + i, n);
            const V active = activate(a.kind, gate);
            some(hidden + i, a.gated ? active * up : active, n);
        });
    }
}

constexpr i64 VECTORS = TILE_N / W;                                              // of a tile's outputs
constexpr int FEW_TILES = ACCUMULATORS / VECTORS >= 4 ? 4 : ACCUMULATORS / VECTORS >= 2 ? 2 : 1;
constexpr i64 TILE_AHEAD = 4096;  // bytes, prefetched

// COUNT tiles side by side for one row of x.
template <class T, int COUNT>
static inline void tiles(const T* hidden, const T* tile, i64 size, float* total, i64 gap, bool fresh) {
    using N = Neurons<T>;
    V acc[COUNT][VECTORS];
    for (int c = 0; c < COUNT; c++)
        for (i64 v = 0; v < VECTORS; v++) acc[c][v] = load(total + c * gap + v * W);
    for (i64 j = 0; j < size; j += N::STEP)
        for (int c = 0; c < COUNT; c++) {
            const T* at = tile + (c * size + j) * TILE_N;
            if (fresh) __builtin_prefetch(reinterpret_cast<const char*>(at) + TILE_AHEAD);
            for (i64 v = 0; v < VECTORS; v++) acc[c][v] = N::add(acc[c][v], hidden + j, at + v * W * N::STEP);
        }
    for (int c = 0; c < COUNT; c++)
        for (i64 v = 0; v < VECTORS; v++) store(total + c * gap + v * W, acc[c][v]);
}

template <class T>
static void down(const Routed& a, i64 begin, i64 end) {
    const i64 gap = a.padded_m * TILE_N, tile = TILE_N * a.size;
    std::memset(a.totals + begin * gap, 0, (end - begin) * gap * sizeof(float));
    for (i64 at = 0; at < a.listed(); at++) {
        const T* tiles_of = static_cast<const T*>(a.slabs) + a.list[at] * a.slab() + a.rows() * a.k;
        const T* hidden = static_cast<const T*>(a.hidden) + at * a.padded_m * a.size;
        i64 block = begin;
        for (; block + FEW_TILES <= end; block += FEW_TILES)
            for (i64 m = 0; m < a.m; m++)
                tiles<T, FEW_TILES>(hidden + m * a.size, tiles_of + block * tile, a.size, a.totals + block * gap + m * TILE_N,
                                    gap, m == 0);
        for (; block < end; block++)
            for (i64 m = 0; m < a.m; m++)
                tiles<T, 1>(hidden + m * a.size, tiles_of + block * tile, a.size, a.totals + block * gap + m * TILE_N, gap,
                            m == 0);
    }
}

template <class T>
static void finish(const Routed& a, i64 begin, i64 end) {
    const T* bias = static_cast<const T*>(a.down_bias);
    for (i64 block = begin; block < end; block++)
        for (i64 m = 0; m < a.m; m++) {
            const i64 n = block * TILE_N;
            const float* total = a.totals + (block * a.padded_m + m) * TILE_N;
            T* y = static_cast<T*>(a.y) + m * a.k + n;
            for_lanes(least(TILE_N, a.k - n), [&](i64 i, i64 count) {
                const V sum = some(total + i, count);
                some(y + i, bias ? sum + some(bias + n + i, count) : sum, count);
            });
        }
}
