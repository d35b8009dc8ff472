"""The vocoder's one-dimensional convolutions on CUDA, with the channels last in memory as tensor cores take them.

cuDNN convolves; what stands between two convolutions (bias, skip connection, activation, mean of the blocks) is one
pass, in Triton. PyTorch's conv1d would transpose input and output at each call, so these are convolutions of maps that
are one row high. Two kinds are in Triton as well: the last one, to a single channel, which fills no tensor core, and
those of few channels, among which is one that cuDNN does without tensor cores (38 ms on an H200, its like 0.02).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ldm2_kernels.combine import combine

SAMPLES = 128                                              # of a program of our convolutions
FEW, NARROW = 32, 64                                       # channels of theirs


@triton.jit
def _narrow(
    x, weight, bias, y, image, row, samples, CHANNELS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """x (B, N, C), weight (taps, C) -> y (B, N): a convolution to one channel."""
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    channel = tl.arange(0, WIDTH)
    x += tl.program_id(1).to(tl.int64) * image
    total = tl.zeros((SAMPLES,), tl.float32) + tl.load(bias).to(tl.float32)
    for tap in tl.static_range(TAPS):
        place = sample + tap - TAPS // 2
        inside = ((place >= 0) & (place < samples))[:, None] & (channel < CHANNELS)[None, :]
        value = tl.load(x + place[:, None].to(tl.int64) * row + channel[None, :], mask=inside, other=0.0)
        scale = tl.load(weight + tap * CHANNELS + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        total += tl.sum(value.to(tl.float32) * scale[None, :], axis=1)
    tl.store(y + tl.program_id(1).to(tl.int64) * samples + sample, total, mask=sample < samples)


@triton.jit
def _few(
    x, weight, y, samples, dilation, CHANNELS: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """x (B, N, C), weight (C, taps, C) -> y (B, N, C): a convolution between few channels, a product for each tap."""
    sample, channel = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES), tl.arange(0, WIDTH)
    known = channel < CHANNELS
    start = tl.program_id(1).to(tl.int64) * samples * CHANNELS
    total = tl.zeros((SAMPLES, WIDTH), tl.float32)
    for tap in range(TAPS):
        place = sample + (tap - TAPS // 2) * dilation
        inside = ((place >= 0) & (place < samples))[:, None] & known[None, :]
        value = tl.load(x + start + place[:, None].to(tl.int64) * CHANNELS + channel[None, :], mask=inside, other=0.0)
        factor = tl.load(weight + channel[None, :] * (TAPS * CHANNELS) + tap * CHANNELS + channel[:, None],
                         mask=known[None, :] & known[:, None], other=0.0)
        total += tl.dot(value, factor, input_precision="ieee")
    inside = (sample < samples)[:, None] & known[None, :]
    tl.store(y + start + sample[:, None].to(tl.int64) * CHANNELS + channel[None, :], total, mask=inside)


def _last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, N) lie together."""
    return x.shape[1] > 1 and x.transpose(1, 2).is_contiguous()


