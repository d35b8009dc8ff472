"""Compiles each Triton kernel for a GPU that need not be there.

    python -m tests.kernels.compile_kernels CAPABILITY DTYPE

The interpreter takes more than the compiler does; this shows that the kernels are programs of the device too.
"""

import sys

from ldm2_kernels import attention, combine, geglu, group_norm, layer_norm, residual_blocks, upsample
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

STRIDES = [f"{name}_{axis}" for name in ("q", "k", "v", "bias") for axis in ("image", "head", "row", "column")]
INTEGERS = (
    "shift_stride", "width", "positions", "rows", "x_stride", "gate_stride", "count", "size", "each", "parts",
    "channels", "bins", "image", "row", "samples", "dilation", "heads", "queries", "length", *STRIDES,
)
FLOATS = ("eps", "slope", "scale", "a", "b")
ALWAYS_FLOAT32 = ("moments", "norms")

GROUPS = {"groups": 32, "width": 12}
WHOLE = {"BLOCK": group_norm.WHOLE, "SILU": True, **GROUPS}
PART = {"BLOCK": group_norm.PART, **GROUPS}
LAST = {"CHANNELS": 640, "WIDTH": 1024, "ROWS": 4}
ACTIVATED = {"X": False, "TOTAL": False, "SUM": False, "ACTIVATE": True, "x": None, "total": None, "sums": None}
SUMMED = {"X": True, "TOTAL": True, "SUM": True, "ACTIVATE": True}
PLAIN = {"SHIFT": False, "shift": None, "shift_stride": 0}
KERNELS = [
    *[(group_norm._whole, {"CHANNELS_LAST": last, **shift, **WHOLE})
      for last in (False, True) for shift in ({"SHIFT": True}, PLAIN)],
    *[(group_norm._moments, {"CHANNELS_LAST": last, **shift, **PART})
      for last in (False, True) for shift in ({"SHIFT": True}, PLAIN)],
    *[(group_norm._normalize, {**shift, **PART, "SILU": False, "PARTS": 128}) for shift in ({"SHIFT": True}, PLAIN)],
    *[(group_norm._spread, {**shift, **PART, "PARTS": 64, "WIDTH": 16}) for shift in ({"SHIFT": True}, PLAIN)],
    (group_norm._normalize_last, {**LAST, "SILU": True}),
    (layer_norm._kernel, {"ROWS": 4, "BLOCK": 1024, "ADD": True}),
    (layer_norm._kernel, {"ROWS": 4, "BLOCK": 1024, "ADD": False, "added": None, "total": None}),
    *[(attention._kernel, {"BIAS": bias, "QUERIES": 64, "KEYS": keys, "WIDTH": 64})
      for bias in (False, True) for keys in (16, 256)],
    *[(attention._absorbed, {"BIAS": bias, "CHANNELS": 384, "HEADS": 12, "PLACES": 16, **sizes})
      for bias in (False, True) for sizes in ({"KEYS": 8, "QUERIES": 64, "CHUNK": 128},
                                              {"KEYS": 32, "QUERIES": 16, "CHUNK": 32})],
    (upsample._kernel, {"BLOCK": upsample.BLOCK}),
    (geglu._kernel, {"BLOCK": geglu.BLOCK}),
    *[(combine._kernel, {"CHANNELS": 640, "LAST": last, "BLOCK": combine.BLOCK, **what})
      for last in (False, True) for what in (ACTIVATED, SUMMED)],
    (residual_blocks._few, {"CHANNELS": 32, "TAPS": 11, "WIDTH": 32, "SAMPLES": residual_blocks.SAMPLES}),
    (residual_blocks._narrow, {"CHANNELS": 32, "TAPS": 7, "WIDTH": 32, "SAMPLES": residual_blocks.SAMPLES}),
]


def kind(name, dtype):
    """The type of an argument, in Triton's words."""
    if name in INTEGERS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    return "*fp32" if name in ALWAYS_FLOAT32 else f"*{dtype}"


def main(capability: int, dtype: str) -> None:
    for kernel, constants in KERNELS:
        names = kernel.arg_names
        types = {name: "constexpr" if name in constants else kind(name, dtype) for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=types, constexprs=places)
        compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    print(len(KERNELS), "kernels")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
