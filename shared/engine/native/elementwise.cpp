// What a decoder layer does between its linears, each in one pass. Rounding follows transformers' own sequence of
// operations, so that bf16 results are the same.
#include "kernels.h"
#include "vectors.h"

namespace {

// Weights that multiply the narrowed value (Llama), or 1 + weight in fp32 (Gemma).
enum Norm { WEIGHT_AFTER, ONE_PLUS_WEIGHT };

template <class T>
static void rms_norm(const T* row, const T* weight, T* out, long size, float eps, int kind) {
    floats squares{};
    for (long i = 0; i < size; i += LANES) {
        const floats lanes = load_some(row + i, size - i);
        squares += lanes * lanes;
    }
    const float scale = 1.0f / sqrtf(sum(squares) / size + eps);
    for (long i = 0; i < size; i += LANES) {
        const floats lanes = load_some(row + i, size - i) * scale, factor = load_some(weight + i, size - i);
        const floats result = kind == WEIGHT_AFTER ? rounded(T{}, lanes) * factor : lanes * (1.0f + factor);
        store_some(out + i, size - i, result);
    }
}

template <class T>
static void rms_norms(const T* rows, const T* weight, T* out, long num_rows, long size, float eps, int kind, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && num_rows > 16)
    for (long row = 0; row < num_rows; row++) rms_norm(rows + row * size, weight, out + row * size, size, eps, kind);
}

// One head: its halves (a, b) become (a cos - b sin, b cos + a sin), RoFormer (arXiv 2104.09864) as Llama lays it out.
template <class T>
static void rotate(T* head, const T* cos, const T* sin, long size) {
    const long half = size / 2;
    for (long i = 0; i < half; i += LANES) {
        const long count = half - i;
        const floats a = load_some(head + i, count), b = load_some(head + half + i, count);
        const floats a_cos = rounded(T{}, a * load_some(cos + i, count));
        const floats b_sin = rounded(T{}, b * load_some(sin + i, count));
        const floats b_cos = rounded(T{}, b * load_some(cos + half + i, count));
        const floats a_sin = rounded(T{}, a * load_some(sin + half + i, count));
        store_some(head + i, count, a_cos - b_sin);
        store_some(head + half + i, count, b_cos + a_sin);
    }
}

template <class T>
static void rotate_all(
    T* heads, const T* cos, const T* sin, long num_tokens, long num_heads, long size, long token_stride,
    long head_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && num_tokens > 16)
    for (long token = 0; token < num_tokens; token++) {
        for (long head = 0; head < num_heads; head++) {
            rotate(heads + token * token_stride + head * head_stride, cos + token * size, sin + token * size, size);
        }
    }
}

}  // namespace

extern "C" {

void pd_rms_norm_float32(
    const float* rows, const float* weight, float* out, long num_rows, long size, float eps, int kind, int threads) {
    rms_norms(rows, weight, out, num_rows, size, eps, kind, threads);
}

void pd_rms_norm_bfloat16(
    const bf16* rows, const bf16* weight, bf16* out, long num_rows, long size, float eps, int kind, int threads) {
    rms_norms(rows, weight, out, num_rows, size, eps, kind, threads);
}

// In place; strides in elements; cos and sin [num_tokens, size].
void pd_rotate_float32(
    float* heads, const float* cos, const float* sin, long num_tokens, long num_heads, long size, long token_stride,
    long head_stride, int threads) {
    rotate_all(heads, cos, sin, num_tokens, num_heads, size, token_stride, head_stride, threads);
}

void pd_rotate_bfloat16(
    bf16* heads, const bf16* cos, const bf16* sin, long num_tokens, long num_heads, long size, long token_stride,
    long head_stride, int threads) {
    rotate_all(heads, cos, sin, num_tokens, num_heads, size, token_stride, head_stride, threads);
}
}
