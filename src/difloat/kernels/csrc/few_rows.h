// A few tokens: every weight is read once and used once or a few times, so memory sets the pace. Weights are unpacked in
// registers, as they are stored, and no panel is made; four output channels go side by side.
#pragma once

namespace difloat {

constexpr int64_t FEW_ROWS = 4;
constexpr int SIDE = 4;  // output channels side by side
constexpr int MOST_LANES = LANES > SIDE ? LANES : SIDE;

// How the codes of STEP input channels become PIECES vectors of weights. In general: spread to bytes in their order. Codes of 4 bits
// stay where they are: low nibbles and high nibbles, and the activations take that order once.
template <int BITS>
struct Reader {
    static constexpr int PIECES = BITS == 4 ? 2 : 1, STEP = CODES * PIECES;
    static constexpr int64_t BYTES = BITS == 4 ? CODES : spread_bytes<BITS>;  // that are read at a time
    const Table<BITS> lookup;
    explicit Reader(const uint8_t* table) : lookup(table) {}
    static void reorder(int8_t* values, int64_t channels) {
        if (BITS != 4) return;
        for (int64_t k = 0; k < channels; k += STEP) part_even_and_odd(values + k);
    }
    INLINE void read(const uint8_t* stream, int64_t bytes, I32 (&weights)[PIECES]) const {
        if constexpr (BITS == 4) {
            const I32 codes = load_bytes(stream, bytes);
            weights[0] = lookup(low_nibbles(codes));
            weights[1] = lookup(high_nibbles(codes));
        } else {
            weights[0] = lookup(spread<BITS>(stream, bytes));
        }
    }
};

template <int BITS>
static bool few_rows_fit(const difloat_weight& w, const Operand& x) {
    const bool groups_fit = w.groups == 1 || w.group_channels % Reader<BITS>::STEP == 0;
    return x.rows <= FEW_ROWS && w.taps == 1 && w.byte_stride == 1 && x.origin == 0 && x.shift == 0 && !x.steps && groups_fit;
}

// Four output channels for ROWS tokens, without activation scale and bias: results[token][channel].
template <int ROWS, int BITS, class Multiplier>
static NOINLINE void side_by_side(const Multiplier& multiplier, const difloat_weight& w, const Operand& x,
                                  const Reader<BITS>& reader, int64_t first, float (*results)[MOST_LANES]) {
    constexpr int STEP = Reader<BITS>::STEP, PIECES = Reader<BITS>::PIECES;
    const uint8_t* stream[SIDE];
    int64_t channel[SIDE];
    repeat<SIDE>([&](auto s) UNROLLED {
        channel[s] = std::min<int64_t>(first + s, w.rows - 1);
        stream[s] = w.data + channel[s] * w.row_stride;
    });
    const int64_t bytes = code_bytes(w), group = w.groups == 1 ? w.channels : w.group_channels;
    Four total[ROWS];
    repeat<ROWS>([&](auto i) UNROLLED { total[i] = set_four(0); });
    for (int64_t g = 0; g < w.groups; g++) {
        I32 acc[ROWS][SIDE];
        repeat<ROWS>([&](auto i) UNROLLED { repeat<SIDE>([&](auto s) UNROLLED { acc[i][s] = set_int(0); }); });
        auto step = [&](int64_t k, int64_t left) UNROLLED {  // `left` bytes of codes from k on
            const int64_t at = k / 8 * BITS;
            repeat<SIDE>([&](auto s) UNROLLED {
                I32 weights[PIECES];
                prefetch(stream[s] + at + 512);
                reader.read(stream[s] + at, left, weights);
                repeat<ROWS>([&](auto i) UNROLLED {
                    repeat<PIECES>([&](auto p) UNROLLED {
                        acc[i][s] = multiplier.add(acc[i][s], weights[p], load_int(x.values + x.start[i] + k + CODES * p));
                    });
                });
            });
        };
        const int64_t end = std::min((g + 1) * group, w.channels);
        int64_t k = g * group;
        for (; k + STEP <= end && k / 8 * BITS + Reader<BITS>::BYTES <= bytes; k += STEP) step(k, Reader<BITS>::BYTES);
        for (; k < end; k += STEP) step(k, bytes - k / 8 * BITS);
        float scale[SIDE], zero[SIDE];
        repeat<SIDE>([&](auto s) UNROLLED {
            const int64_t place = channel[s] * w.scale_stride + g;
            scale[s] = w.scale[place] * w.unit, zero[s] = w.zero ? w.zero[place] : 0.0f;
        });
        repeat<ROWS>([&](auto i) UNROLLED {
            const int32_t sum = x.sums[i * w.groups + g];
            total[i] = fma(to_float(sum_side(acc[i]), w.minimum * sum), load_four(scale), total[i]);
            if (w.zero) total[i] = fma(set_four((float)sum), load_four(zero), total[i]);
        });
    }
    repeat<ROWS>([&](auto i) UNROLLED { store_four(results[i], total[i]); });
}

template <int ROWS, int TYPE, int BITS, class Multiplier>
static void few_of(const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const difloat_output& out,
                   int threads) {
    const Reader<BITS> reader(w.table);
    const int64_t chunks = (w.rows + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = chunk * LANES, count = std::min<int64_t>(LANES, w.rows - first);
        float results[ROWS][MOST_LANES] = {}, bias[MOST_LANES] = {};
        for (int64_t n = 0; n < count; n += SIDE)
            side_by_side<ROWS, BITS>(multiplier, w, x, reader, first + n, (float(*)[MOST_LANES]) & results[0][n]);
        for (int64_t n = 0; out.bias && n < count; n++) bias[n] = out.bias[out.channel ? out.channel[first + n] : first + n];
        for (int i = 0; i < ROWS; i++) {
            char buffer[MOST_LANES * 4];
            write<TYPE>(buffer, 0, fma(load(results[i]), set(x.scale[i]), load(bias)));
            copy_row<TYPE>(out, i, first, count, buffer);
        }
    }
}

// Whether the product reorders the activations, so that no other way can read them any more.
static bool few_rows_reorder(const difloat_weight& w, const Operand& x) { return w.bits == 4 && few_rows_fit<4>(w, x); }

// The product if this way suits it; false if it does not. The first band that reorders the activations says so in `reordered`.
template <int TYPE, int BITS>
static bool few_bits(const difloat_weight& w, const Operand& x, int8_t* values, const difloat_output& out, int threads,
                     bool& reordered) {
    if (!few_rows_fit<BITS>(w, x)) return false;
    if (BITS == 4 && !reordered) {
        for (int64_t i = 0; i < x.rows; i++) Reader<BITS>::reorder(values + x.start[i], w.channels);
        reordered = true;
    }
    with_multiplier(w, x.lowest, x.highest, [&](const auto& multiplier) {
        const auto few = multiplier.few();  // multipliers that add alike share one
        switch (x.rows) {
            case 1: return few_of<1, TYPE, BITS>(few, w, x, out, threads);
            case 2: return few_of<2, TYPE, BITS>(few, w, x, out, threads);
            case 3: return few_of<3, TYPE, BITS>(few, w, x, out, threads);
            default: return few_of<4, TYPE, BITS>(few, w, x, out, threads);
        }
    });
    return true;
}

template <int TYPE>
static bool few_rows(const difloat_weight& w, const Operand& x, int8_t* values, const difloat_output& out, int threads,
                     bool& reordered) {
    switch (w.bits) {
        case 1: return few_bits<TYPE, 1>(w, x, values, out, threads, reordered);
        case 2: return few_bits<TYPE, 2>(w, x, values, out, threads, reordered);
        case 3: return few_bits<TYPE, 3>(w, x, values, out, threads, reordered);
        case 4: return few_bits<TYPE, 4>(w, x, values, out, threads, reordered);
        case 5: return few_bits<TYPE, 5>(w, x, values, out, threads, reordered);
        case 6: return few_bits<TYPE, 6>(w, x, values, out, threads, reordered);
        case 7: return few_bits<TYPE, 7>(w, x, values, out, threads, reordered);
        default: return few_bits<TYPE, 8>(w, x, values, out, threads, reordered);
    }
}

}  // namespace difloat
