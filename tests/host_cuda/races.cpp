// The race detector: of two threads that touch the same byte, one of them writing, one must wait for the other.
//
// g++ -fsanitize=thread makes a kernel tell of every access, through calls that are answered here in place of its own
// library, which knows nothing of blocks. Beside every byte of shared and global memory stands who wrote and who read
// it last, and in which interval: a barrier ends one, and so does the end of a block. Within an interval only the
// threads of a warp are in order, by __syncwarp of the whole warp. One pass shows a missing barrier, whatever the order
// in which the threads happened to run.
//
// Atomics are in order among themselves. Blocks are in order where one, behind a barrier, calls __threadfence and then
// an atomic, and the other an atomic on the same address and then __threadfence, and comes to a barrier.
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <string>
#include <vector>

#include "runner.h"

#ifdef HOST_CUDA_RACES

namespace host_cuda {
namespace {

constexpr uint16_t ATOMIC = 0x4000;    // with a writer
constexpr uint16_t ONE_WARP = 0x8000;  // with a warp: several of its threads
constexpr uint16_t SEVERAL = 0xFFFF;   // threads of several warps

struct Touch {
    uint32_t interval;  // 0: never
    uint32_t caller;    // its place in the module
    uint16_t thread;
    uint16_t turn;  // how many __syncwarp the warp had behind it
};

struct Cell {
    Touch write, read;
};

struct Region {
    uintptr_t begin, end;
    Cell* cells;
    bool shared;
};

struct Access {
    bool write, atomic;
    const void* caller;
};

struct Intervals {
    uint32_t begin, end;
};

std::map<uintptr_t, Region> regions;                  // by their ends
std::map<const void*, std::vector<Intervals>> given;  // by the address of the atomic: what blocks had done before it
std::vector<Intervals> taken, to_take;                // what the block sees of that, now and behind its next barrier
struct {
    unsigned fenced, counted;  // the thread that came last to __threadfence, and to an atomic
    const void* counter;       // the address of that
} in_interval = {~0u, ~0u, nullptr};
Region* last = nullptr;
uint32_t interval = 1, block_start = 1, launch_start = 1;
uint16_t turns[warpSize];  // by warp
uintptr_t module;

Region* find(uintptr_t address) {
    if (last && address >= last->begin && address < last->end) return last;
    const auto found = regions.upper_bound(address);
    if (found == regions.end() || address < found->second.begin) return nullptr;
    return last = &found->second;
}

void add(const void* begin, size_t bytes, bool shared) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(begin);
    regions[first + bytes] = {first, first + bytes, static_cast<Cell*>(calloc(bytes, sizeof(Cell))), shared};
    last = nullptr;
}

void remove(const void* begin) {
    const auto found = regions.upper_bound(reinterpret_cast<uintptr_t>(begin));
    free(found->second.cells);
    regions.erase(found);
    last = nullptr;
}

// A caller's address as it can be looked up in the module's file.
uint32_t offset_of(const void* caller) {
    return reinterpret_cast<uintptr_t>(caller) - 1 - module;
}

bool in_order(const Touch& before, bool shared) {
    if (before.interval < launch_start) return true;
    if (before.interval < block_start) {
        if (shared) return true;  // another block: its shared memory was its own
        for (const Intervals& seen : taken)
            if (before.interval >= seen.begin && before.interval < seen.end) return true;
        return false;
    }
    if (before.interval < interval) return true;
    const unsigned thread = current_thread(), who = before.thread & ~ATOMIC;
    if (before.thread == SEVERAL) return false;
    if (before.thread & ONE_WARP)
        return (who & ~ONE_WARP) == thread / warpSize && before.turn < turns[thread / warpSize];
    return who == thread || (who / warpSize == thread / warpSize && before.turn < turns[thread / warpSize]);
}

std::string threads_of(const Touch& touch) {
    if (touch.interval < block_start) return "another block";
    if (touch.thread == SEVERAL) return "other threads";
    if (touch.thread & ONE_WARP) return "other threads of a warp";
    const unsigned thread = touch.thread & ~ATOMIC, row = thread / blockDim.x;
    char text[64];
    snprintf(text, sizeof text, "thread (%u, %u, %u)", thread % blockDim.x, row % blockDim.y, row / blockDim.y);
    return text;
}

[[noreturn]] void tell(const Region& region, uintptr_t address, const Access& access, const char* said, const char* did,
                       const Touch* before) {
    char text[256];
    const std::string memory =
        region.shared ? "shared memory" : "byte " + std::to_string(address - region.begin) + " of an array";
    snprintf(text, sizeof text, ": %s %s at {%#x}, which ", access.write ? "writes" : "reads", memory.c_str(),
             offset_of(access.caller));
    std::string message = where() + std::string(text);
    if (before) {
        snprintf(text, sizeof text, " at {%#x}", before->caller);
        message += threads_of(*before) + " " + did + text + ", " + said;
    } else {
        message += said;
    }
    end_at_fault(message.c_str());
}

void check(const void* pointer, size_t bytes, Access access) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    Region* region = find(address);
    if (!region) return;
    const uint16_t thread = current_thread(), warp = thread / warpSize;
    const Touch now{interval, offset_of(access.caller), static_cast<uint16_t>(thread | (access.atomic ? ATOMIC : 0)),
                    turns[warp]};
    for (uintptr_t byte = address; byte < address + bytes && byte < region->end; ++byte) {
        Cell& cell = region->cells[byte - region->begin];
        const bool both_atomic = access.atomic && cell.write.thread & ATOMIC;
        if (!both_atomic && !in_order(cell.write, region->shared))
            tell(*region, byte, access, "with no barrier between", "wrote", &cell.write);
        if (access.write && !in_order(cell.read, region->shared))
            tell(*region, byte, access, "with no barrier between", "read", &cell.read);
        if (access.write) {
            cell.write = now;
            continue;
        }
        if (region->shared && cell.write.interval < block_start)
            tell(*region, byte, access, "no thread of the block has written", "", nullptr);
        if (cell.read.interval != interval || cell.read.thread == thread) {
            cell.read = now;
            continue;
        }
        const unsigned reader = cell.read.thread;
        const bool one_warp = reader != SEVERAL && (reader & ONE_WARP ? reader & ~ONE_WARP : reader / warpSize) == warp;
        cell.read = now;
        cell.read.thread = one_warp ? ONE_WARP | warp : SEVERAL;
    }
}

}  // namespace

