// A short image of every point that bounds distances from below, for kernels that rule points out.
//
// With orthonormal axes q_1 .. q_m (about the leading principal axes), y = x - mean and the
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
static_assert(kAxes == farthest_first_axes());

class Head {
  public:
    // axes (kAxes, dim) and mean (dim) are those of farthest_first, and may be null.
    Head(int64_t dim, const float* mean, const float* axes)
        : dim_(dim),
          stride_((dim + kLanes - 1) / kLanes * kLanes),
          mean_(stride_),
          axes_(kAxes * stride_) {
        copy_rows(mean, 1, mean_);
        copy_rows(axes, kAxes, axes_);
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
    // With zeros up to whole vectors; all zeros where there are no rows.
    void copy_rows(const float* rows, int64_t count, Buffer<float>& out) const {
        std::memset(out.data(), 0, static_cast<size_t>(count * stride_) * sizeof(float));
        for (int64_t i = 0; rows != nullptr && i < count; ++i)
            std::memcpy(out.data() + i * stride_, rows + i * dim_,
                        static_cast<size_t>(dim_) * sizeof(float));
    }

    int64_t dim_, stride_;
    Buffer<float> mean_, axes_;
};

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
