// Attention in float32 on the vectors of any unit: a tile of queries by a block of keys at a time, so that scores never leave the
// first-level cache. The sums of a query shrink whenever a block brings a larger score.
//
// Numbers of 16 bits become float32 where rows are read. On a grid that fits int8, scores are integers (block_integers.h); on a wider
// one, integers in float32. A map on a grid needs the sum over all keys before it can be rounded, so scores are computed twice.
#pragma once
#include <omp.h>

#include <algorithm>

#include "block_integers.h"
#include "block_rows.h"
#include "block_softmax.h"
#include "difloat.h"
#include "product.h"

namespace difloat {

constexpr int64_t TASK_BYTES = 512 << 10;   // of queries and their sums: keys are read, and rounded, once for all of them
constexpr int SCORE_STRIDE = BLOCK + SLAB;  // not a power of two: rows of a tile would share places in the cache

// Rows of a product by its vectors: as many sums as registers hold.
constexpr int rows_by(int vectors) {
    const int rows = SUMS / vectors;
    return rows >= TILE ? TILE : rows >= TILE / 2 ? TILE / 2 : TILE / 3;
}

// Rows times a panel of `count` inner elements. WEIGH: rows of probabilities, added to what `out` has times `shrink`; otherwise
// queries side by side, written.
template <int NV, bool WEIGH>
static NOINLINE void multiply_tile(const float* left, const float* panel, int64_t count, const float* shrink, float* out, int64_t stride) {
    constexpr int ROWS = rows_by(NV), ROW = WEIGH ? SCORE_STRIDE : 1, INNER = WEIGH ? 1 : TILE;
    F32 sums[ROWS][NV];
    repeat<ROWS>([&](auto i) UNROLLED {
        repeat<NV>([&](auto v) UNROLLED { sums[i][v] = WEIGH ? mul(load(out + i * stride + v * LANES), set(shrink[i])) : set(0); });
    });
    UNROLL_FOUR
    for (int64_t n = 0; n < count; n++) {
        F32 columns[NV];
        repeat<NV>([&](auto v) UNROLLED { columns[v] = load(panel + v * LANES); });
        repeat<ROWS>([&](auto i) UNROLLED {
            const F32 everywhere = set(left[i * ROW]);
            repeat<NV>([&](auto v) UNROLLED { sums[i][v] = fma(columns[v], everywhere, sums[i][v]); });
        });
        left += INNER, panel += NV * LANES;
    }
    repeat<ROWS>([&](auto i) UNROLLED {
        repeat<NV>([&](auto v) UNROLLED { store(out + i * stride + v * LANES, sums[i][v]); });
    });
}

// Tiles of queries that a task has at most.
static inline int64_t most_tiles(const difloat_attention& a) {
    return std::max<int64_t>(1, TASK_BYTES / (8 * TILE * round_up(a.width, LANES)));
}

// Scratch of one thread.
struct TaskBuffers {
    float *queries, *keys, *values, *rows, *key_scale, *scores, *sums, *factor;  // queries, keys and rows may be bytes
    int32_t* start;
    Seen* seen;

    // Takes the pieces from `at` on; returns how many bytes they have.
    int64_t place(char* at, const difloat_attention& a) {
        char* const begin = at;
        const int64_t wide = round_up(a.width, LANES), queries_at_once = most_tiles(a) * TILE;
        auto take = [&at](int64_t numbers) {
            char* piece = at;
            at += round_up(4 * numbers, 64);
            return (float*)piece;
        };
        queries = take(queries_at_once * round_up(a.width, 4));
        keys = take(BLOCK * round_up(a.width, 4));
        values = take(BLOCK * wide);
        rows = take(std::max(SLAB * wide, WIDTH * round_up(a.width, 16) / 4));
        key_scale = take(BLOCK);
        scores = take(TILE * SCORE_STRIDE);
        sums = take(queries_at_once * wide);
        factor = take(queries_at_once);
        start = (int32_t*)take(queries_at_once);
        seen = (Seen*)take(most_tiles(a) * sizeof(Seen) / 4);
        return round_up(at - begin, 4096);
    }
};

// Some queries of one head.
template <int TYPE>
struct Task {
    const difloat_attention& a;
    const RowReader<TYPE>& reader;
    const IntegerRows<TYPE>* integers;  // null where scores are floats
    const Rounder& map;
    const TaskBuffers& to;
    const void *query, *key, *value;
    const float* mask;
    void* out;
    int64_t count;

