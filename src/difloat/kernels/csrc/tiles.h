// Products in the tiles of AMX, which multiply 16 rows of 64 bytes by 16 columns of 64 bytes and add that to 16 x 16 sums.
//
// A panel lies as the instruction wants it: a row of a tile of weights is a quad of 16 output channels. Activations are read where
// they are, as long as rows lie evenly: all of a linear layer, one line of a picture. Four tiles of sums, two stacks of rows by 32
// output channels, take the whole length of a group; then they are stored, scaled and written. Exact, as all sums here.
#pragma once
#include <immintrin.h>

#include "operand.h"
#include "tile_permission.h"

namespace difloat {

constexpr int64_t STACK = 16;                    // rows of a tile
constexpr int64_t TILE_QUADS = 16;               // of input channels in a tile
constexpr int ABREAST = 2;                       // vectors of output channels that are summed up together
constexpr int64_t COLUMNS = ABREAST * LANES;     // output channels
using Sums = int32_t[2 * STACK][COLUMNS];        // of two stacks
using Totals = float[2 * STACK][COLUMNS];

// What `ldtilecfg` reads: tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
struct TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int64_t upper, int64_t lower, int64_t quads) {
        for (int tile = 0; tile < 8; tile++) {
            row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? 4 * quads : 4 * LANES);
            rows[tile] = (uint8_t)(tile >= 6 ? quads : tile == 0 || tile == 1 || tile == 4 ? upper : std::max<int64_t>(lower, 1));
        }
    }
};

// Rows of the product that go through the tiles together: a stack, and maybe another one below it.
struct Stacks {
    int64_t row, upper, lower;
    int64_t rows() const { return upper + lower; }

    Stacks(const Operand& x, int64_t first, int64_t end) : row(first), upper(height(x, first, end)), lower(0) {
        if (first + upper < end) lower = height(x, first + upper, end);
    }

   private:
    // Runs are cut into stacks of nearly equal height.
    static int64_t height(const Operand& x, int64_t row, int64_t end) {
        const int64_t left = std::min(x.run - row % x.run, end - row), stacks = (left + STACK - 1) / STACK;
        return (left + stacks - 1) / stacks;
    }
};

// The rows of a tile for a group of so many quads: as long as they may be while none is longer than another. `exact` groups end
// where the next one begins; otherwise the last step reaches into the spare quads of the panel, which are 0.
static inline int64_t quads_of_step(int64_t quads, bool exact) {
    int64_t steps = (quads + TILE_QUADS - 1) / TILE_QUADS;
    while (exact && quads % steps) steps++;
    return (quads + steps - 1) / steps;
}

// The compiler takes loads of tiles and of their shapes for instructions that read no memory.
static INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// Exact products of two stacks of rows with 32 output channels, over `quads` quads from `first` on of every tap.
template <bool BOTH>
static NOINLINE void sum_in_tiles(const difloat_weight& w, const Operand& x, const Stacks& at, int64_t first, int64_t quads,
                                  int64_t step_quads, const uint8_t* panel, Sums& sums) {
    const int64_t tap_bytes = panel_quads(w) * WIDTH * 4, steps = (quads + step_quads - 1) / step_quads;
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    if (BOTH) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t tap = 0; tap < w.taps; tap++) {
        const int8_t* a = x.values + x.start[at.row] + x.taps[tap] + 4 * first;
        const int8_t* c = x.values + x.start[at.row + (BOTH ? at.upper : 0)] + x.taps[tap] + 4 * first;
        const uint8_t* b = panel + tap * tap_bytes + first * WIDTH * 4;
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(6, b, WIDTH * 4);
            _tile_loadd(4, a, x.apart);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, b + LANES * 4, WIDTH * 4);
            _tile_dpbsud(1, 4, 7);
            if (BOTH) {
                _tile_loadd(5, c, x.apart);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
            a += 4 * step_quads, c += 4 * step_quads, b += step_quads * WIDTH * 4;
        }
    }
    _tile_stored(0, &sums[0][0], sizeof(sums[0]));
    _tile_stored(1, &sums[0][LANES], sizeof(sums[0]));
    if (BOTH) {
        _tile_stored(2, &sums[at.upper][0], sizeof(sums[0]));
        _tile_stored(3, &sums[at.upper][LANES], sizeof(sums[0]));
    }
    settle_memory();
}

