// A softmax and its gradients whose logits never leave the cache, of products of bf16 or of float32 (softmax_numbers.h).
//
// Tiles of 32 candidates x 32 queries (compare Dao et al., FlashAttention, 2022). Logits and sums are fp32. A tile has a
// row for each candidate, so that sums over candidates need no work across lanes, and so that the shares are a left factor
// for the candidates' gradient as they lie.
//
// Few candidates: one pass. The exponentials of 128 queries for all candidates stay in the cache until their sums are
// known. Threads take queries; the candidates' gradients are added up in the order of the threads.
//
// Many candidates: two passes. The first adds up each query's exponentials, the second makes the logits anew and adds up
// both gradients. Threads take candidates; queries' sums are added up in the order of the threads.

#include <immintrin.h>

#include <cmath>
#include <vector>

#include "model/softmax_numbers.h"
#include "native_code.h"

struct Problem {  // as in fused_softmax.py
    const float *query, *weight;    // [T, D]; [T] of the queries' losses in the gradients, or null: 1
    const float *items, *log_q;     // [C, D], [C]
    const int64_t *target;          // [T]
    const int64_t *hidden_rows, *hidden_columns;  // [P] queries, ascending, and candidates that they leave out
    const float *domain;            // [C] or null: a query has the candidates of its target's domain
    float *losses;                  // [T] out: log of the sum of exp(logit) over the candidates, less the target's logit
    float *query_grad, *items_grad; // [T, D] out, and [C, D] but for what targets add; or both null: the losses alone
    int64_t queries, candidates, dim, hidden, threads;
    int64_t float32;                // of products; 0: bf16
    float scale;                    // of logits
};

