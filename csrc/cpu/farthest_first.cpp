// Greedy k-center, farthest point first (Gonzalez 1985): every centre is the point farthest from
// the centres before it; radius[k] is that distance after k + 1 centres. Ties: the lowest index.
// points (n, dim) float32, n < 2^32 - 1. The sequence is that of the plain loop over all points and
// centres, bitwise the same for every number of threads; no centre is chosen twice, also among
// duplicates.
//
// What is not computed:
//  - Points are lazy. A point's distance to the centres it has seen bounds the true one from above,
//    so only points whose bound exceeds the farthest point known need to see the centres they
//    missed (Minoux's lazy greedy). Points near an early centre are never touched again. Blocks of
//    16 neighbouring points (leaves of a k-d tree) wake together and meet many centres at once, in
//    cache.
//  - Heads (head.h) bound the distance from below: half a head rules out most pairs at a few cycles
//    each, the whole head nearly all others. Of what is left of 64 centres, the likeliest nearest
//    is measured first, which rules out most of the rest; sums stop once they reach the bound.
// Bytes beside the points: 276 per point.
#include <omp.h>

#include "head.h"

namespace npad::cpu::NPAD_ISA {

namespace {

constexpr int64_t kBlock = 16;      // points that wake together: one AVX-512 register
constexpr int64_t kGroup = 64;      // blocks that a thread takes at a time
constexpr int64_t kChunk = 64;      // centres met at a time: their bounds fill 4 KiB
constexpr int64_t kSplitAxes = 16;  // the k-d tree looks at one cache line of each head
constexpr float kSlack = 1e-3f;     // (d + e)^2 <= (1 + kSlack) d^2 + (1 + 1 / kSlack) e^2
constexpr double kReportSeconds = 0.05;
constexpr int64_t kSmall = 1 << 16;  // coordinates; below, waking threads costs more than it gives

struct Item {
    float value;
    uint32_t point;
};

// Moves the `rank` smallest items to the front (Hoare's quickselect, median of three).
void select_smallest(Item* items, int64_t n, int64_t rank) {
    int64_t low = 0, high = n - 1;
    while (low < high) {
        const float a = items[low].value, b = items[low + (high - low) / 2].value,
                    c = items[high].value;
        const float pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
        int64_t i = low, j = high;
        while (i <= j) {
            while (items[i].value < pivot) ++i;
            while (pivot < items[j].value) --j;
            if (i > j) break;
            const Item item = items[i];
            items[i++] = items[j];
            items[j--] = item;
        }
        if (rank <= j)
            high = j;
        else if (rank >= i)
            low = i;
        else
            return;
    }
}

// Orders items so that every run of kBlock is a leaf of a k-d tree split where heads vary most.
void build_tree(const float* heads, Item* items, int64_t n) {
    if (n <= kBlock) return;
    float sum[kSplitAxes] = {}, squares[kSplitAxes] = {};
    const float* origin = heads + int64_t{items[0].point} * kHead;
    const int64_t stride = n / 1024 + 1;  // a sample is enough to choose an axis
    for (int64_t i = 0; i < n; i += stride) {
        const float* head = heads + int64_t{items[i].point} * kHead;
        for (int64_t j = 0; j < kSplitAxes; ++j) {
            const float d = head[j] - origin[j];
            sum[j] += d;
            squares[j] += d * d;
        }
    }
    const float count = static_cast<float>((n + stride - 1) / stride);
    int64_t axis = 0;
    float largest = 0;
    for (int64_t j = 0; j < kSplitAxes; ++j) {
        const float scatter = squares[j] - sum[j] * sum[j] / count;
        if (scatter > largest) largest = scatter, axis = j;
    }
    for (int64_t i = 0; i < n; ++i) items[i].value = heads[int64_t{items[i].point} * kHead + axis];
    const int64_t left = (n + kBlock - 1) / kBlock / 2 * kBlock;
    select_smallest(items, n, left);
#pragma omp task if (n > 16384)
    build_tree(heads, items, left);
    build_tree(heads, items + left, n - left);
#pragma omp taskwait
}

// A point's place in the order of choice: its distance, then the lower index. 0 is nobody.
uint64_t rank_of(float squared, uint32_t point) {
    uint32_t bits;
    std::memcpy(&bits, &squared, sizeof bits);
    return uint64_t{bits} << 32 | (0xffffffffu - point);
}

class KCenter {
  public:
    KCenter(const float* points, int64_t n, int64_t dim, int64_t n_centroids, const float* mean,
            const float* axes, int64_t* index, int threads)
        : points_(points),
          n_(n),
          dim_(dim),
          head_(dim, mean, axes),
          threads_(threads),
          blocks_((n + kBlock - 1) / kBlock),
          groups_((blocks_ + kGroup - 1) / kGroup),
          heads_(blocks_ * kBlock * kHead),
          point_(blocks_ * kBlock),
          nearest_(blocks_ * kBlock),
          seen_(blocks_),
          rank_(blocks_),
          group_rank_(groups_),
          todo_(groups_),
          centre_heads_(n_centroids * kHead),
          index_(index) {}

