// Attention of one token per request to its KV in the paged pool (PagedAttention, arXiv 2309.06180), with the running
// softmax of FlashAttention (arXiv 2205.14135). A request is computed in the order of its positions, in any batch.
#include <vector>

#include "kernels.h"
#include "paged.h"
#include "tile.h"

namespace {

// The sums of 16 vectors as one vector: lane i is the sum of vector i.
static inline floats sums_of(const floats* vectors) {
    floats level[LANES];
    for (int i = 0; i < LANES; i++) level[i] = vectors[i];
    const ints first = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const ints second = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    for (int i = 0; i < 8; i++) {
        level[i] = __builtin_shuffle(level[2 * i], level[2 * i + 1], first) +
                   __builtin_shuffle(level[2 * i], level[2 * i + 1], second);
    }
    const ints first2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const ints second2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    for (int i = 0; i < 4; i++) {
        level[i] = __builtin_shuffle(level[2 * i], level[2 * i + 1], first2) +
                   __builtin_shuffle(level[2 * i], level[2 * i + 1], second2);
    }
    const ints first4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const ints second4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    for (int i = 0; i < 2; i++) {
        level[i] = __builtin_shuffle(level[2 * i], level[2 * i + 1], first4) +
                   __builtin_shuffle(level[2 * i], level[2 * i + 1], second4);
    }
    const ints first8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const ints second8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    return __builtin_shuffle(level[0], level[1], first8) + __builtin_shuffle(level[0], level[1], second8);
}

// The i-th of 16 slots; behind the last of `count` the first once more, whose weight will be 0.
static inline long present(long slot, long count) { return slot < count ? slot : 0; }

// The next slots are on their way while those before are computed: blocks are far apart in memory, which the processor
// does not foresee. Each element is asked for when the one that lies as far in these slots is computed, so that memory
// is as busy as the processor.
template <class T>
static inline void fetch_some(const T* elements, long count) {
    for (long i = 0; i < count; i += 64 / (long)sizeof(T)) __builtin_prefetch(elements + i, 0, 2);
}

// 16 words of a head from `word` on; what lies behind its end is zero.
template <class Kind>
static inline words some_words(const typename Kind::Element* head, long word, long dim) {
    words lanes{};
    const long left = dim / Kind::STEP - word;
    if (left >= LANES) {
        memcpy(&lanes, head + word * Kind::STEP, sizeof lanes);
    } else {
        memcpy(&lanes, head + word * Kind::STEP, left * sizeof(uint32_t));
    }
    return lanes;
}

// Scores of up to 16 slots, `keys` being the first, for GROUP query heads that share them; `next` will be the first of
// the next slots. DIM is the size of a head if it is known beforehand, or 0.
template <class Kind, int GROUP, int DIM, class T>
static void score(
    const T* queries, long query_stride, const Paged<T>& paged, const T* keys, const T* next, long count,
    float (*scores)[LANES]) {
    const long dim = DIM ? DIM : paged.dim;
    floats parts[GROUP][LANES];
#pragma GCC unroll 16
    for (long slot = 0; slot < LANES; slot++) {
        const T* key = keys + present(slot, count) * paged.slot_stride;
        fetch_some(next + slot * paged.slot_stride, dim);
        floats sums[GROUP] = {};
        for (long word = 0; word < dim / Kind::STEP; word += LANES) {
            const words lanes = some_words<Kind>(key, word, dim);
            for (int query = 0; query < GROUP; query++) {
                const words of_query = some_words<Kind>(queries + query * query_stride, word, dim);
                sums[query] = Kind::dot(sums[query], of_query, lanes);
            }
        }
        for (int query = 0; query < GROUP; query++) parts[query][slot] = sums[query];
    }
    for (int query = 0; query < GROUP; query++) store(scores[query], sums_of(parts[query]));
}

// The scores of a query head become weights; returns by how much what was weighed before counts less now.
template <class T>
static inline float weigh(const Shape& shape, const float* scores, long count, T* weights, Running& running) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats capped = load(scores) * shape.scale;
    if (shape.softcap > 0) {
        capped = shape.softcap * (1.0f - 2.0f / (exponential(2.0f / shape.softcap * capped) + 1.0f));
    }
    capped = select(lane < (int32_t)count, capped, splat(-INFINITY));
    const float before = running.most, most = fmaxf(before, largest(capped));
    const floats lanes = exponential(capped - most);
    const float rescale = before == most ? 1.0f : exponential(splat(before - most))[0];
    running = {most, running.total * rescale + sum(lanes)};
    store(weights, lanes);
    return rescale;
}

// How many elements the outputs of a head take: as many as whole vectors of words have.
template <class Kind>
static inline long padded(long dim) {
    constexpr long WIDTH = LANES * Kind::STEP;
    return (dim + WIDTH - 1) / WIDTH * WIDTH;
}

