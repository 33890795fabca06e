// The queue that all kernels run through.
#include "queue.h"

#include "linear.h"

#include <thread>


Span Queue::add(const Call& call, int step, i64 size, i64 chunk, Span after) {
    if (!size) return after;
    jobs.push_back({&call, step, size, chunk, ceil_div(size, chunk), after});
    return {i64(jobs.size()) - 1, 1};
}

void Queue::run() {
    if (jobs.size() > room) {
        room = 2 * jobs.size();
        counters.reset(new Counter[room]);
    }
    i64 pieces = 0;
    for (std::size_t i = 0; i < jobs.size(); i++) {
        counters[i].left.store(jobs[i].pieces, std::memory_order_relaxed);
        pieces += jobs[i].pieces;
    }
    const int team = int(most(1, least(threads, pieces)));
    std::atomic<i64> next{0};
#pragma omp parallel num_threads(team) if (team > 1)
    work(next);
}

void Queue::work(std::atomic<i64>& next) {
    i64 first = 0, ticket = next++;
    for (std::size_t i = 0; i < jobs.size(); i++) {
        const Job& job = jobs[i];
        for (; ticket < first + job.pieces; ticket = next++) {
            wait_for(job.after);
            const i64 begin = (ticket - first) * job.chunk;
            job.call->run(job.step, begin, least(job.size, begin + job.chunk));
            counters[i].left.fetch_sub(1, std::memory_order_release);
        }
        first += job.pieces;
    }
    release_tiles();
}

// Short, unless the system took a thread off its CPU.
void Queue::wait_for(Span after) const {
    for (i64 i = after.first; i < after.first + after.count; i++)
        for (int tries = 0; counters[i].left.load(std::memory_order_acquire); tries++)
            if (tries > 1000) std::this_thread::yield();
#if PARED_X86
            else _mm_pause();
#endif
}

void execute(Call& call, int threads) {
    thread_local std::vector<Line> memory;
    thread_local Queue queue;
    Scratch counting;
    call.lay_out(counting);
    memory.resize(most(memory.size(), counting.lines));  // never less: what grows again is zeroed again
    Scratch scratch{memory.data()};
    call.lay_out(scratch);
    queue.clear();
    queue.threads = call.useful_threads(threads);
    call.enqueue(queue, {});
    queue.run();
}
