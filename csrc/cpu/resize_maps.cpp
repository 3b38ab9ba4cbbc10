// Each map (height, width) at a size of its own (heights[i], widths[i]), bilinearly:
//
//   out[y, x] = map at row (y + 1/2) height / heights[i] - 1/2, column likewise, clamped to the map
//
// all float32, the results one after another. Positions in double, their fractions rounded once.
//
// An output row blends two rows of the map and then picks its columns from that: with the columns
// of one vector's outputs within two vectors, which they are unless the width shrinks by nearly
// half, picking is a shuffle in registers. Otherwise only the four neighbours of each output are
// read. Threads share the rows of each map. Fewest bytes: the results written once, the maps from
// cache.
#include "simd.h"

namespace npad::cpu::NPAD_ISA {

namespace {

#if defined(__AVX2__)
constexpr bool kShuffles = true;
#else
constexpr bool kShuffles = false;  // there is no instruction for it
#endif
constexpr int64_t kSmall = 1 << 14;  // pixels below which waking threads costs more than it gives

// Where an output lies: `fraction` of the way from sample `first` to the next, which there may be
// none of where the fraction is 0.
struct Position {
    int32_t first;
    float fraction;
};

inline Position locate(int64_t output, int64_t outputs, int64_t size) {
    const double scale = static_cast<double>(size) / static_cast<double>(outputs);
    const double last = static_cast<double>(size - 1);
    double x = (static_cast<double>(output) + 0.5) * scale - 0.5;
    x = x < 0 ? 0 : x > last ? last : x;
    const auto first = static_cast<int32_t>(x);
    return {first, static_cast<float>(x - first)};
}

// Two neighbouring rows of a map, `fraction` of the way from the first to the second.
struct Rows {
    const float *first, *second;
    float fraction;

    float operator[](int64_t i) const { return first[i] + fraction * (second[i] - first[i]); }
};

// The columns of one output width, for as many outputs at a time as a vector holds.
class Columns {
  public:
    Columns(int64_t size, int64_t most_outputs)
        : size_(size),
          first_(most_outputs + kLanes),
          fraction_(most_outputs + kLanes),
          line_(size + 2 * kLanes) {}

    void set(int64_t outputs) {
        outputs_ = outputs;
        const int64_t padded = (outputs + kLanes - 1) / kLanes * kLanes;
        for (int64_t j = 0; j < padded; ++j) {
            const Position p = locate(j < outputs ? j : outputs - 1, outputs, size_);
            first_[j] = p.first;
            fraction_[j] = p.fraction;
        }
        near_ = kShuffles;
        for (int64_t j = 0; j < padded; j += kLanes)
            near_ = near_ && first_[j + kLanes - 1] + 1 - first_[j] < 2 * kLanes;
    }

    void pick(const Rows& rows, float* out) { near_ ? shuffle(rows, out) : gather(rows, out); }

  private:
    void shuffle(const Rows& rows, float* out);
    void gather(const Rows& rows, float* out);

    int64_t size_, outputs_ = 0;
    Buffer<int32_t> first_;
    Buffer<float> fraction_, line_;
    bool near_ = false;  // the columns of every vector lie within two vectors
};

void Columns::shuffle(const Rows& rows, float* out) {
    float* line = line_.data();
    for (int64_t i = 0; i < size_; ++i) line[i] = rows[i];
    for (int64_t i = size_; i < size_ + 2 * kLanes; ++i) line[i] = line[size_ - 1];
    for (int64_t j = 0; j < outputs_; j += kLanes) {
        Lanes lanes;
        std::memcpy(&lanes, &first_[j], sizeof lanes);
        lanes -= first_[j];
        const Vec near = load(line + first_[j]), far = load(line + first_[j] + kLanes);
        const Vec left = __builtin_shuffle(near, far, lanes);
        const Vec right = __builtin_shuffle(near, far, lanes + 1);
        const Vec value = left + load(&fraction_[j]) * (right - left);
        if (outputs_ - j >= kLanes)
            store(out + j, value);
        else
            std::memcpy(out + j, &value, static_cast<size_t>(outputs_ - j) * sizeof(float));
    }
}

void Columns::gather(const Rows& rows, float* out) {
    for (int64_t j = 0; j < outputs_; ++j) {
        const int64_t i = first_[j];
        const float left = rows[i], right = rows[i + 1 < size_ ? i + 1 : i];
        out[j] = left + fraction_[j] * (right - left);
    }
}

}  // namespace

void resize_maps(const float* maps, int64_t n, int64_t height, int64_t width,
                 const int64_t* heights, const int64_t* widths, float* resized, int threads) {
    int64_t widest = 0, pixels = 0;
    for (int64_t i = 0; i < n; ++i) {
        widest = widths[i] > widest ? widths[i] : widest;
        pixels += heights[i] * widths[i];
    }
    if (pixels < kSmall) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        Columns columns(width, widest);
        float* out = resized;
        for (int64_t i = 0; i < n; out += heights[i] * widths[i], ++i) {
            const float* map = maps + i * height * width;
            columns.set(widths[i]);
#pragma omp for schedule(static) nowait
            for (int64_t y = 0; y < heights[i]; ++y) {
                const Position p = locate(y, heights[i], height);
                const float* first = map + p.first * width;
                const float* second = p.first + 1 < height ? first + width : first;
                columns.pick({first, second, p.fraction}, out + y * widths[i]);
            }
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
