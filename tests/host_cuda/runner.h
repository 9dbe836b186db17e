// What the parts of the runner share: a launch, where it stands, and the watch over its memory.
#pragma once

#include "host_cuda.h"

namespace host_cuda {

struct Launch {
    const char* kernel;
    uintptr_t module;  // where it is loaded
    void (*call)(const uint64_t* arguments);
    const uint64_t* arguments;
    uint3 grid, block;
    unsigned char* shared_begin;  // every static __shared__ array of the module
    unsigned char* shared_end;
    unsigned char* dynamic_begin;
    size_t dynamic_bytes;
};

// Runs every block of the launch, one after another; does not return if one of them is at fault.
void run(const Launch& launch);

// The thread that runs; its number within the block, and the kernel, block and thread in words.
unsigned current_thread();
const char* where();
[[noreturn]] void end_at_fault(const char* message);

// The race detector (races.cpp); it does nothing where the kernels are not built for it.
void watch(const void* begin, size_t bytes);
void unwatch(const void* begin);
void watch_launch(const Launch& launch);
void watch_block();
void watch_barrier();
void watch_warp(unsigned first, unsigned lanes);

}  // namespace host_cuda
