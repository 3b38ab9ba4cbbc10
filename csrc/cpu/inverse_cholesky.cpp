// Covariances -> packed inverse Cholesky factors: A = L L^T, W = L^-1.
//
// Both steps go down groups of kRows rows. A group is stored column by column, each column being
// the group's rows, contiguous, so that a vector holds rows and every inner product over k is
// (column of the group) x (scalar of another group), with no sum across lanes:
//
//   L[g, j] = (A[g, j] - sum_{k < j} L[g, k] L[j, k]^T) L[j, j]^-T
//   W[g, j] = -L[g, g]^-1 sum_{j <= k < g} L[g, k] W[k, j];  W[g, g] = L[g, g]^-1
//
// Rows are padded at the top with those of an identity, where a row is shortest (as in packed.h).
// A thread owns whole matrices, so the result does not depend on the number of threads. Fewest
// bytes: the upper triangle read once, the packed factor written once; flops: 2 C^3 / 3. Two
// triangles of scratch per thread, from the level-2 cache up to C = 700 or so.
#include <cmath>

#include "../packed.h"
#include "simd.h"

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int kVectors = 2;                     // to a column of a group
constexpr int64_t kRows = kVectors * kLanes;    // of a group
constexpr int kColumns = kLanes == 16 ? 8 : 4;  // of a register tile: 16 or 8 accumulators
typedef Vec Tile[kColumns][kVectors];

// A lower triangle of row groups; row and column count from the top of the padding.
class Triangle {
  public:
    Triangle(float* data) : data_(data) {}

    static int64_t size(int64_t groups) { return kRows * kRows * groups * (groups + 1) / 2; }
    float* group(int64_t g) const { return data_ + size(g); }
    // Address of (row, 0), from which columns are kRows apart.
    float* row(int64_t row) const { return group(row / kRows) + row % kRows; }

  private:
    float* data_;
};

inline void load_tile(const float* columns, Tile& tile) {
    for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) tile[c][v] = load(columns + c * kRows + v * kLanes);
}

inline void store_tile(float* columns, const Tile& tile) {
    for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) store(columns + c * kRows + v * kLanes, tile[c][v]);
}

// tile[c] -= sum_{k < n} columns[k] scalars[k * step + c * across], n <= kRows: short sums, which
// are then added, err less than one long sum.
inline void subtract_product(const float* columns, const float* scalars, int64_t step,
                             int64_t across, int64_t n, Tile& tile) {
    Tile sums = {};
    for (int64_t k = 0; k < n; ++k) {
        Vec column[kVectors];
        for (int v = 0; v < kVectors; ++v) column[v] = load(columns + k * kRows + v * kLanes);
        for (int c = 0; c < kColumns; ++c) {
            const Vec s = broadcast(scalars[k * step + c * across]);
            for (int v = 0; v < kVectors; ++v) sums[c][v] += column[v] * s;
        }
    }
    for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) tile[c][v] -= sums[c][v];
}

// Rows of group g of the padded matrix, from its upper triangle, where they are contiguous.
void load_group(const float* matrix, int64_t channels, int64_t pad, int64_t g, float* group) {
    const int64_t top = g * kRows;
    for (int64_t j = pad / kColumns * kColumns; j < top + kRows; ++j) {
        float* column = group + j * kRows;
        if (j < pad || top < pad) {
            for (int64_t i = 0; i < kRows; ++i)
                column[i] = j < pad || top + i < pad ? static_cast<float>(top + i == j)
                                                     : matrix[(j - pad) * channels + top + i - pad];
        } else {
            std::memcpy(column, matrix + (j - pad) * channels + top - pad, kRows * sizeof(float));
        }
    }
}

// A = L L^T in place; 0, or the order of the first leading minor that is not positive.
int32_t cholesky(const float* matrix, int64_t channels, int64_t groups, Triangle lower,
                 float* reciprocal) {
    const int64_t pad = groups * kRows - channels, first = pad / kColumns * kColumns;
    for (int64_t g = 0; g < groups; ++g) {
        float* group = lower.group(g);
        const int64_t top = g * kRows;
        load_group(matrix, channels, pad, g, group);
        for (int64_t j = first; j < top + kRows; j += kColumns) {
            const float* row = lower.row(j);  // (j + c, k) is row[k * kRows + c]
            Tile tile;
            load_tile(group + j * kRows, tile);
            for (int64_t k = first; k < j; k += kRows)
                subtract_product(group + k * kRows, row + k * kRows, kRows, 1,
                                 j - k < kRows ? j - k : kRows, tile);
            for (int c = 0; c < kColumns; ++c) {
                float* column = group + (j + c) * kRows;
                const int64_t diagonal = j + c - top;  // row of the group; negative left of it
                if (diagonal >= 0) {
                    float pivot = 0;
                    for (int v = 0; v < kVectors; ++v) store(column + v * kLanes, tile[c][v]);
                    pivot = column[diagonal];
                    if (!(pivot > 0 && pivot < INFINITY))
                        return static_cast<int32_t>(j + c - pad + 1);
                    reciprocal[j + c] = 1 / std::sqrt(pivot);
                    std::memset(column, 0, static_cast<size_t>(diagonal) * sizeof(float));
                    for (int v = 0; v < kVectors; ++v) tile[c][v] = load(column + v * kLanes);
                }
                const Vec scale = broadcast(reciprocal[j + c]);
                for (int v = 0; v < kVectors; ++v) {
                    tile[c][v] *= scale;
                    store(column + v * kLanes, tile[c][v]);
                }
                for (int d = c + 1; d < kColumns; ++d)
                    for (int v = 0; v < kVectors; ++v)
                        tile[d][v] -= tile[c][v] * broadcast(row[(j + c) * kRows + d]);
            }
        }
    }
    return 0;
}

