// Linear layers: quantize a block of tokens, multiply, next block.
#pragma once
#include <omp.h>

#include <vector>

#include "difloat.h"
#include "scratch.h"

namespace difloat {

constexpr int64_t FEWEST_QUANTIZED = TILES ? 1024 : TILE_ROWS;  // rows at a time: all panels are unpacked for them
// Bytes of quantized activations at a time: they and the result stay in the last-level cache, and in the second where tiles
// multiply faster than they come from there.
static inline int64_t block_bytes() { return TILES ? second_level_cache() / 4 : 8 << 20; }

static inline const char* row_of(const difloat_input& x, int64_t row) {
    return (const char*)x.data + row * x.stride * (x.type == DIFLOAT_F32 ? 4 : 2);
}

template <int TYPE>
static float scale_of_all(const difloat_input& x, int threads) {
    const int64_t together = x.stride == x.channels ? 64 : 1;  // rows without gaps are one long row
    int32_t most = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : most)
    for (int64_t row = 0; row < x.rows; row += together) {
        const int64_t rows = std::min(together, x.rows - row);
        most = std::max(most, largest_bits<TYPE>(row_of(x, row), rows * x.channels));
    }
    return online_scale(most, x.grid.maximum);
}

constexpr int64_t ROW_MULTIPLE = 128;  // bytes: few_rows.h reads whole steps

// Where the pieces of a quantized block lie.
struct Block {
    int8_t* values;
    int64_t* start;
    int32_t* sums;
    float *scale, *steps, *zeros;  // steps and zeros are of groups
    int64_t stride;

    Block(char* at, int64_t rows, int64_t channels, int64_t groups) : stride(round_up(channels, ROW_MULTIPLE)) {
        values = (int8_t*)at, at += round_up(rows * stride, 64);
        start = (int64_t*)at, at += round_up(rows * 8, 64);
        scale = (float*)at, at += round_up(rows * 4, 64);
        steps = (float*)at, at += round_up(rows * groups * 4, 64);
        zeros = (float*)at, at += round_up(rows * groups * 4, 64);
        sums = (int32_t*)at;
    }
    static int64_t bytes(int64_t rows, int64_t channels, int64_t groups) {
        return round_up(rows * round_up(channels, ROW_MULTIPLE), 64) + round_up(rows * 8, 64) + round_up(rows * 4, 64) +
               2 * round_up(rows * groups * 4, 64) + round_up(rows * groups * 4, 4096);
    }
};

// Channels that are summed up exactly: groups of the activations, or else those of the weight.
static inline int64_t summed_channels(const difloat_input& x, const difloat_weight& w) {
    return is_grouped(x) ? x.group : w.groups == 1 ? x.channels : w.group_channels;
}

template <int TYPE>
static void quantize_rows(const difloat_input& x, int64_t first, int64_t rows, float shared, const difloat_weight& w,
                          const Block& block, int threads) {
    const Rounder round(x.grid);
    const int64_t group = summed_channels(x, w), groups = (x.channels + group - 1) / group;
    const bool grouped = is_grouped(x);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const char* from = row_of(x, first + row);
        int8_t* to = block.values + row * block.stride;
        block.start[row] = row * block.stride;
        const int64_t written = round_up(x.channels, LANES);
        if (rows <= FEW_ROWS) memset(to + written, 0, block.stride - written);  // others read no more than the last quad
        if (grouped) {
            float *steps = block.steps + row * groups, *zeros = block.zeros + row * groups;
            for (int64_t g = 0; g < groups; g++) {
                Range range;
                range.add<TYPE>(from, g * group, std::min((g + 1) * group, x.channels));
                const Step step = range.step(x);
                steps[g] = step.scale, zeros[g] = step.zero;
            }
            const bool finite = quantize_groups<TYPE>(from, x, round, steps, zeros, to, block.sums + row * groups);
            for (int64_t g = 0; g < groups; g++) steps[g] /= x.grid.multiplier;
            block.scale[row] = finite ? 1.0f : NAN;
            continue;
        }
        const float scale = x.online == 1 ? online_scale(largest_bits<TYPE>(from, x.channels), x.grid.maximum) : shared;
        block.scale[row] = quantize_row<TYPE>(from, x.channels, x, round, {scale, x.zero_point}, group, to, block.sums + row * groups);
    }
}

// The value of the integer 0 on a static grid, before the shift.
static inline float origin_of(const difloat_input& x) {
    return x.online ? 0.0f : x.zero_point;
}

// The product of a quantized block with every band, to the rows of the result from `row` on.
template <int TYPE>
static void multiply(const difloat_weight* bands, int64_t count, const Operand& operand, int8_t* values, const difloat_output& out,
                     int64_t row, char* panels, int threads) {
    const Classes one{1, nullptr, 1, nullptr};
    bool reordered = false;
    for (bool reorders : {false, true})  // bands that reorder the activations come last
        for (int64_t b = 0, start = 0; b < count; start += bands[b++].rows) {
            const difloat_output here = part_of<TYPE>(out, row, start);
            if (few_rows_reorder(bands[b], operand) != reorders) continue;
            if (few_rows<TYPE>(bands[b], operand, values, here, threads, reordered)) continue;
            product<TYPE>(bands[b], operand, one, here, panels, threads);
        }
}

// The integer that a value of the grid becomes.
static inline int32_t integer_of(const difloat_grid& grid, float value) { return (int32_t)(value * grid.multiplier) - grid.shift; }

template <int TYPE>
static int linear_of(const difloat_input& x, const difloat_weight* bands, int64_t count, const difloat_output& out, int threads) {
    const Classes one{1, nullptr, 1, nullptr};
    const int64_t group = summed_channels(x, bands[0]), groups = (x.channels + group - 1) / group;
    const float origin = origin_of(x), shared = x.online == 2 ? scale_of_all<TYPE>(x, threads) : x.scale;
    const int64_t at_once = std::max<int64_t>(FEWEST_QUANTIZED, block_bytes() / round_up(x.channels, ROW_MULTIPLE));
    const int64_t most = std::min(x.rows, at_once), own = Block::bytes(most, x.channels, groups);
    char* memory = scratch(own + threads * place_bands(bands, count, one, groups));
    if (!memory) return -1;
    const Block block(memory, most, x.channels, groups);
    const float *steps = is_grouped(x) ? block.steps : nullptr, *zeros = x.online == 3 ? block.zeros : nullptr;
    for (int64_t first = 0; first < x.rows; first += at_once) {
        const int64_t rows = std::min(at_once, x.rows - first);
        quantize_rows<TYPE>(x, first, rows, shared, bands[0], block, threads);
        const int64_t taps = 0;
        const Operand operand{block.values, block.start, block.stride, rows, block.sums, groups, group, block.scale, steps, zeros, nullptr, nullptr,
                              rows, &taps, x.grid.shift, origin, integer_of(x.grid, x.grid.minimum),
                              integer_of(x.grid, x.grid.maximum)};
        multiply<TYPE>(bands, count, operand, block.values, out, first, memory + own, threads);
    }
    return 0;
}

static int linear(const difloat_input& x, const difloat_weight* bands, int64_t count, const difloat_output& out, int threads) {
    if (x.type == DIFLOAT_BF16) return linear_of<DIFLOAT_BF16>(x, bands, count, out, threads);
    if (x.type == DIFLOAT_F16) return linear_of<DIFLOAT_F16>(x, bands, count, out, threads);
    return linear_of<DIFLOAT_F32>(x, bands, count, out, threads);
}

}  // namespace difloat
