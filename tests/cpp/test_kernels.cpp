// Every CPU kernel of every instruction set at odd sizes, on heap arrays of the exact size, against
// plain loops in double. Meant to run under AddressSanitizer and UndefinedBehaviorSanitizer, where
// one element read or written too far ends the program.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels.h"
#include "packed.h"
#include "window.h"

namespace {

using npad::DataType;
using npad::PackedLayout;
using npad::cpu::Isa;
using Floats = std::vector<float>;

std::mt19937 g_random(0);
int g_checks = 0;

Floats normal(int64_t n, float offset = 0.0f) {
    std::normal_distribution<float> draw(offset, 1.0f);
    Floats values(static_cast<size_t>(n));
    for (float& v : values) v = draw(g_random);
    return values;
}

void check(double actual, double expected, double tolerance, const char* isa, const char* what) {
    ++g_checks;
    if (std::abs(actual - expected) <= tolerance * (1 + std::abs(expected))) return;
    std::fprintf(stderr, "%s %s: got %.9g, expected %.9g\n", isa, what, actual, expected);
    std::exit(1);
}

int64_t slot(const PackedLayout& layout, int64_t row, int64_t column) {
    const int64_t panel = (row + layout.pad) / npad::kPanel;
    return layout.offset(panel) + column * npad::kPanel + (row - layout.first_row(panel));
}

// A level of `channels` and one of half of them, of other sizes, one element apart or side by side.
void test_embed(const Isa& isa, int64_t batch, int64_t height, int64_t width, int64_t channels,
                bool channels_last, int threads) {
    struct Size {
        int64_t channels, height, width;
    };
    const Size sizes[] = {{channels, height, width}, {channels / 2 + 1, height / 2 + 1, 2 * width}};
    Floats data[2];
    std::vector<npad::Level> levels;
    for (int l = 0; l < 2; ++l) {
        const auto [c, h, w] = sizes[l];
        data[l] = normal(batch * c * h * w);
        if (channels_last)
            levels.push_back({data[l].data(), c, h, w, h * w * c, 1, w * c, c});
        else
            levels.push_back({data[l].data(), c, h, w, c * h * w, h * w, w, 1});
    }
    const int64_t all = sizes[0].channels + sizes[1].channels;
    Floats embedding(static_cast<size_t>(batch * height * width * all));
    isa.kernels.embed(levels.data(), 2, DataType::kFloat32, batch, height, width, embedding.data(),
                      threads);

    // Bilinear weight of pixel r for a cell, and the average over the patch around a pixel.
    const auto share = [](int64_t cell, int64_t cells, int64_t r, int64_t size) {
        const double centre = (static_cast<double>(cell) + 0.5) * static_cast<double>(size) /
                                  static_cast<double>(cells) -
                              0.5;
        const double at = std::clamp(centre, 0.0, static_cast<double>(size - 1));
        return std::max(0.0, 1 - std::abs(at - static_cast<double>(r)));
    };
    const auto patch = [](const npad::Level& level, int64_t n, int64_t c, int64_t y, int64_t x) {
        const auto* values = static_cast<const float*>(level.data);
        double total = 0;
        for (int64_t r = std::max<int64_t>(y - 1, 0); r <= std::min(y + 1, level.height - 1); ++r)
            for (int64_t k = std::max<int64_t>(x - 1, 0); k <= std::min(x + 1, level.width - 1);
                 ++k)
                total += values[n * level.stride_n + c * level.stride_c + r * level.stride_h +
                                k * level.stride_w];
        return total / 9;
    };
    for (int64_t i = 0; i < batch * height * width; ++i) {
        const int64_t n = i / (height * width), y = i / width % height, x = i % width;
        int64_t offset = 0;
        for (const npad::Level& level : levels) {
            for (int64_t c = 0; c < level.channels; ++c) {
                double expected = 0;
                for (int64_t r = 0; r < level.height; ++r)
                    for (int64_t k = 0; k < level.width; ++k) {
                        const double w =
                            share(y, height, r, level.height) * share(x, width, k, level.width);
                        if (w > 0) expected += w * patch(level, n, c, r, k);
                    }
                check(embedding[i * all + offset + c], expected, 1e-5, isa.name, "embedding");
            }
            offset += level.channels;
        }
    }
}

void test_moments_and_covariance(const Isa& isa, int64_t batch, int64_t height, int64_t width,
                                 int64_t channels, int64_t window, int threads) {
    const PackedLayout layout(channels);
    const int64_t positions = height * width;
    const Floats x = normal(batch * positions * channels, 2.0f);
    std::vector<int64_t> count(static_cast<size_t>(positions));
    Floats mean(static_cast<size_t>(positions * channels));
    Floats scatter(static_cast<size_t>(positions * layout.size()));
    const int64_t half = batch / 2;
    for (const auto& [first, rows] : {std::pair{int64_t{0}, half}, std::pair{half, batch - half}})
        if (rows > 0)
            isa.kernels.neighborhood_moments(x.data() + first * positions * channels, rows,
                                             positions, channels, count.data(), mean.data(),
                                             scatter.data(), threads);

    Floats window_mean(static_cast<size_t>(positions * channels));
    Floats covariance(static_cast<size_t>(positions * channels * channels));
    isa.kernels.window_covariance(count.data(), mean.data(), scatter.data(), height, width,
                                  channels, window, 0, positions, window_mean.data(),
                                  covariance.data(), threads);

    for (int64_t p = 0; p < positions; ++p) {
        const npad::Window w(p, height, width, window);
        const double n = static_cast<double>(batch * w.size());
        std::vector<double> mu(static_cast<size_t>(channels));
        std::vector<double> s(static_cast<size_t>(channels * channels));
        const auto each = [&](auto visit) {
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t row = w.top; row < w.bottom; ++row)
                    for (int64_t col = w.left; col < w.right; ++col)
                        visit(x.data() + (b * positions + row * width + col) * channels);
        };
        each([&](const float* v) {
            for (int64_t c = 0; c < channels; ++c) mu[c] += v[c] / n;
        });
        each([&](const float* v) {
            for (int64_t i = 0; i < channels; ++i)
                for (int64_t j = 0; j < channels; ++j)
                    s[i * channels + j] += (v[i] - mu[i]) * (v[j] - mu[j]) / (n - 1);
        });
        for (int64_t i = 0; i < channels; ++i) {
            check(window_mean[p * channels + i], mu[i], 1e-4, isa.name, "window mean");
            for (int64_t j = 0; j < channels; ++j)
                check(covariance[(p * channels + i) * channels + j], s[i * channels + j], 1e-4,
                      isa.name, "window covariance");
        }
    }
}

