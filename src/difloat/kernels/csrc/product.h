// The product: exact integer sums of a few rows by one panel, then scales and bias. Serves linear layers and convolutions alike.
#pragma once
#include <omp.h>
#include <string.h>

#include <type_traits>

#include "difloat.h"
#include "repeat.h"
#include "scratch.h"

namespace difloat {

// Activations as integers, and what belongs to every row of the result.
struct Operand {
    const int8_t* values;
    const int64_t* start;     // [rows] where a row begins (its first tap, in a convolution)
    const int32_t* sums;      // [rows, groups] of the integers
    const float* scale;       // [rows]
    const int32_t* bias_row;  // [rows] which row of the bias table; null: the first
    int64_t rows;
    const int64_t* taps;  // [taps of the weight] distance of the taps
    int32_t shift;        // integers are this much below what they stand for
    float origin;         // value of the integer 0 before the shift
    int32_t lowest, highest;  // possible integers
};

// Bias of every class of rows, [classes][WIDTH]; `inside` says which taps see the picture.
struct Classes {
    int64_t count;
    const uint8_t* inside;  // [count, taps]
};

// What a panel needs besides its weights.
struct Panel {
    uint8_t* weights;
    float *scale, *zero, *bias, *tap_sums;
    int32_t* shifted;  // [groups][WIDTH] the shift times the sum of the weight's integers
    uint8_t* gathered;
};

template <int TYPE>
static inline void write(void* out, int64_t at, F32 value) {
    if (TYPE == DIFLOAT_F32) return store((float*)out + at, value);
    if (TYPE == DIFLOAT_F16) return store_half((uint16_t*)out + at, value);
    // bfloat16: ties to even; a NaN keeps its upper half and stays one.
    const I32 bits = as_int(value), low = shift_right<16>(bits);
    const I32 rounded = shift_right<16>(add_int(add_int(bits, set_int(0x7fff)), bits_and(low, set_int(1))));
    store_low16((uint16_t*)out + at, as_int(select(equal(value, value), as_float(rounded), as_float(bits_or(low, set_int(64))))));
}

// `count` numbers to row `row` of the result, for the rows of the weight from `first` on.
template <int TYPE>
static inline void copy_row(const difloat_output& out, int64_t row, int64_t first, int64_t count, const char* numbers) {
    using Number = std::conditional_t<TYPE == DIFLOAT_F32, uint32_t, uint16_t>;
    char* to = (char*)out.data + row * out.stride * sizeof(Number);
    if (!out.channel) {
        memcpy(to + first * sizeof(Number), numbers, count * sizeof(Number));
        return;
    }
    for (int64_t n = 0; n < count; n++) memcpy(to + out.channel[first + n] * sizeof(Number), numbers + n * sizeof(Number), sizeof(Number));
}

// Likewise of at most USED vectors of sums; a whole vector at a time where there is room for it.
template <int TYPE, int USED>
static inline void write_row(const difloat_output& out, int64_t row, int64_t first, int64_t count, const F32 (&values)[USED]) {
    if (count >= USED * LANES && !out.channel) {
        for (int v = 0; v < USED; v++) write<TYPE>(out.data, row * out.stride + first + v * LANES, values[v]);
        return;
    }
    alignas(64) char buffer[USED * LANES * 4];
    for (int v = 0; v < USED; v++) write<TYPE>(buffer, v * LANES, values[v]);
    copy_row<TYPE>(out, row, first, std::min<int64_t>(count, USED * LANES), buffer);
}

// The result from row `row` on, for a band of the weight that has `start` rows before it.
template <int TYPE>
static inline difloat_output part_of(difloat_output out, int64_t row, int64_t start) {
    const int64_t size = TYPE == DIFLOAT_F32 ? 4 : 2;
    out.data = (char*)out.data + (row * out.stride + (out.channel ? 0 : start)) * size;
    if (out.channel) out.channel += start;
    else if (out.bias) out.bias += start;
    return out;
}

// ROWS rows by the first USED vectors of one panel, from `row` on. Sums of a group are exact; groups are added up in float32.
template <int ROWS, int TYPE, int USED, class Multiplier>
static NOINLINE void tile(const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const Panel& p, int64_t row,
                          int64_t first, const difloat_output& out) {
    const int8_t* rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = x.values + x.start[row + i];
    const int64_t quads = quads_of(w.channels), group_quads = (w.group_channels + 3) / 4;
    alignas(64) float total[ROWS][USED][LANES] = {};
    const uint8_t* weights = p.weights;
    for (int64_t g = 0; g < w.groups; g++) {
        I32 acc[ROWS][USED];
        int32_t sums[ROWS];
        repeat<ROWS>([&](auto i) UNROLLED {
            sums[i] = x.sums[(row + i) * w.groups + g];
            repeat<USED>([&](auto v) UNROLLED { acc[i][v] = set_int(w.minimum * sums[i]); });
        });
        if (x.shift) {
            const int64_t there = std::min(w.group_channels, w.channels - g * w.group_channels);
            repeat<ROWS>([&](auto i) UNROLLED {
                sums[i] += x.shift * (int32_t)(there * w.taps);
                repeat<USED>([&](auto v) UNROLLED {
                    acc[i][v] = add_int(acc[i][v], load_int((const uint8_t*)(p.shifted + g * WIDTH + v * LANES)));
                });
            });
        }
        const int64_t count = w.taps == 1 ? std::min(group_quads, quads - g * group_quads) : quads;
        for (int64_t t = 0; t < w.taps; t++, weights += count * WIDTH * 4 * Multiplier::SPREAD)
            multiplier.template accumulate<ROWS, USED>(acc, rows, x.taps[t] + g * group_quads * 4, count, weights);
        repeat<ROWS>([&](auto i) UNROLLED {
            repeat<USED>([&](auto v) UNROLLED {
                const int64_t at = g * WIDTH + v * LANES;
                F32 value = fma(to_float(acc[i][v]), load(p.scale + at), load(total[i][v]));
                if (w.zero) value = fma(set((float)sums[i]), load(p.zero + at), value);
                store(total[i][v], value);
            });
        });
    }
    for (int i = 0; i < ROWS; i++) {
        const F32 scale = set(x.scale[row + i]);
        const float* bias = p.bias + (x.bias_row ? x.bias_row[row + i] : 0) * WIDTH;
        F32 values[USED];
        for (int v = 0; v < USED; v++) values[v] = fma(load(total[i][v]), scale, load(bias + v * LANES));
        write_row<TYPE, USED>(out, row + i, first, w.rows - first, values);
    }
}

template <int ROWS, int TYPE, int USED, class Multiplier>
static void tile_of(int64_t rows, const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const Panel& p,
                    int64_t row, int64_t first, const difloat_output& out) {
    if (rows == ROWS) return tile<ROWS, TYPE, USED>(multiplier, w, x, p, row, first, out);
    if constexpr (ROWS > 1) tile_of<ROWS - 1, TYPE, USED>(rows, multiplier, w, x, p, row, first, out);
}

// All rows from `begin` to `end` by one panel, in tiles of nearly equal height.
template <int TYPE, int USED>
static void stripe(const difloat_weight& w, const Operand& x, const Panel& p, int64_t begin, int64_t end, int64_t first,
                   const difloat_output& out) {
    with_multiplier(w, x.lowest, x.highest, [&](const auto& multiplier) {
        multiplier.prepare(p.weights, panel_bytes(w));
        int64_t row = begin;
        for (int64_t tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS; tiles > 0; tiles--) {
            const int64_t rows = (end - row + tiles - 1) / tiles;
            tile_of<TILE_ROWS, TYPE, USED>(rows, multiplier, w, x, p, row, first, out);
            row += rows;
        }
    });
}

// Bias table of a panel: the bias, and the origin times the weights of the taps that see the input. And the sums that take back
// the shift of the activations.
static void make_bias(const difloat_weight& w, const Operand& x, const Classes& classes, const difloat_output& out, int64_t first,
                      const Panel& p) {
    if (x.shift) sum_integers(w, p.weights, x.shift, p.shifted);
    if (x.origin != 0) sum_values(w, p.weights, p.scale, p.zero, p.tap_sums);
    for (int64_t c = 0; c < classes.count; c++)
        for (int64_t n = 0; n < WIDTH; n++) {
            float value = out.bias && first + n < w.rows ? out.bias[out.channel ? out.channel[first + n] : first + n] : 0.0f;
            for (int64_t t = 0; x.origin != 0 && t < w.taps; t++)
                if (!classes.inside || classes.inside[c * w.taps + t]) value += x.origin * p.tap_sums[t * WIDTH + n];
            p.bias[c * WIDTH + n] = value;
        }
}

// Bytes of one thread's panel; `place` fills in where its pieces lie.
static int64_t place(const difloat_weight& w, const Classes& classes, char* base, Panel* panel) {
    char* at = base;
    auto take = [&at](int64_t bytes) {
        char* begin = at;
        at += round_up(bytes, 64);
        return begin;
    };
    const int64_t row = WIDTH * sizeof(float);
    Panel p;
    p.weights = (uint8_t*)take(MOST_SPREAD * panel_bytes(w));
    p.scale = (float*)take(w.groups * row);
    p.zero = (float*)take(w.zero ? w.groups * row : 0);
    p.bias = (float*)take(classes.count * row);
    p.tap_sums = (float*)take(w.taps * row);
    p.shifted = (int32_t*)take(w.groups * row);
    p.gathered = (uint8_t*)take(gather_bytes(w));
    if (panel) *panel = p;
    return round_up(at - base, 4096);
}

// Bytes of one thread's panel that serves every band.
static int64_t place_bands(const difloat_weight* bands, int64_t count, const Classes& classes) {
    int64_t most = 0;
    for (int64_t b = 0; b < count; b++) most = std::max(most, place(bands[b], classes, nullptr, nullptr));
    return most;
}

constexpr int64_t FEWEST_IN_BLOCK = 64;  // rows; unpacking a panel costs about as much as multiplying four

// The whole product. Rows are cut into blocks that stay in the second-level cache while all panels pass. Panels are shared out among the threads; where there are too few, the rows are cut as well.
template <int TYPE>
static void product(const difloat_weight& w, const Operand& x, const Classes& classes, const difloat_output& out, char* scratch,
                    int threads) {
    const int64_t panels = (w.rows + WIDTH - 1) / WIDTH, bytes = place(w, classes, nullptr, nullptr);
    int64_t cuts = 1;
    if (panels % threads && panels < 8 * threads) cuts = std::min<int64_t>(threads, (x.rows + 31) / 32);
    const int64_t reach = x.rows ? x.start[x.rows - 1] - x.start[0] : 0;  // bytes of activations
    const int64_t block = second_level_cache() / 2;
    cuts = std::max(cuts, std::min((reach + block - 1) / block, x.rows / FEWEST_IN_BLOCK));
#pragma omp parallel num_threads(threads)
    {
        Panel p;
        place(w, classes, scratch + omp_get_thread_num() * bytes, &p);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < panels * cuts; task++) {
            const int64_t first = task % panels * WIDTH, cut = task / panels;
            unpack_panel(w, first, p.weights, p.gathered);
            unpack_scales(w, first, p.scale, p.zero);
            make_bias(w, x, classes, out, first, p);
            const int64_t begin = x.rows * cut / cuts, end = x.rows * (cut + 1) / cuts;
            if (vectors_of(w, first) == VECTORS) stripe<TYPE, VECTORS>(w, x, p, begin, end, first, out);
            else stripe<TYPE, VECTORS / 2>(w, x, p, begin, end, first, out);
        }
    }
}

}  // namespace difloat
