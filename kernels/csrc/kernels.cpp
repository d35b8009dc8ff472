// The kernels of one instruction set. Compiled once per set with -DLDM2_SET=<its name> and that set's flags.

#include "kernels.h"

#include "absorbed.h"
#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "strassen.h"
#include "winograd_tiles.h"

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

ldm2::Kernels ldm2::JOINED(kernels_, LDM2_SET)() {
  return {TEXT(LDM2_SET), winograd<WinogradFloat>(), winograd<WinogradBFloat16>(), norms<Float32>(),
          norms<BFloat16>(), linear<Float32>, linear<BFloat16>, strassen_rows, strassen, attention<Float32>,
          attention<BFloat16>, attention_scratch, absorbed<Float32>, absorbed<BFloat16>, absorbed_scratch};
}
