// Packed codes to panels: the weights of a few output channels as the product reads them, unpacked into a core's cache.
//
// A panel holds WIDTH = LANES * VECTORS output channels, [tap][quad][channel][4]: four input channels (a quad) of every output
// channel side by side, as one multiply-add instruction takes them. Input channels that are missing in the last quad hold
// something; the activations there are 0.
#pragma once
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "difloat.h"
#include "repeat.h"
#include "transpose.h"

namespace difloat {

constexpr int WIDTH = LANES * VECTORS;

static inline int64_t quads_of(int64_t channels) { return (channels + 3) / 4; }
static inline int64_t code_bytes(const difloat_weight& w) { return (w.channels * w.bits + 7) / 8; }
static inline int64_t panel_bytes(const difloat_weight& w) { return w.taps * quads_of(w.channels) * WIDTH * 4; }
// Scratch in which the bytes of a row stand side by side where they do not in the weight itself.
static inline int64_t gather_bytes(const difloat_weight& w) {
    return w.byte_stride == 1 ? 0 : WIDTH * w.taps * code_bytes(w);
}

// The codes of output channel `first + row` and `tap`; beyond the last channel those of the last.
struct Rows {
    const uint8_t* base;
    int64_t row_stride, tap_stride, last;

    Rows(const difloat_weight& w, int64_t first, uint8_t* gathered) : last(std::min<int64_t>(w.rows - first, WIDTH) - 1) {
        base = w.data + first * w.row_stride, row_stride = w.row_stride, tap_stride = w.tap_stride;
        if (w.byte_stride == 1) return;
        const int64_t bytes = code_bytes(w);
        for (int64_t row = 0; row <= last; row++)
            for (int64_t byte = 0; byte < bytes; byte++) {
                const uint8_t* from = base + row * row_stride + byte * w.byte_stride;
                uint8_t* to = gathered + row * w.taps * bytes + byte;
                for (int64_t tap = 0; tap < w.taps; tap++) to[tap * bytes] = from[tap * w.tap_stride];
            }
        base = gathered, row_stride = w.taps * bytes, tap_stride = bytes;
    }

    const uint8_t* at(int64_t row, int64_t tap) const { return base + std::min(row, last) * row_stride + tap * tap_stride; }
};

#ifdef __AVX512VBMI__

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

// 64 codes of BITS bits from a bit stream of which `bytes` bytes are left, one per byte.
template <int BITS>
static inline I32 spread(const uint8_t* stream, int64_t bytes) {
    I32 raw = _mm512_maskz_loadu_epi8(first_bytes(std::min<int64_t>(bytes, 8 * BITS)), stream);
    if (BITS == 8) return raw;
    const I32 words = _mm512_permutexvar_epi8(load_int(PLACES<BITS>.byte), raw);
    return _mm512_multishift_epi64_epi8(load_int(PLACES<BITS>.word_shift), words);
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

#else

// 32 weights from a bit stream of which `bytes` bytes are left, one per byte.
template <int BITS>
static INLINE I32 spread(const uint8_t* stream, int64_t bytes, const uint8_t* table) {
    alignas(32) uint8_t packed[4 * BITS] = {}, weights[32];
    if (bytes < 4 * BITS) {
        memcpy(packed, stream, bytes);
        stream = packed;
    }
    if constexpr (BITS == 4) {  // low and high nibbles in turn, through the table
        const __m128i codes = _mm_loadu_si128((const __m128i*)stream), nibble = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(codes, nibble), high = _mm_and_si128(_mm_srli_epi16(codes, 4), nibble);
        const __m256i order = _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), order);
    }
    for (int word = 0; word < 4; word++) {  // eight codes
        uint64_t codes = 0;
        memcpy(&codes, stream + word * BITS, BITS);
        for (int i = 0; i < 8; i++) weights[8 * word + i] = table[codes >> (i * BITS) & ((1 << BITS) - 1)];
    }
    return load_int(weights);
}

// Eight rows become a column block, 32 input channels at a time.
template <int BITS>
static void unpack_block(const Rows& rows, int64_t row, int64_t tap, int64_t channels, const uint8_t* table, uint8_t* panel) {
    const int64_t quads = quads_of(channels), bytes = (channels * BITS + 7) / 8;
    const uint8_t* stream[LANES];
    for (int i = 0; i < LANES; i++) stream[i] = rows.at(row + i, tap);
    for (int64_t quad = 0, at = 0; at < bytes; quad += 8, at += 4 * BITS) {
        I32 r[LANES];
        repeat<LANES>([&](auto i) UNROLLED { r[i] = spread<BITS>(stream[i] + at, bytes - at, table); });
        transpose(r);
        repeat<LANES>([&](auto q) UNROLLED {
            if (quad + q < quads) store_int(panel + (quad + q) * WIDTH * 4, r[q]);
        });
    }
}

