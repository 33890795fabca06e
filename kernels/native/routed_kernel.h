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
static void hide(const Routed& a, i64 at, const float* sums, i64 stride) {
    const i64 group = a.list[at], first = group * a.size, to_up = a.gated ? a.size : 0;
    const T *gate_bias = static_cast<const T*>(a.gate_bias), *up_bias = static_cast<const T*>(a.up_bias);
    T* hidden = static_cast<T*>(a.hidden) + at * a.padded_m * a.size;
    for (i64 m = 0; m < a.m; m++, hidden += a.size, sums += stride) {
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

// The tiles of list entry `at`.
template <class T>
static inline const T* tiles_of(const Routed& a, i64 at) {
    return static_cast<const T*>(a.downs) + a.list[at] * a.down_weights();
}

constexpr i64 VECTORS = TILE_N / W;  // of a tile's outputs
constexpr int STREAMS = VECTORS == 1 ? 8 : ACCUMULATORS / VECTORS > 1 ? 2 : 1;

// COUNT tiles, `apart` from each other, for one row of x; `ahead` is the first of those that are read next, or null.
template <class T, int COUNT>
static inline void tiles(const Routed& a, const T* hidden, const T* tile, const T* ahead, i64 apart, float* total) {
    using N = Neurons<T>;
    const i64 step = apart * TILE_N * a.size, gap = apart * TILE_N * a.padded_m;
    V acc[COUNT][VECTORS];
    for (int c = 0; c < COUNT; c++)
        for (i64 v = 0; v < VECTORS; v++) acc[c][v] = load(total + c * gap + v * W);
    for (i64 j = 0; j < a.size; j += N::STEP)
        for (int c = 0; c < COUNT; c++) {
            const i64 at = c * step + j * TILE_N;
            if (ahead) __builtin_prefetch(ahead + at);
            for (i64 v = 0; v < VECTORS; v++) acc[c][v] = N::add(acc[c][v], hidden + j, tile + at + v * W * N::STEP);
        }
    for (int c = 0; c < COUNT; c++)
        for (i64 v = 0; v < VECTORS; v++) store(total + c * gap + v * W, acc[c][v]);
}

// Blocks begin .. end of one list entry as COUNT streams; `next` are the tiles of the entry after it.
template <class T, int COUNT>
static inline void streams(const Routed& a, i64 at, const T* next, i64 begin, i64 end) {
    const T *own = tiles_of<T>(a, at), *hidden = static_cast<const T*>(a.hidden) + at * a.padded_m * a.size;
    const i64 tile = TILE_N * a.size, apart = (end - begin) / COUNT;
    for (i64 block = begin; block < begin + apart; block++) {
        const T* ahead = block + 1 < begin + apart ? own + (block + 1) * tile : next + begin * tile;
        for (i64 m = 0; m < a.m; m++) {
            float* total = a.totals + (block * a.padded_m + m) * TILE_N;
            tiles<T, COUNT>(a, hidden + m * a.size, own + block * tile, m ? nullptr : ahead, apart, total);
        }
    }
}

template <class T>
static void down(const Routed& a, i64 begin, i64 end) {
    const i64 gap = a.padded_m * TILE_N, even = begin + (end - begin) / STREAMS * STREAMS;
    std::memset(a.totals + begin * gap, 0, (end - begin) * gap * sizeof(float));
    for (i64 at = 0; at < a.listed(); at++) {
        const T* next = tiles_of<T>(a, least(at + 1, a.listed() - 1));
        streams<T, STREAMS>(a, at, next, begin, even);
        streams<T, 1>(a, at, next, even, end);
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
