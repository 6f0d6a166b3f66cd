// HSTU's pointwise attention and its gradients, sequence by sequence, without padding; nothing but what goes in and comes
// out is in memory. For any processor; vectors are those of GCC and Clang, as wide as its registers.
//
// With u, v, q, k = SiLU(uvqk), a token i mixes the sum over j <= i of
// SiLU(scale q_i . k_j + position[i - j] + time[between_ij]) / (i + 1) v_j. Scores are made 32 queries at a time, and anew
// for the gradients. Later keys are left out, so half of the products are not made. Threads take sequences; the gradients
// of the biases are added up in the order of the threads.

#include <cmath>

#include "native_code.h"

struct Problem {  // as in pointwise_attention.py
    const float *uvqk;             // [T, 4 D]
    const int64_t *first;          // [B + 1] token of each sequence, and T
    const int32_t *const *between; // [B] of [L, L], L the side: buckets of the times between two tokens; or null
    const int64_t *side;           // [B]
    const float *position;         // [heads, P]
    const float *time;             // [heads, buckets]
    const float *u_grad, *grad;    // [T, D] of u and of what was mixed; null: make these
    float *u, *mixed;              // [T, D] out
    float *uvqk_grad;              // [T, 4 D] out
    float *position_grad, *time_grad;  // [heads, P], [heads, buckets] added to
    int64_t sequences, dim, heads, positions, buckets, threads;
};

