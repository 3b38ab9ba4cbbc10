// scatter += sum_b d_b d_b^T for one packed matrix: the inner loop of the moments and of the window
// covariance. 2 C^2 B / 2 flops on B C inputs, accumulated in registers over the rows of d in
// order.
#pragma once

#include "../packed.h"
#include "simd.h"

namespace npad::cpu::NPAD_ISA {

inline constexpr int64_t kGroupVectors = 2;                    // per register tile
inline constexpr int64_t kGroupRows = kGroupVectors * kLanes;  // rows of a tile
inline constexpr int64_t kGroupPanels = kGroupRows / kPanel;
inline constexpr int kTileColumns = kLanes == 16 ? 10 : 6;  // 20 or 12 accumulators

// Floats in a row of d: `pad` zeros, the C deviations, zeros up to whole tiles.
inline int64_t deviation_stride(const PackedLayout& layout) {
    const int64_t rows = layout.panels * kPanel;
    return (rows + kGroupRows - 1) / kGroupRows * kGroupRows + kTileColumns;
}

// d: (rows, stride) as described above.
inline void rank_update(const float* d, int64_t rows, int64_t stride, const PackedLayout& layout,
                        float* scatter) {
    // A short group comes first, where rows are shortest.
    const int64_t short_group = layout.panels % kGroupPanels;
    int64_t panels = short_group == 0 ? kGroupPanels : short_group;
    for (int64_t p0 = 0; p0 < layout.panels; p0 += panels, panels = kGroupPanels) {
        const int64_t columns = layout.columns(p0 + panels - 1);
        for (int64_t j0 = 0; j0 < columns; j0 += kTileColumns) {
            // The sums take long enough for these lines to arrive.
            for (int64_t p = p0; p < p0 + panels; ++p)
                for (int64_t j = j0; j < j0 + kTileColumns && j < layout.columns(p); ++j)
                    __builtin_prefetch(scatter + layout.offset(p) + j * kPanel, 1);

            Vec acc[kTileColumns][kGroupVectors] = {};
            const float* row = d + p0 * kPanel;
            const float* column = d + layout.pad + j0;
            for (int64_t b = 0; b < rows; ++b, row += stride, column += stride) {
                Vec r[kGroupVectors];
                for (int v = 0; v < kGroupVectors; ++v) r[v] = load(row + v * kLanes);
                for (int j = 0; j < kTileColumns; ++j) {
                    const Vec c = broadcast(column[j]);
                    for (int v = 0; v < kGroupVectors; ++v) acc[j][v] += r[v] * c;
                }
            }

            for (int i = 0; i < panels; ++i) {
                const int64_t p = p0 + i;
                float* out = scatter + layout.offset(p) + j0 * kPanel;
                for (int j = 0; j < kTileColumns && j0 + j < layout.columns(p); ++j) {
                    const Vec8 sums = part8(acc[j][i * kPanel / kLanes], i % (kLanes / kPanel));
                    // Above the diagonal stays zero: only the last 8 columns have such rows.
                    const int64_t above = j0 + j - layout.first_row(p);
                    if (above <= 0) {
                        store8(out + j * kPanel, load8(out + j * kPanel) + sums);
                    } else {
                        for (int64_t r = above; r < kPanel; ++r) out[j * kPanel + r] += sums[r];
                    }
                }
            }
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
