// What this machine can run; compiled for any x86-64.
#include "difloat.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int difloat_abi() { return DIFLOAT_ABI; }

EXPORT int difloat_has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

EXPORT int difloat_has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

EXPORT int difloat_has_avx512_bf16() { return difloat_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
