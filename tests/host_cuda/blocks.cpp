// Blocks one after another, the threads of a block as fibres that give way where they wait for each other.
//
// A fibre takes up thread after thread of its block until one of them waits: a kernel without barriers runs on one
// fibre. Threads and blocks run in rising order, or in falling order with HOST_CUDA_BACKWARD in the environment, so
// that what depends on the order shows.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "runner.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

#ifdef __x86_64__
// swapcontext asks the kernel for the signal mask at every call, ten times the work of all the rest. What a function
// must keep goes onto its stack; the new stack gives it back.
extern "C" void host_cuda_change(void** from, void* to);
asm(R"(
.pushsection .text
.type host_cuda_change, @function
host_cuda_change:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size host_cuda_change, . - host_cuda_change
.popsection
)");
#endif

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {
namespace {

constexpr size_t MOST_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 << 10;  // a sanitizer's report is made on it, too

struct Fibre {
#ifdef __x86_64__
    void* top;  // of its stack, while another runs
#else
    ucontext_t context;
#endif
    const void* stack;
    size_t stack_bytes;
    void* fake_stack;
};

enum class State { fresh, ready, at_barrier, in_warp, ended };

struct Thread {
    State state;
    uint3 index;
    Fibre* fibre;
    Site site;  // what it waits for
    unsigned mask;
    uint64_t value;
    Brought brought;
};

Launch launch;
std::vector<Thread> threads;
std::vector<Fibre*> idle;
Fibre scheduler;
unsigned current;
Fibre* entered;
unsigned started;  // how many threads of the block have begun
const bool backward = getenv("HOST_CUDA_BACKWARD") != nullptr;

uint3 index_of(unsigned thread) {
    const unsigned row = thread / blockDim.x;
    return {thread % blockDim.x, row % blockDim.y, row / blockDim.y};
}

std::string words(uint3 index) {
    char text[64];
    snprintf(text, sizeof text, "(%u, %u, %u)", index.x, index.y, index.z);
    return text;
}

void become(unsigned thread) {
    current = thread;
    threadIdx = threads[thread].index;
}

// The address sanitizer must know whose stack the program is on.
void change(Fibre& from, Fibre& to) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#ifdef __x86_64__
    host_cuda_change(&from.top, to.top);
#else
    swapcontext(&from.context, &to.context);
#endif
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

bool begin_next() {
    if (started == threads.size()) return false;
    become(backward ? threads.size() - 1 - started : started);
    ++started;
    return true;
}

// What a fibre does for ever; it was given the thread to begin with, and is given another whenever it is idle.
void live() {
    Fibre* const self = entered;
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
    for (;;) {
        do {
            threads[current].fibre = self;
            launch.call(launch.arguments);
            threads[current].state = State::ended;
        } while (begin_next());
        idle.push_back(self);
        change(*self, scheduler);
    }
}

Fibre* make_fibre() {
    void* stack =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) end_at_fault("no memory for the stack of a thread");
    Fibre* fibre = new Fibre{};
    fibre->stack = stack;
    fibre->stack_bytes = STACK_BYTES;
#ifdef __x86_64__
    // As host_cuda_change leaves a stack: six registers, whereto, and for `live` a stack as after a call.
    void** top = static_cast<void**>(stack) + STACK_BYTES / sizeof(void*) - 8;
    top[6] = reinterpret_cast<void*>(live);
    fibre->top = top;
#else
    getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = stack;
    fibre->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fibre->context, live, 0);
#endif
    return fibre;
}

void give_way(State state, Site site) {
    Thread& self = threads[current];
    self.state = state;
    self.site = site;
    change(*self.fibre, scheduler);
}

bool same(const char* a, const char* b) {
    return a == b || !strcmp(a, b);
}

bool same(const Site& a, const Site& b) {
    return a.line == b.line && same(a.what, b.what) && same(a.file, b.file);
}

// "128 threads of 256, the first (0, 4, 0), wait in __syncthreads at stats.cu:48", a line for every such group.
std::string stuck() {
    std::string text;
    std::vector<bool> told(threads.size());
    for (unsigned i = 0; i < threads.size(); ++i) {
        if (told[i]) continue;
        const bool ended = threads[i].state == State::ended;
        unsigned count = 0;
        for (unsigned k = i; k < threads.size(); ++k)
            if (ended ? threads[k].state == State::ended
                      : threads[k].state != State::ended && same(threads[k].site, threads[i].site)) {
                told[k] = true;
                ++count;
            }
        text += "\n  " + std::to_string(count) + " of " + std::to_string(threads.size()) + " threads, the first " +
                words(threads[i].index) + ", ";
        const Site& site = threads[i].site;
        text += ended ? "have ended"
                      : std::string("wait in ") + site.what + " at " + site.file + ":" + std::to_string(site.line);
    }
    return text;
}

void end_stuck() {
    const std::string message = "kernel " + std::string(launch.kernel) + ", block " + words(blockIdx) +
                                ": a barrier that not all threads reach" + stuck();
    end_at_fault(message.c_str());
}

