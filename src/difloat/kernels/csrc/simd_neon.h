// Vectors of the ARM unit (NEON with the dot product instructions of ARMv8.2): the names of simd_avx512.h, a quarter as wide.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "compiler.h"

namespace difloat {

constexpr int LANES = 4;
constexpr int VECTORS = 4;    // 16 output channels in a panel
constexpr int TILE_ROWS = 6;  // 6 x 4 accumulators, 4 weights, 1 activation: 29 of 32 registers

constexpr int SUMS = 24;      // accumulators that registers hold beside three columns and a number

using F32 = float32x4_t;
using I32 = int32x4_t;
using Mask = uint32x4_t;

static INLINE F32 set(float x) { return vdupq_n_f32(x); }
static INLINE I32 set_int(int32_t x) { return vdupq_n_s32(x); }
static INLINE F32 load(const float* p) { return vld1q_f32(p); }
static INLINE F32 load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static INLINE F32 load_bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
// The first `count` numbers, fewer than LANES; the rest is 0 and not read.
static INLINE F32 load_first(const float* p, int64_t count) {
    float numbers[LANES] = {};
    memcpy(numbers, p, count * 4);
    return load(numbers);
}
static INLINE F32 load_first_half(const uint16_t* p, int64_t count) {
    uint16_t numbers[LANES] = {};
    memcpy(numbers, p, count * 2);
    return load_half(numbers);
}
static INLINE F32 load_first_bfloat(const uint16_t* p, int64_t count) {
    uint16_t numbers[LANES] = {};
    memcpy(numbers, p, count * 2);
    return load_bfloat(numbers);
}
static INLINE I32 first_lanes(I32 x, int64_t count) {
    const int32_t places[LANES] = {0, 1, 2, 3};
    return vandq_s32(x, vreinterpretq_s32_u32(vcltq_s32(vld1q_s32(places), set_int((int32_t)count))));
}
static INLINE I32 load_int(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
static INLINE void store(float* p, F32 x) { vst1q_f32(p, x); }
static INLINE void store_int(void* p, I32 x) { vst1q_u8((uint8_t*)p, vreinterpretq_u8_s32(x)); }
static INLINE void store_half(uint16_t* p, F32 x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
static INLINE void store_low16(uint16_t* p, I32 x) { vst1_u16(p, vmovn_u32(vreinterpretq_u32_s32(x))); }
static INLINE void store_int8(int8_t* p, I32 x) {
    const int16x4_t words = vmovn_s32(x);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    memcpy(p, &bytes, 4);
}
static INLINE void store_int8_four(int8_t* p, const I32 (&x)[4]) {
    const int16x8_t low = vcombine_s16(vmovn_s32(x[0]), vmovn_s32(x[1])), high = vcombine_s16(vmovn_s32(x[2]), vmovn_s32(x[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

static INLINE F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
static INLINE F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
static INLINE F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
static INLINE F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
static INLINE F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
static INLINE F32 min(F32 a, F32 b) { return vminnmq_f32(a, b); }  // of a number and NaN the number
static INLINE F32 max(F32 a, F32 b) { return vmaxnmq_f32(a, b); }
static INLINE F32 max_or_nan(F32 a, F32 b) { return vmaxq_f32(a, b); }  // NaN if b is one
static INLINE I32 add_int(I32 a, I32 b) { return vaddq_s32(a, b); }
static INLINE I32 sub_int(I32 a, I32 b) { return vsubq_s32(a, b); }
static INLINE I32 max_int(I32 a, I32 b) { return vmaxq_s32(a, b); }
static INLINE I32 bits_and(I32 a, I32 b) { return vandq_s32(a, b); }
static INLINE I32 bits_or(I32 a, I32 b) { return vorrq_s32(a, b); }
template <int N>
static INLINE I32 shift_right(I32 a) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), N));
}
template <int N>
static INLINE I32 shift_left(I32 a) {
    return vshlq_n_s32(a, N);
}
static INLINE I32 as_int(F32 x) { return vreinterpretq_s32_f32(x); }
static INLINE F32 as_float(I32 x) { return vreinterpretq_f32_s32(x); }
static INLINE I32 to_int(F32 x) { return vcvtnq_s32_f32(x); }  // ties to even
static INLINE F32 to_float(I32 x) { return vcvtq_f32_s32(x); }
static INLINE Mask equal(F32 a, F32 b) { return vceqq_f32(a, b); }
static INLINE Mask equal_int(I32 a, I32 b) { return vceqq_s32(a, b); }
static INLINE Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
static INLINE F32 select(Mask m, F32 yes, F32 no) { return vbslq_f32(m, yes, no); }
static INLINE int32_t sum_int(I32 x) { return vaddvq_s32(x); }
static INLINE float sum(F32 x) { return vaddvq_f32(x); }
static INLINE int32_t largest_int(I32 x) { return vmaxvq_s32(x); }
static INLINE float smallest_of(F32 x) { return vminnmvq_f32(x); }
static INLINE float largest_of(F32 x) { return vmaxnmvq_f32(x); }

// acc + four weights times four int8 per lane. The instruction takes signed bytes: the unit moves weights by 128.
static INLINE I32 dot(I32 acc, I32 weights, I32 activations) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(activations));
}

// Four numbers, one for each output channel of few_rows.h.
using Four = F32;
static INLINE Four set_four(float x) { return set(x); }
static INLINE Four load_four(const float* p) { return load(p); }
static INLINE void store_four(float* p, Four x) { store(p, x); }
static INLINE Four to_float(I32 x, int32_t more) { return to_float(add_int(x, set_int(more))); }

// The sums of four vectors.
static INLINE I32 sum_side(const I32 (&a)[4]) { return vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])); }

}  // namespace difloat
