// Softmax of rows whose scores come a block at a time: the largest score so far, and the sum of exponentials over it.
//
// Scores are to base 2: the factor log2(e) comes with the keys, or with the scale of the query. The operand of a maximum that may
// be NaN comes second; a NaN that a maximum loses is still in the scores, so it reaches the sum.
#pragma once
#include <math.h>

#include <algorithm>

#include "difloat.h"
#include "quantize.h"
#include "repeat.h"
#include "scratch.h"

namespace difloat {

constexpr float LOWEST = -1e30f;  // instead of minus infinity, so that differences stay numbers
constexpr float LOG2_E = 1.44269504f;

// 2**x for x <= 0, by the polynomial closest to 2**f on the fraction (relative error 1e-7); 0 below 2**-126.
static INLINE F32 exp2_of(F32 x) {
    // The sum's last mantissa bits are the whole part plus 127, the exponent bits of 2**whole.
    const F32 anchor = set(12582912.0f + 127.0f);
    x = max_or_nan(set(-127.0f), x);
    const F32 sum = add(x, anchor), f = sub(x, sub(sum, anchor));
    F32 p = set(1.32765e-3f);
    for (float c : {9.67555e-3f, 5.550713e-2f, 2.402212e-1f, 6.9314697e-1f, 1.0000001f}) p = fma(p, f, set(c));
    return mul(p, as_float(shift_left<23>(as_int(sum))));
}

// A block of scores of one query. The arrays have room for whole slabs of keys.
struct BlockRow {
    float* scores;
    const float* mask;       // to add, in units of the natural logarithm, or null; [keys]
    const float* key_scale;  // what a score is worth by its key, or null
    float factor;            // and by its query, if keys have scales
    int64_t keys, padded;
};

template <bool SCALES, bool MASK>
static void complete_scores(const BlockRow& row) {
    const F32 factor = set(row.factor), base = set(LOG2_E), lowest = set(LOWEST);
    for (int64_t k = 0; k < row.keys; k += LANES) {
        F32 x = load(row.scores + k);
        if (SCALES) x = mul(mul(x, factor), load(row.key_scale + k));
        if (MASK) {
            const F32 bias = k + LANES <= row.keys ? load(row.mask + k) : load_first(row.mask + k, row.keys - k);
            x = max_or_nan(lowest, fma(bias, base, x));
        }
        store(row.scores + k, x);
    }
}

// Scales and mask applied, minus infinity behind the last key; returns the largest score.
static float finish_scores(const BlockRow& row) {
    if (row.mask && row.key_scale) complete_scores<true, true>(row);
    else if (row.mask) complete_scores<false, true>(row);
    else if (row.key_scale) complete_scores<true, false>(row);
    for (int64_t k = row.keys; k < row.padded; k++) row.scores[k] = -INFINITY;
    F32 most = set(-INFINITY), other = most;
    for (int64_t k = 0; k < row.padded; k += 2 * LANES) {
        most = max_or_nan(most, load(row.scores + k));
        other = max_or_nan(other, load(row.scores + k + LANES));
    }
    return largest_of(max(most, other));
}

// Exponentials of the scores less the largest one, in place; returns their sum.
static float exponentials(const BlockRow& row, float largest) {
    const F32 top = set(largest);
    F32 total = set(0), other = total;
    for (int64_t k = 0; k < row.padded; k += 2 * LANES) {
        const F32 e = exp2_of(sub(load(row.scores + k), top)), next = exp2_of(sub(load(row.scores + k + LANES), top));
        total = add(total, e), other = add(other, next);
        store(row.scores + k, e), store(row.scores + k + LANES, next);
    }
    return sum(add(total, other));
}

// Exponentials to the integers of the map's grid, as float32; `total` is their sum over all keys.
static void round_map(const BlockRow& row, const Rounder& round, float total, float maximum) {
    const F32 factor = set(maximum / total);
    for (int64_t k = 0; k < row.padded; k += LANES)
        store(row.scores + k, to_float(round(mul(load(row.scores + k), factor))));
}

// What is known of the queries of a tile after some blocks. Vectors of any unit fill the room, which has a few numbers more.
struct Seen {
    static constexpr int ROOM = 16;
    alignas(64) float largest[ROOM], total[ROOM];

    Seen() { std::fill_n(largest, ROOM, -INFINITY), std::fill_n(total, ROOM, 0.0f); }

    // Takes the largest scores of a block; `shrink` [ROOM] are the factors by which earlier sums shrink.
    void take(const float* scores, float* shrink) {
        for (int i = 0; i < ROOM; i += LANES) {
            const F32 before = load(largest + i), now = max(before, load(scores + i)), factor = exp2_of(sub(before, now));
            store(shrink + i, factor), store(largest + i, now), store(total + i, mul(load(total + i), factor));
        }
    }
};

}  // namespace difloat