void watch(const void* begin, size_t bytes) {
    add(begin, bytes, false);
}

void unwatch(const void* begin) {
    remove(begin);
}

void watch_launch(const Launch& launch) {
    for (auto region = regions.begin(); region != regions.end();)
        if (region->second.shared) {
            free(region->second.cells);
            region = regions.erase(region);
        } else {
            ++region;
        }
    if (launch.shared_begin != launch.shared_end)
        add(launch.shared_begin, launch.shared_end - launch.shared_begin, true);
    if (launch.dynamic_bytes) add(launch.dynamic_begin, launch.dynamic_bytes, true);
    given.clear();
    launch_start = interval + 1;
    module = launch.module;
}

void watch_block() {
    watch_barrier();
    taken.clear();
    block_start = interval;
}

void watch_barrier() {
    ++interval;
    taken.insert(taken.end(), to_take.begin(), to_take.end());
    to_take.clear();
    in_interval = {~0u, ~0u, nullptr};
    memset(turns, 0, sizeof turns);
}

void watch_warp(unsigned first, unsigned lanes) {
    const unsigned left = blockDim.x * blockDim.y * blockDim.z - first;
    const unsigned whole = left < warpSize ? (1u << left) - 1 : ~0u;
    if (lanes == whole) ++turns[first / warpSize];
}

void note_atomic(const void* address, size_t bytes, const void* caller) {
    check(address, bytes, {true, true, caller});
    if (in_interval.fenced == current_thread()) given[address].push_back({block_start, interval});
    in_interval.counted = current_thread();
    in_interval.counter = address;
}

void note_fence() {
    in_interval.fenced = current_thread();
    if (in_interval.counted != current_thread()) return;
    const std::vector<Intervals>& of_others = given[in_interval.counter];
    to_take.insert(to_take.end(), of_others.begin(), of_others.end());
}

}  // namespace host_cuda

#define HOST_CUDA_ACCESS(name, bytes, write)                                           \
    extern "C" void __tsan_##name(const void* address) {                               \
        host_cuda::check(address, bytes, {write, false, __builtin_return_address(0)}); \
    }
#define HOST_CUDA_ACCESSES(bytes)                         \
    HOST_CUDA_ACCESS(read##bytes, bytes, false)           \
    HOST_CUDA_ACCESS(write##bytes, bytes, true)           \
    HOST_CUDA_ACCESS(unaligned_read##bytes, bytes, false) \
    HOST_CUDA_ACCESS(unaligned_write##bytes, bytes, true) \
    HOST_CUDA_ACCESS(volatile_read##bytes, bytes, false)  \
    HOST_CUDA_ACCESS(volatile_write##bytes, bytes, true)
HOST_CUDA_ACCESSES(1)
HOST_CUDA_ACCESSES(2)
HOST_CUDA_ACCESSES(4)
HOST_CUDA_ACCESSES(8)
HOST_CUDA_ACCESSES(16)

extern "C" void __tsan_read_range(const void* address, size_t bytes) {
    host_cuda::check(address, bytes, {false, false, __builtin_return_address(0)});
}
extern "C" void __tsan_write_range(const void* address, size_t bytes) {
    host_cuda::check(address, bytes, {true, false, __builtin_return_address(0)});
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

#else

namespace host_cuda {

void watch(const void*, size_t) {}
void unwatch(const void*) {}
void watch_launch(const Launch&) {}
void watch_block() {}
void watch_barrier() {}
void watch_warp(unsigned, unsigned) {}
void note_fence() {}

}  // namespace host_cuda

#endif
