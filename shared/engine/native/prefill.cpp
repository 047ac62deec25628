// Attention of many tokens of one request to its KV in the paged pool, as FlashAttention (arXiv 2205.14135) has it: keys
// and values pass by in chunks, and every query keeps a running softmax. Chunks begin at multiples of 64 positions, so a
// token's result is the same, to the bit, however its prompt is cut into steps.
#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"
#include "matrix_tiles.h"
#include "paged.h"

namespace {

constexpr int CHUNK = 64;
constexpr int PARTS = CHUNK / PANEL;
constexpr int MAX_BLOCK_ROWS = 768;  // query rows that are computed while one chunk is at hand

// The slots `first` .. `first + CHUNK - 1` of one key head as panels: keys transposed, values as they are. What lies
// behind `length` is zero: unwritten slots may hold anything.
template <class Kind>
struct Chunk {
    typedef typename Kind::Element T;
    std::vector<uint32_t> keys, values;

    void read(const Paged<T>& paged_keys, const Paged<T>& paged_values, const Request& request, long head, long first) {
        const long key_words = paged_keys.dim / Kind::STEP, value_panels = (paged_values.dim + PANEL - 1) / PANEL;
        keys.assign(PARTS * key_words * PANEL, 0);
        values.assign(value_panels * CHUNK / Kind::STEP * PANEL, 0);
        const long count = request.length - first < CHUNK ? request.length - first : CHUNK;
        const T* rows[CHUNK] = {};
        for (long i = 0; i < count; i++) {
            const long block = request.table[(first + i) / request.block_size], slot = (first + i) % request.block_size;
            const uint32_t* words = (const uint32_t*)paged_keys.at(block, slot, head);
            uint32_t* to = keys.data() + i / PANEL * key_words * PANEL + i % PANEL;
            for (long word = 0; word < key_words; word++) to[word * PANEL] = words[word];
            rows[i] = paged_values.at(block, slot, head);
        }
        for (long i = 0; i < count; i += Kind::STEP) {
            for (long column = 0; column < paged_values.dim; column += LANES) {
                const words lanes = together(rows + i, column);
                uint32_t* panel = values.data() + column / PANEL * (CHUNK / Kind::STEP) * PANEL;
                memcpy(panel + i / Kind::STEP * PANEL + column % PANEL, &lanes, sizeof lanes);
            }
        }
    }

    // 16 columns of as many rows as make a word of each column; a row that is not there is zero.
    static words together(const float* const* rows, long column) {
        words lanes;
        memcpy(&lanes, rows[0] + column, sizeof lanes);
        return lanes;
    }
    static words together(const bf16* const* rows, long column) {
        halves low, high{};
        memcpy(&low, rows[0] + column, sizeof low);
        if (rows[1]) memcpy(&high, rows[1] + column, sizeof high);
        return wide(low) | wide(high) << 16;
    }
};

// Rows times a panel: `COUNT` of them, or up to two tiles of the matrix unit, which reads whole tiles.
template <class Kind, int COUNT>
struct Times {
    static constexpr int ROWS = COUNT;
    typedef typename Kind::Sums Sums;
    void operator()(
        const uint32_t* rows, long row_words, const uint32_t* panel, long steps, Sums (&sums)[ROWS][2]) const {
        tile<Kind, COUNT>(rows, row_words, panel, steps, sums);
    }
};

template <class Kind>
struct MatrixTimes {
    static constexpr int ROWS = 2 * TILE_ROWS;
    long count;
    typedef typename Kind::Sums Sums;
    void operator()(
        const uint32_t* rows, long row_words, const uint32_t* panel, long steps, Sums (&sums)[ROWS][2]) const {
        const uint32_t* second = count > TILE_ROWS ? rows + TILE_ROWS * row_words : nullptr;
        matrix_tiles<Kind>(rows, second, row_words, panel, steps, sums, [](const uint32_t*) {});
    }
};

// Query rows of one key head, tokens first: row i is query head i % group of token i / group.
template <class Kind>
struct Rows {
    typedef typename Kind::Element T;
    const Shape& shape;
    const Request& request;
    long group, key_dim, value_dim;
    long first_row, num_rows;
    std::vector<T> queries;
    std::vector<float> outputs;
    std::vector<Running> running;

    long position(long row) const { return request.first + (first_row + row) / group; }

