// Back to floating point, for what has no product in integers: activations rounded to their grid, weights decoded, both written in
// the type of the activations for somebody else's product. Operation by operation what reference.py does, so bit for bit the same.
#pragma once
#include "difloat.h"
#include "linear.h"
#include "panels.h"
#include "product.h"
#include "quantize.h"

namespace difloat {

template <int TYPE>
static INLINE void write_first(void* out, int64_t at, int64_t count, F32 x) {
    constexpr int64_t SIZE = TYPE == DIFLOAT_F32 ? 4 : 2;
    if (count >= LANES) return write<TYPE>(out, at, x);
    alignas(64) char buffer[LANES * 4];
    write<TYPE>(buffer, 0, x);
    memcpy((char*)out + at * SIZE, buffer, count * SIZE);
}

// One output channel and tap, [channels] numbers from `at` on. `values` holds 256 entries, repeated every 2**BITS.
template <int TYPE, int BITS>
static void decode_row(const difloat_weight& w, const uint8_t* stream, int64_t row, const float* values, void* out, int64_t at) {
    const int64_t bytes = code_bytes(w), group = w.groups == 1 ? w.channels : w.group_channels;
    for (int64_t g = 0, k = 0; g < w.groups; g++) {
        const int64_t place = row * w.scale_stride + g, end = std::min((g + 1) * group, w.channels);
        const F32 scale = set(w.scale[place]), zero = set(w.zero ? w.zero[place] : 0.0f);
        while (k < end) {  // groups are multiples of LANES, so a load of CODES codes may be used in part
            const int64_t inside = k % CODES, at_byte = k / CODES * (CODES / 8 * BITS);
            alignas(64) uint8_t codes[CODES];
            store_int(codes, spread<BITS>(stream + at_byte, bytes - at_byte));
            const int64_t stop = std::min(end, k - inside + CODES);
            for (int64_t c = inside; k < stop; c += LANES, k += LANES) {
                F32 x = mul(values_of<BITS>(codes + c, values), scale);
                if (w.zero) x = add(x, zero);
                write_first<TYPE>(out, at + k, std::min<int64_t>(w.channels - k, LANES), x);
            }
        }
    }
}

// All weights, [output channel][tap][input channel]; `channel` says which output channel every row is, null: in their order.
template <int TYPE, int BITS>
static int decode_of(const difloat_weight& w, const float* values, const int32_t* channel, void* out, int threads) {
    const int64_t blocks = (w.rows + WIDTH - 1) / WIDTH, bytes = round_up(gather_bytes(w), 64);
    char* memory = scratch(std::max<int64_t>(threads * bytes, 64));
    if (!memory) return -1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * WIDTH;
        const Rows rows(w, first, (uint8_t*)memory + omp_get_thread_num() * bytes);
        for (int64_t row = 0; row <= rows.last; row++) {
            const int64_t to = channel ? channel[first + row] : first + row;
            for (int64_t tap = 0; tap < w.taps; tap++)
                decode_row<TYPE, BITS>(w, rows.at(row, tap), first + row, values, out, (to * w.taps + tap) * w.channels);
        }
    }
    return 0;
}

template <int TYPE>
static int decode(const difloat_weight& w, const float* values, const int32_t* channel, void* out, int threads) {
    switch (w.bits) {
        case 1: return decode_of<TYPE, 1>(w, values, channel, out, threads);
        case 2: return decode_of<TYPE, 2>(w, values, channel, out, threads);
        case 3: return decode_of<TYPE, 3>(w, values, channel, out, threads);
        case 4: return decode_of<TYPE, 4>(w, values, channel, out, threads);
        case 5: return decode_of<TYPE, 5>(w, values, channel, out, threads);
        case 6: return decode_of<TYPE, 6>(w, values, channel, out, threads);
        case 7: return decode_of<TYPE, 7>(w, values, channel, out, threads);
        default: return decode_of<TYPE, 8>(w, values, channel, out, threads);
    }
}

// Rows of activations to the values of their grid, [rows, channels] without gaps. NaN stays.
template <int TYPE>
static void round_rows(const difloat_input& x, void* out, int threads) {
    const Rounder round(x.grid);
    const float shared = x.online == 2 ? scale_of_all<TYPE>(x, threads) : x.scale;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < x.rows; row++) {
        const char* from = row_of(x, row);
        const int32_t largest = x.online == 1 || x.online == 3 ? largest_bits<TYPE>(from, x.channels) : 0;
        Step step{x.online == 1 ? online_scale(largest, x.grid.maximum) : shared, x.zero_point};
        if (x.online == 3) {
            Range range;
            range.add<TYPE>(from, 0, x.channels);
            step = largest < INFINITY_BITS ? range.step(x) : Step{NAN, NAN};
        }
        const bool moved = x.online == 3 || x.zero_point != 0;
        const F32 scale = set(step.scale), zero = set(step.zero);
        for (int64_t k = 0; k < x.channels; k += LANES) {
            const int64_t count = std::min<int64_t>(x.channels - k, LANES);
            F32 value = count == LANES ? load_as_float<TYPE>(from, k) : load_tail<TYPE>(from, k, count);
            if (moved) value = sub(value, zero);
            const F32 y = div(value, scale);
            F32 rounded = mul(select(equal(y, y), round.value(y), y), scale);
            if (moved) rounded = add(rounded, zero);
            write_first<TYPE>(out, row * x.channels + k, count, rounded);
        }
    }
}

}  // namespace difloat
