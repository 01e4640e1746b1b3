// The functions of a unit. Every header builds on the ones before it; the unit has included its vectors, codes and products.
#pragma once
// clang-format off
#include "quantize.h"
#include "panels.h"
#include "product.h"
#include "few_rows.h"
#include "linear.h"
#include "conv.h"
#include "decode.h"
// clang-format on

namespace difloat {

// A weight as the products of this unit take it.
struct Taken {
    difloat_weight weight;
    uint8_t table[256];

    explicit Taken(const difloat_weight& w) : weight(w) {
#ifdef DIFLOAT_SIGNED_WEIGHTS
        for (int code = 0; code < 256; code++) table[code] = w.table[code] ^ 128;  // as int8: 128 less
        weight.table = table, weight.minimum += 128;
#endif
    }
};

}  // namespace difloat

EXPORT int difloat_linear(const difloat_input* x, const difloat_weight* weight, const difloat_output* out, int threads) {
    return difloat::linear(*x, difloat::Taken(*weight).weight, *out, threads);
}

EXPORT int difloat_conv2d(const difloat_input* x, const difloat_weight* weight, const difloat_output* out,
                          const difloat_geometry* geometry, int threads) {
    return difloat::conv(*x, difloat::Taken(*weight).weight, *out, *geometry, threads);
}

EXPORT int difloat_decode(const difloat_weight* weight, const float* values, void* out, int type, int threads) {
    if (type == DIFLOAT_BF16) return difloat::decode<DIFLOAT_BF16>(*weight, values, out, threads);
    if (type == DIFLOAT_F16) return difloat::decode<DIFLOAT_F16>(*weight, values, out, threads);
    return difloat::decode<DIFLOAT_F32>(*weight, values, out, threads);
}

EXPORT int difloat_round(const difloat_input* x, void* out, int threads) {
    if (x->type == DIFLOAT_BF16) difloat::round_rows<DIFLOAT_BF16>(*x, out, threads);
    else if (x->type == DIFLOAT_F16) difloat::round_rows<DIFLOAT_F16>(*x, out, threads);
    else difloat::round_rows<DIFLOAT_F32>(*x, out, threads);
    return 0;
}
