// Scores of queries and keys on a grid that fits int8: exact sums, multiplied as the unit multiplies the layers of a model.
//
// Keys take the part of the weight: bytes less the lowest integer of the grid, so that they are unsigned, in panels of WIDTH keys. Sums
// start at the lowest integer times the sum of the query.
#pragma once
#include <string.h>

#include <algorithm>

#include "block_rows.h"
#include "difloat.h"
#include "panels.h"
#include "repeat.h"

namespace difloat {

template <int TYPE>
struct IntegerRows {
    const difloat_attention& a;
    const Rounder& round;
    difloat_input input = {};
    difloat_weight weight = {};  // what a multiplier asks about: the largest byte of a key
    uint8_t span;
    int32_t lowest, highest, offset;  // of the grid, and what keys are moved by
    int64_t quads, stride, panel;     // bytes of a row and of a panel

    IntegerRows(const difloat_attention& attention, const Rounder& rounder) : a(attention), round(rounder) {
        input.grid = a.grid, input.online = 1;
        lowest = (int32_t)(a.grid.minimum * a.grid.multiplier), highest = (int32_t)(a.grid.maximum * a.grid.multiplier);
#ifdef DIFLOAT_SIGNED_WEIGHTS
        offset = 0;
#else
        offset = lowest;
#endif
        span = (uint8_t)(highest - lowest), weight.table = &span;
        quads = quads_of(a.width), stride = round_up(a.width, 16), panel = quads * WIDTH * 4 * MOST_SPREAD;
    }
    IntegerRows(const IntegerRows&) = delete;  // the weight points into it

    // Whether the product is faster than one of float32, which is exact for these integers, too.
    bool pay() const { return faster_than_float(weight, lowest, highest); }

    // One row to int8, zeros behind it, and the sum of its integers; returns what 1 is worth.
    float read(const void* row, int8_t* out, int32_t* sum) const {
        const float scale = online_scale(largest_bits<TYPE>(row, a.width), a.grid.maximum);
        memset(out + stride - 16, 0, 16);
        return quantize_row<TYPE>(row, a.width, input, round, {scale, 0.0f}, a.width, out, sum);
    }

    // `count` queries to rows, with zeros up to a whole tile; what their numbers are worth and where their sums start.
    void queries(const void* data, int64_t count, int8_t* rows, float* worth, int32_t* start) const {
        constexpr int64_t size = TYPE == DIFLOAT_F32 ? 4 : 2;
        for (int64_t q = 0; q < count; q++) {
            worth[q] = read((const char*)data + q * a.query_stride[2] * size, rows + q * stride, start + q);
            start[q] *= offset;
        }
        memset(rows + count * stride, 0, (round_up(count, TILE) - count) * stride);
        std::fill_n(start + count, round_up(count, TILE) - count, 0);
    }

    // `count` keys to panels; zeros behind the last. `rows` holds a panel's.
    void keys(const void* data, int64_t count, int8_t* rows, uint8_t* panels, float* worth) const {
        constexpr int64_t size = TYPE == DIFLOAT_F32 ? 4 : 2;
        for (int64_t first = 0; first < count; first += WIDTH) {
            uint8_t* to = panels + first / WIDTH * panel;
            for (int64_t i = 0; i < WIDTH; i++) {
                const int64_t k = first + i, next = std::min(k + AHEAD, count - 1);
                int8_t* row = rows + i * stride;
                int32_t sum;
                for (int64_t d = 0; d < a.width * size; d += 64) prefetch((const char*)data + next * a.key_stride[2] * size + d);
                worth[k] = k < count ? read((const char*)data + k * a.key_stride[2] * size, row, &sum) : 0.0f;
                if (k >= count) memset(row, 0, stride);
                for (int64_t d = 0; d < stride; d++) row[d] = (int8_t)(row[d] - offset);
            }
            for (int64_t q = 0; q < quads; q += LANES)
                for (int64_t i = 0; i < WIDTH; i += LANES) {
                    I32 r[LANES];
                    repeat<LANES>([&](auto n) UNROLLED {
                        alignas(64) int32_t dwords[LANES] = {};
                        memcpy(dwords, rows + (i + n) * stride + 4 * q, 4 * std::min<int64_t>(LANES, quads - q));
                        r[n] = load_int(dwords);
                    });
                    transpose(r);
                    repeat<LANES>([&](auto n) UNROLLED {
                        if (q + n < quads) store_int(to + ((q + n) * WIDTH + i) * 4, r[n]);
                    });
                }
            with_multiplier(weight, lowest, highest, [&](const auto& multiplier) { multiplier.prepare(to, quads * WIDTH * 4); });
        }
    }

    // Scores of `rows` queries (rounded up to whole tiles of the product) by `padded` keys.
    void scores(const int8_t* queries, const int32_t* start, int64_t rows, const uint8_t* panels, int64_t padded, float* out,
                int64_t out_stride) const {
        with_multiplier(weight, lowest, highest, [&](const auto& multiplier) {
            for (int64_t k = 0; k < padded; k += WIDTH)
                for (int64_t i = 0; i < rows; i += TILE_ROWS)
                    product(multiplier, queries + i * stride, start + i, panels + k / WIDTH * panel, out + i * out_stride + k, out_stride);
        });
    }

   private:
    template <class Multiplier>
    NOINLINE void product(const Multiplier& multiplier, const int8_t* queries, const int32_t* start, const uint8_t* keys, float* out,
                          int64_t out_stride) const {
        const int8_t* rows[TILE_ROWS];
        I32 acc[TILE_ROWS][VECTORS];
        repeat<TILE_ROWS>([&](auto i) UNROLLED {
            rows[i] = queries + i * stride;
            repeat<VECTORS>([&](auto v) UNROLLED { acc[i][v] = set_int(start[i]); });
        });
        multiplier.template accumulate<TILE_ROWS, VECTORS>(acc, rows, 0, quads, keys);
        repeat<TILE_ROWS>([&](auto i) UNROLLED {
            repeat<VECTORS>([&](auto v) UNROLLED { store(out + i * out_stride + v * LANES, to_float(acc[i][v])); });
        });
    }
};

}  // namespace difloat
