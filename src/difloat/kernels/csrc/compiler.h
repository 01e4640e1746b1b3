// What compilers call differently: everything that is not standard C++ but for vectors stands here.
#pragma once
#include <stdint.h>

#ifdef _MSC_VER
#include <xmmintrin.h>
#define INLINE inline
#define NOINLINE __declspec(noinline)
#define UNROLLED
#define UNROLL_FOUR
#define EXPORT extern "C" __declspec(dllexport)
#else
#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLLED __attribute__((always_inline))
#define UNROLL_FOUR _Pragma("GCC unroll 4")
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace difloat {

// Ask for the cache line that holds `p`; it need not exist.
static INLINE void prefetch(const void* p) {
#ifdef _MSC_VER
    _mm_prefetch((const char*)p, _MM_HINT_T0);
#else
    __builtin_prefetch(p);
#endif
}

}  // namespace difloat
