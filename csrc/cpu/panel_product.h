// Rows packed into panels, and the matrix product in registers of a panel with a tile of rows.
#pragma once

#include "simd.h"

namespace npad::cpu::NPAD_ISA {

// Registers: kWide x 2 sums, two of embeddings, one broadcast. A compiler that has to split a
// vector into two registers spills them all, so this product uses a vector of exactly one.
#if defined(__AVX512F__)
inline constexpr int64_t kWide = 14, kRegister = 16;
#elif defined(__AVX2__)
inline constexpr int64_t kWide = 6, kRegister = 8;
#else
inline constexpr int64_t kWide = 6, kRegister = 4;
#endif
typedef float Register __attribute__((vector_size(kRegister * sizeof(float))));
inline constexpr int64_t kTile = 2 * kRegister;  // rows side by side

inline Register load_register(const float* p) {
    Register r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
inline void store_register(float* p, Register r) { std::memcpy(p, &r, sizeof r); }

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

// product[i][lane] = sum over the channels of panel (channels, kWide) times tile (channels, kTile)
inline void multiply(const float* panel, const float* tile, int64_t channels,
                     Register (&product)[kWide][2]) {
    Register total[kWide][2] = {};
    for (int64_t c = 0; c < channels; ++c) {
        const Register x0 = load_register(tile + c * kTile),
                       x1 = load_register(tile + c * kTile + kRegister);
#pragma GCC unroll 14
        for (int64_t i = 0; i < kWide; ++i) {
            const float y = panel[c * kWide + i];
            total[i][0] += y * x0;
            total[i][1] += y * x1;
        }
    }
#pragma GCC unroll 14
    for (int64_t i = 0; i < kWide; ++i) product[i][0] = total[i][0], product[i][1] = total[i][1];
}

}  // namespace npad::cpu::NPAD_ISA
