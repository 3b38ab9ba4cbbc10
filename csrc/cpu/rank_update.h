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
    for (int64_t p0 = 0; p0 < layout.panels; p0 += kGroupPanels) {
        const int64_t panels =
            layout.panels - p0 < kGroupPanels ? layout.panels - p0 : kGroupPanels;
        const int64_t columns = layout.columns(p0 + panels - 1);
        for (int64_t j0 = 0; j0 < columns; j0 += kTileColumns) {
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
            for (int j = 0; j < kTileColumns; ++j) {
                float tile[kGroupRows];
                for (int v = 0; v < kGroupVectors; ++v) store(tile + v * kLanes, acc[j][v]);
                for (int64_t p = p0; p < p0 + panels; ++p) {
                    if (j0 + j >= layout.columns(p)) continue;
                    float* out = scatter + layout.offset(p) + (j0 + j) * kPanel;
                    // Above the diagonal stays zero: only the last 8 columns of a panel have such
                    // rows.
                    const int64_t above = j0 + j - layout.first_row(p);
                    const float* in = tile + (p - p0) * kPanel;
                    if (above <= 0) {
                        store8(out, load8(out) + load8(in));
                    } else {
                        for (int64_t i = above; i < kPanel; ++i) out[i] += in[i];
                    }
                }
            }
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
