// A layer of bf16 products and its gradients: inputs, outputs and sums are fp32. What is rounded to bf16 stays in the
// cache of a processor. For processors with avx512_bf16.
//
// Threads take blocks of tokens. The gradients of the weights are added up in the order of the threads.

#include <immintrin.h>

#include "native_code.h"

#if !defined(__AVX512BF16__)
#error "this processor, or this compiler, has no products of bf16 (avx512_bf16)"
#endif

struct Layer {  // as in linear.py
    const float *x, *weight, *bias;              // [T, I], [O, I], [O]
    const float *grad;                           // [T, O] of y
    float *y;                                    // [T, O] out
    float *x_grad, *weight_grad, *bias_grad;     // [T, I] or null, [O, I], [O] out; no bias_grad: make y
    int64_t tokens, inputs, outputs, threads;
};

namespace {

constexpr int ROWS = 8, WIDE = 32;  // of a product whose sums stay in registers
constexpr int BLOCK = 128;          // tokens

struct Left {  // a factor [ROWS, pairs]; each number is two of bf16, and where its next row and its next pair are
    const int32_t *at;
    int64_t row, pair;
};

// [ROWS, WIDE] sums, in registers.
struct Sums {
    __m512 of[ROWS][2];

    __attribute__((always_inline)) void add(Left a, const int32_t *b, int64_t b_step, int64_t pairs) {
        for (int64_t k = 0; k < pairs; k++) {
            const __m512bh low = (__m512bh)_mm512_loadu_si512(b + k * b_step);
            const __m512bh high = (__m512bh)_mm512_loadu_si512(b + k * b_step + 16);
            for (int r = 0; r < ROWS; r++) {
                const __m512bh left = (__m512bh)_mm512_set1_epi32(a.at[r * a.row + k * a.pair]);
                of[r][0] = _mm512_dpbf16_ps(of[r][0], left, low);
                of[r][1] = _mm512_dpbf16_ps(of[r][1], left, high);
            }
        }
    }
};

// to [rows, columns] = from [columns] or zeros + a b, a row by row, b [pairs][upto(columns, WIDE)].
void multiply(float *to, const float *from, const int32_t *a, const int32_t *b, int64_t rows, int64_t columns,
              int64_t pairs) {
    const int64_t wide = upto(columns, WIDE);
    for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t c = 0; c < wide; c += WIDE) {
            const __mmask16 low = first_of(columns - c), high = first_of(columns - c - 16);
            Sums sums;
            for (int n = 0; n < ROWS; n++) {
                sums.of[n][0] = from ? _mm512_maskz_loadu_ps(low, from + c) : _mm512_setzero_ps();
                sums.of[n][1] = from ? _mm512_maskz_loadu_ps(high, from + c + 16) : _mm512_setzero_ps();
            }
            sums.add({a + r * pairs, pairs, 1}, b + c, wide, pairs);
            for (int n = 0; n < ROWS && r + n < rows; n++) {
                _mm512_mask_storeu_ps(to + (r + n) * columns + c, low, sums.of[n][0]);
                _mm512_mask_storeu_ps(to + (r + n) * columns + c + 16, high, sums.of[n][1]);
            }
        }
}

// One row of fp32 → bf16.
inline void narrow(int32_t *to, const float *from, int64_t n) {
    for (int64_t d = 0; d < n; d += 16)
        _mm256_mask_storeu_epi16(reinterpret_cast<short *>(to) + d, first_of(n - d),
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_of(n - d), from + d)));
}

// Two rows of fp32 → pairs of bf16, one of each row.
inline void pair_up(int32_t *to, const float *even, const float *odd, int64_t n) {
    alignas(64) static const int16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(ORDER);
    for (int64_t d = 0; d < n; d += 16) {
        const __mmask16 some = first_of(n - d);
        const __m512 low = _mm512_maskz_loadu_ps(some, even + d);
        const __m512 high = odd ? _mm512_maskz_loadu_ps(some, odd + d) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        _mm512_mask_storeu_epi32(to + d, some, _mm512_permutexvar_epi16(order, both));
    }
}

// [rows, n] → [rows, pairs of n]; [rows / 2][wide].
void narrow_rows(int32_t *to, const float *from, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++) narrow(to + r * upto(n, WIDE) / 2, from + r * n, n);
}

void pair_rows(int32_t *to, const float *from, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r += 2)
        pair_up(to + r / 2 * upto(n, WIDE), from + r * n, r + 1 < rows ? from + (r + 1) * n : nullptr, n);
}

