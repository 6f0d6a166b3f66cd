// Passes over the tokens of a batch that PyTorch makes on one thread, or of which it makes several: rows by their numbers,
// sums over the items so far, dropout, what a query leaves out. For any processor. What a number is added up from, and in which order, does not
// depend on the threads, but for the gradients of `keep` and `old`, which are added up in the order of the threads.

#include <vector>

#include "native_code.h"

using std::uint16_t;
using std::uint64_t;
using std::uint8_t;

namespace {

enum { DONE, NO_MEMORY, OUTSIDE };  // what functions give; the last: a number of a row that is not there

inline void add(float *to, const float *from, float factor, int64_t n) {
#pragma omp simd
    for (int64_t d = 0; d < n; d++) to[d] += factor * from[d];
}

inline float dot(const float *x, const float *y, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; d++) sum += x[d] * y[d];
    return sum;
}

bool within(const int64_t *at, int64_t n, int64_t count) {
    bool found = true;
    for (int64_t t = 0; t < n; t++) found &= at[t] >= 0 && at[t] < count;
    return found;
}

// Where each of the parts of `count` rows begins, and `count`: as many of the numbers `at` [n] are of each part.
std::vector<int64_t> even_parts(const int64_t *at, int64_t n, int64_t count, int64_t parts) {
    std::vector<int64_t> begins(parts + 1, count), found(parts > 1 ? count : 0);
    begins[0] = 0;
    if (parts > 1)
        for (int64_t t = 0; t < n; t++) found[at[t]]++;
    for (int64_t part = 1, row = 0, before = 0; part < parts; part++) {
        while (row < count && before * parts < n * part) before += found[row++];
        begins[part] = row;
    }
    return begins;
}

}  // namespace

extern "C" {

// out [n, dim] = the rows [count, dim] at `at` [n].
int flm_gather(const float *rows, const int64_t *at, float *out, int64_t n, int64_t count, int64_t dim, int64_t threads) {
    if (!within(at, n, count)) return OUTSIDE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < n; t++) std::memcpy(out + t * dim, rows + at[t] * dim, dim * sizeof(float));
    return DONE;
}

// rows [count, dim] += factor times x [n, dim], each row of x at its number `at` [n].
int flm_scatter(const float *x, const int64_t *at, float *rows, int64_t n, int64_t count, int64_t dim, int64_t threads,
                float factor) {
    if (!within(at, n, count)) return OUTSIDE;
    try {
        const std::vector<int64_t> begins = even_parts(at, n, count, threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int64_t part = 0; part < threads; part++)
            for (int64_t t = 0; t < n; t++)
                if (at[t] >= begins[part] && at[t] < begins[part + 1]) add(rows + at[t] * dim, x + t * dim, factor, dim);
        return DONE;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}

// out [n] = x [n] times `scale`, or 0 where a number of 16 bits is below `dropped`. Four such are of one number of 64 bits,
// the k-th of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) from `seed` on.
void flm_dropout(const float *x, float *out, int64_t n, uint64_t seed, int64_t dropped, float scale, int64_t threads) {
    constexpr int64_t BLOCK = 64;  // numbers of 64 bits
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (n + 4 * BLOCK - 1) / (4 * BLOCK); block++) {
        uint64_t drawn[BLOCK];
        for (int64_t k = 0; k < BLOCK; k++) {
            uint64_t z = seed + (block * BLOCK + k + 1) * 0x9E3779B97F4A7C15ull;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
            drawn[k] = z ^ (z >> 31);
        }
        uint16_t parts[4 * BLOCK];
        std::memcpy(parts, drawn, sizeof parts);
        const int64_t first = block * 4 * BLOCK, some = std::min(4 * BLOCK, n - first);
        for (int64_t i = 0; i < some; i++) out[first + i] = parts[i] < dropped ? 0.0f : x[first + i] * scale;
    }
}

// The pairs of tokens of a sequence, by the first of the two: it and the column of the other, which differs from its own.
// The other is before it, or anywhere if `whole`, and `had` unless that is null. `found` [B] out: pairs of each sequence;
// if there are `rows`, in: where those of each sequence begin.
void flm_pairs(const int64_t *first, const int64_t *columns, const uint8_t *had, int64_t *found, int64_t *rows,
               int64_t *others, int64_t sequences, int64_t whole, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t s = 0; s < sequences; s++) {
        int64_t n = rows ? found[s] : 0;
        for (int64_t t = first[s]; t < first[s + 1]; t++)
            for (int64_t j = first[s]; j < (whole ? first[s + 1] : t); j++) {
                if (columns[j] == columns[t] || (had && !had[j])) continue;
                if (rows) rows[n] = t, others[n] = columns[j];
                n++;
            }
        if (!rows) found[s] = n;
    }
}

