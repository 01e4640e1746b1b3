// Attention in bfloat16: scores, softmax and weighted values of a few queries at a time, so that scores never leave the cache.
//
// Both products are rows times panels of 64 columns, two inner elements of a column side by side as one instruction takes them:
// queries times the transposed keys, then probabilities times values. Scores and sums are float32; probabilities are rounded to
// bfloat16 before the second product and divided by their float32 sum after it.
#pragma once
#include <math.h>
#include <omp.h>
#include <string.h>

#include <algorithm>

#include "difloat.h"
#include "repeat.h"
#include "scratch.h"
#include "transpose.h"

namespace difloat {

constexpr int QUERIES = 6;        // rows of a tile: 6 x 4 accumulators
constexpr int64_t COLUMNS = 64;   // of a panel
constexpr float LOWEST = -1e30f;  // instead of minus infinity, so that differences stay numbers

static INLINE F32 dot_bfloat(F32 acc, I32 columns, I32 pair) {  // by assembler for the reason given in simd_avx512.h
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(columns), "v"(pair));
    return acc;
}

// out[row][0..16 * NV) = rows x panel, `pairs` pairs of inner elements.
template <int ROWS, int NV>
static __attribute__((noinline)) void panel_product(const uint16_t* rows, int64_t stride, const uint16_t* panel, int64_t pairs,
                                                    float* out, int64_t out_stride) {
    F32 acc[ROWS][NV];
    repeat<ROWS>([&](auto i) UNROLLED { repeat<NV>([&](auto v) UNROLLED { acc[i][v] = set(0); }); });
    for (int64_t p = 0; p < pairs; p++) {
        I32 columns[NV];
        repeat<NV>([&](auto v) UNROLLED { columns[v] = load_int(panel + (p * NV + v) * 32); });
        repeat<ROWS>([&](auto i) UNROLLED {
            int32_t pair;
            memcpy(&pair, rows + i * stride + 2 * p, 4);
            const I32 both_elements = set_int(pair);
            repeat<NV>([&](auto v) UNROLLED { acc[i][v] = dot_bfloat(acc[i][v], columns[v], both_elements); });
        });
    }
    repeat<ROWS>([&](auto i) UNROLLED {
        repeat<NV>([&](auto v) UNROLLED { store(out + i * out_stride + v * LANES, acc[i][v]); });
    });
}

template <int ROWS, int NV = 4>
static void panel_product_of(int64_t count, int64_t vectors, const uint16_t* rows, int64_t stride, const uint16_t* panel,
                             int64_t pairs, float* out, int64_t out_stride) {
    if constexpr (ROWS > 1) {
        if (count < ROWS) return panel_product_of<ROWS - 1, NV>(count, vectors, rows, stride, panel, pairs, out, out_stride);
    }
    if constexpr (NV > 1) {
        if (vectors < NV) return panel_product_of<ROWS, NV - 1>(count, vectors, rows, stride, panel, pairs, out, out_stride);
    }
    panel_product<ROWS, NV>(rows, stride, panel, pairs, out, out_stride);
}

// 2**x for x <= 0, to bfloat16's precision and beyond: a polynomial on the fraction (relative error 2e-6).
static INLINE F32 exp2_of(F32 x) {
    const F32 whole = _mm512_roundscale_ps(x, 0), f = sub(x, whole);
    F32 p = set(1.33336498402e-3f);
    for (float c : {9.61812910763e-3f, 5.55041086648e-2f, 2.40226506959e-1f, 6.93147180560e-1f, 1.0f}) p = fma(p, f, set(c));
    return _mm512_scalef_ps(p, whole);
}

