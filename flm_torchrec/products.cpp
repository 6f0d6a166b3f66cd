// Products of matrices in fp32, for processors with AVX-512 on which PyTorch's library multiplies by vectors of 256 bits.
//
// The terms of a number of a product are added up in the same order at any shape and number of threads: blocks of TERMS,
// then these sums. Threads take rows or columns, whichever are more. The packing is as in Goto & van de Geijn, "Anatomy of
// high-performance matrix multiplication", 2008.

#include <immintrin.h>

#include "native_code.h"

#if !defined(__AVX512F__)
#error "this processor, or this compiler, has no vectors of 512 bits (avx512f)"
#endif

struct Product {  // as in products.py
    const float *left, *right, *start;  // [M, K], [K, N]; [N] what each row of sums starts from, or null
    float *out;                         // [M, N], `out_step` apart
    int64_t rows, terms, columns;
    int64_t left_row, left_term, right_term, right_column;  // how far apart the numbers are
    int64_t out_step, adds, threads;    // adds: the sums start from what is in `out`
};

namespace {

constexpr int LANES = 16, ROWS = 8, VECTORS = 3, WIDE = VECTORS * LANES;  // of a tile whose sums stay in registers
constexpr int64_t TERMS = 512, BLOCK = 256;  // terms and rows of a packed block: half a MiB

// 16 rows of 16 numbers → columns: squares of 8, 4, 2 and 1 beside the diagonal change places.
void transpose(__m512 *rows) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int size = 8; size; size /= 2) {
        const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(size));
        const __m512i from_other = _mm512_xor_si512(lane, _mm512_set1_epi32(size | LANES));
        const __m512i first = _mm512_mask_mov_epi32(lane, odd, from_other);
        const __m512i second = _mm512_xor_si512(first, _mm512_set1_epi32(size));
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) {
            if (r & size) continue;
            const __m512 other = rows[r + size];
            rows[r + size] = _mm512_permutex2var_ps(rows[r], second, other);
            rows[r] = _mm512_permutex2var_ps(rows[r], first, other);
        }
    }
}

// [found, terms] numbers → [terms][side], zeros in place of missing ones. Either rows or terms are neighbours.
void pack(float *to, const float *from, int64_t found, int64_t side, int64_t terms, int64_t step, int64_t term_step) {
    if (step == 1 || term_step != 1) {
        if (found < side) std::memset(to, 0, side * terms * sizeof(float));
        for (int64_t k = 0; k < terms; k++)
            for (int64_t n = 0; n < found; n++) to[k * side + n] = from[n * step + k * term_step];
        return;
    }
    for (int64_t n = 0; n < side; n += LANES)
        for (int64_t k = 0; k < terms; k += LANES) {
            __m512 block[LANES];
            for (int r = 0; r < LANES; r++) {
                const __mmask16 kept = n + r < found ? first_of(terms - k) : 0;
                block[r] = _mm512_maskz_loadu_ps(kept, from + (n + r) * step + k);
            }
            transpose(block);
            for (int r = 0; r < LANES && k + r < terms; r++)
                _mm512_mask_storeu_ps(to + (k + r) * side + n, first_of(side - n), block[r]);
        }
}

struct Tile {  // of the result
    float *out;
    const float *start;  // or null
    int64_t step, rows, columns;
    bool adds;
};

// [ROWS, V * LANES] sums of packed factors.
template <int V> void multiply(const Tile &t, const float *left, const float *right, int64_t terms) {
    __m512 sums[ROWS][V];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < V; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < terms; k++) {
        __m512 of[V];
        for (int v = 0; v < V; v++) of[v] = _mm512_load_ps(right + k * V * LANES + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const __m512 times = _mm512_set1_ps(left[k * ROWS + r]);
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sums[r][v] = _mm512_fmadd_ps(times, of[v], sums[r][v]);
        }
    }
    for (int r = 0; r < ROWS && r < t.rows; r++)
        for (int v = 0; v < V; v++) {
            const __mmask16 kept = first_of(t.columns - v * LANES);
            float *to = t.out + r * t.step + v * LANES;
            const float *from = t.adds ? to : t.start ? t.start + v * LANES : nullptr;
            const __m512 sum = from ? _mm512_add_ps(_mm512_maskz_loadu_ps(kept, from), sums[r][v]) : sums[r][v];
            _mm512_mask_storeu_ps(to, kept, sum);
        }
}

struct Part {  // of the result, made by one thread
    int64_t first_row, last_row, first_column, last_column;
};

// Into the cache: columns that are packed next.
void fetch(const Product &p, int64_t term, int64_t terms, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n++)
        for (int64_t k = 0; k < terms; k += LANES)
            __builtin_prefetch(p.right + (term + k) * p.right_term + n * p.right_column);
}

void multiply(const Product &p, const Part &part) {
    const int64_t deep = std::min(TERMS, p.terms), high = std::min(BLOCK, upto(part.last_row - part.first_row, ROWS));
    Buffer<float> left(deep * high), right(deep * WIDE);
    for (int64_t k = 0; k == 0 || k < p.terms; k += TERMS) {
        const int64_t terms = std::min(TERMS, p.terms - k);
        for (int64_t row = part.first_row; row < part.last_row; row += BLOCK) {
            const int64_t rows = std::min(BLOCK, part.last_row - row);
            for (int64_t r = 0; r < rows; r += ROWS)
                pack(left.at + r * terms, p.left + (row + r) * p.left_row + k * p.left_term,
                     std::min<int64_t>(ROWS, rows - r), ROWS, terms, p.left_row, p.left_term);
            for (int64_t column = part.first_column; column < part.last_column; column += WIDE) {
                const int64_t columns = std::min<int64_t>(WIDE, part.last_column - column);
                const int64_t side = upto(columns, LANES);
                pack(right.at, p.right + k * p.right_term + column * p.right_column, columns, side, terms,
                     p.right_column, p.right_term);
                const auto tile = side == LANES ? multiply<1> : side == 2 * LANES ? multiply<2> : multiply<3>;
                const int64_t next = column + WIDE, last = std::min(next + WIDE, part.last_column);
                for (int64_t r = 0; r < rows; r += ROWS) {
                    fetch(p, k, terms, next + WIDE * r / rows, std::min(last, next + WIDE * (r + ROWS) / rows));
                    tile({p.out + (row + r) * p.out_step + column, p.start ? p.start + column : nullptr, p.out_step,
                          rows - r, columns, p.adds || k > 0},
                         left.at + r * terms, right.at, terms);
                }
            }
        }
    }
}

}  // namespace

extern "C" int flm_product(const Product *given) {
    const Product &p = *given;
    const bool by_row = p.rows > p.columns;
    const int64_t side = by_row ? ROWS : WIDE, count = upto(by_row ? p.rows : p.columns, side) / side;
    const int64_t threads = std::max<int64_t>(1, std::min(p.threads, count));
    try {
        in_threads(threads, [&](int64_t thread) {
            const int64_t first = count * thread / threads * side, last = count * (thread + 1) / threads * side;
            multiply(p, by_row ? Part{first, std::min(last, p.rows), 0, p.columns}
                               : Part{0, p.rows, first, std::min(last, p.columns)});
        });
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}
