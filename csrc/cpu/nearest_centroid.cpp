// Distance of every x (n, channels) to the nearest of the centroids (k, channels), and its index.
//
//   || x - c ||^2 / 2 = || x ||^2 / 2 + s,   s = || c ||^2 / 2 - x . c   (x, c less the centroids'
//   mean)
//
// A matrix product in registers gives s for kWide centroids and kTile embeddings at a time, and
// only the least s of the kWide is kept. Rounding can swap two centroids in s, so the groups whose
// least s lies within the error bound of the best, nearly always one or two, are measured by
// differences. The result is that of the plain loop over differences, of equals the lowest index,
// at the speed of the product. A thread owns whole embeddings: the result does not depend on the
// number of threads. Flops: 2 n k channels. NaN in x: distance NaN, index 0.
#include <cmath>

#include "squared_distance.h"

#include <omp.h>

namespace npad::cpu::NPAD_ISA {

namespace {

// Registers: kWide x 2 sums, two of embeddings, one broadcast. A compiler that has to split a
// vector into two registers spills them all, so this product uses a vector of exactly one.
#if defined(__AVX512F__)
constexpr int64_t kWide = 14, kRegister = 16;
#elif defined(__AVX2__)
constexpr int64_t kWide = 6, kRegister = 8;
#else
constexpr int64_t kWide = 6, kRegister = 4;
#endif
typedef float Register __attribute__((vector_size(kRegister * sizeof(float))));
constexpr int64_t kTile = 2 * kRegister;  // embeddings side by side
constexpr int64_t kRows = 256;  // at most: embeddings that meet a panel of centroids in turn
constexpr int64_t kTileBytes = 400 << 10;  // of them, so that they stay in the second-level cache
constexpr double kSmall = 1 << 20;  // products below which waking threads costs more than it gives
constexpr int64_t kMeanRows = 256;  // centroids whose mean is the origin
constexpr int64_t kPackedBytes = 12 << 20;  // centroids packed at a time, shared by all threads

// Rows of x (count, channels) less mean -> panel (channels, kWidth) and the squared norms. The last
// row is repeated where count < kWidth. A vector's width of channels at a time, transposed in
// registers.
template <int64_t kWidth>
void pack(const float* x, int64_t count, int64_t channels, const float* mean, float* panel,
          float* squares) {
    for (int64_t i0 = 0; i0 < kWidth; i0 += kLanes) {
        constexpr int64_t kLast = kWidth % kLanes == 0 ? kLanes : kWidth % kLanes;
        const bool whole = i0 + kLanes <= kWidth;
        Vec sums = {};
        for (int64_t c0 = 0; c0 < channels; c0 += kLanes) {
            const int64_t n = channels - c0 < kLanes ? channels - c0 : kLanes;
            Vec rows[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t row = i0 + i < count ? i0 + i : count - 1;
                rows[i] = load_first(x + row * channels + c0, n) - load_first(mean + c0, n);
            }
            transpose(rows);
            for (int64_t c = 0; c < n; ++c) {
                sums += rows[c] * rows[c];
                float* out = panel + (c0 + c) * kWidth + i0;
                std::memcpy(out, &rows[c], (whole ? kLanes : kLast) * sizeof(float));
            }
        }
        std::memcpy(squares + i0, &sums, (whole ? kLanes : kLast) * sizeof(float));
    }
}

// least[j] = min over the panel's centroids of half_norm - x_j . c
void least_of_panel(const float* centroids, const float* half_norm, const float* x,
                    int64_t channels, float* least) {
    const auto load_register = [](const float* p) {
        Register r;
        std::memcpy(&r, p, sizeof r);
        return r;
    };
    Register product[kWide][2] = {};
    for (int64_t c = 0; c < channels; ++c) {
        const Register x0 = load_register(x + c * kTile),
                       x1 = load_register(x + c * kTile + kRegister);
#pragma GCC unroll 14
        for (int64_t i = 0; i < kWide; ++i) {
            const float centroid = centroids[c * kWide + i];
            product[i][0] += centroid * x0;
            product[i][1] += centroid * x1;
        }
    }
    Register least0 = INFINITY - Register{}, least1 = least0;
#pragma GCC unroll 14
    for (int64_t i = 0; i < kWide; ++i) {
        const Register s0 = half_norm[i] - product[i][0], s1 = half_norm[i] - product[i][1];
        least0 = s0 < least0 ? s0 : least0;
        least1 = s1 < least1 ? s1 : least1;
    }
    std::memcpy(least, &least0, sizeof least0);
    std::memcpy(least + kRegister, &least1, sizeof least1);
}

// Centroids packed for the product, a block of panels at a time.
class Packed {
  public:
    Packed(const float* centroids, int64_t k, int64_t channels)
        : centroids_(centroids),
          k_(k),
          channels_(channels),
          panels_(limit_panels(k, channels)),
          mean_(channels),
          data_(panels_ * kWide * channels),
          half_norm_(panels_ * kWide) {
        for (int64_t c = 0; c < channels; ++c) mean_[c] = 0;
        const int64_t sample = k < kMeanRows ? k : kMeanRows;
        for (int64_t i = 0; i < sample; ++i)
            for (int64_t c = 0; c < channels; ++c)
                mean_[c] += centroids[i * k / sample * channels + c] / static_cast<float>(sample);
    }

    void load_block(int64_t first, int threads);

