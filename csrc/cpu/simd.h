// Vectors, loads and scratch memory for the CPU kernels. Every csrc/cpu/<op>.cpp is compiled once
// per instruction set, with NPAD_ISA naming the namespace that its functions live in. Templates of
// the standard library stay out of these files: the linker merges equal symbols, and a copy
// compiled for AVX-512 must never run on a processor without it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace npad::cpu::NPAD_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#else
inline constexpr int kLanes = 8;  // without AVX the compiler splits a vector into two registers
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Vec8 __attribute__((vector_size(8 * sizeof(float))));
typedef uint32_t Bits8 __attribute__((vector_size(8 * sizeof(uint32_t))));
typedef uint16_t Half8 __attribute__((vector_size(8 * sizeof(uint16_t))));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// To an address that is aligned to a whole vector, past the caches: for what is too large for them.
// store_fence() comes after the last.
inline void store_past_caches(float* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
    store(p, v);
#endif
}
inline void store_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}
// The first n lanes, zeros behind them.
inline Vec load_first(const float* p, int64_t n) {
    if (n >= kLanes) return load(p);
    Vec v = {};
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
}
inline Vec broadcast(float s) { return s - Vec{}; }
inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

typedef int32_t Lanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Where the lanes of two rows go whose blocks of `step` lanes trade places.
struct Trade {
    alignas(64) int32_t upper[kLanes], lower[kLanes];

    constexpr explicit Trade(int step) : upper(), lower() {
        for (int i = 0; i < kLanes; ++i) {
            upper[i] = (i & step) != 0 ? kLanes + i - step : i;
            lower[i] = (i & step) != 0 ? kLanes + i : i + step;
        }
    }
};

template <int kStep>
inline void trade(Vec (&rows)[kLanes]) {
    static constexpr Trade kTrade(kStep);
    Lanes upper, lower;
    std::memcpy(&upper, kTrade.upper, sizeof upper);
    std::memcpy(&lower, kTrade.lower, sizeof lower);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
        if ((i & kStep) == 0) {
            const Vec a = rows[i], b = rows[i + kStep];
            rows[i] = __builtin_shuffle(a, b, upper);
            rows[i + kStep] = __builtin_shuffle(a, b, lower);
        }
    if constexpr (kStep > 1) trade<kStep / 2>(rows);
}

// rows[i][j] <-> rows[j][i]: blocks of half, a quarter, ... of the lanes trade places.
inline void transpose(Vec (&rows)[kLanes]) { trade<kLanes / 2>(rows); }

inline Vec8 load8(const float* p) {
    Vec8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store8(float* p, Vec8 v) { std::memcpy(p, &v, sizeof v); }
// The i-th eight lanes.
inline Vec8 part8(Vec v, int i) {
    Vec8 part;
    std::memcpy(&part, reinterpret_cast<const float*>(&v) + 8 * i, sizeof part);
    return part;
}

// Storage types, widened to float32 when loaded. Of those of 16 bits, the bits.
struct Int8 {
    int8_t value;
};
struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

inline Bits8 widen_bits(const void* p) {
    Half8 h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Bits8);
}
inline Vec8 load8(const Int8* p) {
#if defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<Vec8>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    Vec8 v;
    for (int i = 0; i < 8; ++i) v[i] = p[i].value;
    return v;
#endif
}
inline Vec8 load8(const BFloat16* p) { return reinterpret_cast<Vec8>(widen_bits(p) << 16); }
inline Vec8 load8(const Float16* p) {
#if defined(__F16C__)
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec8>(_mm256_cvtph_ps(h));
#else
    // Exponent and mantissa moved into place and rebiased by a product, which also gets subnormals
    // right; infinity and NaN keep an exponent of all ones.
    const Bits8 h = widen_bits(p);
    const Bits8 magnitude = (h & 0x7fff) << 13;
    Bits8 f = reinterpret_cast<Bits8>(reinterpret_cast<Vec8>(magnitude) * 0x1p112f);
    const Bits8 special = reinterpret_cast<Bits8>(magnitude >= (0x7c00u << 13));
    f = (f & ~special) | ((magnitude | 0x7f800000u) & special);
    return reinterpret_cast<Vec8>(f | ((h & 0x8000) << 16));
#endif
}

// One column of as many neighbouring panels as a vector holds.
template <class T>
inline Vec load_panels(const T* const* panel) {
#if defined(__AVX512F__)
    const Vec8 low = load8(panel[0]), high = load8(panel[1]);
    return reinterpret_cast<Vec>(_mm512_insertf32x8(
        _mm512_castps256_ps512(reinterpret_cast<__m256>(low)), reinterpret_cast<__m256>(high), 1));
#else
    return load8(panel[0]);
#endif
}

#if defined(__AVX512F__)
inline Vec load_panels(const Int8* const* panel) {
    int64_t low, high;
    std::memcpy(&low, panel[0], sizeof low);
    std::memcpy(&high, panel[1], sizeof high);
    // With a mask of all lanes, since gcc 12 warns of what the plain intrinsics leave undefined.
    const __m512i words = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_set_epi64x(high, low));
    return __builtin_convertvector(reinterpret_cast<Lanes>(words), Vec);
}
#endif

// As many neighbours as a vector holds.
template <class T>
inline Vec load(const T* p) {
    const T* const eights[] = {p, p + kLanes - 8};
    return load_panels(eights);
}

// 64-byte aligned scratch memory, not initialised.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(
              std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64))) {
        if (data_ == nullptr && count > 0) throw std::bad_alloc();
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    T* data() { return data_; }
    T& operator[](int64_t i) { return data_[i]; }

  private:
    T* data_;
};

}  // namespace npad::cpu::NPAD_ISA
