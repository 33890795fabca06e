// y = x W^T + bias: what every level takes, how rows of W are shared out to threads, and how a sum is stored.
#pragma once
#include "queue.h"

struct Linear {
    const void *x, *w;  // x [m, k], w [n, k]; w is of x's type, or int8 where there is a scale
    const void* bias;   // [n] for every row of x, or [m, n]; or null
    void* y;            // [m, n]
    bool bias_is_fp32, y_is_fp32;
    i64 m, n, k;
    i64 x_stride, bias_stride, y_stride;  // elements from row to row; 0 for one bias of all rows
    const u32* packed;                    // x as tiles want it (linear_amx.h), or null
    const float* scale = nullptr;         // [n] of int8 rows of w, or null
};

// Multiplies rows begin .. end of W with every row of x.
using Rows = void (*)(const Linear&, i64 begin, i64 end);

Rows rows_of(int level, int dtype, const Linear& a);
// Of fp32 weights, whatever type x has; the same sums for every number of rows.
Rows fp32_rows_of(int level, int dtype);

// Tiles: who takes them, the words that m rows of k columns are packed into, and the packing of rows begin .. end,
// column order[i] as column i where there is an order. 16 rows share cache lines and should be one thread's.
bool on_tiles(int level, int dtype, i64 m, i64 n);
i64 packed_words(i64 m, i64 k);
void pack(const void* x, i64 x_stride, const int* order, i64 m, i64 k, u32* packed, i64 begin, i64 end);

// The tile registers of the calling thread, configured for m rows of x and so many inputs of a tile until they are
// released.
void hold_tiles(i64 m, i64 depth = 32);
void release_tiles();

constexpr i64 ROWS = 16;                     // a chunk of W is a multiple of this many rows
constexpr i64 CHUNK_BYTES = 1 << 20;         // of W: long streams, yet a thread that lost its CPU holds up little
constexpr i64 BYTES_PER_THREAD = 512 << 10;  // a sleeping thread takes longer to wake than to read less than this

static inline i64 element_bytes(int dtype) { return dtype == FP32 ? 4 : 2; }
static inline i64 rows_per_chunk(i64 row_bytes, i64 rows, i64 threads) {
    const i64 fair = ceil_div(rows, 2 * threads);
    return most(1, least(fair, CHUNK_BYTES / most(1, row_bytes)) / ROWS) * ROWS;
}
static inline int useful_threads(i64 bytes, int threads) { return int(most(1, least(threads, bytes / BYTES_PER_THREAD))); }

// y[m, n] = sum + bias, rounded once.
template <class T>
static inline void put(const Linear& a, i64 m, i64 n, float sum) {
    if (a.scale) sum *= a.scale[n];
    const float value = sum + bias_at<T>(a.bias, a.bias_is_fp32, m * a.bias_stride + n);
    const i64 at = m * a.y_stride + n;
    if (a.y_is_fp32) static_cast<float*>(a.y)[at] = value;
    else cast(value, static_cast<T*>(a.y) + at);
}
