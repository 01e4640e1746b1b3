// What this machine can run; compiled for any processor of its kind.
#include "compiler.h"
#include "difloat.h"
#include "tile_permission.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

EXPORT int difloat_abi() { return DIFLOAT_ABI; }

#if defined(__x86_64__)

EXPORT int difloat_has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

EXPORT int difloat_has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Not every compiler has a name for it: leaf 7, subleaf 1, bit 4 of EAX.
static bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

EXPORT int difloat_has_avx512vl() {
    return difloat_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

EXPORT int difloat_has_avxvnni() { return difloat_has_avx2() && has_avxvnni(); }

EXPORT int difloat_has_avx512_bf16() { return difloat_has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMX for bytes, which Linux must permit: leaf 7, bits 24 and 25 of EDX.
static bool has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3 && difloat_has_avx512_bf16();
}

EXPORT int difloat_has_amx() { return has_tiles() && difloat::tiles_permitted(); }

EXPORT int difloat_refuses_amx() { return has_tiles() && !difloat::tiles_permitted(); }

EXPORT int difloat_has_neon() { return 0; }

#else

EXPORT int difloat_has_amx() { return 0; }
EXPORT int difloat_refuses_amx() { return 0; }
EXPORT int difloat_has_avx512() { return 0; }
EXPORT int difloat_has_avx512vl() { return 0; }
EXPORT int difloat_has_avxvnni() { return 0; }
EXPORT int difloat_has_avx2() { return 0; }
EXPORT int difloat_has_avx512_bf16() { return 0; }

#if defined(__aarch64__) && defined(__linux__)
EXPORT int difloat_has_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }  // with the dot product
#else
EXPORT int difloat_has_neon() { return 0; }
#endif

#endif
