// Attention of one head, block by block with a running softmax: "FlashAttention", arXiv:2205.14135, algorithm 1. All
// is turned: scores are (keys, queries), so that queries lie in lanes. Then largest scores and sums of weights need no
// reduction within a vector, and weights come to lie as the right side of the product with the values.
#pragma once

#include <algorithm>
#include <cmath>

#include "balance.h"
#include "exp2.h"

namespace {

constexpr int64_t QUERIES = 2 * PANEL, KEYS = 128;         // of a block
constexpr int64_t VECTORS = QUERIES / LANES;
constexpr float LOG2_E = 1.44269504f;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// LANES columns of the values, from column d, as words along the keys.
inline vec value_words(const ldm2::Head& head, int64_t word, int64_t d, Float32) {
  return word < head.keys ? load(static_cast<const float*>(head.v) + word * head.v_stride + d) : vec{};
}
inline vec value_words(const ldm2::Head& head, int64_t word, int64_t d, BFloat16) {
  auto bits = [&](int64_t key) {                           // of float32
    return key < head.keys ? (ivec)load(static_cast<const uint16_t*>(head.v) + key * head.v_stride + d) : ivec{};
  };
  return (vec)((bits(2 * word) >> 16 & 0xffff) | bits(2 * word + 1));
}

// (width, words; `stride` apart) of the values (keys, width).
template <class Type>
void turn_values(const ldm2::Head& head, int64_t words, float* turned, int64_t stride) {
  for (int64_t word = 0; word < words; word += LANES) {
    for (int64_t d = 0; d < head.width; d += LANES) {
      vec square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) square[i] = value_words(head, word + i, d, Type{});
      transpose_square(square);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(turned + (d + i) * stride + word, square[i]);
    }
  }
}

// Weights of one key as words, or of two in the halves of words, to place `word` of the panels.
inline void store_weights(float* panels, int64_t words, int64_t word, const vec weights[1][VECTORS], Float32) {
  for (int j = 0; j < VECTORS; j++) {
    int64_t lane = j * LANES;
    store(panels + (lane / PANEL * words + word) * PANEL + lane % PANEL, weights[0][j]);
  }
}
inline void store_weights(float* panels, int64_t words, int64_t word, const vec weights[2][VECTORS], BFloat16) {
  for (int j = 0; j < VECTORS; j++) {
    int64_t lane = j * LANES;
    store(panels + (lane / PANEL * words + word) * PANEL + lane % PANEL, bf16_pairs(weights[0][j], weights[1][j]));
  }
}

// What a block of queries knows after the keys so far, by lanes.
struct Softmax {
  vec largest[VECTORS], sum[VECTORS];                      // of scaled scores; of weights
};

// scores (count, QUERIES) to weights 2^(score * scale + bias - largest), as panels of words. A key whose bias is -inf
// has no weight. Gives by how much what came before shrinks.
template <class Type, bool BIASED>
void softmax(float* scores, int64_t count, const vec* scale, const float* bias, Softmax& state, float* panels,
             vec* shrink) {
  constexpr int PER_WORD = Type::PER_WORD;
  vec top[VECTORS];
  for (int j = 0; j < VECTORS; j++) top[j] = splat(-INFINITY);
  for (int64_t key = 0; key < count; key++) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
      float* at = scores + key * QUERIES + j * LANES;
      vec score = load(at);
      if constexpr (BIASED) {
        score = score * scale[j] + bias[key];
        store(at, score);
      }
      top[j] = vmax(score, top[j]);
    }
  }
  vec offset[VECTORS], sum[VECTORS];
  for (int j = 0; j < VECTORS; j++) {
    vec now = vmax(BIASED ? top[j] : top[j] * scale[j], state.largest[j]);
    offset[j] = now > -INFINITY ? now : vec{};             // all masked so far
    shrink[j] = exp2<Float32>(state.largest[j] - offset[j]);
    state.largest[j] = now;
    sum[j] = state.sum[j] * shrink[j];
  }
  int64_t words = (count + PER_WORD - 1) / PER_WORD;
  for (int64_t word = 0; word < words; word++) {
    vec weights[PER_WORD][VECTORS] = {};
#pragma GCC unroll 2
    for (int i = 0; i < PER_WORD; i++) {
      if (word * PER_WORD + i >= count) break;
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; j++) {
        vec score = load(scores + (word * PER_WORD + i) * QUERIES + j * LANES);
        vec weight = exp2<Type>(BIASED ? score - offset[j] : score * scale[j] - offset[j]);
        if constexpr (BIASED) weight = score == -INFINITY ? vec{} : weight;
        weights[i][j] = weight;
        sum[j] += weight;
      }
    }
    store_weights(panels, words, word, weights, Type{});
  }
  std::copy_n(sum, VECTORS, state.sum);
}

