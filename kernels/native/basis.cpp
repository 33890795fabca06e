// y = C (B x) for several parts that read the same x, side by side, in one parallel region.
//
// A part is a chain of four jobs: arrange x, z = B x, arrange z, y = C z. Jobs are cut into pieces, and all pieces
// stand in one queue, job by job and part by part: a thread that takes a piece seldom finds the job before it
// unfinished, since other parts lie between, and nobody waits for a thread that has not woken up yet.
#include "linear.h"

#include <atomic>
#include <thread>
#include <vector>

namespace {

// What library.py writes: seven words.
struct Part {
    const int* order;  // [k], or null: z = x[order[:rank]] + basis x[order[rank:]], columns = k - rank
    const void *basis, *coefficients, *bias;  // [rank, columns], [outputs, rank], [outputs] or null
    i64 rank, columns, outputs;
};

// `size` rows in pieces of `chunk`, once the job before is done.
struct Job {
    i64 size = 0, chunk = 1, pieces = 0;
    std::atomic<i64> left{0};

    void cut(i64 rows, i64 rows_a_piece) {
        size = rows, chunk = rows_a_piece;
        left = pieces = ceil_div(size, chunk);
    }
};

enum { ARRANGE_X, BASIS, ARRANGE_Z, COEFFICIENTS, JOBS };

struct Chain {
    Part part;
    Linear inner, outer;  // z = B x, y = C z
    Rows inner_rows, outer_rows;
    void* chosen;  // x[order[:chosen_count]] of every row
    i64 chosen_count;
    u32 *packed_x, *packed_z;
    Job jobs[JOBS];
};

struct Call {
    int level, dtype, threads;
    const void* x;
    i64 m, k;
    bool tiles;
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

void run(const Call& call, const Chain& c, int job, i64 begin, i64 end) {
    const i64 rank = c.part.rank;
    switch (job) {
        case ARRANGE_X:
            if (c.chosen) choose(call.dtype, call.x, call.k, c.part.order, c.chosen_count, c.chosen, begin, end);
            if (c.packed_x) {
                const int* rest = c.part.order ? c.part.order + rank : nullptr;
                pack(call.x, call.k, rest, call.m, c.part.columns, c.packed_x, begin, end);
            }
            break;
        case BASIS: c.inner_rows(c.inner, begin, end); break;
        case ARRANGE_Z: pack(c.outer.x, rank, nullptr, call.m, rank, c.packed_z, begin, end); break;
        default: c.outer_rows(c.outer, begin, end);
    }
}

// Pieces of the job before are in the hands of running threads, unless the system took one off its CPU.
void wait_for(const Job& job) {
    for (int tries = 0; job.left.load(std::memory_order_acquire); tries++)
        if (tries > 1000) std::this_thread::yield();
#if PARED_X86
        else _mm_pause();
#endif
}

void work(const Call& call, std::vector<Chain>& chains, std::atomic<i64>& next) {
    i64 first = 0, ticket = next++;
    for (int at = 0; at < JOBS; at++)
        for (Chain& chain : chains) {
            Job& job = chain.jobs[at];
            for (; ticket < first + job.pieces; ticket = next++) {
                for (int before = 0; before < at; before++) wait_for(chain.jobs[before]);
                const i64 begin = (ticket - first) * job.chunk;
                run(call, chain, at, begin, least(job.size, begin + job.chunk));
                job.left.fetch_sub(1, std::memory_order_release);
            }
            first += job.pieces;
        }
}

struct alignas(64) Line {
    char bytes[64];
};

// Scratch memory, handed out in whole cache lines; a first pass without memory counts them.
struct Scratch {
    Line* base;
    i64 lines = 0;