namespace {

constexpr int ITEMS = 256;         // candidates of a block
constexpr int QUERIES = 128;       // queries of a block
constexpr int64_t MOST_ROWS = 65536;  // of the candidates' gradients by thread in one pass
constexpr float NOTHING = -1e30f;  // a logit whose exponential is 0
constexpr float MOST = 1e30f;      // of a sum of exponentials
constexpr float LOG2_E = 1.44269504088896341f;
constexpr unsigned FLUSH_DENORMALS = 0x8040;

struct Flushed {  // denormal numbers are zeros in this thread, while it is alive
    const unsigned control = _mm_getcsr();
    Flushed() { _mm_setcsr(control | FLUSH_DENORMALS); }
    Flushed(const Flushed &) = delete;
    ~Flushed() { _mm_setcsr(control); }
};

struct Fixed {  // a logit that is no product: a query's own target, or a candidate that it leaves out
    int32_t query;
    int16_t item;  // within its panel of 32 candidates
    bool own;
};

enum Pass { LARGEST, SUM, GRADIENTS, ONCE };

template <class Number> class Softmax {
    static constexpr int PACKED = ::PACKED<Number>;
    static constexpr int64_t PAIRS = PACKED > 1 ? ITEMS * QUERIES : 0;  // shares that lie elsewhere as a right factor

  public:
    explicit Softmax(const Problem &problem)
        : p(problem), rows((p.queries + SIDE - 1) / SIDE * SIDE), dim((p.dim + SIDE - 1) / SIDE * SIDE),
          panels((p.candidates + SIDE - 1) / SIDE), threads(std::max<int64_t>(1, std::min(p.threads, panels))),
          query(rows * dim), reference(rows), truth(rows), correction(panels * SIDE), domain(panels * SIDE), wanted(rows),
          sums(threads * rows) {
        const int64_t tiles = rows / SIDE;
        with_tiles([&](int64_t k) { pack_queries(tiles * k / threads * SIDE, tiles * (k + 1) / threads * SIDE); });
        for (int64_t c = 0; c < panels * SIDE; c++) {
            correction.at[c] = c < p.candidates ? std::max(-p.log_q[c] * LOG2_E, NOTHING) : NOTHING;
            domain.at[c] = p.domain && c < p.candidates ? p.domain[c] : 0;
        }
        sort_fixed();
    }

    void run() {
        if (p.query_grad && p.candidates <= FEW && p.candidates * threads <= MOST_ROWS && once()) return;
        // The target's own exponential is 1, so no sum is below 1; only if it is very large the largest logit is needed.
        if (!add_up()) {
            std::fill_n(sums.at, threads * rows, -INFINITY);
            std::fill_n(reference.at, p.queries, 0.0f);  // a difference would be rounded where logits are huge
            pass<LARGEST>();
            for (int64_t t = 0; t < p.queries; t++) {
                float largest = sums.at[t];
                for (int64_t k = 1; k < threads; k++) largest = std::max(largest, sums.at[k * rows + t]);
                reference.at[t] = largest;
            }
            add_up();
        }
        for (int64_t t = 0; t < p.queries; t++) {
            reference.at[t] += std::log2(sums.at[t]);
            p.losses[t] = (reference.at[t] - truth.at[t]) / LOG2_E;
        }
        if (!p.query_grad) return;
        Buffer<Number> packed(rows * dim);
        Buffer<float> added(threads * rows * dim);
        weighted = packed.at, of_query = added.at;
        pack_weighted(weighted, 0, p.queries, false);
        pass<GRADIENTS>();
        for (int64_t first = 0; first < p.queries; first += SIDE)
            for (int64_t d = 0; d < p.dim; d++)
                for (int64_t t = first; t < std::min(first + SIDE, p.queries); t++) {
                    float sum = 0;
                    for (int64_t k = 0; k < threads; k++) sum += of_query[(k * dim + d) * rows + t];
                    put_query_grad(t, d, sum);
                }
    }

  private:
    const Problem &p;
    const int64_t rows, dim, panels, threads;  // queries and width, each a multiple of 32; panels of 32 candidates
    Buffer<Number> query;                      // [rows / 32][dim / PACKED][32][PACKED], in powers of two
    Number *weighted = nullptr;                // [rows / PACKED][dim][PACKED]
    Buffer<float> reference, truth;            // [rows] in powers of two: what is subtracted; the target's logit
    Buffer<float> correction, domain, wanted;
    Buffer<float> sums;                        // by thread: [rows]
    float *of_query = nullptr;                 // by thread: [dim, rows]
    std::vector<int64_t> begin;                // [panels + 1] of a panel's fixed logits
    std::vector<Fixed> fixed;

    void pack_queries(int64_t first, int64_t end) {
        Buffer<Number> row(dim);
        for (int64_t t = first; t < end; t++) {
            reference.at[t] = -NOTHING;
            if (t >= p.queries) continue;
            const float *own = p.query + t * p.dim, *item = p.items + p.target[t] * p.dim;
            float product = 0;
#pragma omp simd reduction(+ : product)
            for (int64_t d = 0; d < p.dim; d++) product += own[d] * item[d];
            reference.at[t] = truth.at[t] = product * p.scale * LOG2_E;
            wanted.at[t] = p.domain ? p.domain[p.target[t]] : 0;
            narrow(own, row.at, p.dim, p.scale * LOG2_E);
            Number *to = query.at + t / SIDE * SIDE * dim + t % SIDE * PACKED;
            for (int64_t d = 0; d < dim; d += PACKED) std::memcpy(to + d * SIDE, row.at + d, PACKED * sizeof(Number));
        }
    }

    float weight(int64_t t) const { return p.weight ? p.scale * p.weight[t] : p.scale; }

    void put_query_grad(int64_t t, int64_t d, float of_shares) {
        p.query_grad[t * p.dim + d] = weight(t) * (of_shares - p.items[p.target[t] * p.dim + d]);
    }

    // Weighted queries → [(end - first) / PACKED][dim][PACKED], each over its sum of exponentials if that is asked for.
    void pack_weighted(Number *to, int64_t first, int64_t end, bool over_sums) {
        Buffer<Number> row(dim);
        for (int64_t t = first; t < end; t++) {
            narrow(p.query + t * p.dim, row.at, p.dim, over_sums ? weight(t) / sums.at[t] : weight(t));
            for (int64_t d = 0; d < p.dim; d++)
                to[((t - first) / PACKED * dim + d) * PACKED + (t - first) % PACKED] = row.at[d];
        }
    }

    // By panel, then by query. Each thread counts, and then puts, those of its queries.
    void sort_fixed() {
        std::vector<int64_t> next(threads * panels);
        const auto of_thread = [&](int64_t k, const auto &put) {
            const int64_t end = p.queries * (k + 1) / threads, *rows = p.hidden_rows;
            int64_t t = p.queries * k / threads, i = std::lower_bound(rows, rows + p.hidden, t) - rows;
            for (int64_t *at = next.data() + k * panels; t < end; t++) {
                for (; i < p.hidden && rows[i] == t; i++) put(at, t, p.hidden_columns[i], false);
                put(at, t, p.target[t], true);  // last, so that it stays
            }
        };
        with_tiles([&](int64_t k) {
            of_thread(k, [](int64_t *at, int64_t, int64_t c, bool) { at[c / SIDE]++; });
        });
        begin.assign(panels + 1, 0);
        for (int64_t i = 0, sum = 0; i < panels; i++) {
            for (int64_t k = 0; k < threads; k++) {
                const int64_t count = next[k * panels + i];
                next[k * panels + i] = sum;
                sum += count;
            }
            begin[i + 1] = sum;
        }
        fixed.resize(begin[panels]);
        with_tiles([&](int64_t k) {
            of_thread(k, [&](int64_t *at, int64_t t, int64_t c, bool own) {
                fixed[at[c / SIDE]++] = {static_cast<int32_t>(t), static_cast<int16_t>(c % SIDE), own};
            });
        });
    }

    bool add_up() {
        std::memset(sums.at, 0, threads * rows * sizeof(float));
        pass<SUM>();
        bool small = true;
        for (int64_t t = 0; t < p.queries; t++) {
            for (int64_t k = 1; k < threads; k++) sums.at[t] += sums.at[k * rows + t];
            small &= !(sums.at[t] > MOST);
        }
        return small;
    }

    template <Pass PASS> void pass() {
        with_tiles([this](int64_t thread) { part<PASS>(thread); });
    }

    template <class Work> void with_tiles(const Work &work) {
        in_threads(threads, [&](int64_t k) {
            const Flushed flushed;
            const Tiles tiles;
            work(k);
        });
    }

    // All in one pass; false: a sum is too large.
    bool once() {
        const int64_t blocks = (panels * SIDE + ITEMS - 1) / ITEMS, size = panels * SIDE * dim;
        Buffer<Number> items(blocks * ITEMS * dim), across(blocks * ITEMS * dim);
        with_tiles([&](int64_t k) {
            for (int64_t b = blocks * k / threads; b < blocks * (k + 1) / threads; b++)
                pack_items(items.at + b * ITEMS * dim, across.at + b * ITEMS * dim, b * ITEMS,
                           std::min<int64_t>(ITEMS, panels * SIDE - b * ITEMS));
        });
        Buffer<float> gradients(threads * size);
        with_tiles([&](int64_t k) { queries_once(k, items.at, across.at, gradients.at + k * size); });
        for (int64_t t = 0; t < p.queries; t++)
            if (sums.at[t] > MOST) return false;
        with_tiles([&](int64_t k) {
            for (int64_t c = p.candidates * k / threads; c < p.candidates * (k + 1) / threads; c++)
                for (int64_t d = 0; d < p.dim; d++) {
                    float sum = 0;
                    for (int64_t n = 0; n < threads; n++) sum += gradients.at[n * size + c * dim + d];
                    p.items_grad[c * p.dim + d] = sum;
                }
        });
        return true;
    }

    // The part of a thread: sums and gradients of its queries, and what they add to the candidates' gradients.
    void queries_once(int64_t thread, const Number *items, const Number *across, float *gradient) {
        const int64_t tiles = rows / SIDE, end = tiles * (thread + 1) / threads * SIDE;
        Buffer<Number> shares(panels * SIDE * QUERIES), pairs(PAIRS), scaled(QUERIES * dim);
        Buffer<float> to_query(dim * QUERIES);
        std::vector<int64_t> next(panels);
        int64_t q = tiles * thread / threads * SIDE;
        for (int64_t i = 0; i < panels; i++)
            for (next[i] = begin[i]; next[i] < begin[i + 1] && fixed[next[i]].query < q;) next[i]++;
        for (; q < end; q += QUERIES) {
            const int wide = std::min<int64_t>(QUERIES, end - q);
            std::memset(to_query.at, 0, dim * QUERIES * sizeof(float));
            for (int64_t first = 0; first < panels; first += ITEMS / SIDE) {
                const int count = std::min<int64_t>(ITEMS / SIDE, panels - first);
                for (int64_t i = first; i < first + count; i++)
                    for (int g = 0; g < wide; g += SIDE)
                        tile<ONCE>({items + i * SIDE * dim, shares.at + i * SIDE * QUERIES + g,
                                    pairs.at + (i - first) * SIDE * QUERIES + PACKED * g, next[i]},
                                   i, q + g, sums.at);
                add_to_queries(to_query.at, QUERIES, across + first * SIDE * dim,
                               PACKED > 1 ? pairs.at : shares.at + first * SIDE * QUERIES, count, wide);
            }
            const int64_t last = std::min(q + wide, p.queries);
            for (int64_t t = q; t < last; t++) {
                p.losses[t] = std::log2(sums.at[t]) / LOG2_E;
                for (int64_t d = 0; d < p.dim; d++) put_query_grad(t, d, to_query.at[d * QUERIES + t - q] / sums.at[t]);
            }
            pack_weighted(scaled.at, q, last, true);
            for (int64_t i = 0; i < panels; i++)
                add_to_items(gradient + i * SIDE * dim, shares.at + i * SIDE * QUERIES, scaled.at, wide);
        }
    }

    struct Block {
        Buffer<Number> items, across;  // [ITEMS, dim], [dim, ITEMS]
        Buffer<Number> shares, pairs;  // [ITEMS, QUERIES], [ITEMS / PACKED][QUERIES][PACKED]
        Buffer<float> gradient;        // [ITEMS, dim]
        int64_t next[ITEMS / SIDE];  // fixed logit of each panel
        explicit Block(int64_t dim)
            : items(ITEMS * dim), across(ITEMS * dim), shares(ITEMS * QUERIES), pairs(PAIRS),
              gradient(ITEMS * dim) {}
    };

    template <Pass PASS> void part(int64_t thread) {
        Block block(dim);
        const int64_t end = panels * (thread + 1) / threads;
        for (int64_t first = panels * thread / threads; first < end; first += ITEMS / SIDE) {
            const int count = std::min<int64_t>(ITEMS / SIDE, end - first);
            for (int i = 0; i < count; i++) block.next[i] = begin[first + i];
            pack_items(block.items.at, PASS == GRADIENTS ? block.across.at : nullptr, first * SIDE, count * SIDE);
            if (PASS == GRADIENTS) std::memset(block.gradient.at, 0, ITEMS * dim * sizeof(float));
            for (int64_t q = 0; q < rows; q += QUERIES) {
                const int wide = std::min<int64_t>(QUERIES, rows - q);
                for (int i = 0; i < count; i++)
                    for (int g = 0; g < wide; g += SIDE)
                        tile<PASS>({block.items.at + i * SIDE * dim, block.shares.at + i * SIDE * QUERIES + g,
                                    block.pairs.at + i * SIDE * QUERIES + PACKED * g, block.next[i]},
                                   first + i, q + g, sums.at + thread * rows);
                if (PASS != GRADIENTS) continue;
                add_to_queries(of_query + thread * rows * dim + q, rows, block.across.at,
                               PACKED > 1 ? block.pairs.at : block.shares.at, count, wide);
                for (int i = 0; i < count; i++)
                    add_to_items(block.gradient.at + i * SIDE * dim, block.shares.at + i * SIDE * QUERIES,
                                 weighted + q * dim, wide);
            }
            if (PASS == GRADIENTS)
                for (int64_t c = first * SIDE; c < std::min((first + count) * SIDE, p.candidates); c++)
                    std::memcpy(p.items_grad + c * p.dim, block.gradient.at + (c - first * SIDE) * dim,
                                p.dim * sizeof(float));
        }
    }

    // Candidates from `first` on: [ITEMS, dim], and if asked for [dim, ITEMS].
    void pack_items(Number *items, Number *across, int64_t first, int count) {
        for (int i = 0; i < count; i++) {
            Number *row = items + i * dim;
            if (first + i < p.candidates) narrow(p.items + (first + i) * p.dim, row, p.dim, 1);
            else std::memset(row, 0, dim * sizeof(Number));
        }
        if (!across) return;
        for (int64_t d = 0; d < dim; d++)
            for (int i = 0; i < count; i++) across[d * ITEMS + i] = items[i * dim + d];
    }

    struct Place {
        const Number *items;     // [32, dim] of the panel
        Number *shares, *pairs;  // [32, QUERIES], [32 / PACKED][QUERIES][PACKED] of the panel, from the tile's first query on
        int64_t &next;           // fixed logit of the panel
    };

    // The logits of a panel by the queries from t on.
    template <Pass PASS> void tile(Place place, int64_t panel, int64_t t, float *sum) {
        alignas(64) float logits[SIDE * SIDE];
        product<false>(logits, SIDE, place.items, dim, query.at + t * dim, PACKED * SIDE, dim);
        const float *correct = correction.at + panel * SIDE;
        if (p.domain) leave_out_domains(logits, panel, t);
        for (int64_t &n = place.next; n < begin[panel + 1] && fixed[n].query < t + SIDE; n++) {
            const Fixed &e = fixed[n];
            logits[e.item * SIDE + e.query - t] = e.own ? truth.at[e.query] - correct[e.item] : NOTHING;
        }
        const __m512 left_reference = _mm512_load_ps(reference.at + t);
        const __m512 right_reference = _mm512_load_ps(reference.at + t + 16);
        const bool apart = PACKED == 1 && PASS != LARGEST;  // float32: a tile's own sum is rounded less
        __m512 left_sum = apart ? _mm512_setzero_ps() : _mm512_load_ps(sum + t);
        __m512 right_sum = apart ? _mm512_setzero_ps() : _mm512_load_ps(sum + t + 16);
        for (int x = 0; x < SIDE; x += 2) {
            __m512 left[2], right[2];
            for (int y = 0; y < 2; y++) {
                const __m512 add = _mm512_set1_ps(correct[x + y]);
                const float *row = logits + (x + y) * SIDE;
                left[y] = _mm512_sub_ps(_mm512_add_ps(_mm512_load_ps(row), add), left_reference);
                right[y] = _mm512_sub_ps(_mm512_add_ps(_mm512_load_ps(row + 16), add), right_reference);
                if (PASS == LARGEST) {
                    left_sum = _mm512_max_ps(left_sum, left[y]);
                    right_sum = _mm512_max_ps(right_sum, right[y]);
                    continue;
                }
                left[y] = power_of_two<Number>(left[y]);
                right[y] = power_of_two<Number>(right[y]);
                if (PASS != GRADIENTS) {
                    left_sum = _mm512_add_ps(left_sum, left[y]);
                    right_sum = _mm512_add_ps(right_sum, right[y]);
                }
            }
            if (PASS == LARGEST || PASS == SUM) continue;
            put(place.shares + x * QUERIES, place.pairs + x * QUERIES, QUERIES, left, right);
        }
        if (PASS != GRADIENTS) {
            _mm512_store_ps(sum + t, apart ? _mm512_add_ps(_mm512_load_ps(sum + t), left_sum) : left_sum);
            _mm512_store_ps(sum + t + 16, apart ? _mm512_add_ps(_mm512_load_ps(sum + t + 16), right_sum) : right_sum);
        }
    }

    void leave_out_domains(float *logits, int64_t panel, int64_t t) {
        const __m512 nothing = _mm512_set1_ps(NOTHING);
        for (int n = 0; n < 2 * SIDE; n++) {
            const __m512 has = _mm512_set1_ps(domain.at[panel * SIDE + n / 2]);
            const __m512 wants = _mm512_load_ps(wanted.at + t + n % 2 * 16);
            _mm512_mask_store_ps(logits + n * 16, _mm512_cmp_ps_mask(has, wants, _CMP_NEQ_OQ), nothing);
        }
    }

    // [dim, wide] += the candidates of a block by their shares.
    void add_to_queries(float *to, int64_t step, const Number *across, const Number *pairs, int count, int wide) {
        for (int64_t d = 0; d < dim; d += SIDE)
            for (int g = 0; g < wide; g += SIDE)
                product<true>(to + d * step + g, step, across + d * ITEMS, ITEMS, pairs + PACKED * g, PACKED * QUERIES,
                              count * SIDE);
    }

    // [32, dim] of a panel += the queries by its shares in them.
    void add_to_items(float *to, const Number *shares, const Number *queries, int wide) {
        for (int64_t d = 0; d < dim; d += SIDE)
            product<true>(to + d, dim, shares, QUERIES, queries + PACKED * d, PACKED * dim, wide);
    }
};

}  // namespace

// 0: the system lets this process use AMX, or this code does not need it.
extern "C" int flm_softmax_refused() { return is_refused(); }

// 0: done; 1: no memory.
extern "C" int flm_softmax(const Problem *problem) {
    try {
        if (problem->float32) Softmax<float>(*problem).run();
        else Softmax<bf16>(*problem).run();
        return 0;
    } catch (const std::bad_alloc &) {
        return 1;
    }
}
