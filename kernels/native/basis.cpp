// y = C (B x) for several parts that read the same x, side by side. A part is a chain of four jobs: arrange x,
// z = B x, arrange z, y = C z.
#include "linear.h"

namespace {

// What library.py writes: seven words.
struct Part {
    const int* order;  // [k], or null: z = x[order[:rank]] + basis x[order[rank:]], columns = k - rank
    const void *basis, *coefficients, *bias;  // [rank, columns], [outputs, rank], [outputs] or null
    i64 rank, columns, outputs;
};

enum { ARRANGE_X, BASIS, ARRANGE_Z, COEFFICIENTS, JOBS };  // of a part

struct Chain {
    Part part;
    Linear inner, outer;  // z = B x, y = C z
    Rows inner_rows, outer_rows;
    void* chosen;  // x[order[:chosen_count]] of every row
    i64 chosen_count;
    u32 *packed_x, *packed_z;
};

// Rows begin .. end of to [m, count] = x[order[:count]].
template <class T>
void choose(const void* x, i64 k, const int* order, i64 count, void* to, i64 begin, i64 end) {
    for (i64 m = begin; m < end; m++) {
        const T* from = static_cast<const T*>(x) + m * k;
        T* row = static_cast<T*>(to) + m * count;
        for (i64 i = 0; i < count; i++) row[i] = from[order[i]];
    }
}
void choose(int dtype, const void* x, i64 k, const int* order, i64 count, void* to, i64 begin, i64 end) {
    (dtype == FP32 ? choose<u32> : choose<u16>)(x, k, order, count, to, begin, end);
}

struct BasisCall final : Call {
    int level, dtype;
    const void* x;
    char* y;
    i64 m, k, width = 0, weights = 0;
    std::vector<Chain> chains;

    BasisCall(int level, int dtype, const void* x, const Part* parts, i64 count, void* y, i64 m, i64 k)
        : level(level), dtype(dtype), x(x), y(static_cast<char*>(y)), m(m), k(k), chains(count) {
        for (i64 i = 0; i < count; i++) {
            const Part& p = chains[i].part = parts[i];
            width += p.outputs;
            weights += p.rank * (p.columns + p.outputs);
        }
    }

    int useful_threads(int threads) const override { return ::useful_threads(weights * element_bytes(dtype), m, threads); }

    void lay_out(Scratch& scratch) override {
        char* to = y;
        for (Chain& chain : chains) {
            lay_out(chain, to, scratch);
            to += chain.part.outputs * element_bytes(dtype);
        }
    }

    void lay_out(Chain& c, char* to, Scratch& scratch) const {
        const Part& p = c.part;
        const i64 element = element_bytes(dtype);
        const bool x_tiles = on_tiles(level, dtype, m, p.rank), z_tiles = on_tiles(level, dtype, m, p.outputs);
        c.chosen_count = !p.order ? 0 : x_tiles ? p.rank : k;
        c.chosen = scratch.take<void>(m * c.chosen_count * element);
        c.packed_x = scratch.take<u32>(x_tiles ? packed_words(m, p.columns) * 4 : 0);
        c.packed_z = scratch.take<u32>(z_tiles ? packed_words(m, p.rank) * 4 : 0);
        char* z = scratch.take<char>(m * p.rank * element);
        const void* from = c.chosen ? static_cast<char*>(c.chosen) + p.rank * element : x;
        const i64 from_stride = p.order ? c.chosen_count : k;
        c.inner = {from,   p.basis,   c.chosen,    z,      false, false, m, p.rank,
                   p.columns, from_stride, c.chosen_count, p.rank, c.packed_x};
        c.outer = {z, p.coefficients, p.bias, to, false, false, m, p.outputs, p.rank, p.rank, 0, width, c.packed_z};
        c.inner_rows = rows_of(level, dtype, c.inner);
        c.outer_rows = rows_of(level, dtype, c.outer);
    }

    // Job by job and part by part: other parts lie between a job and the one that it waits for.
    Span enqueue(Queue& queue, Span after) override {
        std::vector<Span> done(chains.size(), after);
        for (int job = 0; job < JOBS; job++)
            for (std::size_t i = 0; i < chains.size(); i++) {
                const auto [size, chunk] = cut(chains[i], job, queue.threads);
                done[i] = queue.add(*this, int(i) * JOBS + job, size, chunk, done[i]);
            }
        return {done[0].first, i64(chains.size())};
    }

    struct Cut {
        i64 size, chunk;
    };
    Cut cut(const Chain& c, int job, int threads) const {
        const Part& p = c.part;
        const i64 element = element_bytes(dtype);
        switch (job) {
            case ARRANGE_X: return {c.chosen || c.packed_x ? m : 0, ROWS};
            case BASIS: return {p.rank, rows_per_chunk(p.columns * element, p.rank, threads)};
            case ARRANGE_Z: return {c.packed_z ? m : 0, ROWS};
            default: return {p.outputs, rows_per_chunk(p.rank * element, p.outputs, threads)};
        }
    }

    void run(int step, i64 begin, i64 end) const override {
        const Chain& c = chains[step / JOBS];
        const i64 rank = c.part.rank;
        switch (step % JOBS) {
            case ARRANGE_X:
                if (c.chosen) choose(dtype, x, k, c.part.order, c.chosen_count, c.chosen, begin, end);
                if (c.packed_x) {
                    const int* rest = c.part.order ? c.part.order + rank : nullptr;
                    pack(x, k, rest, m, c.part.columns, c.packed_x, begin, end);
                }
                break;
            case BASIS: return multiply(c.inner, c.inner_rows, begin, end);
            case ARRANGE_Z: return pack(c.outer.x, rank, nullptr, m, rank, c.packed_z, begin, end);
            default: return multiply(c.outer, c.outer_rows, begin, end);
        }
    }

    static void multiply(const Linear& a, Rows rows, i64 begin, i64 end) {
        if (a.packed) hold_tiles(a.m);
        rows(a, begin, end);
    }
};

struct OrderCall final : Call {
    int dtype;
    const void* x;
    const int* order;
    void* y;
    i64 m, k;

    OrderCall(int dtype, const void* x, const int* order, void* y, i64 m, i64 k)
        : dtype(dtype), x(x), order(order), y(y), m(m), k(k) {}

    int useful_threads(int threads) const override { return ::useful_threads(m * k * element_bytes(dtype), 1, threads); }
    Span enqueue(Queue& queue, Span after) override { return queue.add(*this, 0, m, ROWS, after); }
    void run(int, i64 begin, i64 end) const override { choose(dtype, x, k, order, k, y, begin, end); }
};

}  // namespace

// parts: `count` of Part. x [m, k], y [m, sum of outputs], all of one dtype.
extern "C" void pared_basis_linear(int level, int dtype, int threads, const void* x, const void* parts, i64 count, void* y,
                                   i64 m, i64 k) {
    if (m) submit(BasisCall(level, dtype, x, static_cast<const Part*>(parts), count, y, m, k), threads);
}

// y [m, k] = x [m, k] with columns in this order.
extern "C" void pared_in_order(int, int dtype, int threads, const void* x, const void* order, void* y, i64 m, i64 k) {
    submit(OrderCall(dtype, x, static_cast<const int*>(order), y, m, k), threads);
}