// One product of stacks with half a panel: what the operations after the sums need to know.
struct Piece {
    const difloat_weight& w;
    const Operand& x;
    const Panel& p;
    const Stacks& at;
    int64_t column;  // of the panel, where the piece begins
    int64_t step_quads;

    // Sums over group `g` of the channels, from the shifted weights on; see `restored`.
    void sum(int64_t g, Sums& sums) const {
        const int64_t group_quads = (x.group + 3) / 4, first = g * group_quads;
        const int64_t quads = std::min(group_quads, quads_of(w.channels) - first);
        const uint8_t* weights = p.weights + column * 4;
        if (at.lower) return sum_in_tiles<true>(w, x, at, first, quads, step_quads, weights, sums);
        sum_in_tiles<false>(w, x, at, first, quads, step_quads, weights, sums);
    }

    // The sum of the integers of a row, and sums of products for its weights as they are.
    INLINE int32_t restored(const Sums& sums, int64_t i, int64_t g, F32 (&values)[ABREAST]) const {
        const int32_t seen = x.sums[(at.row + i) * x.groups + g];
        repeat<ABREAST>([&](auto v) UNROLLED {
            I32 total = add_int(load_int(&sums[i][v * LANES]), set_int(w.minimum * seen));
            if (x.shift) total = add_int(total, load_int(p.shifted + g * WIDTH + column + v * LANES));
            values[v] = to_float(total);
        });
        if (!x.shift) return seen;
        return seen + x.shift * (int32_t)(std::min(x.group, w.channels - g * x.group) * w.taps);
    }
};

// body(zero, shift) with constants: whether the weight has zero points, and the activations are shifted.
template <class Body>
static INLINE void with_flags(const difloat_weight& w, const Operand& x, Body&& body) {
    if (w.zero && x.shift) body(std::true_type{}, std::true_type{});
    else if (w.zero) body(std::true_type{}, std::false_type{});
    else if (x.shift) body(std::false_type{}, std::true_type{});
    else body(std::false_type{}, std::false_type{});
}

// The results of a product of one group. Everything but the rows stays in registers while they pass.
template <int TYPE, bool ZERO, bool SHIFT>
static INLINE void finish_rows(const Piece& piece, const Sums& sums, int64_t first, const difloat_output& out) {
    const difloat_weight& w = piece.w;
    const Operand& x = piece.x;
    const Panel& p = piece.p;
    const int64_t column = piece.column, count = w.rows - first - column, begin = piece.at.row, end = piece.at.rows();
    const int32_t minimum = w.minimum, restored = x.shift * (int32_t)(w.channels * w.taps);
    // The compiler cannot know that results change none of these.
    const int32_t *seen = x.sums + begin, *bias_row = x.bias_row ? x.bias_row + begin : nullptr;
    const float *row_scales = x.scale + begin, *bias = p.bias + column;
    const difloat_output to = out;
    F32 scale[ABREAST], zero[ABREAST];
    I32 shifted[ABREAST];
    repeat<ABREAST>([&](auto v) UNROLLED {
        scale[v] = load(p.scale + column + v * LANES);
        if (ZERO) zero[v] = load(p.zero + column + v * LANES);
        if (SHIFT) shifted[v] = load_int(p.shifted + column + v * LANES);
    });
    for (int64_t i = 0; i < end; i++) {
        const I32 lowest = set_int(minimum * seen[i]);
        const F32 row_scale = set(row_scales[i]), sum = set((float)(seen[i] + restored));
        const float* its_bias = bias_row ? bias + bias_row[i] * WIDTH : bias;
        F32 values[ABREAST];
        repeat<ABREAST>([&](auto v) UNROLLED {
            I32 exact = add_int(load_int(&sums[i][v * LANES]), lowest);
            if (SHIFT) exact = add_int(exact, shifted[v]);
            F32 total = fma(to_float(exact), scale[v], set(0));
            if (ZERO) total = fma(sum, zero[v], total);
            values[v] = fma(total, row_scale, load(its_bias + v * LANES));
        });
        write_row<TYPE, ABREAST>(to, begin + i, first + column, count, values);
    }
}

