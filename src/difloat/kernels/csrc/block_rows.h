// Rows of queries, keys and values as attention_blocks.h multiplies them: float32, or the integers of a grid as float32, side by side.
#pragma once
#include <algorithm>

#include "difloat.h"
#include "quantize.h"
#include "repeat.h"
#include "scratch.h"
#include "transpose.h"

namespace difloat {

constexpr int TILE = 12;         // queries side by side; every number of rows that a product takes divides it
constexpr int SLAB = 2 * LANES;  // keys side by side
constexpr int64_t BLOCK = 256;   // keys at a time: scores of a tile stay in the first-level cache, keys and values in the second
constexpr int64_t AHEAD = 8;     // rows between the one that is read and the one that is asked for

// body(first, count) for the panels of values: vectors side by side, three where that leaves no single one.
template <class Body>
static INLINE void every_panel(int64_t vectors, Body&& body) {
    for (int64_t v = 0, count; v < vectors; v += count) {
        const int64_t left = vectors - v;
        count = left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
        body(v, count);
    }
}

// Rows of one type. A row becomes float32 times a factor, or the integers of the grid if there is one.
template <int TYPE>
struct RowReader {
    const difloat_attention& a;
    const Rounder round;
    const bool on_grid;

    explicit RowReader(const difloat_attention& attention)
        : a(attention), round(attention.grid), on_grid(attention.operands != 0) {}

    const void* at(const void* data, int64_t element) const { return (const char*)data + element * (TYPE == DIFLOAT_F32 ? 4 : 2); }

    // Into `out`, zeros or something up to a whole vector; returns what 1 is worth. `next` is asked for.
    float read(const void* row, const void* next, float factor, float* out) const {
        for (int64_t d = 0; d < a.width; d += 64 / (TYPE == DIFLOAT_F32 ? 4 : 2)) prefetch(at(next, d));
        const float scale = on_grid ? online_scale(largest_bits<TYPE>(row, a.width), a.grid.maximum) : 1.0f;
        const F32 divisor = set(scale), by = set(factor);
        for (int64_t d = 0; d < a.width; d += LANES) {
            const int64_t left = a.width - d;
            const F32 x = left >= LANES ? load_as_float<TYPE>(row, d) : load_tail<TYPE>(row, d, left);
            store(out + d, on_grid ? to_float(round(div(x, divisor))) : mul(x, by));
        }
        return on_grid ? scale / a.grid.multiplier : 1.0f;
    }

    // `count` queries to tiles [tile][width][TILE], and what their numbers are worth. `row` is one row of scratch.
    void queries(const void* data, int64_t count, float* row, float* tiles, float* worth) const {
        const int64_t stride = a.query_stride[2];
        for (int64_t q = 0; q < round_up(count, TILE); q++) {
            float* to = tiles + q / TILE * TILE * a.width + q % TILE;
            if (q < count) worth[q] = read(at(data, q * stride), at(data, std::min(q + AHEAD, count - 1) * stride), 1.0f, row);
            for (int64_t d = 0; d < a.width; d++) to[d * TILE] = q < count ? row[d] : 0.0f;
        }
    }

    // `count` keys times a factor to slabs [slab][width][SLAB], zeros behind the last; `worth` [BLOCK]. `rows` holds a slab.
    void keys(const void* data, int64_t count, float factor, float* rows, float* slabs, float* worth) const {
        const int64_t stride = a.key_stride[2], wide = round_up(a.width, LANES);
        for (int64_t first = 0; first < count; first += SLAB) {
            for (int64_t i = 0; i < SLAB; i++) {
                const int64_t k = first + i, next = std::min(k + AHEAD, count - 1);
                if (k < count) worth[k] = read(at(data, k * stride), at(data, next * stride), factor, rows + i * wide);
                else worth[k] = 0.0f, std::fill_n(rows + i * wide, wide, 0.0f);
            }
            float* slab = slabs + first * a.width;
            for (int64_t d = 0; d < a.width; d += LANES)
                for (int64_t half = 0; half < SLAB; half += LANES) {
                    I32 r[LANES];
                    repeat<LANES>([&](auto i) UNROLLED { r[i] = load_int(rows + (half + i) * wide + d); });
                    transpose(r);
                    repeat<LANES>([&](auto i) UNROLLED {
                        if (d + i < a.width) store_int(slab + (d + i) * SLAB + half, r[i]);
                    });
                }
        }
    }

    // `count` values to panels [panel][BLOCK][vectors of the panel], zeros up to `padded` of them.
    void values(const void* data, int64_t count, int64_t padded, float* row, float* panels) const {
        const int64_t stride = a.value_stride[2], wide = round_up(a.width, LANES);
        for (int64_t k = 0; k < padded; k++) {
            float worth = 0.0f;
            if (k < count) worth = read(at(data, k * stride), at(data, std::min(k + AHEAD, count - 1) * stride), 1.0f, row);
            else std::fill_n(row, wide, 0.0f);
            every_panel(wide / LANES, [&](int64_t first, int64_t vectors) {
                float* to = panels + (first * BLOCK + k * vectors) * LANES;
                for (int64_t v = 0; v < vectors; v++)
                    store(to + v * LANES, mul(load(row + (first + v) * LANES), set(worth)));
            });
        }
    }
};

}  // namespace difloat
