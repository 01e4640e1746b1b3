// Attention: scores, softmax and weighted values of a few queries at a time, so that scores never leave the cache.
//
// Both products are rows times panels of 64 columns, one dword of inner elements of a column at a time as one instruction takes
// them: queries times the transposed keys, then probabilities times values. Queries and keys are bfloat16, or int8 where a grid
// asks for it (attention_rows.h); probabilities and values are bfloat16. Scores and sums are float32; probabilities are divided by
// their float32 sum after the second product, or before they are rounded to a grid.
#pragma once
#include <math.h>
#include <omp.h>
#include <string.h>

#include <algorithm>

#include "attention_rows.h"
#include "difloat.h"
#include "repeat.h"
#include "scratch.h"
#include "softmax.h"

namespace difloat {

constexpr int QUERIES = 6;     // rows of a tile: 6 x 4 accumulators
constexpr int64_t AHEAD = 16;  // rows between the one that is rounded and the one that is asked for

static INLINE F32 dot_columns(F32 acc, I32 columns, I32 pair) {  // by assembler for the reason given in simd_avx512.h
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(pair));
    return acc;
}
static INLINE I32 dot_columns(I32 acc, I32 columns, I32 quad) { return dot(acc, columns, quad); }
static INLINE F32 as_float_sum(F32 x) { return x; }
static INLINE F32 as_float_sum(I32 x) { return to_float(x); }

template <bool INT8>
struct Sum {
    using type = F32;
    static INLINE F32 from(int32_t) { return set(0); }
};
template <>
struct Sum<true> {
    using type = I32;
    static INLINE I32 from(int32_t start) { return set_int(start); }
};

// out[row][0..16 * NV) = start[row] + rows x panel, `dwords` of inner elements. INT8: rows are int8, the panel uint8.
template <bool INT8, int ROWS, int NV>
static __attribute__((noinline)) void panel_product(const char* rows, int64_t stride, const char* panel, int64_t dwords,
                                                    const int32_t* start, float* out, int64_t out_stride) {
    typename Sum<INT8>::type acc[ROWS][NV];
    repeat<ROWS>([&](auto i) UNROLLED { repeat<NV>([&](auto v) UNROLLED { acc[i][v] = Sum<INT8>::from(start[i]); }); });
    for (int64_t p = 0; p < dwords; p++) {
        I32 columns[NV];
        repeat<NV>([&](auto v) UNROLLED { columns[v] = load_int(panel + (p * NV + v) * 64); });
        repeat<ROWS>([&](auto i) UNROLLED {
            int32_t dword;
            memcpy(&dword, rows + i * stride + 4 * p, 4);
            const I32 everywhere = set_int(dword);
            repeat<NV>([&](auto v) UNROLLED { acc[i][v] = dot_columns(acc[i][v], columns[v], everywhere); });
        });
    }
    repeat<ROWS>([&](auto i) UNROLLED {
        repeat<NV>([&](auto v) UNROLLED { store(out + i * out_stride + v * LANES, as_float_sum(acc[i][v])); });
    });
}

template <bool INT8, int ROWS, int NV = 4>
static void panel_product_of(int64_t count, int64_t vectors, const char* rows, int64_t stride, const char* panel, int64_t dwords,
                             const int32_t* start, float* out, int64_t out_stride) {
    if constexpr (ROWS > 1) {
        if (count < ROWS)
            return panel_product_of<INT8, ROWS - 1, NV>(count, vectors, rows, stride, panel, dwords, start, out, out_stride);
    }
    if constexpr (NV > 1) {
        if (vectors < NV)
            return panel_product_of<INT8, ROWS, NV - 1>(count, vectors, rows, stride, panel, dwords, start, out, out_stride);
    }
    panel_product<INT8, ROWS, NV>(rows, stride, panel, dwords, start, out, out_stride);
}

// Scratch of one thread.
struct HeadBuffers {
    char *keys, *values, *rows, *queries, *probabilities;
    float *key_scale, *scores, *result;

    // Takes the pieces from `at` on; returns how many bytes they have.
    int64_t place(char* at, const difloat_attention& a) {
        char* const begin = at;
        const int64_t k = round_up(a.keys, COLUMNS), d = round_up(a.width, LANES), dwords = dwords_of(a);
        auto take = [&at](int64_t bytes) {
            char* piece = at;
            at += round_up(bytes, 64);
            return piece;
        };
        keys = take(4 * k * dwords);
        values = take(2 * k * d);
        rows = take(a.operands == OPERANDS_AS_THEY_ARE ? 0 : k * row_stride(a));
        key_scale = (float*)take(4 * k);
        scores = (float*)take(QUERIES * k * 4);
        result = (float*)take(QUERIES * d * 4);
        probabilities = take(QUERIES * k * 2);
        queries = take(QUERIES * row_stride(a));
        return round_up(at - begin, 4096);
    }
};

// Columns of a panel of values: as few panels of at most 64 as possible, nearly equal, so that none is too narrow to hide the
// latency of the multiply-adds.
static inline int64_t value_columns(int64_t width) {
    const int64_t vectors = round_up(width, LANES) / LANES, panels = (vectors + 3) / 4;
    return (vectors + panels - 1) / panels * LANES;
}

