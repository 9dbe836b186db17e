// A device of one process: loads modules, holds arrays, launches kernels, as it is told on its standard input.
//
//   load PATH                                      -> ok
//   alloc BYTES                                    -> ok ADDRESS
//   free ADDRESS                                   -> ok
//   write ADDRESS BYTES, then the bytes            -> ok
//   read ADDRESS BYTES                             -> ok, then the bytes
//   types PATH KERNEL                              -> ok TYPES
//   launch PATH KERNEL SHARED gx gy gz bx by bz N, then N arguments of 8 bytes  -> ok
//
// A fault ends the process; what it was stands on its standard error.
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include <map>
#include <string>
#include <vector>

#include "runner.h"

namespace {

using host_cuda::Entry;

std::map<std::string, void*> modules;
bool launching = false;

// The sanitizers abort when they have said what is wrong (device.py asks them to).
void say_where(int) {
    host_cuda::end_at_fault(launching ? host_cuda::where() : "outside of any kernel");
}

void read_whole(void* to, size_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != bytes) host_cuda::end_at_fault("a request that breaks off");
}

void* find(const char* module, const std::string& name) {
    return dlsym(modules.at(module), name.c_str());
}

const Entry* entry_of(const char* module, const char* kernel) {
    const void* found = find(module, std::string("host_cuda_entry_") + kernel);
    if (!found) host_cuda::end_at_fault((std::string(module) + " has no kernel " + kernel).c_str());
    return static_cast<const Entry*>(found);
}

void load(const char* path) {
    if (!modules.count(path)) modules[path] = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!modules[path]) host_cuda::end_at_fault(dlerror());
}

void launch(const char* line) {
    char path[4096], kernel[256];
    size_t shared, count;
    uint3 grid, block;
    if (sscanf(line, "launch %4095s %255s %zu %u %u %u %u %u %u %zu", path, kernel, &shared, &grid.x, &grid.y, &grid.z,
               &block.x, &block.y, &block.z, &count) != 10)
        host_cuda::end_at_fault("a launch that cannot be read");
    std::vector<uint64_t> arguments(count);
    read_whole(arguments.data(), count * sizeof(uint64_t));
    auto* const begin = static_cast<unsigned char**>(find(path, "host_cuda_shared"));
    auto* const dynamic = static_cast<unsigned char*>(malloc(shared));
    const Entry* const entry = entry_of(path, kernel);
    Dl_info module;
    dladdr(reinterpret_cast<const void*>(entry->call), &module);
    launching = true;
    host_cuda::run({kernel, reinterpret_cast<uintptr_t>(module.dli_fbase), entry->call, arguments.data(), grid, block,
                    begin[0], begin[1], dynamic, shared});
    launching = false;
    free(dynamic);
}

}  // namespace

int main() {
    signal(SIGABRT, say_where);
    char line[8192];
    while (fgets(line, sizeof line, stdin)) {
        char path[4096], kernel[256];
        unsigned long address = 0;
        size_t bytes = 0;
        if (sscanf(line, "load %4095s", path) == 1) {
            load(path);
            printf("ok\n");
        } else if (sscanf(line, "types %4095s %255s", path, kernel) == 2) {
            printf("ok %s\n", entry_of(path, kernel)->types);
        } else if (sscanf(line, "alloc %zu", &bytes) == 1) {
            void* const array = malloc(bytes);
            memset(array, 0xFF, bytes);  // NaN: what nothing has written shows
            host_cuda::watch(array, bytes);
            printf("ok %lu\n", reinterpret_cast<unsigned long>(array));
        } else if (sscanf(line, "free %lu", &address) == 1) {
            host_cuda::unwatch(reinterpret_cast<void*>(address));
            free(reinterpret_cast<void*>(address));
            printf("ok\n");
        } else if (sscanf(line, "write %lu %zu", &address, &bytes) == 2) {
            read_whole(reinterpret_cast<void*>(address), bytes);
            printf("ok\n");
        } else if (sscanf(line, "read %lu %zu", &address, &bytes) == 2) {
            printf("ok\n");
            fwrite(reinterpret_cast<void*>(address), 1, bytes, stdout);
        } else {
            launch(line);
            printf("ok\n");
        }
        fflush(stdout);
    }
}
