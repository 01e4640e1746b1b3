// Convolutions without a matrix of patches: pictures are quantized into a padded buffer, channels last, and every tap of a row
// of the product is the same buffer a constant distance further.
//
// Padding is the value 0, which on a shifted grid is the integer minus the shift. With a zero point the integer 0 stands for
// another value, and pixels whose window leaves the picture get less of the correction: they fall into classes by which taps see
// the picture. Groups of channels that have a zero point of their own have one per picture, so their correction is a bias, too.
#pragma once

namespace difloat {

constexpr int64_t PICTURE_BYTES = 16 << 20;  // of quantized pictures at a time

// Which taps see the picture, for every place of one axis; equal places share a class.
struct Axis {
    std::vector<int32_t> class_of;             // [out]
    std::vector<std::vector<uint8_t>> inside;  // [classes][kernel]

    Axis(const difloat_geometry& g, int axis, bool padded_taps_differ) {
        for (int64_t place = 0; place < g.out[axis]; place++) {
            std::vector<uint8_t> seen;
            for (int64_t tap = 0; tap < g.kernel[axis]; tap++) {
                const int64_t at = place * g.stride[axis] - g.padding[axis] + tap * g.dilation[axis];
                seen.push_back(!padded_taps_differ || (at >= 0 && at < g.size[axis]));
            }
            auto found = std::find(inside.begin(), inside.end(), seen);
            class_of.push_back((int32_t)(found - inside.begin()));
            if (found == inside.end()) inside.push_back(seen);
        }
    }
};

struct Pictures {
    int64_t lines, columns, stride;  // of the padded buffer; stride in channels
    int64_t bytes() const { return lines * columns * stride; }
};

// The scale and zero of every group of channels of one picture, whose pixels are the rows of `x`.
template <int TYPE>
static void ranges_of(const difloat_input& x, float* scales, float* zeros, int threads) {
    const int64_t groups = groups_of(x);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t g = 0; g < groups; g++) {
        Range range;
        for (int64_t pixel = 0; pixel < x.rows; pixel++)
            range.add<TYPE>(row_of(x, pixel), g * x.group, std::min((g + 1) * x.group, x.channels));
        const Step step = range.step(x);
        scales[g] = step.scale, zeros[g] = step.zero;
    }
}

// Where quantized pictures go, and what belongs to each.
struct Quantized {
    int8_t* values;
    int32_t* sums;              // [pixels of the padded buffer, groups]
    int64_t group, groups;      // of channels that are summed up
    float *scales;              // [pictures]
    float *steps, *zeros;       // [pictures, groups] where groups have their own
};

// Quantize `count` pictures from `first` on.
template <int TYPE>
static void quantize_pictures(const difloat_input& x, const difloat_geometry& g, const Pictures& buffer, int64_t first,
                              int64_t count, float shared, const Quantized& to, int threads) {
    const Rounder round(x.grid);
    const int64_t pixels = g.size[0] * g.size[1], groups = to.groups;
    const bool grouped = is_grouped(x);
    for (int64_t b = 0; b < count; b++) {
        difloat_input picture = x;
        picture.data = row_of(x, (first + b) * pixels), picture.rows = pixels;
        float *steps = to.steps + b * groups, *zeros = to.zeros + b * groups;
        if (grouped) ranges_of<TYPE>(picture, steps, zeros, threads);
        const float scale = x.online == 1 && !grouped ? scale_of_all<TYPE>(picture, threads) : shared;
        int broken = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : broken)
        for (int64_t line = 0; line < buffer.lines; line++) {
            int8_t* values = to.values + (b * buffer.lines + line) * buffer.columns * buffer.stride;
            int32_t* total = to.sums + (b * buffer.lines + line) * buffer.columns * groups;
            const int64_t y = line - g.padding[0], left = g.padding[1];
            memset(values, 0, buffer.columns * buffer.stride), memset(total, 0, buffer.columns * groups * 4);
            for (int64_t c = 0; x.grid.shift && c < buffer.columns; c++) {
                memset(values + c * buffer.stride, -x.grid.shift, x.channels);
                for (int64_t n = 0; n < groups; n++)
                    total[c * groups + n] = -x.grid.shift * (int32_t)std::min(to.group, x.channels - n * to.group);
            }
            if (y < 0 || y >= g.size[0]) continue;
            for (int64_t c = 0; c < g.size[1]; c++) {
                const char* from = row_of(picture, y * g.size[1] + c);
                int8_t* pixel = values + (left + c) * buffer.stride;
                int32_t* sums = total + (left + c) * groups;
                if (grouped) {
                    broken |= !quantize_groups<TYPE>(from, x, round, steps, zeros, pixel, sums);
                } else {
                    const float step = quantize_row<TYPE>(from, x.channels, x, round, {scale, x.zero_point}, to.group, pixel, sums);
                    broken |= step != step;
                }
            }
        }
        to.scales[b] = broken ? NAN : grouped ? 1.0f : scale / x.grid.multiplier;
        for (int64_t n = 0; grouped && n < groups; n++) steps[n] /= x.grid.multiplier;
    }
}

