// Warp functions: the lanes that the mask names meet at one call, and the last one works for all.
#include <bit>

#include "emulator.h"

namespace simt {

namespace {

template <typename T>
using Lanes = std::array<T*, kWarp>;  // null where the mask has no bit

Fiber* lane_of_warp(int lane) {
    const std::vector<Fiber*>& fibers = g_current->block->fibers;
    const size_t index = static_cast<size_t>(g_current->index / kWarp * kWarp + lane);
    return index < fibers.size() ? fibers[index] : nullptr;
}

template <typename T>
void meet(const char* name, unsigned mask, T* mine, const Where& where,
          void (*work)(const Lanes<T>&)) {
    Fiber& f = *g_current;
    const auto misuse = [&](const std::string& what) {
        fail(std::string(name) + " with a mask that " + what + ", at " + text(where));
    };
    if (!(mask >> lane() & 1)) misuse("does not name the calling lane");
    f.mask = mask;
    f.payload = mine;
    f.waits_at = name;
    f.where = where;
    Lanes<T> lanes{};
    bool all = true;
    for (int l = 0; l < kWarp; ++l) {
        if (!(mask >> l & 1)) continue;
        const Fiber* other = lane_of_warp(l);
        if (!other) misuse("names lane " + std::to_string(l) + ", beyond the block");
        if (other->state == State::kReturned)
            misuse("names lane " + std::to_string(l) + ", which has returned");
        lanes[l] = static_cast<T*>(other->payload);
        if (other == &f) continue;
        if (waits_with(*other, f))
            check_place(name, where, *other);
        else
            all = false;
    }
    if (!all) return wait(State::kWarp, name, where);
    work(lanes);
    for (int l = 0; l < kWarp; ++l)
        if (lanes[l]) lane_of_warp(l)->state = State::kReady;
    wait(State::kReady, name, where);  // for its turn
}

struct Shuffle {
    uint64_t value, result;
    int source;
};

struct Ballot {
    bool value;
    unsigned result;
};

struct Reduce {
    Reduction op;
    int64_t value, result;
};

struct Product {
    Element type;
    float (*c)[4];
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
};

int64_t combine(Reduction op, int64_t a, int64_t b) {
    if (op == Reduction::kAdd) return a + b;
    if (op == Reduction::kMin) return std::min(a, b);
    if (op == Reduction::kMax) return std::max(a, b);
    if (op == Reduction::kAnd) return a & b;
    if (op == Reduction::kOr) return a | b;
    return a ^ b;
}

// Elements of one word of a fragment; returns how many.
int decode(Element type, uint32_t word, double out[2]) {
    const unsigned short lower = word & 0xffff, upper = word >> 16;
    if (type == Element::kTf32) {
        out[0] = __uint_as_float(word & 0xffffe000);
        return 1;
    }
    const bool half = type == Element::kFloat16;
    out[0] = half ? __half2float({lower}) : __bfloat162float({lower});
    out[1] = half ? __half2float({upper}) : __bfloat162float({upper});
    return 2;
}

int exponent(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023; }

// c += a . b as the tensor cores of sm_80 to sm_89 do it: all terms are cut to multiples of 2^-24
// of the power of two in the largest, what is left is added exactly and cut to 24 bits (M. Fasi, N.
// Higham, M. Mikaitis, S. Pranesh 2021; F. Khattak, M. Mikaitis 2025). From sm_90 on they keep one
// bit more and cut half as often. Inputs below 2^least are subnormal.
void add_products(const double* a, const double* b, int depth, int least, float& c) {
    constexpr int kFractionBits = 24;
    int largest = std::max(exponent(c), -126);
    double plain = c;
    for (int k = 0; k < depth; ++k) {
        plain += a[k] * b[k];
        if (a[k] != 0 && b[k] != 0)
            largest = std::max(largest,
                               std::max(exponent(a[k]), least) + std::max(exponent(b[k]), least));
    }
    if (!std::isfinite(plain)) {
        c = static_cast<float>(plain);
        return;
    }
    const double unit = std::ldexp(1.0, largest - kFractionBits);
    int64_t units = static_cast<int64_t>(c / unit);
    for (int k = 0; k < depth; ++k) units += static_cast<int64_t>(a[k] * b[k] / unit);
    const double sum = static_cast<double>(units) * unit;
    c = static_cast<float>(sum);
    if (std::abs(c) > std::abs(sum) && std::abs(sum) < 0x1p128) c = std::nextafter(c, 0.0f);
}

// The matrices are put together from the fragments, multiplied, and dealt out again.
void multiply(const Lanes<Product>& lanes) {
    double a[16][16], b[8][16];  // rows of a, columns of b
    int n = 1;                   // elements of a word
    for (int l = 0; l < kWarp; ++l) {
        const Product& p = *lanes[l];
        const int g = l / 4, t = l % 4;
        double pair[2];
        for (int i = 0; i < 4; ++i) {
            n = decode(p.type, (*p.a)[i], pair);
            for (int e = 0; e < n; ++e) a[g + i % 2 * 8][(t + i / 2 * 4) * n + e] = pair[e];
        }
        for (int i = 0; i < 2; ++i) {
            decode(p.type, (*p.b)[i], pair);
            for (int e = 0; e < n; ++e) b[g][(t + i * 4) * n + e] = pair[e];
        }
    }
    const int least = lanes[0]->type == Element::kFloat16 ? -14 : -126;
    for (int l = 0; l < kWarp; ++l)
        for (int i = 0; i < 4; ++i) {
            float& c = (*lanes[l]->c)[i];
            for (int k = 0; k < 8 * n; k += 4 * n)  // half the depth at a time
                add_products(a[l / 4 + i / 2 * 8] + k, b[l % 4 * 2 + i % 2] + k, 4 * n, least, c);
        }
}

int64_t reduce_wide(const char* name, unsigned mask, Reduction op, int64_t value, Where where) {
    Reduce mine{op, value, value};
    meet<Reduce>(name, mask, &mine, where, [](const Lanes<Reduce>& lanes) {
        const Reduce* last = nullptr;
        for (Reduce* r : lanes) {
            if (r && last) r->result = combine(r->op, last->result, r->value);
            if (r) last = r;
        }
        for (Reduce* r : lanes)
            if (r) r->result = last->result;
    });
    return mine.result;
}

}  // namespace

bool waits_with(const Fiber& a, const Fiber& b) {
    return a.state == State::kWarp && a.mask == b.mask && !std::strcmp(a.waits_at, b.waits_at);
}

// Of the warp functions it alone orders accesses to memory.
void warp_barrier(unsigned mask, Where where) {
    meet<Fiber>("__syncwarp", mask, g_current, where, [](const Lanes<Fiber>& lanes) {
        ++g_time;
        std::array<uint32_t, kWarp> seen{};
        for (const Fiber* f : lanes)
            for (int l = 0; f && l < kWarp; ++l) seen[l] = std::max(seen[l], f->seen[l]);
        for (int l = 0; l < kWarp; ++l)
            if (lanes[l]) seen[l] = g_time;
        for (Fiber* f : lanes)
            if (f) f->seen = seen;
    });
}

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source, Where where) {
    if (!(mask >> source & 1))
        fail(std::string(name) + " reads lane " + std::to_string(source) +
             ", which the mask does not name, at " + text(where));
    Shuffle mine{value, 0, source};
    meet<Shuffle>(name, mask, &mine, where, [](const Lanes<Shuffle>& lanes) {
        for (Shuffle* s : lanes)
            if (s) s->result = lanes[s->source]->value;
    });
    return mine.result;
}

unsigned ballot(const char* name, unsigned mask, bool value, Where where) {
    Ballot mine{value, 0};
    meet<Ballot>(name, mask, &mine, where, [](const Lanes<Ballot>& lanes) {
        unsigned bits = 0;
        for (int l = 0; l < kWarp; ++l)
            if (lanes[l]) bits |= unsigned{lanes[l]->value} << l;
        for (Ballot* b : lanes)
            if (b) b->result = bits;
    });
    return mine.result;
}

unsigned reduce(const char* name, unsigned mask, Reduction op, unsigned value, Where where) {
    return static_cast<unsigned>(reduce_wide(name, mask, op, value, where));
}
int reduce(const char* name, unsigned mask, Reduction op, int value, Where where) {
    return static_cast<int>(reduce_wide(name, mask, op, value, where));
}

void mma(Element type, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
    Product mine{type, &c, &a, &b};
    meet<Product>("mma", 0xffffffff, &mine, where, multiply);
}

}  // namespace simt
