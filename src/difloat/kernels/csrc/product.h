// The product: exact integer sums of a few rows by one panel, then scales and bias. Serves linear layers and convolutions alike.
#pragma once
#include <omp.h>

#include <vector>

#include "difloat.h"
#include "operand.h"
#include "repeat.h"
#include "scratch.h"
#ifdef DIFLOAT_TILES
#include "tiles.h"
#endif

namespace difloat {

// Exact sums over group `g` of the channels: of the products in `acc`, of the activations in `sums`.
template <int ROWS, int USED, class Multiplier>
static INLINE void sum_group(const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const Panel& p, int64_t row,
                             int64_t g, const int8_t* const (&rows)[ROWS], I32 (&acc)[ROWS][USED], int32_t (&sums)[ROWS]) {
    const int64_t quads = quads_of(w.channels), group_quads = (x.group + 3) / 4, first = g * group_quads;
    repeat<ROWS>([&](auto i) UNROLLED {
        sums[i] = x.sums[(row + i) * x.groups + g];
        repeat<USED>([&](auto v) UNROLLED { acc[i][v] = set_int(w.minimum * sums[i]); });
    });
    if (x.shift) {
        const int64_t there = std::min(x.group, w.channels - g * x.group);
        repeat<ROWS>([&](auto i) UNROLLED {
            sums[i] += x.shift * (int32_t)(there * w.taps);
            repeat<USED>([&](auto v) UNROLLED {
                acc[i][v] = add_int(acc[i][v], load_int((const uint8_t*)(p.shifted + g * WIDTH + v * LANES)));
            });
        });
    }
    const int64_t count = std::min(group_quads, quads - first);
    for (int64_t t = 0; t < w.taps; t++)
        multiplier.template accumulate<ROWS, USED>(acc, rows, x.taps[t] + first * 4, count,
                                                   p.weights + (t * panel_quads(w) + first) * WIDTH * 4 * Multiplier::SPREAD);
}

template <int ROWS, int USED>
using Tile = float[ROWS][USED][LANES];

// total += values * scale + seen * zero, for group `g` of the weight.
template <int ROWS, int USED>
static INLINE void add_group(const difloat_weight& w, const Panel& p, int64_t g, const F32 (&values)[ROWS][USED],
                             const float (&seen)[ROWS], Tile<ROWS, USED>& total) {
    repeat<ROWS>([&](auto i) UNROLLED {
        repeat<USED>([&](auto v) UNROLLED {
            const int64_t at = g * WIDTH + v * LANES;
            F32 value = fma(values[i][v], load(p.scale + at), load(total[i][v]));
            if (w.zero) value = fma(set(seen[i]), load(p.zero + at), value);
            store(total[i][v], value);
        });
    });
}

// Groups of activations with steps of their own: `inner` and `seen` are the sums over those of one group of the weight.
template <int ROWS, int USED, class Multiplier>
static NOINLINE void sum_stepped(const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const Panel& p, int64_t row,
                               const int8_t* const (&rows)[ROWS], Tile<ROWS, USED>& total) {
    const int64_t stretch = w.groups == 1 ? x.groups : w.group_channels / x.group;
    const float *steps[ROWS], *zeros[ROWS];
    for (int i = 0; i < ROWS; i++) {
        const int64_t at = (x.step_row ? x.step_row[row + i] : row + i) * x.groups;
        steps[i] = x.steps + at, zeros[i] = x.zeros ? x.zeros + at : nullptr;
    }
    for (int64_t g = 0; g < x.groups;) {
        const int64_t of_weight = g / stretch, end = std::min(g + stretch, x.groups);
        alignas(64) Tile<ROWS, USED> inner = {};
        float seen[ROWS] = {};
        for (; g < end; g++) {
            I32 acc[ROWS][USED];
            int32_t sums[ROWS];
            sum_group<ROWS, USED>(multiplier, w, x, p, row, g, rows, acc, sums);
            const float there = (float)std::min(x.group, w.channels - g * x.group);
            repeat<ROWS>([&](auto i) UNROLLED {
                const F32 step = set(steps[i][g]), zero = set(x.zeros ? zeros[i][g] : 0.0f);
                repeat<USED>([&](auto v) UNROLLED {
                    F32 value = fma(to_float(acc[i][v]), step, load(inner[i][v]));
                    if (x.zeros) value = fma(zero, load((const float*)p.group_sums + g * WIDTH + v * LANES), value);
                    store(inner[i][v], value);
                });
                if (w.zero) seen[i] = fmaf((float)sums[i], steps[i][g], seen[i]);
                if (w.zero && x.zeros) seen[i] = fmaf(there, zeros[i][g], seen[i]);
            });
        }
        F32 values[ROWS][USED];
        repeat<ROWS>([&](auto i) UNROLLED { repeat<USED>([&](auto v) UNROLLED { values[i][v] = load(inner[i][v]); }); });
        add_group<ROWS, USED>(w, p, of_weight, values, seen, total);
    }
}

// ROWS rows by the first USED vectors of one panel, from `row` on. Sums of a group are exact; groups are added up in float32.
template <int ROWS, int TYPE, int USED, class Multiplier>
static NOINLINE void tile(const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const Panel& p, int64_t row,
                          int64_t first, const difloat_output& out) {
    const int8_t* rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = x.values + x.start[row + i];
    alignas(64) Tile<ROWS, USED> total = {};
    if (x.steps) sum_stepped<ROWS, USED>(multiplier, w, x, p, row, rows, total);
    for (int64_t g = 0; !x.steps && g < w.groups; g++) {
        I32 acc[ROWS][USED];
        int32_t sums[ROWS];
        sum_group<ROWS, USED>(multiplier, w, x, p, row, g, rows, acc, sums);
        F32 values[ROWS][USED];
        float seen[ROWS];
        repeat<ROWS>([&](auto i) UNROLLED {
            seen[i] = (float)sums[i];
            repeat<USED>([&](auto v) UNROLLED { values[i][v] = to_float(acc[i][v]); });
        });
        add_group<ROWS, USED>(w, p, g, values, seen, total);
    }
    for (int i = 0; i < ROWS; i++) {
        const F32 scale = set(x.scale[row + i]);
        const float* bias = p.bias + (x.bias_row ? x.bias_row[row + i] : 0) * WIDTH;
        F32 values[USED];
        for (int v = 0; v < USED; v++) values[v] = fma(load(total[i][v]), scale, load(bias + v * LANES));
        write_row<TYPE, USED>(out, row + i, first, w.rows - first, values);
    }
}

template <int ROWS, int TYPE, int USED, class Multiplier>
static void tile_of(int64_t rows, const Multiplier& multiplier, const difloat_weight& w, const Operand& x, const Panel& p,
                    int64_t row, int64_t first, const difloat_output& out) {
    if (rows == ROWS) return tile<ROWS, TYPE, USED>(multiplier, w, x, p, row, first, out);
    if constexpr (ROWS > 1) tile_of<ROWS - 1, TYPE, USED>(rows, multiplier, w, x, p, row, first, out);
}

// All rows from `begin` to `end` by one panel, in tiles of nearly equal height.
template <int TYPE, int USED>
static void stripe(const difloat_weight& w, const Operand& x, const Panel& p, int64_t begin, int64_t end, int64_t first,
                   const difloat_output& out) {
    with_multiplier(w, x.lowest, x.highest, [&](const auto& multiplier) {
        multiplier.prepare(p.weights, panel_bytes(w));
        int64_t row = begin;
        for (int64_t tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS; tiles > 0; tiles--) {
            const int64_t rows = (end - row + tiles - 1) / tiles;
            tile_of<TILE_ROWS, TYPE, USED>(rows, multiplier, w, x, p, row, first, out);
            row += rows;
        }
    });
}

// What the zeros of one picture add where the given taps see it, for vector `v` of the panel.
static F32 value_of_zeros(const difloat_weight& w, const Operand& x, const Panel& p, const float* zeros, const uint8_t* inside, int v) {
    const int64_t stretch = w.groups == 1 ? x.groups : w.group_channels / x.group;
    F32 total = set(0);
    for (int64_t g = 0; g < x.groups;) {
        const int64_t at = g / stretch * WIDTH + v * LANES, end = std::min(g + stretch, x.groups);
        F32 inner = set(0);
        float seen = 0;
        for (; g < end; g++) {
            I32 integers = set_int(0);
            int64_t taps = 0;
            for (int64_t t = 0; t < w.taps; t++)
                if (inside[t]) {
                    integers = add_int(integers, load_int((const uint8_t*)(p.group_sums + (t * x.groups + g) * WIDTH + v * LANES)));
                    taps++;
                }
            inner = fma(set(zeros[g]), to_float(integers), inner);
            seen = fmaf((float)(taps * std::min(x.group, w.channels - g * x.group)), zeros[g], seen);
        }
        total = fma(inner, load(p.scale + at), total);
        if (w.zero) total = fma(set(seen), load(p.zero + at), total);
    }
    return total;
}

// Bias table of a panel: the bias, and the origin times the weights of the taps that see the input. And the sums that take back
// the shift of the activations.
static void make_bias(const difloat_weight& w, const Operand& x, const Classes& classes, const difloat_output& out, int64_t first,
                      const Panel& p) {
    if (x.shift) sum_integers(w, p.weights, x.shift, p.shifted);
    if (x.origin != 0) sum_values(w, p.weights, p.scale, p.zero, p.tap_sums);
    if (x.zeros || classes.zeros) sum_groups(w, p.weights, x.groups, x.group, x.zeros != nullptr, p.group_sums);
    for (int64_t c = 0; c < classes.pictures * classes.count; c++) {
        const uint8_t* inside = classes.inside ? classes.inside + c % classes.count * w.taps : nullptr;
        float* bias = p.bias + c * WIDTH;
        for (int64_t n = 0; n < WIDTH; n++) {
            float value = out.bias && first + n < w.rows ? out.bias[out.channel ? out.channel[first + n] : first + n] : 0.0f;
            for (int64_t t = 0; x.origin != 0 && t < w.taps; t++)
                if (!inside || inside[t]) value += x.origin * p.tap_sums[t * WIDTH + n];
            bias[n] = value;
        }
        const float* zeros = classes.zeros ? classes.zeros + c / classes.count * x.groups : nullptr;
        for (int v = 0; zeros && v < VECTORS; v++)
            store(bias + v * LANES, add(load(bias + v * LANES), value_of_zeros(w, x, p, zeros, inside, v)));
    }
}

// Bytes of one thread's panel for activations in so many groups; `place` fills in where its pieces lie.
static int64_t place(const difloat_weight& w, const Classes& classes, int64_t groups, char* base, Panel* panel) {
    char* at = base;
    auto take = [&at](int64_t bytes) {
        char* begin = at;
        at += round_up(bytes, 64);
        return begin;
    };
    const int64_t row = WIDTH * sizeof(float);
    Panel p;
    p.weights = (uint8_t*)take(MOST_SPREAD * panel_bytes(w));
    p.scale = (float*)take(w.groups * row);
    p.zero = (float*)take(w.zero ? w.groups * row : 0);
    p.bias = (float*)take(classes.pictures * classes.count * row);
    p.tap_sums = (float*)take(w.taps * row);
    p.shifted = (int32_t*)take(w.groups * row);
    p.group_sums = (int32_t*)take(w.taps * groups * row);
    p.gathered = (uint8_t*)take(gather_bytes(w));
    if (panel) *panel = p;
    return round_up(at - base, 4096);
}

#ifdef DIFLOAT_TILES
constexpr bool TILES = true;
constexpr int64_t FEWEST_IN_BLOCK = 512;  // rows; unpacking a panel costs about as much as multiplying 80
#else
constexpr bool TILES = false;
constexpr int64_t FEWEST_IN_BLOCK = 64;  // rows; unpacking a panel costs about as much as multiplying four
#endif

static inline int64_t panels_of(const difloat_weight& w) { return (w.rows + WIDTH - 1) / WIDTH; }

// Panels that a thread unpacks at a time: as many as fit well into the second-level cache, if rows pass all of them in turn.
static inline int64_t panels_at_once(const difloat_weight& w) {
    if (!TILES) return 1;
    return std::max<int64_t>(1, std::min(panels_of(w), second_level_cache() * 3 / 8 / panel_bytes(w)));
}

// Bytes of one thread's panels that serve every band.
static int64_t place_bands(const difloat_weight* bands, int64_t count, const Classes& classes, int64_t groups) {
    int64_t most = 0;
    for (int64_t b = 0; b < count; b++)
        most = std::max(most, panels_at_once(bands[b]) * place(bands[b], classes, groups, nullptr, nullptr));
    return most;
}

// All rows from `begin` to `end` by `count` panels, in the tiles of the processor if the unit has them and may use them.
template <int TYPE>
static void stripes(const difloat_weight& w, const Operand& x, const Panel* panels, int64_t count, int64_t begin, int64_t end,
                    int64_t first, const difloat_output& out) {
#ifdef DIFLOAT_TILES
    if (tiles_permitted()) return stripe_in_tiles<TYPE>(w, x, panels, count, begin, end, first, out);
#endif
    for (int64_t n = 0; n < count; n++, first += WIDTH) {
        if (vectors_of(w, first) == VECTORS) stripe<TYPE, VECTORS>(w, x, panels[n], begin, end, first, out);
        else stripe<TYPE, VECTORS / 2>(w, x, panels[n], begin, end, first, out);
    }
}

// How a product is cut into tasks: so many panels at once, and the rows into so many parts.
struct Cuts {
    int64_t panels, groups, rows;

