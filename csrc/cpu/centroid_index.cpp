// Sketches of all centroids, in panels, for nearest_centroid. See sketch.h for what they are and
// where they lie.
#include <omp.h>

#include "sketch.h"

namespace npad::cpu::NPAD_ISA {

void centroid_index(const float* centroids, int64_t k, int64_t channels, const float* mean,
                    const float* axes, float* index, int threads) {
    const IndexLayout layout(k, channels);
    std::memset(index, 0, static_cast<size_t>(layout.kHeader) * sizeof(float));
    std::memcpy(index + layout.mean(), mean, static_cast<size_t>(channels) * sizeof(float));
    std::memcpy(index + layout.axis(channels), axes,
                static_cast<size_t>(layout.axes * channels) * sizeof(float));
    Sketcher sketcher(mean, axes, layout.axes, channels);
    const int64_t words_size = layout.groups() * kTile;
    Buffer<float> scratch(threads * sketcher.scratch());
    Buffer<int32_t> all_words(threads * words_size);
    const float norm_kept = 1 - static_cast<float>(channels + 16) * 0x1p-24f;
    bool usable = true;

#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : usable)
    for (int64_t start = 0; start < layout.panels * kSketchPanel; start += kTile) {
        const int64_t thread = omp_get_thread_num();
        int32_t* words = all_words.data() + thread * words_size;
        typename Sketcher::Tile tile;
        const int64_t first = start < k ? start : k - 1, count = k - first;
        sketcher.sketch(centroids + first * channels, count < kTile ? count : kTile, kCentroidSteps,
                        scratch.data() + thread * sketcher.scratch(), words, tile);
        for (int64_t i = 0; i < kTile && start + i < layout.panels * kSketchPanel; ++i) {
            const int64_t at = (start + i) % kSketchPanel;
            float* panel = index + layout.panel((start + i) / kSketchPanel);
            const bool padding = start + i >= k;
            panel[at] = padding ? INFINITY : tile.square[i] / 2 * norm_kept;
            panel[layout.kStep + at] = padding ? 0 : tile.step[i];
            panel[layout.kResidual + at] = padding ? 0 : tile.residual[i];
            for (int64_t g = 0; g < layout.groups(); ++g) {
                const uint32_t word = static_cast<uint32_t>(words[g * kTile + i]) ^ 0x80808080u;
                std::memcpy(panel + layout.kWords + g * kSketchPanel + at, &word, sizeof word);
            }
            usable = usable && tile.square[i] < kRegular;
        }
    }
    index[0] = usable;
}

}  // namespace npad::cpu::NPAD_ISA
