// What the C++ files here share: memory of a thread's own, threads that tell when there is none, parts of a vector.

#pragma once

#include <omp.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

using std::int32_t;
using std::int64_t;

inline int64_t upto(int64_t n, int64_t side) { return (n + side - 1) / side * side; }

#ifdef __AVX512F__
// The first n of 16 numbers.
inline __mmask16 first_of(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
#endif

template <class T> struct Buffer {  // zeros, at the beginning of a line of the cache
    T *at;
    explicit Buffer(int64_t size) {
        const size_t bytes = upto(std::max<int64_t>(size, 1) * sizeof(T), 64);
        at = static_cast<T *>(std::aligned_alloc(64, bytes));
        if (!at) throw std::bad_alloc();
        std::memset(at, 0, bytes);
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() { std::free(at); }
};

// each(k) for k below `threads`, each in a thread of its own; then throws if one of them had no memory.
template <class Each> void in_threads(int64_t threads, const Each &each) {
    bool failed = false;
#pragma omp parallel for ordered num_threads(threads) schedule(static, 1)
    for (int64_t k = 0; k < threads; k++) {
        try {
            each(k);
        } catch (const std::bad_alloc &) {
#pragma omp atomic write
            failed = true;
        }
    }
    if (failed) throw std::bad_alloc();
}

// Sequences among threads: Worker(problem, longest sequence).sequence(number) for each, then finish(worker) for the worker
// of each thread, in the order of the threads.
template <class Worker, class Problem, class Finish> void by_sequence(const Problem &p, const Finish &finish) {
    const int64_t threads = std::max<int64_t>(1, std::min(p.threads, p.sequences));
    int64_t longest = 0;
    for (int64_t s = 0; s < p.sequences; s++) longest = std::max(longest, p.first[s + 1] - p.first[s]);
    in_threads(threads, [&](int64_t k) {
        Worker worker(p, longest);
        for (int64_t s = p.sequences * k / threads; s < p.sequences * (k + 1) / threads; s++) worker.sequence(s);
#pragma omp ordered
        finish(worker);
    });
}

}  // namespace