// Values of the slots, weighed, for GROUP query heads that share them. Outputs are in the order of `Kind::together`.
template <class Kind, int GROUP, int DIM, class T>
static void add(
    float* outputs, const Paged<T>& paged, const T* values, const T* next, long count, const T (*weights)[LANES],
    const float* rescale) {
    constexpr int STEP = Kind::STEP;
    const long dim = DIM ? DIM : paged.dim, width = padded<Kind>(dim);
    for (long i = 0; i < width; i += LANES * STEP) {
        floats sums[GROUP][STEP];
        for (int query = 0; query < GROUP; query++) {
            for (int part = 0; part < STEP; part++) {
                sums[query][part] = load(outputs + query * width + i + part * LANES) * rescale[query];
            }
        }
#pragma GCC unroll 16
        for (long slot = 0; slot < LANES; slot += STEP) {
            words rows[STEP];
            for (int row = 0; row < STEP; row++) {
                rows[row] = some_words<Kind>(values + present(slot + row, count) * paged.slot_stride, i / STEP, dim);
                fetch_some(next + (slot + row) * paged.slot_stride + i, LANES * STEP);
            }
            Kind::together(rows);
            for (int query = 0; query < GROUP; query++) {
                uint32_t weight;
                memcpy(&weight, &weights[query][slot], sizeof weight);
                for (int part = 0; part < STEP; part++) {
                    sums[query][part] = Kind::multiply(sums[query][part], weight, rows[part]);
                }
            }
        }
        for (int query = 0; query < GROUP; query++) {
            for (int part = 0; part < STEP; part++) {
                store(outputs + query * width + i + part * LANES, sums[query][part]);
            }
        }
    }
}

// `score` and `add` for all query heads of a key head, at most four at a time.
template <class Kind, int DIM, class T>
static void score_group(
    const T* queries, long query_stride, const Paged<T>& paged, const T* keys, const T* next, long count,
    float (*scores)[LANES], long group) {
    for (; group >= 4; group -= 4, queries += 4 * query_stride, scores += 4) {
        score<Kind, 4, DIM>(queries, query_stride, paged, keys, next, count, scores);
    }
    if (group == 3) score<Kind, 3, DIM>(queries, query_stride, paged, keys, next, count, scores);
    if (group == 2) score<Kind, 2, DIM>(queries, query_stride, paged, keys, next, count, scores);
    if (group == 1) score<Kind, 1, DIM>(queries, query_stride, paged, keys, next, count, scores);
}

template <class Kind, int DIM, class T>
static void add_group(
    float* outputs, const Paged<T>& paged, const T* values, const T* next, long count, const T (*weights)[LANES],
    const float* rescale, long group) {
    const long width = padded<Kind>(paged.dim);
    for (; group >= 4; group -= 4, outputs += 4 * width, weights += 4, rescale += 4) {
        add<Kind, 4, DIM>(outputs, paged, values, next, count, weights, rescale);
    }
    if (group == 3) add<Kind, 3, DIM>(outputs, paged, values, next, count, weights, rescale);
    if (group == 2) add<Kind, 2, DIM>(outputs, paged, values, next, count, weights, rescale);
    if (group == 1) add<Kind, 1, DIM>(outputs, paged, values, next, count, weights, rescale);
}

// What one request needs while it is computed.
template <class T>
struct Scratch {
    std::vector<float> outputs, scores, rescale;
    std::vector<T> weights;
    std::vector<Running> running;
};

