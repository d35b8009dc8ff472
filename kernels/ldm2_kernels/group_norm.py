"""Group normalisation with a shift per channel before it and SiLU after it, in Triton: see `ops.group_norm_silu`.

A group that fits into the registers of one program is read once. A larger one is read twice, first for its moments,
by programs that take parts of it, then to normalise. Where channels are last, programs normalise some positions of all
groups, as a group's own elements are few bytes here and there. Moments are two-pass within a part and merged by the
formula of Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, so that a large mean does not
cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm2_kernels.layout import layout_of

WHOLE = 8192                                               # elements of a group that one program takes
PART = 4096                                                # of one that several share
TILE = 4096                                                # of several positions of all groups


@triton.jit
def _address(n, row, groups: tl.constexpr, width: tl.constexpr, positions, CHANNELS_LAST: tl.constexpr):
    """Of the elements n of a group: channel, start of the image and place in it. row = image * groups + group.

    Groups and their width are constants of the program: only then does the compiler see that channels-last elements lie
    together, and reads several at once.
    """
    image, group = row // groups, row % groups
    start = image.to(tl.int64) * groups * width * positions
    if CHANNELS_LAST:
        channel = group * width + n % width
        return channel, start, n // width * (groups * width) + channel
    return group * width + n // positions, start, group * width * positions + n


@triton.jit
def _read(
    x, shift, shift_stride, n, end, row, groups: tl.constexpr, width: tl.constexpr, positions,
    SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):
    """x + shift at the elements n < end of a group in float32, 0 after it."""
    channel, start, place = _address(n, row, groups, width, positions, CHANNELS_LAST)
    value = tl.load(x + start + place, mask=n < end, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift + row // groups * shift_stride + channel, mask=n < end, other=0.0).to(tl.float32)
    return value


@triton.jit
def _write(
    y, value, weight, bias, n, end, row, groups: tl.constexpr, width: tl.constexpr, positions,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):
    """Standardised values, scaled and shifted per channel, at the elements n < end of a group."""
    channel, start, place = _address(n, row, groups, width, positions, CHANNELS_LAST)
    scale = tl.load(weight + channel, mask=n < end, other=0.0).to(tl.float32)
    value = value * scale + tl.load(bias + channel, mask=n < end, other=0.0).to(tl.float32)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(y + start + place, value, mask=n < end)


@triton.jit
def _moments_of(value, n, start, end):
    """Mean, and sum of squared differences from it, of the elements n in [start, end)."""
    mean = tl.sum(value) / (end - start)
    difference = tl.where(n < end, value - mean, 0.0)
    return mean, tl.sum(difference * difference)


@triton.jit
def _whole(
    x, shift, weight, bias, y, shift_stride, groups: tl.constexpr, width: tl.constexpr, positions, eps,
    SHIFT: tl.constexpr, SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):
    row, n = tl.program_id(0), tl.arange(0, BLOCK)
    end = width * positions
    value = _read(x, shift, shift_stride, n, end, row, groups, width, positions, SHIFT, CHANNELS_LAST)
    mean, squares = _moments_of(value, n, 0, end)
    value = (value - mean) * tl.rsqrt(squares / end + eps)
    _write(y, value, weight, bias, n, end, row, groups, width, positions, SILU, CHANNELS_LAST)


@triton.jit
def _moments(
    x, shift, moments, shift_stride, groups: tl.constexpr, width: tl.constexpr, positions,
    SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    start = part * BLOCK
    n, end = start + tl.arange(0, BLOCK), tl.minimum(start + BLOCK, width * positions)
    value = _read(x, shift, shift_stride, n, end, row, groups, width, positions, SHIFT, CHANNELS_LAST)
    mean, squares = _moments_of(value, n, start, end)
    place = moments + 2 * (row * tl.num_programs(1) + part)
    tl.store(place, mean)
    tl.store(place + 1, squares)


@triton.jit
def _merged(moments, row, parts, size, eps, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Mean of a group, and the factor that makes its deviation 1, from the moments of its parts of BLOCK elements."""
    part = tl.arange(0, PARTS)
    place = moments + 2 * (row * parts + part)
    means = tl.load(place, mask=part < parts, other=0.0)
    squares = tl.load(place + 1, mask=part < parts, other=0.0)
    counts = tl.where(part < parts, tl.minimum(size - part * BLOCK, BLOCK), 0).to(tl.float32)
    mean = tl.sum(means * counts) / size
    squares = tl.sum(squares + counts * (means - mean) * (means - mean))
    return mean, tl.rsqrt(squares / size + eps)