// Calls f(slot, byte, scale) with the places of every element of packed matrices in one of bytes.
template <class F>
void each_byte(const PackedLayout& layout, int64_t positions, F f) {
    for (int64_t q = 0; q < positions; ++q)
        for (int64_t p = 0; p < layout.panels; ++p)
            for (int64_t k = 0; k < layout.columns(p) * npad::kPanel; ++k) {
                const int64_t block = (k / npad::kPanel + layout.pad) / npad::kBlockColumns;
                const int64_t scale = layout.size() + 4 * (layout.first_scale(p) + block);
                const int64_t at = layout.offset(p) + k, matrix = q * layout.byte_size();
                f(q * layout.size() + at, matrix + at, matrix + scale);
            }
}

std::vector<int8_t> to_bytes(const Floats& packed, const PackedLayout& layout, int64_t positions) {
    std::vector<int8_t> bytes(static_cast<size_t>(positions * layout.byte_size()));
    each_byte(layout, positions, [&](int64_t slot, int64_t, int64_t scale) {
        float largest;
        std::memcpy(&largest, &bytes[scale], sizeof largest);
        largest = std::max(largest, std::abs(packed[slot]) / 127);
        std::memcpy(&bytes[scale], &largest, sizeof largest);
    });
    each_byte(layout, positions, [&](int64_t slot, int64_t byte, int64_t at) {
        float scale;
        std::memcpy(&scale, &bytes[at], sizeof scale);
        bytes[byte] = static_cast<int8_t>(scale > 0 ? std::lround(packed[slot] / scale) : 0);
    });
    return bytes;
}

