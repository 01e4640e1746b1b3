// Packed codes to panels: the weights of a few output channels as the product reads them, unpacked into a core's cache.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "difloat.h"
#include "repeat.h"
#include "rows.h"
#include "transpose.h"

namespace difloat {

#ifndef DIFLOAT_VECTORS_512

// LANES rows become a column block, CODES = 4 * LANES input channels at a time.
template <int BITS>
static void unpack_block(const Rows& rows, int64_t row, int64_t tap, int64_t channels, const uint8_t* table, uint8_t* panel) {
    constexpr int BYTES = CODES / 8 * BITS;
    const Table<BITS> lookup(table);
    const int64_t quads = quads_of(channels), bytes = (channels * BITS + 7) / 8;
    const uint8_t* stream[LANES];
    for (int i = 0; i < LANES; i++) stream[i] = rows.at(row + i, tap);
    for (int64_t quad = 0, at = 0; at < bytes; quad += LANES, at += BYTES) {
        I32 r[LANES];
        repeat<LANES>([&](auto i) UNROLLED { r[i] = lookup(spread<BITS>(stream[i] + at, bytes - at)); });
        transpose(r);
        repeat<LANES>([&](auto q) UNROLLED {
            if (quad + q < quads) store_int(panel + (quad + q) * WIDTH * 4, r[q]);
        });
    }
}

#endif

// How many vectors of the panel of the output channels from `first` on are in use: all, or half of them where these suffice.
static inline int vectors_of(const difloat_weight& w, int64_t first) {
    return w.rows - first > WIDTH / 2 ? VECTORS : VECTORS / 2;
}

template <int BITS>
static void unpack_all(const difloat_weight& w, const Rows& rows, int vectors, uint8_t* panel) {
    for (int64_t tap = 0; tap < w.taps; tap++) {
        uint8_t* block = panel + tap * panel_quads(w) * WIDTH * 4;
        for (int v = 0; v < vectors; v++) unpack_block<BITS>(rows, v * LANES, tap, w.channels, w.table, block + v * LANES * 4);
        if (SPARE_QUADS) memset(block + quads_of(w.channels) * WIDTH * 4, 0, SPARE_QUADS * WIDTH * 4);
    }
}

// Unpack the panel of the output channels from `first` on. `panel` is aligned to 64 bytes.
static void unpack_panel(const difloat_weight& w, int64_t first, uint8_t* panel, uint8_t* gathered) {
    const Rows rows(w, first, gathered);
    const int vectors = vectors_of(w, first);
    switch (w.bits) {
        case 1: return unpack_all<1>(w, rows, vectors, panel);
        case 2: return unpack_all<2>(w, rows, vectors, panel);
        case 3: return unpack_all<3>(w, rows, vectors, panel);
        case 4: return unpack_all<4>(w, rows, vectors, panel);
        case 5: return unpack_all<5>(w, rows, vectors, panel);
        case 6: return unpack_all<6>(w, rows, vectors, panel);
        case 7: return unpack_all<7>(w, rows, vectors, panel);
        default: return unpack_all<8>(w, rows, vectors, panel);
    }
}

// Scales (and zero points) of a panel, [group][channel]: the integers of the weight are worth `scale * unit`.
static void unpack_scales(const difloat_weight& w, int64_t first, float* scale, float* zero) {
    for (int64_t c = 0; c < WIDTH; c++) {
        const int64_t row = std::min(first + c, w.rows - 1) * w.scale_stride;
        for (int64_t g = 0; g < w.groups; g++) {
            scale[g * WIDTH + c] = w.scale[row + g] * w.unit;
            if (w.zero) zero[g * WIDTH + c] = w.zero[row + g];
        }
    }
}

// Integers of the weight of one tap, summed over the channels from `begin` to `end`, for LANES output channels.
static INLINE I32 sum_channels(const difloat_weight& w, const uint8_t* column, int64_t begin, int64_t end) {
    I32 integers = set_int(w.minimum * (int32_t)(end - begin));
    for (int64_t k = begin; k < end; k += 4) {  // ones for the channels that are there
        const I32 ones = set_int(end - k >= 4 ? 0x01010101 : (1 << 8 * (end - k)) / 255);
        integers = dot(integers, load_int(column + k * WIDTH), ones);
    }
    return integers;
}

// `factor` times the sum of the weight's integers over all taps, [group][channel]. Wraps around as the sums do that it goes into.
static void sum_integers(const difloat_weight& w, const uint8_t* panel, int32_t factor, int32_t* sums) {
    const int64_t quads = panel_quads(w);
    for (int64_t g = 0; g < w.groups; g++)
        for (int v = 0; v < VECTORS; v++) {
            const int64_t begin = g * w.group_channels, end = std::min(begin + w.group_channels, w.channels);
            int32_t* to = sums + g * WIDTH + v * LANES;
            I32 total = set_int(0);
            for (int64_t tap = 0; tap < w.taps; tap++)
                total = add_int(total, sum_channels(w, panel + (tap * quads * VECTORS + v) * LANES * 4, begin, end));
            store_int((uint8_t*)to, total);
            for (int n = 0; n < LANES; n++) to[n] = (int32_t)((uint32_t)to[n] * (uint32_t)factor);
        }
}

// Sums of the weight's integers over groups of input channels, [tap][group][channel]; as float32 in the same place if asked for.
static void sum_groups(const difloat_weight& w, const uint8_t* panel, int64_t groups, int64_t group, bool floating, int32_t* sums) {
    for (int64_t tap = 0; tap < w.taps; tap++)
        for (int64_t g = 0; g < groups; g++)
            for (int v = 0; v < VECTORS; v++) {
                const uint8_t* column = panel + (tap * panel_quads(w) * VECTORS + v) * LANES * 4;
                const I32 found = sum_channels(w, column, g * group, std::min((g + 1) * group, w.channels));
                int32_t* to = sums + (tap * groups + g) * WIDTH + v * LANES;
                store_int((uint8_t*)to, floating ? as_int(to_float(found)) : found);
            }
}

// Sum of the weight's values per tap, [tap][channel]: what a constant input of 1 gives.
static void sum_values(const difloat_weight& w, const uint8_t* panel, const float* scale, const float* zero, float* sums) {
    const int64_t quads = panel_quads(w);
    for (int64_t tap = 0; tap < w.taps; tap++)
        for (int v = 0; v < VECTORS; v++) {
            const uint8_t* column = panel + (tap * quads * VECTORS + v) * LANES * 4;
            F32 total = set(0);
            for (int64_t g = 0; g < w.groups; g++) {
                const int64_t begin = g * w.group_channels, end = std::min(begin + w.group_channels, w.channels);
                const I32 integers = sum_channels(w, column, begin, end);
                const int64_t at = g * WIDTH + v * LANES;
                total = fma(to_float(integers), load(scale + at), total);
                if (w.zero) total = fma(set((float)(end - begin)), load(zero + at), total);
            }
            store(sums + tap * WIDTH + v * LANES, total);
        }
}

}  // namespace difloat
