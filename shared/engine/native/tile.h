// A few rows times a panel of 32 columns: the inner loop of linears and of prefill's attention. Elements are taken as
// words of 32 bits, one or several of them, so that a panel of words has a word of each column side by side.
#pragma once

#include "vectors.h"

constexpr int PANEL = 2 * LANES;
constexpr int MAX_ROWS = 12;

// What is fetched before it is needed. With few rows a step is as fast as memory, and what comes goes straight to the
// first cache. With more there is time to multiply in, and the second cache holds what comes from further ahead without
// driving rows out of the first; that also brings the next panel while the last rows take this one.
constexpr int FEW_ROWS = 5;
constexpr int AHEAD = 4096, FAR_AHEAD = 8192;  // bytes

template <int ROWS>
static inline void fetch(const void* address) {
    if constexpr (ROWS <= FEW_ROWS) {
        __builtin_prefetch((const char*)address + AHEAD, 0, 3);
    } else {
        __builtin_prefetch((const char*)address + FAR_AHEAD, 0, 2);
    }
}

// How a step multiplies: `STEP` input features at a time, one word of 32 bits a lane.
struct Float {
    typedef float Element;
    typedef floats Sums;
    static constexpr int STEP = 1;
    static inline Sums multiply(Sums sums, uint32_t row, const words& weights) {
        float value;
        memcpy(&value, &row, sizeof value);
        return sums + value * (floats)weights;
    }
};

struct BFloat {
    typedef bf16 Element;
    typedef floats Sums;
    static constexpr int STEP = 2;
    static inline Sums multiply(Sums sums, uint32_t row, const words& weights) {
#ifdef __AVX512BF16__
        return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(words{} + row), (__m512bh)weights);
#else
        uint32_t low = row << 16, high = row & 0xffff0000u;
        float first, second;
        memcpy(&first, &low, sizeof first);
        memcpy(&second, &high, sizeof second);
        return sums + first * (floats)(weights << 16) + second * (floats)(weights & 0xffff0000u);
#endif
    }
};

// Quantised rows are unsigned (offset 128), weights signed; four of them a word.
struct Int8 {
    typedef uint8_t Element;
    typedef ints Sums;
    static constexpr int STEP = 4;
    static inline Sums multiply(Sums sums, uint32_t row, const words& weights) {
#ifdef __AVX512VNNI__
        return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)(words{} + row), (__m512i)weights);
#else
        for (int byte = 0; byte < 4; byte++) {
            const int shift = 24 - 8 * byte;
            sums += (int32_t)((row >> (8 * byte)) & 255) * ((ints)(weights << shift) >> 24);
        }
        return sums;
#endif
    }
};

// `ROWS` rows of `steps` words each, times one panel.
template <class Kind, int ROWS>
static inline void tile(
    const uint32_t* rows, long row_words, const uint32_t* panel, long steps, typename Kind::Sums (&sums)[ROWS][2]) {
    for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = typename Kind::Sums{};
    for (long step = 0; step < steps; step++, panel += PANEL) {
        words left, right;
        memcpy(&left, panel, sizeof left);
        memcpy(&right, panel + LANES, sizeof right);
        fetch<ROWS>(panel);
        fetch<ROWS>(panel + LANES);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++) {
            const uint32_t word = rows[row * row_words + step];
            sums[row][0] = Kind::multiply(sums[row][0], word, left);
            sums[row][1] = Kind::multiply(sums[row][1], word, right);
        }
    }
}
