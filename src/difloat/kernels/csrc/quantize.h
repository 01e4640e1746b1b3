// Activations onto their integer grid: the same integers as the reference rounds to, one row at a time.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>

#include "difloat.h"
#include "repeat.h"

namespace difloat {

constexpr int32_t INFINITY_BITS = 0x7f800000;

template <int TYPE>
static inline F32 load_as_float(const void* data, int64_t at) {
    if (TYPE == DIFLOAT_BF16) return load_bfloat((const uint16_t*)data + at);
    if (TYPE == DIFLOAT_F16) return load_half((const uint16_t*)data + at);
    return load((const float*)data + at);
}

// The last numbers of a row, fewer than a vector; nothing beyond the row is read, zeros follow.
template <int TYPE>
static inline F32 load_tail(const void* data, int64_t at, int64_t count) {
    if (TYPE == DIFLOAT_BF16) return load_first_bfloat((const uint16_t*)data + at, count);
    if (TYPE == DIFLOAT_F16) return load_first_half((const uint16_t*)data + at, count);
    return load_first((const float*)data + at, count);
}

// Largest magnitude of a row as the bits of a float. NaN has more than infinity, so it wins.
template <int TYPE>
static int32_t largest_bits(const void* row, int64_t channels) {
#ifdef DIFLOAT_VECTORS_512
    if (TYPE == DIFLOAT_BF16) return largest_bfloat_bits((const uint16_t*)row, channels);
#endif
    const I32 magnitude = set_int(0x7fffffff);
    I32 most = set_int(0);
    int64_t k = 0;
    for (; k + LANES <= channels; k += LANES) most = max_int(most, bits_and(as_int(load_as_float<TYPE>(row, k)), magnitude));
    if (k < channels) most = max_int(most, bits_and(as_int(load_tail<TYPE>(row, k, channels - k)), magnitude));
    return largest_int(most);
}

// Values to the grid, or to grid values times multiplier, which are integers. Follows rounding.round_ operation by operation.
struct Rounder {
    F32 minimum, maximum, multiplier, inverse, smallest, anchor;
    I32 exponent_bits, first_binade;
    bool uniform, no_mantissa;

    explicit Rounder(const difloat_grid& grid) {
        minimum = set(grid.minimum), maximum = set(grid.maximum), multiplier = set(grid.multiplier);
        inverse = set(1 / grid.multiplier), smallest = set(ldexpf(1.0f, grid.min_exponent));
        anchor = set(1.5f * ldexpf(1.0f, 23 - grid.mantissa_bits));
        exponent_bits = set_int(INFINITY_BITS), first_binade = set_int(127 + grid.min_exponent - 1);
        uniform = grid.uniform, no_mantissa = grid.mantissa_bits == 0;
    }

    // A value of the grid; NaN becomes the minimum, its row is marked elsewhere.
    F32 value(F32 y) const {
        y = min(max(y, minimum), maximum);
        if (uniform) return mul(to_float(to_int(mul(y, multiplier))), inverse);
        I32 exponent = bits_and(as_int(y), exponent_bits);
        F32 binade = max(as_float(exponent), smallest);
        F32 large = mul(binade, anchor);  // its last mantissa bit weighs one step of the binade
        F32 rounded = sub(add(y, large), large);
        if (no_mantissa) {  // "even in steps" is always the upper neighbour there, while the even code alternates
            F32 size = as_float(bits_and(as_int(y), set_int(0x7fffffff)));
            I32 code_of_lower = sub_int(shift_right<23>(exponent), first_binade);
            Mask even = equal_int(bits_and(code_of_lower, set_int(1)), set_int(0));
            F32 lower = as_float(bits_or(as_int(binade), bits_and(as_int(y), set_int(INT32_MIN))));
            rounded = select(both(equal(size, mul(binade, set(1.5f))), even), lower, rounded);
        }
        return rounded;
    }

    I32 operator()(F32 y) const {
        if (uniform) return to_int(mul(min(max(y, minimum), maximum), multiplier));
        return to_int(mul(value(y), multiplier));
    }
};

// What rounds a number: its integer is (number - zero) / scale on the grid.
struct Step {
    float scale, zero;
};

// (x - zero) / scale, rounded as a division is. Where the exponent of the scale is far from the ends, the reciprocal and two
// corrections by what is left give that in a third of the time: the first is off by little more than half a unit in the last
// place, so that the second rounds correctly (Markstein, IA-64 and Elementary Functions, 2000).
struct Quotient {
    F32 divisor, zero, minus, inverse, most;

    explicit Quotient(Step step)
        : divisor(set(step.scale)), zero(set(step.zero)), minus(set(-step.scale)), inverse(set(1 / step.scale)), most(set(512 * step.scale)) {}
    static bool is_near_one(float scale) { return scale >= 0x1p-60f && scale <= 0x1p60f; }

