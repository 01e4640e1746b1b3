// A square of dwords, rows to columns.
#pragma once
#include "repeat.h"

namespace difloat {

#ifdef DIFLOAT_VECTORS_512

// Transpose 16 x 16 dwords in registers.
static INLINE void transpose(I32 (&r)[16]) {
    I32 t[16];
    repeat<8>([&](auto i) UNROLLED {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    });
    repeat<4>([&](auto i) UNROLLED {
        repeat<2>([&](auto j) UNROLLED {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        });
    });
    repeat<4>([&](auto i) UNROLLED {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    });
    repeat<4>([&](auto i) UNROLLED {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    });
}

#elif defined(__ARM_NEON)

// Transpose 4 x 4 dwords in registers.
static INLINE void transpose(I32 (&r)[4]) {
    const int32x4_t a = vtrn1q_s32(r[0], r[1]), b = vtrn2q_s32(r[0], r[1]), c = vtrn1q_s32(r[2], r[3]), d = vtrn2q_s32(r[2], r[3]);
    r[0] = vcombine_s32(vget_low_s32(a), vget_low_s32(c)), r[1] = vcombine_s32(vget_low_s32(b), vget_low_s32(d));
    r[2] = vcombine_s32(vget_high_s32(a), vget_high_s32(c)), r[3] = vcombine_s32(vget_high_s32(b), vget_high_s32(d));
}

#else

// Transpose 8 x 8 dwords in registers.
static INLINE void transpose(I32 (&r)[8]) {
    I32 t[8];
    repeat<4>([&](auto i) UNROLLED {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    });
    repeat<2>([&](auto i) UNROLLED {
        repeat<2>([&](auto j) UNROLLED {
            r[4 * i + 2 * j] = _mm256_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
            r[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
        });
    });
    repeat<4>([&](auto i) UNROLLED {
        t[i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
        t[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
    });
    repeat<8>([&](auto i) UNROLLED { r[i] = t[i]; });
}

#endif

}  // namespace difloat
