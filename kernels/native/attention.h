// Causal attention over a paged cache: its arguments, and one piece of its work.
#pragma once
#include "queue.h"

struct Attention {
    const void *q, *k_pool, *v_pool;
    const std::int32_t *query_starts, *context_lens, *block_tables;
    void* out;
    i64 sequences, table_width, page, heads, kv_heads, head_dim, window;
    float scale;
};

constexpr i64 TILE = 64;    // keys that are scored together
constexpr i64 SPLIT = 512;  // keys of one piece when a sequence has few queries: long contexts share the threads
constexpr i64 QUERY_ROWS = 64;  // of one piece: they share the work of fetching a tile

// One key head's queries `query` .. `query + count` of a sequence, against keys begin .. end.
struct Piece {
    i64 sequence, kv_head, query, count, begin, end;
    float* partial;  // [count * group][head_dim + 2]: sums, then maximum and normaliser; null: write `out`
};

// Buffers of one thread; a row is `width` floats, head_dim rounded up to whole vectors.
struct Buffers {
    float *q, *sums, *scores, *keys, *values, *maximum, *normaliser;
    i64 width;
};
