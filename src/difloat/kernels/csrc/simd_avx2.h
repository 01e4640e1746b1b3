// Vectors of the AVX2 unit (AVX2, FMA, F16C): the names of simd_avx512.h, half as wide.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "compiler.h"

namespace difloat {

constexpr int LANES = 8;
constexpr int VECTORS = 2;    // 16 output channels in a panel
#if defined(__AVXVNNI__)
constexpr int TILE_ROWS = 6;  // 6 x 2 accumulators, 2 weights, 1 activation: 15 of 16 registers
#else
constexpr int TILE_ROWS = 4;  // 4 x 2 accumulators, 4 weights, 1 activation, a product: 14
#endif

constexpr int SUMS = 12;  // accumulators that registers hold beside three columns and a number

using F32 = __m256;
using I32 = __m256i;
using Mask = __m256;

static inline F32 set(float x) { return _mm256_set1_ps(x); }
static inline I32 set_int(int32_t x) { return _mm256_set1_epi32(x); }
static inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
static inline F32 load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline F32 load_bfloat(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
// The first `count` numbers, fewer than LANES; the rest is 0 and not read.
static inline F32 load_first(const float* p, int64_t count) {
    float numbers[LANES] = {};
    memcpy(numbers, p, count * 4);
    return load(numbers);
}
static inline F32 load_first_half(const uint16_t* p, int64_t count) {
    uint16_t numbers[LANES] = {};
    memcpy(numbers, p, count * 2);
    return load_half(numbers);
}
static inline F32 load_first_bfloat(const uint16_t* p, int64_t count) {
    uint16_t numbers[LANES] = {};
    memcpy(numbers, p, count * 2);
    return load_bfloat(numbers);
}
static inline I32 first_lanes(I32 x, int64_t count) {
    alignas(32) int32_t lanes[LANES] = {}, all[LANES];
    _mm256_store_si256((__m256i*)all, x);
    memcpy(lanes, all, count * 4);
    return _mm256_load_si256((const __m256i*)lanes);
}
static inline I32 load_int(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
static inline void store_int(void* p, I32 x) { _mm256_storeu_si256((__m256i*)p, x); }
static inline void store_half(uint16_t* p, F32 x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline __m128i narrow16(I32 x) {  // the low halves of eight small integers
    I32 even = _mm256_shuffle_epi8(
        x, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1,
                            -1, -1, -1, -1, -1));
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(even, 0x08));
}
static inline void store_low16(uint16_t* p, I32 x) { _mm_storeu_si128((__m128i*)p, narrow16(x)); }
static inline void store_int8(int8_t* p, I32 x) {
    __m128i words = narrow16(x);
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

static inline void store_int8_four(int8_t* p, const I32 (&x)[4]) {
    const I32 bytes = _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
    store_int(p, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

static inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
static inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
static inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
static inline F32 max_or_nan(F32 a, F32 b) { return _mm256_max_ps(a, b); }  // NaN if b is one
static inline I32 add_int(I32 a, I32 b) { return _mm256_add_epi32(a, b); }
static inline I32 sub_int(I32 a, I32 b) { return _mm256_sub_epi32(a, b); }
static inline I32 max_int(I32 a, I32 b) { return _mm256_max_epi32(a, b); }
static inline I32 bits_and(I32 a, I32 b) { return _mm256_and_si256(a, b); }
static inline I32 bits_or(I32 a, I32 b) { return _mm256_or_si256(a, b); }
template <int N>
static inline I32 shift_right(I32 a) {
    return _mm256_srli_epi32(a, N);
}
template <int N>
static inline I32 shift_left(I32 a) {
    return _mm256_slli_epi32(a, N);
}
static inline I32 as_int(F32 x) { return _mm256_castps_si256(x); }
static inline F32 as_float(I32 x) { return _mm256_castsi256_ps(x); }
static inline I32 to_int(F32 x) { return _mm256_cvtps_epi32(x); }
static inline F32 to_float(I32 x) { return _mm256_cvtepi32_ps(x); }
static inline Mask equal(F32 a, F32 b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
static inline Mask equal_int(I32 a, I32 b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
static inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
static inline F32 select(Mask m, F32 yes, F32 no) { return _mm256_blendv_ps(no, yes, m); }
static inline int32_t sum_int(I32 x) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
static inline float sum(F32 x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline int32_t largest_int(I32 x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
static inline float smallest_of(F32 x) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}
static inline float largest_of(F32 x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

// acc + four uint8 times four int8 per lane.
#if defined(__AVXVNNI__) && !defined(_MSC_VER)
static INLINE I32 dot(I32 acc, I32 weights, I32 activations) {  // by assembler for the reason given in simd_avx512.h
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(weights), "x"(activations));
    return acc;
}
#elif defined(__AVXVNNI__)
static INLINE I32 dot(I32 acc, I32 weights, I32 activations) { return _mm256_dpbusd_avx_epi32(acc, weights, activations); }
#elif defined(__AVX512VNNI__)
static INLINE I32 dot(I32 acc, I32 weights, I32 activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(activations));
    return acc;
}
#else
// The middle sums are 16 bits wide and saturate: exact for weights up to 128, since 2 * 128 * 127 < 2**15 and
// 2 * 128 * -128 = -2**15.
static INLINE I32 dot(I32 acc, I32 weights, I32 activations) {
    const I32 pairs = _mm256_maddubs_epi16(weights, activations);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// Four numbers, one for each output channel of few_rows.h.
using Four = __m128;
static inline Four set_four(float x) { return _mm_set1_ps(x); }
static inline Four load_four(const float* p) { return _mm_loadu_ps(p); }
static inline void store_four(float* p, Four x) { _mm_storeu_ps(p, x); }
static inline Four fma(Four a, Four b, Four c) { return _mm_fmadd_ps(a, b, c); }
static inline Four to_float(__m128i x, int32_t more) { return _mm_cvtepi32_ps(_mm_add_epi32(x, _mm_set1_epi32(more))); }

// The sums of four vectors.
static inline __m128i sum_side(const I32 (&a)[4]) {
    const I32 all = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

}  // namespace difloat
