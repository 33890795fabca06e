// The routed feed-forward layer. Every row of x is routed by itself, as fp32 sums in one order decide (router.h); the
// groups that any row wakes are listed, and the list decides what is read. A sleeping row's hidden values are zero.
#define KERNEL "routed_kernel.h"
#include "routed.h"
#include "router.h"

#include "every_level.h"

#if PARED_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vec_avx512.h"
#include "vec_math.h"
#define PARED_DOT_BF16 1
#include "routed_kernel.h"
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
namespace amx {
#include "routed_amx.h"
}  // namespace amx
#pragma GCC pop_options
}  // namespace avx512_bf16
#pragma GCC pop_options
static Down down_of_bf16(int level, bool tiles) {
    if (tiles) return avx512_bf16::amx::down;
    return level < AVX512_BF16 ? WIDEST(level, down<bf16>) : avx512_bf16::down<bf16>;
}
#else
static Down down_of_bf16(int, bool) { return scalar::down<bf16>; }
#endif

#define WIDEST_OF(level, dtype, name) \
    (dtype == BF16 ? WIDEST(level, name<bf16>) : dtype == FP16 ? WIDEST(level, name<fp16>) : WIDEST(level, name<float>))

namespace {

constexpr i64 UP_PIECES = 32, DOWN_BLOCKS = 32;  // pieces of the list; blocks of outputs in a piece, at most
constexpr i64 RUN_BYTES = 1 << 20;               // of gate and up that are multiplied as one

struct RoutedCall final : Call {
    Routed a;
    Router router;
    Linear up;  // of one group
    Rows up_rows;
    Hide hide;
    Down down;
    Finish finish;
    float* sums;  // [pieces, m, rows of a run]
    i64 together;  // neighbouring groups that are multiplied as one, at most
    int level, dtype;
    bool tiles;
    enum { PACK, ROUTE, CHOOSE, UP, DOWN };

    RoutedCall(int level, int dtype, const Routed& given)
        : a(given), level(level), dtype(dtype), tiles(on_tiles(level, dtype, given.m, given.rows())) {
        a.padded_m = tiles ? ceil_div(a.m, ROWS) * ROWS : a.m;
        hide = WIDEST_OF(level, dtype, hide);
        down = dtype == BF16 ? down_of_bf16(level, tiles) : WIDEST_OF(level, dtype, down);
        finish = WIDEST_OF(level, dtype, finish);
        together = most(1, RUN_BYTES / (a.rows() * a.k * element()));
    }

    i64 element() const { return element_bytes(dtype); }
    i64 pieces() const { return least(UP_PIECES, a.groups); }
    int useful_threads(int threads) const override {
        return ::useful_threads(a.groups * (a.rows() * a.k + a.down_weights()) * element(), a.m, threads);
    }

    void lay_out(Scratch& scratch) override {
        a.logits = scratch.take<float>(a.m * a.groups * 4);
        a.chosen = scratch.take<unsigned char>(a.m * a.groups);
        a.list = scratch.take<i64>((a.groups + 1) * 8);
        a.hidden = scratch.take<char>(a.groups * a.padded_m * a.size * element());
        a.totals = scratch.take<float>(a.blocks() * a.padded_m * TILE_N * 4);
        sums = scratch.take<float>(pieces() * a.m * together * a.rows() * 4);
        float* lengths = scratch.take<float>(tiles ? a.m * 4 : 0);
        const u32* packed = scratch.take<u32>(tiles ? packed_words(a.m, a.k) * 4 : 0);
        const Linear logits{a.x, a.router, nullptr, a.logits, false, true, a.m, a.groups, a.k, a.k, 0, a.groups, nullptr};
        router = {logits, fp32_rows_of(level, dtype), a.awake, packed, lengths, a.threshold};
        up = {a.x, a.ins, nullptr, sums, false, true, a.m, a.rows(), a.k, a.k, 0, a.rows(), packed};
        up_rows = rows_of(level, dtype, up);
    }

    Span enqueue(Queue& queue, Span after) override {
        const Span packed = queue.add(*this, PACK, tiles ? a.m : 0, ROWS, after);
        const i64 chunk = tiles ? ROWS : rows_per_chunk(4 * a.k, a.groups, queue.threads);
        const Span routed = queue.add(*this, ROUTE, a.groups, chunk, packed);
        const Span chosen = queue.add(*this, CHOOSE, 1, 1, routed);
        const Span hidden = queue.add(*this, UP, pieces(), 1, chosen);
        const i64 blocks = most(1, least(DOWN_BLOCKS, ceil_div(a.blocks(), 4 * queue.threads)));
        return queue.add(*this, DOWN, a.blocks(), blocks, hidden);
    }