// One row of scores [0, keys) to probabilities in bfloat16, not yet divided by their sum, whose inverse is returned. Columns up to
// `width` become 0.
static float softmax(float* scores, const float* mask, int64_t keys, int64_t width, float scale, uint16_t* probabilities) {
    const float log2e = 1.44269504f;
    F32 most = set(LOWEST);
    for (int64_t k = 0; k < width; k += LANES) {
        const Mask there = keys - k >= LANES ? 0xffff : keys > k ? (Mask)((1 << (keys - k)) - 1) : 0;
        F32 x = mul(load(scores + k), set(scale * log2e));
        if (mask) x = max(fma(_mm512_maskz_loadu_ps(there, mask + k), set(log2e), x), set(LOWEST));
        x = select(there, x, set(2 * LOWEST));
        store(scores + k, x);
        most = max(most, x);
    }
    const F32 top = set(_mm512_reduce_max_ps(most));
    F32 total = set(0);
    for (int64_t k = 0; k < width; k += LANES) {
        const F32 difference = sub(load(scores + k), top);
        const F32 e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(difference, set(-126), _CMP_GE_OQ), exp2_of(max(difference, set(-126))));
        total = add(total, e);
        _mm256_storeu_si256((__m256i*)(probabilities + k), (__m256i)_mm512_cvtneps_pbh(e));
    }
    return 1.0f / sum(total);
}

// Scratch of one thread.
struct HeadBuffers {
    uint16_t *keys, *values, *probabilities, *queries;
    float *scores, *result;

    static int64_t bytes(int64_t keys, int64_t width) {
        const int64_t k = round_up(keys, COLUMNS), d = round_up(width, LANES);
        return round_up(2 * k * (width + 1) + 2 * k * d + QUERIES * (6 * k + 4 * d + 2 * (width + 1)) + 6 * 64, 4096);
    }
    HeadBuffers(char* at, int64_t count, int64_t width) {
        const int64_t k = round_up(count, COLUMNS), d = round_up(width, LANES);
        auto take = [&at](int64_t size) {
            char* begin = at;
            at += round_up(size, 64);
            return begin;
        };
        keys = (uint16_t*)take(2 * k * (width + 1));
        values = (uint16_t*)take(2 * k * d);
        scores = (float*)take(QUERIES * k * 4);
        result = (float*)take(QUERIES * d * 4);
        probabilities = (uint16_t*)take(QUERIES * k * 2);
        queries = (uint16_t*)take(QUERIES * 2 * (width + 1));
    }
};

static INLINE __mmask32 first_words(int64_t count) {
    return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

// Keys to panels [keys / 64][pair of dimensions][64][2]: sixteen keys and sixteen pairs at a time, transposed in registers.
static void pack_keys(const difloat_attention& a, const uint16_t* keys, uint16_t* panels) {
    const int64_t pairs = (a.width + 1) / 2;
    for (int64_t k = 0; k < round_up(a.keys, COLUMNS); k += 16)
        for (int64_t d = 0; d < a.width; d += 32) {
            I32 r[16];
            repeat<16>([&](auto i) UNROLLED {
                const __mmask32 there = k + i < a.keys ? first_words(a.width - d) : 0;
                r[i] = _mm512_maskz_loadu_epi16(there, keys + (k + i) * a.key_stride[2] + d);
            });
            transpose(r);
            uint16_t* to = panels + (k / COLUMNS * pairs * COLUMNS + k % COLUMNS) * 2;
            repeat<16>([&](auto p) UNROLLED {
                if (d / 2 + p < pairs) store_int(to + (d / 2 + p) * COLUMNS * 2, r[p]);
            });
        }
}

// Columns of a panel of values: as few panels of at most 64 as possible, nearly equal, so that none is too narrow to hide the
// latency of the multiply-adds.
static inline int64_t value_columns(int64_t width) {
    const int64_t vectors = round_up(width, LANES) / LANES, panels = (vectors + 3) / 4;
    return (vectors + panels - 1) / panels * LANES;
}

// Values to panels [panel][pair of keys][columns][2]: two rows, word by word in turn.
static void pack_values(const difloat_attention& a, const uint16_t* values, uint16_t* panels) {
    const int64_t width = round_up(a.keys, COLUMNS), columns = round_up(a.width, LANES), most = value_columns(a.width);
    for (int64_t k = 0; k < width; k += 2)
        for (int64_t d = 0; d < columns; d += LANES) {
            const __mmask32 there = first_words(std::min<int64_t>(a.width - d, LANES));
            const uint16_t* from = values + k * a.value_stride[2] + d;
            const I32 even = _mm512_maskz_loadu_epi16(k < a.keys ? there : 0, from);
            const I32 odd = _mm512_maskz_loadu_epi16(k + 1 < a.keys ? there : 0, from + a.value_stride[2]);
            const I32 low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(even));
            const I32 high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(odd)), 16);
            const int64_t panel = d / most * most, wide = std::min(most, columns - panel);
            store_int(panels + panel * width + (k / 2 * wide + d - panel) * 2, bits_or(low, high));
        }
}

