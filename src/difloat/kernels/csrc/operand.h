// The operands of a product, and where its results go.
#pragma once
#include <string.h>

#include <type_traits>

#include "difloat.h"
#include "panels.h"

namespace difloat {

// Activations as integers, and what belongs to every row of the result.
struct Operand {
    const int8_t* values;
    const int64_t* start;     // [rows] where a row begins (its first tap, in a convolution)
    int64_t apart, run;       // `run` rows lie `apart` bytes from each other, and the next `run` rows again
    const int32_t* sums;      // [rows, groups] of the integers
    int64_t groups, group;    // of channels that are summed up exactly: how many, and channels of each
    const float* scale;       // [rows]
    const float* steps;       // [rows, groups] what an integer of 1 is worth; null: `scale` alone says it
    const float* zeros;       // likewise, what the integer 0 stands for; null: 0, or it is part of the bias
    const int32_t* step_row;  // [rows] which row of the steps; null: each its own
    const int32_t* bias_row;  // [rows] which row of the bias table; null: the first
    int64_t rows;
    const int64_t* taps;  // [taps of the weight] distance of the taps
    int32_t shift;        // integers are this much below what they stand for
    float origin;         // value of the integer 0 before the shift
    int32_t lowest, highest;  // possible integers
};

// Bias of every class of rows of every picture, [pictures][classes][WIDTH]; `inside` says which taps see the picture.
struct Classes {
    int64_t count;
    const uint8_t* inside;  // [count, taps]
    int64_t pictures;
    const float* zeros;  // [pictures, groups of the activations] what the integer 0 stands for, or null
};

// What a panel needs besides its weights.
struct Panel {
    uint8_t* weights;
    float *scale, *zero, *bias, *tap_sums;
    int32_t* shifted;  // [groups][WIDTH] the shift times the sum of the weight's integers
    int32_t* group_sums;  // [taps][groups of the activations][WIDTH] of the weight's integers, where zeros need them
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
    const int32_t* channel = out.channel + first;  // the compiler cannot know that results do not change the pointer
    for (int64_t n = 0; n < count; n++) memcpy(to + channel[n] * sizeof(Number), numbers + n * sizeof(Number), sizeof(Number));
}

// Likewise of at most USED vectors of sums; a whole vector at a time where there is room for it.
template <int TYPE, int USED>
static inline void write_row(const difloat_output& out, int64_t row, int64_t first, int64_t count, const F32 (&values)[USED]) {
    if (count >= USED * LANES && !out.channel) {
#ifdef DIFLOAT_TILES
        if (TYPE == DIFLOAT_BF16 && USED == 2 && store_two_bfloat((uint16_t*)out.data + row * out.stride + first, values[0], values[1]))
            return;
#endif
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

}  // namespace difloat
