// Rows times packed weights. Weights lie in panels of 32 output features, and a panel is read once, from end to end, for
// up to 12 rows: with few rows that is as fast as memory is, with many as fast as the processor multiplies. The sum for
// an output has the same order whatever the number of rows, so a request's results do not depend on its batch.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"
#include "matrix_tiles.h"

namespace {

constexpr long TURN_BYTES = 5 << 18;

enum Gate { NO_GATE, SILU, GELU_TANH };

static inline floats activated(int gate, floats x) {
    if (gate == SILU) return x / (1.0f + exponential(-x));
    const floats inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // twice that of tanh
    return x - x / (exponential(inner) + 1.0f);
}

// What becomes of the sums of a tile: bias is added, and they are narrowed to the output's type. With a gate the output
// holds the gate's values already, and each is replaced by its activation times the sum.
template <class Out>
struct Plain {
    const Out* bias;
    Out* out;
    long out_features;
    int gate;

    inline void operator()(long row, long feature, floats sums) const {
        const long count = out_features - feature;
        if (count <= 0) return;
        Out* to = out + row * out_features + feature;
        if (bias) sums += load_some(bias + feature, count);
        if (gate != NO_GATE) {
            const floats open = rounded(Out{}, activated(gate, load_some(to, count)));
            sums = open * rounded(Out{}, sums);
        }
        store_some(to, count, sums);
    }
};

template <class Out>
struct Scaled {
    Plain<Out> plain;
    const float* row_scales;     // of the quantised rows
    const float* weight_scales;  // of the output features, padded to whole panels
    const int32_t* weight_sums;  // 128 times the sum of a feature's weights, likewise

    inline void operator()(long row, long feature, ints sums) const {
        ints offset;
        memcpy(&offset, weight_sums + feature, sizeof offset);
        const floats exact = __builtin_convertvector(sums - offset, floats);
        plain(row, feature, exact * row_scales[row] * load(weight_scales + feature));
    }
};

template <class Kind, int ROWS, class Finish>
static void some_rows(
    const uint32_t* rows, long row_words, const uint32_t* panel, long steps, long row, long feature, const Finish& end) {
    typename Kind::Sums sums[ROWS][2];
    tile<Kind, ROWS>(rows + row * row_words, row_words, panel, steps, sums);
    for (int i = 0; i < ROWS; i++) {
        end(row + i, feature, sums[i][0]);
        end(row + i, feature + LANES, sums[i][1]);
    }
}

template <class Kind, class Finish>
static void one_panel(
    const uint32_t* rows, long row_words, long begin, long behind, const uint32_t* panel, long steps, long feature,
    const Finish& end) {
    typedef void (*Some)(const uint32_t*, long, const uint32_t*, long, long, long, const Finish&);
    static const Some by_rows[MAX_ROWS + 1] = {
        nullptr,
        some_rows<Kind, 1, Finish>, some_rows<Kind, 2, Finish>, some_rows<Kind, 3, Finish>,
        some_rows<Kind, 4, Finish>, some_rows<Kind, 5, Finish>, some_rows<Kind, 6, Finish>,
        some_rows<Kind, 7, Finish>, some_rows<Kind, 8, Finish>, some_rows<Kind, 9, Finish>,
        some_rows<Kind, 10, Finish>, some_rows<Kind, 11, Finish>, some_rows<Kind, 12, Finish>,
    };
    // Tiles as equal as can be: 16 rows are 8 and 8, not 12 and 4.
    const long num_tiles = (behind - begin + MAX_ROWS - 1) / MAX_ROWS;
    for (long i = 0, row = begin; i < num_tiles; i++) {
        const long count = (behind - row) / (num_tiles - i);
        by_rows[count](rows, row_words, panel, steps, row, feature, end);
        row += count;
    }
}

// Rows whose length is a multiple of a kilobyte would fall on the same few places of the first cache: they are moved
// apart, which costs far less.
struct Apart {
    const uint32_t* rows;
    long row_words;

