// Rows of queries, keys and values as the products of attention read them: as they are, or on a grid with one scale per row.
//
// A grid that fits int8 gives int8 queries and keys; keys are moved by 128 to become the unsigned operand, which a start value of
// -128 times the sum of the query takes back. Any other grid's integers have at most 8 significant bits, so bfloat16 holds them.
// Values are written as bfloat16 with their scale multiplied in: it differs from key to key and cannot come after the sum.
#pragma once
#include <algorithm>

#include "difloat.h"
#include "quantize.h"
#include "repeat.h"
#include "scratch.h"
#include "softmax.h"
#include "transpose.h"

namespace difloat {

constexpr int64_t COLUMNS = 64;  // of a panel
constexpr int32_t KEY_OFFSET = 128;
enum { OPERANDS_AS_THEY_ARE = 0, OPERANDS_INT8 = 1, OPERANDS_BFLOAT = 2 };

// Dwords of inner elements of a query or key.
static inline int64_t dwords_of(const difloat_attention& a) {
    return a.operands == OPERANDS_INT8 ? (a.width + 3) / 4 : (a.width + 1) / 2;
}

// Bytes of one row in scratch, whatever it holds; whole vectors are written.
static inline int64_t row_stride(const difloat_attention& a) { return 2 * round_up(a.width, 2 * LANES); }

static INLINE __mmask32 first_words(int64_t count) {
    return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

// Ask for a row that is needed soon: rows of one head lie far apart, so the machine does not foresee them.
static INLINE void expect_row(const uint16_t* row, int64_t width) {
    for (int64_t d = 0; d < width; d += 32) _mm_prefetch((const char*)(row + d), _MM_HINT_T0);
    _mm_prefetch((const char*)(row + width - 1), _MM_HINT_T0);
}

struct RowRounder {
    difloat_input input = {};
    int64_t width;
    int kind;
    Rounder round;

    explicit RowRounder(const difloat_attention& a) : width(a.width), kind(a.operands), round(a.grid) {
        input.grid = a.grid;
        input.online = 1;
    }

    float scale_of(const uint16_t* row) const {
        return online_scale(largest_bits<DIFLOAT_BF16>(row, width), input.grid.maximum);
    }

    // A query or key into `out`; returns what one of its numbers is worth, and the sum of its integers if they are int8.
    float operand(const uint16_t* row, char* out, int32_t* sum) const {
        *sum = 0;
        if (kind == OPERANDS_INT8)
            return quantize_row<DIFLOAT_BF16>(row, width, input, round, {scale_of(row), 0.0f}, width, (int8_t*)out, sum);
        if (kind == OPERANDS_BFLOAT) {
            const float scale = scale_of(row);
            to_bfloat(row, scale, 1.0f, (uint16_t*)out);
            return scale / input.grid.multiplier;
        }
        memcpy(out, row, width * 2);
        if (width % 2) memset(out + width * 2, 0, 2);  // an odd width needs a zero behind it
        return 1.0f;
    }

    // A value row into `out`.
    void values(const uint16_t* row, uint16_t* out) const {
        const float scale = scale_of(row);
        to_bfloat(row, scale, scale / input.grid.multiplier, out);
    }

   private:
    // out = integer * factor; zeros up to a whole vector.
    void to_bfloat(const uint16_t* row, float scale, float factor, uint16_t* out) const {
        const F32 divisor = set(scale), by = set(factor);
        for (int64_t d = 0; d < width; d += LANES) {
            const F32 x = width - d >= LANES ? load_bfloat(row + d) : load_tail<DIFLOAT_BF16>(row, d, width - d);
            store_bfloat(out + d, mul(to_float(round(div(x, divisor))), by));
        }
    }
};

// Keys to panels [keys / 64][dword][64 keys]: sixteen keys and sixteen dwords at a time, transposed in registers. Keys beyond the
// last hold something; their scores are not used. `stride` in bytes.
static void pack_keys(const difloat_attention& a, const char* keys, int64_t stride, char* panels) {
    const int64_t dwords = dwords_of(a), words = a.operands == OPERANDS_INT8 ? dwords * 2 : a.width;
    const I32 move = set_int(a.operands == OPERANDS_INT8 ? (int32_t)0x80808080 : 0);
    for (int64_t k = 0; k < round_up(a.keys, COLUMNS); k += 16)
        for (int64_t d = 0; d < dwords; d += 16) {
            I32 r[16];
            repeat<16>([&](auto i) UNROLLED {
                const __mmask32 there = k + i < a.keys ? first_words(words - 2 * d) : 0;
                r[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi16(there, keys + (k + i) * stride + 4 * d), move);
            });
            transpose(r);
            char* to = panels + (k / COLUMNS * dwords * COLUMNS + k % COLUMNS) * 4;
            repeat<16>([&](auto p) UNROLLED {
                if (d + p < dwords) store_int(to + (d + p) * COLUMNS * 4, r[p]);
            });
        }
}

}  // namespace difloat