    // How far s of any of these centroids can be from its exact value, for x of this norm, in units
    // of half a squared distance; the measured distance adds its own part.
    float error(float norm, float least) const {
        const float rounding = (static_cast<float>(channels_) + 16) * 0x1p-24f;
        const float half_distance = std::fmax(norm * norm / 2 + least, 0.0f);
        return rounding * (norm * largest_norm_ + largest_norm_ * largest_norm_ + half_distance);
    }

    const float* mean() { return mean_.data(); }
    const float* panel(int64_t p) { return data_.data() + p * kWide * channels_; }
    const float* half_norm(int64_t p) { return half_norm_.data() + p * kWide; }
    int64_t panels() const { return panels_; }
    int64_t panels_at(int64_t first) const {
        const int64_t left = (k_ - first + kWide - 1) / kWide;
        return left < panels_ ? left : panels_;
    }

  private:
    static int64_t limit_panels(int64_t k, int64_t channels) {
        const int64_t all = (k + kWide - 1) / kWide;
        const int64_t fit =
            kPackedBytes / (kWide * channels * static_cast<int64_t>(sizeof(float))) + 1;
        return all < fit ? all : fit;
    }

    const float* centroids_;
    int64_t k_, channels_, panels_;
    Buffer<float> mean_, data_, half_norm_;
    float largest_norm_ = 0;
};

void Packed::load_block(int64_t first, int threads) {
    const int64_t panels = panels_at(first);
    float largest = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : largest)
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t start = first + p * kWide, count = k_ - start < kWide ? k_ - start : kWide;
        float* panel = data_.data() + p * kWide * channels_;
        float squares[kWide];
        pack<kWide>(centroids_ + start * channels_, count, channels_, mean_.data(), panel, squares);
        for (int64_t i = 0; i < kWide; ++i) {
            half_norm_[p * kWide + i] = i < count ? squares[i] / 2 : INFINITY;
            if (squares[i] > largest) largest = squares[i];
        }
    }
    largest_norm_ = std::sqrt(largest);
}

struct Nearest {
    float squared;
    int64_t index;
};

// Measures the centroids first .. stop - 1 in order.
void measure(const float* x, const float* centroids, int64_t first, int64_t stop, int64_t channels,
             Nearest& nearest) {
    for (int64_t i = first; i < stop; ++i) {
        const float d = squared_distance(x, centroids + i * channels, channels, nearest.squared);
        if (d < nearest.squared) nearest = {d, i};
    }
}

}  // namespace

void nearest_centroid(const float* x, int64_t n, const float* centroids, int64_t k,
                      int64_t channels, float* distance, int64_t* index, int threads) {
    if (static_cast<double>(n) * k * channels < kSmall) threads = 1;
    Packed packed(centroids, k, channels);
    const int64_t scratch_size = kRows * channels + packed.panels() * kRows;
    Buffer<float> scratch(threads * scratch_size);
    const int64_t share = n / (4 * threads);  // four turns for each thread
    const int64_t fit = kTileBytes / (channels * static_cast<int64_t>(sizeof(float)));
    int64_t rows = share < fit ? share : fit;
    rows = rows < kTile ? kTile : rows > kRows ? kRows : rows / kTile * kTile;

    for (int64_t first = 0; first < k; first += packed.panels() * kWide) {
        packed.load_block(first, threads);
        const int64_t panels = packed.panels_at(first);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int64_t start = 0; start < n; start += rows) {
            const int64_t count = n - start < rows ? n - start : rows;
            float* tiles = scratch.data() + omp_get_thread_num() * scratch_size;
            float* least = tiles + kRows * channels;  // (panels, kRows)
            float squares[kRows], best[kRows];
            for (int64_t t = 0; t < count; t += kTile)
                pack<kTile>(x + (start + t) * channels, count - t < kTile ? count - t : kTile,
                            channels, packed.mean(), tiles + t * channels, squares + t);
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t t = 0; t < count; t += kTile)
                    least_of_panel(packed.panel(p), packed.half_norm(p), tiles + t * channels,
                                   channels, least + p * kRows + t);

            for (int64_t i = 0; i < kRows; ++i) best[i] = INFINITY;
            for (int64_t p = 0; p < panels; ++p)
                for (int64_t i = 0; i < count; ++i) {
                    const float s = least[p * kRows + i];
                    best[i] = s < best[i] ? s : best[i];
                }

            for (int64_t i = 0; i < count; ++i) {
                const float* row = x + (start + i) * channels;
                // Not a number after NaN or overflow: then every group is measured.
                const float limit = best[i] + 2 * packed.error(std::sqrt(squares[i]), best[i]);

                Nearest nearest;
                if (first == 0)
                    nearest = {squared_distance(row, centroids, channels, INFINITY), 0};
                else
                    nearest = {distance[start + i], index[start + i]};
                for (int64_t p = 0; p < panels; ++p) {
                    if (least[p * kRows + i] > limit) continue;
                    const int64_t begin = first + p * kWide;
                    measure(row, centroids, begin, k - begin < kWide ? k : begin + kWide, channels,
                            nearest);
                }
                distance[start + i] = nearest.squared;
                index[start + i] = nearest.index;
            }
        }
    }
    for (int64_t i = 0; i < n; ++i) distance[i] = std::sqrt(distance[i]);
}

}  // namespace npad::cpu::NPAD_ISA