    template <class T>
    T* take(i64 bytes) {
        Line* taken = bytes && base ? base + lines : nullptr;
        lines += ceil_div(bytes, i64(sizeof(Line)));
        return reinterpret_cast<T*>(taken);
    }
};

void lay_out(Chain& c, const Call& call, i64 width, char* y, Scratch& scratch) {
    const Part& p = c.part;
    const i64 m = call.m, element = element_bytes(call.dtype);
    const bool x_tiles = on_tiles(call.level, call.dtype, m, p.rank), z_tiles = on_tiles(call.level, call.dtype, m, p.outputs);
    c.chosen_count = !p.order ? 0 : x_tiles ? p.rank : call.k;
    c.chosen = scratch.take<void>(m * c.chosen_count * element);
    c.packed_x = scratch.take<u32>(x_tiles ? packed_words(m, p.columns) * 4 : 0);
    c.packed_z = scratch.take<u32>(z_tiles ? packed_words(m, p.rank) * 4 : 0);
    char* z = scratch.take<char>(m * p.rank * element);
    const void* x = c.chosen ? static_cast<char*>(c.chosen) + p.rank * element : call.x;
    const i64 x_stride = p.order ? c.chosen_count : call.k;
    c.inner = {x, p.basis, c.chosen, z, false, false, m, p.rank, p.columns, x_stride, c.chosen_count, p.rank, c.packed_x};
    c.outer = {z, p.coefficients, p.bias, y, false, false, m, p.outputs, p.rank, p.rank, 0, width, c.packed_z};
    c.inner_rows = rows_of(call.level, call.dtype, c.inner);
    c.outer_rows = rows_of(call.level, call.dtype, c.outer);
}

void cut(Chain& c, const Call& call) {
    const Part& p = c.part;
    const i64 element = element_bytes(call.dtype);
    c.jobs[ARRANGE_X].cut(c.chosen || c.packed_x ? call.m : 0, ROWS);
    c.jobs[BASIS].cut(p.rank, rows_per_chunk(p.columns * element, p.rank, call.threads));
    c.jobs[ARRANGE_Z].cut(c.packed_z ? call.m : 0, ROWS);
    c.jobs[COEFFICIENTS].cut(p.outputs, rows_per_chunk(p.rank * element, p.outputs, call.threads));
}

}  // namespace

// parts: `count` of Part. x [m, k], y [m, sum of outputs], all of one dtype.
extern "C" void pared_basis_linear(int level, int dtype, int threads, const void* x, const void* parts, i64 count, void* y,
                                   i64 m, i64 k) {
    if (!m) return;
    std::vector<Chain> chains(count);
    i64 width = 0, weights = 0;
    for (i64 i = 0; i < count; i++) {
        const Part& p = chains[i].part = static_cast<const Part*>(parts)[i];
        width += p.outputs;
        weights += p.rank * (p.columns + p.outputs);
    }
    const i64 element = element_bytes(dtype);
    const Call call{level, dtype, useful_threads(weights * element, threads), x, m, k, on_tiles(level, dtype, m, ROWS)};
    thread_local std::vector<Line> memory;
    const auto lay_out_all = [&](Line* base) {
        Scratch scratch{base};
        char* to = static_cast<char*>(y);
        for (Chain& chain : chains) {
            lay_out(chain, call, width, to, scratch);
            to += chain.part.outputs * element;
        }
        return scratch.lines;
    };
    memory.resize(most(memory.size(), lay_out_all(nullptr)));  // never less: what grows again is zeroed again
    lay_out_all(memory.data());
    for (Chain& chain : chains) cut(chain, call);
    std::atomic<i64> next{0};
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
    {
        const Tiles mine(call.tiles ? m : 0);
        work(call, chains, next);
    }
}

// y [m, k] = x [m, k] with columns in this order.
extern "C" void pared_in_order(int, int dtype, int threads, const void* x, const void* order, void* y, i64 m, i64 k) {
    threads = useful_threads(m * k * element_bytes(dtype), threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (i64 row = 0; row < m; row += ROWS)
        choose(dtype, x, k, static_cast<const int*>(order), k, y, row, least(m, row + ROWS));
}
