// Of the scores of each user, which stay in the cache: how many are at least a given score, and the best.

#include <cmath>
#include <functional>

#include "native_code.h"

struct Scores {  // as in best_items.py
    const float *scores, *truth;  // [B, N], rows `step` apart; [B]
    int64_t *above, *places;      // [B] out: scores that are at least the truth; [B, K] out: where the best are
    float *best;                  // [B, K] out: the best, in descending order, the first of equal ones first
    int64_t users, items, step, kept, threads;
};

namespace {

constexpr int64_t LANES = 16, BLOCK = 128;  // of scores that are compared together; at most, of those with one maximum

struct Found {
    float score;
    int64_t place;
    bool operator<(const Found &other) const {  // the better comes first
        return score > other.score || (score == other.score && place < other.place);
    }
};

int64_t count(const float *scores, int64_t n, float least) {
    int32_t found = 0;
    for (int64_t k = 0; k < n; k++) found += scores[k] >= least;
    return found;
}

float maximum(const float *scores, int64_t n) {
    typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
    Vector most = Vector{} - INFINITY, next;
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        std::memcpy(&next, scores + k, sizeof next);
        most = next > most ? next : most;
    }
    float found = -INFINITY;
    for (; k < n; k++) found = scores[k] > found ? scores[k] : found;
    for (int64_t lane = 0; lane < LANES; lane++) found = most[lane] > found ? most[lane] : found;
    return found;
}

struct Room {  // of a thread
    Buffer<float> most, order;  // maxima of the blocks, twice
    Buffer<Found> found;
    explicit Room(int64_t items) : most(upto(items, LANES) / LANES), order(upto(items, LANES) / LANES), found(items) {}
};

// The best scores are at least the K-th of the blocks' maxima: few others are.
void best_of(const Scores &p, int64_t user, Room &room) {
    const float *scores = p.scores + user * p.step;
    const int64_t block = std::max(LANES, std::min(BLOCK, p.items / (2 * p.kept) / LANES * LANES));
    const int64_t blocks = upto(p.items, block) / block;
    float least = -INFINITY;
    for (int64_t b = 0; b < blocks; b++)
        room.order.at[b] = room.most.at[b] = maximum(scores + b * block, std::min(block, p.items - b * block));
    if (p.kept <= blocks) {
        std::nth_element(room.order.at, room.order.at + p.kept - 1, room.order.at + blocks, std::greater<float>());
        least = room.order.at[p.kept - 1];
    }
    Found *end = room.found.at;
    for (int64_t b = 0; b < blocks; b++) {
        if (room.most.at[b] < least) continue;
        for (int64_t k = b * block; k < std::min((b + 1) * block, p.items); k++)
            if (!(scores[k] < least)) *end++ = {std::isnan(scores[k]) ? -INFINITY : scores[k], k};
    }
    std::partial_sort(room.found.at, room.found.at + p.kept, end);
    for (int64_t k = 0; k < p.kept; k++) {
        p.best[user * p.kept + k] = room.found.at[k].score;
        p.places[user * p.kept + k] = room.found.at[k].place;
    }
}

}  // namespace

extern "C" int flm_best_items(const Scores *given) {
    const Scores &p = *given;
    const int64_t threads = std::max<int64_t>(1, std::min(p.threads, p.users));
    try {
        in_threads(threads, [&](int64_t thread) {
            Room room(p.kept ? p.items : 0);
            for (int64_t user = p.users * thread / threads; user < p.users * (thread + 1) / threads; user++) {
                p.above[user] = count(p.scores + user * p.step, p.items, p.truth[user]);
                if (p.kept) best_of(p, user, room);
            }
        });
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}