Floats from_bytes(const std::vector<int8_t>& bytes, const PackedLayout& layout, int64_t positions) {
    Floats packed(static_cast<size_t>(positions * layout.size()));
    each_byte(layout, positions, [&](int64_t slot, int64_t byte, int64_t at) {
        float scale;
        std::memcpy(&scale, &bytes[at], sizeof scale);
        packed[slot] = bytes[byte] * scale;
    });
    return packed;
}

void test_mahalanobis(const Isa& isa, int64_t batch, int64_t height, int64_t width,
                      int64_t channels, int64_t window, int threads) {
    const PackedLayout layout(channels);
    const int64_t positions = height * width;
    const Floats x = normal(batch * positions * channels), mean = normal(positions * channels);
    const Floats dense = normal(positions * channels * channels);
    Floats packed(static_cast<size_t>(positions * layout.size()), 1e9f);
    isa.kernels.pack_factor(dense.data(), positions, channels, packed.data(), threads);
    for (int64_t row = 0; row < channels; ++row)
        check(packed[slot(layout, row, row)], dense[row * channels + row], 0, isa.name, "pack");

    // bfloat16 by truncation, so that the float32 oracle can use the same values.
    std::vector<uint16_t> bits(packed.size());
    Floats rounded(packed.size());
    for (size_t i = 0; i < packed.size(); ++i) {
        const uint32_t word = std::bit_cast<uint32_t>(packed[i]);
        bits[i] = static_cast<uint16_t>(word >> 16);
        rounded[i] = std::bit_cast<float>(word & 0xffff0000u);
    }

    const std::vector<int8_t> bytes = to_bytes(packed, layout, positions);
    const Floats widened = from_bytes(bytes, layout, positions);

    const int64_t prefix = channels / 2;                       // none of one channel
    const int64_t first = prefix > 0 ? batch * positions : 0;  // of the distances in all channels
    Floats distance(static_cast<size_t>(first + batch * positions));
    struct Stored {
        const void* factor;
        DataType type;
        const Floats& values;
    };
    for (const auto& [factor, type, w_all] : {Stored{packed.data(), DataType::kFloat32, packed},
                                              Stored{bits.data(), DataType::kBFloat16, rounded},
                                              Stored{bytes.data(), DataType::kInt8, widened}}) {
        isa.kernels.mahalanobis(x.data(), batch, height, width, channels, mean.data(), factor, type,
                                window, prefix, distance.data(), threads);
        for (int64_t n = 0; n < batch; ++n)
            for (int64_t p = 0; p < positions; ++p) {
                const npad::Window w(p, height, width, window);
                double nearest = std::numeric_limits<double>::infinity(), within = nearest;
                for (int64_t row = w.top; row < w.bottom; ++row)
                    for (int64_t col = w.left; col < w.right; ++col) {
                        const int64_t q = row * width + col;
                        double total = 0;
                        for (int64_t i = 0; i < channels; ++i) {
                            double y = 0;
                            for (int64_t j = 0; j <= i; ++j)
                                y += double{w_all[q * layout.size() + slot(layout, i, j)]} *
                                     (x[(n * positions + p) * channels + j] -
                                      mean[q * channels + j]);
                            total += y * y;
                            if (i + 1 == prefix) within = std::min(within, std::sqrt(total));
                        }
                        nearest = std::min(nearest, std::sqrt(total));
                    }
                const int64_t at = n * positions + p;
                check(distance[first + at], nearest, 1e-4, isa.name, "mahalanobis");
                if (prefix > 0)
                    check(distance[at], within, 1e-4, isa.name, "mahalanobis of a prefix");
            }
    }
}

