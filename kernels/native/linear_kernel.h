// Rows of W against rows of x, in fp32. Each sum is one register of lanes that walks along K, so that a result depends
// neither on the other rows of x nor on the threads. Included inside a namespace by every_level.h.

// How one step along K is taken, for x of type X and weights of type T; a level with a dot product of its own
// specialises it.
template <class X, class T>
struct Dot {
    static constexpr int STEP = W;
    using Operand = V;
    template <class Any>
    static inline Operand take(const Any* p) { return load(p); }
    template <class Any>
    static inline Operand take(const Any* p, i64 n) { return load(p, n); }
    static inline V add(V acc, Operand x, Operand w) { return fma(x, w, acc); }
};
#if defined(PARED_DOT_BF16)
#include "dot_bf16.h"
#endif

constexpr i64 PREFETCH_BYTES = 512;  // ahead in every row: hardware prefetch alone stops at each page

// y[m, n] for MB rows of x from m0 on and R rows of W from n0 on, `gap` apart.
template <class X, class T, int MB, int R>
static inline void block(const Linear& a, i64 m0, i64 n0, i64 gap) {
    using D = Dot<X, T>;
    const X* x = static_cast<const X*>(a.x) + m0 * a.x_stride;
    const T* w = static_cast<const T*>(a.w) + n0 * a.k;
    const i64 stride = gap * a.k;
    V acc[MB][R];
    for (auto& row : acc)
        for (auto& one : row) one = splat(0.0f);
    i64 k = 0;
    for (; k + D::STEP <= a.k; k += D::STEP) {
        typename D::Operand rows[R];
        for (int r = 0; r < R; r++) {
            const T* p = w + r * stride + k;
            __builtin_prefetch(reinterpret_cast<const char*>(p) + PREFETCH_BYTES);
            rows[r] = D::take(p);
        }
        for (int m = 0; m < MB; m++) {
            const auto one = D::take(x + m * a.x_stride + k);
            for (int r = 0; r < R; r++) acc[m][r] = D::add(acc[m][r], one, rows[r]);
        }
    }
    if (k < a.k)
        for (int m = 0; m < MB; m++)
            for (int r = 0; r < R; r++)
                acc[m][r] = D::add(acc[m][r], D::take(x + m * a.x_stride + k, a.k - k), D::take(w + r * stride + k, a.k - k));
    for (int m = 0; m < MB; m++)
        for (int r = 0; r < R; r++) put<X>(a, m0 + m, n0 + r * gap, sum(acc[m][r]));
}

// R rows of W against rows m .. of x, MB at a time; returns how far it came.
template <class X, class T, int MB, int R>
static inline i64 sweep(const Linear& a, i64 m, i64 n, i64 gap) {
    for (; m + MB <= a.m; m += MB) block<X, T, MB, R>(a, m, n, gap);
    return m;
}

// Rows begin .. end as R streams that each run through neighbouring rows: longer runs for the hardware's prefetcher.
template <class X, class T>
static void rows_of(const Linear& a, i64 begin, i64 end) {
    constexpr int WIDE = W == 1 ? 4 : 8;
    constexpr int FEW = ACCUMULATORS / 4;
    const int streams = a.m == 1 ? WIDE : FEW;
    const i64 gap = (end - begin) / streams;
    for (i64 n = begin; n < begin + gap; n++)
        if (a.m == 1) sweep<X, T, 1, WIDE>(a, 0, n, gap);
        else sweep<X, T, 1, FEW>(a, sweep<X, T, 2, FEW>(a, sweep<X, T, 4, FEW>(a, 0, n, gap), n, gap), n, gap);
    for (i64 n = begin + gap * streams; n < end; n++) sweep<X, T, 1, 1>(a, 0, n, 1);
}