@triton.jit
def _normalize(
    x, shift, moments, weight, bias, y, shift_stride, groups: tl.constexpr, width: tl.constexpr, positions, eps,
    SHIFT: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    row, size = tl.program_id(0), width * positions
    mean, factor = _merged(moments, row, tl.num_programs(1), size, eps, BLOCK, PARTS)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _read(x, shift, shift_stride, n, size, row, groups, width, positions, SHIFT, False)
    _write(y, (value - mean) * factor, weight, bias, n, size, row, groups, width, positions, SILU, False)


@triton.jit
def _spread(
    shift, moments, weight, norms, shift_stride, groups: tl.constexpr, width: tl.constexpr, positions, parts, eps,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):
    """What each channel of a group is to be reduced by, and what it is scaled by then."""
    row, lane = tl.program_id(0), tl.arange(0, WIDTH)
    channel, known = row % groups * width + lane, lane < width
    mean, factor = _merged(moments, row, parts, width * positions, eps, BLOCK, PARTS)
    means = tl.zeros((WIDTH,), tl.float32) + mean
    if SHIFT:
        means -= tl.load(shift + row // groups * shift_stride + channel, mask=known, other=0.0).to(tl.float32)
    place = norms + 2 * (row * width + lane)
    tl.store(place, means, mask=known)
    tl.store(place + 1, factor * tl.load(weight + channel, mask=known, other=0.0).to(tl.float32), mask=known)


@triton.jit
def _normalize_last(
    x, norms, bias, y, positions, CHANNELS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Positions of all groups at once, x and y (B, N, C)."""
    image, channel = tl.program_id(1), tl.arange(0, WIDTH)
    row, known = tl.program_id(0) * ROWS + tl.arange(0, ROWS), channel < CHANNELS
    inside = (row < positions)[:, None] & known[None, :]
    place = (image.to(tl.int64) * positions + row[:, None]) * CHANNELS + channel[None, :]
    norm = norms + 2 * (image * CHANNELS + channel)
    mean, scale = tl.load(norm, mask=known, other=0.0), tl.load(norm + 1, mask=known, other=0.0)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(inside, value - mean[None, :], 0.0)   # beyond the end it would be anything
    value = value * scale[None, :] + tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    if SILU:
        value = value * tl.sigmoid(value)
    tl.store(y + place, value, mask=inside)


@torch.library.custom_op(
    "ldm2::group_norm", mutates_args=(),
    schema="(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? shift, bool silu) -> Tensor",
)
def _group_norm(x, num_groups, weight, bias, eps, shift, silu):
    layout = layout_of(x)
    x, y = x.contiguous(memory_format=layout), torch.empty_like(x, memory_format=layout)
    batch, channels = x.shape[:2]
    width, positions = channels // num_groups, x[0, 0].numel()
    size, rows = width * positions, batch * num_groups
    shift = shift if shift is None or shift.stride(1) == 1 else shift.contiguous()
    by_row = 0 if shift is None or len(shift) == 1 else shift.stride(0)
    shape = {"shift_stride": by_row, "groups": num_groups, "width": width, "positions": positions}
    last = layout == torch.channels_last
    with torch.cuda.device_of(x):
        if size <= WHOLE:
            block = triton.next_power_of_2(size)
            _whole[(rows,)](x, shift, weight, bias, y, **shape, eps=eps, SHIFT=shift is not None, SILU=silu,
                            CHANNELS_LAST=last, BLOCK=block, num_warps=max(1, block // 512))
            return y
        parts = triton.cdiv(size, PART)
        moments = torch.empty(rows, parts, 2, dtype=torch.float32, device=x.device)
        flags = {"SHIFT": shift is not None, "BLOCK": PART}
        _moments[(rows, parts)](x, shift, moments, **shape, **flags, CHANNELS_LAST=last, num_warps=8)
        flags["PARTS"] = triton.next_power_of_2(parts)
        if not last:
            _normalize[(rows, parts)](x, shift, moments, weight, bias, y, **shape, eps=eps, **flags, SILU=silu,
                                      num_warps=8)
            return y
        norms = torch.empty(batch, channels, 2, dtype=torch.float32, device=x.device)
        _spread[(rows,)](shift, moments, weight, norms, **shape, parts=parts, eps=eps, **flags,
                         WIDTH=triton.next_power_of_2(width), num_warps=1)
        wide = triton.next_power_of_2(channels)
        at_once = max(1, TILE // wide)
        _normalize_last[(triton.cdiv(positions, at_once), batch)](
            x, norms, bias, y, positions, CHANNELS=channels, SILU=silu, WIDTH=wide, ROWS=at_once, num_warps=8,
        )
    return y


@_group_norm.register_fake
def _(x, num_groups, weight, bias, eps, shift, silu):
    return torch.empty_like(x, memory_format=layout_of(x))


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.group_norm` for x (B, C, ...), contiguous or channels-last."""
    return _group_norm(x, num_groups, weight, bias, eps, None, False)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None
) -> Tensor:
    """`ops.group_norm_silu` for x (B, C, ...), contiguous or channels-last."""
    return _group_norm(x, num_groups, weight, bias, eps, shift, True)
