// The kernels of one instruction set. Compiled once per set with -DLDM2_SET=<its name> and that set's flags.

#include "kernels.h"

#include "absorbed.h"
#include "attention.h"
#include "linear.h"
#include "linear_int8.h"
#include "norm.h"
#include "strassen.h"
#include "winograd_tiles.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

#if defined(LDM2_ADDS_APART)
using Product = PairedFloat32;
#else
using Product = Float32;
#endif

ldm2::Kernels ldm2::JOINED(kernels_, LDM2_SET)() {
  return {TEXT(LDM2_SET), winograd<WinogradFloat>(), winograd<WinogradBFloat16>(), norms<Float32>(),
          norms<BFloat16>(), linear<Float32>, linear<BFloat16>, strassen_float<Product>(),
          strassen_bfloat16<Product>(), round_rows<Float32>, round_rows<BFloat16>, linear_int8<Float32>,
          linear_int8<BFloat16>, attention<Float32, Product>, attention<BFloat16>, attention_scratch, absorbed<Float32>,
          absorbed<BFloat16>, absorbed_scratch};
}
