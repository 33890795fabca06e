// The fastest read that we can write, to measure other reads against: blocks of 1 MiB as eight streams of whole cache
// lines, prefetched, with nothing else to do. Included inside a namespace by every_level.h.

typedef i64 Line __attribute__((vector_size(64), aligned(1)));

static i64 read(int threads, const char* data, i64 bytes) {
    constexpr i64 STREAMS = 8, STREAM_BYTES = 128 << 10, AHEAD_BYTES = 512, BLOCK = STREAMS * STREAM_BYTES;
    i64 total = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : total)
    for (i64 block = 0; block < bytes / BLOCK; block++) {
        Line sums[STREAMS] = {};
        for (i64 at = 0; at < STREAM_BYTES; at += 64)
            for (i64 s = 0; s < STREAMS; s++) {
                const char* p = data + block * BLOCK + s * STREAM_BYTES + at;
                __builtin_prefetch(p + AHEAD_BYTES);
                sums[s] += *reinterpret_cast<const Line*>(p);
            }
        for (auto& line : sums)
            for (i64 lane = 0; lane < 8; lane++) total += line[lane];
    }
    return total;
}