// QUERIES rows (or fewer) of one head.
static void attend(const difloat_attention& a, const HeadBuffers& head, const uint16_t* queries, const float* mask, int64_t count,
                   uint16_t* out) {
    const int64_t width = round_up(a.keys, COLUMNS), pairs = (a.width + 1) / 2, columns = round_up(a.width, LANES);
    for (int64_t i = 0; i < count; i++) {  // an odd width needs a zero behind it
        memcpy(head.queries + i * 2 * pairs, queries + i * a.query_stride[2], a.width * 2);
        if (a.width % 2) head.queries[i * 2 * pairs + a.width] = 0;
    }
    for (int64_t k = 0; k < width; k += COLUMNS)
        panel_product_of<QUERIES>(count, 4, head.queries, 2 * pairs, head.keys + k * pairs * 2, pairs, head.scores + k, width);
    float inverse[QUERIES];
    for (int64_t i = 0; i < count; i++)
        inverse[i] = softmax(head.scores + i * width, mask ? mask + i * a.mask_stride[2] : nullptr, a.keys, width, a.scale,
                             head.probabilities + i * width);
    const int64_t most = value_columns(a.width);
    for (int64_t first = 0; first < columns; first += most) {
        const int64_t vectors = std::min(most, columns - first) / LANES;
        panel_product_of<QUERIES>(count, vectors, head.probabilities, width, head.values + first * width, width / 2,
                                  head.result + first, columns);
    }
    for (int64_t i = 0; i < count; i++) {
        alignas(64) uint16_t row[1024];
        for (int64_t d = 0; d < columns; d += LANES) {
            const F32 x = mul(load(head.result + i * columns + d), set(inverse[i]));
            _mm256_store_si256((__m256i*)(row + d), (__m256i)_mm512_cvtneps_pbh(x));
        }
        memcpy(out + i * a.out_stride[2], row, a.width * 2);
    }
}

static int attention(const difloat_attention& a, int threads) {
    const int64_t heads = a.batch * a.heads, bytes = HeadBuffers::bytes(a.keys, a.width);
    char* memory = scratch(threads * bytes);
    if (!memory) return -1;
    const int64_t cuts = heads % threads && heads < 8 * threads ? threads : 1;
#pragma omp parallel num_threads(threads)
    {
        const HeadBuffers head(memory + omp_get_thread_num() * bytes, a.keys, a.width);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < heads * cuts; task++) {
            const int64_t b = task / cuts / a.heads, h = task / cuts % a.heads, cut = task % cuts;
            auto at = [b, h](const void* data, const int64_t* stride) { return (uint16_t*)data + b * stride[0] + h * stride[1]; };
            pack_keys(a, at(a.key, a.key_stride), head.keys);
            pack_values(a, at(a.value, a.value_stride), head.values);
            const float* mask = a.mask ? a.mask + b * a.mask_stride[0] + h * a.mask_stride[1] : nullptr;
            const int64_t end = a.queries * (cut + 1) / cuts;
            for (int64_t q = a.queries * cut / cuts; q < end; q += QUERIES)
                attend(a, head, at(a.query, a.query_stride) + q * a.query_stride[2], mask ? mask + q * a.mask_stride[2] : nullptr,
                       std::min<int64_t>(QUERIES, end - q), at(a.out, a.out_stride) + q * a.out_stride[2]);
        }
    }
    return 0;
}

}  // namespace difloat
