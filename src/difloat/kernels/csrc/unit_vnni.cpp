// The units with the vectors of AVX2 and one instruction for four products: AVX-VNNI, or the same instruction of AVX-512VL where a
// processor has that without VBMI. CMake compiles this file once for each.
#include "simd_avx2.h"
// clang-format off: every header builds on the ones before it
#include "codes_avx2.h"
#include "multiply_dot.h"
#include "exports.h"
