// Where results lie.

#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <pthread.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <map>
#include <mutex>
#include <tuple>

namespace ldm2 {

Memory allocate(int64_t bytes) {
  int64_t unit = bytes % HUGE_PAGE == 0 ? HUGE_PAGE : 64;
  Memory memory(std::aligned_alloc(unit, bytes));
  TORCH_CHECK(memory != nullptr, "can't allocate memory: ", bytes, " bytes");
#if defined(__linux__)
  if (unit == HUGE_PAGE) madvise(memory.get(), bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

namespace {

constexpr int64_t LEAST = HUGE_PAGE / 2;                   // bytes of a result that the pool serves

// Blocks of large results. While somebody keeps memory, those of results that are gone stay idle until a result of
// nearly their size comes, or one for which there would be more than ever was needed at once.
class Pool final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    std::unique_ptr<Block> block = take(ceil_div(bytes, HUGE_PAGE) * HUGE_PAGE);
    void* memory = block->memory.get();
    return {memory, block.release(), [](void* block) { pool().give_back(static_cast<Block*>(block)); }, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void keep(bool begin) {
    std::lock_guard lock(mutex_);
    TORCH_CHECK(begin || keepers_ > 0, "memory was given up more often than kept");
    keepers_ += begin ? 1 : -1;
    if (keepers_ > 0) return;
    idle_.clear();
    idle_bytes_ = 0;
    most_bytes_ = live_bytes_;
  }

  // Of the blocks in use, and of those that wait.
  std::tuple<int64_t, int64_t> bytes() {
    std::lock_guard lock(mutex_);
    return {live_bytes_, idle_bytes_};
  }

  // A child of a process that is forked must not find the pool locked by a thread that it does not have.
  static Pool& pool() {
    static Pool* only = [] {
      pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); }, [] { pool().mutex_.unlock(); });
      return new Pool;                                     // results may live as long as the process
    }();
    return *only;
  }

 private:
  struct Block {
    int64_t size;
    Memory memory;
  };

  std::unique_ptr<Block> take(int64_t size) {
    std::lock_guard lock(mutex_);
    auto block = std::make_unique<Block>();
    auto found = idle_.lower_bound(size);
    if (found != idle_.end() && found->first <= size + size / 4) {
      *block = {found->first, std::move(found->second)};
      forget(found);
    } else {
      most_bytes_ = std::max(most_bytes_, live_bytes_ + size);
      while (!idle_.empty() && live_bytes_ + size + idle_bytes_ > most_bytes_) forget(idle_.begin());
      *block = {size, ldm2::allocate(size)};
    }
    live_bytes_ += block->size;
    return block;
  }

  void give_back(Block* given) {
    std::unique_ptr<Block> block(given);
    std::lock_guard lock(mutex_);
    live_bytes_ -= block->size;
    if (keepers_ == 0) return;
    idle_bytes_ += block->size;
    idle_.emplace(block->size, std::move(block->memory));
  }

  using Idle = std::multimap<int64_t, Memory>;             // by size

  void forget(Idle::iterator block) {
    idle_bytes_ -= block->first;
    idle_.erase(block);
  }

  std::mutex mutex_;
  Idle idle_;
  int64_t keepers_ = 0, live_bytes_ = 0, idle_bytes_ = 0, most_bytes_ = 0;
};

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def("empty_result(int[] sizes, ScalarType dtype) -> Tensor", empty_result);
  library.def("keep_memory(bool begin) -> ()", [](bool begin) { Pool::pool().keep(begin); });
  library.def("result_bytes() -> (int, int)", [] { return Pool::pool().bytes(); });
}

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType type) {
  int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(type));
  if (bytes < LEAST) return at::empty(sizes, at::TensorOptions(type).device(at::kCPU));
  return at::detail::empty_generic(sizes, &Pool::pool(), c10::DispatchKeySet(c10::DispatchKey::CPU), type,
                                   std::nullopt);
}

}  // namespace ldm2