// Floats that a head needs.
struct AttentionScratch {
  int64_t k, v_stride, v, bias, q, scores, weights, sums, balance;

  AttentionScratch(int64_t keys, int64_t width)
      : k(keys * width), v_stride(round_up(keys, PANEL) + PANEL), v(width * v_stride), bias(round_up(keys, PANEL)),
        q(QUERIES * width), scores(KEYS * QUERIES), weights(KEYS * QUERIES), sums(width * QUERIES),
        balance(2 * round_up(keys, PANEL) + QUERIES * (width + 2)) {}
  int64_t floats() const { return k + v + bias + q + scores + weights + sums + balance; }
};

inline int64_t attention_scratch(int64_t keys, int64_t width) { return AttentionScratch(keys, width).floats(); }

// sums (width, QUERIES) / sum of the weights to the rows of the result from query `first`.
template <class Type>
void finish_queries(const ldm2::Head& head, int64_t first, int64_t rows, const Softmax& state, const float* sums) {
  using element = typename Type::element;
  for (int64_t j = 0; j * LANES < rows; j++) {
    vec whole = state.sum[j] == 0.0f ? splat(1.0f) : state.sum[j];         // all keys masked: attends to nothing
    for (int64_t d = 0; d < head.width; d += LANES) {
      vec square[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) square[i] = load(sums + (d + i) * QUERIES + j * LANES) / whole;
      transpose_square(square);
      for (int64_t i = 0; i < LANES && j * LANES + i < rows; i++) {
        store(static_cast<element*>(head.out) + (first + j * LANES + i) * head.out_stride + d, square[i]);
      }
    }
  }
}

// What pairs of words need beside the keys and the queries of a block: factors and starts of each, and rows of queries.
struct Balance {
  float *key_factors, *key_starts, *query_factors, *query_starts, *rows;

  Balance(float* memory, int64_t keys)
      : key_factors(memory), key_starts(key_factors + round_up(keys, PANEL)),
        query_factors(key_starts + round_up(keys, PANEL)), query_starts(query_factors + QUERIES),
        rows(query_starts + QUERIES) {}
};

template <class Type, class Product>
void take_keys(const ldm2::Head& head, float* k, const Balance& balance) {
  using element = typename Type::element;
  auto from = static_cast<const element*>(head.k);
  if constexpr (Product::STEP == 2) {
    balance_rows(from, head.k_stride, head.keys, head.width, k, balance.key_factors, balance.key_starts);
  } else {
    int64_t depth = head.width / Type::PER_WORD;
    for (int64_t key = 0; key < head.keys; key++) {
      std::memcpy(k + key * depth, from + key * head.k_stride, head.width * sizeof(element));
    }
  }
}

// Queries from `first` as panels. scale: what brings the scores of each lane to the powers of 2 in the softmax.
template <class Type, class Product>
void take_queries(const ldm2::Head& head, int64_t first, int64_t count, float* q, const Balance& balance, vec* scale) {
  int64_t depth = head.width / Type::PER_WORD, stride = head.q_stride / Type::PER_WORD;
  auto from = static_cast<const float*>(head.q) + first * stride;
  if constexpr (Product::STEP == 2) {
    std::fill_n(balance.query_factors, 2 * QUERIES, 0.0f);
    balance_rows(from, stride, count, depth, balance.rows, balance.query_factors, balance.query_starts);
    from = balance.rows, stride = depth;
  }
  for (int64_t row = 0; row < QUERIES; row += PANEL) {
    transpose(from + row * stride, stride, std::clamp<int64_t>(count - row, 0, PANEL), depth, q + row * depth);
  }
  for (int j = 0; j < VECTORS; j++) {
    scale[j] = splat(LOG2_E / std::sqrt(static_cast<float>(head.width)));
    if constexpr (Product::STEP == 2) scale[j] *= load(balance.query_factors + j * LANES);
  }
}