namespace {

// Floats of a vector, and rows of a product whose sums stay in registers; WIDE is a multiple of ROWS.
#if defined(__AVX512F__)
constexpr int WIDE = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int WIDE = 8, ROWS = 4;
#else
constexpr int WIDE = 4, ROWS = 4;
#endif
constexpr int BLOCK = 32;  // queries whose scores are held

typedef float Lanes __attribute__((vector_size(4 * WIDE)));
typedef float Unaligned __attribute__((vector_size(4 * WIDE), aligned(4)));
typedef int32_t Whole __attribute__((vector_size(4 * WIDE)));

inline Lanes load(const float *at) { return *reinterpret_cast<const Unaligned *>(at); }
inline void store(float *at, Lanes x) { *reinterpret_cast<Unaligned *>(at) = x; }

inline Lanes sigmoid(Lanes x) {  // by the Taylor polynomial of 2^y on [-1/2, 1/2]: relative error below 2e-7
    const Lanes most = Lanes{} + 80.0f;
    x = x > most ? most : x < -most ? -most : x;
    const Lanes power = x * -1.44269504088896341f;
    const Lanes magic = Lanes{} + 12582912.0f;  // adding it rounds to a whole number
    const Lanes whole = power + magic - magic, y = power - whole;
    Lanes e = y * 1.5403530e-4f + 1.3333558e-3f;
    e = e * y + 9.6181291e-3f;
    e = e * y + 5.5504109e-2f;
    e = e * y + 2.4022651e-1f;
    e = e * y + 6.9314718e-1f;
    e = e * y + 1.0f;
    const Whole exponent = (__builtin_convertvector(whole, Whole) + 127) << 23;
    return 1.0f / (1.0f + e * (Lanes)exponent);  // its bits
}

inline Lanes silu(Lanes x) { return x * sigmoid(x); }

inline Lanes silu_slope(Lanes x) {
    const Lanes s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// to [n] = what `make` gives for a vector of x, and of y, at a time.
template <class Make> inline void by_lanes(float *to, const float *x, const float *y, int64_t n, Make make) {
    int64_t d = 0;
    for (; d + WIDE <= n; d += WIDE) store(to + d, make(load(x + d), load(y + d)));
    if (d == n) return;
    float some[3][WIDE] = {};
    std::memcpy(some[0], x + d, (n - d) * sizeof(float));
    std::memcpy(some[1], y + d, (n - d) * sizeof(float));
    store(some[2], make(load(some[0]), load(some[1])));
    std::memcpy(to + d, some[2], (n - d) * sizeof(float));
}

inline void silu_of(float *to, const float *x, int64_t n) {
    by_lanes(to, x, x, n, [](Lanes a, Lanes) { return silu(a); });
}

inline void silu_grad(float *to, const float *x, const float *grad, int64_t n) {
    by_lanes(to, x, grad, n, [](Lanes a, Lanes g) { return g * silu_slope(a); });
}

// c [ROWS, COLUMNS vectors] = or += a [ROWS, depth] b [depth, COLUMNS vectors]. Steps in floats; rows of b and c are
// contiguous.
template <int COLUMNS>
inline void product(float *c, int64_t c_step, const float *a, int64_t a_row, int64_t a_column, const float *b,
                    int64_t b_step, int64_t depth, bool add) {
    Lanes sum[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < COLUMNS; n++) sum[r][n] = add ? load(c + r * c_step + n * WIDE) : Lanes{};
    for (int64_t k = 0; k < depth; k++) {
        Lanes right[COLUMNS];
        for (int n = 0; n < COLUMNS; n++) right[n] = load(b + k * b_step + n * WIDE);
        for (int r = 0; r < ROWS; r++) {
            const float left = a[r * a_row + k * a_column];
            for (int n = 0; n < COLUMNS; n++) sum[r][n] += left * right[n];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < COLUMNS; n++) store(c + r * c_step + n * WIDE, sum[r][n]);
}

struct Left {  // a factor, and where its next row and its next column are
    const float *at;
    int64_t row, column;
};

// c [rows, columns] = or += a b; rows are a multiple of ROWS, columns of WIDE.
void multiply(float *c, int64_t c_step, Left a, const float *b, int64_t b_step, int64_t rows, int64_t columns,
              int64_t depth, bool add) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        const float *left = a.at + r * a.row;
        float *to = c + r * c_step;
        int64_t n = 0;
        for (; n + 2 * WIDE <= columns; n += 2 * WIDE)
            product<2>(to + n, c_step, left, a.row, a.column, b + n, b_step, depth, add);
        if (n < columns) product<1>(to + n, c_step, left, a.row, a.column, b + n, b_step, depth, add);
    }
}

class Worker {  // a thread's
  public:
    Worker(const Problem &problem, int64_t longest)
        : p(problem), width(p.dim / p.heads), wide(upto(width, WIDE)), most(upto(longest, BLOCK)),
          scale(1 / std::sqrt(static_cast<float>(width))), q(most * wide), k(most * wide), v(most * wide),
          g(p.grad ? most * wide : 0), across(wide * most), values_across(p.grad ? wide * most : 0),
          scores(BLOCK * most), weights(p.grad ? BLOCK * most : 0), out(BLOCK * wide),
          k_grad(p.grad ? most * wide : 0), v_grad(p.grad ? most * wide : 0), reach(p.positions + WIDE),
          back(p.between ? p.heads * reach : 0), position_grad(p.between && p.grad ? p.heads * reach : 0),
          time_grad(p.between && p.grad ? p.heads * p.buckets : 0) {
        for (int64_t h = 0; p.between && h < p.heads; h++)
            for (int64_t n = 0; n < p.positions; n++)
                back.at[h * reach + n] = p.position[(h + 1) * p.positions - 1 - n];
    }

    void sequence(int64_t number) {
        begin = p.first[number];
        length = p.first[number + 1] - begin;
        between = p.between ? p.between[number] : nullptr;
        side = p.between ? p.side[number] : 0;
        for (int64_t t = begin; t < begin + length; t++) {
            const float *x = p.uvqk + t * 4 * p.dim;
            if (p.grad) silu_grad(p.uvqk_grad + t * 4 * p.dim, x, p.u_grad + t * p.dim, p.dim);
            else silu_of(p.u + t * p.dim, x, p.dim);
        }
        for (head = 0; head < p.heads; head++) {
            bring();
            for (int64_t i = 0; i < length; i += BLOCK) p.grad ? learn(i) : mix(i);
            if (!p.grad) continue;
            put_grad(k_grad.at, 3, 0, length);
            put_grad(v_grad.at, 1, 0, length);
        }
    }