    // Numbers far beyond every grid, which reaches 256 at most, are cut off, since infinity has no remainder.
    template <bool NEAR>
    INLINE F32 operator()(F32 x) const {
        x = sub(x, zero);
        if (!NEAR) return div(x, divisor);
        return bounded(min(max(x, sub(set(0), most)), most));
    }
    INLINE F32 bounded(F32 x) const {
        F32 q = mul(x, inverse);
        q = fma(fma(q, minus, x), inverse, q);
        return fma(fma(q, minus, x), inverse, q);
    }
};

// One row of int8 through integers(numbers), and the sum of every group of `group` channels (a multiple of LANES unless it is the
// whole row). Stores whole vectors: the row needs room for a multiple of LANES.
template <int TYPE, class Integers>
static INLINE void write_integers(const void* row, int64_t channels, int64_t group, int8_t* out, int32_t* sums, Integers&& integers) {
    int64_t k = 0;
    do {
        const int64_t stop = std::min(k + group, channels);
        I32 total = set_int(0);
        for (; k + 4 * LANES <= stop; k += 4 * LANES) {
            I32 four[4];
            repeat<4>([&](auto i) UNROLLED { four[i] = integers(load_as_float<TYPE>(row, k + i * LANES)); });
            total = add_int(total, add_int(add_int(four[0], four[1]), add_int(four[2], four[3])));
            store_int8_four(out + k, four);
        }
        for (; k + LANES <= stop; k += LANES) {
            const I32 one = integers(load_as_float<TYPE>(row, k));
            total = add_int(total, one);
            store_int8(out + k, one);
        }
        if (k < stop) {
            const I32 rest = first_lanes(integers(load_tail<TYPE>(row, k, stop - k)), stop - k);
            total = add_int(total, rest);
            store_int8(out + k, rest);
            k = stop;
        }
        *sums++ = sum_int(total);
    } while (k < channels);
}

// Whether the scale comes from the largest number of a row or more, so that none is beyond the grid, and the grid is one of
// integers as they are.
static inline bool is_bounded(const difloat_input& x) {
    const difloat_grid& grid = x.grid;
    return (x.online == 1 || x.online == 2) && x.group >= x.channels && grid.uniform && !grid.shift && grid.minimum <= -grid.maximum;
}

// One row of int8 and its sums, see `write_integers`. Returns the scale that belongs to the integers.
template <int TYPE>
static INLINE float quantize_row(const void* row, int64_t channels, const difloat_input& input, const Rounder& round, Step step,
                                 int64_t group, int8_t* out, int32_t* sums) {
    const float worth = step.scale / input.grid.multiplier;
    const bool near = Quotient::is_near_one(worth);  // a NaN is not
    if (near && is_bounded(input)) {
        const Quotient integer({worth, 0.0f});
        write_integers<TYPE>(row, channels, group, out, sums, [&](F32 x) UNROLLED { return to_int(integer.bounded(x)); });
        return worth;
    }
    const Quotient quotient(step);
    const I32 shift = set_int(input.grid.shift), magnitude = set_int(0x7fffffff);
    I32 most = set_int(0);
    auto write = [&](auto divide) UNROLLED {
        write_integers<TYPE>(row, channels, group, out, sums, [&](F32 x) UNROLLED {
            most = max_int(most, bits_and(as_int(x), magnitude));
            return sub_int(round(divide(x)), shift);
        });
    };
    if (near) write([&](F32 x) UNROLLED { return quotient.template operator()<true>(x); });
    else write([&](F32 x) UNROLLED { return quotient.template operator()<false>(x); });
    return largest_int(most) > INFINITY_BITS ? NAN : worth;
}

static inline float online_scale(int32_t bits, float maximum) {
    float largest;
    memcpy(&largest, &bits, 4);
    if (bits >= INFINITY_BITS) return NAN;
    return bits > 0 ? largest / maximum : 1.0f;
}

// Groups of channels with a scale of their own.
static inline bool is_grouped(const difloat_input& x) { return x.online == 3 || x.group < x.channels; }
static inline int64_t groups_of(const difloat_input& x) { return (x.channels + x.group - 1) / x.group; }

// The smallest and the largest of numbers, none of which is NaN.
struct Range {
    F32 low = set(INFINITY), high = set(-INFINITY);

    template <int TYPE>
    INLINE void add(const void* row, int64_t begin, int64_t end) {
        int64_t k = begin;
        for (; k + LANES <= end; k += LANES) take(load_as_float<TYPE>(row, k));
        if (k == end) return;
        alignas(64) float rest[LANES];
        store(rest, load_tail<TYPE>(row, k, end - k));
        for (int64_t n = end - k; n < LANES; n++) rest[n] = rest[0];  // in place of the zeros, which are not of the row
        take(load(rest));
    }
    INLINE void take(F32 x) { low = min(low, x), high = max(high, x); }

    INLINE Step step(const difloat_input& x) const {
        const float smallest = smallest_of(low), largest = largest_of(high);
        if (x.online != 3) {
            const float most = std::max(-smallest, largest);
            return {most > 0 ? most / x.grid.maximum : 1.0f, 0.0f};
        }
        const float span = largest - smallest;
        if (!(span > 0)) return {1.0f, smallest};
        const float scale = span / (x.grid.maximum - x.grid.minimum);
        return {scale, smallest - x.grid.minimum * scale};
    }
};

// One row whose groups of channels have scales and zeros: the integers and the sum of every group. Returns whether all numbers and
// scales are finite.
template <int TYPE>
static INLINE bool quantize_groups(const void* row, const difloat_input& x, const Rounder& round, const float* scales,
                                   const float* zeros, int8_t* out, int32_t* sums) {
    bool finite = true;
    for (int64_t g = 0, k = 0; k < x.channels; k += x.group, g++) {
        const char* from = (const char*)row + k * (TYPE == DIFLOAT_F32 ? 4 : 2);
        const int64_t count = std::min(x.group, x.channels - k);
        const float worth = quantize_row<TYPE>(from, count, x, round, {scales[g], zeros[g]}, count, out + k, sums + g);
        finite &= fabsf(worth) < INFINITY;
    }
    return finite;
}

}  // namespace difloat
