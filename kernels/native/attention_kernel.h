// One piece of attention: tiles of 64 keys are brought to fp32 once and then serve every query row of the piece.
// Online softmax in fp32. Included inside a namespace by every_level.h.

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], columns a multiple of W.
template <int R, int C>
static inline void panel(const float* a, i64 lda, const float* b, i64 ldb, float* c, i64 ldc, i64 depth, bool add) {
    V acc[R][C];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) acc[r][j] = add ? load(c + r * ldc + j * W) : splat(0.0f);
    for (i64 k = 0; k < depth; k++)
        for (int j = 0; j < C; j++) {
            const V right = load(b + k * ldb + j * W);
            for (int r = 0; r < R; r++) acc[r][j] = fma(splat(a[r * lda + k]), right, acc[r][j]);
        }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < C; j++) store(c + r * ldc + j * W, acc[r][j]);
}

template <int R>
static inline void rows_times(const float* a, i64 lda, const float* b, i64 ldb, float* c, i64 ldc, i64 depth, i64 columns,
                              bool add) {
    constexpr int C = ACCUMULATORS / 4;
    i64 j = 0;
    for (; j + C * W <= columns; j += C * W) panel<R, C>(a, lda, b + j, ldb, c + j, ldc, depth, add);
    for (; j < columns; j += W) panel<R, 1>(a, lda, b + j, ldb, c + j, ldc, depth, add);
}

static void multiply(const float* a, i64 lda, const float* b, i64 ldb, float* c, i64 ldc, i64 rows, i64 depth, i64 columns,
                     bool add) {
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) rows_times<4>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth, columns, add);
    a += r * lda, c += r * ldc;
    if (rows - r == 3) rows_times<3>(a, lda, b, ldb, c, ldc, depth, columns, add);
    if (rows - r == 2) rows_times<2>(a, lda, b, ldb, c, ldc, depth, columns, add);
    if (rows - r == 1) rows_times<1>(a, lda, b, ldb, c, ldc, depth, columns, add);
}

// Where the tile's keys lie in a pool, in elements; -1 outside begin .. end.
static inline void find(const Attention& a, const Piece& p, i64 tile, i64* found) {
    i64 block = tile / a.page, offset = tile % a.page;
    const std::int32_t* table = a.block_tables + p.sequence * a.table_width;
    for (i64 j = 0; j < TILE; j++) {
        const bool there = tile + j >= p.begin && tile + j < p.end;
        found[j] = there ? ((table[block] * a.page + offset) * a.kv_heads + p.kv_head) * a.head_dim : -1;
        if (++offset == a.page) offset = 0, block++;
    }
}

// Keys lie a row of all heads apart, too far for the hardware's prefetcher.
template <class T>
static inline void prefetch(const Attention& a, const Piece& p, i64 tile) {
    i64 found[TILE];
    find(a, p, tile, found);
    for (i64 j = 0; j < TILE; j++)
        if (found[j] >= 0)
            for (i64 d = 0; d < a.head_dim; d += 64 / i64(sizeof(T))) {
                __builtin_prefetch(static_cast<const T*>(a.k_pool) + found[j] + d);
                __builtin_prefetch(static_cast<const T*>(a.v_pool) + found[j] + d);
            }
}

template <class T>
static inline V lanes_of(const T* pool, i64 at, i64 d, i64 head_dim) {
    if (at < 0) return splat(0.0f);
    return d + W <= head_dim ? load(pool + at + d) : load(pool + at + d, head_dim - d);
}

// Keys [width, TILE] transposed and values [TILE, width] of the tile, zeros where there are none.
template <class T>
static void gather(const Attention& a, const Piece& p, const Buffers& s, i64 tile) {
    const T *k_pool = static_cast<const T*>(a.k_pool), *v_pool = static_cast<const T*>(a.v_pool);
    i64 found[TILE];
    find(a, p, tile, found);
    for (i64 d = 0; d < s.width; d += W) {
        for (i64 j = 0; j < TILE; j += W) {
            V rows[W];
            for (i64 i = 0; i < W; i++) rows[i] = lanes_of(k_pool, found[j + i], d, a.head_dim);
            transpose(rows);
            for (i64 i = 0; i < W; i++) store(s.keys + (d + i) * TILE + j, rows[i]);
        }
        for (i64 j = 0; j < TILE; j++) store(s.values + j * s.width + d, lanes_of(v_pool, found[j], d, a.head_dim));
    }
}