void test_inverse_cholesky(const Isa& isa, int64_t count, int64_t channels, int threads) {
    const PackedLayout layout(channels);
    const auto c = static_cast<size_t>(channels);
    Floats covariance(static_cast<size_t>(count) * c * c);
    for (int64_t m = 0; m < count; ++m) {
        const Floats x = normal((channels + 4) * channels);
        float* a = covariance.data() + m * channels * channels;
        for (int64_t i = 0; i < channels; ++i)
            for (int64_t j = 0; j < channels; ++j) {
                a[i * channels + j] = i == j ? 0.5f : 0.0f;
                for (int64_t n = 0; n < channels + 4; ++n)
                    a[i * channels + j] += x[n * channels + i] * x[n * channels + j] / 9;
            }
    }
    covariance.back() = -1;  // the last matrix fails at its last minor
    Floats packed(static_cast<size_t>(count * layout.size()));
    std::vector<int32_t> info(static_cast<size_t>(count), -1);
    isa.kernels.inverse_cholesky(covariance.data(), count, channels, packed.data(), info.data(),
                                 threads);
    check(info.back(), static_cast<double>(channels), 0, isa.name, "failing minor");
    check(std::isnan(packed.back()), 1, 0, isa.name, "NaN where it failed");
    for (int64_t m = 0; m + 1 < count; ++m) {
        check(info[m], 0, 0, isa.name, "info");
        const float* a = covariance.data() + m * channels * channels;
        const auto w = [&](int64_t i, int64_t j) {
            return double{packed[m * layout.size() + slot(layout, i, j)]};
        };
        for (int64_t i = 0; i < channels; ++i)  // W A W^T = I
            for (int64_t j = 0; j <= i; ++j) {
                double total = 0;
                for (int64_t k = 0; k <= i; ++k)
                    for (int64_t l = 0; l <= j; ++l)
                        total += w(i, k) * a[k * channels + l] * w(j, l);
                check(total, i == j, 1e-3, isa.name, "inverse Cholesky");
            }
    }
}

double distance(const float* a, const float* b, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    return std::sqrt(total);
}

Floats coordinate_axes(int64_t n_axes, int64_t channels) {
    Floats axes(static_cast<size_t>(n_axes * channels));
    for (int64_t j = 0; j < channels && j < n_axes; ++j) axes[j * channels + j] = 1;
    return axes;
}

void test_nearest_centroid(const Isa& isa, int64_t n, int64_t k, int64_t channels, int threads) {
    const Floats x = normal(n * channels), centroids = normal(k * channels);
    Floats nearest(static_cast<size_t>(n));
    std::vector<int64_t> index(static_cast<size_t>(n));
    isa.kernels.nearest_centroid(x.data(), n, centroids.data(), k, channels, nullptr,
                                 nearest.data(), index.data(), threads);
    for (int64_t i = 0; i < n; ++i) {
        double least = std::numeric_limits<double>::infinity();
        for (int64_t j = 0; j < k; ++j)
            least = std::min(least, distance(&x[i * channels], &centroids[j * channels], channels));
        check(nearest[i], least, 1e-4, isa.name, "nearest distance");
        check(distance(&x[i * channels], &centroids[index[i] * channels], channels), least, 1e-4,
              isa.name, "nearest index");
    }

    const int64_t n_axes = npad::cpu::centroid_index_axes(channels);
    const Floats mean(static_cast<size_t>(channels));
    const Floats axes = coordinate_axes(n_axes, channels);
    Floats by_index(static_cast<size_t>(n));
    std::vector<int64_t> again(static_cast<size_t>(n));
    Floats sketches(
        static_cast<size_t>(16 + (k + 15) / 16 * (48 + 4 * n_axes) + (1 + n_axes) * channels));
    isa.kernels.centroid_index(centroids.data(), k, channels, mean.data(), axes.data(),
                               sketches.data(), threads);
    isa.kernels.nearest_centroid(x.data(), n, centroids.data(), k, channels, sketches.data(),
                                 by_index.data(), again.data(), threads);
    for (int64_t i = 0; i < n; ++i) {
        check(by_index[i], nearest[i], 0, isa.name, "nearest distance by index");
        check(static_cast<double>(again[i]), static_cast<double>(index[i]), 0, isa.name,
              "nearest by index");
    }
}

