// How work is shared out: a call is cut into jobs, a job into pieces, and threads take the pieces of all jobs from one
// queue, in order. A piece waits until the jobs that its own job builds on are finished; they are in the hands of
// running threads by then, so nobody waits for a thread that has not woken up yet.
#pragma once
#include "common.h"

#include <atomic>
#include <memory>
#include <vector>

struct Call;

// Neighbouring jobs of a queue that have to be finished before another starts.
struct Span {
    i64 first = 0, count = 0;
};

struct alignas(64) Line {
    char bytes[64];
};

// Memory for what a call needs on its way, handed out in whole cache lines; a first pass without memory counts them.
struct Scratch {
    Line* base = nullptr;
    i64 lines = 0;

    template <class T>
    T* take(i64 bytes) {
        Line* taken = bytes && base ? base + lines : nullptr;
        lines += ceil_div(bytes, i64(sizeof(Line)));
        return reinterpret_cast<T*>(taken);
    }
};

class Queue {
  public:
    int threads = 1;  // that the jobs are cut for

    void clear() { jobs.clear(); }
    // `size` rows in pieces of `chunk`, once `after` is done; without rows there is no job and `after` stands for it.
    Span add(const Call& call, int step, i64 size, i64 chunk, Span after);
    // Every piece of every job, with up to `threads` threads.
    void run();

  private:
    struct Job {
        const Call* call;
        int step;
        i64 size, chunk, pieces;
        Span after;
    };
    struct alignas(64) Counter {
        std::atomic<i64> left;
    };

    void work(std::atomic<i64>& next);
    void wait_for(Span after) const;

    std::vector<Job> jobs;
    std::unique_ptr<Counter[]> counters;  // pieces of each job that are not finished
    std::size_t room = 0;
};

// One call of a kernel: its arguments, the memory that it needs and its work.
struct Call {
    virtual ~Call() = default;
    // How many of `threads` are worth waking for this call alone.
    virtual int useful_threads(int threads) const = 0;
    virtual void lay_out(Scratch&) {}
    // Adds its jobs, the first of them after `after`, and returns those that end it.
    virtual Span enqueue(Queue& queue, Span after) = 0;
    virtual void run(int step, i64 begin, i64 end) const = 0;
};

// Runs a call on the spot, and keeps it when this thread is recording a tape (tape.cpp).
void execute(Call& call, int threads);
bool recording();
void record(std::unique_ptr<Call> call);

template <class C>
static inline void submit(C call, int threads) {
    execute(call, threads);
    if (recording()) record(std::make_unique<C>(std::move(call)));
}