def _dense(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of one shape, dense and in the order of the first."""
    if _last(like):
        return tuple(t if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for t in (like, *tensors))
    return tuple(t if t is None else t.contiguous() for t in (like, *tensors))


@torch.library.custom_op(
    "ldm2::bias_leaky_relu", mutates_args=(), schema="(Tensor h, Tensor bias, float slope) -> Tensor"
)
def _bias_leaky_relu(h, bias, slope):
    h, = _dense(h)
    y = torch.empty_like(h)
    combine(h, bias, _last(h), activated=y, slope=slope)
    return y


@torch.library.custom_op(
    "ldm2::add_leaky_relu", mutates_args=(),
    schema="(Tensor h, Tensor bias, Tensor x, float slope) -> (Tensor, Tensor)",
)
def _add_leaky_relu(h, bias, x, slope):
    h, x = _dense(h, x)
    sums, y = torch.empty_like(h), torch.empty_like(h)
    combine(h, bias, _last(h), x, sums=sums, activated=y, slope=slope)
    return sums, y


@torch.library.custom_op(
    "ldm2::add_up", mutates_args=(),
    schema="(Tensor h, Tensor bias, Tensor x, Tensor? total, int count) -> Tensor",
)
def _add_up(h, bias, x, total, count):
    h, x, total = _dense(h, x, total)
    y = torch.empty_like(h)
    combine(h, bias, _last(h), x, total, sums=y, count=count)
    return y


@torch.library.custom_op(
    "ldm2::narrow_conv1d", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor"
)
def _narrow_conv1d(x, weight, bias):
    images, channels, samples = x.shape
    y = x.new_empty(images, 1, samples)
    rows = x.transpose(1, 2).contiguous()
    with torch.cuda.device_of(x):
        _narrow[(triton.cdiv(samples, SAMPLES), images)](
            rows, weight[0].T.contiguous(), bias, y, rows.stride(0), rows.stride(1), samples, CHANNELS=channels,
            TAPS=weight.shape[2], WIDTH=triton.next_power_of_2(channels), SAMPLES=SAMPLES, num_warps=4,
        )
    return y


@torch.library.custom_op(
    "ldm2::few_conv1d", mutates_args=(), schema="(Tensor x, Tensor weight, int dilation) -> Tensor"
)
def _few_conv1d(x, weight, dilation):
    rows, taps = x.transpose(1, 2).contiguous(), weight.transpose(1, 2).contiguous()
    y = torch.empty_like(rows)
    images, samples, channels = rows.shape
    with torch.cuda.device_of(x):
        _few[(triton.cdiv(samples, SAMPLES), images)](
            rows, taps, y, samples, dilation, CHANNELS=channels, TAPS=taps.shape[1],
            WIDTH=max(16, triton.next_power_of_2(channels)), SAMPLES=SAMPLES, num_warps=4,
        )
    return y.transpose(1, 2)


@_few_conv1d.register_fake
def _(x, weight, dilation):
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@_bias_leaky_relu.register_fake
def _(h, bias, slope):
    return torch.empty_like(_dense(h)[0])


@_add_leaky_relu.register_fake
def _(h, bias, x, slope):
    return tuple(torch.empty_like(_dense(h)[0]) for _ in range(2))


@_add_up.register_fake
def _(h, bias, x, total, count):
    return torch.empty_like(_dense(h)[0])


@_narrow_conv1d.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], 1, x.shape[2])


def _rows_last(weight: Tensor) -> bool:
    """Whether a kernel (A, B, taps) lies as `ldm2.runtime.weight_layout` puts it for tensor cores."""
    return weight.transpose(1, 2).is_contiguous() and not weight.is_contiguous()


def _convolve(x: Tensor, weight: Tensor, dilation: int = 1) -> Tensor:
    reach = dilation * (weight.shape[2] // 2)
    if not _rows_last(weight):
        return F.conv1d(x, weight, padding=reach, dilation=dilation)
    if weight.shape[0] == weight.shape[1] <= FEW:
        return _few_conv1d(x, weight, dilation)
    return F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), padding=(0, reach), dilation=(1, dilation)).squeeze(2)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`ops.conv1d`: that to a single channel is ours."""
    if not isinstance(weight, Tensor):
        return NotImplemented
    if weight.shape[0] == 1 and weight.shape[1] <= NARROW:
        return _narrow_conv1d(x, weight, bias)
    return F.conv1d(x, weight, bias, padding=weight.shape[2] // 2)


def conv_transpose1d(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """`ops.conv_transpose1d`, in the layout of the weight.

    With the channels last it is a plain convolution to `stride` times as many channels: in memory those of a position
    are the channels of `stride` neighbors. cuDNN has no product of tensor cores for some transposed ones.
    """
    if not isinstance(weight, Tensor):
        return NotImplemented
    if not _rows_last(weight):
        return F.conv_transpose1d(x, weight, bias, stride, padding)
    (inside, outside, taps), length = weight.shape, x.shape[2]
    each = triton.cdiv(taps, stride)                       # inputs that a sample depends on
    parted = F.pad(weight, (0, each * stride - taps)).unflatten(2, (each, stride)).flip(2)
    kernel = parted.permute(3, 1, 2, 0).reshape(stride * outside, 1, each, inside).permute(0, 3, 1, 2)
    y = F.conv2d(x.unsqueeze(2), kernel, bias.repeat(stride), padding=(0, each - 1))
    y = y.permute(0, 2, 3, 1).reshape(len(x), -1, outside)                   # (B, N stride, C_out)
    return y[:, padding : padding + (length - 1) * stride - 2 * padding + taps].transpose(1, 2)


def residual_blocks(x: Tensor, slope: float, dilations: tuple[tuple[int, ...], ...], *parameters: Tensor) -> Tensor:
    """`ops.residual_blocks`: two passes beside the two convolutions of a pair."""
    if not all(isinstance(parameter, Tensor) for parameter in parameters):
        return NotImplemented
    shared, total, given = F.leaky_relu(x, slope), None, iter(parameters)
    for done, block in enumerate(dilations, start=1):
        y, activated = x, shared
        for pair, dilation in enumerate(block, start=1):
            h = _bias_leaky_relu(_convolve(activated, next(given), dilation), next(given), slope)
            h, bias = _convolve(h, next(given)), next(given)
            if pair < len(block):
                y, activated = _add_leaky_relu(h, bias, y, slope)
        total = _add_up(h, bias, y, total, len(dilations) if done == len(dilations) else 1)
    return total