    // Add the gradients of this thread's sequences.
    void add_biases(float *of_position, float *of_time) const {
        for (int64_t h = 0; h < p.heads; h++) {
            const float *from = position_grad.at + h * reach;
            for (int64_t n = 0; n < p.positions; n++) of_position[h * p.positions + n] += from[p.positions - 1 - n];
        }
        for (int64_t n = 0; n < p.heads * p.buckets; n++) of_time[n] += time_grad.at[n];
    }

  private:
    const Problem &p;
    const int64_t width, wide, most;  // of a head; to a multiple of WIDE; the longest sequence, to a multiple of 32
    const float scale;
    Buffer<float> q, k, v, g;             // [most, wide] of this sequence and head; zeros behind, to a multiple of 32
    Buffer<float> across, values_across;  // [wide, most] keys, values
    Buffer<float> scores, weights;        // [BLOCK, most]
    Buffer<float> out, k_grad, v_grad;    // [BLOCK, wide], [most, wide] twice
    const int64_t reach;           // P, and a vector more
    Buffer<float> back, position_grad;    // [heads, reach] biases of the positions and their gradients, the farthest first
    Buffer<float> time_grad;              // [heads, buckets]
    const int32_t *between = nullptr;
    int64_t begin = 0, length = 0, side = 0, head = 0;

    void bring() {
        take(v, 1);
        take(q, 2);
        take(k, 3);
        turn(across, k);
        if (!p.grad) return;
        for (int64_t i = 0; i < length; i++)
            std::memcpy(g.at + i * wide, p.grad + (begin + i) * p.dim + head * width, width * sizeof(float));
        leave(g);
        turn(values_across, v);
        std::memset(k_grad.at, 0, upto(length, BLOCK) * wide * sizeof(float));
        std::memset(v_grad.at, 0, upto(length, BLOCK) * wide * sizeof(float));
    }

    // The part of uvqk, of this head.
    void take(Buffer<float> &to, int64_t part) {
        for (int64_t i = 0; i < length; i++)
            silu_of(to.at + i * wide, p.uvqk + ((begin + i) * 4 + part) * p.dim + head * width, width);
        leave(to);
    }

    void leave(Buffer<float> &to) {
        std::memset(to.at + length * wide, 0, (upto(length, BLOCK) - length) * wide * sizeof(float));
    }

    void turn(Buffer<float> &to, const Buffer<float> &from) {
        for (int64_t i = 0; i < upto(length, WIDE); i++)
            for (int64_t d = 0; d < wide; d++) to.at[d * most + i] = from.at[i * wide + d];
    }

    // Gradients of the queries, keys or values from i on.
    void put_grad(const float *from, int64_t part, int64_t i, int64_t count) {
        for (int64_t r = 0; r < count; r++) {
            const int64_t at = ((begin + i + r) * 4 + part) * p.dim + head * width;
            silu_grad(p.uvqk_grad + at, p.uvqk + at, from + r * wide, width);
        }
    }

    int64_t rows(int64_t i) const { return std::min<int64_t>(BLOCK, length - i); }
    int64_t columns(int64_t i) const { return upto(std::min(i + BLOCK, length), WIDE); }

    // [rows, columns] scores of the queries from i on, before SiLU; of later keys too.
    void score(int64_t i) {
        multiply(scores.at, most, {q.at + i * wide, wide, 1}, across.at, most, upto(rows(i), ROWS), columns(i), wide,
                 false);
        for (int64_t r = 0; r < rows(i); r++) {
            float *row = scores.at + r * most;
            const int64_t query = i + r, keys = upto(query + 1, WIDE);
            for (int64_t j = 0; j < keys; j += WIDE) {
                Lanes x = load(row + j) * scale;
                if (between) x += load(back.at + head * reach + p.positions - 1 - query + j);
                store(row + j, x);
            }
            if (!between) continue;
            const int32_t *bucket = between + query * side;
            const float *time = p.time + head * p.buckets;
            for (int64_t j = 0; j <= query; j++) row[j] += time[bucket[j]];
        }
    }

