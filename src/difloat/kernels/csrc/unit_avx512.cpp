// The AVX-512 unit: the shared code, compiled with the instructions that simd_avx512.h names.
#include "simd_avx512.h"
// clang-format off: every header builds on the ones before it
#include "quantize.h"
#include "panels.h"
#include "product.h"
#include "few_rows.h"
#include "linear.h"
#include "conv.h"
#include "decode.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int difloat_linear(const difloat_input* x, const difloat_weight* bands, int count, const difloat_output* out, int threads) {
    return difloat::linear(*x, bands, count, *out, threads);
}

EXPORT int difloat_conv2d(const difloat_input* x, const difloat_weight* bands, int count, const difloat_output* out,
                          const difloat_geometry* geometry, int threads) {
    return difloat::conv(*x, bands, count, *out, *geometry, threads);
}

EXPORT int difloat_decode(const difloat_weight* weight, const float* values, const int32_t* channel, void* out, int type, int threads) {
    if (type == DIFLOAT_BF16) return difloat::decode<DIFLOAT_BF16>(*weight, values, channel, out, threads);
    if (type == DIFLOAT_F16) return difloat::decode<DIFLOAT_F16>(*weight, values, channel, out, threads);
    return difloat::decode<DIFLOAT_F32>(*weight, values, channel, out, threads);
}

EXPORT int difloat_round(const difloat_input* x, void* out, int threads) {
    if (x->type == DIFLOAT_BF16) difloat::round_rows<DIFLOAT_BF16>(*x, out, threads);
    else if (x->type == DIFLOAT_F16) difloat::round_rows<DIFLOAT_F16>(*x, out, threads);
    else difloat::round_rows<DIFLOAT_F32>(*x, out, threads);
    return 0;
}
