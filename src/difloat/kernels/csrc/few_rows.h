// A few tokens: every weight is read once and used once or a few times, so memory sets the pace. Weights are unpacked in
// registers, as they are stored, and no panel is made; four output channels go side by side.
#pragma once

namespace difloat {

constexpr int64_t FEW_ROWS = 4;
constexpr int SIDE = 4;  // output channels side by side

// How the codes of STEP input channels become PIECES vectors of weights. In general: spread to bytes in their order.
template <int BITS>
struct Reader {
    static constexpr int STEP = 64, PIECES = 1;
    const Table<BITS> lookup;
    explicit Reader(const uint8_t* table) : lookup(table) {}
    static void reorder(int8_t*, int64_t) {}
    INLINE void read(const uint8_t* stream, int64_t bytes, I32 (&weights)[PIECES]) const {
        weights[0] = lookup(spread<BITS>(stream, bytes));
    }
};

// 4 bits: low nibbles and high nibbles, each by one look-up, and the activations take that order once.
template <>
struct Reader<4> {
    static constexpr int STEP = 128, PIECES = 2;
    const Table<4> lookup;
    explicit Reader(const uint8_t* table) : lookup(table) {}

    // Even channels of every 128 to the front, odd ones behind them.
    static void reorder(int8_t* values, int64_t channels) {
        alignas(64) uint8_t even[64], odd[64];
        for (int i = 0; i < 64; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
        for (int64_t k = 0; k < channels; k += STEP) {
            const I32 a = load_int(values + k), b = load_int(values + k + 64);
            store_int(values + k, _mm512_permutex2var_epi8(a, load_int(even), b));
            store_int(values + k + 64, _mm512_permutex2var_epi8(a, load_int(odd), b));
        }
    }
    INLINE void read(const uint8_t* stream, int64_t bytes, I32 (&weights)[PIECES]) const {
        const I32 codes = bytes >= 64 ? load_int(stream) : _mm512_maskz_loadu_epi8(first_bytes(bytes), stream);
        weights[0] = lookup(codes);
        weights[1] = lookup(shift_right<4>(codes));
    }
};

template <int BITS>
static bool few_rows_fit(const difloat_weight& w, const Operand& x) {
    const bool groups_fit = w.groups == 1 || w.group_channels % Reader<BITS>::STEP == 0;
    return x.rows <= FEW_ROWS && w.taps == 1 && w.byte_stride == 1 && x.origin == 0 && x.shift == 0 && groups_fit;
}

// The sums of four vectors.
static INLINE __m128i sum_side(const I32 (&a)[SIDE]) {
    const I32 ab = add_int(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const I32 cd = add_int(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    const I32 all = add_int(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Four output channels for ROWS tokens, without activation scale and bias: results[token][channel].
template <int ROWS, int BITS>
static INLINE void side_by_side(const difloat_weight& w, const Operand& x, const Reader<BITS>& reader, int64_t first,
                                float (*results)[LANES]) {
    constexpr int STEP = Reader<BITS>::STEP, PIECES = Reader<BITS>::PIECES;
    const uint8_t* stream[SIDE];
    int64_t channel[SIDE];
    repeat<SIDE>([&](auto s) UNROLLED {
        channel[s] = std::min<int64_t>(first + s, w.rows - 1);
        stream[s] = w.data + channel[s] * w.row_stride;
    });
    const int64_t bytes = code_bytes(w), group = w.groups == 1 ? w.channels : w.group_channels;
    __m128 total[ROWS];
    repeat<ROWS>([&](auto i) UNROLLED { total[i] = _mm_setzero_ps(); });
    for (int64_t g = 0; g < w.groups; g++) {
        I32 acc[ROWS][SIDE];
        repeat<ROWS>([&](auto i) UNROLLED { repeat<SIDE>([&](auto s) UNROLLED { acc[i][s] = set_int(0); }); });
        auto step = [&](int64_t k, int64_t left) UNROLLED {  // `left` bytes of codes from k on
            const int64_t at = k / 8 * BITS;
            repeat<SIDE>([&](auto s) UNROLLED {
                I32 weights[PIECES];
                _mm_prefetch((const char*)stream[s] + at + 512, _MM_HINT_T0);
                reader.read(stream[s] + at, left, weights);
                repeat<ROWS>([&](auto i) UNROLLED {
                    repeat<PIECES>([&](auto p) UNROLLED {
                        acc[i][s] = dot(acc[i][s], weights[p], load_int(x.values + x.start[i] + k + 64 * p));
                    });
                });
            });
        };
        const int64_t end = std::min((g + 1) * group, w.channels);
        int64_t k = g * group;
        for (; k + STEP <= end; k += STEP) step(k, 64);
        if (k < end) step(k, bytes - k / 8 * BITS);
        float scale[SIDE], zero[SIDE];
        repeat<SIDE>([&](auto s) UNROLLED {
            const int64_t place = channel[s] * w.scale_stride + g;
            scale[s] = w.scale[place] * w.unit, zero[s] = w.zero ? w.zero[place] : 0.0f;
        });
        repeat<ROWS>([&](auto i) UNROLLED {
            const int32_t sum = x.sums[i * w.groups + g];
            const __m128i exact = _mm_add_epi32(sum_side(acc[i]), _mm_set1_epi32(w.minimum * sum));
            total[i] = _mm_fmadd_ps(_mm_cvtepi32_ps(exact), _mm_loadu_ps(scale), total[i]);
            if (w.zero) total[i] = _mm_fmadd_ps(_mm_set1_ps((float)sum), _mm_loadu_ps(zero), total[i]);
        });
    }
    repeat<ROWS>([&](auto i) UNROLLED { _mm_storeu_ps(results[i], total[i]); });
}

template <int ROWS, int TYPE, int BITS>
static void few_of(const difloat_weight& w, const Operand& x, const difloat_output& out, int threads) {
    const Reader<BITS> reader(w.table);
    const int64_t chunks = (w.rows + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = chunk * LANES, count = std::min<int64_t>(LANES, w.rows - first);
        float results[ROWS][LANES] = {}, bias[LANES] = {};
        for (int64_t n = 0; n < count; n += SIDE)
            side_by_side<ROWS, BITS>(w, x, reader, first + n, (float(*)[LANES]) & results[0][n]);
        for (int64_t n = 0; out.bias && n < count; n++) bias[n] = out.bias[out.channel ? out.channel[first + n] : first + n];
        for (int i = 0; i < ROWS; i++) {
            char buffer[LANES * 4];
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
    switch (x.rows) {
        case 1: few_of<1, TYPE, BITS>(w, x, out, threads); break;
        case 2: few_of<2, TYPE, BITS>(w, x, out, threads); break;
        case 3: few_of<3, TYPE, BITS>(w, x, out, threads); break;
        default: few_of<4, TYPE, BITS>(w, x, out, threads);
    }
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