// One group of channels and no steps: straight from the sums to the result.
template <int TYPE>
static NOINLINE void piece_of_one_group(const Piece& piece, int64_t first, const difloat_output& out) {
    alignas(64) Sums sums;
    piece.sum(0, sums);
    with_flags(piece.w, piece.x, [&](auto zero, auto shift) UNROLLED { finish_rows<TYPE, zero, shift>(piece, sums, first, out); });
}

// Groups of the activations with steps of their own, added up to one group of the weight: `inner`, and `seen` of every row.
static NOINLINE void sum_steps(const Piece& piece, int64_t begin, int64_t end, Totals& inner, float (&seen)[2 * STACK]) {
    const Operand& x = piece.x;
    alignas(64) Sums sums;
    memset(inner, 0, sizeof(inner)), memset(seen, 0, sizeof(seen));
    for (int64_t g = begin; g < end; g++) {
        piece.sum(g, sums);
        const float there = (float)std::min(x.group, piece.w.channels - g * x.group);
        for (int64_t i = 0; i < piece.at.rows(); i++) {
            const int64_t row = piece.at.row + i, place = (x.step_row ? x.step_row[row] : row) * x.groups + g;
            F32 values[ABREAST];
            const int32_t sum = piece.restored(sums, i, g, values);
            const F32 step = set(x.steps[place]), zero = set(x.zeros ? x.zeros[place] : 0.0f);
            repeat<ABREAST>([&](auto v) UNROLLED {
                float* to = &inner[i][v * LANES];
                F32 value = fma(values[v], step, load(to));
                if (x.zeros) value = fma(zero, load((const float*)piece.p.group_sums + g * WIDTH + piece.column + v * LANES), value);
                store(to, value);
            });
            if (piece.w.zero) seen[i] = fmaf((float)sum, x.steps[place], seen[i]);
            if (piece.w.zero && x.zeros) seen[i] = fmaf(there, x.zeros[place], seen[i]);
        }
    }
}

// Sums of group `g` of the weight, scaled and added to the totals.
template <bool ZERO, bool SHIFT>
static INLINE void add_sums(const Piece& piece, int64_t g, const Sums& sums, Totals& totals) {
    const difloat_weight& w = piece.w;
    const Operand& x = piece.x;
    const int64_t place = g * WIDTH + piece.column, end = piece.at.rows(), groups = x.groups;
    const int32_t minimum = w.minimum, *seen = x.sums + piece.at.row * groups + g;
    const int32_t restored = x.shift * (int32_t)(std::min(x.group, w.channels - g * x.group) * w.taps);
    F32 scale[ABREAST], zero[ABREAST];
    I32 shifted[ABREAST];
    repeat<ABREAST>([&](auto v) UNROLLED {
        scale[v] = load(piece.p.scale + place + v * LANES);
        if (ZERO) zero[v] = load(piece.p.zero + place + v * LANES);
        if (SHIFT) shifted[v] = load_int(piece.p.shifted + place + v * LANES);
    });
    for (int64_t i = 0; i < end; i++) {
        const int32_t sum = seen[i * groups];
        const I32 lowest = set_int(minimum * sum);
        repeat<ABREAST>([&](auto v) UNROLLED {
            I32 exact = add_int(load_int(&sums[i][v * LANES]), lowest);
            if (SHIFT) exact = add_int(exact, shifted[v]);
            F32 total = fma(to_float(exact), scale[v], load(&totals[i][v * LANES]));
            if (ZERO) total = fma(set((float)(sum + restored)), zero[v], total);
            store(&totals[i][v * LANES], total);
        });
    }
}

