// Rows of scores to probabilities in bfloat16.
#pragma once
#include <math.h>

#include <type_traits>

#include "difloat.h"
#include "quantize.h"
#include "repeat.h"
#include "scratch.h"

namespace difloat {

constexpr float LOWEST = -1e30f;  // instead of minus infinity, so that differences stay numbers

static INLINE void store_bfloat(uint16_t* to, F32 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

// 2**x for x <= 0: the polynomial closest to 2**f on the fraction (relative error 1e-7).
static INLINE F32 exp2_of(F32 x) {
    const F32 whole = _mm512_roundscale_ps(x, 0), f = sub(x, whole);
    F32 p = set(1.32765e-3f);
    for (float c : {9.67555e-3f, 5.550713e-2f, 2.402212e-1f, 6.9314697e-1f, 1.0000001f}) p = fma(p, f, set(c));
    return _mm512_scalef_ps(p, whole);
}

// Scores of one query; a score is worth `factor`, times the scale of its key if keys have scales.
struct ScoreRow {
    float* scores;           // [width]
    const float* mask;       // [keys] to add, or null
    const float* key_scale;  // [width] or null
    int64_t keys, width;
    float factor;
};

// Where a maximum is taken, the operand that may be NaN comes second: the instruction returns that one, so a NaN stays.

// body(first, Whole) for every vector of keys; the last one may be cut, and then Whole is false.
template <class Body>
static INLINE void every_vector(int64_t keys, Body&& body) {
    int64_t k = 0;
    for (; k + LANES <= keys; k += LANES) body(k, std::true_type());
    if (k < keys) body(k, std::false_type());
}

// Scores times `factor` and the scales of their keys plus the mask, in place.
template <bool SCALES, bool MASK>
static void complete_scores(const ScoreRow& row) {
    const F32 factor = set(row.factor);
    every_vector(row.keys, [&](int64_t k, auto whole) UNROLLED {
        F32 x = mul(load(row.scores + k), factor);
        if (SCALES) x = mul(x, load(row.key_scale + k));
        if (MASK) x = max(set(LOWEST), add(x, whole ? load(row.mask + k) : load_first(row.mask + k, row.keys - k)));
        store(row.scores + k, x);
    });
}

static float largest_score(const ScoreRow& row) {
    F32 most = set(-INFINITY), last = most;
    every_vector(row.keys, [&](int64_t k, auto whole) UNROLLED {
        const F32 x = load(row.scores + k);
        if (whole) most = max(most, x);
        else last = select(first_mask(row.keys - k), x, last);
    });
    return _mm512_reduce_max_ps(max(most, last));
}

// Exponentials of the scores times `factor` into `out` (bfloat16) or, with KEEP, back into the scores; returns the sum.
template <bool KEEP>
static float exponentials(const ScoreRow& row, float factor, uint16_t* out) {
    const F32 by = set(factor * 1.44269504f), top = set(largest_score(row));  // to base 2
    F32 total = set(0);
    every_vector(row.keys, [&](int64_t k, auto whole) UNROLLED {
        F32 e = exp2_of(mul(sub(load(row.scores + k), top), by));
        if (!whole) e = select(first_mask(row.keys - k), e, set(0));
        total = add(total, e);
        if (KEEP) store(row.scores + k, e);
        else store_bfloat(out + k, e);
    });
    return sum(total);
}

// Probabilities in units of 1 / maximum of the grid, as the integers of the grid: at most 8 bits wide, so bfloat16 holds them.
// Returns what an integer is worth.
static float round_map(const ScoreRow& row, float total, const difloat_grid& grid, uint16_t* out) {
    const Rounder round(grid);
    const F32 factor = set(grid.maximum / total);
    for (int64_t k = 0; k < row.keys; k += LANES) store_bfloat(out + k, to_float(round(mul(load(row.scores + k), factor))));
    return total == total ? 1.0f / (grid.maximum * grid.multiplier) : NAN;
}

// One row of scores to probabilities, 0 from the last key to `width`; returns the factor that they still need.
static float softmax(const ScoreRow& row, const difloat_attention& a, uint16_t* out) {
    float factor = 1;
    if (row.mask && row.key_scale) complete_scores<true, true>(row);
    else if (row.mask) complete_scores<false, true>(row);
    else if (row.key_scale) complete_scores<true, false>(row);
    else if (!(row.factor > 0)) complete_scores<false, false>(row);  // the largest score must stay the largest
    else factor = row.factor;
    for (int64_t k = round_up(row.keys, LANES); k < row.width; k += LANES) store_bfloat(out + k, set(0));
    if (!a.map_rounded) return 1.0f / exponentials<false>(row, factor, out);
    return round_map(row, exponentials<true>(row, factor, out), a.map, out);
}

}  // namespace difloat
