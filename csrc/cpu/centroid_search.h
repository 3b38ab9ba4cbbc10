// Nearest centroids of a tile of embeddings by an index: bounds of all pairs, then the distances of
// those whose bound is not above the best distance known. Nearest, and of equals first, are those
// of the plain loop over differences, since a bound has its rounding taken off (sketch.h).
#pragma once

#include <cfloat>

#include "byte_product.h"
#include "squared_distance.h"

namespace npad::cpu::NPAD_ISA {

inline constexpr float kMostLeft = 0.75f;  // of all bounds of panels: the full product is faster
inline constexpr float kTiny = 0x1p-100f;  // more than what underflow takes off a bound

// One thread's search by the index, a tile of embeddings at a time.
template <class Dot>
class Search {
  public:
    Search(const float* centroids, int64_t k, int64_t channels, const float* index,
           Sketcher& sketcher, float* scratch)
        : centroids_(centroids),
          channels_(channels),
          layout_(k, channels),
          index_(index),
          sketcher_(sketcher),
          least_(scratch),
          words_(reinterpret_cast<int32_t*>(least_ + layout_.panels * kTile)),
          scratch_(least_ + (layout_.panels + layout_.groups()) * kTile),
          query_{words_, layout_.groups(), {}, {}} {}

    static int64_t scratch_size(const IndexLayout& layout, const Sketcher& sketcher) {
        return (layout.panels + layout.groups()) * kTile + sketcher.scratch();
    }

    // False where bounds leave too much to measure; then nothing is found.
    bool find(const float* x, int64_t count, float* distance, int64_t* nearest);

  private:
    void bound_all();
    void measure_likeliest(const float* x, int64_t count);
    void measure(const float* x, int64_t centroid, int64_t lane);

    const float* centroids_;
    int64_t channels_;
    IndexLayout layout_;
    const float* index_;
    Sketcher& sketcher_;
    float* least_;  // (panels, kTile)
    int32_t* words_;
    float* scratch_;
    Query query_;
    int32_t likeliest_[kTile];  // the panel with the least bound
    float limit_[kTile];        // bounds above it are of centroids farther than nearest_
    Nearest nearest_[kTile];
};

template <class Dot>
void Search<Dot>::bound_all() {
    for (int64_t i = 0; i < kTile; ++i) query_.start[i] = -128 * query_.tile.sum[i];
    Register best[2];
    IntRegister panel[2] = {};
    best[0] = best[1] = INFINITY - Register{};
    for (int64_t p = 0; p < layout_.panels; ++p) {
        float* least = least_ + p * kTile;
        least_bounds<Dot>(index_ + layout_.panel(p), query_, least);
        const IntRegister here = static_cast<int32_t>(p) - IntRegister{};
        for (int64_t i = 0; i < 2; ++i) {
            const Register s = load_register(least + i * kRegister);
            panel[i] = s < best[i] ? here : panel[i];
            best[i] = s < best[i] ? s : best[i];
        }
    }
    std::memcpy(likeliest_, panel, sizeof panel);
}

// The next float32.
inline float above(float squared) {
    uint32_t bits;
    std::memcpy(&bits, &squared, sizeof bits);
    ++bits;
    std::memcpy(&squared, &bits, sizeof squared);
    return squared;
}

template <class Dot>
void Search<Dot>::measure(const float* x, int64_t centroid, int64_t lane) {
    Nearest& nearest = nearest_[lane];
    // The sum may stop early above the best, never at it: the first of equals is the nearest.
    const float d = squared_distance(x + lane * channels_, centroids_ + centroid * channels_,
                                     channels_, above(nearest.squared));
    if (d > nearest.squared || (d == nearest.squared && centroid > nearest.index)) return;
    nearest = {d, centroid};
    const float rounding = (static_cast<float>(channels_) + 16) * 0x1p-23f;
    limit_[lane] = d / 2 * (1 + rounding) - query_.tile.square[lane] / 2 * (1 - rounding) + kTiny;
}

// The centroid with the least bound of all comes first: it sets a limit that most bounds exceed.
template <class Dot>
void Search<Dot>::measure_likeliest(const float* x, int64_t count) {
    for (int64_t i = 0; i < kTile; ++i) {
        nearest_[i] = {FLT_MAX, 0};
        limit_[i] = -INFINITY;
        if (i >= count) continue;
        float bounds[kSketchPanel];
        bounds_of_one<Dot>(index_ + layout_.panel(likeliest_[i]), query_, i, bounds);
        int64_t least = 0;
        for (int64_t j = 1; j < kSketchPanel; ++j)
            if (bounds[j] < bounds[least]) least = j;
        measure(x, likeliest_[i] * kSketchPanel + least, i);
    }
}

template <class Dot>
bool Search<Dot>::find(const float* x, int64_t count, float* distance, int64_t* nearest) {
    sketcher_.sketch(x, count, Dot::kSteps, scratch_, words_, query_.tile);
    for (int64_t i = 0; i < count; ++i)
        if (!(query_.tile.square[i] < kRegular)) return false;
    bound_all();
    measure_likeliest(x, count);
    int64_t left = 0;
    for (int64_t p = 0; p < layout_.panels; ++p)
        left += __builtin_popcount(at_most(least_ + p * kTile, limit_));
    if (left > kMostLeft * count * layout_.panels) return false;

    for (int64_t p = 0; p < layout_.panels; ++p)
        for (uint32_t bits = at_most(least_ + p * kTile, limit_); bits != 0; bits &= bits - 1) {
            const int64_t lane = __builtin_ctz(bits);
            float bounds[kSketchPanel];
            bounds_of_one<Dot>(index_ + layout_.panel(p), query_, lane, bounds);
            for (int64_t i = 0; i < kSketchPanel; ++i)
                if (bounds[i] <= limit_[lane]) measure(x, p * kSketchPanel + i, lane);
        }
    for (int64_t i = 0; i < count; ++i) {
        distance[i] = std::sqrt(nearest_[i].squared);
        nearest[i] = nearest_[i].index;
    }
    return true;
}

}  // namespace npad::cpu::NPAD_ISA
