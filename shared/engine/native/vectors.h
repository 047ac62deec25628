// Vectors of 16 lanes by the compiler's own extension, so that the same source suits every processor; bf16 as the upper
// half of a float. Where a compiler or a processor knows better (AVX-512), there is a second way.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int LANES = 16;
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint16_t shorts __attribute__((vector_size(64)));

struct bf16 {
    uint16_t bits;
};

static inline floats splat(float value) { return value - floats{}; }

static inline floats load(const float* from) {
    floats lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static inline words wide(halves narrow) {
#ifdef __AVX512F__
    return (words)_mm512_cvtepu16_epi32((__m256i)narrow);
#else
    return __builtin_convertvector(narrow, words);
#endif
}

static inline floats load(const bf16* from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(wide(bits) << 16);
}

static inline void store(float* to, floats lanes) { memcpy(to, &lanes, sizeof lanes); }

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline void store(bf16* to, floats lanes) {
#ifdef __AVX512BF16__
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)lanes);
#else
    const words bits = (words)lanes;
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const halves narrow = __builtin_convertvector(lanes == lanes ? rounded : words{} + 0x7fc0, halves);
#endif
    memcpy(to, &narrow, sizeof narrow);
}

static inline float widen(float value) { return value; }

static inline float widen(bf16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline void narrow(float* to, float value) { *to = value; }

static inline void narrow(bf16* to, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    to->bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// The first `count` elements, if fewer than 16 are left.
template <class T>
static inline floats load_some(const T* from, long count) {
    if (count >= LANES) return load(from);
    floats lanes{};
    for (long i = 0; i < count; i++) lanes[i] = widen(from[i]);
    return lanes;
}

template <class T>
static inline void store_some(T* to, long count, floats lanes) {
    if (count >= LANES) return store(to, lanes);
    for (long i = 0; i < count; i++) narrow(to + i, lanes[i]);
}

// What values become by being stored.
static inline floats rounded(float, floats lanes) { return lanes; }

static inline floats rounded(bf16, floats lanes) {
#ifdef __AVX512BF16__
    return (floats)(wide((halves)_mm512_cvtneps_pbh((__m512)lanes)) << 16);
#else
    bf16 stored[LANES];
    store(stored, lanes);
    return load(stored);
#endif
}

static inline floats select(ints condition, floats yes, floats no) {
    return condition ? yes : no;
}

// Lane i of the result is lane i + distance (mod 16).
template <int DISTANCE>
static inline floats turned(floats lanes) {
    ints from = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(lanes, (from + DISTANCE) & 15);
}

static inline float sum(floats lanes) {
    lanes += turned<8>(lanes);
    lanes += turned<4>(lanes);
    lanes += turned<2>(lanes);
    lanes += turned<1>(lanes);
    return lanes[0];
}

static inline floats larger(floats a, floats b) { return a > b ? a : b; }

static inline floats smaller(floats a, floats b) { return a < b ? a : b; }

static inline float largest(floats lanes) {
    lanes = larger(lanes, turned<8>(lanes));
    lanes = larger(lanes, turned<4>(lanes));
    lanes = larger(lanes, turned<2>(lanes));
    lanes = larger(lanes, turned<1>(lanes));
    return lanes[0];
}

// `times` 2 to the power of n, an integer of at least -126.
static inline floats power_of_2(floats n, floats times) {
#ifdef __AVX512F__
    return (floats)_mm512_scalef_ps((__m512)times, (__m512)n);
#else
    return times * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
#endif
}

// e to the power of x, within 2 units of the last place: 2^n times a polynomial (Cephes, expf). Below -87 it is 0, above
// 88 it is e^88.
static inline floats exponential(floats x) {
    const floats clamped = larger(splat(-87.0f), smaller(splat(88.0f), x));  // in this order NaN stays NaN
    const floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const floats n = clamped * 1.44269504088896341f + magic - magic;
    const floats r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return select(x < -87.0f, floats{}, power_of_2(n, p));
}