    // The first row that sees anything of a chunk, and the one behind the last.
    long begin(long chunk) const {
        const long tokens = chunk - request.first;
        const long row = tokens <= 0 ? 0 : tokens * group - first_row;
        return row < 0 ? 0 : row < num_rows ? row : num_rows;
    }
    long end(long chunk) const {
        if (shape.window == 0) return num_rows;
        const long row = (chunk + CHUNK - 1 + shape.window - request.first) * group - first_row;
        return row < 0 ? 0 : row < num_rows ? row : num_rows;
    }

    // Scores of one row become weights in the type of the values; returns the factor of what was weighed before.
    float weigh(long row, long chunk, floats (&scores)[CHUNK / LANES], T* weights) {
        const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int32_t last = (int32_t)(position(row) - chunk), first = shape.window ? last - (int32_t)shape.window : -1;
        const bool sees_all = last >= CHUNK - 1 && first < 0;
        floats most = splat(running[row].most);
        for (int i = 0; i < CHUNK / LANES; i++) {
            scores[i] *= shape.scale;
            if (shape.softcap > 0) {
                scores[i] = shape.softcap * (1.0f - 2.0f / (exponential(2.0f / shape.softcap * scores[i]) + 1.0f));
            }
            if (!sees_all) {
                const ints slot = lane + i * LANES;
                scores[i] = select((slot <= last) & (slot > first), scores[i], splat(-INFINITY));
            }
            most = larger(scores[i], most);
        }
        const float before = running[row].most, now = largest(most);
        floats total{};
        for (int i = 0; i < CHUNK / LANES; i++) {
            // A row that has seen nothing yet has no largest score to subtract.
            const floats weight = now == -INFINITY ? floats{} : exponential(scores[i] - now);
            total += weight;
            store(weights + i * LANES, weight);
        }
        const float rescale = before == now ? 1.0f : exponential(splat(before - now))[0];
        running[row] = {now, running[row].total * rescale + sum(total)};
        return rescale;
    }

    // The first `count` of these rows; what is computed for the others is thrown away.
    template <class Product>
    void some(long row, long count, long chunk_first, const Chunk<Kind>& chunk, const Product& times) {
        constexpr int MOST = Product::ROWS;
        constexpr long STEPS = CHUNK / Kind::STEP;
        floats scores[MOST][CHUNK / LANES];
        alignas(64) T weights[MOST][CHUNK];
        alignas(64) floats sums[MOST][2];
        float rescale[MOST];
        const long key_words = key_dim / Kind::STEP;
        const uint32_t* words = (const uint32_t*)(queries.data() + row * key_dim);
        for (int part = 0; part < PARTS; part++) {
            times(words, key_words, chunk.keys.data() + part * key_words * PANEL, key_words, sums);
            for (int i = 0; i < count; i++) {
                scores[i][2 * part] = sums[i][0];
                scores[i][2 * part + 1] = sums[i][1];
            }
        }
        for (int i = 0; i < count; i++) rescale[i] = weigh(row + i, chunk_first, scores[i], weights[i]);
        for (long column = 0; column < value_dim; column += PANEL) {
            times((const uint32_t*)weights, STEPS, chunk.values.data() + column / PANEL * STEPS * PANEL, STEPS, sums);
            for (int i = 0; i < count; i++) {
                float* to = outputs.data() + (row + i) * value_dim + column;
                for (long half = 0; half < 2 && column + half * LANES < value_dim; half++) {
                    store(to + half * LANES, load(to + half * LANES) * rescale[i] + sums[i][half]);
                }
            }
        }
    }

