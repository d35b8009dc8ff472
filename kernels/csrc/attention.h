// Attention of one head, block by block with a running softmax: "FlashAttention", arXiv:2205.14135, algorithm 1. All
// is turned: scores are (keys, queries), so that queries lie in lanes. Then largest scores and sums of weights need no
// reduction within a vector, and weights come to lie as the right side of the product with the values.
#pragma once

#include <algorithm>
#include <cmath>

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
void softmax(float* scores, int64_t count, float scale, const float* bias, Softmax& state, float* panels, vec* shrink) {
  constexpr int PER_WORD = Type::PER_WORD;
  vec top[VECTORS];
  for (int j = 0; j < VECTORS; j++) top[j] = splat(-INFINITY);
  for (int64_t key = 0; key < count; key++) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; j++) {
      float* at = scores + key * QUERIES + j * LANES;
      vec score = load(at);
      if constexpr (BIASED) {
        score = score * scale + bias[key];
        store(at, score);
      }
      top[j] = vmax(score, top[j]);
    }
  }
  vec offset[VECTORS], sum[VECTORS];
  for (int j = 0; j < VECTORS; j++) {
    vec now = vmax(BIASED ? top[j] : top[j] * scale, state.largest[j]);
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
        vec weight = exp2<Type>(BIASED ? score - offset[j] : score * scale - offset[j]);
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
  int64_t k, v_stride, v, bias, q, scores, weights, sums;

  AttentionScratch(int64_t keys, int64_t width)
      : k(keys * width), v_stride(round_up(keys, PANEL) + PANEL), v(width * v_stride), bias(round_up(keys, PANEL)),
        q(QUERIES * width), scores(KEYS * QUERIES), weights(KEYS * QUERIES), sums(width * QUERIES) {}
  int64_t floats() const { return k + v + bias + q + scores + weights + sums; }
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

template <class Type>
void attention(const ldm2::Head& head, float* scratch) {
  using element = typename Type::element;
  constexpr int64_t PER_WORD = Type::PER_WORD;
  int64_t depth = head.width / PER_WORD;
  AttentionScratch sizes(head.keys, head.width);
  float *k = scratch, *v = k + sizes.k, *bias = v + sizes.v, *q = bias + sizes.bias, *scores = q + sizes.q;
  float *weights = scores + sizes.scores, *sums = weights + sizes.weights;
  for (int64_t key = 0; key < head.keys; key++) {
    std::memcpy(k + key * depth, static_cast<const element*>(head.k) + key * head.k_stride,
                head.width * sizeof(element));
  }
  turn_values<Type>(head, (head.keys + PER_WORD - 1) / PER_WORD, v, sizes.v_stride);
  for (int64_t i = 0; head.bias != nullptr && i < head.keys; i++) {
    bias[i] = LOG2_E * bf16_to_f32(static_cast<const element*>(head.bias)[i * head.bias_stride]);
  }
  float scale = LOG2_E / std::sqrt(static_cast<float>(head.width));
  for (int64_t first = 0; first < head.queries; first += QUERIES) {
    int64_t rows = std::min(QUERIES, head.queries - first);
    auto from = reinterpret_cast<const float*>(static_cast<const element*>(head.q) + first * head.q_stride);
    int64_t stride = head.q_stride / PER_WORD;
    for (int64_t row = 0; row < QUERIES; row += PANEL) {
      transpose(from + row * stride, stride, std::clamp<int64_t>(rows - row, 0, PANEL), depth, q + row * depth);
    }
    Softmax state;
    std::fill_n(state.largest, VECTORS, splat(-INFINITY));
    std::fill_n(state.sum, VECTORS, vec{});
    std::fill_n(sums, head.width * QUERIES, 0.0f);
    for (int64_t key = 0; key < head.keys; key += KEYS) {
      int64_t count = std::min(KEYS, head.keys - key), words = (count + PER_WORD - 1) / PER_WORD;
      product<Type, false>(count, depth, 2, k + key * depth, depth, q, depth * PANEL, scores, QUERIES);
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
