// Anomaly maps and scores from the maps M and E of both distances on the grid:
//
//   x = M^a E^b + c  or  a M + b E + c
//   map = rows (x - min x) columns^T + min x;   score = max map
//
//   M, E (n, h, w), maps (n, height, width), scores (n), all float32
//
// rows and columns upsample and smooth one axis each: matrices of a few neighbouring taps to a row.
// What is left of a constant map after its minimum is exactly zero; a value that is not finite
// makes the minimum, and so the whole map, NaN. Threads share images in the first step, groups of
// grid rows in the second and of output rows in the third; every sum runs over its taps in order,
// so the result depends neither on the batch nor on the number of threads.
//
// Fewest bytes: the maps written once; flops: 2 taps for an output pixel, as many for the grid rows
// widened before. Fusion in double, two logarithms and one exponential for a product.
#include <cmath>

#include "simd.h"

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int64_t kRows = 16;        // output rows that a thread takes at a time
constexpr int64_t kSmall = 1 << 14;  // pixels below which waking threads costs more than it gives

// A compiler that has to split a vector into two registers keeps it in memory.
#if defined(__AVX512F__)
constexpr int64_t kRegister = 16;
#elif defined(__AVX2__)
constexpr int64_t kRegister = 8;
#else
constexpr int64_t kRegister = 4;
#endif
typedef float Register __attribute__((vector_size(kRegister * sizeof(float))));
constexpr int kAcross = 4;  // registers of a row that are summed together

