// Mean and covariance of each position over its clipped window (law of total covariance, exact):
//
//   n = sum n_q;  mu = sum n_q m_q / n
//   S = sum [ S_q + n_q (m_q - mu)(m_q - mu)^T ];  covariance = S / (n - 1)
//
// A thread owns whole positions and holds one packed matrix; the deviations of the means are a rank
// update with window^2 rows. Fewest bytes: each scatter read once per window that holds it (from
// cache for all but the first), the dense matrix written once.
#include <cmath>

#include "../window.h"
#include "rank_update.h"

namespace npad::cpu::NPAD_ISA {

namespace {

// Packed lower triangle -> dense symmetric matrix, scaled.
void unpack_symmetric(const float* packed, const PackedLayout& layout, float scale, float* dense) {
    const int64_t channels = layout.channels;
    for (int64_t p = 0; p < layout.panels; ++p) {
        const float* panel = packed + layout.offset(p);
        const int64_t row0 = layout.first_row(p);
        for (int64_t i = row0 < 0 ? -row0 : 0; i < kPanel; ++i) {
            float* row = dense + (row0 + i) * channels;
            for (int64_t j = 0; j <= row0 + i; ++j) {
                row[j] = scale * panel[j * kPanel + i];
                dense[j * channels + row0 + i] = row[j];
            }
        }
    }
}

}  // namespace

void window_covariance(const int64_t* count, const float* mean, const float* scatter,
                       int64_t height, int64_t width, int64_t channels, int64_t window,
                       int64_t start, int64_t stop, float* window_mean, float* covariance,
                       int threads) {
    const PackedLayout layout(channels);
    const int64_t stride = deviation_stride(layout), size = layout.size();

#pragma omp parallel num_threads(threads)
    {
        constexpr int64_t kBlockRows = 32;
        Buffer<float> d(kBlockRows * stride), total(size);
        Buffer<double> weighted(channels);
        std::memset(d.data(), 0, static_cast<size_t>(kBlockRows * stride) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t p = start; p < stop; ++p) {
            const Window w(p, height, width, window);
            float* mu = window_mean + (p - start) * channels;
            int64_t n = 0;
            std::memset(weighted.data(), 0, static_cast<size_t>(channels) * sizeof(double));
            std::memset(total.data(), 0, static_cast<size_t>(size) * sizeof(float));
            for (int64_t row = w.top; row < w.bottom; ++row)
                for (int64_t q = row * width + w.left; q < row * width + w.right; ++q) {
                    n += count[q];
                    const double n_q = static_cast<double>(count[q]);
                    for (int64_t c = 0; c < channels; ++c)
                        weighted[c] += n_q * mean[q * channels + c];
                    const float* scatter_q = scatter + q * size;
                    for (int64_t i = 0; i < size; ++i) total[i] += scatter_q[i];
                }
            for (int64_t c = 0; c < channels; ++c)
                mu[c] = static_cast<float>(weighted[c] / static_cast<double>(n));

            int64_t rows = 0;
            for (int64_t row = w.top; row < w.bottom; ++row)
                for (int64_t q = row * width + w.left; q < row * width + w.right; ++q) {
                    const float scale = std::sqrt(static_cast<float>(count[q]));
                    float* d_q = d.data() + rows * stride + layout.pad;
                    for (int64_t c = 0; c < channels; ++c)
                        d_q[c] = scale * (mean[q * channels + c] - mu[c]);
                    const bool last = row == w.bottom - 1 && q == row * width + w.right - 1;
                    if (++rows == kBlockRows || last) {
                        rank_update(d.data(), rows, stride, layout, total.data());
                        rows = 0;
                    }
                }
            unpack_symmetric(total.data(), layout, 1.0f / static_cast<float>(n - 1),
                             covariance + (p - start) * channels * channels);
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