// All threads wait, or have ended: they go on if they wait for each other at one and the same barrier.
void pass_barrier() {
    for (const Thread& thread : threads)
        if (thread.state != State::at_barrier || !same(thread.site, threads[0].site)) end_stuck();
    for (Thread& thread : threads) thread.state = State::ready;
    watch_barrier();
}

// Lets the lanes go on that wait together with this thread, if all of them are there.
bool pass_warp(unsigned thread) {
    const Thread& self = threads[thread];
    const unsigned first = thread - thread % warpSize;
    const unsigned end = first + warpSize < threads.size() ? first + warpSize : threads.size();
    unsigned lanes = 0;
    for (unsigned i = first; i < end; ++i) {
        const Thread& other = threads[i];
        if (!(self.mask >> (i - first) & 1) || other.state == State::ended) continue;
        if (other.state != State::in_warp || other.mask != self.mask || !same(other.site, self.site)) return false;
        lanes |= 1u << (i - first);
    }
    Brought brought{{}, lanes};
    for (unsigned i = first; i < end; ++i) brought.value[i - first] = threads[i].value;
    for (unsigned i = first; i < end; ++i)
        if (lanes >> (i - first) & 1) {
            threads[i].brought = brought;
            threads[i].state = State::ready;
        }
    if (!strcmp(self.site.what, "__syncwarp")) watch_warp(first, lanes);
    return true;
}

// Nothing but the end of other lanes can have made these complete.
bool pass_warps() {
    bool any = false;
    for (unsigned i = 0; i < threads.size(); ++i)
        if (threads[i].state == State::in_warp) any |= pass_warp(i);
    return any;
}

// Not through memset, in which the address sanitizer would look at every byte: between the arrays it is forbidden.
__attribute__((no_sanitize("address"))) void spoil(unsigned char* begin, unsigned char* end) {
    for (volatile unsigned char* byte = begin; byte < end; ++byte) *byte = 0xFF;
}

void run_block() {
    spoil(launch.shared_begin, launch.shared_end);
    spoil(launch.dynamic_begin, launch.dynamic_begin + launch.dynamic_bytes);
    watch_block();
    for (Thread& thread : threads) thread.state = State::fresh;
    started = 0;
    while (begin_next()) {
        if (idle.empty()) idle.push_back(make_fibre());
        Fibre* fibre = idle.back();
        idle.pop_back();
        entered = fibre;
        change(scheduler, *fibre);
    }
    for (;;) {
        bool ran = false, waiting = false;
        for (unsigned i = 0; i < threads.size(); ++i) {
            const unsigned next = backward ? threads.size() - 1 - i : i;
            if (threads[next].state == State::ready) {
                become(next);
                change(scheduler, *threads[next].fibre);
                ran = true;
            }
            waiting |= threads[next].state != State::ended;
        }
        if (!waiting) return;
        if (!ran && !pass_warps()) pass_barrier();
    }
}

}  // namespace

unsigned lane() {
    return current % warpSize;
}

unsigned current_thread() {
    return current;
}

void wait_for_block(Site site) {
    give_way(State::at_barrier, site);
}

const Brought& exchange(unsigned mask, uint64_t value, Site site) {
    Thread& self = threads[current];
    if (!(mask >> lane() & 1)) fail(site, "its mask lacks the lane that calls");
    self.mask = mask;
    self.value = value;
    self.site = site;
    self.state = State::in_warp;
    if (pass_warp(current))
        self.state = State::ready;
    else
        give_way(State::in_warp, site);
    return self.brought;
}

void* dynamic_shared() {
    return launch.dynamic_begin;
}

const char* where() {
    static std::string text;
    text = "kernel " + std::string(launch.kernel) + ", block " + words(blockIdx) + ", thread " + words(threadIdx);
    return text.c_str();
}

void fail(Site site, const char* message) {
    const std::string text =
        std::string(where()) + ": " + site.what + " at " + site.file + ":" + std::to_string(site.line) + " " + message;
    end_at_fault(text.c_str());
}

void end_at_fault(const char* message) {
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
    _exit(1);
}

void run(const Launch& given) {
    launch = given;
    blockDim = launch.block;
    gridDim = launch.grid;
    const size_t count = size_t{blockDim.x} * blockDim.y * blockDim.z;
    if (count > MOST_THREADS) {
        const std::string text = "kernel " + std::string(launch.kernel) + ": " + std::to_string(count) +
                                 " threads in a block; a GPU takes up to " + std::to_string(MOST_THREADS);
        end_at_fault(text.c_str());
    }
    threads.assign(count, Thread{});
    for (unsigned i = 0; i < count; ++i) threads[i].index = index_of(i);
    watch_launch(launch);
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t block = backward ? blocks - 1 - i : i;
        const uint64_t row = block / gridDim.x;
        blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(row % gridDim.y),
                    static_cast<unsigned>(row / gridDim.y)};
        run_block();
    }
}

}  // namespace host_cuda