template <int TYPE>
static int conv_of(const difloat_input& x, const difloat_weight* bands, int64_t band_count, const difloat_output& out,
                   const difloat_geometry& g, int threads) {
    const Pictures buffer{g.size[0] + 2 * g.padding[0], g.size[1] + 2 * g.padding[1], round_up(x.channels, LANES)};
    const float origin = origin_of(x), shared = x.online == 2 ? scale_of_all<TYPE>(x, threads) : x.scale;
    const bool grouped = is_grouped(x), apart = origin != 0 || x.online == 3;  // padding is apart from the integer 0
    const int64_t group = summed_channels(x, bands[0]), groups = (x.channels + group - 1) / group;
    const Axis vertical(g, 0, apart), horizontal(g, 1, apart);
    std::vector<uint8_t> inside;
    for (const auto& v : vertical.inside)
        for (const auto& h : horizontal.inside)
            for (uint8_t a : v)
                for (uint8_t b : h) inside.push_back(a & b);
    const int32_t classes_of_picture = (int32_t)(vertical.inside.size() * horizontal.inside.size());
    std::vector<int64_t> taps, pixel_taps;
    for (int64_t v = 0; v < g.kernel[0]; v++)
        for (int64_t h = 0; h < g.kernel[1]; h++) pixel_taps.push_back(v * g.dilation[0] * buffer.columns + h * g.dilation[1]);
    for (int64_t tap : pixel_taps) taps.push_back(tap * buffer.stride);

    const int64_t pixels = g.out[0] * g.out[1], sum_bytes = buffer.lines * buffer.columns * groups * 4;
    const int64_t at_once = std::max<int64_t>(1, std::min(g.batch, PICTURE_BYTES / (buffer.bytes() + sum_bytes)));
    const int64_t values_bytes = round_up(at_once * buffer.bytes() + 64, 64), sums_bytes = round_up(at_once * sum_bytes, 64);
    const int64_t row_bytes = round_up(at_once * pixels * (8 + 4 + 4 + 4 + 4 * groups), 4096);
    const int64_t own = round_up(values_bytes + sums_bytes + row_bytes, 4096);
    std::vector<float> scales(at_once), steps(at_once * groups), zeros(at_once * groups);
    const Classes classes{classes_of_picture, inside.data(), x.online == 3 ? at_once : 1, x.online == 3 ? zeros.data() : nullptr};
    char* memory = scratch(own + threads * place_bands(bands, band_count, classes, groups));
    if (!memory) return -1;
    const Quantized to{(int8_t*)memory, (int32_t*)(memory + values_bytes), group, groups, scales.data(), steps.data(), zeros.data()};
    int64_t* start = (int64_t*)(memory + values_bytes + sums_bytes);
    float* scale = (float*)(start + at_once * pixels);
    int32_t *bias_row = (int32_t*)(scale + at_once * pixels), *step_row = bias_row + at_once * pixels;
    int32_t* sums = step_row + at_once * pixels;

    const bool lines_go_on = g.stride[0] * buffer.columns == g.stride[1] * g.out[1];  // one after the other, evenly
    const int64_t run = lines_go_on ? pixels : g.out[1];
    for (int64_t first = 0; first < g.batch; first += at_once) {
        const int64_t count = std::min(at_once, g.batch - first), rows = count * pixels;
        quantize_pictures<TYPE>(x, g, buffer, first, count, shared, to, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t b = row / pixels, y = row % pixels / g.out[1], c = row % g.out[1];
            const int64_t pixel = (b * buffer.lines + y * g.stride[0]) * buffer.columns + c * g.stride[1];
            int32_t* total = sums + row * groups;
            memset(total, 0, groups * 4);
            for (int64_t tap : pixel_taps)
                for (int64_t n = 0; n < groups; n++) total[n] += to.sums[(pixel + tap) * groups + n];
            start[row] = pixel * buffer.stride, scale[row] = scales[b], step_row[row] = (int32_t)b;
            bias_row[row] = vertical.class_of[y] * (int32_t)horizontal.inside.size() + horizontal.class_of[c];
            if (classes.zeros) bias_row[row] += (int32_t)b * classes_of_picture;
        }
        const Operand operand{to.values, start, g.stride[1] * buffer.stride, run, sums, groups, group, scale, grouped ? to.steps : nullptr, nullptr, step_row,
                              bias_row, rows, taps.data(), x.grid.shift, origin,
                              integer_of(x.grid, x.grid.minimum), integer_of(x.grid, x.grid.maximum)};
        for (int64_t b = 0, before = 0; b < band_count; before += bands[b++].rows)
            product<TYPE>(bands[b], operand, classes, part_of<TYPE>(out, first * pixels, before), memory + own, threads);
    }
    return 0;
}

static int conv(const difloat_input& x, const difloat_weight* bands, int64_t count, const difloat_output& out,
                const difloat_geometry& g, int threads) {
    if (x.type == DIFLOAT_BF16) return conv_of<DIFLOAT_BF16>(x, bands, count, out, g, threads);
    if (x.type == DIFLOAT_F16) return conv_of<DIFLOAT_F16>(x, bands, count, out, g, threads);
    return conv_of<DIFLOAT_F32>(x, bands, count, out, g, threads);
}

}  // namespace difloat
