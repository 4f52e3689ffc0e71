"""Which keys a query sees: causal, window, packed sequences, key padding.

NOTE [Intervals]
    The query with index t has position S - T + t, and every mask but key padding is an interval of keys for each query
    (causal, window, packed sequence) and, from the other side, an interval of queries for each key. A tile loops from
    the least lower end of its rows to the greatest upper end, so windows and packed sequences cost what they cover.

    Most tiles lie inside the intervals of all their rows and need no mask: they have a loop of their own, after the others, whose
    bounds are then no longer needed. With key padding every tile is masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, cdiv, launch


@triton.jit
def key_range(offs_t, T, S, bounds_ptr, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The keys [low, high) that the queries offs_t see; (S, 0) where there are none. Beyond T as for the last query."""
    offs_t = tl.minimum(offs_t, T - 1)
    position = offs_t + (S - T)
    low = offs_t * 0
    high = low + S
    if IS_CAUSAL:
        high = tl.minimum(high, position + 1)
    if HAS_WINDOW:
        low = tl.maximum(low, position - window + 1)
        if not IS_CAUSAL:
            high = tl.minimum(high, position + window)
    if bounds_ptr is not None:
        low = tl.maximum(low, tl.load(bounds_ptr + offs_t))
        high = tl.minimum(high, tl.load(bounds_ptr + T + offs_t))
    return tl.where(low < high, low, S), tl.where(low < high, high, 0)


@triton.jit
def query_range(offs_n, T, S, bounds_ptr, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The queries [low, high) that see the keys offs_n; (T, 0) where there are none. Beyond S as for the last key."""
    offs_n = tl.minimum(offs_n, S - 1)
    index = offs_n - (S - T)  # of the query at the key's position
    low = offs_n * 0
    high = low + T
    if IS_CAUSAL:
        low = tl.maximum(low, index)
    if HAS_WINDOW:
        high = tl.minimum(high, index + window)
        if not IS_CAUSAL:
            low = tl.maximum(low, index - window + 1)
    if bounds_ptr is not None:  # S == T
        low = tl.maximum(low, tl.load(bounds_ptr + offs_n))
        high = tl.minimum(high, tl.load(bounds_ptr + T + offs_n))
    return tl.where(low < high, low, T), tl.where(low < high, high, 0)


@triton.jit
def covering_tiles(low, high, BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr):
    """The tiles of BLOCK that cover all intervals [low, high): where the first starts, how many there are, and which of them,
    [begin, end), lie inside every interval and need no mask."""
    start = tl.min(low, 0)
    count = tl.cdiv(tl.maximum(tl.max(high, 0) - start, 0), BLOCK)
    begin = tl.minimum(tl.cdiv(tl.max(low, 0) - start, BLOCK), count)
    end = tl.maximum((tl.min(high, 0) - start) // BLOCK, begin)
    if ALL_MASKED:
        end = begin
    return start, count, begin, end


@triton.jit
def nth_tile(i, begin, end, MASKED: tl.constexpr):
    """The i-th of the tiles that need a mask, or of those that need none."""
    if MASKED:
        return tl.where(i < begin, i, i + end - begin)
    else:
        return begin + i


@triton.jit
def kept_keys(padding_ptr, offs_n, S):
    """Which keys exist and are not padding: only these are ever read."""
    keep = offs_n < S
    if padding_ptr is not None:
        keep = keep & (tl.load(padding_ptr + offs_n, mask=keep, other=1) == 0)
    return keep


@triton.jit
def inside(offs, low, high, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Which of the keys or queries offs lie in [low, high); without LOW or HIGH, all do on that side."""
    if not HIGH:
        return offs >= low
    elif not LOW:
        return offs < high
    else:
        return (offs >= low) & (offs < high)


@triton.jit
def visible_keys(n, low, high, keep, padding_ptr, LOW: tl.constexpr, BLOCK_N: tl.constexpr):
    visible = inside(tl.arange(0, BLOCK_N)[None, :], (low - n)[:, None], (high - n)[:, None], LOW, True)
    if padding_ptr is not None:
        visible &= keep[None, :]
    return visible


@triton.jit
def _sequence_bounds_kernel(cu_seqlens_ptr, bounds_ptr, n, T, steps, BLOCK: tl.constexpr):
    """bounds [2, T]: first token and end of each token's sequence, (T, 0) for a token outside all of them."""
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_t = offs_t < T
    low = offs_t * 0
    high = low + n + 1
    for _ in range(steps):  # bisection: low becomes the number of entries <= t
        middle = (low + high) // 2
        inside = low < high
        below = tl.load(cu_seqlens_ptr + middle, mask=inside & mask_t, other=0) <= offs_t
        low = tl.where(inside & below, middle + 1, low)
        high = tl.where(inside & (below == 0), middle, high)
    found = mask_t & (low > 0) & (low <= n)
    start = tl.load(cu_seqlens_ptr + low - 1, mask=found, other=0)
    end = tl.load(cu_seqlens_ptr + low, mask=found, other=0)
    start = tl.minimum(tl.maximum(start, 0), T)
    end = tl.minimum(tl.maximum(end, 0), T)
    tl.store(bounds_ptr + offs_t, tl.where(found, start, T).to(tl.int32), mask=mask_t)
    tl.store(bounds_ptr + T + offs_t, tl.where(found, end, 0).to(tl.int32), mask=mask_t)


def sequence_bounds(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """[2, T] int32: where each token's packed sequence starts and ends. Safe whatever cu_seqlens holds."""
    if cu_seqlens is None:
        return None
    bounds = torch.empty(2, T, dtype=torch.int32, device=cu_seqlens.device)
    n = cu_seqlens.numel() - 1
    block = 1024 if INTERPRET else 128
    arguments = (cu_seqlens.contiguous(), bounds, n, T, (n + 1).bit_length())
    launch(_sequence_bounds_kernel, (cdiv(T, block),), *arguments, BLOCK=block, num_warps=4)
    return bounds


def padding_bytes(key_padding_mask: Tensor | None) -> Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
