// A feed-forward layer of which each row of x wakes some groups of neurons: what every level takes.
#pragma once
#include "fused.h"
#include "linear.h"

constexpr i64 TILE_N = 16;  // outputs of a tile of down

struct Routed {
    const void* x;        // [m, k]
    const void* ins;      // [groups, rows, k]: gate rows, then up rows of each group
    const void* downs;    // [groups, blocks, size / step, TILE_N, step]: tiles of down (routed_ffn.py)
    const float* router;  // [groups, k]
    const void *gate_bias, *up_bias, *down_bias;  // of x's type, or null
    const i64* awake;     // [m], 0 for rows that wake nothing; or null
    i64* counts;          // [3], to which are added: rows, groups that they woke, groups that were read
    void* y;              // [m, k]
    i64 m, k, groups, size;
    bool gated;
    int kind;
    float threshold;

    float* logits;          // [m, groups]
    unsigned char* chosen;  // [m, groups]
    i64* list;              // groups that any row wakes, ascending; behind the last place of all groups their number
    void* hidden;           // [list, padded m, size] of x's type
    float* totals;          // [blocks, padded m, TILE_N]
    i64 padded_m;

    i64 rows() const { return (gated ? 2 : 1) * size; }  // of gate and up in a group
    i64 blocks() const { return ceil_div(k, TILE_N); }
    i64 down_weights() const { return blocks() * TILE_N * size; }  // of a group
    i64 listed() const { return list[groups]; }
};

// The hidden values of list entry `at` from its gate and up sums [m, rows], `stride` from row to row of x; zero where a
// row of x sleeps.
using Hide = void (*)(const Routed&, i64 at, const float* sums, i64 stride);
// Outputs of blocks begin .. end: over the whole list, in its order, into `totals`; and y from these.
using Down = void (*)(const Routed&, i64 begin, i64 end);
using Finish = void (*)(const Routed&, i64 begin, i64 end);
