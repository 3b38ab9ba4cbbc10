// One axis of `embed`: the average over a patch of three pixels and bilinear sampling, in one.
#pragma once

#include "host_device.h"

namespace npad {

// What a cell of the grid takes from the pixels x of an axis, those outside of it being zero:
//
//   near (x[first] + x[first + 1] + x[first + 2]) + far (x[first + 1] + x[first + 2] + x[last])
//
// The patches around the two pixels on either side of the cell's centre share two pixels. Where
// there is no second patch, behind the last pixel or where the axis has a cell for each pixel, it
// is the first again. A weight may be zero; its pixels count all the same, so that NaN and infinity
// go where PyTorch sends them.
template <class Int>
struct alignas(16) Taps {
    Int first, last;
    float near, far;

    Taps() = default;
    // Centres are aligned: (cell + 1/2) size / cells - 1/2, in halves of 1 / cells, not below 0.
    NPAD_HOST_DEVICE constexpr Taps(Int cell, Int cells, Int size) {
        const Int centre = (2 * cell + 1) * size - cells, position = centre > 0 ? centre : 0;
        const Int pixel = position / (2 * cells), rest = position % (2 * cells);
        first = pixel - 1;
        last = pixel + 1 < size && cells != size ? pixel + 2 : first;
        far = static_cast<float>(rest) / static_cast<float>(2 * cells);
        near = static_cast<float>(2 * cells - rest) / static_cast<float>(2 * cells);
    }
};

}  // namespace npad
