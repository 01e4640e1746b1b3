// Convolutions without a matrix of patches: pictures are quantized into a padded buffer, channels last, and every tap of a row
// of the product is the same buffer a constant distance further.
//
// Padding is the value 0, which on a shifted grid is the integer minus the shift. With a zero point the integer 0 stands for
// another value, and pixels whose window leaves the picture get less of the correction: they fall into classes by which taps see
// the picture.
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

// Quantize `count` pictures from `first` on into `values`, with the sum of every pixel in `sums` and the scales in `scales`.
template <int TYPE>
static void quantize_pictures(const difloat_input& x, const difloat_geometry& g, const Pictures& buffer, int64_t first,
                              int64_t count, float shared, int8_t* values, int32_t* sums, float* scales, int threads) {
    const Rounder round(x.grid);
    const int64_t pixels = g.size[0] * g.size[1];
    for (int64_t b = 0; b < count; b++) {
        difloat_input picture = x;
        picture.data = row_of(x, (first + b) * pixels), picture.rows = pixels;
        const float scale = x.online == 1 ? scale_of_all<TYPE>(picture, threads) : shared;
        int broken = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : broken)
        for (int64_t line = 0; line < buffer.lines; line++) {
            int8_t* to = values + (b * buffer.lines + line) * buffer.columns * buffer.stride;
            int32_t* total = sums + (b * buffer.lines + line) * buffer.columns;
            const int64_t y = line - g.padding[0], left = g.padding[1];
            memset(to, 0, buffer.columns * buffer.stride), memset(total, 0, buffer.columns * 4);
            for (int64_t c = 0; x.grid.shift && c < buffer.columns; c++) {
                memset(to + c * buffer.stride, -x.grid.shift, x.channels);
                total[c] = -x.grid.shift * (int32_t)x.channels;
            }
            if (y < 0 || y >= g.size[0]) continue;
            for (int64_t c = 0; c < g.size[1]; c++) {
                const float step = quantize_row<TYPE>(row_of(picture, y * g.size[1] + c), x.channels, x, round, scale,
                                                      x.channels, to + (left + c) * buffer.stride, total + left + c);
                broken |= step != step;
            }
        }
        scales[b] = broken ? NAN : scale / x.grid.multiplier;
    }
}

template <int TYPE>
static int conv_of(const difloat_input& x, const difloat_weight* bands, int64_t band_count, const difloat_output& out,
                   const difloat_geometry& g, int threads) {
    const Pictures buffer{g.size[0] + 2 * g.padding[0], g.size[1] + 2 * g.padding[1], round_up(x.channels, LANES)};
    const float origin = origin_of(x), shared = x.online == 2 ? scale_of_all<TYPE>(x, threads) : x.scale;
    const Axis vertical(g, 0, origin != 0), horizontal(g, 1, origin != 0);
    std::vector<uint8_t> inside;
    for (const auto& v : vertical.inside)
        for (const auto& h : horizontal.inside)
            for (uint8_t a : v)
                for (uint8_t b : h) inside.push_back(a & b);
    const Classes classes{(int64_t)(vertical.inside.size() * horizontal.inside.size()), inside.data()};
    std::vector<int64_t> taps, pixel_taps;
    for (int64_t v = 0; v < g.kernel[0]; v++)
        for (int64_t h = 0; h < g.kernel[1]; h++) pixel_taps.push_back(v * g.dilation[0] * buffer.columns + h * g.dilation[1]);
    for (int64_t tap : pixel_taps) taps.push_back(tap * buffer.stride);

    const int64_t pixels = g.out[0] * g.out[1], sum_bytes = buffer.lines * buffer.columns * 4;
    const int64_t at_once = std::max<int64_t>(1, std::min(g.batch, PICTURE_BYTES / (buffer.bytes() + sum_bytes)));
    const int64_t values_bytes = round_up(at_once * buffer.bytes() + 64, 64), sums_bytes = round_up(at_once * sum_bytes, 64);
    const int64_t row_bytes = round_up(at_once * pixels * (8 + 4 + 4 + 4), 4096);
    const int64_t own = round_up(values_bytes + sums_bytes + row_bytes, 4096);
    char* memory = scratch(own + threads * place_bands(bands, band_count, classes));
    if (!memory) return -1;
    int8_t* values = (int8_t*)memory;
    int32_t* pixel_sums = (int32_t*)(memory + values_bytes);
    int64_t* start = (int64_t*)(memory + values_bytes + sums_bytes);
    float* scale = (float*)(start + at_once * pixels);
    int32_t *sums = (int32_t*)(scale + at_once * pixels), *bias_row = sums + at_once * pixels;
    std::vector<float> scales(at_once);

    for (int64_t first = 0; first < g.batch; first += at_once) {
        const int64_t count = std::min(at_once, g.batch - first), rows = count * pixels;
        quantize_pictures<TYPE>(x, g, buffer, first, count, shared, values, pixel_sums, scales.data(), threads);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t b = row / pixels, y = row % pixels / g.out[1], c = row % g.out[1];
            const int64_t pixel = (b * buffer.lines + y * g.stride[0]) * buffer.columns + c * g.stride[1];
            int32_t total = 0;
            for (int64_t tap : pixel_taps) total += pixel_sums[pixel + tap];
            start[row] = pixel * buffer.stride, sums[row] = total, scale[row] = scales[b];
            bias_row[row] = vertical.class_of[y] * (int32_t)horizontal.inside.size() + horizontal.class_of[c];
        }
        const Operand operand{values, start, sums, scale, bias_row, rows, taps.data(), x.grid.shift, origin,
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
