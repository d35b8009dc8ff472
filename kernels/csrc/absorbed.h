// Attention to few positions whose keys and values have the projections of queries and outputs in them. All is turned,
// as in attention.h. Keys and values are the left sides of products as they lie in memory: nothing of them is laid out.
#pragma once

#include "attention.h"

namespace {

// Floats that a block of queries needs. What asks makes place for the sums.
struct AbsorbedScratch {
  int64_t q, scores, weights, sums;

  AbsorbedScratch(int64_t channels, int64_t heads, int64_t positions)
      : q(QUERIES * channels), scores(QUERIES * heads * positions), weights(round_up(scores, 2 * QUERIES)),
        sums(QUERIES * heads) {}
  int64_t floats() const { return q + scores + weights + sums; }
};

inline int64_t absorbed_scratch(int64_t channels, int64_t heads, int64_t positions) {
  return AbsorbedScratch(channels, heads, positions).floats();
}

// scores (positions, heads, QUERIES) to weights 2^(score - largest), and per head one over their sum.
template <class Type>
void weigh(const ldm2::Absorbed& job, float* scores, float* shares) {
  for (int64_t place = 0; place < job.heads * QUERIES; place += LANES) {
    vec top = splat(-INFINITY), sum = {};
    for (int64_t position = 0; position < job.positions; position++) {
      float* at = scores + position * job.heads * QUERIES + place;
      vec score = load(at) * LOG2_E;
      if (job.bias != nullptr) score += LOG2_E * job.bias[position];
      store(at, score);
      top = vmax(score, top);
    }
    for (int64_t position = 0; position < job.positions; position++) {
      float* at = scores + position * job.heads * QUERIES + place;
      vec weight = exp2<Type>(load(at) - top);
      store(at, weight);
      sum += weight;
    }
    store(shares + place, 1.0f / sum);
  }
}

// Weights times shares of their heads, as panels of words.
template <class Type>
void share_out(const ldm2::Absorbed& job, int64_t words, const float* weights, const float* shares, float* panels) {
  constexpr int PER_WORD = Type::PER_WORD;
  int64_t count = job.positions * job.heads;
  for (int64_t word = 0; word < words; word++) {
    vec parts[PER_WORD][VECTORS] = {};
    for (int64_t i = 0; i < PER_WORD && word * PER_WORD + i < count; i++) {
      int64_t row = word * PER_WORD + i;
      for (int j = 0; j < VECTORS; j++) {
        parts[i][j] = load(weights + row * QUERIES + j * LANES) * load(shares + row % job.heads * QUERIES + j * LANES);
      }
    }
    store_weights(panels, words, word, parts, Type{});
  }
}

// `result` of LANES channels from `channel` to a row of y.
template <class Type>
inline void finish_row(const ldm2::Absorbed& job, int64_t row, int64_t channel, vec result) {
  using element = typename Type::element;
  int64_t place = row * job.channels + channel;
  result += load(job.offset + channel);
  if (job.residual != nullptr) result += load(static_cast<const element*>(job.residual) + place);
  store(static_cast<element*>(job.y) + place, result);
}

// What all queries have of a single position, whose weight is 1.
template <class Type>
void absorbed_constant(const ldm2::Absorbed& job, float* constant) {
  auto values = static_cast<const typename Type::element*>(job.values);
  for (int64_t channel = 0; channel < job.channels; channel++) {
    float sum = 0;
    for (int64_t head = 0; head < job.heads; head++) sum += bf16_to_f32(values[channel * job.value_stride + head]);
    constant[channel] = sum;
  }
  for (int64_t row = 0; row < job.queries; row++) {
    for (int64_t channel = 0; channel < job.channels; channel += LANES) {
      finish_row<Type>(job, row, channel, load(constant + channel));
    }
  }
}

template <class Type>
void absorbed(const ldm2::Absorbed& job, float* scratch) {
  using element = typename Type::element;
  if (job.positions == 1) return absorbed_constant<Type>(job, scratch);
  int64_t depth = job.channels / Type::PER_WORD, count = job.positions * job.heads;
  int64_t words = (count + Type::PER_WORD - 1) / Type::PER_WORD;
  AbsorbedScratch sizes(job.channels, job.heads, job.positions);
  float *q = scratch, *scores = q + sizes.q, *weights = scores + sizes.scores, *shares = weights + sizes.weights;
  auto keys = static_cast<const float*>(job.keys), values = static_cast<const float*>(job.values);
  for (int64_t first = 0; first < job.queries; first += QUERIES) {
    int64_t rows = std::min(QUERIES, job.queries - first);
    auto from = reinterpret_cast<const float*>(static_cast<const element*>(job.x) + first * job.channels);
    for (int64_t row = 0; row < QUERIES; row += PANEL) {
      transpose(from + row * depth, depth, std::clamp<int64_t>(rows - row, 0, PANEL), depth, q + row * depth);
    }
    product<Type, false>(count, depth, 2, keys, depth, q, depth * PANEL, scores, QUERIES);
    weigh<Type>(job, scores, shares);
    share_out<Type>(job, words, scores, shares, weights);
    float* sums = q;
    product<Type, false>(job.channels, words, 2, values, job.value_stride / Type::PER_WORD, weights, words * PANEL,
                         sums, QUERIES);
    for (int64_t lane = 0; lane < rows; lane += LANES) {
      for (int64_t channel = 0; channel < job.channels; channel += LANES) {
        vec square[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = load(sums + (channel + i) * QUERIES + lane);
        transpose_square(square);
        for (int64_t i = 0; i < LANES && lane + i < rows; i++) {
          finish_row<Type>(job, first + lane + i, channel, square[i]);
        }
      }
    }
  }
}

}  // namespace
