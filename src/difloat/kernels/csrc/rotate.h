// The block rotation of inputs that numbers/hadamard.py defines: signs, permutation, and a Walsh-Hadamard transform in place.
// Every sum is of the same two numbers in the same order as there, so bit for bit the same in every unit and with any threads.
#pragma once
#include <stdint.h>

#include "compiler.h"
#include "scratch.h"

namespace difloat {

// One stage within a run of `block` numbers: a pair `STRIDE` apart becomes its sum and its difference.
template <int STRIDE>
static void butterflies(float* v, int64_t block) {
    for (int64_t at = 0; at < block; at += 2 * STRIDE)
        for (int64_t j = at; j < at + STRIDE; j++) {
            const float low = v[j], high = v[j + STRIDE];
            v[j] = low + high, v[j + STRIDE] = low - high;
        }
}

static void walsh(float* v, int64_t block) {
    for (int64_t stride = block / 2; stride > 8; stride /= 2)
        for (int64_t at = 0; at < block; at += 2 * stride)
            for (int64_t j = at; j < at + stride; j++) {
                const float low = v[j], high = v[j + stride];
                v[j] = low + high, v[j + stride] = low - high;
            }
    if (block >= 16) butterflies<8>(v, block);
    if (block >= 8) butterflies<4>(v, block);
    if (block >= 4) butterflies<2>(v, block);
    butterflies<1>(v, block);
}

// The Kronecker powers of the regular matrix of four.
static void regular(float* v, int64_t block) {
    for (int64_t stride = block / 4; stride; stride /= 4)
        for (int64_t at = 0; at < block; at += 4 * stride)
            for (int64_t j = at; j < at + stride; j++) {
                const float a = v[j], b = v[j + stride], c = v[j + 2 * stride], d = v[j + 3 * stride];
                const float p = a + b, q = c + d, m = a - b, n = c - d;
                v[j] = p + n, v[j + stride] = p - n, v[j + 2 * stride] = q + m, v[j + 3 * stride] = q - m;
            }
}

// `factor` is one over the root of the block, as the reference rounds it; without signs the matrix is the regular one.
static int rotate(const float* x, float* out, int64_t rows, int64_t channels, int64_t block, float factor, const float* signs,
                  const int32_t* order, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float* from = x + row * channels;
        float* to = out + row * channels;
        if (!signs)
            for (int64_t j = 0; j < channels; j++) to[j] = from[j];
        else if (order)
            for (int64_t j = 0; j < channels; j++) to[j] = from[order[j]] * signs[j];
        else
            for (int64_t j = 0; j < channels; j++) to[j] = from[j] * signs[j];
        for (int64_t at = 0; at < channels; at += block) signs ? walsh(to + at, block) : regular(to + at, block);
        for (int64_t j = 0; j < channels; j++) to[j] *= factor;
    }
    return 0;
}

}  // namespace difloat