void test_farthest_first(const Isa& isa, int64_t n, int64_t dim, int64_t k, int threads) {
    Floats points = normal(n * dim);
    for (float& v : points) v = std::round(4 * v);  // exact distances, many ties and duplicates
    const Floats axes = coordinate_axes(npad::cpu::farthest_first_axes(), dim);
    std::vector<int64_t> index(static_cast<size_t>(k));
    Floats radius(static_cast<size_t>(k));
    const npad::Progress progress{[](void*, int64_t, int64_t) { return true; }, nullptr};
    if (!isa.kernels.farthest_first(points.data(), n, dim, k, n / 2, points.data(), axes.data(),
                                    index.data(), radius.data(), progress, threads))
        check(1, 0, 0, isa.name, "farthest_first stopped");
    std::vector<int64_t> again(static_cast<size_t>(k));
    Floats radius_again(static_cast<size_t>(k));
    isa.kernels.farthest_first(points.data(), n, dim, k, n / 2, nullptr, nullptr, again.data(),
                               radius_again.data(), progress, threads);
    check(again == index && radius_again == radius, 1, 0, isa.name, "farthest_first without axes");
    std::vector<double> near(static_cast<size_t>(n), std::numeric_limits<double>::infinity());
    std::vector<bool> chosen(static_cast<size_t>(n));
    int64_t next = n / 2;
    for (int64_t c = 0; c < k; ++c) {
        check(static_cast<double>(index[c]), static_cast<double>(next), 0, isa.name, "centre");
        chosen[next] = true;
        for (int64_t i = 0; i < n; ++i)
            near[i] = std::min(near[i], distance(&points[i * dim], &points[next * dim], dim));
        check(radius[c], *std::max_element(near.begin(), near.end()), 1e-6, isa.name, "radius");
        next = -1;
        for (int64_t i = 0; i < n; ++i)
            if (!chosen[i] && (next < 0 || near[i] > near[next])) next = i;
    }
}

void test_anomaly_map(const Isa& isa, int64_t n, int64_t h, int64_t w, int64_t height,
                      int64_t width, int threads) {
    // Taps of any kind do, as long as they lie inside.
    const auto band = [](int64_t size, int64_t outputs, std::vector<int32_t>& first, Floats& taps) {
        const int64_t k = std::min<int64_t>(size, 3);
        taps.assign(static_cast<size_t>(outputs * k), 1.0f / static_cast<float>(k));
        for (int64_t i = 0; i < outputs; ++i)
            first.push_back(static_cast<int32_t>(i * (size - k) / outputs));
        return k;
    };
    Floats m = normal(n * h * w), e = normal(n * h * w), row_taps, column_taps;
    for (float& v : m) v = std::abs(v);
    for (float& v : e) v = std::abs(v);
    m.back() = 0;  // beside the series for the logarithm
    std::vector<int32_t> row_first, column_first;
    const int64_t rows = band(h, height, row_first, row_taps);
    const int64_t columns = band(w, width, column_first, column_taps);
    for (const bool product : {true, false}) {
        Floats maps(static_cast<size_t>(n * height * width)), scores(static_cast<size_t>(n));
        isa.kernels.anomaly_map(m.data(), e.data(), product, 0.4, 0.6, 0.5, n, h, w,
                                row_first.data(), row_taps.data(), rows, column_first.data(),
                                column_taps.data(), columns, height, width, maps.data(),
                                scores.data(), threads);
        for (int64_t i = 0; i < n; ++i) {
            double most = -std::numeric_limits<double>::infinity();
            for (int64_t y = 0; y < height; ++y)
                for (int64_t x = 0; x < width; ++x) {
                    double total = 0;
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t c = 0; c < columns; ++c) {
                            const int64_t at = (i * h + row_first[y] + r) * w + column_first[x] + c;
                            total += product ? std::pow(m[at], 0.4) * std::pow(e[at], 0.6) + 0.5
                                             : 0.4 * m[at] + 0.6 * e[at] + 0.5;
                        }
                    total /= static_cast<double>(rows * columns);
                    most = std::max(most, total);
                    check(maps[(i * height + y) * width + x], total, 1e-5, isa.name, "map");
                }
            check(scores[i], most, 1e-5, isa.name, "score");
        }
    }
}

