// Rows in bytes along a few axes, which bound their scalar products from above; and the memory of a
// centroid index.
//
// For v = row - mean and orthonormal axes Q (channels, axes), a = Q^T v is rounded to s q with
// whole numbers q, |q| <= 127. With d = a - s q and the tail t = v - Q a,
//
//   x . c = s_x s_c (q_x . q_c) + s_x q_x . d_c + d_x . a_c + t_x . t_c
//        <= s_x s_c (q_x . q_c) + r_x r_c,
//   r^2 = || t ||^2 + kappa max(|| a ||, || s q ||)^2 + || d ||^2 / kappa,
//
// by Cauchy-Schwarz, for any kappa; about || d || / || a || is best. So a product of bytes bounds
// || x - c ||^2 / 2 = || x ||^2 / 2 + || c ||^2 / 2 - x . c from below. Good axes make it tight:
// the directions in which centroids vary most, mixed by a rotation, so that no coordinate of a row
// is far above the others and a step is small.
//
// Rounding, u = 2^-24: a coordinate is a sum of kChunk products and of channels / kChunk such sums,
// and axes are orthonormal but for u, so a errs by b || v ||, b = sqrt(axes) (kChunk + channels /
// kChunk + 2) u. That adds at most 4 b || x || || c || to the product and 2 b || v ||^2 to the
// tail, whose norms err by (channels + 4 axes) u || v ||^2; what is left is below 40 u || x || || c
// ||. slack() || v ||^2 in r^2 covers all of it, again by Cauchy-Schwarz. That rows less the mean
// and their norms are rounded takes at most (channels + 16) u off either || v ||^2.
#pragma once

#include <cmath>

#include "panel_product.h"

namespace npad::cpu::NPAD_ISA {

typedef int32_t IntRegister __attribute__((vector_size(kRegister * sizeof(int32_t))));

inline constexpr int64_t kSketchPanel = 16;  // centroids side by side, whatever the registers
inline constexpr float kKappa = 1.0f / 128;  // || d || / || a || is 0.6 % with 127 steps
inline constexpr float kRegular = 1e30f;     // squared norms below this overflow nothing
inline constexpr float kNoStep = 1e-30f;     // coordinates below this count as zero
inline constexpr int64_t kCentroidSteps = 127;

// Where everything lies in the index of k centroids. Panels first, aligned to cache lines.
struct IndexLayout {
    IndexLayout(int64_t k, int64_t channels)
        : axes(centroid_index_axes(channels)), panels((k + kSketchPanel - 1) / kSketchPanel) {}

    int64_t axes, panels;
    int64_t groups() const { return axes / 4; }  // of four coordinates in one word
    int64_t panel(int64_t p) const {
        return kHeader + p * (3 * kSketchPanel + axes * kSketchPanel / 4);
    }
    int64_t mean() const { return panel(panels); }
    int64_t axis(int64_t channels) const { return mean() + channels; }

    static constexpr int64_t kHeader = 16;  // [0]: 1 where the index can be used
    // Within a panel: half norms, steps and r, (kSketchPanel) each; words (groups, kSketchPanel),
    // in which coordinates have 128 added and are unsigned.
    static constexpr int64_t kStep = kSketchPanel, kResidual = 2 * kSketchPanel,
                             kWords = 3 * kSketchPanel;
};

// Sketches of kTile rows at a time.
class Sketcher {
  public:
    Sketcher(const float* mean, const float* axes, int64_t n_axes, int64_t channels)
        : mean_(mean),
          channels_(channels),
          n_axes_(n_axes),
          panels_((n_axes + kWide - 1) / kWide),
          axes_(panels_ * kWide * channels) {
        Buffer<float> zero(channels);
        for (int64_t c = 0; c < channels; ++c) zero[c] = 0;
        float squares[kWide];
        for (int64_t p = 0; p < panels_; ++p) {
            const int64_t left = n_axes - p * kWide;
            pack<kWide>(axes + p * kWide * channels, left < kWide ? left : kWide, channels,
                        zero.data(), axes_.data() + p * kWide * channels, squares);
        }
    }

