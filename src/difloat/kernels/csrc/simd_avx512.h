// Vectors of the AVX-512 unit (F, BW, VL, DQ, VNNI, VBMI): names for the few instructions that the shared code uses.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#define DIFLOAT_VECTORS_512

namespace difloat {

constexpr int LANES = 16;   // float32 or int32 per vector
constexpr int VECTORS = 4;  // vectors side by side in a panel: 64 output channels
constexpr int TILE_ROWS = 6;  // 6 x 4 accumulators, 4 weights, 1 activation: 29 of 32 registers

constexpr int SUMS = 24;     // accumulators that registers hold beside three columns and a number

using F32 = __m512;
using I32 = __m512i;
using Mask = __mmask16;

static inline F32 set(float x) { return _mm512_set1_ps(x); }
static inline I32 set_int(int32_t x) { return _mm512_set1_epi32(x); }
static inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
static inline F32 load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline F32 load_bfloat(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
// The first `count` numbers, fewer than LANES; the rest is 0 and not read.
static inline Mask first_mask(int64_t count) { return (Mask)((1u << count) - 1); }
static inline F32 load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_mask(count), p); }
static inline F32 load_first_half(const uint16_t* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_mask(count), p));
}
static inline F32 load_first_bfloat(const uint16_t* p, int64_t count) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_mask(count), p)), 16));
}
static inline I32 first_lanes(I32 x, int64_t count) { return _mm512_maskz_mov_epi32(first_mask(count), x); }
static inline I32 load_int(const void* p) { return _mm512_loadu_si512(p); }
static inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
static inline void store_int(void* p, I32 x) { _mm512_storeu_si512(p, x); }
static inline void store_half(uint16_t* p, F32 x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void store_int8(int8_t* p, I32 x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
static inline void store_int8_four(int8_t* p, const I32 (&x)[4]) {
    const I32 words = _mm512_packs_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
    const I32 order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packing goes by quarters
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, words));
}
static inline void store_low16(uint16_t* p, I32 x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x)); }

#ifdef __AVX512BF16__
// Two vectors as bfloat16. The instruction takes subnormal numbers for 0, so that with one of them nothing is stored and false comes back.
static inline bool store_two_bfloat(uint16_t* p, F32 first, F32 second) {
    constexpr int SUBNORMAL = 0x20;
    if (_mm512_fpclass_ps_mask(first, SUBNORMAL) | _mm512_fpclass_ps_mask(second, SUBNORMAL)) return false;
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    return true;
}
#endif

static inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
static inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
static inline F32 max_or_nan(F32 a, F32 b) { return _mm512_max_ps(a, b); }  // NaN if b is one
static inline I32 add_int(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
static inline I32 sub_int(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
static inline I32 max_int(I32 a, I32 b) { return _mm512_max_epi32(a, b); }
static inline I32 bits_and(I32 a, I32 b) { return _mm512_and_si512(a, b); }
static inline I32 bits_or(I32 a, I32 b) { return _mm512_or_si512(a, b); }
template <int N>
static inline I32 shift_right(I32 a) {
    return _mm512_srli_epi32(a, N);
}
template <int N>
static inline I32 shift_left(I32 a) {
    return _mm512_slli_epi32(a, N);
}
static inline I32 as_int(F32 x) { return _mm512_castps_si512(x); }
static inline F32 as_float(I32 x) { return _mm512_castsi512_ps(x); }
static inline I32 to_int(F32 x) { return _mm512_cvtps_epi32(x); }  // ties to even
static inline F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
static inline Mask equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline Mask equal_int(I32 a, I32 b) { return _mm512_cmpeq_epi32_mask(a, b); }
static inline Mask both(Mask a, Mask b) { return a & b; }
// The largest magnitude of bfloat16 numbers, as the bits of a float.
static inline int32_t largest_bfloat_bits(const uint16_t* p, int64_t count) {
    const I32 magnitude = _mm512_set1_epi16(0x7fff);
    I32 most = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) most = _mm512_max_epu16(most, _mm512_and_si512(load_int(p + k), magnitude));
    const __mmask32 there = (__mmask32)((1ull << (count - k)) - 1);
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(there, p + k), magnitude));
    const I32 upper = _mm512_srli_epi32(most, 16), lower = _mm512_and_si512(most, _mm512_set1_epi32(0xffff));
    return _mm512_reduce_max_epi32(_mm512_max_epi32(upper, lower)) << 16;
}
static inline F32 select(Mask m, F32 yes, F32 no) { return _mm512_mask_blend_ps(m, no, yes); }
static inline int32_t sum_int(I32 x) { return _mm512_reduce_add_epi32(x); }
static inline float sum(F32 x) { return _mm512_reduce_add_ps(x); }
static inline int32_t largest_int(I32 x) { return _mm512_reduce_max_epi32(x); }
static inline float smallest_of(F32 x) { return _mm512_reduce_min_ps(x); }
static inline float largest_of(F32 x) { return _mm512_reduce_max_ps(x); }

// acc + four uint8 times four int8 per lane. The assembler keeps the accumulator in its register: GCC 12 copies it around the
// intrinsic, which halves the speed of the whole product. By value: an operand in memory would pin its array there.
static inline __attribute__((always_inline)) I32 dot(I32 acc, I32 weights, I32 activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(activations));
    return acc;
}

// Four numbers, one for each output channel of few_rows.h.
using Four = __m128;
static inline Four set_four(float x) { return _mm_set1_ps(x); }
static inline Four load_four(const float* p) { return _mm_loadu_ps(p); }
static inline void store_four(float* p, Four x) { _mm_storeu_ps(p, x); }
static inline Four fma(Four a, Four b, Four c) { return _mm_fmadd_ps(a, b, c); }
static inline Four to_float(__m128i x, int32_t more) { return _mm_cvtepi32_ps(_mm_add_epi32(x, _mm_set1_epi32(more))); }

// The sums of four vectors.
static inline __m128i sum_side(const I32 (&a)[4]) {
    const I32 ab = add_int(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const I32 cd = add_int(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    const I32 all = add_int(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

}  // namespace difloat
