// The C interface of the library: plain structs and functions, called through ctypes (../native.py mirrors the structs).
//
// A product is computed in integers: activations become int8 on their grid, weights uint8 through a table of their codes, sums are
// exact in int32. Scales, zero points and bias come after the sum:
//
//   out[t, o] = scale[t] * sum_g(w_scale[o, g] * acc[t, o, g] + w_zero[o, g] * rowsum[t, g]) + bias[o] + zero_point * weight_sum[o]
//
// acc and rowsum are of the integers before the shift that brings unsigned ones into int8: it is taken back in int32, where
// nothing rounds, so that inputs of 0 add exactly 0.
//
// Activations may have a step (and a value of the integer 0) per row and group of channels, found in the data. Then
//
//   out[t, o] = sum_G(w_scale[o, G] * inner[t, o, G] + w_zero[o, G] * seen[t, G]) + bias[o]
//   inner[t, o, G] = sum over groups g of G(step[t, g] * acc[t, o, g] + zero[t, g] * integers[o, g])
//
// where G are the weight's groups, `seen` is the sum of the rounded activations and `integers` of the weight's integers. In a
// convolution the zeros come with the bias, since they are those of a picture.
//
// A weight with rows of several widths is an array of weights, its bands: their input channels are grouped alike, so the input is
// rounded once for all of them.
//
// Every function returns 0, or -1 if there was no memory for its buffers. Arguments are checked by the caller.
#pragma once
#include <stdint.h>

#define DIFLOAT_ABI 9

enum difloat_type { DIFLOAT_F32 = 0, DIFLOAT_BF16 = 1, DIFLOAT_F16 = 2 };

// A number format of activations as integers: integer = value * multiplier - shift, within int8.
typedef struct {
    float minimum, maximum;  // of the values
    float multiplier;        // power of two
    int32_t shift;           // 128 for unsigned formats that reach beyond 127
    int32_t uniform;         // evenly spaced values: rounding is rounding to integers
    int32_t mantissa_bits;
    int32_t min_exponent;  // of the smallest normal number
} difloat_grid;

// Activations: rows of `channels` numbers, the next row `stride` numbers further.
typedef struct {
    const void* data;
    int64_t rows, channels, stride;
    int32_t type;    // enum difloat_type
    int32_t online;  // 0: static scale; 1: one scale per row (per picture in a convolution); 2: one scale for all; 3: as 1, with a
                     // zero point that the smallest value sets
    float scale;     // static only
    float zero_point;
    difloat_grid grid;
    int64_t group;  // channels that share an online scale: all, or groups that divide the weight's; the grid has no shift then
} difloat_input;

// Packed weights: `rows` output channels; the codes of a row and tap are a little-endian bit stream along the input channels.
typedef struct {
    const uint8_t* data;
    int64_t rows, channels, taps;
    int64_t row_stride, byte_stride, tap_stride;  // in bytes
    int32_t bits;
    int32_t minimum;       // integer of the lowest code value; the table holds integer - minimum
    const uint8_t* table;  // 256 entries, repeated every 2**bits
    const float* scale;    // [rows, groups], or one if scale_stride is 0; a scale is worth `unit` times what is stored
    const float* zero;     // likewise without the unit, or null
    float unit;
    int64_t groups, group_channels, scale_stride;
} difloat_weight;

// Rows of `stride` numbers in the type of the input, one number per output channel.
typedef struct {
    void* data;
    const float* bias;       // by output channel, or null
    const int32_t* channel;  // [rows of all bands] the output channel of every row of the weight; null: in their order
    int64_t stride;
} difloat_output;

// Geometry of a convolution; every pair is (vertical, horizontal). Pictures are channels last.
typedef struct {
    int64_t batch, size[2], kernel[2], stride[2], padding[2], dilation[2], out[2];
} difloat_geometry;

// softmax(query x key^T * scale + mask) x value, all of one type. The unit of bfloat16 takes only that and multiplies it with sums in
// float32, the others compute in float32. Strides are those of [batch, heads, tokens], in elements; the dimensions of a head lie
// side by side. The mask is added, float32 or null, [batch, heads, queries, keys] with the same kind of strides. At most 1024
// dimensions. Operands are rounded to `grid` with one scale per token and head if `operands` is not 0 (1: its integers are int8; 2:
// its integers have at most 8 significant bits); probabilities to `map`, whose maximum stands for 1, if `map_rounded` is not 0.
typedef struct {
    const void *query, *key, *value;
    void* out;
    const float* mask;
    int64_t batch, heads, queries, keys, width;
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3], mask_stride[3];
    float scale;
    int32_t operands;
    difloat_grid grid;
    int32_t map_rounded;
    difloat_grid map;
    int32_t type;  // enum difloat_type
} difloat_attention;
