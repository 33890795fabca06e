// y = x W^T + bias: the arguments that every level takes, and how rows of W are shared out to threads.
#pragma once
#include "common.h"

struct Linear {
    int threads;
    const void *x, *w, *bias;
    void* y;
    bool bias_is_fp32;
    i64 m, n, k;  // x [m, k], w [n, k], y [m, n]
};

constexpr i64 ROWS = 16;                     // a chunk of W is a multiple of this many rows
constexpr i64 CHUNK_BYTES = 1 << 20;         // of W: long streams, yet a thread that lost its CPU holds up little
constexpr i64 BYTES_PER_THREAD = 512 << 10;  // a sleeping thread takes longer to wake than to read less than this

static inline i64 rows_per_chunk(i64 row_bytes, i64 rows, i64 threads) {
    const i64 fair = ceil_div(rows, 2 * threads);
    return most(1, least(fair, CHUNK_BYTES / row_bytes) / ROWS) * ROWS;
}
static inline int useful_threads(i64 bytes, int threads) { return int(most(1, least(threads, bytes / BYTES_PER_THREAD))); }
