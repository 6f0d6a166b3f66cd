// What the softmax multiplies: bf16, on processors with AMX or avx512_bf16, or float32.
//
// A right factor has PACKED of its rows together, number by number: as many as a lane of a vector holds.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "native_code.h"

#if !defined(__AVX512BF16__)
#error "this processor, or this compiler, has no products of bf16 (avx512_bf16)"
#endif

namespace {

using bf16 = uint16_t;

constexpr int SIDE = 32;  // of a tile of logits
constexpr int64_t FEW =   // candidates of one pass, as measured with AMX and without
#ifdef __AMX_BF16__
    8192;
#else
    16384;
#endif
template <class Number> constexpr int PACKED = sizeof(float) / sizeof(Number);

inline __m512 polynomial(__m512, __m512 y) { return y; }

// The same with further factors, the highest power first.
template <class... Factors> inline __m512 polynomial(__m512 x, __m512 y, float next, Factors... factors) {
    return polynomial(x, _mm512_fmadd_ps(y, x, _mm512_set1_ps(next)), factors...);
}

// As exactly as the products are.
template <class Number> inline __m512 power_of_two(__m512 x) {
    if constexpr (PACKED<Number> == 1) {  // relative error below 1e-7, by a polynomial on [-1/2, 1/2]
        const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 y = polynomial(_mm512_sub_ps(x, whole), _mm512_set1_ps(0.0001534580f), 0.0013399931f,
                                    0.0096184890f, 0.0555032878f, 0.2402264689f, 0.6931472057f, 1.0f);
        return _mm512_scalef_ps(y, whole);
    }
    // Relative error below 3e-6, by a polynomial on [0, 1).
    const __m512 y = polynomial(_mm512_reduce_ps(x, 1), _mm512_set1_ps(0.01353415f), 0.05201146f, 0.24144278f,
                                0.69300382f, 1.00000259f);
    return _mm512_scalef_ps(y, x);
}

// A row of fp32, times a factor; the rest of the row stays.
inline void narrow(const float *from, float *to, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d++) to[d] = from[d] * factor;
}

inline void narrow(const float *from, bf16 *to, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 some = first_of(dim - d);
        const __m512 row = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, from + d), _mm512_set1_ps(factor));
        _mm256_mask_storeu_epi16(to + d, some, (__m256i)_mm512_cvtneps_pbh(row));
    }
}

struct PairOrder {  // that pairs the elements from `first` on of one register with those of another
    alignas(64) int16_t at[32] = {};
    constexpr explicit PairOrder(int first) {
        for (int i = 0; i < 32; i++) at[i] = static_cast<int16_t>(first + i / 2 + i % 2 * 32);
    }
};
constexpr PairOrder LOW_PAIRS(0), HIGH_PAIRS(16);

// Two rows of 32 shares, `step` apart; as a right factor they lie in the same way.
inline void put(float *shares, float *, int64_t step, const __m512 *left, const __m512 *right) {
    for (int y = 0; y < 2; y++) {
        _mm512_store_ps(shares + y * step, left[y]);
        _mm512_store_ps(shares + y * step + 16, right[y]);
    }
}

// The same, and in pairs as a right factor.
inline void put(bf16 *shares, bf16 *pairs, int64_t step, const __m512 *left, const __m512 *right) {
    const __m512i low = _mm512_load_si512(LOW_PAIRS.at), high = _mm512_load_si512(HIGH_PAIRS.at);
    const __m512i upper = (__m512i)_mm512_cvtne2ps_pbh(right[0], left[0]);
    const __m512i lower = (__m512i)_mm512_cvtne2ps_pbh(right[1], left[1]);
    _mm512_store_si512(shares, upper);
    _mm512_store_si512(shares + step, lower);
    _mm512_store_si512(pairs, _mm512_permutex2var_epi16(upper, low, lower));
    _mm512_store_si512(pairs + SIDE, _mm512_permutex2var_epi16(upper, high, lower));
}

