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
#include "rotate.h"
#include "attention_blocks.h"
// clang-format on

namespace difloat {

// The bands of a weight as the products of this unit take them.
struct Taken {
#ifdef DIFLOAT_SIGNED_WEIGHTS
    std::vector<difloat_weight> moved;
    std::vector<uint8_t> tables;
    const difloat_weight* bands;

    Taken(const difloat_weight* given, int count) : moved(given, given + count), tables(256 * count), bands(moved.data()) {
        for (int b = 0; b < count; b++) {  // as int8: 128 less
            uint8_t* table = tables.data() + 256 * b;
            for (int code = 0; code < 256; code++) table[code] = given[b].table[code] ^ 128;
            moved[b].table = table, moved[b].minimum += 128;
        }
    }
#else
    const difloat_weight* bands;

    Taken(const difloat_weight* given, int) : bands(given) {}
#endif
};

}  // namespace difloat

EXPORT int difloat_linear(const difloat_input* x, const difloat_weight* bands, int count, const difloat_output* out, int threads) {
    return difloat::linear(*x, difloat::Taken(bands, count).bands, count, *out, threads);
}

EXPORT int difloat_conv2d(const difloat_input* x, const difloat_weight* bands, int count, const difloat_output* out,
                          const difloat_geometry* geometry, int threads) {
    return difloat::conv(*x, difloat::Taken(bands, count).bands, count, *out, *geometry, threads);
}

EXPORT int difloat_decode(const difloat_weight* weight, const float* values, const int32_t* channel, void* out, int type, int threads) {
    if (type == DIFLOAT_BF16) return difloat::decode<DIFLOAT_BF16>(*weight, values, channel, out, threads);
    if (type == DIFLOAT_F16) return difloat::decode<DIFLOAT_F16>(*weight, values, channel, out, threads);
    return difloat::decode<DIFLOAT_F32>(*weight, values, channel, out, threads);
}

EXPORT int difloat_rotate(const float* x, float* out, int64_t rows, int64_t channels, int64_t block, float factor, const float* signs,
                          const int32_t* order, int threads) {
    return difloat::rotate(x, out, rows, channels, block, factor, signs, order, threads);
}

EXPORT int difloat_round(const difloat_input* x, void* out, int threads) {
    if (x->type == DIFLOAT_BF16) difloat::round_rows<DIFLOAT_BF16>(*x, out, threads);
    else if (x->type == DIFLOAT_F16) difloat::round_rows<DIFLOAT_F16>(*x, out, threads);
    else difloat::round_rows<DIFLOAT_F32>(*x, out, threads);
    return 0;
}

EXPORT int difloat_attend(const difloat_attention* attention, int threads) { return difloat::attention(*attention, threads); }
