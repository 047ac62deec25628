// The kernels of the other files by one name for all types, for what is made of them.
#pragma once

#include "vectors.h"

#define KERNELS(NAME, T)                                                                                               \
    extern "C" {                                                                                                       \
    void pd_linear_##NAME(                                                                                             \
        const T* rows, long num_rows, const T* packed, const T* bias, T* out, long in_features, long out_features,     \
        int gate, int threads);                                                                                        \
    void pd_linear_int8_##NAME(                                                                                        \
        const T* rows, long num_rows, const int8_t* packed, const float* weight_scales, const int32_t* weight_sums,    \
        const T* bias, T* out, long in_features, long out_features, int gate, uint8_t* quantised, float* row_scales,   \
        int threads);                                                                                                  \
    void pd_rms_norm_##NAME(                                                                                           \
        const T* rows, const T* weight, T* out, long num_rows, long size, float eps, int kind, int threads);           \
    void pd_rotate_##NAME(                                                                                             \
        T* heads, const T* cos, const T* sin, long num_tokens, long num_heads, long size, long token_stride,           \
        long head_stride, int threads);                                                                                \
    void pd_put_##NAME(                                                                                                \
        T* pool, long block_stride, long slot_stride, const T* heads, long token_stride, long head_stride,             \
        const int64_t* blocks, const int64_t* offsets, long num_tokens, long num_heads, long dim);                     \
    void pd_decode_##NAME(                                                                                             \
        const T* queries, long row_stride, long query_head_stride, const T* keys, long key_block, long key_slot,       \
        long key_head, long key_dim, const T* values, long value_block, long value_slot, long value_head,              \
        long value_dim, const int32_t* tables, long table_stride, const int32_t* lengths, const float* sinks, T* out,  \
        long num_rows, long num_heads, long num_kv_heads, long block_size, float scale, float softcap, long window,    \
        int threads);                                                                                                  \
    void pd_prefill_##NAME(                                                                                            \
        const T* queries, long token_stride, long query_head_stride, const T* keys, long key_block, long key_slot,     \
        long key_head, long key_dim, const T* values, long value_block, long value_slot, long value_head,              \
        long value_dim, const int32_t* table, long first, long length, const float* sinks, T* out, long num_heads,     \
        long num_kv_heads, long block_size, float scale, float softcap, long window, int threads);                     \
    }                                                                                                                  \
    template <>                                                                                                        \
    struct Kernels<T> {                                                                                                \
        static constexpr auto linear = pd_linear_##NAME;                                                               \
        static constexpr auto linear_int8 = pd_linear_int8_##NAME;                                                     \
        static constexpr auto rms_norm = pd_rms_norm_##NAME;                                                           \
        static constexpr auto rotate = pd_rotate_##NAME;                                                               \
        static constexpr auto put = pd_put_##NAME;                                                                     \
        static constexpr auto decode = pd_decode_##NAME;                                                               \
        static constexpr auto prefill = pd_prefill_##NAME;                                                             \
    };

template <class T>
struct Kernels;

KERNELS(float32, float)
KERNELS(bfloat16, bf16)
