// The square window of odd side around a grid position, clipped at the border.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace npad {

struct Window {
    int64_t top, bottom, left, right;  // half-open: rows [top, bottom), columns [left, right)

    NPAD_HOST_DEVICE constexpr Window(int64_t position, int64_t height, int64_t width, int64_t side)
        : top(clip(position / width - side / 2, height)),
          bottom(clip(position / width + side / 2 + 1, height)),
          left(clip(position % width - side / 2, width)),
          right(clip(position % width + side / 2 + 1, width)) {}

    NPAD_HOST_DEVICE constexpr int64_t size() const { return (bottom - top) * (right - left); }

  private:
    NPAD_HOST_DEVICE static constexpr int64_t clip(int64_t v, int64_t limit) {
        return v < 0 ? 0 : (v > limit ? limit : v);
    }
};

}  // namespace npad
