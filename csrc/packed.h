// The packed lower-triangular layout of scatter matrices and inverse Cholesky factors.
//
// Rows are grouped in panels of kPanel = 8; a panel holds its columns one after another, each
// column being the panel's 8 rows, contiguous. One column of a panel is thus one 16-byte load in
// 16-bit precision, one 8 x 8 tile is what a matrix instruction takes, and a vector unit of 8 or 16
// lanes works on 8 or 16 rows at once with no sum across lanes.
//
// If 8 does not divide C, the FIRST panel is the short one: `pad` rows of zeros stand above row 0,
// where a row has fewest columns, so that padding costs least. Panel p holds rows
// [8 p - pad, 8 p + 8 - pad) and columns [0, 8 p + 8 - pad); what lies above the diagonal is zero.
//
//   stored / needed: 1.018 at C = 384, 1.027 at C = 256, 1.071 at C = 100
//
// A matrix of bytes has a scale for every 32 columns of a panel, counted from `pad` before the
// first so that panel p ends at column 8 (p + 1): 256 numbers, the last block of a panel fewer. The
// scales, float32, follow its bytes, panel after panel.
//
// npad/ops/packed.py holds the same definitions in Python; tests compare them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace npad {

inline constexpr int64_t kPanel = 8;
inline constexpr int64_t kBlockColumns = 32;  // of a panel, which share a scale

struct PackedLayout {
    int64_t channels;
    int64_t panels;
    int64_t pad;  // rows of zeros above row 0

    NPAD_HOST_DEVICE explicit constexpr PackedLayout(int64_t c)
        : channels(c), panels((c + kPanel - 1) / kPanel), pad(panels * kPanel - c) {}

    // Columns stored in panel p; also one past the panel's last row.
    NPAD_HOST_DEVICE constexpr int64_t columns(int64_t p) const { return kPanel * (p + 1) - pad; }
    // First row of panel p; negative where it is padding.
    NPAD_HOST_DEVICE constexpr int64_t first_row(int64_t p) const { return kPanel * p - pad; }
    // Element offset of panel p.
    NPAD_HOST_DEVICE constexpr int64_t offset(int64_t p) const {
        return kPanel * p * (kPanel * (p + 1) / 2 - pad);
    }
    // Elements in one packed matrix.
    NPAD_HOST_DEVICE constexpr int64_t size() const { return offset(panels); }

    // Scales of panel p in a matrix of bytes: one for each of its blocks.
    NPAD_HOST_DEVICE static constexpr int64_t scales(int64_t p) { return p / 4 + 1; }
    // Number of the first of them in the matrix.
    NPAD_HOST_DEVICE static constexpr int64_t first_scale(int64_t p) {
        return scales(p) * (2 * (p / 4) + p % 4);
    }
    // Bytes of one matrix of bytes, a multiple of 16.
    NPAD_HOST_DEVICE constexpr int64_t byte_size() const {
        const int64_t bytes = size() + 4 * first_scale(panels);
        return (bytes + 15) / 16 * 16;
    }
};
static_assert(kBlockColumns == 4 * kPanel);  // see scales()

}  // namespace npad
