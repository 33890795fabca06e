// Weights of which only some are stored: a bit for each, and the values of those whose bit is set, row after row.
#pragma once
#include "linear.h"

constexpr i64 WORD = 32;         // columns of a mask
constexpr i64 FEW_M = 64;        // rows of x up to which tiles expand W while they multiply,
constexpr i64 SHORT_FEW_M = 32;  // of x where W has up to
constexpr i64 SHORT_K = 2048;    // columns, whose streams are too short to be worth it
constexpr i64 PANEL_ROWS = 32;   // of W that tiles multiply together above that
constexpr i64 PAGE = 4096;
constexpr i64 MANY_ROWS = 256;   // of W in a chunk then: panels share what they read of x

struct Sparse {
    const u32* masks;   // [n, ceil(k / WORD)], lowest bit first
    const i64* starts;  // [n], where a row's values begin
    const void* values; // of x's type; a whole register can be read behind the last
    i64 words;          // of a row
    i64 per_word;       // bits of every word that lies within k, or 0 where they differ
};
struct SparseLinear : Linear {
    Sparse sparse;  // in place of w
};

static inline Sparse sparse_of(const void* masks, const void* starts, const void* values, i64 k, i64 per_word) {
    return {static_cast<const u32*>(masks), static_cast<const i64*>(starts), values, ceil_div(k, WORD), per_word};
}

// On average, values and masks.
static inline i64 row_bytes(const Sparse& w, i64 n, i64 k, i64 element) {
    return 4 * w.words + element * (n > 1 ? (w.starts[n - 1] - w.starts[0]) / (n - 1) : k);
}
