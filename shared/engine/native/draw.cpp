// The draw of `sampler.py`: the likeliest token after Gumbel noise (`noise.py`) was added. Scores come fast and within
// MARGIN first; those that may be the highest are then computed exactly, so the token is the one that `noise.py` gives.
#include "vectors.h"

namespace {

constexpr long WIDE = 8;
typedef uint64_t longs __attribute__((vector_size(64)));
typedef int64_t slongs __attribute__((vector_size(64)));
typedef double doubles __attribute__((vector_size(64)));
typedef float narrows __attribute__((vector_size(32)));
typedef int32_t inarrows __attribute__((vector_size(32)));

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull, MIX_1 = 0xBF58476D1CE4E5B9ull, MIX_2 = 0x94D049BB133111EBull;
constexpr float MARGIN = 1e-2f;

template <class Bits>
static inline Bits mixed(Bits bits) {
    bits = (bits ^ (bits >> 30)) * MIX_1;
    bits = (bits ^ (bits >> 27)) * MIX_2;
    return bits ^ (bits >> 31);
}

static double exact_noise(uint64_t key, long token) {
    const double uniform = ((double)(mixed((uint64_t)(token + 1) * GOLDEN + key) >> 11) + 0.5) * 0x1p-53;
    return -log(-log(uniform));
}

// Natural logarithm of positive numbers, within 1e-4 of it.
static inline narrows rough_log(narrows x) {
    inarrows bits;
    memcpy(&bits, &x, sizeof bits);
    const inarrows exponent = (bits >> 23) - 127;
    const inarrows fraction = (bits & 0x7fffff) | 0x3f800000;
    narrows m;
    memcpy(&m, &fraction, sizeof m);
    const narrows t = (m - 1.0f) / (m + 1.0f), tt = t * t;  // artanh series: |t| is at most 1/3
    const narrows of_fraction = 2.0f * t * (1.0f + tt * (0.33333333f + tt * (0.2f + tt * 0.14285714f)));
    return of_fraction + __builtin_convertvector(exponent, narrows) * 0.69314718f;
}

static inline narrows rough_noise(uint64_t key, long token) {
    const longs index = {1, 2, 3, 4, 5, 6, 7, 8};
    const longs bits = mixed((index + (uint64_t)token) * GOLDEN + key) >> 11;
    const doubles uniform = (__builtin_convertvector((slongs)bits, doubles) + 0.5) * 0x1p-53;
    const narrows low = __builtin_convertvector(uniform, narrows);
    const narrows rest = __builtin_convertvector(1.0 - uniform, narrows);  // exact where `low` would be rounded to 1
    const narrows by_series = rest * (1.0f + rest * (0.5f + rest * 0.33333333f));
    const narrows by_log = -rough_log(low);
    const narrows minus_log = rest < 0.015625f ? by_series : by_log;
    return -rough_log(minus_log);
}

template <class Visit>
static inline void visit_all(const float* logits, long size, uint64_t key, const Visit& visit) {
    long token = 0;
    for (; token + WIDE <= size; token += WIDE) {
        narrows lanes;
        memcpy(&lanes, logits + token, sizeof lanes);
        visit(token, WIDE, lanes + rough_noise(key, token));
    }
    if (token < size) {
        narrows lanes = narrows{} - INFINITY;
        for (long i = 0; i < size - token; i++) lanes[i] = logits[token + i];
        visit(token, size - token, lanes + rough_noise(key, token));
    }
}

// What is no number is the lowest, and what is infinite has a bound, as `sampler.py` has it.
static inline floats numbers(floats logits) {
    const floats bound = splat(1e30f);
    logits = select(logits == logits, logits, -bound);
    logits = select(logits == INFINITY, bound, logits);
    return select(logits == -INFINITY, -bound, logits);
}

static inline float highest_of(const float* logits, long size) {
    floats most[4];
    for (int i = 0; i < 4; i++) most[i] = splat(-INFINITY);
    long token = 0;
    for (; token + 4 * LANES <= size; token += 4 * LANES) {
        for (int i = 0; i < 4; i++) most[i] = larger(numbers(load(logits + token + i * LANES)), most[i]);
    }
    for (; token < size; token++) most[0] = larger(numbers(splat(logits[token])), most[0]);
    return largest(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}

static bool has_finite(const float* logits, long size) {
    for (long token = 0; token < size; token++) {
        if (fabsf(logits[token]) < INFINITY) return true;
    }
    return false;
}

constexpr long STRETCH = 1024;  // tokens among which the first of the likeliest is looked for

}  // namespace

extern "C" {

// The first of the likeliest tokens of each row of logits [num_rows, size]; -1 where no logit of a row is finite.
void pd_likeliest(const float* logits, long num_rows, long size, int64_t* tokens) {
    for (long row = 0; row < num_rows; row++, logits += size) {
        float highest = -INFINITY;
        long token = 0;
        for (long first = 0; first < size; first += STRETCH) {
            const float of_these = highest_of(logits + first, size - first < STRETCH ? size - first : STRETCH);
            if (of_these > highest) {
                highest = of_these;
                token = first;
            }
        }
        if (fabsf(highest) >= 1e30f && !has_finite(logits, size)) {
            tokens[row] = -1;
            continue;
        }
        while (numbers(splat(logits[token]))[0] != highest) token++;
        tokens[row] = token;
    }
}

// logits [size], after temperature and truncation; key as `noise.py` makes it of seed and index.
long pd_draw(const float* logits, long size, uint64_t key) {
    narrows most = narrows{} - INFINITY;
    visit_all(logits, size, key, [&](long, long, narrows scores) { most = scores > most ? scores : most; });
    float highest = most[0];
    for (int i = 1; i < WIDE; i++) highest = most[i] > highest ? most[i] : highest;
    const float margin = MARGIN + 1e-6f * fabsf(highest);  // large scores have coarse digits
    long best = 0;
    double best_score = -INFINITY;
    visit_all(logits, size, key, [&](long token, long count, narrows scores) {
        const inarrows near = scores >= highest - margin;
        for (long i = 0; i < count; i++) {
            if (!near[i]) continue;
            const double score = (double)logits[token + i] + exact_noise(key, token + i);
            if (score > best_score) {
                best_score = score;
                best = token + i;
            }
        }
    });
    return best;
}
}