#endif

// How many vectors of the panel of the output channels from `first` on are in use: all, or half of them where these suffice.
static inline int vectors_of(const difloat_weight& w, int64_t first) {
    return w.rows - first > WIDTH / 2 ? VECTORS : VECTORS / 2;
}

template <int BITS>
static void unpack_all(const difloat_weight& w, const Rows& rows, int vectors, uint8_t* panel) {
    for (int64_t tap = 0; tap < w.taps; tap++)
        for (int v = 0; v < vectors; v++) {
            uint8_t* block = panel + tap * quads_of(w.channels) * WIDTH * 4 + v * LANES * 4;
            unpack_block<BITS>(rows, v * LANES, tap, w.channels, w.table, block);
        }
}

// Unpack the panel of the output channels from `first` on. `panel` is aligned to 64 bytes.
static void unpack_panel(const difloat_weight& w, int64_t first, uint8_t* panel, uint8_t* gathered) {
    const Rows rows(w, first, gathered);
    const int vectors = vectors_of(w, first);
    switch (w.bits) {
        case 1: return unpack_all<1>(w, rows, vectors, panel);
        case 2: return unpack_all<2>(w, rows, vectors, panel);
        case 3: return unpack_all<3>(w, rows, vectors, panel);
        case 4: return unpack_all<4>(w, rows, vectors, panel);
        case 5: return unpack_all<5>(w, rows, vectors, panel);
        case 6: return unpack_all<6>(w, rows, vectors, panel);
        case 7: return unpack_all<7>(w, rows, vectors, panel);
        default: return unpack_all<8>(w, rows, vectors, panel);
    }
}

// Scales (and zero points) of a panel, [group][channel]: the integers of the weight are worth `scale * unit`.
static void unpack_scales(const difloat_weight& w, int64_t first, float* scale, float* zero) {
    for (int64_t c = 0; c < WIDTH; c++) {
        const int64_t row = std::min(first + c, w.rows - 1) * w.scale_stride;
        for (int64_t g = 0; g < w.groups; g++) {
            scale[g * WIDTH + c] = w.scale[row + g] * w.unit;
            if (w.zero) zero[g * WIDTH + c] = w.zero[row + g];
        }
    }
}

// Integers of the weight of one tap, summed over the channels from `begin` to `end`, for LANES output channels.
static INLINE I32 sum_channels(const difloat_weight& w, const uint8_t* column, int64_t begin, int64_t end) {
    I32 integers = set_int(w.minimum * (int32_t)(end - begin));
    for (int64_t k = begin; k < end; k += 4) {  // ones for the channels that are there
        const I32 ones = set_int(end - k >= 4 ? 0x01010101 : (1 << 8 * (end - k)) / 255);
        integers = dot(integers, load_int(column + k * WIDTH), ones);
    }
    return integers;
}

// `factor` times the sum of the weight's integers over all taps, [group][channel]. Wraps around as the sums do that it goes into.
static void sum_integers(const difloat_weight& w, const uint8_t* panel, int32_t factor, int32_t* sums) {
    const int64_t quads = quads_of(w.channels);
    for (int64_t g = 0; g < w.groups; g++)
        for (int v = 0; v < VECTORS; v++) {
            const int64_t begin = g * w.group_channels, end = std::min(begin + w.group_channels, w.channels);
            int32_t* to = sums + g * WIDTH + v * LANES;
            I32 total = set_int(0);
            for (int64_t tap = 0; tap < w.taps; tap++)
                total = add_int(total, sum_channels(w, panel + (tap * quads * VECTORS + v) * LANES * 4, begin, end));
            store_int((uint8_t*)to, total);
            for (int n = 0; n < LANES; n++) to[n] = (int32_t)((uint32_t)to[n] * (uint32_t)factor);
        }
}

// Sum of the weight's values per tap, [tap][channel]: what a constant input of 1 gives.
static void sum_values(const difloat_weight& w, const uint8_t* panel, const float* scale, const float* zero, float* sums) {
    const int64_t quads = quads_of(w.channels);
    for (int64_t tap = 0; tap < w.taps; tap++)
        for (int v = 0; v < VECTORS; v++) {
            const uint8_t* column = panel + (tap * quads * VECTORS + v) * LANES * 4;
            F32 total = set(0);
            for (int64_t g = 0; g < w.groups; g++) {
                const int64_t begin = g * w.group_channels, end = std::min(begin + w.group_channels, w.channels);
                const I32 integers = sum_channels(w, column, begin, end);
                const int64_t at = g * WIDTH + v * LANES;
                total = fma(to_float(integers), load(scale + at), total);
                if (w.zero) total = fma(set((float)(end - begin)), load(zero + at), total);
            }
            store(sums + tap * WIDTH + v * LANES, total);
        }
}

}  // namespace difloat