    Cuts(const difloat_weight& w, const Operand& x, int threads) : panels(panels_at_once(w)), rows(1) {
        const int64_t all = panels_of(w), block = second_level_cache() / 2;
        if (x.rows < FEWEST_IN_BLOCK * threads) panels = std::min(panels, (all + threads - 1) / threads);
        groups = (all + panels - 1) / panels;
        panels = (all + groups - 1) / groups;
        // Where there are too few panels for the threads, the rows are cut as well; and into blocks that stay in the second-level
        // cache while all panels pass.
        if (groups % threads && groups < 8 * threads) rows = std::min<int64_t>(threads, (x.rows + 31) / 32);
        const int64_t reach = x.rows ? x.start[x.rows - 1] - x.start[0] : 0;  // bytes of activations
        if (groups > 1) rows = std::max(rows, std::min((reach + block - 1) / block, x.rows / FEWEST_IN_BLOCK));
    }
};

// The whole product, its tasks shared out among the threads.
template <int TYPE>
static void product(const difloat_weight& w, const Operand& x, const Classes& classes, const difloat_output& out, char* scratch,
                    int threads) {
    const Cuts cuts(w, x, threads);
    const int64_t bytes = place(w, classes, x.groups, nullptr, nullptr);
#pragma omp parallel num_threads(threads)
    {
        std::vector<Panel> panels(cuts.panels);
        char* own = scratch + omp_get_thread_num() * cuts.panels * bytes;
        for (Panel& panel : panels) place(w, classes, x.groups, own, &panel), own += bytes;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < cuts.groups * cuts.rows; task++) {
            const int64_t first = task % cuts.groups * cuts.panels, cut = task / cuts.groups;
            const int64_t count = std::min(cuts.panels, panels_of(w) - first);
            for (int64_t n = 0; n < count; n++) {
                const Panel& p = panels[n];
                const int64_t row = (first + n) * WIDTH;
                unpack_panel(w, row, p.weights, p.gathered);
                unpack_scales(w, row, p.scale, p.zero);
                make_bias(w, x, classes, out, row, p);
            }
            const int64_t begin = x.rows * cut / cuts.rows, end = x.rows * (cut + 1) / cuts.rows;
            stripes<TYPE>(w, x, panels.data(), count, begin, end, first * WIDTH, out);
        }
    }
}

}  // namespace difloat
