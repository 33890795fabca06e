// Paged attention for decoding and chunked prefill: how the work is cut into pieces, run and merged.
#define KERNEL "attention_kernel.h"
#include "attention.h"

#include "every_level.h"

namespace {

// The pieces of one row of queries, when a long context was cut: they lie one after another.
struct Cut {
    std::size_t first, count;
};

struct Plan {
    std::vector<Piece> pieces;
    std::vector<Cut> cuts;
    std::vector<float> partials;
};

i64 oldest_key(const Attention& a, i64 position) { return a.window > 0 ? most(0, position - a.window + 1) : 0; }

// The cut of a sequence depends on that sequence alone, so that its result does not depend on its company.
void plan(const Attention& a, Plan& made) {
    made.pieces.clear();
    made.cuts.clear();
    const i64 group = a.heads / a.kv_heads, block = most(1, QUERY_ROWS / group), row = a.head_dim + 2;
    i64 floats = 0;
    for (i64 s = 0; s < a.sequences; s++) {
        const i64 queries = a.query_starts[s + 1] - a.query_starts[s], start = a.context_lens[s] - queries;
        for (i64 query = 0; query < queries; query += block) {
            const i64 count = least(block, queries - query), end = start + query + count;
            const i64 begin = oldest_key(a, start + query), size = queries <= block ? SPLIT : end;
            for (i64 head = 0; head < a.kv_heads; head++) {
                const std::size_t first = made.pieces.size();
                for (i64 from = begin; from < end; from = (from / size + 1) * size)
                    made.pieces.push_back({s, head, query, count, from, least(end, (from / size + 1) * size), nullptr});
                const std::size_t cut = made.pieces.size() - first;
                if (cut < 2) continue;
                made.cuts.push_back({first, cut});
                floats += i64(cut) * count * group * row;
            }
        }
    }
    made.partials.resize(floats);
    float* partial = made.partials.data();
    for (const Cut& cut : made.cuts)
        for (std::size_t i = cut.first; i < cut.first + cut.count; i++) {
            made.pieces[i].partial = partial;
            partial += made.pieces[i].count * group * row;
        }
}

Buffers buffers(const Attention& a) {
    const i64 width = ceil_div(a.head_dim, 16) * 16, rows = most(QUERY_ROWS, a.heads / a.kv_heads);
    thread_local std::vector<float> memory;
    memory.resize(rows * (2 * width + TILE + 2) + 2 * width * TILE);
    float* p = memory.data();
    const auto take = [&](i64 count) { return (p += count) - count; };
    Buffers s{};
    s.width = width;
    s.keys = take(width * TILE), s.values = take(width * TILE), s.q = take(rows * width), s.sums = take(rows * width);
    s.scores = take(rows * TILE), s.maximum = take(rows), s.normaliser = take(rows);
    return s;
}

template <class T>
void merge(const Attention& a, const Piece* pieces, std::size_t count) {
    const Piece& p = pieces[0];
    const i64 group = a.heads / a.kv_heads, width = a.head_dim + 2;
    for (i64 r = 0; r < p.count * group; r++) {
        float top = -INFINITY, total = 0.0f;
        for (std::size_t i = 0; i < count; i++) top = std::fmax(top, pieces[i].partial[r * width + a.head_dim]);
        std::vector<float> sums(a.head_dim);
        for (std::size_t i = 0; i < count; i++) {
            const float* part = pieces[i].partial + r * width;
            const float weight = std::exp(part[a.head_dim] - top);
            total += weight * part[a.head_dim + 1];
            for (i64 d = 0; d < a.head_dim; d++) sums[d] += weight * part[d];
        }
        const i64 token = a.query_starts[p.sequence] + p.query + r / group, head = p.kv_head * group + r % group;
        T* out = static_cast<T*>(a.out) + (token * a.heads + head) * a.head_dim;
        for (i64 d = 0; d < a.head_dim; d++) cast(sums[d] / total, out + d);
    }
}

template <class T>
struct AttentionCall final : Call {
    Attention a;
    void (*attend)(const Attention&, const Piece&, const Buffers&);
    Plan made;
    enum { ATTEND, MERGE };

    AttentionCall(int level, const Attention& a) : a(a), attend(WIDEST(level, attend<T>)) {}

    int useful_threads(int threads) const override { return threads; }

    Span enqueue(Queue& queue, Span after) override {
        plan(a, made);  // contexts grow between two plays of a tape
        after = queue.add(*this, ATTEND, i64(made.pieces.size()), 1, after);
        return queue.add(*this, MERGE, i64(made.cuts.size()), 1, after);
    }

    void run(int step, i64 begin, i64) const override {
        if (step == ATTEND) return attend(a, made.pieces[begin], buffers(a));
        merge<T>(a, &made.pieces[made.cuts[begin].first], made.cuts[begin].count);
    }
};

}  // namespace

extern "C" void pared_paged_attention(int level, int dtype, int threads, const void* q, const void* k_pool,
                                      const void* v_pool, const std::int32_t* query_starts,
                                      const std::int32_t* context_lens, const std::int32_t* block_tables, void* out,
                                      i64 sequences, i64 table_width, i64 page, i64 heads, i64 kv_heads, i64 head_dim,
                                      i64 window, float scale) {
    const Attention a{q,    k_pool, v_pool,   query_starts, context_lens, block_tables, out, sequences, table_width,
                      page, heads,  kv_heads, head_dim,     window,       scale};
    if (dtype == BF16) submit(AttentionCall<bf16>(level, a), threads);
    else if (dtype == FP16) submit(AttentionCall<fp16>(level, a), threads);
    else submit(AttentionCall<float>(level, a), threads);
}
