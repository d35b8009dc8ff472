// Where results lie.

#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <chrono>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <tuple>

namespace ldm2 {

namespace {

void advise_huge(void* memory, int64_t bytes) {
#if defined(__linux__)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

void check_allocated(bool allocated, int64_t bytes) {
  TORCH_CHECK(allocated, "can't allocate memory: ", bytes, " bytes");
}

}  // namespace

Memory allocate(int64_t bytes) {
  int64_t unit = bytes % HUGE_PAGE == 0 ? HUGE_PAGE : 64;
  Memory memory(std::aligned_alloc(unit, bytes));
  check_allocated(memory != nullptr, bytes);
  if (unit == HUGE_PAGE) advise_huge(memory.get(), bytes);
  return memory;
}

namespace {

constexpr int64_t LEAST = HUGE_PAGE / 2;                   // bytes of a result that the pool serves

// Huge pages side by side.
struct Pages {
  char* start;
  int64_t size;                                            // bytes

  Pages first(int64_t bytes) const { return {start, bytes}; }
  Pages after(int64_t bytes) const { return {start + bytes, size - bytes}; }
};

void unmap(Pages pages) {
  if (pages.size > 0) munmap(pages.start, pages.size);
}

// Pages that the system fills with zeros when they are touched first; null if there are none.
Pages fresh(int64_t size) {
  int64_t more = size + HUGE_PAGE;                         // for a start at a multiple of it
  void* found = mmap(nullptr, more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return {nullptr, 0};
  Pages all{static_cast<char*>(found), more};
  int64_t skipped = -reinterpret_cast<intptr_t>(found) & (HUGE_PAGE - 1);
  unmap(all.first(skipped));
  unmap(all.after(skipped + size));
  Pages pages = all.after(skipped).first(size);
  advise_huge(pages.start, size);
  return pages;
}

// Large results lie in huge pages. Those of a result that is gone are idle until others need them. Pages are made only
// where too few are idle, so there are never more than were in use at once: where no idle ones side by side are enough,
// single ones are moved there, which takes a hundredth of the time of making them. What nobody needs for a while goes
// back to the system.
class Pool final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    auto pages = std::make_unique<Pages>();
    *pages = take(ceil_div(bytes, HUGE_PAGE) * HUGE_PAGE);
    void* memory = pages->start;
    return {memory, pages.release(), [](void* pages) { pool().give_back(static_cast<Pages*>(pages)); }, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Of the results there are, and of idle pages.
  std::tuple<int64_t, int64_t> bytes() {
    std::lock_guard lock(mutex_);
    return {live_bytes_, idle_bytes_};
  }

  // All idle pages go back to the system.
  void release() {
    std::lock_guard lock(mutex_);
    release(idle_bytes_);
  }

  // Those that nobody needs go back at an age between this and twice as much.
  void keep_for(double seconds) {
    TORCH_CHECK_VALUE(seconds >= 0, "seconds must be at least 0, got ", seconds);
    std::lock_guard lock(mutex_);
    period_ = std::chrono::duration<double>(seconds);
  }

  static Pool& pool() {
    static Pool* only = [] {
      pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); }, [] { pool().begin_anew(); });
      return new Pool;                                     // results may live as long as the process
    }();
    return *only;
  }

 private:
  Pages take(int64_t size) {
    std::lock_guard lock(mutex_);
    auto enough = idle_.lower_bound(size);
    Pages pages = enough == idle_.end() ? gather(size) : cut(enough, size);
    live_bytes_ += size;
    least_idle_ = std::min(least_idle_, idle_bytes_);
    return pages;
  }

  void give_back(Pages* given) {
    std::unique_ptr<Pages> pages(given);
    std::lock_guard lock(mutex_);
    live_bytes_ -= pages->size;
    keep(*pages);
    if (!watched_) watch();
  }

  // Single idle pages moved side by side, as far as there are some, and fresh ones. Throws if there are too few.
  Pages gather(int64_t size) {
#if !defined(__linux__)
    release(size);
#endif
    Pages pages = fresh(size);
    if (pages.start == nullptr) {
      release(idle_bytes_);
      pages = fresh(size);
    }
    check_allocated(pages.start != nullptr, size);
#if defined(__linux__)
    for (int64_t done = 0; done < size && !idle_.empty(); done += HUGE_PAGE) {
      Pages page = cut(idle_.begin(), HUGE_PAGE);
      void* moved = mremap(page.start, HUGE_PAGE, HUGE_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, pages.start + done);
      if (moved == MAP_FAILED) unmap(page);                // too many parts of memory: the fresh one stays
    }
#endif
    return pages;
  }

  // Gives up what nobody has needed since it was last looked, until that is all.
  void watch() {
    auto look = [this] {
      std::lock_guard lock(mutex_);
      release(least_idle_);
      least_idle_ = idle_bytes_;
      watched_ = idle_bytes_ > 0;
      return std::tuple(watched_, period_);
    };
    try {
      std::thread([look, period = period_]() mutable {
        sigset_t signals;                                  // they are for the program's own threads
        sigfillset(&signals);
        pthread_sigmask(SIG_SETMASK, &signals, nullptr);
        for (bool on = true; on; std::tie(on, period) = look()) std::this_thread::sleep_for(period);
      }).detach();
      watched_ = true;
    } catch (const std::system_error&) {                   // no thread to be had
      release(idle_bytes_);
    }
  }

  // In a child of a process that is forked, which has none of its threads.
  void begin_anew() {
    watched_ = false;
    release(idle_bytes_);
    mutex_.unlock();
  }

  using Idle = std::multimap<int64_t, char*>;              // by size

  void keep(Pages pages) {
    if (pages.size == 0) return;
    idle_.emplace(pages.size, pages.start);
    idle_bytes_ += pages.size;
  }

  // The first `size` bytes of idle pages.
  Pages cut(Idle::iterator place, int64_t size) {
    Pages pages{place->second, place->first};
    idle_.erase(place);
    idle_bytes_ -= pages.size;
    keep(pages.after(size));
    return pages.first(size);
  }

  void release(int64_t bytes) {
    for (int64_t left = bytes; left > 0 && !idle_.empty();) {
      Pages pages = cut(idle_.begin(), std::min(left, idle_.begin()->first));
      unmap(pages);
      left -= pages.size;
    }
    least_idle_ = std::min(least_idle_, idle_bytes_);
  }

  std::mutex mutex_;
  Idle idle_;
  int64_t live_bytes_ = 0, idle_bytes_ = 0;
  int64_t least_idle_ = 0;                                 // since it was last looked
  std::chrono::duration<double> period_{15};
  bool watched_ = false;                                   // by a thread
};

TORCH_LIBRARY_FRAGMENT(ldm2_cpu, library) {
  library.def("empty_result(int[] sizes, ScalarType dtype) -> Tensor", empty_result);
  library.def("release_memory() -> ()", [] { Pool::pool().release(); });
  library.def("keep_memory_for(float seconds) -> ()", [](double seconds) { Pool::pool().keep_for(seconds); });
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
