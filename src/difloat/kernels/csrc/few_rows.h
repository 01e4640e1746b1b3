// A few tokens: every weight is read once and used once or a few times, so memory sets the pace. Weights are unpacked in
// registers, row by row as they are stored, and no panel is made.
#pragma once

namespace difloat {

constexpr int64_t FEW_ROWS = 4;
constexpr int64_t STEP = 64;  // input channels at a time

static inline bool few_rows_fit(const difloat_weight& w, const Operand& x) {
    const bool groups_fit = w.groups == 1 || w.group_channels % STEP == 0;
    return w.taps == 1 && w.byte_stride == 1 && x.origin == 0 && groups_fit;
}

// One output channel for ROWS tokens: `results` without activation scale and bias.
template <int ROWS, int BITS>
static inline void channel(const difloat_weight& w, const Operand& x, const Table<BITS>& lookup, int64_t row, float* results) {
    const uint8_t* stream = w.data + row * w.row_stride;
    const int64_t bytes = code_bytes(w), group = w.groups == 1 ? round_up(w.channels, STEP) : w.group_channels;
    F32 total[ROWS];
    for (int i = 0; i < ROWS; i++) total[i] = set(0);
    for (int64_t g = 0; g < w.groups; g++) {
        I32 acc[ROWS];  // the correction for the table's offset goes into one lane
        for (int i = 0; i < ROWS; i++) acc[i] = _mm512_maskz_set1_epi32(1, w.minimum * x.sums[i * w.groups + g]);
        const int64_t end = std::min((g + 1) * group, round_up(w.channels, STEP));
        for (int64_t k = g * group; k < end; k += STEP) {
            const int64_t at = k / 8 * BITS;
            _mm_prefetch((const char*)stream + at + 1024, _MM_HINT_T0);
            const I32 weights = lookup(spread<BITS>(stream + at, bytes - at));
            for (int i = 0; i < ROWS; i++) acc[i] = dot(acc[i], weights, load_int(x.values + x.start[i] + k));
        }
        const int64_t s = row * w.scale_stride + g;
        for (int i = 0; i < ROWS; i++) {
            if (w.groups == 1)  // the sum stays exact as long as possible
                total[i] = _mm512_maskz_mov_ps(1, set((float)sum_int(acc[i]) * (w.scale[s] * w.unit)));
            else
                total[i] = fma(to_float(acc[i]), set(w.scale[s] * w.unit), total[i]);
            if (w.zero) {
                const F32 zero = _mm512_maskz_mov_ps(1, set(w.zero[s]));
                total[i] = fma(set((float)x.sums[i * w.groups + g]), zero, total[i]);
            }
        }
    }
    for (int i = 0; i < ROWS; i++) results[i] = sum(total[i]);
}

template <int ROWS, int TYPE, int BITS>
static void few_of(const difloat_weight& w, const Operand& x, const difloat_output& out, int threads) {
    const Table<BITS> lookup(w.table);
    const int64_t chunks = (w.rows + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t first = chunk * LANES, count = std::min<int64_t>(LANES, w.rows - first);
        float results[LANES][ROWS];
        for (int64_t n = 0; n < count; n++) channel<ROWS, BITS>(w, x, lookup, first + n, results[n]);
        for (int i = 0; i < ROWS; i++) {
            float column[LANES] = {}, bias[LANES] = {};
            for (int64_t n = 0; n < count; n++) column[n] = results[n][i], bias[n] = out.bias ? out.bias[first + n] : 0.0f;
            char buffer[LANES * 4];
            write<TYPE>(buffer, 0, fma(load(column), set(x.scale[i]), load(bias)));
            const int64_t size = TYPE == DIFLOAT_F32 ? 4 : 2;
            memcpy((char*)out.data + (i * w.rows + first) * size, buffer, count * size);
        }
    }
}

template <int TYPE, int BITS>
static void few_bits(const difloat_weight& w, const Operand& x, const difloat_output& out, int threads) {
    switch (x.rows) {
        case 1: return few_of<1, TYPE, BITS>(w, x, out, threads);
        case 2: return few_of<2, TYPE, BITS>(w, x, out, threads);
        case 3: return few_of<3, TYPE, BITS>(w, x, out, threads);
        default: return few_of<4, TYPE, BITS>(w, x, out, threads);
    }
}

template <int TYPE>
static void few_rows(const difloat_weight& w, const Operand& x, const difloat_output& out, int threads) {
    switch (w.bits) {
        case 1: return few_bits<TYPE, 1>(w, x, out, threads);
        case 2: return few_bits<TYPE, 2>(w, x, out, threads);
        case 3: return few_bits<TYPE, 3>(w, x, out, threads);
        case 4: return few_bits<TYPE, 4>(w, x, out, threads);
        case 5: return few_bits<TYPE, 5>(w, x, out, threads);
        case 6: return few_bits<TYPE, 6>(w, x, out, threads);
        case 7: return few_bits<TYPE, 7>(w, x, out, threads);
        default: return few_bits<TYPE, 8>(w, x, out, threads);
    }
}

}  // namespace difloat
