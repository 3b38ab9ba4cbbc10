// Update of count n, mean m and scatter S of every position with a batch (Chan, Golub, LeVeque
// 1983):
//
//   delta = mean_b(x) - m
//   S += sum_b (x_b - mean_b(x)) (x_b - mean_b(x))^T + n B / (n + B) delta delta^T
//   m += B / (n + B) delta;  n += B
//
// The correction is one more row, sqrt(n B / (n + B)) delta, of the rank update. A thread owns
// whole positions, so the result does not depend on the number of threads. Fewest bytes: S read and
// written once per batch; flops: C^2 (B + 1) per position. All sums in float32, over the batch in
// order.
#include <cmath>

#include "rank_update.h"

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int64_t kBlockRows = 96;  // rows of deviations held in cache at a time

void copy_scaled_difference(const float* a, const float* b, float scale, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = scale * (a[i] - b[i]);
}

}  // namespace

void neighborhood_moments(const float* x, int64_t batch, int64_t positions, int64_t channels,
                          int64_t* count, float* mean, float* scatter, int threads) {
    const PackedLayout layout(channels);
    const int64_t stride = deviation_stride(layout);
    const int64_t block = batch + 1 < kBlockRows ? batch + 1 : kBlockRows;

#pragma omp parallel num_threads(threads)
    {
        Buffer<float> d(block * stride), batch_mean(channels);
        std::memset(d.data(), 0, static_cast<size_t>(block * stride) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t p = 0; p < positions; ++p) {
            const float* x_p = x + p * channels;
            const int64_t image = positions * channels;
            float* mean_p = mean + p * channels;
            float* scatter_p = scatter + p * layout.size();

            std::memset(batch_mean.data(), 0, static_cast<size_t>(channels) * sizeof(float));
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t c = 0; c < channels; ++c) batch_mean[c] += x_p[b * image + c];
            const float inverse = 1.0f / static_cast<float>(batch);
            for (int64_t c = 0; c < channels; ++c) batch_mean[c] *= inverse;

            const double n = static_cast<double>(count[p]), total = n + static_cast<double>(batch);
            const double correction = std::sqrt(n * static_cast<double>(batch) / total);
            for (int64_t b0 = 0; b0 < batch + 1; b0 += block) {
                const int64_t rows = batch + 1 - b0 < block ? batch + 1 - b0 : block;
                for (int64_t b = b0; b < b0 + rows; ++b) {
                    float* row = d.data() + (b - b0) * stride + layout.pad;
                    if (b < batch)
                        copy_scaled_difference(x_p + b * image, batch_mean.data(), 1.0f, channels,
                                               row);
                    else
                        copy_scaled_difference(batch_mean.data(), mean_p,
                                               static_cast<float>(correction), channels, row);
                }
                rank_update(d.data(), rows, stride, layout, scatter_p);
            }
            const float weight = static_cast<float>(static_cast<double>(batch) / total);
            for (int64_t c = 0; c < channels; ++c)
                mean_p[c] += weight * (batch_mean[c] - mean_p[c]);
            count[p] += batch;
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