// Where scores of pairs of words go, brought back by the factors of the keys.
struct Scores {
  Start<PairedFloat32> begin;
  const float* factors;
  float* c;
  Scores from(int64_t row, int64_t column) const {
    return {begin.from(row, column), factors + row, c + row * QUERIES + column};
  }
  vec start(int64_t row, int64_t column) const { return begin.at(row, column); }
  void put(int64_t row, int64_t column, vec sum) const {
    store(c + row * QUERIES + column, sum * broadcast(factors + row));
  }
};

// The scores of `count` keys from `first`.
template <class Product>
void multiply_keys(int64_t first, int64_t count, int64_t depth, const float* k, const float* q, const Balance& balance,
                   float* scores) {
  if constexpr (Product::STEP == 2) {
    Ahead nothing;
    Scores to{{balance.key_starts + first, balance.query_starts, 1}, balance.key_factors + first, scores};
    product<Product>(count, depth, 2, k + first * depth, depth, q, depth * PANEL, to, nothing);
  } else {
    product<Product, false>(count, depth, 2, k + first * depth, depth, q, depth * PANEL, scores, QUERIES);
  }
}

// Product: of queries and keys.
template <class Type, class Product = Type>
void attention(const ldm2::Head& head, float* scratch) {
  using element = typename Type::element;
  constexpr int64_t PER_WORD = Type::PER_WORD;
  int64_t depth = head.width / PER_WORD;
  AttentionScratch sizes(head.keys, head.width);
  float *k = scratch, *v = k + sizes.k, *bias = v + sizes.v, *q = bias + sizes.bias, *scores = q + sizes.q;
  float *weights = scores + sizes.scores, *sums = weights + sizes.weights;
  Balance balance(sums + sizes.sums, head.keys);
  take_keys<Type, Product>(head, k, balance);
  turn_values<Type>(head, (head.keys + PER_WORD - 1) / PER_WORD, v, sizes.v_stride);
  for (int64_t i = 0; head.bias != nullptr && i < head.keys; i++) {
    bias[i] = LOG2_E * bf16_to_f32(static_cast<const element*>(head.bias)[i * head.bias_stride]);
  }
  for (int64_t first = 0; first < head.queries; first += QUERIES) {
    int64_t rows = std::min(QUERIES, head.queries - first);
    vec scale[VECTORS];
    take_queries<Type, Product>(head, first, rows, q, balance, scale);
    Softmax state;
    std::fill_n(state.largest, VECTORS, splat(-INFINITY));
    std::fill_n(state.sum, VECTORS, vec{});
    std::fill_n(sums, head.width * QUERIES, 0.0f);
    for (int64_t key = 0; key < head.keys; key += KEYS) {
      int64_t count = std::min(KEYS, head.keys - key), words = (count + PER_WORD - 1) / PER_WORD;
      multiply_keys<Product>(key, count, depth, k, q, balance, scores);
      vec shrink[VECTORS];
      if (head.bias == nullptr) {
        softmax<Type, false>(scores, count, scale, nullptr, state, weights, shrink);
      } else {
        softmax<Type, true>(scores, count, scale, bias + key, state, weights, shrink);
      }
      for (int64_t i = 0; key > 0 && i < head.width * VECTORS; i++) {
        store(sums + i * LANES, load(sums + i * LANES) * shrink[i % VECTORS]);
      }
      product<Type, true>(head.width, words, 2, v + key / PER_WORD, sizes.v_stride, weights, words * PANEL, sums,
                          QUERIES);
    }
    finish_queries<Type>(head, first, rows, state, sums);
  }
}

}  // namespace
