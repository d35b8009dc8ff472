"""Attention to few positions in one launch, in Triton: see `ops.attention` and `ops.absorbed_attention`.

A program has all keys and values of one head beside a block of queries, so the softmax is taken at once. What is long
is left to FlashAttention and the like, whose set-up costs more than the work where the keys are few. Where the keys
hold the projections of the queries, a program has the scores of all heads, and the maps are read in chunks of channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128                                              # keys, which one program holds
LONG, SMALL = 256, 8192                                    # keys for which it pays up to so many queries of all heads
WIDEST = 128                                               # elements of a head
SCORES = 512                                               # of one query, all heads, which one program holds
FEW = 4096                                                 # queries up to which programs take few of them


@triton.jit
def _kernel(
    q, k, v, bias, y, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    bias_image, bias_head, bias_row, bias_column, heads, queries, length, width, scale,
    BIAS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    asked, there = (row < queries) & (column[None, :] < width), (key[:, None] < length) & (column[None, :] < width)
    q += image.to(tl.int64) * q_image + head * q_head
    k += image.to(tl.int64) * k_image + head * k_head
    v += image.to(tl.int64) * v_image + head * v_head
    query = tl.load(q + row * q_row + column[None, :], mask=asked, other=0.0)
    keys = tl.load(k + key[:, None] * k_row + column[None, :], mask=there, other=0.0)
    values = tl.load(v + key[:, None] * v_row + column[None, :], mask=there, other=0.0)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if BIAS:
        place = image.to(tl.int64) * bias_image + head * bias_head + row * bias_row + key[None, :] * bias_column
        scores += tl.load(bias + place, mask=(row < queries) & (key[None, :] < length), other=0.0).to(tl.float32)
    scores = tl.where(key[None, :] < length, scores, float("-inf"))
    largest = tl.max(scores, axis=1)[:, None]
    weights = tl.exp(scores - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, axis=1)[:, None]
    attended = tl.dot(weights.to(values.dtype), values, input_precision="ieee") / tl.where(total == 0, 1.0, total)
    y += (image.to(tl.int64) * queries * heads + head) * width
    tl.store(y + row * (heads * width) + column[None, :], attended, mask=asked)


@torch.library.custom_op(
    "ldm2::attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, Tensor? bias) -> Tensor"
)
def _attention(q, k, v, bias):
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    images, heads, queries, width = q.shape
    keys, y = k.shape[2], _result(q)
    at_once, warps = (64, 4) if keys <= LONGEST else (32, 8)
    bias_strides = (0, 0, 0, 0) if bias is None else bias.expand(images, heads, queries, keys).stride()
    with torch.cuda.device_of(q):
        _kernel[(triton.cdiv(queries, at_once), images * heads)](
            q, k, v, bias, y, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides,
            heads, queries, keys, width, width ** -0.5, BIAS=bias is not None, QUERIES=at_once,
            KEYS=max(16, triton.next_power_of_2(keys)), WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=warps,
        )
    return y


def _result(q):
    """A view (B, H, Q, D) of (B, Q, H, D), which is what follows needs."""
    images, heads, queries, width = q.shape
    return q.new_empty(images, queries, heads, width).transpose(1, 2)


@_attention.register_fake
def _(q, k, v, bias):
    return _result(q)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`ops.attention` by a kernel of ours for up to LONGEST keys (LONG for few queries) of up to WIDEST elements; a row
    whose keys all have a bias of -inf is 0."""
    longest = LONG if q.shape[:3].numel() <= SMALL else LONGEST
    if k.shape[2] > longest or q.shape[3] > WIDEST or q.shape[:2] != k.shape[:2] or q.shape[3] != v.shape[3]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return _attention(q, k, v, bias)


