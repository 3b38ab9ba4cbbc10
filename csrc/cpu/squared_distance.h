// Squared Euclidean distance of two rows by differences, and the sum over the lanes of a vector.
#pragma once

#include "simd.h"

namespace npad::cpu::NPAD_ISA {

inline float tree_sum(Vec v) {
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}

struct Nearest {
    float squared;
    int64_t index;
};

// The squared distance, or anything not below `limit` once it is known to reach it. Sums only grow,
// also when rounded, so that stopping early never changes which distance is the smaller.
inline float squared_distance(const float* a, const float* b, int64_t dim, float limit) {
    typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));
    constexpr int64_t kStep = 8 * kLanes;
    Vec total[4] = {};
    int64_t i = 0;
    for (; i + kStep <= dim; i += kStep) {
        for (int64_t j = 0; j < kStep; j += kLanes) {
            const Vec d = load(a + i + j) - load(b + i + j);
            total[j / kLanes % 4] += d * d;
        }
        const float partial = tree_sum((total[0] + total[1]) + (total[2] + total[3]));
        if (partial >= limit) return partial;
    }
    for (; i + kLanes <= dim; i += kLanes) {
        const Vec d = load(a + i) - load(b + i);
        total[0] += d * d;
    }
    if (i < dim && dim >= kLanes) {  // the last vector again, less the lanes already counted
        constexpr int32_t x = -1;
        static constexpr int32_t kTail[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                              x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
        Mask tail;
        std::memcpy(&tail, kTail + 16 - kLanes + (dim - i), sizeof tail);
        const Vec difference = load(a + dim - kLanes) - load(b + dim - kLanes);
        const Vec d = reinterpret_cast<Vec>(reinterpret_cast<Mask>(difference) & tail);
        total[1] += d * d;
        i = dim;
    }
    float sum = tree_sum((total[0] + total[1]) + (total[2] + total[3]));
    for (; i < dim; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

}  // namespace npad::cpu::NPAD_ISA
