// The AVX2 unit: the shared code, compiled with the instructions that simd_avx2.h names.
#include "simd_avx2.h"
// clang-format off: every header builds on the ones before it
#include "codes_avx2.h"
#include "multiply_pairs.h"
#include "exports.h"