class Work {
  public:
    explicit Work(const Layer &layer)
        : p(layer), in(upto(p.inputs, WIDE)), out(upto(p.outputs, WIDE)), blocks((p.tokens + BLOCK - 1) / BLOCK),
          threads(std::max<int64_t>(1, std::min(p.threads, blocks))), weight(in * out / 2),
          of_weight(p.bias_grad ? threads * out * in : 0), of_bias(p.bias_grad ? threads * out : 0) {}

    void run() {
        if (p.bias_grad) {
            pair_rows(weight.at, p.weight, p.outputs, p.inputs);
            in_threads(threads, [this](int64_t k) { learn(k); });
            add_up();
        } else {
            turn_weight();
            in_threads(threads, [this](int64_t k) { make(k); });
        }
    }

  private:
    const Layer &p;
    const int64_t in, out, blocks, threads;  // widths to multiples of WIDE
    Buffer<int32_t> weight;                  // pairs of inputs by output, or pairs of outputs by input
    Buffer<float> of_weight, of_bias;        // by thread: [out, in], [out]

    // [O, I] → [in / 2][out].
    void turn_weight() {
        Buffer<int32_t> row(in / 2);
        for (int64_t o = 0; o < p.outputs; o++) {
            narrow(row.at, p.weight + o * p.inputs, p.inputs);
            for (int64_t k = 0; k < in / 2; k++) weight.at[k * out + o] = row.at[k];
        }
    }

    template <class Each> void by_block(int64_t thread, const Each &each) {
        for (int64_t b = blocks * thread / threads; b < blocks * (thread + 1) / threads; b++)
            each(b * BLOCK, std::min<int64_t>(BLOCK, p.tokens - b * BLOCK));
    }

    void make(int64_t thread) {
        Buffer<int32_t> rows(BLOCK * in / 2);
        by_block(thread, [&](int64_t t, int64_t count) {
            narrow_rows(rows.at, p.x + t * p.inputs, count, p.inputs);
            multiply(p.y + t * p.outputs, p.bias, rows.at, weight.at, count, p.outputs, in / 2);
        });
    }

    void learn(int64_t thread) {
        Buffer<int32_t> rows(BLOCK * out / 2), left(BLOCK / 2 * out), right(BLOCK / 2 * in);
        float *sums = of_weight.at + thread * out * in, *bias = of_bias.at + thread * out;
        by_block(thread, [&](int64_t t, int64_t count) {
            const float *grad = p.grad + t * p.outputs;
            if (p.x_grad) {
                narrow_rows(rows.at, grad, count, p.outputs);
                multiply(p.x_grad + t * p.inputs, nullptr, rows.at, weight.at, count, p.inputs, out / 2);
            }
            pair_rows(left.at, grad, count, p.outputs);
            pair_rows(right.at, p.x + t * p.inputs, count, p.inputs);
            add_to_weight(sums, left.at, right.at, (count + 1) / 2);
            for (int64_t r = 0; r < count; r++)
                for (int64_t o = 0; o < p.outputs; o++) bias[o] += grad[r * p.outputs + o];
        });
    }

    void add_to_weight(float *sums, const int32_t *left, const int32_t *right, int64_t pairs) {
        for (int64_t o = 0; o < out; o += ROWS)
            for (int64_t i = 0; i < in; i += WIDE) {
                float *to = sums + o * in + i;
                Sums part;
                for (int n = 0; n < ROWS; n++)
                    part.of[n][0] = _mm512_load_ps(to + n * in), part.of[n][1] = _mm512_load_ps(to + n * in + 16);
                part.add({left + o, 1, out}, right + i, in, pairs);
                for (int n = 0; n < ROWS; n++)
                    _mm512_store_ps(to + n * in, part.of[n][0]), _mm512_store_ps(to + n * in + 16, part.of[n][1]);
            }
    }

    float total(const float *of_thread, int64_t step) const {
        float sum = 0;
        for (int64_t k = 0; k < threads; k++) sum += of_thread[k * step];
        return sum;
    }

    void add_up() {
        for (int64_t o = 0; o < p.outputs; o++) {
            p.bias_grad[o] = total(of_bias.at + o, out);
            for (int64_t i = 0; i < p.inputs; i++)
                p.weight_grad[o * p.inputs + i] = total(of_weight.at + o * in + i, out * in);
        }
    }
};

}  // namespace

// 0: done; 1: no memory.
extern "C" int flm_linear(const Layer *layer) {
    try {
        Work(*layer).run();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
