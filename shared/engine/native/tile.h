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
    static inline Sums dot(Sums sums, const words& some, const words& others) {
        return sums + (floats)some * (floats)others;
    }
    static inline void together(words (&)[STEP]) {}
    static inline void apart(floats (&)[STEP]) {}
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
    static inline Sums dot(Sums sums, const words& some, const words& others) {
#ifdef __AVX512BF16__
        return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)some, (__m512bh)others);
#else
        return sums + (floats)(some << 16) * (floats)(others << 16) +
               (floats)(some & 0xffff0000u) * (floats)(others & 0xffff0000u);
#endif
    }
    // Two rows of 32 elements, so that one above the other they are a word: 4 columns of every 8 in the first vector, the
    // others in the second. That is what the processor does in one instruction each.
    static inline void together(words (&rows)[STEP]) {
        const shorts low = {0,  32, 1,  33, 2,  34, 3,  35, 8,  40, 9,  41, 10, 42, 11, 43,
                            16, 48, 17, 49, 18, 50, 19, 51, 24, 56, 25, 57, 26, 58, 27, 59};
        const shorts first = (shorts)rows[0], second = (shorts)rows[1];
        rows[0] = (words)__builtin_shuffle(first, second, low);
        rows[1] = (words)__builtin_shuffle(first, second, low + 4);
    }
    // Sums of such columns in the order of the columns.
    static inline void apart(floats (&parts)[STEP]) {
        const ints first = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
        const floats low = parts[0], high = parts[1];
        parts[0] = __builtin_shuffle(low, high, first);
        parts[1] = __builtin_shuffle(low, high, first + 8);
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