// Inverse of a group's triangular block, whose columns are kRows apart.
void invert_block(const float* block, const float* reciprocal, float* inverse) {
    std::memset(inverse, 0, kRows * kRows * sizeof(float));
    for (int64_t j = 0; j < kRows; j += kColumns) {
        for (int64_t r = j; r < kRows; ++r) {
            const float* column = block + r * kRows;
            const int64_t end = r - j < kColumns ? r + 1 : j + kColumns;
            if (r < j + kColumns) inverse[r * kRows + r] = 1;
            for (int64_t c = j; c < end; ++c) {  // independent of each other, which hides latency
                float* x = inverse + c * kRows;
                const float x_r = x[r] * reciprocal[r];
                for (int64_t i = r / kLanes * kLanes; i < kRows; i += kLanes)
                    store(x + i, load(x + i) - load(column + i) * broadcast(x_r));
                x[r] = x_r;
            }
        }
    }
}

// W = L^-1.
void invert(const Triangle& lower, const float* reciprocal, int64_t groups, int64_t first,
            const Triangle& inverse) {
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t top = g * kRows;
        const float* row = lower.group(g);
        float* out = inverse.group(g);
        float* block = out + top * kRows;
        invert_block(row + top * kRows, reciprocal + top, block);
        for (int64_t j = first; j < top; j += kColumns) {
            Tile tile = {};
            for (int64_t k = j; k < top; k = (k / kRows + 1) * kRows)
                subtract_product(row + k * kRows, inverse.row(k) + j * kRows, 1, kRows,
                                 kRows - k % kRows, tile);
            float sums[kColumns * kRows];
            store_tile(sums, tile);
            Tile result = {};
            for (int64_t r = 0; r < kRows; ++r)
                for (int64_t v = r / kLanes; v < kVectors; ++v) {
                    const Vec column = load(block + r * kRows + v * kLanes);
                    for (int c = 0; c < kColumns; ++c)
                        result[c][v] += column * broadcast(sums[c * kRows + r]);
                }
            store_tile(out + j * kRows, result);
        }
    }
}

void pack(const Triangle& inverse, int64_t groups, const PackedLayout& layout, float* packed) {
    const int64_t pad = groups * kRows - layout.channels;
    for (int64_t p = 0; p < layout.panels; ++p) {
        const float* rows = inverse.row(layout.first_row(p) + pad) + pad * kRows;
        float* panel = packed + layout.offset(p);
        for (int64_t j = 0; j < layout.columns(p); ++j)
            store8(panel + j * kPanel, load8(rows + j * kRows));
    }
}

}  // namespace

void inverse_cholesky(const float* covariance, int64_t count, int64_t channels, float* packed,
                      int32_t* info, int threads) {
    const PackedLayout layout(channels);
    const int64_t groups = (channels + kRows - 1) / kRows;

#pragma omp parallel num_threads(threads)
    {
        Buffer<float> scratch(2 * Triangle::size(groups)), reciprocal(groups * kRows);
        const Triangle lower(scratch.data()), inverse(scratch.data() + Triangle::size(groups));
#pragma omp for schedule(dynamic, 1)
        for (int64_t m = 0; m < count; ++m) {
            const int64_t pad = groups * kRows - channels;
            info[m] = cholesky(covariance + m * channels * channels, channels, groups, lower,
                               reciprocal.data());
            float* out = packed + m * layout.size();
            if (info[m] != 0) {
                for (int64_t i = 0; i < layout.size(); ++i) out[i] = NAN;
                continue;
            }
            invert(lower, reciprocal.data(), groups, pad / kColumns * kColumns, inverse);
            pack(inverse, groups, layout, out);
        }
    }
}

}  // namespace npad::cpu::NPAD_ISA