constexpr int kHalf = kLanes / 2;
typedef float Floats __attribute__((vector_size(kHalf * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(kHalf * sizeof(uint32_t))));
typedef int32_t Ints __attribute__((vector_size(kHalf * sizeof(int32_t))));
typedef double Doubles __attribute__((vector_size(kHalf * sizeof(double))));
typedef int64_t Longs __attribute__((vector_size(kHalf * sizeof(int64_t))));

struct Band {
    const int32_t* first;
    const float* taps;  // (outputs, width)
    int64_t width;
};

struct Fusion {
    bool product;
    double a, b, c;
};

// Of positive normal numbers, to 1e-9: the mantissa between sqrt(1/2) and sqrt(2) by the series of
// the inverse hyperbolic tangent.
inline Doubles log2(Floats x) {
    constexpr uint32_t kSqrtHalf = 0x3f3504f3;
    const Bits bits = reinterpret_cast<Bits>(x);
    const Ints exponent = reinterpret_cast<Ints>(bits - kSqrtHalf) >> 23;
    const auto mantissa = reinterpret_cast<Floats>(bits - (reinterpret_cast<Bits>(exponent) << 23));
    const Doubles m = __builtin_convertvector(mantissa, Doubles);
    const Doubles s = (m - 1) / (m + 1), s2 = s * s;
    Doubles series = 1.0 / 9 - Doubles{};
#pragma GCC unroll 4
    for (int i = 7; i > 0; i -= 2) series = series * s2 + 1.0 / i;
    constexpr double kTwoOverLn2 = 2.8853900817779268;
    return __builtin_convertvector(exponent, Doubles) + kTwoOverLn2 * s * series;
}

// To 1e-8, of any x, which float32 then takes to 0 or infinity.
inline Floats exp2(Doubles x) {
    constexpr double kMost = 300, kRound = 0x1.8p52;  // added, it rounds to an integer
    x = x < -kMost ? -kMost - Doubles{} : x > kMost ? kMost - Doubles{} : x;
    const Doubles shifted = x + kRound, r = (x - (shifted - kRound)) * 0.6931471805599453;
    double coefficient = 1.0 / 5040;  // 1 / 7!
    Doubles series = coefficient - Doubles{};
#pragma GCC unroll 7
    for (int i = 7; i > 0; --i) series = series * r + (coefficient *= i);
    const Longs scaled = reinterpret_cast<Longs>(series) + (reinterpret_cast<Longs>(shifted) << 52);
    return __builtin_convertvector(reinterpret_cast<Doubles>(scaled), Floats);
}

// Lanes for which log2 has no answer are all ones.
inline Ints special(Floats x) {
    return reinterpret_cast<Ints>(reinterpret_cast<Bits>(x) - 0x00800000u >= 0x7f000000u);
}

// The first `count` lanes, the first of them in the others.
inline Floats load_half(const float* p, int64_t count) {
    Floats v;
    if (count >= kHalf) {
        std::memcpy(&v, p, sizeof v);
    } else {
        v = *p - Floats{};
        std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
    }
    return v;
}

// Fuses an image's cells and takes off their minimum, which is returned; NaN if not all are finite.
// Writes whole vectors.
float fuse(const float* mahalanobis, const float* euclidean, const Fusion& fusion, int64_t cells,
           float* fused) {
    const auto [product, a, b, c] = fusion;
    Ints left = {};
    for (int64_t i = 0; i < cells; i += kHalf) {
        const Floats m = load_half(mahalanobis + i, cells - i);
        const Floats e = load_half(euclidean + i, cells - i);
        Floats x;
        if (product) {
            left |= special(m) | special(e);
            x = exp2(a * log2(m) + b * log2(e)) + static_cast<float>(c);
        } else {
            x = __builtin_convertvector(a * __builtin_convertvector(m, Doubles) +
                                            b * __builtin_convertvector(e, Doubles) + c,
                                        Floats);
        }
        std::memcpy(fused + i, &x, sizeof x);
    }
    int32_t any = 0;
    for (int i = 0; i < kHalf; ++i) any |= left[i];
    for (int64_t i = 0; any != 0 && i < cells; ++i)
        if ((special(mahalanobis[i] - Floats{}) | special(euclidean[i] - Floats{}))[0] != 0)
            fused[i] = static_cast<float>(std::pow(double{mahalanobis[i]}, a) *
                                          std::pow(double{euclidean[i]}, b)) +
                       static_cast<float>(c);

    Floats least = INFINITY - Floats{}, zero = {};
    for (int64_t i = 0; i < cells; i += kHalf) {
        const Floats x = load_half(fused + i, cells - i);
        least = x < least ? x : least;
    }
    float base = least[0];
    for (int i = 1; i < kHalf; ++i) base = least[i] < base ? least[i] : base;
    for (int64_t i = 0; i < cells; i += kHalf) {
        const Floats x = load_half(fused + i, cells - i) - base;
        zero += 0 * x;
        std::memcpy(fused + i, &x, sizeof x);
    }
    for (int i = 0; i < kHalf; ++i) base += zero[i];
    return base;
}

// A group of grid rows (rows, w) -> (rows, stride), zeros from `width` on. The rows stand side by
// side in a vector, so that one tap serves them all; `across` is scratch for (w, kLanes).
void widen(const float* x, int64_t rows, int64_t w, const Band& columns, int64_t width,
           int64_t stride, float* across, float* wide) {
    for (int64_t j = 0; j < w; j += kLanes) {
        Vec block[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
            block[i] = load_first(x + (i < rows ? i : 0) * w + j, w - j);
        transpose(block);
        for (int64_t i = 0; i < kLanes; ++i) store(across + (j + i) * kLanes, block[i]);
    }
    for (int64_t j = 0; j < stride; j += kLanes) {
        Vec block[kLanes] = {};
        for (int64_t i = 0; i < kLanes && j + i < width; ++i) {
            const float* taps = columns.taps + (j + i) * columns.width;
            const float* source = across + columns.first[j + i] * int64_t{kLanes};
            for (int64_t k = 0; k < columns.width; ++k)
                block[i] += taps[k] * load(source + k * kLanes);
        }
        transpose(block);
        for (int64_t i = 0; i < rows; ++i) store(wide + i * stride + j, block[i]);
    }
}

inline Register load_register(const float* p) {
    Register r;
    std::memcpy(&r, p, sizeof r);
    return r;
}

// kCount registers of an output row: rows of `wide` weighted by `k` taps, and base. Raises peaks.
template <int kCount>
inline void blend(const float* wide, int64_t stride, const float* taps, int64_t k, float base,
                  Register (&peaks)[kAcross], Register (&out)[kCount]) {
    Register sum[kCount] = {};
    for (int64_t t = 0; t < k; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < kCount; ++v)
            sum[v] += taps[t] * load_register(wide + t * stride + v * kRegister);
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) {
        peaks[v] = sum[v] > peaks[v] ? sum[v] : peaks[v];
        out[v] = sum[v] + base;
    }
}

// One output row. Its last register may hold zeros beyond the width.
inline void blend_row(const float* wide, int64_t stride, const float* taps, int64_t k, float base,
                      int64_t width, Register (&peaks)[kAcross], float* out) {
    int64_t j = 0;
    for (; j + kAcross * kRegister <= width; j += kAcross * kRegister) {
        Register values[kAcross];
        blend<kAcross>(wide + j, stride, taps, k, base, peaks, values);
#pragma GCC unroll 8
        for (int v = 0; v < kAcross; ++v)
            std::memcpy(out + j + v * kRegister, &values[v], sizeof values[v]);
    }
    for (; j < width; j += kRegister) {
        Register values[1];
        blend<1>(wide + j, stride, taps, k, base, peaks, values);
        const int64_t count = width - j < kRegister ? width - j : kRegister;
        std::memcpy(out + j, values, static_cast<size_t>(count) * sizeof(float));
    }
}

constexpr int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

void anomaly_map(const float* mahalanobis, const float* euclidean, bool product, double a, double b,
                 double c, int64_t n, int64_t h, int64_t w, const int32_t* row_first,
                 const float* row_taps, int64_t row_width, const int32_t* column_first,
                 const float* column_taps, int64_t column_width, int64_t height, int64_t width,
                 float* maps, float* scores, int threads) {
    if (mahalanobis == nullptr) mahalanobis = euclidean, a = 0;
    if (euclidean == nullptr) euclidean = mahalanobis, b = 0;
    if (n * height * width < kSmall) threads = 1;
    const Fusion fusion{product, a, b, c};
    const Band rows{row_first, row_taps, row_width};
    const Band columns{column_first, column_taps, column_width};
    const int64_t padded = blocks_of(h * w, kLanes) * kLanes;
    const int64_t stride = blocks_of(width, kLanes) * kLanes;
    const int64_t groups = blocks_of(h, kLanes), strips = blocks_of(height, kRows);
    Buffer<float> fused(n * padded), base(n), wide(n * h * stride), highest(n * strips);

#pragma omp parallel num_threads(threads)
    {
        Buffer<float> across(blocks_of(w, kLanes) * kLanes * kLanes);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i)
            base[i] = fuse(mahalanobis + i * h * w, euclidean + i * h * w, fusion, h * w,
                           fused.data() + i * padded);
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t row = g * kLanes, count = h - row < kLanes ? h - row : kLanes;
                widen(fused.data() + i * padded + row * w, count, w, columns, width, stride,
                      across.data(), wide.data() + (i * h + row) * stride);
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t s = 0; s < strips; ++s) {
                Register peaks[kAcross] = {};
                for (int64_t y = s * kRows; y < height && y < (s + 1) * kRows; ++y)
                    blend_row(wide.data() + (i * h + rows.first[y]) * stride, stride,
                              rows.taps + y * rows.width, rows.width, base[i], width, peaks,
                              maps + (i * height + y) * width);
                float most = 0;
                for (int v = 1; v < kAcross; ++v)
                    peaks[0] = peaks[v] > peaks[0] ? peaks[v] : peaks[0];
                for (int v = 0; v < kRegister; ++v) most = peaks[0][v] > most ? peaks[0][v] : most;
                highest[i * strips + s] = most;
            }
    }
    for (int64_t i = 0; i < n; ++i) {
        float most = 0;
        for (int64_t s = 0; s < strips; ++s)
            most = highest[i * strips + s] > most ? highest[i * strips + s] : most;
        scores[i] = most + base[i];
    }
}

}  // namespace npad::cpu::NPAD_ISA