    void run(int step, i64 begin, i64 end) const override {
        switch (step) {
            case PACK:
                measure(router, begin, end);
                return pack(a.x, a.k, nullptr, a.m, a.k, const_cast<u32*>(up.packed), begin, end);
            case ROUTE: return tiles ? route_on_tiles(router, begin, end) : router.rows(router.fp32, begin, end);
            case CHOOSE: return choose();
            case UP: return wake(begin);
            default:
                if (tiles) hold_tiles(ROWS, a.size);
                down(a, begin, end);
                finish(a, begin, end);
        }
    }

    void choose() const {
        i64 rows = 0, woken = 0, read = 0;
        for (i64 m = 0; m < a.m; m++) {
            const bool live = !a.awake || a.awake[m];
            rows += live;
            for (i64 g = 0; g < a.groups; g++) {
                const i64 at = m * a.groups + g;
                woken += a.chosen[at] = live && a.logits[at] > a.threshold;
            }
        }
        for (i64 g = 0; g < a.groups; g++) {
            bool any = false;
            for (i64 m = 0; m < a.m && !any; m++) any = a.chosen[m * a.groups + g];
            if (any) a.list[read++] = g;
        }
        a.list[a.groups] = read;
        a.counts[0] += rows, a.counts[1] += woken, a.counts[2] += read;
    }

    // What every stream of up_rows reads first: hardware does not foresee a jump to another group.
    void fetch_heads(i64 at, i64 rows) const {
        const i64 streams = tiles ? ROWS : 8, row = a.k * element();
        const char* ins = ins_of(at);
        for (i64 stream = 0; stream < streams; stream++)
            for (i64 byte = 0; byte < least(512, row); byte += 64)
                __builtin_prefetch(ins + stream * (rows / streams) * row + byte);
    }
    const char* ins_of(i64 at) const { return static_cast<const char*>(a.ins) + a.list[at] * a.rows() * a.k * element(); }

    // How many entries of the list from `at` on, before `end`, are neighbours: they are multiplied as one.
    i64 neighbours(i64 at, i64 end) const {
        i64 count = 1;
        while (count < together && at + count < end && a.list[at + count] == a.list[at] + count) count++;
        return count;
    }

    void wake(i64 piece) const {
        Linear some = up;
        float* own = sums + piece * a.m * together * a.rows();
        some.y = own;
        if (tiles) hold_tiles(a.m);
        const i64 end = (piece + 1) * a.listed() / pieces();
        for (i64 at = piece * a.listed() / pieces(), count; at < end; at += count) {
            count = neighbours(at, end);
            some.w = ins_of(at);
            some.n = some.y_stride = count * a.rows();
            up_rows(some, 0, some.n);
            if (at + count < end) fetch_heads(at + count, a.rows() * neighbours(at + count, end));
            for (i64 i = 0; i < count; i++) hide(a, at + i, own + i * a.rows(), some.n);
        }
    }
};

// The logits alone, for callers that multiply by other means: the same bits.
struct RouteCall final : Call {
    Linear router;
    Rows rows;

    RouteCall(int level, int dtype, const Linear& router) : router(router), rows(fp32_rows_of(level, dtype)) {}

    i64 bytes() const { return router.n * router.k * 4; }
    int useful_threads(int threads) const override { return ::useful_threads(bytes(), router.m, threads); }
    Span enqueue(Queue& queue, Span after) override {
        return queue.add(*this, 0, router.n, rows_per_chunk(4 * router.k, router.n, queue.threads), after);
    }
    void run(int, i64 begin, i64 end) const override { rows(router, begin, end); }
};

}  // namespace

// logits [m, groups] of x [m, k].
extern "C" void pared_route(int level, int dtype, int threads, const void* x, const float* router, float* logits, i64 m,
                            i64 k, i64 groups) {
    if (!m) return;
    const Linear a{x, router, nullptr, logits, false, true, m, groups, k, k, 0, groups, nullptr};
    submit(RouteCall(level, dtype, a), threads);
}

extern "C" void pared_routed_ffn(int level, int dtype, int threads, const void* x, const void* ins, const void* downs,
                                 const float* router, const void* gate_bias, const void* up_bias,
                                 const void* down_bias, const i64* awake, i64* counts, void* y, int gated, int kind,
                                 i64 m, i64 k, i64 groups, i64 size, float threshold) {
    if (!m) return;
    Routed a{};
    a.x = x, a.ins = ins, a.downs = downs, a.router = router;
    a.gate_bias = gate_bias, a.up_bias = up_bias, a.down_bias = down_bias;
    a.awake = awake, a.counts = counts, a.y = y, a.m = m, a.k = k, a.groups = groups, a.size = size;
    a.gated = gated != 0, a.kind = kind, a.threshold = threshold;
    submit(RoutedCall(level, dtype, a), threads);
}
