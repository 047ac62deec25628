// Attention of one token per request to its KV in the paged pool (PagedAttention, arXiv 2309.06180), with the running
// softmax of FlashAttention (arXiv 2205.14135). A request is computed in the order of its positions, whatever its batch.
#include <vector>

#include "paged.h"

// The next slots are on their way while those before are computed: blocks are far apart in memory, which the processor
// does not foresee. All heads of a slot lie together, and one head's turn fetches its share in the order of memory.
template <class T>
static inline void fetch(const Paged<T>& paged, long block, long slot, long share, long num_shares) {
    const char* from = (const char*)paged.at(block, slot, 0);
    const long bytes = LANES * paged.slot_stride * (long)sizeof(T);
    for (long byte = bytes * share / num_shares; byte < bytes * (share + 1) / num_shares; byte += 64) {
        __builtin_prefetch(from + byte, 0, 2);
    }
}

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

// Scores of up to 16 slots, `keys` being the first, for GROUP query heads that share them. DIM is the size of a head if
// it is known beforehand, or 0.
template <int GROUP, int DIM, class T>
static void score(const float* queries, const Paged<T>& paged, const T* keys, long count, float (*scores)[LANES]) {
    const long dim = DIM ? DIM : paged.dim;
    floats parts[GROUP][LANES];
#pragma GCC unroll 16
    for (long slot = 0; slot < LANES; slot++) {
        const T* key = keys + present(slot, count) * paged.slot_stride;
        floats sums[GROUP] = {};
        for (long i = 0; i < dim; i += LANES) {
            const floats lanes = load(key + i);
            for (int query = 0; query < GROUP; query++) sums[query] += load(queries + query * dim + i) * lanes;
        }
        for (int query = 0; query < GROUP; query++) parts[query][slot] = sums[query];
    }
    for (int query = 0; query < GROUP; query++) store(scores[query], sums_of(parts[query]));
}

// The scores of a query head become weights; returns by how much what was weighed before counts less now.
static inline float weigh(const Shape& shape, float* scores, long count, Running& running) {
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    floats capped = load(scores);
    if (shape.softcap > 0) {
        capped = shape.softcap * (1.0f - 2.0f / (exponential(2.0f / shape.softcap * capped) + 1.0f));
    }
    capped = select(lane < (int32_t)count, capped, splat(-INFINITY));
    const float before = running.most, most = fmaxf(before, largest(capped));
    const floats weights = exponential(capped - most);
    const float rescale = before == most ? 1.0f : exponential(splat(before - most))[0];
    running = {most, running.total * rescale + sum(weights)};
    store(scores, weights);
    return rescale;
}

// Values of the slots, weighed, for GROUP query heads that share them.
template <int GROUP, int DIM, class T>
static void add(
    float* outputs, const Paged<T>& paged, const T* values, long count, const float (*weights)[LANES],
    const float* rescale) {
    const long dim = DIM ? DIM : paged.dim;
    for (long i = 0; i < dim; i += LANES) {
        floats sums[GROUP];
        for (int query = 0; query < GROUP; query++) sums[query] = load(outputs + query * dim + i) * rescale[query];
#pragma GCC unroll 16
        for (long slot = 0; slot < LANES; slot++) {
            const floats lanes = load(values + present(slot, count) * paged.slot_stride + i);
            for (int query = 0; query < GROUP; query++) sums[query] += weights[query][slot] * lanes;
        }
        for (int query = 0; query < GROUP; query++) store(outputs + query * dim + i, sums[query]);
    }
}

// `score` and `add` for all query heads of a key head, at most four at a time.
template <int DIM, class T>
static void score_group(
    const float* queries, const Paged<T>& paged, const T* keys, long count, float (*scores)[LANES], long group) {
    for (; group >= 4; group -= 4, queries += 4 * paged.dim, scores += 4) {
        score<4, DIM>(queries, paged, keys, count, scores);
    }
    if (group == 3) score<3, DIM>(queries, paged, keys, count, scores);
    if (group == 2) score<2, DIM>(queries, paged, keys, count, scores);
    if (group == 1) score<1, DIM>(queries, paged, keys, count, scores);
}

template <int DIM, class T>
static void add_group(
    float* outputs, const Paged<T>& paged, const T* values, long count, const float (*weights)[LANES],
    const float* rescale, long group) {
    for (; group >= 4; group -= 4, outputs += 4 * paged.dim, weights += 4, rescale += 4) {
        add<4, DIM>(outputs, paged, values, count, weights, rescale);
    }
    if (group == 3) add<3, DIM>(outputs, paged, values, count, weights, rescale);
    if (group == 2) add<2, DIM>(outputs, paged, values, count, weights, rescale);
    if (group == 1) add<1, DIM>(outputs, paged, values, count, weights, rescale);
}

// What one request needs while it is computed.
struct Scratch {
    std::vector<float> scaled, outputs, scores, rescale;
    std::vector<Running> running;
};

