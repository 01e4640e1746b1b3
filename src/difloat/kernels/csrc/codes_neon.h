// Packed codes to weights with NEON: one look-up takes up to 64 entries of a table.
#pragma once
#include <string.h>

#include <algorithm>

#include "repeat.h"
#include "rows.h"
#include "transpose.h"

namespace difloat {

constexpr int CODES = 16;  // spread at a time

// Codes of 16 bytes to integers, by the table.
template <int BITS>
struct Table {
    static constexpr int PARTS = BITS <= 4 ? 1 : 1 << (BITS - 4);  // of 16 entries
    uint8x16_t part[PARTS];

    explicit Table(const uint8_t* table) {
        for (int i = 0; i < PARTS; i++) part[i] = vld1q_u8(table + 16 * i);
    }

    INLINE I32 operator()(I32 packed) const {
        uint8x16_t codes = vreinterpretq_u8_s32(packed), found;
        if constexpr (BITS <= 4) {
            found = vqtbl1q_u8(part[0], codes);
        } else if constexpr (BITS == 5) {
            found = vqtbl2q_u8(uint8x16x2_t{{part[0], part[1]}}, codes);
        } else {
            found = vqtbl4q_u8(uint8x16x4_t{{part[0], part[1], part[2], part[3]}}, codes);
            for (int i = 4; i < PARTS; i += 4) {  // places beyond the 64 leave what was found
                codes = vsubq_u8(codes, vdupq_n_u8(64));
                found = vqtbx4q_u8(found, uint8x16x4_t{{part[i], part[i + 1], part[i + 2], part[i + 3]}}, codes);
            }
        }
        return vreinterpretq_s32_u8(found);
    }
};

// Places of sixteen codes of BITS bits in 16 bytes: the byte where each begins, with the next one, and how far it is from their
// lowest bit.
template <int BITS>
struct Places {
    uint8_t byte[32] = {};
    int16_t shift[16] = {};

    constexpr Places() {
        for (int i = 0; i < 16; i++) {
            byte[2 * i] = i * BITS / 8 % 16, byte[2 * i + 1] = (i * BITS / 8 + 1) % 16;
            shift[i] = -(i * BITS % 8);
        }
    }
};
template <int BITS>
constexpr Places<BITS> PLACES{};

template <int BITS>
static INLINE uint8x16_t eight_codes(uint8x16_t raw, int first) {
    const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(raw, vld1q_u8(PLACES<BITS>.byte + 2 * first)));
    const uint16x8_t moved = vshlq_u16(words, vld1q_s16(PLACES<BITS>.shift + first));
    return vreinterpretq_u8_u16(vandq_u16(moved, vdupq_n_u16((1 << BITS) - 1)));
}

template <int BITS>
constexpr int64_t spread_bytes = 16;  // that `spread` reads

// At most 16 bytes of which `bytes` are left; zeros follow.
static INLINE I32 load_bytes(const uint8_t* stream, int64_t bytes) {
    if (bytes >= 16) return load_int(stream);
    uint8_t all[16] = {};
    memcpy(all, stream, std::max<int64_t>(bytes, 0));
    return load_int(all);
}

// 16 codes of BITS bits from a bit stream of which `bytes` bytes are left, one per byte.
template <int BITS>
static INLINE I32 spread(const uint8_t* stream, int64_t bytes) {
    const uint8x16_t raw = vreinterpretq_u8_s32(load_bytes(stream, bytes));
    if constexpr (BITS == 8) return vreinterpretq_s32_u8(raw);
    return vreinterpretq_s32_u8(vuzp1q_u8(eight_codes<BITS>(raw, 0), eight_codes<BITS>(raw, 8)));
}

static INLINE I32 low_nibbles(I32 codes) { return bits_and(codes, set_int(0x0f0f0f0f)); }
static INLINE I32 high_nibbles(I32 codes) { return low_nibbles(shift_right<4>(codes)); }

// 32 numbers: those at even places to the front, those at odd ones behind them.
static INLINE void part_even_and_odd(int8_t* values) {
    const int8x16_t a = vld1q_s8(values), b = vld1q_s8(values + 16);
    vst1q_s8(values, vuzp1q_s8(a, b));
    vst1q_s8(values + 16, vuzp2q_s8(a, b));
}

// Four codes, one per byte, to their values. `table` holds 256 entries, repeated every 2**BITS.
template <int BITS>
static INLINE F32 values_of(const uint8_t* bytes, const float* table) {
    const float values[LANES] = {table[bytes[0]], table[bytes[1]], table[bytes[2]], table[bytes[3]]};
    return load(values);
}

}  // namespace difloat
