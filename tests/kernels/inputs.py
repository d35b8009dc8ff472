"""Arguments of operations, and the rule that their kernels must keep."""

import itertools

import torch
from ldm2_kernels.check import measure

from ldm2 import ops
from tests.helpers import draw


def conv_inputs(batch, ins, outs, num_frames, num_bins):
    """x, weight, bias, residual."""
    return (draw(batch, ins, num_frames, num_bins), draw(outs, ins, 3, 3, seed=1), draw(outs, seed=2),
            draw(batch, outs, num_frames, num_bins, seed=3))


def block_inputs(*sizes, channels=32, length=301, dilations=(1, 3, 5)):
    """Arguments of residual_blocks with a block of each kernel size."""
    parameters = []
    for seed, size in enumerate(size for size in sizes for _ in range(2 * len(dilations))):
        parameters += [draw(channels, channels, size, seed=seed) / (channels * size) ** 0.5, draw(channels, seed=-seed)]
    return draw(2, channels, length), 0.1, (dilations,) * len(sizes), *parameters


def transposed_inputs(ins, outs, taps, length, stride):
    """Arguments of conv_transpose1d with HiFi-GAN's padding."""
    weight = draw(ins, outs, taps, seed=1) / (ins * taps / stride) ** 0.5
    return draw(2, ins, length), weight, draw(outs, seed=2), stride, (taps - stride) // 2


def linear_inputs(rows, ins, outs):
    """x, weight, bias."""
    return draw(2, rows, ins), draw(outs, ins, seed=1) / ins**0.5, draw(outs, seed=2)


def attention_inputs(queries, keys, width, batch=2, heads=3, dtype=torch.float32):
    """q, k, v as the heads of one linear layer each."""
    shapes = [(batch, length, heads, width) for length in (queries, keys, keys)]
    return [2 * draw(*shape, seed=i).transpose(1, 2).to(dtype) for i, shape in enumerate(shapes)]


def doubled(args):
    return [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in args]


def rms(x):
    return x.double().square().mean().sqrt()


def assert_within_the_accuracy_rule(operation, args):
    """That of ldm2_kernels.check, where no call may be left to plain PyTorch."""
    def fused(*args):
        with ops.backend("fused"):
            return operation(*args)

    assert measure(fused, operation.reference, args) <= 1


def assert_neither_strides_nor_threads_change(results):
    """results(strided): tensors, of operations on the same numbers in other memory where `strided`."""
    found = []
    try:
        for threads, strided in itertools.product((1, 2), (False, True)):
            torch.set_num_threads(threads)
            found.append(results(strided))
    finally:
        torch.set_num_threads(1)
    first, *others = found
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
