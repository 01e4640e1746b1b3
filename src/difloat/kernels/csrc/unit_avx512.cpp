// The AVX-512 unit: the shared code, compiled with the instructions that simd_avx512.h names.
#include "simd_avx512.h"
// clang-format off: every header builds on the ones before it
#include "codes_avx512.h"
#include "multiply_dot.h"
#include "exports.h"
