// A tape keeps the calls that one thread made, arguments and all, and plays them again as one: a single team of
// threads goes through them without coming back to the caller in between. What the tensors hold by then is what
// counts; the tensors themselves have to stay.
#include "queue.h"

namespace {

struct Tape {
    std::vector<std::unique_ptr<Call>> calls;
    std::vector<Line> memory;  // all calls share it: one is finished before the next starts
    Queue queue;

    void lay_out() {
        i64 lines = 0;
        for (auto& call : calls) {
            Scratch counting;
            call->lay_out(counting);
            lines = most(lines, counting.lines);
        }
        memory.resize(lines);
        for (auto& call : calls) {
            Scratch scratch{memory.data()};
            call->lay_out(scratch);
        }
    }

    void play(int threads) {
        queue.clear();
        queue.threads = threads;
        Span after;
        for (auto& call : calls) after = call->enqueue(queue, after);
        queue.run();
    }
};

thread_local Tape* recorded = nullptr;

}  // namespace

bool recording() { return recorded != nullptr; }
void record(std::unique_ptr<Call> call) { recorded->calls.push_back(std::move(call)); }

// Between start and stop every call of this thread is recorded, besides being run.
extern "C" void* pared_tape_start() { return recorded = new Tape; }
extern "C" void pared_tape_stop() {
    recorded->lay_out();
    recorded = nullptr;
}
extern "C" void pared_tape_play(void* tape, int threads) { static_cast<Tape*>(tape)->play(threads); }
extern "C" void pared_tape_free(void* tape) { delete static_cast<Tape*>(tape); }