void test_resize_maps(const Isa& isa, int64_t height, int64_t width, int threads) {
    const std::vector<int64_t> heights{height, 1, 40, 3}, widths{width, 67, 5, 3 * width};
    const Floats maps = normal(4 * height * width);
    int64_t pixels = 0;
    for (size_t i = 0; i < 4; ++i) pixels += heights[i] * widths[i];
    Floats resized(static_cast<size_t>(pixels));
    isa.kernels.resize_maps(maps.data(), 4, height, width, heights.data(), widths.data(),
                            resized.data(), threads);
    const auto at = [](int64_t i, int64_t outputs, int64_t size) {
        const double x = (static_cast<double>(i) + 0.5) * static_cast<double>(size) /
                             static_cast<double>(outputs) -
                         0.5;
        return std::clamp(x, 0.0, static_cast<double>(size - 1));
    };
    size_t next = 0;
    for (int64_t i = 0; i < 4; ++i)
        for (int64_t y = 0; y < heights[i]; ++y)
            for (int64_t x = 0; x < widths[i]; ++x) {
                const double row = at(y, heights[i], height), column = at(x, widths[i], width);
                double total = 0;
                for (int64_t r = 0; r < height; ++r)
                    for (int64_t c = 0; c < width; ++c)
                        total += std::max(0.0, 1 - std::abs(row - static_cast<double>(r))) *
                                 std::max(0.0, 1 - std::abs(column - static_cast<double>(c))) *
                                 maps[(i * height + r) * width + c];
                check(resized[next++], total, 1e-5, isa.name, "resized");
            }
}

}  // namespace

int main() {
    const Isa* isas[npad::cpu::kMaxIsas];
    const int n_isas = npad::cpu::available_isas(isas);
    for (int i = 0; i < n_isas; ++i) {
        const Isa& isa = *isas[i];
        for (const int threads : {1, 2})
            for (const int64_t channels : {1, 7, 8, 17, 33, 41}) {
                for (const bool channels_last : {false, true}) {
                    test_embed(isa, 1, 1, 1, channels, channels_last, threads);
                    test_embed(isa, 2, 9, 17, channels, channels_last, threads);
                }
                test_moments_and_covariance(isa, 5, 3, 2, channels, 3, threads);
                test_moments_and_covariance(isa, 2, 1, 1, channels, 1, threads);
                test_inverse_cholesky(isa, 3, channels, threads);
                test_mahalanobis(isa, 1, 1, 1, channels, 1, threads);
                test_mahalanobis(isa, 3, 3, 4, channels, 3, threads);
                test_mahalanobis(isa, 70, 3, 3, channels, 3, threads);
                test_nearest_centroid(isa, 1, 1, channels, threads);
                test_nearest_centroid(isa, 37, 131, channels, threads);
                test_farthest_first(isa, 1, channels, 1, threads);
                test_farthest_first(isa, 203, channels, 203, threads);
                test_anomaly_map(isa, 3, 5, channels, 19, 2 * channels, threads);
                test_resize_maps(isa, 6, channels, threads);
            }
        test_moments_and_covariance(isa, 203, 2, 2, 9, 9, 2);
        std::printf("%s: ok\n", isa.name);
    }
    std::printf("%d checks\n", g_checks);
    return 0;
}