    void run() const {
        const int64_t wide = round_up(a.width, LANES);
        if (integers) integers->queries(query, count, (int8_t*)to.queries, to.factor, to.start);
        else reader.queries(query, count, to.rows, to.queries, to.factor);
        std::fill_n(to.sums, round_up(count, TILE) * wide, 0.0f);
        std::fill_n(to.seen, (count + TILE - 1) / TILE, Seen());
        for (int64_t k = 0; a.map_rounded && k < a.keys; k += BLOCK) {
            read_keys(k);
            for (int64_t q = 0; q < count; q += TILE) attend(q, k, true);
        }
        for (int64_t k = 0; k < a.keys; k += BLOCK) {
            read_keys(k);
            const int64_t keys = std::min(BLOCK, a.keys - k);
            reader.values(reader.at(value, k * a.value_stride[2]), keys, padded_to(keys), to.rows, to.values);
            for (int64_t q = 0; q < count; q += TILE) attend(q, k, false);
        }
        for (int64_t q = 0; q < count; q++) write_row(q);
    }

   private:
    int64_t padded_to(int64_t keys) const { return round_up(keys, integers ? WIDTH : SLAB); }

    void read_keys(int64_t k) const {
        const void* from = reader.at(key, k * a.key_stride[2]);
        const int64_t keys = std::min(BLOCK, a.keys - k);
        if (integers) integers->keys(from, keys, (int8_t*)to.rows, (uint8_t*)to.keys, to.key_scale);
        else reader.keys(from, keys, a.scale * LOG2_E, to.rows, to.keys, to.key_scale);
    }

    // A tile by a block. `only_sums`: sums of exponentials only.
    void attend(int64_t first, int64_t k, bool only_sums) const {
        const int64_t rows = std::min<int64_t>(TILE, count - first), keys = std::min(BLOCK, a.keys - k);
        const int64_t padded = padded_to(keys);
        if (integers)
            integers->scores((const int8_t*)to.queries + first * integers->stride, to.start + first, rows, (const uint8_t*)to.keys,
                             padded, to.scores, SCORE_STRIDE);
        for (int64_t slab = 0; !integers && slab < padded; slab += SLAB)
            for (int64_t i = 0; i < rows; i += rows_by(2))
                multiply_tile<2, false>(to.queries + first * a.width + i, to.keys + slab * a.width, a.width, nullptr,
                                        to.scores + i * SCORE_STRIDE + slab, SCORE_STRIDE);
        Seen& seen = to.seen[first / TILE];
        alignas(64) float largest[Seen::ROOM] = {}, shrink[Seen::ROOM];
        auto row_of = [&](int64_t i) {
            const float* bias = mask ? mask + (first + i) * a.mask_stride[2] + k : nullptr;
            const float factor = to.factor[first + i] * a.scale * LOG2_E;
            return BlockRow{to.scores + i * SCORE_STRIDE, bias, reader.on_grid ? to.key_scale : nullptr, factor, keys, padded};
        };
        // Row after row for each step, so that a processor works on several at a time.
        for (int64_t i = 0; i < rows; i++) largest[i] = finish_scores(row_of(i));
        const bool known = a.map_rounded && !only_sums;
        if (known) std::fill_n(shrink, TILE, 1.0f);
        else seen.take(largest, shrink);
        for (int64_t i = 0; i < rows; i++) {
            const float sum = exponentials(row_of(i), seen.largest[i]);
            if (known) round_map(row_of(i), map, seen.total[i], a.map.maximum);
            else seen.total[i] += sum;
        }
        if (!only_sums) weigh(first, rows, padded, shrink);
    }