    Apart(const void* given, long num_rows, long words) : rows((const uint32_t*)given), row_words(words) {
        static thread_local std::vector<uint32_t> copy;
        if (num_rows == 1 || words % 256) return;
        row_words = words + LANES;
        copy.resize(num_rows * row_words);
        for (long row = 0; row < num_rows; row++) memcpy(copy.data() + row * row_words, rows + row * words, words * 4);
        rows = copy.data();
    }
};

// Rows whose sums are there, in one tile or two: they are finished while the matrix unit multiplies the next ones.
template <class Kind, class Finish>
struct Finishing {
    typename Kind::Sums sums[2 * TILE_ROWS][2];
    long row = 0, last = 0, first_tile = 0, second_tile = 0;

    inline void some(long most, long feature, const Finish& end) {
        for (const long until = std::min(row + most, last); row < until; row++) {
            const bool in_first = row < first_tile + TILE_ROWS;
            const auto& of_row = sums[in_first ? row - first_tile : TILE_ROWS + row - second_tile];
            end(row, feature, of_row[0]);
            end(row, feature + LANES, of_row[1]);
        }
    }
};

// As `one_panel`, by the matrix unit. Its last tile has the full number of rows, too, if there are so many: some of them
// are computed twice, and finished once.
template <class Kind, class Finish>
static void one_panel_of_tiles(
    const uint32_t* rows, long row_words, long begin, long behind, const uint32_t* panel, long steps, long feature,
    const Finish& end) {
    alignas(64) Finishing<Kind, Finish> turns[2];
    Finishing<Kind, Finish>*now = turns, *before = turns + 1;
    const long at_once = (2 * TILE_ROWS * TILE_STEPS + steps - 1) / steps;
    const long num_others = (behind - begin - 1) / (2 * TILE_ROWS);
    const long lines_at_once = num_others ? (2 * TILE_STEPS + num_others - 1) / num_others : 0;
    const uint32_t* next = panel + steps * PANEL;
    const auto meanwhile = [&](const uint32_t* words) {
        if (before->last == 0) {  // the panel may come from memory
            for (int line = 0; line < 2 * TILE_STEPS; line++) fetch<1>(words + line * LANES);
            return;
        }
        before->some(at_once, feature, end);
        for (int line = 0; line < lines_at_once; line++, next += LANES) __builtin_prefetch(next, 0, 2);
    };
    for (long row = begin; row < behind; row += 2 * TILE_ROWS, std::swap(now, before)) {
        now->row = row;
        now->last = std::min(row + 2 * TILE_ROWS, behind);
        now->first_tile = std::max(0L, std::min(row, behind - TILE_ROWS));
        now->second_tile = std::min(row + TILE_ROWS, behind - TILE_ROWS);
        const bool has_second = row + TILE_ROWS < behind;
        matrix_tiles<Kind>(
            rows + now->first_tile * row_words, has_second ? rows + now->second_tile * row_words : nullptr, row_words,
            panel, steps, now->sums, meanwhile);
    }
    before->some(2 * TILE_ROWS, feature, end);
}

template <class Kind, class Finish>
static void all_panels(
    const void* given, long num_rows, const void* packed, long in_features, long out_features, int threads,
    const Finish& end) {
    const long steps = in_features / Kind::STEP, num_panels = (out_features + PANEL - 1) / PANEL;
    if (num_rows == 0) return;
    const Apart apart(given, num_rows, steps);
    const bool by_tiles = suits_matrix_unit<Kind>(steps);
    // Rows by the matrix unit come in turns that the second cache holds.
    const long num_turns = by_tiles ? (num_rows * apart.row_words * 4 + TURN_BYTES - 1) / TURN_BYTES : 1;
    const long turn = (num_rows + num_turns * 2 * TILE_ROWS - 1) / (num_turns * 2 * TILE_ROWS) * 2 * TILE_ROWS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::optional<MatrixUnit> unit;
        if (by_tiles) unit.emplace(std::min(num_rows, TILE_ROWS));
        for (long row = 0; row < num_rows; row += turn) {
            const long behind = std::min(row + turn, num_rows);
#pragma omp for schedule(static) nowait
            for (long index = 0; index < num_panels; index++) {
                const uint32_t* panel = (const uint32_t*)packed + index * PANEL * steps;
                (by_tiles ? one_panel_of_tiles<Kind, Finish> : one_panel<Kind, Finish>)(
                    apart.rows, apart.row_words, row, behind, panel, steps, index * PANEL, end);
            }
        }
    }
}

