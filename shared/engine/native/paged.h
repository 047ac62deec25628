// What both attention kernels know of the paged pool (PagedAttention, arXiv 2309.06180).
#pragma once

#include "vectors.h"

// A layer's keys or values in the pool: strides in elements.
template <class T>
struct Paged {
    const T* data;
    long block_stride, slot_stride, head_stride;
    long dim;
    inline const T* at(long block, long slot, long head) const {
        return data + block * block_stride + slot * slot_stride + head * head_stride;
    }
};

struct Shape {
    long num_heads, num_kv_heads;
    float scale, softcap;  // a softcap of 0 is none
    long window;           // positions that a token sees, itself included; 0 is all
};

// A request's blocks, and its tokens of this step: positions `first` .. `length - 1`.
struct Request {
    const int32_t* table;
    long first, length, block_size;
};

// The running softmax of one query.
struct Running {
    float most, total;
};
