// Packed codes to weights with AVX2: byte shuffles inside 128 bits gather the codes and look up sixteen entries of a table.
#pragma once
#include <string.h>

#include "repeat.h"
#include "rows.h"
#include "transpose.h"

namespace difloat {

constexpr int CODES = 32;  // spread at a time

// Codes of 32 bytes to integers, by the table.
template <int BITS>
struct Table {
    static constexpr int PARTS = BITS <= 4 ? 1 : 1 << (BITS - 4);
    I32 part[PARTS];
    // Where both halves of the table rise or fall by one from entry to entry (integers, E1My), arithmetic replaces the look-up.
    bool straight = BITS >= 7;
    I32 flip[2], base[2];

    explicit Table(const uint8_t* table) {
        for (int i = 0; i < PARTS; i++)
            part[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(table + 16 * i)));
        if (BITS < 7) return;
        constexpr int HALF = 1 << (BITS - 1);
        for (int h = 0; h < 2; h++) {
            const uint8_t* from = table + h * HALF;
            const uint8_t step = from[1] - from[0];
            for (int i = 1; i < HALF; i++) straight &= (uint8_t)(from[i] - from[i - 1]) == step;
            straight &= step == 1 || step == 255;
            flip[h] = _mm256_set1_epi8(step == 1 ? 0 : -1);
            base[h] = _mm256_set1_epi8((char)(from[0] + (step == 1 ? 0 : 1)));  // -c is ~c + 1
        }
    }

    INLINE I32 operator()(I32 codes) const {
        if constexpr (BITS <= 4) return _mm256_shuffle_epi8(part[0], codes);
        if (BITS >= 7 && straight) {
            const I32 upper = BITS == 8 ? codes : _mm256_add_epi8(codes, codes);  // its sign bit
            const I32 place = bits_and(codes, _mm256_set1_epi8((1 << (BITS - 1)) - 1));
            const I32 turned = _mm256_xor_si256(place, _mm256_blendv_epi8(flip[0], flip[1], upper));
            return _mm256_add_epi8(turned, _mm256_blendv_epi8(base[0], base[1], upper));
        }
        I32 found = _mm256_setzero_si256();
        for (int i = 0; i < PARTS; i++) {  // another sixteen than the code's becomes a place from 128 on, which yields 0
            const I32 place = _mm256_adds_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8((char)(16 * i))), _mm256_set1_epi8(0x70));
            found = bits_or(found, _mm256_shuffle_epi8(part[i], place));
        }
        return found;
    }
};

// Places of sixteen codes of BITS bits in 16 bytes: the byte where each begins, with the next one, and the factor that moves it
// to the top of these 16 bits.
template <int BITS>
struct Places {
    alignas(32) uint8_t byte[32] = {};
    alignas(32) uint16_t factor[16] = {};

    constexpr Places() {
        for (int i = 0; i < 16; i++) {
            byte[2 * i] = i * BITS / 8 % 16, byte[2 * i + 1] = (i * BITS / 8 + 1) % 16;
            factor[i] = 1 << (16 - BITS - i * BITS % 8);
        }
    }
};
template <int BITS>
constexpr Places<BITS> PLACES{};

template <int BITS>
static INLINE I32 sixteen_codes(const uint8_t* stream) {
    const I32 raw = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)stream));
    const I32 words = _mm256_shuffle_epi8(raw, load_int(PLACES<BITS>.byte));
    return _mm256_srli_epi16(_mm256_mullo_epi16(words, load_int(PLACES<BITS>.factor)), 16 - BITS);
}

template <int BITS>
constexpr int64_t spread_bytes = BITS == 8 ? 32 : BITS == 4 ? 16 : 2 * BITS + 16;  // that `spread` reads

// 32 codes of BITS bits from a bit stream of which `bytes` bytes are left, one per byte.
template <int BITS>
static INLINE I32 spread(const uint8_t* stream, int64_t bytes) {
    alignas(32) uint8_t packed[32];
    if (bytes < spread_bytes<BITS>) {
        memset(packed, 0, sizeof packed);
        memcpy(packed, stream, std::max<int64_t>(0, std::min<int64_t>(bytes, 4 * BITS)));
        stream = packed;
    }
    if constexpr (BITS == 8) return load_int(stream);
    if constexpr (BITS == 4) {  // low and high nibbles in turn
        const __m128i codes = _mm_loadu_si128((const __m128i*)stream), nibble = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(codes, nibble), high = _mm_and_si128(_mm_srli_epi16(codes, 4), nibble);
        return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
    }
    const I32 packed_words = _mm256_packus_epi16(sixteen_codes<BITS>(stream), sixteen_codes<BITS>(stream + 2 * BITS));
    return _mm256_permute4x64_epi64(packed_words, 0xd8);
}

// At most 32 bytes of which `bytes` are left; zeros follow.
static INLINE I32 load_bytes(const uint8_t* stream, int64_t bytes) {
    if (bytes >= 32) return load_int(stream);
    alignas(32) uint8_t all[32] = {};
    memcpy(all, stream, bytes);
    return load_int(all);
}
static INLINE I32 low_nibbles(I32 codes) { return bits_and(codes, _mm256_set1_epi8(15)); }
static INLINE I32 high_nibbles(I32 codes) { return low_nibbles(shift_right<4>(codes)); }

// 64 numbers: those at even places to the front, those at odd ones behind them.
static INLINE void part_even_and_odd(int8_t* values) {
    const I32 a = load_int(values), b = load_int(values + 32), low = _mm256_set1_epi16(255);
    const I32 even = _mm256_packus_epi16(bits_and(a, low), bits_and(b, low));
    const I32 odd = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    store_int(values, _mm256_permute4x64_epi64(even, 0xd8));
    store_int(values + 32, _mm256_permute4x64_epi64(odd, 0xd8));
}

// Eight codes, one per byte, to their values. `table` holds 256 entries, repeated every 2**BITS.
template <int BITS>
static INLINE F32 values_of(const uint8_t* bytes, const float* table) {
    const I32 codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
    if (BITS > 4) return _mm256_i32gather_ps(table, codes, 4);
    const F32 low = _mm256_permutevar8x32_ps(load(table), codes);
    if (BITS < 4) return low;
    return select(as_float(_mm256_slli_epi32(codes, 28)), _mm256_permutevar8x32_ps(load(table + 8), codes), low);
}

}  // namespace difloat
