// Lower bounds of half squared distances from sketches, 16 centroids at a time: products of
// unsigned bytes (centroids) and signed ones (embeddings), four to a word. For AVX2 and AVX-512.
#pragma once

#include "sketch.h"

namespace npad::cpu::NPAD_ISA {

// sums + u0 s0 + u1 s1 + u2 s2 + u3 s3 in every lane, by the instruction of AVX512-VNNI and
// AVX-VNNI. Assembler, so that this one kernel of an instruction set uses it, not all.
struct DotVnni {
    static constexpr int64_t kSteps = 127;
    static IntRegister add(IntRegister sums, IntRegister u, IntRegister s) {
#if defined(__AVX512F__)
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u), "v"(s));
#else
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(u), "x"(s));
#endif
        return sums;
    }
};

// The same in three instructions. Pairs are summed in 16 bits: 2 * 255 * 63 still fits.
struct DotPairs {
    static constexpr int64_t kSteps = 63;
    static IntRegister add(IntRegister sums, IntRegister u, IntRegister s) {
#if defined(__AVX512F__)
        const __m512i pairs =
            _mm512_maddubs_epi16(reinterpret_cast<__m512i>(u), reinterpret_cast<__m512i>(s));
        return sums + reinterpret_cast<IntRegister>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#else
        const __m256i pairs =
            _mm256_maddubs_epi16(reinterpret_cast<__m256i>(u), reinterpret_cast<__m256i>(s));
        return sums + reinterpret_cast<IntRegister>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
    }
};

// Bit l is set where a[l] <= b[l].
inline uint32_t at_most(const float* a, const float* b) {
    uint32_t bits = 0;
    for (int64_t l = 0; l < kTile; l += kRegister) {
#if defined(__AVX512F__)
        const __mmask16 m =
            _mm512_cmp_ps_mask(_mm512_loadu_ps(a + l), _mm512_loadu_ps(b + l), _CMP_LE_OQ);
        bits |= static_cast<uint32_t>(m) << l;
#else
        const __m256 m = _mm256_cmp_ps(_mm256_loadu_ps(a + l), _mm256_loadu_ps(b + l), _CMP_LE_OQ);
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(m)) << l;
#endif
    }
    return bits;
}

// A tile of embeddings as the products take it.
struct Query {
    const int32_t* words;  // (groups, kTile)
    int64_t groups;
    Sketcher::Tile tile;
    int32_t start[kTile];  // of every sum: less what the 128 added to centroids contribute
};

// || c ||^2 / 2 - x . c at least, for registers of either
inline Register bound(IntRegister sums, Register half_norm, Register centroid_step,
                      Register centroid_residual, Register step, Register residual) {
    const Register product = step * __builtin_convertvector(sums, Register);
    return half_norm - residual * centroid_residual - product * centroid_step;
}

inline int32_t load_word(const float* words, int64_t i) {
    int32_t word;
    std::memcpy(&word, words + i, sizeof word);
    return word;
}
inline IntRegister load_words(const void* p) {
    IntRegister r;
    std::memcpy(&r, p, sizeof r);
    return r;
}

// Lowers least (kTile) by the bounds of 16 centroids.
template <class Dot>
void least_bounds(const float* panel, const Query& query, float* least) {
    constexpr int64_t kPart = kRegister >= 16 ? 8 : 4;  // centroids whose sums fit in registers
    Register least0 = INFINITY - Register{}, least1 = least0;
    const IntRegister start0 = load_words(query.start),
                      start1 = load_words(query.start + kRegister);
    for (int64_t part = 0; part < kSketchPanel; part += kPart) {
        IntRegister sums[kPart][2];
#pragma GCC unroll 8
        for (int64_t i = 0; i < kPart; ++i) sums[i][0] = start0, sums[i][1] = start1;
        const float* words = panel + IndexLayout::kWords + part;
        for (int64_t g = 0; g < query.groups; ++g) {
            const IntRegister x0 = load_words(query.words + g * kTile),
                              x1 = load_words(query.words + g * kTile + kRegister);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kPart; ++i) {
                const IntRegister c = load_word(words, g * kSketchPanel + i) - IntRegister{};
                sums[i][0] = Dot::add(sums[i][0], c, x0);
                sums[i][1] = Dot::add(sums[i][1], c, x1);
            }
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < kPart; ++i) {
            const float* of = panel + part + i;
            const Register half_norm = of[0] - Register{},
                           step = of[IndexLayout::kStep] - Register{},
                           residual = of[IndexLayout::kResidual] - Register{};
            const auto& tile = query.tile;
            const Register s0 = bound(sums[i][0], half_norm, step, residual,
                                      load_register(tile.step), load_register(tile.residual));
            const Register s1 =
                bound(sums[i][1], half_norm, step, residual, load_register(tile.step + kRegister),
                      load_register(tile.residual + kRegister));
            least0 = s0 < least0 ? s0 : least0;
            least1 = s1 < least1 ? s1 : least1;
        }
    }
    store_register(least, least0);
    store_register(least + kRegister, least1);
}

// bounds (kSketchPanel) of one embedding of the tile
template <class Dot>
void bounds_of_one(const float* panel, const Query& query, int64_t lane, float* bounds) {
    constexpr int64_t kChains = 4;  // independent sums hide the latency of a product
    for (int64_t i = 0; i < kSketchPanel; i += kRegister) {
        IntRegister sums[kChains] = {query.start[lane] - IntRegister{}};
        const float* words = panel + IndexLayout::kWords + i;
        for (int64_t g = 0; g < query.groups; g += kChains)
#pragma GCC unroll 4
            for (int64_t chain = 0; chain < kChains; ++chain) {
                const int64_t at = g + chain;
                if (at < query.groups)
                    sums[chain] = Dot::add(sums[chain], load_words(words + at * kSketchPanel),
                                           query.words[at * kTile + lane] - IntRegister{});
            }
        store_register(
            bounds + i,
            bound((sums[0] + sums[1]) + (sums[2] + sums[3]), load_register(panel + i),
                  load_register(panel + IndexLayout::kStep + i),
                  load_register(panel + IndexLayout::kResidual + i),
                  query.tile.step[lane] - Register{}, query.tile.residual[lane] - Register{}));
    }
}

}  // namespace npad::cpu::NPAD_ISA