template <class Kind, class T>
static void one_request(
    const Shape& shape, const T* queries, long query_stride, const Paged<T>& keys, const Paged<T>& values,
    const Request& request, const float* sinks, T* out, long first_head, long last_head, Scratch<T>& scratch) {
    const long length = request.length, block_size = request.block_size;
    const int32_t* table = request.table;
    const long group = shape.num_heads / shape.num_kv_heads, width = padded<Kind>(values.dim);
    scratch.outputs.assign(shape.num_heads * width, 0.0f);
    scratch.scores.resize(shape.num_heads * LANES);
    scratch.weights.resize(shape.num_heads * LANES);
    scratch.rescale.resize(shape.num_heads);
    scratch.running.resize(shape.num_heads);
    float* outputs = scratch.outputs.data();
    float(*scores)[LANES] = (float(*)[LANES])scratch.scores.data();
    T(*weights)[LANES] = (T(*)[LANES])scratch.weights.data();
    for (long query = first_head * group; query < last_head * group; query++) {
        // A sink is a score that has no value.
        scratch.running[query] = sinks ? Running{sinks[query], 1.0f} : Running{-INFINITY, 0.0f};
    }
    const auto score_all = keys.dim == 64    ? score_group<Kind, 64, T>
                           : keys.dim == 128 ? score_group<Kind, 128, T>
                                             : score_group<Kind, 0, T>;
    const auto add_all = values.dim == 64    ? add_group<Kind, 64, T>
                         : values.dim == 128 ? add_group<Kind, 128, T>
                                             : add_group<Kind, 0, T>;
    for (long position = shape.window > 0 && length > shape.window ? length - shape.window : 0; position < length;) {
        const long slot = position % block_size, block = table[position / block_size];
        const long to_end = block_size - slot, to_lanes = LANES - slot % LANES;
        const long in_block = to_end < to_lanes ? to_end : to_lanes;
        const long count = in_block < length - position ? in_block : length - position;
        const long next = position + count;
        const long next_block = next < length ? table[next / block_size] : block, next_slot = next % block_size;
        // Step by step for all heads, since what a step does for one head does not wait for another's.
        for (long head = first_head; head < last_head; head++) {
            const long query = head * group;
            score_all(
                queries + query * query_stride, query_stride, keys, keys.at(block, slot, head),
                keys.at(next_block, next_slot, head), count, scores + query, group);
        }
        for (long query = first_head * group; query < last_head * group; query++) {
            scratch.rescale[query] = weigh(shape, scores[query], count, weights[query], scratch.running[query]);
        }
        for (long head = first_head; head < last_head; head++) {
            const long query = head * group;
            add_all(
                outputs + query * width, values, values.at(block, slot, head), values.at(next_block, next_slot, head),
                count, weights + query, scratch.rescale.data() + query, group);
        }
        position = next;
    }
    for (long query = first_head * group; query < last_head * group; query++) {
        const float total = scratch.running[query].total;
        for (long i = 0; i < values.dim; i += LANES * Kind::STEP) {
            floats parts[Kind::STEP];
            for (int part = 0; part < Kind::STEP; part++) {
                parts[part] = load(outputs + query * width + i + part * LANES);
            }
            Kind::apart(parts);
            for (int part = 0; part < Kind::STEP && i + part * LANES < values.dim; part++) {
                store(out + query * values.dim + i + part * LANES, total > 0 ? parts[part] / total : floats{});
            }
        }
    }
}

template <class Kind, class T>
static void decode(
    const Shape& shape, const T* queries, long row_stride, long head_stride, const Paged<T>& keys,
    const Paged<T>& values, const int32_t* tables, long table_stride, const int32_t* lengths, long block_size,
    const float* sinks, T* out, long num_rows, int threads) {
    const long parts = num_rows >= threads ? 1 : shape.num_kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch<T> scratch;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < num_rows * parts; task++) {
            const long row = task / parts, heads = shape.num_kv_heads / parts, first = task % parts * heads;
            const Request request{tables + row * table_stride, lengths[row] - 1, lengths[row], block_size};
            one_request<Kind>(
                shape, queries + row * row_stride, head_stride, keys, values, request, sinks,
                out + row * shape.num_heads * values.dim, first, first + heads, scratch);
        }
    }
}

template <class T>
static void put(
    T* pool, long block_stride, long slot_stride, const T* heads, long token_stride, long head_stride,
    const int64_t* blocks, const int64_t* offsets, long num_tokens, long num_heads, long dim) {
    for (long token = 0; token < num_tokens; token++) {
        T* to = pool + blocks[token] * block_stride + offsets[token] * slot_stride;
        const T* from = heads + token * token_stride;
        for (long head = 0; head < num_heads; head++) {
            memcpy(to + head * dim, from + head * head_stride, dim * sizeof(T));
        }
    }
}

}  // namespace

// queries: strides of rows and heads; keys and values: strides of blocks, slots, heads; out [num_rows, num_heads, Dv].
#define DECODE(NAME, T, KIND)                                                                                          \
    void pd_decode_##NAME(                                                                                             \
        const T* queries, long row_stride, long query_head_stride, const T* keys, long key_block, long key_slot,       \
        long key_head, long key_dim, const T* values, long value_block, long value_slot, long value_head,              \
        long value_dim, const int32_t* tables, long table_stride, const int32_t* lengths, const float* sinks, T* out,  \
        long num_rows, long num_heads, long num_kv_heads, long block_size, float scale, float softcap, long window,    \
        int threads) {                                                                                                 \
        decode<KIND>(                                                                                                  \
            Shape{num_heads, num_kv_heads, scale, softcap, window}, queries, row_stride, query_head_stride,            \
            Paged<T>{keys, key_block, key_slot, key_head, key_dim},                                                    \
            Paged<T>{values, value_block, value_slot, value_head, value_dim}, tables, table_stride, lengths,           \
            block_size, sinks, out, num_rows, threads);                                                                \
    }                                                                                                                  \
    void pd_put_##NAME(                                                                                                \
        T* pool, long block_stride, long slot_stride, const T* heads, long token_stride, long head_stride,             \
        const int64_t* blocks, const int64_t* offsets, long num_tokens, long num_heads, long dim) {                    \
        put(pool, block_stride, slot_stride, heads, token_stride, head_stride, blocks, offsets, num_tokens, num_heads, \
            dim);                                                                                                      \
    }

extern "C" {
DECODE(float32, float, Float)
DECODE(bfloat16, bf16, BFloat)
}