// Values to panels [panel][pair of keys][columns][2]: two rows, word by word in turn.
static void pack_values(const difloat_attention& a, const uint16_t* values, int64_t stride, char* panels) {
    const int64_t width = round_up(a.keys, COLUMNS), columns = round_up(a.width, LANES), most = value_columns(a.width);
    for (int64_t k = 0; k < width; k += 2)
        for (int64_t d = 0; d < columns; d += LANES) {
            const __mmask32 there = first_words(std::min<int64_t>(a.width - d, LANES));
            const uint16_t* from = values + k * stride + d;
            const I32 even = _mm512_maskz_loadu_epi16(k < a.keys ? there : 0, from);
            const I32 odd = _mm512_maskz_loadu_epi16(k + 1 < a.keys ? there : 0, from + stride);
            const I32 low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even));
            const I32 high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd)), 16);
            const int64_t panel = d / most * most, wide = std::min(most, columns - panel);
            store_int(panels + 2 * (panel * width + (k / 2 * wide + d - panel) * 2), bits_or(low, high));
        }
}

// Keys and values of one head, on their grid if there is one.
static void pack_head(const difloat_attention& a, const RowRounder& round, const uint16_t* keys, const uint16_t* values,
                      const HeadBuffers& head) {
    if (a.operands == OPERANDS_AS_THEY_ARE) {
        pack_keys(a, (const char*)keys, 2 * a.key_stride[2], head.keys);
        return pack_values(a, values, a.value_stride[2], head.values);
    }
    const int64_t stride = row_stride(a);
    int32_t sum;
    memset(head.key_scale, 0, 4 * round_up(a.keys, COLUMNS));
    for (int64_t k = 0; k < a.keys; k++) {
        expect_row(keys + std::min(k + AHEAD, a.keys - 1) * a.key_stride[2], a.width);
        head.key_scale[k] = round.operand(keys + k * a.key_stride[2], head.rows + k * stride, &sum);
    }
    pack_keys(a, head.rows, stride, head.keys);
    for (int64_t k = 0; k < a.keys; k++) {
        expect_row(values + std::min(k + AHEAD, a.keys - 1) * a.value_stride[2], a.width);
        round.values(values + k * a.value_stride[2], (uint16_t*)(head.rows + k * stride));
    }
    pack_values(a, (const uint16_t*)head.rows, stride / 2, head.values);
}

// QUERIES rows (or fewer) of one head.
static void attend(const difloat_attention& a, const RowRounder& round, const HeadBuffers& head, const uint16_t* queries,
                   const float* mask, int64_t count, uint16_t* out) {
    const int64_t width = round_up(a.keys, COLUMNS), dwords = dwords_of(a), columns = round_up(a.width, LANES);
    const int64_t stride = row_stride(a), most = value_columns(a.width);
    const bool rounded = a.operands != OPERANDS_AS_THEY_ARE;
    float factor[QUERIES];
    int32_t start[QUERIES] = {};
    for (int64_t i = 0; i < count; i++) {
        factor[i] = a.scale * round.operand(queries + i * a.query_stride[2], head.queries + i * stride, &start[i]);
        start[i] *= -KEY_OFFSET;
    }
    for (int64_t k = 0; k < width; k += COLUMNS) {
        const char* panel = head.keys + k * dwords * 4;
        if (a.operands == OPERANDS_INT8)
            panel_product_of<true, QUERIES>(count, 4, head.queries, stride, panel, dwords, start, head.scores + k, width);
        else
            panel_product_of<false, QUERIES>(count, 4, head.queries, stride, panel, dwords, start, head.scores + k, width);
    }
    float inverse[QUERIES];
    for (int64_t i = 0; i < count; i++) {
        const ScoreRow row{head.scores + i * width, mask ? mask + i * a.mask_stride[2] : nullptr,
                           rounded ? head.key_scale : nullptr, a.keys, width, factor[i]};
        inverse[i] = softmax(row, a, (uint16_t*)head.probabilities + i * width);
    }
    for (int64_t first = 0; first < columns; first += most)
        panel_product_of<false, QUERIES>(count, std::min(most, columns - first) / LANES, head.probabilities, 2 * width,
                                         head.values + 2 * first * width, width / 2, start, head.result + first, columns);
    for (int64_t i = 0; i < count; i++) {
        alignas(64) uint16_t row[1024];
        for (int64_t d = 0; d < columns; d += LANES)
            store_bfloat(row + d, mul(load(head.result + i * columns + d), set(inverse[i])));
        memcpy(out + i * a.out_stride[2], row, a.width * 2);
    }
}

static int attention(const difloat_attention& a, int threads) {
    const int64_t heads = a.batch * a.heads, bytes = HeadBuffers().place(nullptr, a);
    char* memory = scratch(threads * bytes);
    if (!memory) return -1;
    const int64_t cuts = heads % threads && heads < 8 * threads ? threads : 1;
#pragma omp parallel num_threads(threads)
    {
        const RowRounder round(a);
        HeadBuffers head;
        head.place(memory + omp_get_thread_num() * bytes, a);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < heads * cuts; task++) {
            const int64_t b = task / cuts / a.heads, h = task / cuts % a.heads, cut = task % cuts;
            auto at = [b, h](const void* data, const int64_t* stride) { return (uint16_t*)data + b * stride[0] + h * stride[1]; };
            pack_head(a, round, at(a.key, a.key_stride), at(a.value, a.value_stride), head);
            const float* mask = a.mask ? a.mask + b * a.mask_stride[0] + h * a.mask_stride[1] : nullptr;
            const int64_t end = a.queries * (cut + 1) / cuts;
            for (int64_t q = a.queries * cut / cuts; q < end; q += QUERIES) {
                const uint16_t* queries = at(a.query, a.query_stride) + q * a.query_stride[2];
                for (int64_t i = QUERIES; i < std::min<int64_t>(2 * QUERIES, end - q); i++)
                    expect_row(queries + i * a.query_stride[2], a.width);
                attend(a, round, head, queries, mask ? mask + q * a.mask_stride[2] : nullptr, std::min<int64_t>(QUERIES, end - q),
                       at(a.out, a.out_stride) + q * a.out_stride[2]);
            }
        }
    }
    return 0;
}

}  // namespace difloat
