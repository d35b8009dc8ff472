// PyTorch operators on the CPU, inference only:
//
//   ldm2_cpu::convolution(x, weight, bias, residual, ...)   convolution of stride 1, channels-last
//   ldm2_cpu::linear(x, weight, bias, gated)                x weight^T + bias
//   ldm2_cpu::attention(q, k, v, bias)                      each in float32 and bfloat16, weights also in int8
//   ldm2_cpu::transformer_block(x, parameters, ...)         made of the last two and layer norms
//   ldm2_cpu::layer_norm, add_layer_norm, group_norm
//   ldm2_cpu::empty_result(sizes, dtype)                    a tensor in memory that results share one after the other
//   ldm2_cpu::result_bytes()                                of such memory: in use, idle
//   ldm2_cpu::release_memory()                              gives back what is idle
//   ldm2_cpu::keep_memory_for(seconds)                      how long it may be idle otherwise
//   ldm2_cpu::instruction_sets()                            those to choose from, best first; the best is the default
//   ldm2_cpu::use_instruction_set(name)
//
// To choose from are those of this machine, as cpuid tells them, up to the one that the environment variable
// LDM2_CPU_ISA names (baseline, avx2, avx512, avx512_bf16 or zen4; all if it is not set). It is read at the first use.

#include "operators.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <string>
#include <string_view>

namespace ldm2 {
namespace {

// Each holds what stands before it.
constexpr std::string_view NAMES[] = {"baseline", "avx2", "avx512", "avx512_bf16", "zen4"};

ptrdiff_t rank(std::string_view name) { return std::find(std::begin(NAMES), std::end(NAMES), name) - NAMES; }

// Drops the sets above the one that the environment names.
void mask(std::vector<Kernels>& sets) {
  const char* name = std::getenv("LDM2_CPU_ISA");
  if (name == nullptr || *name == '\0') return;
  TORCH_CHECK_VALUE(rank(name) < std::ssize(NAMES),
                    "LDM2_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or zen4, got ", name);
  std::erase_if(sets, [&](const Kernels& set) { return rank(set.name) > rank(name); });
}

// What this machine can run and the environment leaves, best first.
const std::vector<Kernels>& available() {
  static const std::vector<Kernels> sets = [] {
    std::vector<Kernels> found;
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool products = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    // AMD's processors, all since Zen 4, add beside what they multiply: see PairedFloat32.
    if (products && __builtin_cpu_is("amd")) found.push_back(kernels_zen4());
    if (products) found.push_back(kernels_avx512_bf16());
    if (avx512) found.push_back(kernels_avx512());
    if (avx2) found.push_back(kernels_avx2());
#endif
    found.push_back(kernels_baseline());
    mask(found);
    return found;
  }();
  return sets;
}

std::atomic<size_t> chosen = 0;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& set : available()) names.emplace_back(set.name);
  return names;
}

void use_instruction_set(std::string_view name) {
  for (size_t i = 0; i < available().size(); i++) {
    if (name == available()[i].name) {
      chosen = i;
      return;
    }
  }
  TORCH_CHECK(false, "no instruction set ", name, " on this machine, or LDM2_CPU_ISA masks it");
}

TORCH_LIBRARY(ldm2_cpu, library) {
  library.def("instruction_sets() -> str[]", instruction_sets);
  library.def("use_instruction_set(str name) -> ()", use_instruction_set);
}

}  // namespace

const Kernels& kernels() { return available()[chosen]; }

}  // namespace ldm2
