// Draws tokens from rows of logits: temperature, top-k, min-p and top-p, by the rules of sampling/host/truncation.py.
//
// Numpy needs a hundred calls for them, whose code has left the processor's caches in every step.

#include "operations.h"
#include "scratch.h"

#include <algorithm>

namespace {
// One row's parameters, as draws.py declares them.
struct Draw {
  int row;
  int top_k; // the vocabulary's size where it is off
  float temperature, min_p, top_p;
  uint64_t seed, position;
};

struct Candidate {
  float probability;
  int id;
};

// More probable first; among equals the lower id.
bool before(const Candidate &a, const Candidate &b) {
  return a.probability > b.probability || (a.probability == b.probability && a.id < b.id);
}

// The first word of Philox4x32-10 (Salmon et al., 2011) for the token's position, in [0, 1): see philox.py.
double uniform(const Draw &draw) {
  uint32_t word[4] = {static_cast<uint32_t>(draw.position), 0, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(draw.seed), static_cast<uint32_t>(draw.seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t first = static_cast<uint64_t>(word[0]) * 0xD2511F53u;
    const uint64_t second = static_cast<uint64_t>(word[2]) * 0xCD9E8D57u;
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ word[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ word[3] ^ key[1], static_cast<uint32_t>(first)};
    memcpy(word, next, sizeof word);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return word[0] / 4294967296.0;
}

// Of the candidates in descending order, the weights that the rules leave, 0 for the others. Returns whether
// tokens less probable than all of these could change that.
bool keep(const Candidate *candidates, int count, const Draw &draw, int vocab, float *weights) {
  const float least = draw.min_p * candidates[0].probability;
  const bool renormalizes = draw.top_k < vocab || draw.min_p > 0;
  int left = 0;
  while (left < count && left < draw.top_k && candidates[left].probability >= least) left++;
  double total = 0;
  for (int i = 0; i < left; i++) total += candidates[i].probability;
  const float divisor = static_cast<float>(total);
  double mass = 0;
  bool ends = left < count || left == draw.top_k; // top-k or min-p ends among the candidates
  for (int i = 0; i < count; i++) {
    if (i >= left) {
      weights[i] = 0;
      continue;
    }
    const float share = renormalizes ? candidates[i].probability / divisor : candidates[i].probability;
    mass += share;
    const float mass_before = static_cast<float>(mass) - share;
    const bool drops = draw.top_p < 1 && mass_before > draw.top_p;
    weights[i] = drops ? 0 : candidates[i].probability;
    // Rounded, the mass before a token can fall from one token to the next by this much.
    constexpr double ROUNDING = 1.0 / (1 << 22);
    if (draw.top_p < 1 && !renormalizes && mass > draw.top_p + ROUNDING) ends = true;
  }
  return !ends;
}

// The first id whose cumulated weight exceeds uniform x total; ids ascend.
template <class WeightOf> int inverse(int count, double uniform, const WeightOf &weight_of) {
  double total = 0;
  for (int i = 0; i < count; i++) total += weight_of(i);
  const double wanted = uniform * total;
  double cumulated = 0;
  for (int i = 0; i < count; i++)
    if ((cumulated += weight_of(i)) > wanted) return i;
  return count - 1;
}

int choose(const float *probabilities, int vocab, const Draw &draw) {
  if (draw.top_k >= vocab && draw.min_p <= 0 && draw.top_p >= 1)
    return inverse(vocab, uniform(draw), [&](int i) { return probabilities[i]; });
  static thread_local Scratch scratch;
  Candidate *candidates = scratch.get<Candidate>((sizeof(Candidate) + sizeof(float)) * vocab);
  float *weights = reinterpret_cast<float *>(candidates + vocab);
  float top = 0;
  for (int i = 0; i < vocab; i++) top = probabilities[i] > top ? probabilities[i] : top;
  int count = 0;
  // Most rows of a chat keep tokens that are at most some hundred times less probable than the first.
  constexpr float STEP = 1.0f / 256;
  for (float bound = top * STEP;; bound *= STEP) {
    count = 0;
    for (int i = 0; i < vocab; i++)
      if (probabilities[i] >= bound) candidates[count++] = {probabilities[i], i};
    std::sort(candidates, candidates + count, before);
    if (!keep(candidates, count, draw, vocab, weights) || count == vocab) break;
    if (bound * STEP < __FLT_MIN__) bound = 0;
  }
  // A prefix, but for what rounding has dropped in its middle. By id, a token weighs what it did in its rank.
  int last = count - 1;
  while (last > 0 && weights[last] <= 0) last--;
  bool is_prefix = true;
  for (int i = 0; i < last; i++) is_prefix &= weights[i] > 0;
  const Candidate least = candidates[last];
  if (is_prefix)
    return inverse(vocab, uniform(draw), [&](int id) {
      return before(least, {probabilities[id], id}) ? 0.0f : probabilities[id];
    });
  int kept = 0;
  for (int i = 0; i <= last; i++)
    if (weights[i] > 0) candidates[kept++] = candidates[i];
  std::sort(candidates, candidates + kept, [](const Candidate &a, const Candidate &b) { return a.id < b.id; });
  return candidates[inverse(kept, uniform(draw), [&](int i) { return candidates[i].probability; })].id;
}
} // namespace

// tokens [count]: one for each draw, from logits [rows, vocab] that are finite. `probabilities`
// [count, vocab], if not null, receives what they were drawn from.
extern "C" __attribute__((visibility("default"))) void chasqui_draw(const float *logits, int vocab, const Draw *draws,
                                                                    int count, int32_t *tokens, float *probabilities,
                                                                    int threads) {
  const auto body = [&](long i) {
    static thread_local Scratch scratch;
    float *softmax = probabilities ? probabilities + i * vocab : scratch.get<float>(sizeof(float) * vocab);
    kernels().softmax_row(logits + static_cast<long>(draws[i].row) * vocab, draws[i].temperature, vocab, softmax);
    tokens[i] = choose(softmax, vocab, draws[i]);
  };
  parallel(threads_for(4L * count * vocab, threads), count, body);
}
