// A short image of every point that bounds distances from below, for kernels that rule points out.
//
// With orthonormal axes q_1 .. q_m (the leading principal axes of a sample), y = x - mean and the
// residual r(x) = || y - sum_j (q_j . y) q_j ||:
//
//   || x - c ||^2 >= sum_j (q_j . (x - c))^2 + (r(x) - r(c))^2
//
// A head holds kHead floats: kHalf - 1 coordinates and the residual after them, then as many
// further coordinates and the residual after all. So its first half is a bound, and the whole is a
// tighter one. Rounding of heads is at most `error()` in the distance of any two points.
#pragma once

#include <cmath>

#include "squared_distance.h"

namespace npad::cpu::NPAD_ISA {

inline constexpr int kHead = 64;
inline constexpr int kHalf = kHead / 2;
inline constexpr int kAxes = kHead - 2;

class Head {
  public:
    Head(const float* points, int64_t n, int64_t dim)
        : dim_(dim),
          stride_((dim + kLanes - 1) / kLanes * kLanes),
          mean_(stride_),
          axes_(kAxes * stride_) {
        const int64_t count = n < kSample ? n : kSample;
        Buffer<float> sample(count * stride_);
        std::memset(sample.data(), 0, static_cast<size_t>(count * stride_) * sizeof(float));
        std::memset(mean_.data(), 0, static_cast<size_t>(stride_) * sizeof(float));
        // One row of each stretch: equal steps could keep to one column of a grid.
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = i * n / count, end = (i + 1) * n / count;
            const auto place = static_cast<int64_t>(random() % static_cast<uint64_t>(end - begin));
            std::memcpy(sample.data() + i * stride_, points + (begin + place) * dim,
                        static_cast<size_t>(dim) * sizeof(float));
        }
        for (int64_t d = 0; d < dim; ++d) {
            double total = 0;
            for (int64_t i = 0; i < count; ++i) total += sample[i * stride_ + d];
            mean_[d] = static_cast<float>(total / static_cast<double>(count));
            for (int64_t i = 0; i < count; ++i) sample[i * stride_ + d] -= mean_[d];
        }
        find_axes(sample, count);
    }

    // Heads of `count` (at most kRows) points; `scratch` holds kRows * stride() floats. Returns the
    // largest squared distance to the mean.
    static constexpr int kRows = 4;
    int64_t stride() const { return stride_; }
    float compute(const float* points, int count, float* head, float* scratch);

    // Every coordinate is a sum of `dim` products; axes, residuals and both points add their part.
    float error(float largest_distance_to_mean) const {
        return 24 * (static_cast<float>(stride_ / kLanes) + 32) * 0x1p-24f *
               largest_distance_to_mean;
    }

  private:
    static constexpr int64_t kSample =
        2048;  // rows: enough for directions that only have to be good
    static constexpr int kIterations = 5;

    void find_axes(Buffer<float>& sample, int64_t count);
    void orthonormalize(Buffer<double>& z);
    float coordinate(const float* y, const float* axis) const {
        Vec total{};
        for (int64_t d = 0; d < stride_; d += kLanes) total += load(y + d) * load(axis + d);
        return tree_sum(total);
    }

    // Marsaglia's xorshift, the same sequence on every call.
    uint64_t random() {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return state_;
    }

    int64_t dim_, stride_;
    Buffer<float> mean_, axes_;
    uint64_t state_ = 88172645463325252u;
};

