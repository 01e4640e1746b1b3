// Panels and packed rows: how many output channels stand side by side, and where their codes lie.
//
// A panel holds WIDTH = LANES * VECTORS output channels, [tap][quad][channel][4]: four input channels (a quad) of every output
// channel side by side, as one multiply-add instruction takes them. Input channels that are missing in the last quad hold
// something; the activations there are 0.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "difloat.h"

namespace difloat {

constexpr int WIDTH = LANES * VECTORS;

static inline int64_t quads_of(int64_t channels) { return (channels + 3) / 4; }
#ifdef DIFLOAT_TILES
constexpr int64_t SPARE_QUADS = 16;  // of every tap, all 0: the last tile of a row reaches into them
#else
constexpr int64_t SPARE_QUADS = 0;
#endif
static inline int64_t panel_quads(const difloat_weight& w) { return quads_of(w.channels) + SPARE_QUADS; }
static inline int64_t code_bytes(const difloat_weight& w) { return (w.channels * w.bits + 7) / 8; }
static inline int64_t panel_bytes(const difloat_weight& w) { return w.taps * panel_quads(w) * WIDTH * 4; }
// Scratch in which the bytes of a row stand side by side where they do not in the weight itself.
static inline int64_t gather_bytes(const difloat_weight& w) {
    return w.byte_stride == 1 ? 0 : WIDTH * w.taps * code_bytes(w);
}

#ifdef DIFLOAT_VECTORS_512

// 64 bytes of every tap that lie interleaved, one byte of every tap after the other, to `taps` rows of 64 bytes. Byte n of tap t is
// at place n * taps + t: of the vectors that hold all of these, each gives some bytes to every tap.
struct Parting {
    static constexpr int MOST = 9;  // taps
    int taps;
    alignas(64) uint8_t place[MOST][64];
    __mmask64 from[MOST][MOST] = {};  // [tap][vector] which bytes of the tap it has

    explicit Parting(int taps) : taps(taps) {
        for (int tap = 0; tap < taps; tap++)
            for (int n = 0; n < 64; n++) {
                const int at = n * taps + tap;
                place[tap][n] = (uint8_t)(at % 64), from[tap][at / 64] |= 1ull << n;
            }
    }

    void operator()(const uint8_t* bytes, uint8_t* to, int64_t stride) const {
        for (int tap = 0; tap < taps; tap++) {
            const I32 places = load_int(place[tap]);
            I32 found = _mm512_setzero_si512();
            for (int v = 0; v < taps; v++) found = _mm512_mask_permutexvar_epi8(found, from[tap][v], places, load_int(bytes + 64 * v));
            store_int(to + tap * stride, found);
        }
    }
};

#endif

// The codes of output channel `first + row` and `tap`; beyond the last channel those of the last.
struct Rows {
    const uint8_t* base;
    int64_t row_stride, tap_stride, last;

    Rows(const difloat_weight& w, int64_t first, uint8_t* gathered) : last(std::min<int64_t>(w.rows - first, WIDTH) - 1) {
        base = w.data + first * w.row_stride, row_stride = w.row_stride, tap_stride = w.tap_stride;
        if (w.byte_stride == 1) return;
        const int64_t bytes = code_bytes(w);
        int64_t done = 0;  // bytes of every tap
#ifdef DIFLOAT_VECTORS_512
        if (w.taps == w.byte_stride && w.tap_stride == 1 && w.taps <= Parting::MOST) {
            const Parting parting((int)w.taps);
            done = bytes / 64 * 64;
            for (int64_t row = 0; row <= last; row++)
                for (int64_t byte = 0; byte < done; byte += 64)
                    parting(base + row * row_stride + byte * w.taps, gathered + row * w.taps * bytes + byte, bytes);
        }
#endif
        for (int64_t row = 0; row <= last; row++)
            for (int64_t byte = done; byte < bytes; byte++) {
                const uint8_t* from = base + row * row_stride + byte * w.byte_stride;
                uint8_t* to = gathered + row * w.taps * bytes + byte;
                for (int64_t tap = 0; tap < w.taps; tap++) to[tap * bytes] = from[tap * w.tap_stride];
            }
        base = gathered, row_stride = w.taps * bytes, tap_stride = bytes;
    }

    const uint8_t* at(int64_t row, int64_t tap) const { return base + std::min(row, last) * row_stride + tap * tap_stride; }
};

}  // namespace difloat