    void take(long chunk_first, const Chunk<Kind>& chunk, bool by_tiles) {
        long row = begin(chunk_first);
        const long last = end(chunk_first);
        if (by_tiles) {
            for (; row < last; row += MatrixTimes<Kind>::ROWS) {
                const long count = std::min(last - row, (long)MatrixTimes<Kind>::ROWS);
                some(row, count, chunk_first, chunk, MatrixTimes<Kind>{count});
            }
            return;
        }
        for (; row + MAX_ROWS <= last; row += MAX_ROWS) {
            some(row, MAX_ROWS, chunk_first, chunk, Times<Kind, MAX_ROWS>{});
        }
        for (; row + 3 <= last; row += 3) some(row, 3, chunk_first, chunk, Times<Kind, 3>{});
        for (; row < last; row++) some(row, 1, chunk_first, chunk, Times<Kind, 1>{});
    }
};

// Rows `first_row` .. of key head `head`: strides of `queries` and `out` in elements.
template <class Kind>
static void some_rows(
    const Shape& shape, const Request& request, const typename Kind::Element* queries, long token_stride,
    long head_stride, const Paged<typename Kind::Element>& keys, const Paged<typename Kind::Element>& values,
    const float* sinks, typename Kind::Element* out, long head, long first_row, long num_rows) {
    typedef typename Kind::Element T;
    const long group = shape.num_heads / shape.num_kv_heads;
    Rows<Kind> rows{shape, request, group, keys.dim, values.dim, first_row, num_rows, {}, {}, {}};
    rows.queries.resize((num_rows + 2 * TILE_ROWS) * keys.dim);  // whole tiles are read, from any row on
    rows.outputs.assign(num_rows * values.dim, 0.0f);
    for (long row = 0; row < num_rows; row++) {
        const long token = (first_row + row) / group, query = head * group + (first_row + row) % group;
        memcpy(
            rows.queries.data() + row * keys.dim, queries + token * token_stride + query * head_stride,
            keys.dim * sizeof(T));
        rows.running.push_back(sinks ? Running{sinks[query], 1.0f} : Running{-INFINITY, 0.0f});
    }
    const bool by_tiles = suits_matrix_unit<Kind>(keys.dim / Kind::STEP);
    std::optional<MatrixUnit> unit;
    if (by_tiles) unit.emplace(TILE_ROWS);
    Chunk<Kind> chunk;
    const long seen = shape.window ? rows.position(0) - shape.window + 1 : 0;
    for (long first = (seen > 0 ? seen : 0) / CHUNK * CHUNK; first <= rows.position(num_rows - 1); first += CHUNK) {
        chunk.read(keys, values, request, head, first);
        rows.take(first, chunk, by_tiles);
    }
    for (long row = 0; row < num_rows; row++) {
        const long token = (first_row + row) / group, query = head * group + (first_row + row) % group;
        T* to = out + (token * shape.num_heads + query) * values.dim;
        for (long i = 0; i < values.dim; i += LANES) {
            store(to + i, load(rows.outputs.data() + row * values.dim + i) / rows.running[row].total);
        }
    }
}

template <class Kind>
static void prefill(
    const Shape& shape, const Request& request, const typename Kind::Element* queries, long token_stride,
    long head_stride, const Paged<typename Kind::Element>& keys, const Paged<typename Kind::Element>& values,
    const float* sinks, typename Kind::Element* out, int threads) {
    const long num_rows = (request.length - request.first) * (shape.num_heads / shape.num_kv_heads);
    const long num_blocks = (num_rows + MAX_BLOCK_ROWS - 1) / MAX_BLOCK_ROWS;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long task = 0; task < num_blocks * shape.num_kv_heads; task++) {
        // The last rows see the most: they come first, so that threads end together.
        const long first_row = (num_blocks - 1 - task / shape.num_kv_heads) * MAX_BLOCK_ROWS;
        const long count = num_rows - first_row < MAX_BLOCK_ROWS ? num_rows - first_row : MAX_BLOCK_ROWS;
        some_rows<Kind>(
            shape, request, queries, token_stride, head_stride, keys, values, sinks, out, task % shape.num_kv_heads,
            first_row, count);
    }
}

// queries [T, num_heads, Dk] by strides of tokens and heads, at the positions from `first` on; table and length as one row
}  // namespace

// of pd_decode; out [T, num_heads, Dv].
#define PREFILL(NAME, KIND)                                                                                            \
    void pd_prefill_##NAME(                                                                                            \
        const KIND::Element* queries, long token_stride, long query_head_stride, const KIND::Element* keys,            \
        long key_block, long key_slot, long key_head, long key_dim, const KIND::Element* values, long value_block,     \
        long value_slot, long value_head, long value_dim, const int32_t* table, long first, long length,               \
        const float* sinks, KIND::Element* out, long num_heads, long num_kv_heads, long block_size, float scale,       \
        float softcap, long window, int threads) {                                                                     \
        prefill<KIND>(                                                                                                 \
            Shape{num_heads, num_kv_heads, scale, softcap, window}, Request{table, first, length, block_size}, queries,\
            token_stride, query_head_stride,                                                                           \
            Paged<KIND::Element>{keys, key_block, key_slot, key_head, key_dim},                                        \
            Paged<KIND::Element>{values, value_block, value_slot, value_head, value_dim}, sinks, out, threads);        \
    }

extern "C" {
PREFILL(float32, Float)
PREFILL(bfloat16, BFloat)
}
