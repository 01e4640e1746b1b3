// The AMX unit: that of AVX-512, with its products in tiles.
#define DIFLOAT_TILES
#include "simd_avx512.h"
// clang-format off: every header builds on the ones before it
#include "codes_avx512.h"
#include "multiply_dot.h"
#include "exports.h"