@triton.jit
def _absorbed(
    x, keys, values, bias, offset, y, queries, length, bias_image, bias_head, bias_row, bias_column,
    BIAS: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr, PLACES: tl.constexpr, KEYS: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr,
):
    """PLACES, KEYS: powers of two that hold the heads and the keys of one."""
    image = tl.program_id(1).to(tl.int64)
    row, lane = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, CHUNK)
    pair = tl.arange(0, PLACES * KEYS)
    head, key = pair // KEYS, pair % KEYS
    place, there = head * length + key, (key < length) & (head < HEADS)
    x += image * queries * CHANNELS
    y += image * queries * CHANNELS
    keys += image * HEADS * length * CHANNELS
    values += image * HEADS * length * CHANNELS
    scores = tl.zeros((QUERIES, PLACES * KEYS), tl.float32)
    for start in range(0, CHANNELS, CHUNK):
        channel = start + lane
        known = channel < CHANNELS
        inside = (row < queries)[:, None] & known[None, :]
        asking = tl.load(x + row[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0)
        asked = tl.load(keys + place[:, None] * CHANNELS + channel[None, :], mask=there[:, None] & known[None, :],
                        other=0.0)
        scores += tl.dot(asking, tl.trans(asked), input_precision="ieee")
    if BIAS:
        beside = bias + image * bias_image + (head * bias_head + key * bias_column)[None, :] + row[:, None] * bias_row
        scores += tl.load(beside, mask=(row < queries)[:, None] & there[None, :], other=0.0).to(tl.float32)
    scores = tl.where((key < length)[None, :], scores, float("-inf"))        # a head that is none has zeros
    scores = tl.reshape(scores, (QUERIES, PLACES, KEYS))
    weights = tl.exp(scores - tl.max(scores, axis=2)[:, :, None])
    weights = tl.reshape(weights / tl.sum(weights, axis=2)[:, :, None], (QUERIES, PLACES * KEYS))
    weights = weights.to(x.dtype.element_ty)
    for start in range(0, CHANNELS, CHUNK):
        channel = start + lane
        known = channel < CHANNELS
        given = tl.load(values + channel[:, None] * (HEADS * length) + place[None, :],
                        mask=known[:, None] & there[None, :], other=0.0)
        attended = tl.dot(weights, tl.trans(given), input_precision="ieee")
        attended += tl.load(offset + channel, mask=known, other=0.0).to(tl.float32)[None, :]
        inside = (row < queries)[:, None] & known[None, :]
        tl.store(y + row[:, None] * CHANNELS + channel[None, :], attended, mask=inside)


@torch.library.custom_op(
    "ldm2::absorbed_attention", mutates_args=(),
    schema="(Tensor x, Tensor keys, Tensor values, Tensor? bias, Tensor offset) -> Tensor",
)
def _absorbed_attention(x, keys, values, bias, offset):
    x, keys, values = x.contiguous(), keys.contiguous(), values.contiguous()
    y = torch.empty_like(x)
    images, queries, channels = x.shape
    heads, length = keys.shape[1:3]
    bias_strides = (0, 0, 0, 0) if bias is None else bias.expand(images, heads, queries, length).stride()
    places, places_each = _padded(heads, length)
    small = images * queries <= FEW or places * places_each > 256 or x.element_size() > 2
    at_once = 16 if small else 64
    chunk = max(16, min(128, 32_768 // (places * places_each * x.element_size())))           # 32 kB of keys at once
    with torch.cuda.device_of(x):
        _absorbed[(triton.cdiv(queries, at_once), images)](
            x, keys, values, bias, offset, y, queries, length, *bias_strides, BIAS=bias is not None, CHANNELS=channels,
            HEADS=heads, PLACES=places, KEYS=places_each, QUERIES=at_once, CHUNK=chunk, num_warps=4, num_stages=2,
        )
    return y


def _padded(heads: int, length: int) -> tuple[int, int]:
    """Powers of two that hold the heads and the keys of one, together at least what a product takes."""
    places = triton.next_power_of_2(heads)
    return places, max(triton.next_power_of_2(length), 16 // places)


@_absorbed_attention.register_fake
def _(x, keys, values, bias, offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def absorbed_attention(x: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, offset: Tensor) -> Tensor:
    """`ops.absorbed_attention` where one program holds the SCORES of a query, on Ampere and later."""
    places, keys_each = _padded(*keys.shape[1:3])
    old = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)
    if old or places * keys_each > SCORES or len(x) != len(keys):
        return NotImplemented
    return _absorbed_attention(x, keys, values, bias, offset)
