// Memory for what lives as long as one call.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#ifndef _WIN32
#include <unistd.h>
#endif

#include <memory>

namespace difloat {

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of a core's second-level cache.
static inline int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const int64_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (known > 0) return known;
#endif
    return 512 << 10;
}

// Memory that a thread keeps from call to call: getting pages from the system costs more than a small product.
static char* scratch(int64_t bytes) {
    static thread_local std::unique_ptr<char, decltype(&free)> memory(nullptr, free);
    static thread_local int64_t capacity = 0;
    if (bytes > capacity) {
        memory.reset();
        memory.reset((char*)aligned_alloc(4096, round_up(bytes, 4096)));
        capacity = memory ? bytes : 0;
    }
    return memory.get();
}

}  // namespace difloat
