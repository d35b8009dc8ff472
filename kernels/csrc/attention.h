// Attention of one head, block by block with a running softmax: "FlashAttention", arXiv:2205.14135, algorithm 1.
#pragma once

#include <algorithm>
#include <cmath>

#include "exp2.h"

namespace {

constexpr int64_t QUERIES = 48, KEYS = 256;                // of a block; its scores take 48 KB

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class Type>
void pack_values(const ldm2::Head& head, float* packed, int64_t words) {
  using element = typename Type::element;
  auto v = static_cast<const element*>(head.v);
  auto to = reinterpret_cast<element*>(packed);
  for (int64_t panel = 0; panel < head.width / PANEL; panel++) {
    for (int64_t word = 0; word < words; word++) {
      for (int64_t lane = 0; lane < PANEL; lane++) {
        for (int64_t i = 0; i < Type::PER_WORD; i++) {
          int64_t key = word * Type::PER_WORD + i;
          *to++ = key < head.keys ? v[key * head.v_stride + panel * PANEL + lane] : element{};
        }
      }
    }
  }
}

// A row of scores of `count` keys, of which `valid` are there, to its weights, in place:
// 2^(score * scale + bias - running_max). running_max: of the keys so far; where all of them are masked (-inf), none
// has a weight. Returns by how much what came before shrinks.
template <class Type>
float softmax(float* row, int64_t count, int64_t valid, float scale, const float* bias, float& running_max,
              float& sum) {
  for (int64_t i = valid; i < count; i++) row[i] = -INFINITY;
  vec top = splat(-INFINITY);
  if (bias != nullptr) {
    for (int64_t i = 0; i < count; i += LANES) {
      vec score = load(row + i) * scale + load(bias + i);
      store(row + i, score);
      top = vmax(score, top);
    }
    scale = 1;
  } else {
    for (int64_t i = 0; i < count; i += LANES) top = vmax(load(row + i), top);
  }
  float now = std::max(running_max, reduce_max(top) * scale);
  auto weights = reinterpret_cast<typename Type::element*>(row);
  if (now == -INFINITY && std::all_of(row, row + count, [](float score) { return score == -INFINITY; })) {
    std::fill_n(weights, count, typename Type::element{});
    return 1;
  }
  vec added{};
  for (int64_t i = 0; i < count; i += LANES) {
    vec weight = exp2<Type>(load(row + i) * scale - now);
    added += weight;
    store(weights + i, weight);
  }
  float shrink = std::exp2(running_max - now);
  sum = sum * shrink + reduce_add(added);
  running_max = now;
  return shrink;
}

inline int64_t attention_scratch(int64_t keys, int64_t width) {
  keys = round_up(keys, PANEL);
  return 2 * keys * width + keys + QUERIES * (KEYS + width);
}

template <class Type>
void attention(const ldm2::Head& head, float* scratch) {
  using element = typename Type::element;
  constexpr int64_t PER_WORD = Type::PER_WORD;
  int64_t keys = round_up(head.keys, PANEL), depth = head.width / PER_WORD;
  float *k = scratch, *v = k + keys * depth, *bias = v + keys / PER_WORD * head.width;
  float *scores = bias + keys, *sums = scores + QUERIES * KEYS;
  for (int64_t key = 0; key < keys; key += PANEL) {
    auto rows = reinterpret_cast<const float*>(static_cast<const element*>(head.k) + key * head.k_stride);
    transpose(rows, head.k_stride / PER_WORD, std::min<int64_t>(PANEL, head.keys - key), depth, k + key * depth);
  }
  pack_values<Type>(head, v, keys / PER_WORD);
  constexpr float LOG2_E = 1.44269504f;
  float scale = LOG2_E / std::sqrt(static_cast<float>(head.width));
  if (head.bias != nullptr) {
    auto given = static_cast<const element*>(head.bias);
    for (int64_t i = 0; i < keys; i++) bias[i] = i < head.keys ? LOG2_E * bf16_to_f32(given[i * head.bias_stride]) : 0;
  }
  for (int64_t first = 0; first < head.queries; first += QUERIES) {
    int64_t rows = std::min(QUERIES, head.queries - first);
    auto q = reinterpret_cast<const float*>(static_cast<const element*>(head.q) + first * head.q_stride);
    float running_max[QUERIES], sum[QUERIES] = {};
    std::fill_n(running_max, rows, -INFINITY);
    std::fill_n(sums, rows * head.width, 0.0f);
    for (int64_t key = 0; key < keys; key += KEYS) {
      int64_t count = std::min(KEYS, keys - key);
      product<Type, false>(rows, depth, count / PANEL, q, head.q_stride / PER_WORD, k + key * depth, depth * PANEL,
                           scores, KEYS);
      for (int64_t i = 0; i < rows; i++) {
        float shrink = softmax<Type>(scores + i * KEYS, count, std::min(count, head.keys - key), scale,
                                     head.bias == nullptr ? nullptr : bias + key, running_max[i], sum[i]);
        if (shrink == 1) continue;
        float* row = sums + i * head.width;
        for (int64_t d = 0; d < head.width; d += LANES) store(row + d, load(row + d) * shrink);
      }
      product<Type, true>(rows, count / PER_WORD, head.width / PANEL, scores, KEYS, v + key / PER_WORD * PANEL,
                          keys / PER_WORD * PANEL, sums, head.width);
    }
    for (int64_t i = 0; i < rows; i++) {
      element* to = static_cast<element*>(head.out) + (first + i) * head.out_stride;
      float whole = sum[i] == 0 ? 1 : sum[i];              // a row whose keys are all masked attends to nothing
      for (int64_t d = 0; d < head.width; d += LANES) store(to + d, load(sums + i * head.width + d) / whole);
    }
  }
}

}  // namespace