struct Sums {  // as in token_passes.py
    const float *x;                // [T, D] of the tokens; of its gradients, of what came out
    const int64_t *first;          // [B + 1] token of each sequence, and T
    const int32_t *const *between; // [B] of [L, L], L the side: buckets of the times between two tokens
    const int64_t *side;           // [B]
    const float *keep, *old;       // [1], [buckets]; null: a mean; 1 for all
    const float *grad;             // [T, D] of what came out; null: make that
    float *out;                    // [T, D] out: what came out, or the gradient of x
    float *keep_grad, *old_grad;   // [1], [buckets] added to
    int64_t sequences, dim, buckets, threads;
};

}  // extern "C"

namespace {

class Worker {  // a thread's
  public:
    Worker(const Sums &sums, int64_t longest)
        : p(sums), sum(p.dim), powers(longest), powers_grad(longest), old_grad(p.buckets) {
        for (int64_t age = 0; p.keep && age < longest; age++) powers[age] = age ? powers[age - 1] * *p.keep : 1.0f;
    }

    void sequence(int64_t number) {
        const int64_t begin = p.first[number];
        length = p.first[number + 1] - begin;
        if (!length) return;
        x = p.x + begin * p.dim, grad = p.grad ? p.grad + begin * p.dim : nullptr, out = p.out + begin * p.dim;
        std::memset(out, 0, (p.old ? length : 1) * p.dim * sizeof(float));
        std::fill(sum.begin(), sum.end(), 0.0f);
        if (p.old) grad ? learn_timed(p.between[number], p.side[number]) : sum_timed(p.between[number], p.side[number]);
        else grad ? learn() : run();
    }

    void add_numbers() const {
        double total = keep_grad;
        for (size_t age = 1; age < powers.size(); age++) total += static_cast<double>(age) * powers[age - 1] * powers_grad[age];
        *p.keep_grad += static_cast<float>(total);
        for (int64_t n = 0; n < p.buckets; n++) p.old_grad[n] += static_cast<float>(old_grad[n]);
    }

  private:
    const Sums &p;
    std::vector<float> sum, powers;              // [D]; by age in items, what an item counts
    std::vector<double> powers_grad, old_grad;
    double keep_grad = 0;
    const float *x = nullptr, *grad = nullptr;
    float *out = nullptr;
    int64_t length = 0;

    // A mean, or a decaying sum by age in items.
    void run() {
        const float keep = p.keep ? *p.keep : 1.0f;
        for (int64_t t = 1; t < length; t++) {
            const float count = p.keep ? 1.0f : 1.0f / t;
            const float *of_item = x + t * p.dim;
            float *to = out + t * p.dim;
#pragma omp simd
            for (int64_t d = 0; d < p.dim; d++) {
                sum[d] = sum[d] * keep + of_item[d];
                to[d] = sum[d] * count;
            }
        }
    }

    void learn() {  // x is what came out
        const float keep = p.keep ? *p.keep : 1.0f;
        for (int64_t t = length - 1; t > 0; t--) {
            const float count = p.keep ? 1.0f : 1.0f / t;
            const float *of_sum = grad + t * p.dim;
            float *to = out + t * p.dim;
#pragma omp simd
            for (int64_t d = 0; d < p.dim; d++) to[d] = sum[d] = sum[d] * keep + of_sum[d] * count;
            if (p.keep && t > 1) keep_grad += dot(to, x + (t - 1) * p.dim, p.dim);
        }
    }

    void sum_timed(const int32_t *between, int64_t side) {
        for (int64_t t = 1; t < length; t++)
            for (int64_t s = 1; s <= t; s++)
                add(out + t * p.dim, x + s * p.dim, powers[t - s] * p.old[between[t * side + s]], p.dim);
    }

    void learn_timed(const int32_t *between, int64_t side) {
        for (int64_t t = 1; t < length; t++) {
            const float *of_sum = grad + t * p.dim;
            for (int64_t s = 1; s <= t; s++) {
                const int32_t bucket = between[t * side + s];
                const float of_count = dot(of_sum, x + s * p.dim, p.dim), old = p.old[bucket];
                add(out + s * p.dim, of_sum, powers[t - s] * old, p.dim);
                powers_grad[t - s] += of_count * old;
                old_grad[bucket] += of_count * powers[t - s];
            }
        }
    }
};

}  // namespace

// Of each token but the first of a sequence: the sum over the items up to it, by `keep`^(items since then) and, if there
// are times, by `old` of the time since then; or their mean.
extern "C" int flm_sums(const Sums *sums) {
    const Sums &p = *sums;
    try {
        by_sequence<Worker>(p, [&](const Worker &worker) {
            if (p.keep_grad) worker.add_numbers();
        });
        return DONE;
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}
