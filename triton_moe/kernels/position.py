"""Rotary position embeddings (RoPE), in place.

Halves convention, over the first n channels of a head, at position i with frequency w_c = base^(-2c/n), c < n/2:

    (x1, x2) -> (x1 cos iw - x2 sin iw, x2 cos iw + x1 sin iw)

The gradient is the rotation back.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, cdiv, launch, next_power_of_2, opaque


@triton.jit
def angles(position, frequency):
    """cos and sin of position * frequency, [positions, channels] float32; the frequency in quarter turns, float64.

    The whole turns of the angle are split off in float64, so that it keeps its accuracy at any position; the rest, at most
    pi / 4, goes through Taylor series that float32 cannot tell from the functions.
    """
    turns = position.to(tl.float64)[:, None] * frequency[None, :]
    whole = tl.floor(turns + 0.5)
    x = ((turns - whole) * 1.5707963267948966).to(tl.float32)
    z = x * x
    sin = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800)))))
    quarter = whole.to(tl.int64) & 3
    swap = (quarter & 1) == 1
    sin, cos = tl.where(swap, cos, sin), tl.where(swap, sin, cos)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _rope_rotate_kernel(
    x_ptr, T, H, offset, stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, LOG2_BASE: tl.constexpr, CONJUGATE: tl.constexpr, PERMUTE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """In place: a program owns the first N channels of BLOCK_T rows, of all heads. Halves that do not start on 16 bytes would be
    read number by number; with PERMUTE both come at once, in whole words, and change places in the tile. On an H200, 8 heads of
    128 channels, N = 32768: 50 rotated channels take 26 us, and 52 in halves; 64 take 14 us in halves, and 22 otherwise."""
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    offs_t = (pid % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    HALF: tl.constexpr = N // 2
    frequency = tl.exp2((c % HALF if PERMUTE else c).to(tl.float64) * (-2.0 * LOG2_BASE / N)) * 0.6366197723675814  # 2 / pi
    cos, sin = angles(offset + offs_t, frequency)
    if CONJUGATE:
        sin = -sin
    if PERMUTE:
        sin = tl.where((c < HALF)[None, :], -sin, sin)
    cos, sin = cos[:, None, :], sin[:, None, :]
    x_ptrs = x_ptr + b * stride_b + (offs_t * stride_t)[:, None, None] + c[None, None, :]
    mask = (offs_t < T)[:, None, None] & (c < (P if PERMUTE else HALF))[None, None, :]
    for start in range(0, H, BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        mask_h = mask & (h < H)[None, :, None]
        ptrs = x_ptrs + (h * stride_h)[None, :, None]
        x = tl.load(ptrs, mask=mask_h, other=0.0)
        if PERMUTE:
            partner = tl.where(c < HALF, c + HALF, tl.where(c < N, c - HALF, c))
            other = tl.gather(x, tl.broadcast_to(partner[None, None, :], x.shape), 2)
            y = x.to(tl.float32) * cos + other.to(tl.float32) * sin
            tl.store(ptrs, tl.where((c < N)[None, None, :], y, x.to(tl.float32)), mask=mask_h)
        else:
            x1, x2 = x.to(tl.float32), tl.load(ptrs + HALF, mask=mask_h, other=0.0).to(tl.float32)
            tl.store(ptrs, x1 * cos - x2 * sin, mask=mask_h)
            tl.store(ptrs + HALF, x2 * cos + x1 * sin, mask=mask_h)


@opaque(lambda x, n, base, offset, conjugate: None, mutates=("x",))
def rope_rotate_(x: Tensor, n: int, base: float, offset: int, conjugate: bool) -> None:
    """Rotate the first n (even) channels of x [B, T, H, P], rows contiguous, by position offset + t, or back when conjugate."""
    if n == 0:
        return
    B, T, H, P = x.shape
    permute = n * x.element_size() % 32 != 0
    block_c = next_power_of_2(n if permute else n // 2)
    block_h = min(8, next_power_of_2(H, 1))
    block_t = min(256 if INTERPRET else max(1, 4096 // (block_c * block_h)), next_power_of_2(T, 1))
    launch(
        _rope_rotate_kernel, (B * cdiv(T, block_t),), x, T, H, offset, *x.stride()[:3],
        P=P, N=n, LOG2_BASE=math.log2(base), CONJUGATE=conjugate, PERMUTE=permute,
        BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def rope_rotate(x: Tensor, n: int, base: float, offset: int, conjugate: bool) -> Tensor:
    """A rotated copy, contiguous."""
    y = x.clone(memory_format=torch.contiguous_format)
    rope_rotate_(y, n, base, offset, conjugate)
    return y
