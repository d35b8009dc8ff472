"""Compiles each Triton kernel for a GPU that need not be there: python -m tests.compile_kernels CAPABILITY DTYPE.

The interpreter takes more than the compiler does; this shows that the kernels are programs of the device too.
"""

import sys

from ldm2_kernels import convolution, geglu, group_norm, layer_norm, leaky_relu
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTEGERS = ("shift_stride", "width", "positions", "rows", "x_stride", "gate_stride", "count", "size")
FLOATS = ("eps", "slope", "scale", "a", "b")
ALWAYS_FLOAT32 = ("moments",)

GROUPS = {"groups": 32, "width": 12}
WHOLE = {"BLOCK": group_norm.WHOLE, "SILU": True, **GROUPS}
PART = {"BLOCK": group_norm.PART, **GROUPS}
PLAIN = {"SHIFT": False, "shift": None, "shift_stride": 0}
KERNELS = [
    *[(group_norm._whole, {"CHANNELS_LAST": last, **shift, **WHOLE})
      for last in (False, True) for shift in ({"SHIFT": True}, PLAIN)],
    *[(group_norm._moments, {"CHANNELS_LAST": last, **shift, **PART})
      for last in (False, True) for shift in ({"SHIFT": True}, PLAIN)],
    *[(group_norm._normalize, {"CHANNELS_LAST": last, **shift, **PART, "SILU": False, "PARTS": 128})
      for last in (False, True) for shift in ({"SHIFT": True}, PLAIN)],
    *[(convolution._add, {"BLOCK": convolution.BLOCK, "CHANNELS": 640, "LAST": last}) for last in (False, True)],
    (layer_norm._kernel, {"ROWS": 4, "BLOCK": 1024}),
    (geglu._kernel, {"BLOCK": geglu.BLOCK}),
    (leaky_relu._activate, {"BLOCK": leaky_relu.BLOCK}),
    (leaky_relu._add, {"BLOCK": leaky_relu.BLOCK, "TOTAL": True}),
    (leaky_relu._add, {"BLOCK": leaky_relu.BLOCK, "TOTAL": False, "total": None, "count": 1}),
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
