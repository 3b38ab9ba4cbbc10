// Dense lower-triangular factors -> the packed layout of packed.h. One read, one write.
#include "../packed.h"
#include "simd.h"

namespace npad::cpu::NPAD_ISA {

void pack_factor(const float* factor, int64_t count, int64_t channels, float* packed, int threads) {
    const PackedLayout layout(channels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < count; ++k) {
        const float* dense = factor + k * channels * channels;
        for (int64_t p = 0; p < layout.panels; ++p) {
            float* panel = packed + k * layout.size() + layout.offset(p);
            const int64_t row0 = layout.first_row(p);
            for (int64_t j = 0; j < layout.columns(p); ++j)
                for (int64_t i = 0; i < kPanel; ++i) {
                    const int64_t row = row0 + i;
                    panel[j * kPanel + i] = j <= row ? dense[row * channels + j] : 0.0f;
                }
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
