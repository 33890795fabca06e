// The fastest read that we can write, to measure other reads against. Included inside a namespace by every_level.h.

// The sum of all words of `data`: eight streams of whole cache lines, nothing else to do than to read.
static i64 read(int threads, const char* data, i64 bytes) {
    constexpr i64 STREAMS = 8, LANES = 8;
    typedef i64 Line __attribute__((vector_size(8 * LANES), aligned(1)));
    const i64 part = bytes / threads / STREAMS / i64(sizeof(Line)) * i64(sizeof(Line));
    i64 total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        Line sums[STREAMS] = {};
        const char* mine = data + omp_get_thread_num() * part * STREAMS;
        for (i64 at = 0; at < part; at += sizeof(Line))
            for (i64 s = 0; s < STREAMS; s++) sums[s] += *reinterpret_cast<const Line*>(mine + s * part + at);
        for (auto& line : sums)
            for (i64 lane = 0; lane < LANES; lane++) total += line[lane];
    }
    return total;
}
