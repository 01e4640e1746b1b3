// Random attention through one unit of the native library against loops in double; a part of unit_contract.cpp, with its numbers.
#pragma once

// Random [batch, tokens, heads, width], and the strides of batch, head and token.
struct Heads {
    std::vector<char> memory;
    int64_t stride[3];
    int type;

    Heads(int64_t batch, int64_t heads, int64_t tokens, int64_t width, int kind) : type(kind) {
        const int64_t apart = width + below(3);
        stride[0] = tokens * heads * apart, stride[1] = apart, stride[2] = heads * apart;
        memory.resize(batch * stride[0] * (type == DIFLOAT_F32 ? 4 : 2));
        for (int64_t i = 0; i < batch * stride[0]; i++) put(memory.data(), i, type, 4 * uniform() - 2);
    }
    // One row as doubles, on a grid if there is one.
    std::vector<double> row(int64_t b, int64_t h, int64_t t, int64_t width, const Grid* grid) const {
        std::vector<float> numbers;
        float most = 0;
        for (int64_t d = 0; d < width; d++) {
            numbers.push_back(as_float(memory.data(), b * stride[0] + h * stride[1] + t * stride[2] + d, type));
            most = std::max(most, fabsf(numbers.back()));
        }
        const float scale = !grid ? 1.0f : most > 0 ? most / grid->grid.maximum : 1.0f;
        std::vector<double> found;
        for (float x : numbers) found.push_back(grid ? (double)grid->value_of(x / scale) * scale : x);
        return found;
    }
};

static void check_attention() {
    const int64_t batch = 1 + below(2), heads = 1 + below(3), width = pick<int64_t>({1, 3, 8, 9, 16, 24, 31, 40, 64, 72, 80});
    const int64_t queries = pick<int64_t>({1, 2, 11, 12, 13, 25}), keys = pick<int64_t>({1, 7, 16, 33, 100, 256, 257, 300});
    const int type = (int)below(3), size = type == DIFLOAT_F32 ? 4 : 2, masked = (int)below(2);
    const Heads q(batch, heads, queries, width, type), k(batch, heads, keys, width, type), v(batch, heads, keys, width, type);
    Heads out(batch, heads, queries, width, type);
    Grid grid = Grid::random();
    while (grid.grid.shift) grid = Grid::random();
    const bool on_grid = below(2);
    std::vector<float> mask(queries * keys);
    for (float& x : mask) x = below(4) ? uniform() : -INFINITY;
    if (masked && below(2)) std::fill_n(mask.begin(), keys, -INFINITY);  // a query without keys
    difloat_attention a = {q.memory.data(), k.memory.data(), v.memory.data(), out.memory.data(), masked ? mask.data() : nullptr,
                           batch, heads, queries, keys, width, {}, {}, {}, {}, {0, 0, keys}, pick({0.3f, 1.0f, -0.2f}), on_grid,
                           grid.grid, 0, {}, type};
    memcpy(a.query_stride, q.stride, sizeof q.stride), memcpy(a.key_stride, k.stride, sizeof k.stride);
    memcpy(a.value_stride, v.stride, sizeof v.stride), memcpy(a.out_stride, out.stride, sizeof out.stride);
    if (difloat_attend(&a, 1)) exit(2);
    const Grid* used = on_grid ? &grid : nullptr;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < queries; t++) {
                const std::vector<double> query = q.row(b, h, t, width, used);
                std::vector<double> scores, sums(width), reach(width);
                double most = -INFINITY, total = 0;
                for (int64_t n = 0; n < keys; n++) {
                    const std::vector<double> key = k.row(b, h, n, width, used);
                    double score = 0;
                    for (int64_t d = 0; d < width; d++) score += query[d] * key[d];
                    scores.push_back(std::max(score * a.scale + (masked ? mask[t * keys + n] : 0), -1e29));
                    most = std::max(most, scores.back());
                }
                for (int64_t n = 0; n < keys; n++) {
                    const std::vector<double> value = v.row(b, h, n, width, used);
                    const double e = exp(scores[n] - most);
                    total += e;
                    for (int64_t d = 0; d < width; d++) sums[d] += e * value[d], reach[d] += e * fabs(value[d]);
                }
                for (int64_t d = 0; d < width; d++) {
                    const double found = as_float(out.memory.data(), b * out.stride[0] + h * out.stride[1] + t * out.stride[2] + d, type);
                    const double error = fabs(found - sums[d] / total), rounding = size == 4 ? 0 : type == DIFLOAT_BF16 ? 1.0 / 256 : 1.0 / 2048;
                    if (error <= rounding * fabs(sums[d] / total) + 2e-5 * reach[d] / total + 1e-7) continue;
                    printf("attention: result is %.9g instead of %.9g\n", found, sums[d] / total);
                    exit(1);
                }
            }
}
