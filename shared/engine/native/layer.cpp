// A whole decoder layer in one call: attention and a gated MLP, each with a norm before, behind, or on both sides, and
// added to what came in. It is made of the other kernels and rounds as they do, so results are theirs to the bit; what
// it spares is Python's time between them. Structs are those of `layer.py`.
#include <vector>

#include "kernels.h"

namespace {

struct Norm {
    const void* weight;  // null: there is none
    long size;
    float eps;
    int kind;
};

struct Linear {
    const void *packed, *bias;
    const float* scales;  // null unless weights have 8 bits
    const int32_t* sums;
    long in_features, out_features;
};

struct Layer {
    Norm before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
    Linear query, key, value, output, gate, up, down;
    long num_heads, num_kv_heads, key_dim, value_dim, window;
    float scale, softcap;
    float residual;  // factor of what is added
    int activation, rotates, is_last, num_threads;
};

struct Span {
    long start, stop, first;  // rows, and the position of the first
    const int32_t* table;
};

struct Step {
    const int64_t *blocks, *offsets;  // of each row
    const int32_t *tables, *lengths;  // of the decodes
    const int64_t* sampled;           // rows that give a token: those of all decodes, and the last of some spans
    const Span* spans;                // of prefill
    long num_rows, num_decodes, num_spans, num_sampled, table_stride, block_size;
};

template <class T>
struct KV {
    T *keys, *values;
    long block_stride;
};

template <class T>
struct Rotation {
    const T *cos, *sin;  // [num_rows, size]
    long size;
};

// Memory that stays from layer to layer and from step to step, as large as the largest step so far has needed.
template <class T>
static T* room(std::vector<T>& memory, long count) {
    if ((long)memory.size() < count) memory.resize(count);
    return memory.data();
}

template <class T>
struct Scratch {
    std::vector<T> normed, queries, keys, values, attended, added, inner, some, some_normed;
    std::vector<uint8_t> quantised;
    std::vector<float> row_scales;
};

// One layer at one step.
template <class T>
struct Turn {
    typedef ::Kernels<T> Do;
    const Layer& layer;
    const Step& step;
    const KV<T>& kv;
    const Rotation<T>& rotation;
    Scratch<T>& scratch;

    void multiply(const Linear& by, const T* rows, long num_rows, T* out, int gate = 0) {
        if (by.scales == nullptr) {
            Do::linear(
                rows, num_rows, (const T*)by.packed, (const T*)by.bias, out, by.in_features, by.out_features, gate,
                layer.num_threads);
            return;
        }
        Do::linear_int8(
            rows, num_rows, (const int8_t*)by.packed, by.scales, by.sums, (const T*)by.bias, out, by.in_features,
            by.out_features, gate, room(scratch.quantised, num_rows * by.in_features),
            room(scratch.row_scales, num_rows), layer.num_threads);
    }

    void normalise(const Norm& norm, const T* rows, long num_elements, T* out) {
        Do::rms_norm(
            rows, (const T*)norm.weight, out, num_elements / norm.size, norm.size, norm.eps, norm.kind,
            layer.num_threads);
    }

    // The rows after a norm, or as they are.
    const T* normed(const Norm& norm, const T* rows, long num_rows) {
        if (norm.weight == nullptr) return rows;
        T* out = room(scratch.normed, num_rows * norm.size);
        normalise(norm, rows, num_rows * norm.size, out);
        return out;
    }

    // rows + residual * added, after a norm of what is added if there is one.
    void add(const Norm& norm, const T* rows, T* added, long num_elements, T* out) {
        if (norm.weight) normalise(norm, added, num_elements, added);
        // In a pass of its own, so that the product is rounded before it is added.
        for (long i = 0; i < num_elements && layer.residual != 1.0f; i += LANES) {
            store_some(added + i, num_elements - i, layer.residual * load_some(added + i, num_elements - i));
        }
        for (long i = 0; i < num_elements; i += LANES) {
            const long count = num_elements - i;
            store_some(out + i, count, load_some(rows + i, count) + load_some(added + i, count));
        }
    }

    long query_width() const { return layer.num_heads * layer.key_dim; }
    long key_width() const { return layer.num_kv_heads * layer.key_dim; }
    long value_width() const { return layer.num_kv_heads * layer.value_dim; }
    long attended_width() const { return layer.num_heads * layer.value_dim; }

    void write_kv(const T* normed) {
        const long num_rows = step.num_rows;
        T *keys = room(scratch.keys, num_rows * key_width()), *values = room(scratch.values, num_rows * value_width());
        multiply(layer.key, normed, num_rows, keys);
        multiply(layer.value, normed, num_rows, values);
        if (layer.key_norm.weight) normalise(layer.key_norm, keys, num_rows * key_width(), keys);
        if (layer.rotates) {
            Do::rotate(
                keys, rotation.cos, rotation.sin, num_rows, layer.num_kv_heads, rotation.size, key_width(),
                layer.key_dim, layer.num_threads);
        }
        Do::put(
            kv.keys, kv.block_stride, key_width(), keys, key_width(), layer.key_dim, step.blocks, step.offsets,
            num_rows, layer.num_kv_heads, layer.key_dim);
        Do::put(
            kv.values, kv.block_stride, value_width(), values, value_width(), layer.value_dim, step.blocks,
            step.offsets, num_rows, layer.num_kv_heads, layer.value_dim);
    }