// PACKED numbers, 16 times.
inline __m512 repeated(const float *a) { return _mm512_set1_ps(*a); }

inline __m512 repeated(const bf16 *a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}

// sum + a b, 16 times PACKED numbers each.
template <class Number> inline __m512 add_product(__m512 sum, __m512 a, __m512 b) {
    if constexpr (PACKED<Number> == 1) return _mm512_fmadd_ps(a, b, sum);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}

// c [32, 32] = or += a [32, depth] b [depth, 32], eight rows of c in registers at a time. Steps in elements. Of float32 the
// terms are added up apart from c, which rounds less than one long sum.
template <bool ADD, class Number>
inline void product(float *c, int64_t c_step, const Number *a, int64_t a_step, const Number *b, int64_t b_step, int depth) {
    constexpr int ROWS = 8;
    constexpr bool APART = ADD && PACKED<Number> == 1, GOES_ON = ADD && !APART;
    for (int first = 0; first < SIDE; first += ROWS, c += ROWS * c_step, a += ROWS * a_step) {
        __m512 left[ROWS], right[ROWS];
        for (int r = 0; r < ROWS; r++) {
            left[r] = GOES_ON ? _mm512_loadu_ps(c + r * c_step) : _mm512_setzero_ps();
            right[r] = GOES_ON ? _mm512_loadu_ps(c + r * c_step + 16) : _mm512_setzero_ps();
        }
        for (int k = 0; k < depth; k += PACKED<Number>) {
            const Number *row = b + k / PACKED<Number> * b_step;
            const __m512 low = _mm512_loadu_ps(row), high = _mm512_loadu_ps(row + 16 * PACKED<Number>);
            for (int r = 0; r < ROWS; r++) {
                const __m512 times = repeated(a + r * a_step + k);
                left[r] = add_product<Number>(left[r], times, low);
                right[r] = add_product<Number>(right[r], times, high);
            }
        }
        for (int r = 0; r < ROWS; r++) {
            float *low = c + r * c_step, *high = low + 16;
            _mm512_storeu_ps(low, APART ? _mm512_add_ps(_mm512_loadu_ps(low), left[r]) : left[r]);
            _mm512_storeu_ps(high, APART ? _mm512_add_ps(_mm512_loadu_ps(high), right[r]) : right[r]);
        }
    }
}

#ifdef __AMX_BF16__

constexpr int XFEATURE_TILES = 18, ARCH_REQ_XCOMP_PERM = 0x1023;  // linux, asm/prctl.h

// Whether the system does not let this process use AMX.
inline bool is_refused() { return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILES) != 0; }

struct TileSetting {  // Intel 64 manual, volume 1, 18.3: palette 1, eight registers of 16 rows of 64 bytes
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Tiles {  // the registers of this thread, while it is alive
    Tiles() {
        const TileSetting setting;
        _tile_loadconfig(&setting);
    }
    Tiles(const Tiles &) = delete;
    ~Tiles() { _tile_release(); }
};

// The same of bf16, in AMX's registers.
template <bool ADD>
inline void product(float *c, int64_t c_step, const bf16 *a, int64_t a_step, const bf16 *b, int64_t b_step, int depth) {
    float *low = c + 16 * c_step;
    if (ADD) {
        _tile_loadd(0, c, c_step * 4);
        _tile_loadd(1, c + 16, c_step * 4);
        _tile_loadd(2, low, c_step * 4);
        _tile_loadd(3, low + 16, c_step * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + k, a_step * 2);
        _tile_loadd(5, a + 16 * a_step + k, a_step * 2);
        _tile_loadd(6, b + k / 2 * b_step, b_step * 2);
        _tile_loadd(7, b + k / 2 * b_step + 32, b_step * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, c_step * 4);
    _tile_stored(1, c + 16, c_step * 4);
    _tile_stored(2, low, c_step * 4);
    _tile_stored(3, low + 16, c_step * 4);
}

#else

inline bool is_refused() { return false; }

struct Tiles {
    Tiles() {}
};

#endif

}  // namespace