template <class T>
static void one_request(
    const Shape& shape, const T* queries, long query_stride, const Paged<T>& keys, const Paged<T>& values,
    const Request& request, const float* sinks, T* out, long first_head, long last_head, Scratch& scratch) {
    const long length = request.length, block_size = request.block_size;
    const int32_t* table = request.table;
    const long group = shape.num_heads / shape.num_kv_heads;
    scratch.scaled.resize(shape.num_heads * keys.dim);
    scratch.outputs.assign(shape.num_heads * values.dim, 0.0f);
    scratch.scores.resize(shape.num_heads * LANES);
    scratch.rescale.resize(shape.num_heads);
    scratch.running.resize(shape.num_heads);
    float *scaled = scratch.scaled.data(), *outputs = scratch.outputs.data();
    float(*scores)[LANES] = (float(*)[LANES])scratch.scores.data();
    for (long query = first_head * group; query < last_head * group; query++) {
        for (long i = 0; i < keys.dim; i += LANES) {
            store(scaled + query * keys.dim + i, load(queries + query * query_stride + i) * shape.scale);
        }
        // A sink is a score that has no value.
        scratch.running[query] = sinks ? Running{sinks[query], 1.0f} : Running{-INFINITY, 0.0f};
    }
    const auto score_all = keys.dim == 64 ? score_group<64, T> : keys.dim == 128 ? score_group<128, T> : score_group<0, T>;
    const auto add_all = values.dim == 64 ? add_group<64, T> : values.dim == 128 ? add_group<128, T> : add_group<0, T>;
    for (long position = shape.window > 0 && length > shape.window ? length - shape.window : 0; position < length;) {
        const long slot = position % block_size, block = table[position / block_size];
        const long to_end = block_size - slot, to_lanes = LANES - slot % LANES;
        const long in_block = to_end < to_lanes ? to_end : to_lanes;
        const long count = in_block < length - position ? in_block : length - position;
        const long next = position + count;
        const long next_block = next < length ? table[next / block_size] : block;
        // Step by step for all heads, since what a step does for one head does not wait for another's.
        for (long head = first_head; head < last_head; head++) {
            fetch(keys, next_block, next % block_size, head, shape.num_kv_heads);
            const long query = head * group;
            score_all(scaled + query * keys.dim, keys, keys.at(block, slot, head), count, scores + query, group);
        }
        for (long query = first_head * group; query < last_head * group; query++) {
            scratch.rescale[query] = weigh(shape, scores[query], count, scratch.running[query]);
        }
        for (long head = first_head; head < last_head; head++) {
            fetch(values, next_block, next % block_size, head, shape.num_kv_heads);
            const long query = head * group;
            add_all(
                outputs + query * values.dim, values, values.at(block, slot, head), count, scores + query,
                scratch.rescale.data() + query, group);
        }
        position = next;
    }
    for (long query = first_head * group; query < last_head * group; query++) {
        const float total = scratch.running[query].total;
        for (long i = 0; i < values.dim; i += LANES) {
            const floats sums = load(outputs + query * values.dim + i);
            store(out + query * values.dim + i, total > 0 ? sums / total : floats{});
        }
    }
}

template <class T>
static void decode(
    const Shape& shape, const T* queries, long row_stride, long head_stride, const Paged<T>& keys,
    const Paged<T>& values, const int32_t* tables, long table_stride, const int32_t* lengths, long block_size,
    const float* sinks, T* out, long num_rows, int threads) {
    const long parts = num_rows >= threads ? 1 : shape.num_kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < num_rows * parts; task++) {
            const long row = task / parts, heads = shape.num_kv_heads / parts, first = task % parts * heads;
            const Request request{tables + row * table_stride, lengths[row] - 1, lengths[row], block_size};
            one_request(
                shape, queries + row * row_stride, head_stride, keys, values, request, sinks, out + row * shape.num_heads * values.dim, first, first + heads, scratch);
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
        for (long head = 0; head < num_heads; head++) memcpy(to + head * dim, from + head * head_stride, dim * sizeof(T));
    }
}

// queries: strides of rows and heads; keys and values: strides of blocks, slots, heads; out [num_rows, num_heads, Dv].
#define DECODE(NAME, T)                                                                                                \
    void pd_decode_##NAME(                                                                                             \
        const T* queries, long row_stride, long query_head_stride, const T* keys, long key_block, long key_slot,        \
        long key_head, long key_dim, const T* values, long value_block, long value_slot, long value_head,               \
        long value_dim, const int32_t* tables, long table_stride, const int32_t* lengths, const float* sinks, T* out,   \
        long num_rows, long num_heads, long num_kv_heads, long block_size, float scale, float softcap, long window,     \
        int threads) {                                                                                                 \
        decode(                                                                                                        \
            Shape{num_heads, num_kv_heads, scale, softcap, window}, queries, row_stride, query_head_stride,             \
            Paged<T>{keys, key_block, key_slot, key_head, key_dim},                                                    \
            Paged<T>{values, value_block, value_slot, value_head, value_dim}, tables, table_stride, lengths,            \
            block_size, sinks, out, num_rows, threads);                                                                                   \
    }                                                                                                                  \
    void pd_put_##NAME(                                                                                                \
        T* pool, long block_stride, long slot_stride, const T* heads, long token_stride, long head_stride,             \
        const int64_t* blocks, const int64_t* offsets, long num_tokens, long num_heads, long dim) {                     \
        put(pool, block_stride, slot_stride, heads, token_stride, head_stride, blocks, offsets, num_tokens, num_heads,  \
            dim);                                                                                                      \
    }

extern "C" {
DECODE(float32, float)
DECODE(bfloat16, bf16)
}