// What was summed up over the steps of a group of the weight, likewise.
static INLINE void add_inner(const Piece& piece, int64_t g, const Totals& inner, const float (&seen)[2 * STACK], Totals& totals) {
    for (int64_t i = 0; i < piece.at.rows(); i++)
        repeat<ABREAST>([&](auto v) UNROLLED {
            const int64_t place = g * WIDTH + piece.column + v * LANES;
            F32 total = fma(load(&inner[i][v * LANES]), load(piece.p.scale + place), load(&totals[i][v * LANES]));
            if (piece.w.zero) total = fma(set(seen[i]), load(piece.p.zero + place), total);
            store(&totals[i][v * LANES], total);
        });
}

// Several groups, of the weight or of the activations: exact inside each, added up in float32.
template <int TYPE>
static NOINLINE void piece_of_groups(const Piece& piece, int64_t first, const difloat_output& out) {
    const difloat_weight& w = piece.w;
    const Operand& x = piece.x;
    const int64_t stretch = w.groups == 1 ? x.groups : w.group_channels / x.group;
    alignas(64) Totals totals = {}, inner;
    alignas(64) Sums sums;
    float seen[2 * STACK];
    for (int64_t g = 0; g < w.groups; g++) {
        if (x.steps) {
            sum_steps(piece, g * stretch, std::min((g + 1) * stretch, x.groups), inner, seen);
            add_inner(piece, g, inner, seen, totals);
            continue;
        }
        piece.sum(g, sums);
        with_flags(w, x, [&](auto zero, auto shift) UNROLLED { add_sums<zero, shift>(piece, g, sums, totals); });
    }
    for (int64_t i = 0; i < piece.at.rows(); i++) {
        const int64_t row = piece.at.row + i;
        const F32 scale = set(x.scale[row]);
        const float* bias = piece.p.bias + (x.bias_row ? x.bias_row[row] : 0) * WIDTH + piece.column;
        F32 values[ABREAST];
        repeat<ABREAST>([&](auto v) UNROLLED { values[v] = fma(load(&totals[i][v * LANES]), scale, load(bias + v * LANES)); });
        write_row<TYPE, ABREAST>(out, row, first + piece.column, w.rows - first - piece.column, values);
    }
}

// All rows from `begin` to `end` by `count` panels, the first of them that of the output channels from `first` on. A stack of rows
// meets all panels while it is in the first-level cache, so that its results are written side by side.
template <int TYPE>
static void stripe_in_tiles(const difloat_weight& w, const Operand& x, const Panel* panels, int64_t count, int64_t begin,
                            int64_t end, int64_t first, const difloat_output& out) {
    const int64_t step_quads = quads_of_step((x.group + 3) / 4, x.groups > 1);
    int64_t upper = 0, lower = 0;
    for (int64_t row = begin; row < end;) {
        const Stacks at(x, row, end);
        if (at.upper != upper || at.lower != lower) {
            upper = at.upper, lower = at.lower;
            const TileShapes shapes(upper, lower, step_quads);
            settle_memory();
            _tile_loadconfig(&shapes);
        }
        for (int64_t n = 0; n < count; n++)
            for (int64_t column = 0; column < std::min<int64_t>(w.rows - first - n * WIDTH, WIDTH); column += COLUMNS) {
                const Piece piece{w, x, panels[n], at, column, step_quads};
                if (x.groups == 1 && !x.steps) piece_of_one_group<TYPE>(piece, first + n * WIDTH, out);
                else piece_of_groups<TYPE>(piece, first + n * WIDTH, out);
            }
        row += at.rows();
    }
    _tile_release();  // other libraries configure tiles on the same threads
}

}  // namespace difloat