    // Zero from the key behind the query on.
    void leave_later(float *row, int64_t query, int64_t i) {
        std::memset(row + query + 1, 0, (columns(i) - query - 1) * sizeof(float));
    }

    void mix(int64_t i) {
        score(i);
        for (int64_t r = 0; r < upto(rows(i), ROWS); r++) {
            float *row = scores.at + r * most;
            const int64_t query = i + r;
            const float count = 1.0f / (query + 1);
            for (int64_t j = 0; j < upto(query + 1, WIDE); j += WIDE) {
                const Lanes x = load(row + j);
                store(row + j, silu(x) * count);
            }
            if (query < length) leave_later(row, query, i);
        }
        multiply(out.at, wide, {scores.at, most, 1}, v.at, wide, upto(rows(i), ROWS), wide,
                 std::min(i + BLOCK, length), false);
        for (int64_t r = 0; r < rows(i); r++)
            std::memcpy(p.mixed + (begin + i + r) * p.dim + head * width, out.at + r * wide, width * sizeof(float));
    }

    void learn(int64_t i) {
        const int64_t some = upto(rows(i), ROWS), keys = columns(i);
        score(i);
        multiply(weights.at, most, {g.at + i * wide, wide, 1}, values_across.at, most, some, keys, wide, false);
        for (int64_t r = 0; r < rows(i); r++) {
            float *score = scores.at + r * most, *weight = weights.at + r * most;
            const int64_t query = i + r;
            const float count = 1.0f / (query + 1);
            for (int64_t j = 0; j < upto(query + 1, WIDE); j += WIDE) {
                const Lanes x = load(score + j), s = sigmoid(x), of_weight = load(weight + j);
                store(weight + j, x * s * count);
                store(score + j, of_weight * count * s * (1.0f + x * (1.0f - s)));
            }
            leave_later(score, query, i);
            leave_later(weight, query, i);
            if (between) learn_biases(score, query);
        }
        for (int64_t r = rows(i); r < some; r++) {
            std::memset(scores.at + r * most, 0, keys * sizeof(float));
            std::memset(weights.at + r * most, 0, keys * sizeof(float));
        }
        multiply(out.at, wide, {scores.at, most, 1}, k.at, wide, some, wide, std::min(i + BLOCK, length), false);
        for (int64_t n = 0; n < some * wide; n++) out.at[n] *= scale;
        put_grad(out.at, 2, i, rows(i));
        for (int64_t n = 0; n < some * wide; n++) out.at[n] = q.at[i * wide + n] * scale;
        multiply(k_grad.at, wide, {scores.at, 1, most}, out.at, wide, keys, wide, some, true);
        multiply(v_grad.at, wide, {weights.at, 1, most}, g.at + i * wide, wide, keys, wide, some, true);
    }

    void learn_biases(const float *score, int64_t query) {
        float *of_position = position_grad.at + head * reach + p.positions - 1 - query;
        for (int64_t j = 0; j < upto(query + 1, WIDE); j += WIDE)
            store(of_position + j, load(of_position + j) + load(score + j));
        const int32_t *bucket = between + query * side;
        float *of_time = time_grad.at + head * p.buckets;
        for (int64_t j = 0; j <= query; j++) of_time[bucket[j]] += score[j];
    }
};

}  // namespace

// 0: done; 1: no memory.
extern "C" int flm_pointwise_attention(const Problem *problem) {
    try {
        const Problem &p = *problem;
        by_sequence<Worker>(p, [&](const Worker &worker) {
            if (p.grad && p.between) worker.add_biases(p.position_grad, p.time_grad);
        });
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