    bool prepare(Progress progress, int64_t total);

    // Makes the point of this rank the next centre; returns the rank of the point that is farthest
    // then.
    uint64_t add_centre(uint64_t rank);

    uint64_t rank_of_point(int64_t point) const {
        return rank_of(INFINITY, static_cast<uint32_t>(point));
    }

  private:
    void sort_into_blocks();
    void place(int64_t row);
    void visit_group(int64_t group);
    void visit(int64_t block);
    bool meet(int64_t block, const float* half_heads, int64_t count);
    void refresh_rank(int64_t block);
    uint64_t farthest() const { return __atomic_load_n(&farthest_, __ATOMIC_RELAXED); }

    const float* points_;
    int64_t n_, dim_;
    Head head_;
    int threads_;
    int64_t blocks_, groups_;
    Buffer<float> heads_;     // of every row; rows are points in the order of the tree
    Buffer<uint32_t> point_;  // of every row
    // Of every row: squared distance to the centres seen; negative: a centre, or no point.
    Buffer<float> nearest_;
    Buffer<int64_t> seen_;   // of every block: number of centres met
    Buffer<uint64_t> rank_;  // of every block: the highest of its points, from nearest_
    Buffer<uint64_t> group_rank_;
    Buffer<int64_t> todo_;
    Buffer<float> centre_heads_;
    int64_t* index_;
    int64_t centres_ = 0;
    float tolerance_ = 0;
    uint64_t farthest_ = 0;  // the highest rank among points that have met every centre
};

bool KCenter::prepare(Progress progress, int64_t total) {
    Buffer<float> scratch(threads_ * Head::kRows * head_.stride());
    constexpr int64_t kPart = 1 << 17;
    float largest = 0;
    for (int64_t start = 0; start < n_; start += kPart) {
        const int64_t stop = start + kPart < n_ ? start + kPart : n_;
#pragma omp parallel for num_threads(threads_) schedule(static) reduction(max : largest)
        for (int64_t i = start; i < stop; i += Head::kRows) {
            const int count = stop - i < Head::kRows ? static_cast<int>(stop - i) : Head::kRows;
            const float far =
                head_.compute(points_ + i * dim_, count, heads_.data() + i * kHead,
                              scratch.data() + omp_get_thread_num() * Head::kRows * head_.stride());
            if (far > largest) largest = far;
        }
        if (!progress.step(progress.user, 0, total)) return false;
    }
    const float error = head_.error(std::sqrt(largest));
    tolerance_ = error * error * (1 + 1 / kSlack) + 1e-37f;  // and where squares are subnormal
    sort_into_blocks();
    return progress.step(progress.user, 0, total);
}

void KCenter::sort_into_blocks() {
    const int64_t rows = blocks_ * kBlock;
    {
        Buffer<Item> items(n_);
        for (int64_t i = 0; i < n_; ++i) items[i].point = static_cast<uint32_t>(i);
#pragma omp parallel num_threads(threads_)
#pragma omp single
        build_tree(heads_.data(), items.data(), n_);
        for (int64_t row = 0; row < n_; ++row) point_[row] = items[row].point;
    }
    for (int64_t row = 0; row < n_; ++row) nearest_[row] = -1;  // not placed yet
    for (int64_t row = 0; row < n_; ++row)
        if (nearest_[row] < 0) place(row);
    for (int64_t row = n_; row < rows; ++row) {
        nearest_[row] = -1;
        point_[row] = 0;
        std::memset(heads_.data() + row * kHead, 0, kHead * sizeof(float));
    }
    for (int64_t b = 0; b < blocks_; ++b) {
        seen_[b] = 0;
        refresh_rank(b);
    }
    for (int64_t g = 0; g < groups_; ++g) group_rank_[g] = ~uint64_t{0};
}

// Follows one cycle of the permutation, so that heads move in place.
void KCenter::place(int64_t row) {
    float first[kHead];
    std::memcpy(first, heads_.data() + row * kHead, sizeof first);
    for (int64_t to = row;;) {
        const int64_t from = point_[to];
        nearest_[to] = INFINITY;
        if (from == row) {
            std::memcpy(heads_.data() + to * kHead, first, sizeof first);
            return;
        }
        std::memcpy(heads_.data() + to * kHead, heads_.data() + from * kHead, sizeof first);
        to = from;
    }
}

uint64_t KCenter::add_centre(uint64_t rank) {
    const uint32_t point = 0xffffffffu - static_cast<uint32_t>(rank);
    for (int64_t g = 0; g < groups_; ++g) {
        if (group_rank_[g] < rank) continue;
        const int64_t stop = (g + 1) * kGroup < blocks_ ? (g + 1) * kGroup : blocks_;
        for (int64_t b = g * kGroup; b < stop; ++b) {
            if (rank_[b] < rank) continue;
            for (int64_t row = b * kBlock; row < (b + 1) * kBlock; ++row)
                if (point_[row] == point && nearest_[row] >= 0) {
                    nearest_[row] = -1;
                    std::memcpy(centre_heads_.data() + centres_ * kHead,
                                heads_.data() + row * kHead, kHead * sizeof(float));
                    refresh_rank(b);
                }
        }
    }
    index_[centres_++] = point;

    // The likeliest group sets a mark; whatever still ranks above it has to meet the new centres.
    farthest_ = 0;
    int64_t top = 0;
    for (int64_t g = 1; g < groups_; ++g)
        if (group_rank_[g] > group_rank_[top]) top = g;
    visit_group(top);
    int64_t count = 0;
    for (int64_t g = 0; g < groups_; ++g)
        if (group_rank_[g] > farthest_) todo_[count++] = g;
#pragma omp parallel for num_threads(threads_) schedule(dynamic, 1) if (count > threads_)
    for (int64_t i = 0; i < count; ++i) visit_group(todo_[i]);
    return farthest_;
}

void KCenter::visit_group(int64_t group) {
    const int64_t stop = (group + 1) * kGroup < blocks_ ? (group + 1) * kGroup : blocks_;
    uint64_t highest = 0;
    for (int64_t b = group * kGroup; b < stop; ++b) {
        if (rank_[b] > farthest()) visit(b);
        if (rank_[b] > highest) highest = rank_[b];
    }
    group_rank_[group] = highest;
}

// Shows the block the centres it missed, until it has seen all or can no longer be the farthest.
void KCenter::visit(int64_t block) {
    alignas(64) float half_heads[kHalf * kBlock];
    for (int64_t l = 0; l < kBlock; ++l)
        for (int64_t j = 0; j < kHalf; ++j)
            half_heads[j * kBlock + l] = heads_.data()[(block * kBlock + l) * kHead + j];
    while (seen_[block] < centres_ && rank_[block] > farthest()) {
        const int64_t missed = centres_ - seen_[block], count = missed < kChunk ? missed : kChunk;
        const bool closer = meet(block, half_heads, count);
        seen_[block] += count;
        if (closer) refresh_rank(block);
    }
    if (seen_[block] < centres_) return;
    uint64_t known = farthest();
    while (rank_[block] > known &&
           !__atomic_compare_exchange_n(&farthest_, &known, rank_[block], true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
}

// Lowers nearest_ of a block by its next `count` centres; true if anything changed.
bool KCenter::meet(int64_t block, const float* half_heads, int64_t count) {
    alignas(64) float bound[kChunk * kBlock], lowest[kBlock];
    const float* centres = centre_heads_.data() + seen_[block] * kHead;
    for (int64_t v = 0; v < kBlock; v += kLanes) {
        Vec least = broadcast(INFINITY);
        for (int64_t c = 0; c < count; ++c) {
            Vec even{}, odd{};
#pragma GCC unroll 32
            for (int64_t j = 0; j < kHalf; j += 2) {
                const Vec d = load(half_heads + j * kBlock + v) - centres[c * kHead + j];
                const Vec e = load(half_heads + (j + 1) * kBlock + v) - centres[c * kHead + j + 1];
                even += d * d;
                odd += e * e;
            }
            even += odd;
            store(bound + c * kBlock + v, even);
            least = even < least ? even : least;
        }
        store(lowest + v, least);
    }

    bool closer = false;
    for (int64_t l = 0; l < kBlock; ++l) {
        const int64_t row = block * kBlock + l;
        float nearest = nearest_[row];
        float limit = nearest * (1 + kSlack) + tolerance_;
        if (!(nearest > 0 && lowest[l] < limit)) continue;

        // The whole head, for the centres that its first half leaves.
        const float* head = heads_.data() + row * kHead;
        int64_t left[kChunk], n_left = 0, likeliest = 0;
        float tighter[kChunk];
        for (int64_t c = 0; c < count; ++c) {
            if (!(bound[c * kBlock + l] < limit)) continue;
            const float* centre = centres + c * kHead;
            Vec total{};
            for (int64_t j = kHalf; j < kHead; j += kLanes) {
                const Vec d = load(head + j) - load(centre + j);
                total += d * d;
            }
            const float residual = head[kHalf - 1] - centre[kHalf - 1];
            const float b = bound[c * kBlock + l] - residual * residual + tree_sum(total);
            if (!(b < limit)) continue;
            tighter[n_left] = b;
            left[n_left] = c;
            if (b < tighter[likeliest]) likeliest = n_left;
            ++n_left;
        }

        const float* x = points_ + int64_t{point_[row]} * dim_;
        const auto measure = [&](int64_t i) {
            const int64_t centre = index_[seen_[block] + left[i]];
            const float d = squared_distance(x, points_ + centre * dim_, dim_, nearest);
            if (!(d < nearest)) return;
            nearest = d;
            limit = nearest * (1 + kSlack) + tolerance_;
        };
        if (n_left > 0) measure(likeliest);
        for (int64_t i = 0; i < n_left; ++i)
            if (tighter[i] < limit && i != likeliest) measure(i);
        closer |= nearest < nearest_[row];
        nearest_[row] = nearest;
    }
    return closer;
}

void KCenter::refresh_rank(int64_t block) {
    uint64_t highest = 0;
    for (int64_t row = block * kBlock; row < (block + 1) * kBlock; ++row) {
        if (nearest_[row] < 0) continue;
        const uint64_t rank = rank_of(nearest_[row], point_[row]);
        if (rank > highest) highest = rank;
    }
    rank_[block] = highest;
}

}  // namespace

bool farthest_first(const float* points, int64_t n, int64_t dim, int64_t n_centroids, int64_t first,
                    const float* mean, const float* axes, int64_t* index, float* radius,
                    Progress progress, int threads) {
    if (n * dim < kSmall) threads = 1;
    KCenter k_center(points, n, dim, n_centroids, mean, axes, index, threads);
    if (!k_center.prepare(progress, n_centroids)) return false;
    uint64_t rank = k_center.rank_of_point(first);
    double reported = omp_get_wtime();
    for (int64_t k = 0; k < n_centroids; ++k) {
        rank = k_center.add_centre(rank);
        const uint32_t bits = static_cast<uint32_t>(rank >> 32);
        float squared;
        std::memcpy(&squared, &bits, sizeof squared);
        radius[k] = std::sqrt(squared);
        if (omp_get_wtime() - reported < kReportSeconds) continue;
        if (!progress.step(progress.user, k + 1, n_centroids)) return false;
        reported = omp_get_wtime();
    }
    return progress.step(progress.user, n_centroids, n_centroids);
}

}  // namespace npad::cpu::NPAD_ISA
