// Packed codes to weights with AVX-512 VBMI: 64 codes by one look-up.
#pragma once
#include <algorithm>

#include "repeat.h"
#include "rows.h"
#include "transpose.h"

namespace difloat {

constexpr int CODES = 64;  // spread at a time

// Codes of up to 64 bytes to integers, by the table. The bits of a byte above its code may hold anything.
template <int BITS>
struct Table {
    I32 part[BITS == 8 ? 4 : BITS == 7 ? 2 : 1];

    explicit Table(const uint8_t* table) {
        for (size_t i = 0; i < sizeof(part) / 64; i++) part[i] = load_int(table + 64 * i);
    }

    I32 operator()(I32 codes) const {
        if (BITS <= 6) return _mm512_permutexvar_epi8(codes, part[0]);
        I32 low = _mm512_permutex2var_epi8(part[0], codes, part[BITS >= 7 ? 1 : 0]);
        if (BITS == 7) return low;
        I32 high = _mm512_permutex2var_epi8(part[BITS == 8 ? 2 : 0], codes, part[BITS == 8 ? 3 : 0]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
    }
};

static INLINE __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1;
}

// Places of codes inside bytes, 64 at a time; filled in by the compiler.
template <int BITS>
struct Places {
    alignas(64) uint8_t byte[64] = {}, word_shift[64] = {}, dword_shift[8][64] = {};

    constexpr Places() {
        for (int i = 0; i < 64; i++) {
            byte[i] = i / 8 * BITS + i % 8;  // eight codes, which are BITS bytes, to every 64-bit word
            word_shift[i] = i % 8 * BITS;
            for (int s = 0; s < 8; s++)  // quad s of each of the two dwords in a word
                dword_shift[s][i] = (i % 8 / 4 * 32 + (4 * s + i % 4) * BITS) % 64;
        }
    }
};
template <int BITS>
constexpr Places<BITS> PLACES{};

template <int BITS>
constexpr int64_t spread_bytes = 8 * BITS;  // that `spread` reads

// 64 codes of BITS bits from a bit stream of which `bytes` bytes are left, one per byte.
template <int BITS>
static inline I32 spread(const uint8_t* stream, int64_t bytes) {
    I32 raw = _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(bytes, 8 * BITS)), stream);
    if (BITS == 8) return raw;
    const I32 words = _mm512_permutexvar_epi8(load_int(PLACES<BITS>.byte), raw);
    return _mm512_multishift_epi64_epi8(load_int(PLACES<BITS>.word_shift), words);
}

// At most 64 bytes of which `bytes` are left; zeros follow.
static INLINE I32 load_bytes(const uint8_t* stream, int64_t bytes) {
    return bytes >= 64 ? load_int(stream) : _mm512_maskz_loadu_epi8(first_bytes(bytes), stream);
}
static INLINE I32 low_nibbles(I32 codes) { return codes; }  // the look-up sees the lowest bits only
static INLINE I32 high_nibbles(I32 codes) { return shift_right<4>(codes); }

// 128 numbers: those at even places to the front, those at odd ones behind them.
static INLINE void part_even_and_odd(int8_t* values) {
    alignas(64) uint8_t even[64], odd[64];
    for (int i = 0; i < 64; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
    const I32 a = load_int(values), b = load_int(values + 64);
    store_int(values, _mm512_permutex2var_epi8(a, load_int(even), b));
    store_int(values + 64, _mm512_permutex2var_epi8(a, load_int(odd), b));
}

// Sixteen codes, one per byte, to their values. `table` holds 256 entries, repeated every 2**BITS.
template <int BITS>
static INLINE F32 values_of(const uint8_t* bytes, const float* table) {
    const I32 codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    if (BITS <= 4) return _mm512_permutexvar_ps(codes, load(table));
    return _mm512_i32gather_ps(bits_and(codes, set_int((1 << BITS) - 1)), table, 4);
}

// Sixteen rows become a column block. Widths that divide 8 are transposed packed, 64 bytes of every row at a time, and a dword of
// packed codes then yields 8 / BITS quads; the others are spread to bytes first.
template <int BITS>
static void unpack_block(const Rows& rows, int64_t row, int64_t tap, int64_t channels, const uint8_t* table, uint8_t* panel) {
    constexpr bool PACKED = 8 % BITS == 0;
    constexpr int QUADS = PACKED ? 8 / BITS : 1;  // per dword
    const Table<BITS> lookup(table);
    const int64_t quads = quads_of(channels), bytes = (channels * BITS + 7) / 8, step = PACKED ? 64 : 8 * BITS;
    const uint8_t* stream[16];
    for (int i = 0; i < 16; i++) stream[i] = rows.at(row + i, tap);
    int64_t quad = 0;
    for (int64_t at = 0; at < bytes; at += step) {
        I32 r[16];
        const __mmask64 there = first_bytes(bytes - at);
        repeat<16>([&](auto i) UNROLLED {
            r[i] = PACKED ? _mm512_maskz_loadu_epi8(there, stream[i] + at) : spread<BITS>(stream[i] + at, bytes - at);
        });
        transpose(r);
        uint8_t* to = panel + quad * WIDTH * 4;
        quad += 16 * QUADS;
        repeat<16>([&](auto d) UNROLLED {
            repeat<QUADS>([&](auto s) UNROLLED {
                constexpr int Q = d * QUADS + s;
                I32 codes = QUADS == 1 ? r[d] : _mm512_multishift_epi64_epi8(load_int(PLACES<BITS>.dword_shift[s]), r[d]);
                if (quad - 16 * QUADS + Q < quads) _mm512_store_si512(to + Q * WIDTH * 4, lookup(codes));
            });
        });
    }
}

}  // namespace difloat
