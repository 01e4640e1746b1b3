// Random layers through one unit of the native library against loops of plain C++: every bit of every result must be the same.
// Attention, which has no order of its sums, must be as near to loops in double as float32 allows.
//
// It is linked with a unit of any processor, so a unit that this machine cannot run is tested by an emulator (test_units.py).
// Usage: unit_contract COUNT. Prints the counts; exits with 1 after the first difference.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "difloat.h"

extern "C" {
int difloat_linear(const difloat_input*, const difloat_weight*, int, const difloat_output*, int);
int difloat_conv2d(const difloat_input*, const difloat_weight*, int, const difloat_output*, const difloat_geometry*, int);
int difloat_decode(const difloat_weight*, const float*, const int32_t*, void*, int, int);
int difloat_round(const difloat_input*, void*, int);
int difloat_attend(const difloat_attention*, int);
}

static std::mt19937 engine(0);
static int64_t below(int64_t n) { return engine() % n; }
template <class T>
static T pick(std::initializer_list<T> from) {
    return from.begin()[below(from.size())];
}
static float uniform() { return engine() / 4294967296.0f; }

// Numbers of the three types.

#ifdef __aarch64__
using Half = __fp16;
#else
using Half = _Float16;
#endif

static float as_float(const void* data, int64_t at, int type) {
    if (type == DIFLOAT_F32) return ((const float*)data)[at];
    if (type == DIFLOAT_F16) return (float)((const Half*)data)[at];
    const uint32_t bits = (uint32_t)((const uint16_t*)data)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void put(void* data, int64_t at, int type, float value) {
    if (type == DIFLOAT_F32) ((float*)data)[at] = value;
    else if (type == DIFLOAT_F16) ((Half*)data)[at] = (Half)value;
    else {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        ((uint16_t*)data)[at] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

// Activations: rows on a grid.

struct Grid {
    difloat_grid grid;
    std::vector<float> values;  // of a grid that is not evenly spaced, without signs

    static Grid random() {
        const int kind = (int)below(5);
        if (kind == 0) return {{-128, 127, 1, 0, 1, 0, 0}, {}};
        if (kind == 1) return {{0, 255, 1, 128, 1, 0, 0}, {}};
        if (kind == 2) return {{-7, 7, 1, 0, 1, 0, 0}, {}};
        if (kind == 3) return {{-6, 6, 2, 0, 0, 1, 0}, {0, 0.5f, 1, 1.5f, 2, 3, 4, 6}};
        return {{-1.75f, 1.75f, 4, 0, 1, 0, 0}, {}};
    }

    float value_of(float y) const {
        y = std::min(std::max(y, grid.minimum), grid.maximum);
        if (values.empty()) return nearbyintf(y * grid.multiplier) / grid.multiplier;
        size_t best = 0;
        for (size_t code = 1; code < values.size(); code++) {  // a tie goes to the even code
            const float far = fabsf(fabsf(y) - values[code]), least = fabsf(fabsf(y) - values[best]);
            if (far < least || (far == least && code % 2 == 0)) best = code;
        }
        return copysignf(values[best], y);
    }
    int32_t integer_of(float y) const { return (int32_t)(value_of(y) * grid.multiplier) - grid.shift; }
};

struct Inputs {
    difloat_input input;
    Grid grid;
    std::vector<char> memory;

    // `group` channels have a scale of their own, and maybe a zero point; 0: as the input is otherwise.
    Inputs(int64_t rows, int64_t channels, int64_t stride, bool may_shift, int64_t group = 0) : grid(Grid::random()) {
        while ((!may_shift || group) && grid.grid.shift) grid = Grid::random();
        const bool is_signed = grid.grid.minimum < 0;
        int32_t online = is_signed ? (int32_t)below(3) : 0;
        if (group) online = is_signed && below(2) ? 1 : 3;
        input = {nullptr, rows, channels, stride, (int32_t)below(3), online, 0.37f, 0.0f, grid.grid, group ? group : channels};
        memory.resize(std::max<int64_t>(1, rows * stride) * 4);
        for (int64_t i = 0; i < rows * stride; i++) {
            if (group && !below(30)) i += std::min<int64_t>(below(2 * group), rows * stride - i - 1);  // runs of zeros
            const float reach = input.scale * grid.grid.maximum * (below(4) ? 1.0f : 3.0f);  // a quarter of them at the ends
            put(memory.data(), i, input.type, is_signed ? (2 * uniform() - 1) * reach : uniform() * reach);
        }
        input.data = memory.data();
    }
    float at(int64_t row, int64_t channel) const { return as_float(memory.data(), row * input.stride + channel, input.type); }
    // Scale and zero of group `g` of the channels in the rows [first, first + count).
    std::pair<float, float> step_of(int64_t first, int64_t count, int64_t g) const {
        float low = INFINITY, high = -INFINITY;
        for (int64_t row = first; row < first + count; row++)
            for (int64_t c = g * input.group; c < std::min((g + 1) * input.group, input.channels); c++)
                low = std::min(low, at(row, c)), high = std::max(high, at(row, c));
        if (input.online == 1) return {std::max(-low, high) > 0 ? std::max(-low, high) / grid.grid.maximum : 1.0f, 0.0f};
        if (!(high - low > 0)) return {1.0f, low};
        const float scale = (high - low) / (grid.grid.maximum - grid.grid.minimum);
        volatile float below_zero = grid.grid.minimum * scale;  // rounded before the difference
        return {scale, low - below_zero};
    }
    // Scale of the rows [first, first + count).
    float scale_of(int64_t first, int64_t count) const {
        if (!input.online) return input.scale;
        if (input.online == 2) first = 0, count = input.rows;
        float most = 0;
        for (int64_t row = first; row < first + count; row++)
            for (int64_t c = 0; c < input.channels; c++) most = std::max(most, fabsf(at(row, c)));
        return most > 0 ? most / grid.grid.maximum : 1.0f;
    }
};

// Weights: codes in rows of bits.

struct Weights {
    difloat_weight weight;
    std::vector<uint8_t> memory, table;
    std::vector<int> codes;  // [rows, taps, channels]
    std::vector<float> scale, zero, values;

    Weights(int64_t rows, int64_t channels, int64_t taps, int64_t group) : table(256), values(256) {
        const int bits = 1 + (int)below(8), entries = 1 << bits;
        const int span = pick({1, 3, 7, 15, 24, 62, 63, 64, 120, 126, 128, 129, 240, 255}), order = (int)below(3);
        for (int code = 0; code < 256; code++) {
            const int place = code % entries, half = entries / 2;
            int entry = (int)below(span + 1);
            if (order == 0) entry = std::min(place, span);  // unsigned integers
            if (order == 1) entry = std::min(place < half ? half - 1 + place : entries - 1 - place, span);  // sign and size
            table[code] = code < entries ? entry : table[place];
            values[code] = code < entries ? 2 * uniform() - 1 : values[place];
        }
        if (order == 2) table[0] = 0, table[entries - 1] = span;
        for (int code = 0; code < 256; code++) table[code] = table[code % entries];
        const int64_t bytes = (channels * bits + 7) / 8, apart = below(2) ? 1 : taps + below(3);
        const int64_t tap_stride = apart == 1 ? bytes : 1, row_stride = bytes * std::max(apart, taps) + below(5);
        memory.resize(rows * row_stride);
        codes.resize(rows * taps * channels);
        for (int64_t i = 0; i < (int64_t)codes.size(); i++) {
            const int64_t c = i % channels, tap = i / channels % taps, row = i / channels / taps;
            const int code = codes[i] = (int)(below(3) ? below(entries) : below(2) * (entries - 1));
            for (int bit = 0; bit < bits; bit++) {
                const int64_t place = c * bits + bit;
                memory[row * row_stride + tap * tap_stride + place / 8 * apart] |= (code >> bit & 1) << place % 8;
            }
        }
        const int64_t groups = group ? (channels + group - 1) / group : 1;
        const int64_t scale_stride = group || below(2) ? groups : 0, count = scale_stride ? rows * groups : 1;
        for (int64_t i = 0; i < count; i++) scale.push_back(uniform() + 0.1f), zero.push_back(uniform() - 0.5f);
        weight = {memory.data(), rows, channels, taps, row_stride, apart, tap_stride, bits, -(int32_t)below(span + 1), table.data(),
                  scale.data(), below(3) ? nullptr : zero.data(), pick({1.0f, 0.5f, 0.125f}), groups, group ? group : channels,
                  scale_stride};
    }
    int code(int64_t row, int64_t tap, int64_t c) const { return codes[(row * weight.taps + tap) * weight.channels + c]; }
};

static void compare(const std::vector<char>& found, const std::vector<char>& expected, int type, const char* what) {
    for (int64_t i = 0; i < (int64_t)found.size() / (type == DIFLOAT_F32 ? 4 : 2); i++) {
        const float a = as_float(found.data(), i, type), b = as_float(expected.data(), i, type);
        if (a == b || (a != a && b != b)) continue;
        printf("%s: result %ld is %.9g instead of %.9g\n", what, (long)i, a, b);
        exit(1);
    }
}

// One number of a product: `at(tap, channel)` is an activation's integer before the shift.
template <class At>
static float one_result(const Weights& w, int64_t row, const At& at, float scale, float bias) {
    const difloat_weight& s = w.weight;
    float total = 0;
    for (int64_t g = 0; g < s.groups; g++) {
        int64_t sum = 0, acc = 0;
        for (int64_t tap = 0; tap < s.taps; tap++)
            for (int64_t c = g * s.group_channels; c < std::min((g + 1) * s.group_channels, s.channels); c++) {
                const int64_t x = at(tap, c);
                sum += x, acc += x * (s.table[w.code(row, tap, c)] + s.minimum);
            }
        const int64_t place = s.scale_stride ? row * s.scale_stride + g : 0;
        total = fmaf((float)acc, s.scale[place] * s.unit, total);
        if (s.zero) total = fmaf((float)sum, s.zero[place], total);
    }
    return fmaf(total, scale, bias);
}

// The same where activations have steps in groups of `group` channels: by group what an integer of 1 and the integer 0 are worth.
// `seen(tap)` says whether a tap sees the picture; without it zeros are added group by group, with it they come with the bias.
template <class At, class Step, class Seen>
static float stepped_result(const Weights& w, int64_t row, int64_t group, const At& at, const Step& step, const Seen* seen, float bias) {
    const difloat_weight& s = w.weight;
    float total = 0, of_zeros = 0;
    for (int64_t g = 0; g < s.groups; g++) {
        float inner = 0, sum_seen = 0, inner_zeros = 0, seen_zeros = 0;
        for (int64_t begin = g * s.group_channels; begin < std::min((g + 1) * s.group_channels, s.channels); begin += group) {
            const int64_t end = std::min(begin + group, s.channels);
            int64_t sum = 0, acc = 0, integers = 0, count = 0;
            for (int64_t tap = 0; tap < s.taps; tap++)
                for (int64_t c = begin; c < end; c++) {
                    const int64_t x = at(tap, c), weight = s.table[w.code(row, tap, c)] + s.minimum;
                    sum += x, acc += x * weight;
                    if (!seen || (*seen)(tap)) integers += weight, count++;
                }
            const auto [worth, zero] = step(begin / group);
            inner = fmaf((float)acc, worth, inner);
            sum_seen = fmaf((float)sum, worth, sum_seen);
            float &to = seen ? inner_zeros : inner, &to_seen = seen ? seen_zeros : sum_seen;
            to = fmaf(zero, (float)integers, to);
            to_seen = fmaf((float)count, zero, to_seen);
        }
        const int64_t place = s.scale_stride ? row * s.scale_stride + g : 0;
        total = fmaf(inner, s.scale[place] * s.unit, total);
        if (s.zero) total = fmaf(sum_seen, s.zero[place], total);
        of_zeros = fmaf(inner_zeros, s.scale[place] * s.unit, of_zeros);
        if (s.zero) of_zeros = fmaf(seen_zeros, s.zero[place], of_zeros);
    }
    return total + (bias + of_zeros);
}

using Nothing = bool (*)(int64_t);

static std::vector<float> random_bias(int64_t rows) {
    std::vector<float> bias;
    for (int64_t i = 0; i < rows; i++) bias.push_back(uniform() - 0.5f);
    return bias;
}

static std::vector<int32_t> random_order(int64_t rows) {
    std::vector<int32_t> order;
    for (int64_t i = 0; i < rows; i++) order.push_back((int32_t)i);
    std::shuffle(order.begin(), order.end(), engine);
    return order;
}

// The weight as it is, or as two bands of its rows.
static std::vector<difloat_weight> cut(const difloat_weight& w) {
    if (w.rows < 2 || below(2)) return {w};
    difloat_weight first = w, second = w;
    first.rows = 1 + below(w.rows - 1), second.rows = w.rows - first.rows;
    second.data += first.rows * w.row_stride, second.scale += first.rows * w.scale_stride;
    if (w.zero) second.zero += first.rows * w.scale_stride;
    return {first, second};
}

static void check_linear() {
    const int64_t channels = pick<int64_t>({1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 65, 100, 128, 130, 200, 300, 1100});
    const int64_t rows = pick<int64_t>({1, 2, 3, 4, 5, 6, 7, 9, 13, 40}), group = below(3) ? 0 : pick<int64_t>({16, 32, 64});
    const int64_t steps = below(2) ? 0 : pick<int64_t>({16, 32, 64, channels});  // channels of a group of activations
    const Inputs x(rows, channels, channels + below(4), true, !group || (steps && group % steps == 0) ? steps : 0);
    const bool stepped = x.input.online == 3 || x.input.group < channels;
    const Weights w(1 + below(40), channels, 1, group);
    const std::vector<float> bias = random_bias(w.weight.rows);
    const difloat_grid& grid = x.input.grid;
    const int size = x.input.type == DIFLOAT_F32 ? 4 : 2;
    std::vector<char> found(rows * w.weight.rows * size), expected(found.size());
    const bool biased = below(2);
    const std::vector<int32_t> order = random_order(w.weight.rows);
    const bool ordered = below(2);
    const difloat_output out{found.data(), biased ? bias.data() : nullptr, ordered ? order.data() : nullptr, w.weight.rows};
    const std::vector<difloat_weight> bands = cut(w.weight);
    if (difloat_linear(&x.input, bands.data(), bands.size(), &out, 1)) exit(2);
    for (int64_t t = 0; stepped && t < rows; t++) {
        std::vector<std::pair<float, float>> found_steps;
        for (int64_t c = 0; c < channels; c += x.input.group) found_steps.push_back(x.step_of(t, 1, c / x.input.group));
        const auto at = [&](int64_t, int64_t c) {
            const auto& [scale, zero] = found_steps[c / x.input.group];
            return x.grid.integer_of((x.at(t, c) - zero) / scale);
        };
        const auto step = [&](int64_t g) {
            return std::make_pair(found_steps[g].first / grid.multiplier, x.input.online == 3 ? found_steps[g].second : 0.0f);
        };
        for (int64_t o = 0; o < w.weight.rows; o++) {
            const int64_t to = ordered ? order[o] : o;
            const float result = stepped_result(w, o, x.input.group, at, step, (const Nothing*)nullptr, biased ? bias[to] : 0);
            put(expected.data(), t * w.weight.rows + to, x.input.type, result);
        }
    }
    for (int64_t t = 0; !stepped && t < rows; t++) {
        const float scale = x.scale_of(t, 1);
        const auto at = [&](int64_t, int64_t c) { return x.grid.integer_of(x.at(t, c) / scale) + grid.shift; };
        for (int64_t o = 0; o < w.weight.rows; o++) {
            const int64_t to = ordered ? order[o] : o;
            put(expected.data(), t * w.weight.rows + to, x.input.type,
                one_result(w, o, at, scale / grid.multiplier, biased ? bias[to] : 0));
        }
    }
    compare(found, expected, x.input.type, "linear");
}

static void check_conv2d() {
    difloat_geometry g = {1 + below(2), {3 + below(5), 3 + below(5)}, {}, {}, {}, {}, {}};
    for (int axis = 0; axis < 2; axis++) {
        g.kernel[axis] = 1 + below(3), g.stride[axis] = 1 + below(2), g.padding[axis] = below(3), g.dilation[axis] = 1 + below(2);
        const int64_t reach = g.size[axis] + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1;
        if (reach < 0) return check_conv2d();
        g.out[axis] = reach / g.stride[axis] + 1;
    }
    const int64_t channels = pick<int64_t>({1, 3, 4, 16, 17, 33, 64}), pixels = g.size[0] * g.size[1];
    const int64_t group = below(3) ? 0 : pick<int64_t>({16, 32}), steps = below(2) ? 0 : pick<int64_t>({16, 32, channels});
    const Inputs x(g.batch * pixels, channels, channels, true, !group || (steps && group % steps == 0) ? steps : 0);
    const Weights w(1 + below(40), channels, g.kernel[0] * g.kernel[1], group);
    const bool stepped = x.input.online == 3 || x.input.group < channels;
    const std::vector<float> bias = random_bias(w.weight.rows);
    const int size = x.input.type == DIFLOAT_F32 ? 4 : 2;
    std::vector<char> found(g.batch * g.out[0] * g.out[1] * w.weight.rows * size), expected(found.size());
    const difloat_output out{found.data(), bias.data(), nullptr, w.weight.rows};
    const std::vector<difloat_weight> bands = cut(w.weight);
    if (difloat_conv2d(&x.input, bands.data(), bands.size(), &out, &g, 1)) exit(2);
    int64_t at_result = 0;
    for (int64_t place = 0; place < g.batch * g.out[0] * g.out[1]; place++) {
        const int64_t b = place / (g.out[0] * g.out[1]), y = place / g.out[1] % g.out[0], c0 = place % g.out[1];
        const auto pixel_of = [&](int64_t tap) -> int64_t {  // -1 outside of the picture
            const int64_t line = y * g.stride[0] - g.padding[0] + tap / g.kernel[1] * g.dilation[0];
            const int64_t column = c0 * g.stride[1] - g.padding[1] + tap % g.kernel[1] * g.dilation[1];
            if (line < 0 || line >= g.size[0] || column < 0 || column >= g.size[1]) return -1;
            return b * pixels + line * g.size[1] + column;
        };
        if (stepped) {
            std::vector<std::pair<float, float>> found_steps;
            for (int64_t c = 0; c < channels; c += x.input.group)
                found_steps.push_back(x.step_of(b * pixels, pixels, c / x.input.group));
            const auto at = [&](int64_t tap, int64_t c) {
                const auto& [scale, zero] = found_steps[c / x.input.group];
                return pixel_of(tap) < 0 ? 0 : x.grid.integer_of((x.at(pixel_of(tap), c) - zero) / scale);
            };
            const auto step = [&](int64_t n) {
                return std::make_pair(found_steps[n].first / x.input.grid.multiplier, x.input.online == 3 ? found_steps[n].second : 0.0f);
            };
            const auto seen = [&](int64_t tap) { return pixel_of(tap) >= 0; };
            for (int64_t o = 0; o < w.weight.rows; o++)
                put(expected.data(), at_result++, x.input.type, stepped_result(w, o, x.input.group, at, step, &seen, bias[o]));
            continue;
        }
        const float scale = x.scale_of(b * pixels, pixels);
        const auto at = [&](int64_t tap, int64_t c) {
            return pixel_of(tap) < 0 ? 0 : x.grid.integer_of(x.at(pixel_of(tap), c) / scale) + x.input.grid.shift;
        };
        for (int64_t o = 0; o < w.weight.rows; o++)
            put(expected.data(), at_result++, x.input.type, one_result(w, o, at, scale / x.input.grid.multiplier, bias[o]));
    }
    compare(found, expected, x.input.type, "conv2d");
}

static void check_decode() {
    const int64_t channels = pick<int64_t>({1, 3, 15, 16, 17, 33, 64, 100, 130}), taps = pick<int64_t>({1, 1, 4});
    const Weights w(1 + below(40), channels, taps, taps == 1 && below(2) ? 16 : 0);
    const difloat_weight& s = w.weight;
    const int type = (int)below(3), size = type == DIFLOAT_F32 ? 4 : 2;
    std::vector<char> found(s.rows * taps * channels * size), expected(found.size());
    if (difloat_decode(&s, w.values.data(), nullptr, found.data(), type, 1)) exit(2);
    for (int64_t i = 0; i < s.rows * taps * channels; i++) {
        const int64_t row = i / channels / taps, c = i % channels;
        const int64_t place = s.scale_stride ? row * s.scale_stride + c / s.group_channels : 0;
        volatile float value = w.values[w.codes[i]] * s.scale[place];  // rounded before the sum
        if (s.zero) value = value + s.zero[place];
        put(expected.data(), i, type, value);
    }
    compare(found, expected, type, "decode");
}

static void check_round() {
    const int64_t channels = pick<int64_t>({1, 3, 4, 8, 15, 33, 100}), rows = 1 + below(5);
    const Inputs x(rows, channels, channels + below(3), false);
    std::vector<char> found(rows * channels * (x.input.type == DIFLOAT_F32 ? 4 : 2)), expected(found.size());
    if (difloat_round(&x.input, found.data(), 1)) exit(2);
    for (int64_t t = 0; t < rows; t++)
        for (int64_t c = 0; c < channels; c++) {
            const float scale = x.scale_of(t, 1);
            put(expected.data(), t * channels + c, x.input.type, x.grid.value_of(x.at(t, c) / scale) * scale);
        }
    compare(found, expected, x.input.type, "round");
}

#include "unit_attention.h"

int main(int argc, char** argv) {
    const int count = argc > 1 ? atoi(argv[1]) : 100;
    for (int i = 0; i < count; i++) check_linear(), check_conv2d(), check_decode(), check_round();
    for (int i = 0; i < count; i += 4) check_attention();
    printf("%d layers each of linear, conv2d, decode, round: equal; a quarter as many of attention: near\n", count);
}
