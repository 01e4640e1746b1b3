// Products by one instruction that adds four products of bytes to a sum of 32 bits: exact whatever the bytes.
#pragma once
#include <string.h>

#include "difloat.h"
#include "repeat.h"

namespace difloat {

static INLINE I32 broadcast_quad(const int8_t* p) {
    int32_t quad;
    memcpy(&quad, p, 4);
    return set_int(quad);
}

constexpr int MOST_SPREAD = 1;  // a panel takes this much room at most, compared with bytes

struct Dot {
    static constexpr int SPREAD = 1;
    static void prepare(uint8_t*, int64_t) {}
    Dot few() const { return *this; }
    static INLINE I32 add(I32 acc, I32 weights, I32 activations) { return dot(acc, weights, activations); }

    // acc += rows x weights over `quads` quads, for the first USED vectors of the panel.
    template <int ROWS, int USED>
    static INLINE void accumulate(I32 (&acc)[ROWS][USED], const int8_t* const (&row)[ROWS], int64_t offset, int64_t quads,
                                  const uint8_t* weights) {
        const int8_t* a[ROWS];
        repeat<ROWS>([&](auto i) UNROLLED { a[i] = row[i] + offset; });
        for (int64_t q = 0; q < quads; q++) {
            I32 b[USED];
            repeat<USED>([&](auto v) UNROLLED { b[v] = load_int(weights + (q * VECTORS + v) * LANES * 4); });
            repeat<ROWS>([&](auto i) UNROLLED {
                const I32 x = broadcast_quad(a[i] + 4 * q);
                repeat<USED>([&](auto v) UNROLLED { acc[i][v] = dot(acc[i][v], b[v], x); });
            });
        }
    }
};

// Whether these products take less time than as many of float32.
static inline bool faster_than_float(const difloat_weight&, int32_t, int32_t) { return true; }

// body(multiplier) with the way of multiplying that is exact for these weights and activations.
template <class Body>
static INLINE void with_multiplier(const difloat_weight&, int32_t, int32_t, Body&& body) {
    body(Dot{});
}

}  // namespace difloat
