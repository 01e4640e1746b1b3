// Products with AVX2, which adds two products of bytes in 16 bits and cuts the sum off where it does not fit.
//
// Weights and activations say how many such sums fit 16 bits: that many are added there before they are widened, since widening
// takes a multiplier of its own (`Narrow`). Where not even one fits, both operands are widened to 16 bits first (`Wide`).
#pragma once
#include <string.h>

#include <algorithm>

#include "difloat.h"
#include "repeat.h"

namespace difloat {

static INLINE I32 broadcast_quad(const void* p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return set_int(quad);
}

static INLINE I32 add_words(I32 a, I32 b) { return _mm256_add_epi16(a, b); }
static INLINE I32 widened(I32 acc, I32 words) { return add_int(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1))); }

// Bytes 0 and 2, and bytes 1 and 3, of every dword as words.
static INLINE I32 even_weights(I32 w) { return bits_and(w, set_int(0x00ff00ff)); }
static INLINE I32 odd_weights(I32 w) { return _mm256_srli_epi16(w, 8); }
static INLINE I32 even_signed(I32 a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
static INLINE I32 odd_signed(I32 a) { return _mm256_srai_epi16(a, 8); }

// Nothing, but the compiler must have the sum ready: GCC would move all products before all sums, and there are not registers
// enough for them.
static INLINE void settle(I32& sum) {
#ifndef _MSC_VER
    asm volatile("" : "+x"(sum));
#endif
}

constexpr int MOST_SPREAD = 2;  // a panel takes this much room at most, compared with bytes

// STEPS sums of two products in 16 bits, then 32.
template <int STEPS>
struct Narrow {
    static constexpr int SPREAD = 1;
    static void prepare(uint8_t*, int64_t) {}
    Narrow<1> few() const { return {}; }
    static INLINE I32 add(I32 acc, I32 weights, I32 activations) { return dot(acc, weights, activations); }

    template <int ROWS, int USED>
    INLINE void accumulate(I32 (&acc)[ROWS][USED], const int8_t* const (&row)[ROWS], int64_t offset, int64_t quads,
                           const uint8_t* weights) const {
        const int8_t* a[ROWS];
        repeat<ROWS>([&](auto i) UNROLLED { a[i] = row[i] + offset; });
        for (int64_t left = quads, count; left > 0; left -= count) {
            I32 words[ROWS][USED];
            repeat<ROWS>([&](auto i) UNROLLED { repeat<USED>([&](auto v) UNROLLED { words[i][v] = set_int(0); }); });
            count = std::min<int64_t>(left, STEPS);
            if (count == STEPS) {
                repeat<STEPS>([&](auto q) UNROLLED {
                    step<ROWS, USED>(words, a, weights, q);
                    repeat<ROWS>([&](auto i) UNROLLED { repeat<USED>([&](auto v) UNROLLED { settle(words[i][v]); }); });
                });
            } else {
                for (int64_t q = 0; q < count; q++) step<ROWS, USED>(words, a, weights, q);
            }
            weights += count * WIDTH * 4;
            repeat<ROWS>([&](auto i) UNROLLED {
                a[i] += 4 * count;
                repeat<USED>([&](auto v) UNROLLED { acc[i][v] = widened(acc[i][v], words[i][v]); });
            });
        }
    }

   private:
    template <int ROWS, int USED>
    static INLINE void step(I32 (&words)[ROWS][USED], const int8_t* const (&a)[ROWS], const uint8_t* weights, int64_t q) {
        I32 b[USED];
        repeat<USED>([&](auto v) UNROLLED { b[v] = load_int(weights + (q * VECTORS + v) * LANES * 4); });
        repeat<ROWS>([&](auto i) UNROLLED {
            const I32 x = broadcast_quad(a[i] + 4 * q);
            repeat<USED>([&](auto v) UNROLLED { words[i][v] = add_words(words[i][v], _mm256_maddubs_epi16(b[v], x)); });
        });
    }
};

// Operands of 16 bits. Weights are widened in the panel, activations a piece of a row at a time.
struct Wide {
    static constexpr int SPREAD = 2;

    // Bytes of a panel to words, in place: from the last vector on, since everything moves backwards.
    static void prepare(uint8_t* panel, int64_t bytes) {
        for (int64_t at = bytes - (int64_t)sizeof(I32); at >= 0; at -= sizeof(I32)) {
            const I32 w = load_int(panel + at);
            store_int(panel + 2 * at + sizeof(I32), odd_weights(w));
            store_int(panel + 2 * at, even_weights(w));
        }
    }
    Wide few() const { return *this; }
    static constexpr int64_t PIECE = 256;  // quads

    static INLINE I32 add(I32 acc, I32 w, I32 a) {
        acc = add_int(acc, _mm256_madd_epi16(even_weights(w), even_signed(a)));
        return add_int(acc, _mm256_madd_epi16(odd_weights(w), odd_signed(a)));
    }

    template <int ROWS, int USED>
    INLINE void accumulate(I32 (&acc)[ROWS][USED], const int8_t* const (&row)[ROWS], int64_t offset, int64_t quads,
                           const uint8_t* weights) const {
        alignas(32) int32_t even[ROWS][PIECE], odd[ROWS][PIECE];
        for (int64_t first = 0; first < quads; first += PIECE) {
            const int64_t count = std::min(PIECE, quads - first);
            for (int i = 0; i < ROWS; i++) {
                const int8_t* from = row[i] + offset + 4 * first;
                int64_t q = 0;
                for (; q + LANES <= count; q += LANES) {
                    const I32 a = load_int(from + 4 * q);
                    store_int(even[i] + q, even_signed(a)), store_int(odd[i] + q, odd_signed(a));
                }
                for (; q < count; q++) {
                    const __m128i a = _mm_cvtsi32_si128(_mm256_cvtsi256_si32(broadcast_quad(from + 4 * q)));
                    even[i][q] = _mm_cvtsi128_si32(_mm_srai_epi16(_mm_slli_epi16(a, 8), 8));
                    odd[i][q] = _mm_cvtsi128_si32(_mm_srai_epi16(a, 8));
                }
            }
            for (int64_t q = 0; q < count; q++) {
                I32 low[USED], high[USED];
                repeat<USED>([&](auto v) UNROLLED {
                    const uint8_t* from = weights + ((first + q) * VECTORS + v) * LANES * 4 * SPREAD;
                    low[v] = load_int(from), high[v] = load_int(from + sizeof(I32));
                });
                repeat<ROWS>([&](auto i) UNROLLED {
                    const I32 x = set_int(even[i][q]), y = set_int(odd[i][q]);
                    repeat<USED>([&](auto v) UNROLLED {
                        acc[i][v] = add_int(acc[i][v], _mm256_madd_epi16(low[v], x));
                        acc[i][v] = add_int(acc[i][v], _mm256_madd_epi16(high[v], y));
                    });
                });
            }
        }
    }
};

// How many sums of two products fit 16 bits.
static inline int64_t sums_in_words(const difloat_weight& w, int32_t lowest, int32_t highest) {
    const int32_t span = *std::max_element(w.table, w.table + (1 << w.bits));
    if (span == 0) return 1;
    const int64_t below = lowest < 0 ? 32768 / (2 * span * -(int64_t)lowest) : 32768;
    const int64_t above = highest > 0 ? 32767 / (2 * span * (int64_t)highest) : 32768;
    return std::min(below, above);
}

// Whether these products take less time than as many of float32: not unless sums are added in 16 bits.
static inline bool faster_than_float(const difloat_weight& w, int32_t lowest, int32_t highest) {
    return sums_in_words(w, lowest, highest) > 1;
}

// body(multiplier) with the way of multiplying that is exact for these weights and activations.
template <class Body>
static INLINE void with_multiplier(const difloat_weight& w, int32_t lowest, int32_t highest, Body&& body) {
    const int64_t steps = sums_in_words(w, lowest, highest);
    if (steps >= 8) body(Narrow<8>{});
    else if (steps >= 5) body(Narrow<5>{});
    else if (steps >= 3) body(Narrow<3>{});
    else if (steps == 2) body(Narrow<2>{});
    else if (steps == 1) body(Narrow<1>{});
    else body(Wide{});
}

}  // namespace difloat
