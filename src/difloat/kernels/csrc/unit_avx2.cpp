// The AVX2 unit: the shared code, compiled with the instructions that simd_avx2.h names.
#include "simd_avx2.h"
// clang-format off: every header builds on the ones before it
#include "quantize.h"
#include "panels.h"
#include "product.h"
#include "linear.h"
#include "conv.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int difloat_linear(const difloat_input* x, const difloat_weight* bands, int count, const difloat_output* out, int threads) {
    return difloat::linear(*x, bands, count, *out, threads);
}

EXPORT int difloat_conv2d(const difloat_input* x, const difloat_weight* bands, int count, const difloat_output* out,
                          const difloat_geometry* geometry, int threads) {
    return difloat::conv(*x, bands, count, *out, *geometry, threads);
}