// Symmetric, by the largest magnitude of a row; stored with an offset of 128.
template <class In>
static void quantise(const In* row, long in_features, uint8_t* quantised, float* scale) {
    floats most{}, unknown{};
    for (long i = 0; i < in_features; i += LANES) {
        const floats lanes = load(row + i), magnitude = select(lanes < 0.0f, -lanes, lanes);
        most = select(magnitude > most, magnitude, most);
        unknown += lanes - lanes;  // 0, or NaN where a lane is NaN or infinite
    }
    *scale = largest(most) / 127.0f + sum(unknown);
    const float inverse = *scale > 0.0f ? 1.0f / *scale : 0.0f;
    const floats magic = splat(12582912.0f + 128.0f);  // 1.5 * 2^23: adding it rounds to an integer
    for (long i = 0; i < in_features; i += LANES) {
        const words bits = (words)(load(row + i) * inverse + magic) & 255;
        typedef uint8_t bytes __attribute__((vector_size(16)));
        const bytes narrow = __builtin_convertvector(bits, bytes);
        memcpy(quantised + i, &narrow, sizeof narrow);
    }
}

template <class Out>
static void linear_int8(
    const Out* rows, long num_rows, const int8_t* packed, const float* weight_scales, const int32_t* weight_sums,
    const Out* bias, Out* out, long in_features, long out_features, int gate, uint8_t* quantised, float* row_scales,
    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && num_rows > 1)
    for (long row = 0; row < num_rows; row++) {
        quantise(rows + row * in_features, in_features, quantised + row * in_features, row_scales + row);
    }
    const Scaled<Out> end{{bias, out, out_features, gate}, row_scales, weight_scales, weight_sums};
    all_panels<Int8>(quantised, num_rows, packed, in_features, out_features, threads, end);
}

}  // namespace

// rows [num_rows, in_features]; packed: see `shared/engine/modules/linears.py`; out [num_rows, out_features].
extern "C" {

void pd_linear_float32(
    const float* rows, long num_rows, const float* packed, const float* bias, float* out, long in_features,
    long out_features, int gate, int threads) {
    const Plain<float> end{bias, out, out_features, gate};
    all_panels<Float>(rows, num_rows, packed, in_features, out_features, threads, end);
}

void pd_linear_bfloat16(
    const bf16* rows, long num_rows, const bf16* packed, const bf16* bias, bf16* out, long in_features,
    long out_features, int gate, int threads) {
    const Plain<bf16> end{bias, out, out_features, gate};
    all_panels<BFloat>(rows, num_rows, packed, in_features, out_features, threads, end);
}

// quantised [num_rows, in_features] and row_scales [num_rows] are scratch.
void pd_linear_int8_float32(
    const float* rows, long num_rows, const int8_t* packed, const float* weight_scales, const int32_t* weight_sums,
    const float* bias, float* out, long in_features, long out_features, int gate, uint8_t* quantised, float* row_scales,
    int threads) {
    linear_int8(
        rows, num_rows, packed, weight_scales, weight_sums, bias, out, in_features, out_features, gate, quantised,
        row_scales, threads);
}

void pd_linear_int8_bfloat16(
    const bf16* rows, long num_rows, const int8_t* packed, const float* weight_scales, const int32_t* weight_sums,
    const bf16* bias, bf16* out, long in_features, long out_features, int gate, uint8_t* quantised, float* row_scales,
    int threads) {
    linear_int8(
        rows, num_rows, packed, weight_scales, weight_sums, bias, out, in_features, out_features, gate, quantised,
        row_scales, threads);
}
}
