// The attention unit: AVX-512 with BF16.
#include "simd_avx512.h"
// clang-format off: the header builds on the one before it
#include "attention.h"

EXPORT int difloat_attend(const difloat_attention* attention, int threads) { return difloat::attention(*attention, threads); }