// Scores of one row become weights; its maximum, normaliser and sums move to the new scale. Visible: first <= j < last.
static inline void soften(const Buffers& s, i64 row, i64 first, i64 last) {
    float* scores = s.scores + row * TILE;
    for (i64 j = 0; j < TILE; j++)
        if (j < first || j >= last) scores[j] = -INFINITY;
    V top = load(scores);
    for (i64 j = W; j < TILE; j += W) top = maximum(top, load(scores + j));
    const float before = s.maximum[row], now = before > largest(top) ? before : largest(top);
    if (now == -INFINITY) {
        std::memset(scores, 0, TILE * sizeof(float));
        return;
    }
    V total = splat(0.0f);
    for (i64 j = 0; j < TILE; j += W) {
        const V weight = exp(load(scores + j) - splat(now));
        store(scores + j, weight);
        total = total + weight;
    }
    const float shrink = std::exp(before - now);
    s.maximum[row] = now;
    s.normaliser[row] = s.normaliser[row] * shrink + sum(total);
    float* sums = s.sums + row * s.width;
    for (i64 d = 0; d < s.width; d += W) store(sums + d, load(sums + d) * splat(shrink));
}

template <class T>
static void finish(const Attention& a, const Piece& p, const Buffers& s, i64 row) {
    const i64 group = a.heads / a.kv_heads;
    const float* sums = s.sums + row * s.width;
    if (p.partial) {
        float* partial = p.partial + row * (a.head_dim + 2);
        std::memcpy(partial, sums, a.head_dim * sizeof(float));
        partial[a.head_dim] = s.maximum[row];
        partial[a.head_dim + 1] = s.normaliser[row];
        return;
    }
    const i64 token = a.query_starts[p.sequence] + p.query + row / group, head = p.kv_head * group + row % group;
    T* out = static_cast<T*>(a.out) + (token * a.heads + head) * a.head_dim;
    for (i64 d = 0; d < a.head_dim; d++) cast(sums[d] / s.normaliser[row], out + d);
}

template <class T>
static void attend(const Attention& a, const Piece& p, const Buffers& s) {
    const i64 group = a.heads / a.kv_heads, rows = p.count * group;
    const i64 queries = a.query_starts[p.sequence + 1] - a.query_starts[p.sequence];
    const i64 position = a.context_lens[p.sequence] - queries + p.query;  // of the first query
    prefetch<T>(a, p, p.begin / TILE * TILE);
    for (i64 r = 0; r < rows; r++) {
        const i64 token = a.query_starts[p.sequence] + p.query + r / group, head = p.kv_head * group + r % group;
        const T* q = static_cast<const T*>(a.q) + (token * a.heads + head) * a.head_dim;
        for (i64 d = 0; d < s.width; d += W) store(s.q + r * s.width + d, load(q + d, a.head_dim - d) * splat(a.scale));
        s.maximum[r] = -INFINITY;
        s.normaliser[r] = 0.0f;
    }
    std::memset(s.sums, 0, rows * s.width * sizeof(float));
    for (i64 tile = p.begin / TILE * TILE; tile < p.end; tile += TILE) {
        if (tile + TILE < p.end) prefetch<T>(a, p, tile + TILE);
        gather<T>(a, p, s, tile);
        multiply(s.q, s.width, s.keys, TILE, s.scores, TILE, rows, s.width, TILE, false);
        for (i64 r = 0; r < rows; r++) {
            const i64 self = position + r / group;
            const i64 oldest = a.window > 0 ? most(p.begin, self - a.window + 1) : p.begin;
            soften(s, r, oldest - tile, least(p.end, self + 1) - tile);
        }
        multiply(s.scores, TILE, s.values, s.width, s.sums, s.width, rows, TILE, s.width, true);
    }
    for (i64 r = 0; r < rows; r++) finish<T>(a, p, s, r);
}