// Subspace iteration on the covariance of the sample, from fixed pseudo-random directions.
inline void Head::find_axes(Buffer<float>& sample, int64_t count) {
    Buffer<double> z(kAxes * stride_);
    for (int64_t i = 0; i < kAxes * stride_; ++i)
        z[i] = i % stride_ < dim_ ? static_cast<double>(random() >> 11) * 0x1p-52 - 1 : 0;
    orthonormalize(z);
    for (int iteration = 0; iteration < kIterations; ++iteration) {
        std::memset(z.data(), 0, static_cast<size_t>(kAxes * stride_) * sizeof(double));
        constexpr int64_t kTile = 32;  // sample rows summed in float32 before they join the double
        Buffer<float> y(kTile);
        for (int64_t i0 = 0; i0 < count; i0 += kTile) {
            const int64_t rows = count - i0 < kTile ? count - i0 : kTile;
            for (int64_t j = 0; j < kAxes; ++j) {
                const float* axis = axes_.data() + j * stride_;
                for (int64_t i = 0; i < rows; ++i)
                    y[i] = coordinate(sample.data() + (i0 + i) * stride_, axis);
                for (int64_t d = 0; d < stride_; d += kLanes) {
                    Vec total{};
                    for (int64_t i = 0; i < rows; ++i)
                        total += y[i] * load(sample.data() + (i0 + i) * stride_ + d);
                    for (int l = 0; l < kLanes; ++l) z[j * stride_ + d + l] += total[l];
                }
            }
        }
        orthonormalize(z);
    }
}

// Gram-Schmidt, twice; a direction that the others already span becomes zero, which stays a bound.
inline void Head::orthonormalize(Buffer<double>& z) {
    const auto dot = [this](const double* a, const double* b) {
        double total = 0;
        for (int64_t d = 0; d < dim_; ++d) total += a[d] * b[d];
        return total;
    };
    for (int64_t j = 0; j < kAxes; ++j) {
        double* a = z.data() + j * stride_;
        const double before = dot(a, a);
        for (int pass = 0; pass < 2; ++pass)
            for (int64_t i = 0; i < j; ++i) {
                const double* b = z.data() + i * stride_;
                const double along = dot(a, b);
                for (int64_t d = 0; d < dim_; ++d) a[d] -= along * b[d];
            }
        const double after = dot(a, a);
        const double scale = after > 1e-10 * before ? 1 / std::sqrt(after) : 0;
        for (int64_t d = 0; d < stride_; ++d) {
            a[d] *= scale;
            axes_[j * stride_ + d] = static_cast<float>(a[d]);
        }
    }
}

inline float Head::compute(const float* points, int count, float* head, float* scratch) {
    for (int r = 0; r < kRows; ++r) {
        const float* x = points + (r < count ? r : count - 1) * dim_;
        float* y = scratch + r * stride_;
        for (int64_t d = 0; d < dim_; ++d) y[d] = x[d] - mean_[d];
        for (int64_t d = dim_; d < stride_; ++d) y[d] = 0;
    }
    float largest = 0;
    float squared[kRows] = {};
    for (int half = 0; half < 2; ++half) {
        constexpr int kCoordinates = kHalf - 1;
        const float* axes = axes_.data() + half * kCoordinates * stride_;
        float h[kRows][kCoordinates];
        for (int j = 0; j < kCoordinates; ++j) {
            const float* axis = axes + j * stride_;
            Vec total[kRows] = {};
            for (int64_t d = 0; d < stride_; d += kLanes)
                for (int r = 0; r < kRows; ++r)
                    total[r] += load(scratch + r * stride_ + d) * load(axis + d);
            for (int r = 0; r < kRows; ++r) h[r][j] = tree_sum(total[r]);
        }
        Vec rest[kRows] = {};
        for (int64_t d = 0; d < stride_; d += kLanes) {
            Vec y[kRows];
            for (int r = 0; r < kRows; ++r) y[r] = load(scratch + r * stride_ + d);
            for (int j = 0; j < kCoordinates; ++j) {
                const Vec axis = load(axes + j * stride_ + d);
                for (int r = 0; r < kRows; ++r) y[r] -= h[r][j] * axis;
            }
            for (int r = 0; r < kRows; ++r) {
                rest[r] += y[r] * y[r];
                store(scratch + r * stride_ + d, y[r]);
            }
        }
        for (int r = 0; r < count; ++r) {
            float* out = head + r * kHead + half * kHalf;
            for (int j = 0; j < kCoordinates; ++j) {
                out[j] = h[r][j];
                squared[r] += h[r][j] * h[r][j];
            }
            const float residual = tree_sum(rest[r]);
            out[kCoordinates] = std::sqrt(residual);
            if (half == 1 && squared[r] + residual > largest) largest = squared[r] + residual;
        }
    }
    return largest;
}

}  // namespace npad::cpu::NPAD_ISA