    // Queries of all rows, or of `some`.
    T* queries_of(const T* normed, long num_rows, const int64_t* some) {
        T* queries = room(scratch.queries, num_rows * query_width());
        multiply(layer.query, normed, num_rows, queries);
        if (layer.query_norm.weight) normalise(layer.query_norm, queries, num_rows * query_width(), queries);
        if (!layer.rotates) return queries;
        const long at_once = some ? 1 : num_rows;
        for (long row = 0; row < num_rows; row += at_once) {
            const long from = some ? some[row] : row;
            Do::rotate(
                queries + row * query_width(), rotation.cos + from * rotation.size, rotation.sin + from * rotation.size,
                at_once, layer.num_heads, rotation.size, query_width(), layer.key_dim, layer.num_threads);
        }
        return queries;
    }

    void attend_decodes(const T* queries, T* out) {
        if (step.num_decodes == 0) return;
        Do::decode(
            queries, query_width(), layer.key_dim, kv.keys, kv.block_stride, key_width(), layer.key_dim, layer.key_dim,
            kv.values, kv.block_stride, value_width(), layer.value_dim, layer.value_dim, step.tables, step.table_stride,
            step.lengths, nullptr, out, step.num_decodes, layer.num_heads, layer.num_kv_heads, step.block_size,
            layer.scale, layer.softcap, layer.window, layer.num_threads);
    }

    void attend_prefill(const T* queries, const int32_t* table, long first, long length, T* out) {
        Do::prefill(
            queries, query_width(), layer.key_dim, kv.keys, kv.block_stride, key_width(), layer.key_dim, layer.key_dim,
            kv.values, kv.block_stride, value_width(), layer.value_dim, layer.value_dim, table, first, length,
            nullptr, out, layer.num_heads, layer.num_kv_heads, step.block_size, layer.scale, layer.softcap,
            layer.window, layer.num_threads);
    }

    void attend(const T* queries, T* out) {
        attend_decodes(queries, out);
        for (const Span* span = step.spans; span < step.spans + step.num_spans; span++) {
            attend_prefill(
                queries + span->start * query_width(), span->table, span->first, span->first + span->stop - span->start,
                out + span->start * attended_width());
        }
    }

    // As `attend`, from queries of the sampled rows alone.
    void attend_sampled(const T* queries, T* out) {
        attend_decodes(queries, out);
        long index = step.num_decodes;
        for (const Span* span = step.spans; span < step.spans + step.num_spans && index < step.num_sampled; span++) {
            if (step.sampled[index] != span->stop - 1) continue;
            const long length = span->first + span->stop - span->start;
            attend_prefill(
                queries + index * query_width(), span->table, length - 1, length, out + index * attended_width());
            index++;
        }
    }

    // What follows attention; `hidden` and `out` [num_rows, width].
    void finish(const T* attended, const T* hidden, long num_rows, T* out) {
        const long width = layer.output.out_features, inner_width = layer.gate.out_features;
        T* added = room(scratch.added, num_rows * width);
        multiply(layer.output, attended, num_rows, added);
        add(layer.after_attention, hidden, added, num_rows * width, out);
        const T* rows = normed(layer.before_mlp, out, num_rows);
        T* inner = room(scratch.inner, num_rows * inner_width);
        multiply(layer.gate, rows, num_rows, inner);
        multiply(layer.up, rows, num_rows, inner, layer.activation);
        multiply(layer.down, inner, num_rows, added);
        add(layer.after_mlp, out, added, num_rows * width, out);
    }

    void all(const T* hidden, T* out) {
        const T* rows = normed(layer.before_attention, hidden, step.num_rows);
        write_kv(rows);
        T* attended = room(scratch.attended, step.num_rows * attended_width());
        attend(queries_of(rows, step.num_rows, nullptr), attended);
        finish(attended, hidden, step.num_rows, out);
    }

    static void pick(const T* rows, const int64_t* some, long count, long width, T* out) {
        for (long i = 0; i < count; i++) memcpy(out + i * width, rows + some[i] * width, width * sizeof(T));
    }

    // In the last layer nothing reads the other rows once their keys and values are in the pool. They stay as they come.
    void last(const T* hidden, T* out) {
        const long width = layer.output.out_features, count = step.num_sampled;
        const T* rows = normed(layer.before_attention, hidden, step.num_rows);
        write_kv(rows);
        memcpy(out, hidden, step.num_rows * width * sizeof(T));
        if (count == 0) return;
        T *some = room(scratch.some, count * width), *some_normed = room(scratch.some_normed, count * width);
        pick(rows, step.sampled, count, width, some_normed);
        T* attended = room(scratch.attended, count * attended_width());
        attend_sampled(queries_of(some_normed, count, step.sampled), attended);
        pick(hidden, step.sampled, count, width, some);
        finish(attended, some, count, some_normed);
        for (long i = 0; i < count; i++) {
            memcpy(out + step.sampled[i] * width, some_normed + i * width, width * sizeof(T));
        }
    }
};

template <class T>
static void one_layer(
    const Layer& layer, const Step& step, const KV<T>& kv, const Rotation<T>& rotation, const T* hidden, T* out) {
    static thread_local Scratch<T> scratch;
    Turn<T> turn{layer, step, kv, rotation, scratch};
    if (layer.is_last && step.num_sampled < step.num_rows) {
        turn.last(hidden, out);
    } else {
        turn.all(hidden, out);
    }
}

}  // namespace

// Keys and values: where the layer's own begin in the pool; cos and sin [num_rows, size]; hidden and out
// [num_rows, width].
#define LAYER(NAME, T)                                                                                                 \
    void pd_layer_##NAME(                                                                                              \
        const Layer* layer, const Step* step, T* keys, T* values, long block_stride, const T* cos, const T* sin,       \
        long size, const T* hidden, T* out) {                                                                          \
        one_layer(*layer, *step, KV<T>{keys, values, block_stride}, Rotation<T>{cos, sin, size}, hidden, out);         \
    }

extern "C" {
LAYER(float32, float)
LAYER(bfloat16, bf16)
}
