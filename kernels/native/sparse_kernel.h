// Rows of sparse W against rows of x: values go to their columns in a register, and from there on all is as in
// linear_kernel.h, the order of summation too. Included inside a namespace by every_level.h.
#include "linear_kernel.h"

// The next values of a row at the columns that have a bit in `mask`: as many columns as a step of Dot takes.
template <class T>
struct Spread {
    static inline V take(u32 mask, const T* values) { return expand(mask, load(values)); }
    static inline void put(T* to, u32 mask, const T* values) { store(to, take(mask, values)); }
    static inline void put(T* to, u32 mask, const T* values, i64 n) { store(to, take(mask, values), n); }
};
#if defined(PARED_SPREAD_16)
#include "spread_16.h"
#endif

// The `STEP` columns of a word from `bit` on.
template <int STEP>
static inline u32 part_of(u32 mask, int bit) { return STEP == WORD ? mask : mask >> bit & ((1ull << STEP) - 1); }

// One step along K, `left` columns ahead of its end: from `bit` of the masks on, which lie `stride` apart, and x on.
template <class X, int MB, int R, bool EVEN, bool WHOLE>
static inline void sparse_step(const SparseLinear& a, const X* x, const u32* masks, i64 stride, int bit, i64 left,
                               const X* (&values)[R], V (&acc)[MB][R]) {
    using D = Dot<X, X>;
    typename D::Operand rows[R];
    for (int r = 0; r < R; r++) {
        const u32 mask = part_of<D::STEP>(masks[r * stride], bit);
        __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + 2 * PREFETCH_BYTES);
        rows[r] = Spread<X>::take(mask, values[r]);
        values[r] += EVEN && D::STEP == WORD ? a.sparse.per_word : __builtin_popcount(mask);
    }
    for (int m = 0; m < MB; m++) {
        const X* p = x + m * a.x_stride;
        typename D::Operand one;
        if constexpr (WHOLE) one = D::take(p);
        else one = D::take(p, left);
        for (int r = 0; r < R; r++) acc[m][r] = D::add(acc[m][r], one, rows[r]);
    }
}

// y[m, n] for MB rows of x from m0 on and R rows of W from n0 on, `gap` apart.
template <class X, int MB, int R, bool EVEN>
static inline void sparse_block(const SparseLinear& a, i64 m0, i64 n0, i64 gap) {
    constexpr int STEP = Dot<X, X>::STEP;
    const Sparse& w = a.sparse;
    const X* x = static_cast<const X*>(a.x) + m0 * a.x_stride;
    const u32* masks = w.masks + n0 * w.words;
    const i64 stride = gap * w.words;
    const X* values[R];
    for (int r = 0; r < R; r++) values[r] = static_cast<const X*>(w.values) + w.starts[n0 + r * gap];
    V acc[MB][R];
    for (auto& row : acc)
        for (auto& one : row) one = splat(0.0f);
    i64 k = 0;
    for (; k + WORD <= a.k; k += WORD) {
        if (k / WORD % 16 == 0)  // a cache line of masks
            for (int r = 0; r < R; r++) __builtin_prefetch(masks + r * stride + k / WORD + 64);
        for (int bit = 0; bit < WORD; bit += STEP)
            sparse_step<X, MB, R, EVEN, true>(a, x + k + bit, masks + k / WORD, stride, bit, 0, values, acc);
    }
    for (int bit = 0; k + bit < a.k; bit += STEP)
        sparse_step<X, MB, R, EVEN, false>(a, x + k + bit, masks + k / WORD, stride, bit, a.k - k - bit, values, acc);
    for (int m = 0; m < MB; m++)
        for (int r = 0; r < R; r++) put<X>(a, m0 + m, n0 + r * gap, sum(acc[m][r]));
}

template <class X, int MB, int R, bool EVEN>
static inline i64 sparse_sweep(const SparseLinear& a, i64 m, i64 n, i64 gap) {
    for (; m + MB <= a.m; m += MB) sparse_block<X, MB, R, EVEN>(a, m, n, gap);
    return m;
}

// Rows begin .. end as streams that each run through neighbouring rows, as in linear_kernel.h.
template <class X, bool EVEN>
static void sparse_rows_of(const SparseLinear& a, i64 begin, i64 end) {
    constexpr int WIDE = W == 1 || !EVEN ? 4 : 8;  // places of values take registers of their own where words differ
    constexpr int FEW = ACCUMULATORS / 4;
    const int streams = a.m == 1 ? WIDE : FEW;
    const i64 gap = (end - begin) / streams;
    for (i64 n = begin; n < begin + gap; n++)
        if (a.m == 1) {
            sparse_sweep<X, 1, WIDE, EVEN>(a, 0, n, gap);
        } else {
            const i64 m = sparse_sweep<X, 2, FEW, EVEN>(a, sparse_sweep<X, 4, FEW, EVEN>(a, 0, n, gap), n, gap);
            sparse_sweep<X, 1, FEW, EVEN>(a, m, n, gap);
        }
    for (i64 n = begin + gap * streams; n < end; n++) sparse_sweep<X, 1, 1, EVEN>(a, 0, n, 1);
}

// Rows begin .. end of W, dense, from `to` on.
template <class T>
static void spread_rows(const Sparse& w, void* to, i64 k, i64 begin, i64 end) {
    constexpr int STEP = Dot<T, T>::STEP;
    for (i64 n = begin; n < end; n++) {
        T* row = static_cast<T*>(to) + (n - begin) * k;
        const T* values = static_cast<const T*>(w.values) + w.starts[n];
        for (i64 column = 0; column < k; column += STEP) {
            const u32 mask = part_of<STEP>(w.masks[n * w.words + column / WORD], int(column % WORD));
            if (column + STEP <= k) Spread<T>::put(row + column, mask, values);
            else Spread<T>::put(row + column, mask, values, k - column);
            values += __builtin_popcount(mask);
        }
    }
}