    void weigh(int64_t first, int64_t rows, int64_t padded, const float* shrink) const {
        const int64_t wide = round_up(a.width, LANES);
        every_panel(wide / LANES, [&](int64_t v, int64_t vectors) {
            const float* panel = to.values + v * BLOCK * LANES;
            float* sums = to.sums + first * wide + v * LANES;
            auto some = [&](auto number) {
                constexpr int NV = decltype(number)::value;
                for (int64_t i = 0; i < rows; i += rows_by(NV))
                    multiply_tile<NV, true>(to.scores + i * SCORE_STRIDE, panel, padded, shrink + i, sums + i * wide, wide);
            };
            if (vectors == 1) some(std::integral_constant<int, 1>());
            else if (vectors == 2) some(std::integral_constant<int, 2>());
            else some(std::integral_constant<int, 3>());
        });
    }

    void write_row(int64_t q) const {
        constexpr int64_t size = TYPE == DIFLOAT_F32 ? 4 : 2;
        const float total = to.seen[q / TILE].total[q % TILE], integer = total == total ? 1 / (a.map.maximum * a.map.multiplier) : NAN;
        const F32 factor = set(a.map_rounded ? integer : 1 / total);
        const float* sums = to.sums + q * round_up(a.width, LANES);
        char* row = (char*)out + q * a.out_stride[2] * size;
        for (int64_t d = 0; d < a.width; d += LANES) {
            alignas(64) char last[4 * LANES];
            const int64_t left = std::min<int64_t>(LANES, a.width - d);
            write<TYPE>(left == LANES ? row + d * size : last, 0, mul(load(sums + d), factor));
            if (left < LANES) memcpy(row + d * size, last, left * size);
        }
    }
};

template <int TYPE>
static int attention_of(const difloat_attention& a, int threads) {
    const int64_t heads = a.batch * a.heads, tiles = (a.queries + TILE - 1) / TILE;
    // Enough tasks for all threads, but none so short that keys are read for a few queries only.
    const int64_t wanted = std::min(tiles / 4, (4 * threads + heads - 1) / heads);
    const int64_t most = most_tiles(a), cuts = std::max<int64_t>({1, wanted, (tiles + most - 1) / most});
    const int64_t bytes = TaskBuffers().place(nullptr, a);
    char* memory = scratch(threads * bytes);
    if (!memory) return -1;
#pragma omp parallel num_threads(threads)
    {
        const RowReader<TYPE> reader(a);
        const IntegerRows<TYPE> integers(a, reader.round);
        const Rounder map(a.map);
        TaskBuffers buffers;
        buffers.place(memory + omp_get_thread_num() * bytes, a);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < heads * cuts; task++) {
            const int64_t b = task / cuts / a.heads, h = task / cuts % a.heads, cut = task % cuts;
            const int64_t first = tiles * cut / cuts * TILE, end = std::min(tiles * (cut + 1) / cuts * TILE, a.queries);
            auto at = [&](const void* data, const int64_t* stride, int64_t row) {
                return reader.at(data, b * stride[0] + h * stride[1] + row * stride[2]);
            };
            const float* mask = a.mask ? a.mask + b * a.mask_stride[0] + h * a.mask_stride[1] + first * a.mask_stride[2] : nullptr;
            Task<TYPE>{a, reader, a.operands == 1 && integers.pay() ? &integers : nullptr, map, buffers, at(a.query, a.query_stride, first), at(a.key, a.key_stride, 0),
                       at(a.value, a.value_stride, 0), mask, (void*)at(a.out, a.out_stride, first), end - first}
                .run();
        }
    }
    return 0;
}

static int attention(const difloat_attention& a, int threads) {
    if (a.type == DIFLOAT_BF16) return attention_of<DIFLOAT_BF16>(a, threads);
    if (a.type == DIFLOAT_F16) return attention_of<DIFLOAT_F16>(a, threads);
    return attention_of<DIFLOAT_F32>(a, threads);
}

}  // namespace difloat