    struct Tile {
        float square[kTile], step[kTile], residual[kTile];
        int32_t sum[kTile];  // of the whole numbers
    };
    int64_t scratch() const { return kTile * (channels_ + panels_ * kWide); }  // floats
    // words (axes / 4, kTile) hold four signed bytes each.
    void sketch(const float* x, int64_t count, int64_t steps, float* scratch, int32_t* words,
                Tile& tile);

  private:
    static constexpr int64_t kChunk = 256;
    float slack() const {
        const float chunk = static_cast<float>(channels_ < kChunk ? channels_ : kChunk);
        const float sums = chunk + static_cast<float>(channels_ / kChunk) + 2;
        const float error = std::sqrt(static_cast<float>(n_axes_)) * sums;
        return (7 * error + static_cast<float>(channels_ + 4 * n_axes_) + 40) * 0x1p-24f;
    }

    const float* mean_;
    int64_t channels_, n_axes_, panels_;
    Buffer<float> axes_;
};

inline void Sketcher::sketch(const float* x, int64_t count, int64_t steps, float* scratch,
                             int32_t* words, Tile& tile) {
    float* coordinates = scratch + kTile * channels_;  // (axes, kTile)
    pack<kTile>(x, count, channels_, mean_, scratch, tile.square);
    for (int64_t c = 0; c < channels_; c += kChunk)
        for (int64_t p = 0; p < panels_; ++p) {
            Register product[kWide][2];
            multiply(axes_.data() + (p * channels_ + c) * kWide, scratch + c * kTile,
                     channels_ - c < kChunk ? channels_ - c : kChunk, product);
            float* out = coordinates + p * kWide * kTile;
            for (int64_t i = 0; i < 2 * kWide; ++i) {
                const Register sum = product[i / 2][i % 2];
                store_register(out + i * kRegister,
                               c == 0 ? sum : sum + load_register(out + i * kRegister));
            }
        }

    for (int64_t lane = 0; lane < kTile; lane += kRegister) {
        const auto coordinate = [&](int64_t j) {
            return load_register(coordinates + j * kTile + lane);
        };
        Register largest = {}, norm = {}, rounded_norm = {}, rest = {};
        for (int64_t j = 0; j < n_axes_; ++j) {
            const Register a = coordinate(j), size = a < 0 ? -a : a;
            largest = size > largest ? size : largest;
            norm += a * a;
        }
        const float limit = static_cast<float>(steps);
        const Register zero = {};
        const Register step = largest > kNoStep ? largest / limit : zero;
        const Register inverse = largest > kNoStep ? limit / largest : zero;
        IntRegister sum = {};
        for (int64_t j = 0; j < n_axes_; j += 4) {
            IntRegister word = {};
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; ++i) {
                const Register a = coordinate(j + i);
                const Register shifted = a * inverse + 0x1.8p23f;  // rounds to a whole number
                const IntRegister q = reinterpret_cast<IntRegister>(shifted) - 0x4b400000;
                const Register rounded = step * (shifted - 0x1.8p23f), d = a - rounded;
                rounded_norm += rounded * rounded;
                rest += d * d;
                sum += q;
                word |= (q & 255) << (8 * i);
            }
            std::memcpy(words + j / 4 * kTile + lane, &word, sizeof word);
        }
        std::memcpy(tile.sum + lane, &sum, sizeof sum);
        store_register(tile.step + lane, step);
        const Register square = load_register(tile.square + lane);
        const Register difference = square - norm, tail = difference > 0 ? difference : zero;
        const Register r = tail + slack() * square +
                           kKappa * (norm > rounded_norm ? norm : rounded_norm) + rest / kKappa;
        for (int64_t i = 0; i < kRegister; ++i) tile.residual[lane + i] = std::sqrt(r[i]);
    }
}

}  // namespace npad::cpu::NPAD_ISA
