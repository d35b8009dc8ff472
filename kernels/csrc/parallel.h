// How threads share the work of an operator.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <deque>

#include "memory.h"

namespace ldm2 {

// What is left of a thread's part of the work: [first, end). The thread takes pieces from the front, others from the
// back.
class alignas(64) Part {
 public:
  struct Piece {
    int64_t first, end;
  };

  Part(int64_t first, int64_t end) : left_(packed(first, end)) {}

  // A quarter of what is left, or half of it from the back, at least `least`. Empty where nothing is left.
  Piece take(int64_t least, bool from_back) {
    uint64_t left = left_;
    while (true) {
      int64_t first = left >> 32, end = left & 0xffffffff;
      int64_t size = std::min(end - first, std::max(least, ceil_div(end - first, from_back ? 2 : 4)));
      int64_t middle = from_back ? end - size : first + size;
      uint64_t rest = from_back ? packed(first, middle) : packed(middle, end);
      if (size <= 0) return {end, end};
      if (left_.compare_exchange_weak(left, rest)) return from_back ? Piece{middle, end} : Piece{first, middle};
    }
  }

 private:
  static uint64_t packed(int64_t first, int64_t end) { return static_cast<uint64_t>(first) << 32 | end; }

  std::atomic<uint64_t> left_;
};

// work(first, end) for all of [0, count), by all threads, in pieces of at least `least`. Each thread has a part of its
// own, the same from operator to operator: what it reads it has often written itself, so that it lies in its cache. Once
// done, it helps others: a core that is slower, or busy with something else for a while, delays nobody. What work does
// must not depend on how [0, count) is cut.
template <class Work>
void share(int64_t count, int64_t least, const Work& work) {
  int64_t threads = at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), ceil_div(count, least));
  if (threads <= 1) {
    if (count > 0) work(int64_t{0}, count);
    return;
  }
  TORCH_CHECK(count <= 0xffffffff, "too much to share: ", count);
  std::deque<Part> parts;                                  // which does not move them
  for (int64_t n = 0; n < threads; n++) parts.emplace_back(count * n / threads, count * (n + 1) / threads);
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t n = 0; n < threads; n++) {
      Part& part = parts[(own + n) % threads];
      for (auto piece = part.take(least, n > 0); piece.first < piece.end; piece = part.take(least, n > 0)) {
        work(piece.first, piece.end);
      }
    }
  });
}

}  // namespace ldm2
