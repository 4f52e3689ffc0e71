"""Rotary position embeddings (RoPE), in place, as a copy, or of a tile that a kernel has loaded.

Halves convention, over the first n channels of a head, at position i with frequency w_c = base^(-2c/n), c < n/2:

    (x1, x2) -> (x1 cos iw - x2 sin iw, x2 cos iw + x1 sin iw)

The gradient is the rotation back. A layer stores its own queries and keys with the channels of a pair side by side, 0, n/2, 1,
n/2 + 1, ...: see NOTE [RoPE] in attention/__init__.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, cdiv, launch, next_power_of_2, opaque, rows


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
def rotate(x1, x2, cos, sin):
    """The two halves, float32, rotated, with the same roundings wherever it is done."""
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def _rope_rotate_kernel(
    x_ptr, y_ptr, B, T, H, offset, stride_xb, stride_xt: tl.constexpr, stride_xh: tl.constexpr,
    stride_yb, stride_yt: tl.constexpr, stride_yh: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, LOG2_BASE: tl.constexpr, CONJUGATE: tl.constexpr, PERMUTE: tl.constexpr,
    BATCHES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y, which may be x: a program owns the first N channels of BLOCK_T rows, of all heads, in BATCHES sequences; for a copy the
    others too, BLOCK_R or in the same tile. Halves that do not start on 16 bytes would be read number by number; with PERMUTE
    both come at once, in whole words, and change places in the tile, and several sequences share the angles. On an H200, 8 heads
    of 128 channels, N = 32768, T 1024: 100 rotated channels take 45 us, and 52 with one sequence a program; 50 take 21, 26 so,
    and 52 in halves; 64 take 14 us in halves, and 22 otherwise."""
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
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
    for i in range(BATCHES):
        b = (pid // tiles * BATCHES + i).to(tl.int64)
        x_ptrs = x_ptr + b * stride_xb + (offs_t * stride_xt)[:, None, None] + c[None, None, :]
        y_ptrs = y_ptr + b * stride_yb + (offs_t * stride_yt)[:, None, None] + c[None, None, :]
        mask_t = (offs_t < tl.where(b < B, T, 0))[:, None, None]
        mask = mask_t & (c < (P if PERMUTE else HALF))[None, None, :]
        for start in range(0, H, BLOCK_H):
            h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
            mask_h = mask & (h < H)
            x = tl.load(x_ptrs + h * stride_xh, mask=mask_h, other=0.0)
            if PERMUTE:
                partner = tl.where(c < HALF, c + HALF, tl.where(c < N, c - HALF, c))
                other = tl.gather(x, tl.broadcast_to(partner[None, None, :], x.shape), 2)
                y = tl.fma(x.to(tl.float32), cos, other.to(tl.float32) * sin)
                tl.store(y_ptrs + h * stride_yh, tl.where((c < N)[None, None, :], y, x.to(tl.float32)), mask=mask_h)
            else:
                x1 = x.to(tl.float32)
                x2 = tl.load(x_ptrs + h * stride_xh + HALF, mask=mask_h, other=0.0).to(tl.float32)
                y1, y2 = rotate(x1, x2, cos, sin)
                tl.store(y_ptrs + h * stride_yh, y1, mask=mask_h)
                tl.store(y_ptrs + h * stride_yh + HALF, y2, mask=mask_h)
                if BLOCK_R > 0:
                    r = N + tl.arange(0, BLOCK_R)[None, None, :]
                    mask_r = mask_t & (h < H) & (r < P)
                    x_rest = x_ptr + b * stride_xb + (offs_t * stride_xt)[:, None, None] + h * stride_xh + r
                    y_rest = y_ptr + b * stride_yb + (offs_t * stride_yt)[:, None, None] + h * stride_yh + r
                    tl.store(y_rest, tl.load(x_rest, mask=mask_r, other=0.0), mask=mask_r)


@triton.jit
def _rope_pairs_kernel(
    x_ptr, y_ptr, B, T, H, offset, stride_xb, stride_xt: tl.constexpr, stride_xh: tl.constexpr,
    stride_yb, stride_yt: tl.constexpr, stride_yh: tl.constexpr, P: tl.constexpr, FULL_P: tl.constexpr, N: tl.constexpr,
    LOG2_BASE: tl.constexpr, BATCHES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `_rope_rotate_kernel`, of pairs side by side: the first P channels of x, which may be y, and zeros up to FULL_P."""
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    offs_t = (pid % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cos, sin = _pair_angles(offset + offs_t, N, LOG2_BASE, BLOCK_C // 2)
    cos, sin = cos[:, None, :], sin[:, None, :]
    c = tl.arange(0, BLOCK_C)[None, None, :]
    for i in range(BATCHES):
        b = (pid // tiles * BATCHES + i).to(tl.int64)
        mask_t = (offs_t < tl.where(b < B, T, 0))[:, None, None]
        for start in range(0, H, BLOCK_H):
            h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
            mask = mask_t & (h < H)
            x_ptrs = x_ptr + b * stride_xb + (offs_t * stride_xt)[:, None, None] + h * stride_xh + c
            x = tl.load(x_ptrs, mask=mask & (c < P), other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(x, [BLOCK_T, BLOCK_H, BLOCK_C // 2, 2]))
            y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), [BLOCK_T, BLOCK_H, BLOCK_C])
            y_ptrs = y_ptr + b * stride_yb + (offs_t * stride_yt)[:, None, None] + h * stride_yh + c
            tl.store(y_ptrs, y, mask=mask & (c < FULL_P))


@triton.jit
def _pair_angles(position, N: tl.constexpr, LOG2_BASE: tl.constexpr, PAIRS: tl.constexpr):
    """[positions, PAIRS]; channels beyond N stay as they are."""
    c = tl.arange(0, PAIRS)
    frequency = tl.exp2(c.to(tl.float64) * (-2.0 * LOG2_BASE / N)) * 0.6366197723675814  # 2 / pi
    return angles(position, tl.where(c < N // 2, frequency, 0.0))


@triton.jit
def _rope_table_kernel(
    table_ptr, S, N: tl.constexpr, LOG2_BASE: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cos, sin = _pair_angles(offs_t, N, LOG2_BASE, BLOCK_C // 2)
    mask_t = (offs_t < S)[:, None]
    if PAIRS:
        c = tl.arange(0, BLOCK_C)[None, :]
        table = tl.reshape(tl.join(cos, sin), [BLOCK_T, BLOCK_C])
        tl.store(table_ptr + offs_t[:, None] * WIDTH + c, table, mask=mask_t & (c < WIDTH))
    else:
        ptrs = table_ptr + offs_t[:, None] * WIDTH + tl.arange(0, BLOCK_C // 2)[None, :]
        tl.store(ptrs, cos, mask=mask_t)
        tl.store(ptrs + BLOCK_C // 2, sin, mask=mask_t)


@triton.jit
def _turn_back(x, table, BLOCK: tl.constexpr, C: tl.constexpr):
    cos, sin = tl.split(tl.reshape(table, [BLOCK, C // 2, 2]))
    x1, x2 = tl.split(tl.reshape(x, [BLOCK, C // 2, 2]))
    return tl.reshape(tl.join(x1 * cos + x2 * sin, x2 * cos - x1 * sin), [BLOCK, C])


@triton.jit
def turn_back(parts, table_ptr, position, mask, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows in parts, [BLOCK, chunk] float32 of pairs side by side, rotated back; table_ptr as `rope_table` makes it."""
    WIDTH: tl.constexpr = CHUNKS[0] if len(CHUNKS) == 1 else CHUNKS[0] + CHUNKS[1]
    ptrs = table_ptr + (position.to(tl.int64) * WIDTH)[:, None]
    turned = ()
    start: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        table = tl.load(ptrs + (start + tl.arange(0, CHUNKS[i]))[None, :], mask=mask[:, None], other=0.0)
        turned = turned + (_turn_back(parts[i], table, BLOCK, CHUNKS[i]),)
        start = start + CHUNKS[i]
    return turned


@triton.jit
def turn(parts, table_ptr, position, mask, C: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """Rows in parts, of which the first two, [BLOCK, C], hold the halves: rotated as those from `position` on, or back, in the
    dtype that they have; mask None: all; table_ptr as `rope_table` makes it."""
    ptrs = table_ptr + position.to(tl.int64) * (2 * C) + tl.arange(0, BLOCK)[:, None] * (2 * C) + tl.arange(0, C)[None, :]
    if mask is None:
        cos, sin = tl.load(ptrs), tl.load(ptrs + C)
    else:
        cos, sin = tl.load(ptrs, mask=mask[:, None], other=0.0), tl.load(ptrs + C, mask=mask[:, None], other=0.0)
    dtype: tl.constexpr = parts[0].dtype
    y1, y2 = rotate(parts[0].to(tl.float32), parts[1].to(tl.float32), cos, -sin if BACK else sin)
    return (y1.to(dtype), y2.to(dtype)) + parts[2:]


def rope_table(n: int, base: float, S: int, width: int, like: Tensor, pairs: bool) -> Tensor:
    """cos and sin of n / 2 pairs, then 1 and 0, float32, on the device of `like`: side by side, [S, width], or first all cos,
    [S, 2, width], width a power of two."""
    width = width if pairs else 2 * width
    table = like.new_empty(S, width, dtype=torch.float32)
    block_c = next_power_of_2(width)
    block_t = min(256 if INTERPRET else max(1, 2048 // block_c), next_power_of_2(S, 1))
    meta = dict(N=n, LOG2_BASE=math.log2(base), WIDTH=width, PAIRS=pairs, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=4)
    launch(_rope_table_kernel, (cdiv(S, block_t),), table, S, **meta)
    return table


def _launch(x: Tensor, y: Tensor, n: int, base: float, offset: int, conjugate: bool) -> None:
    B, T, H, P = x.shape
    permute = n * x.element_size() % 32 != 0
    rest = 0 if x is y else P - n  # channels to copy
    block_c = next_power_of_2(n + rest if permute else n // 2)
    block_h = min(8, next_power_of_2(H, 1))
    block_t = min(256 if INTERPRET else max(1, 4096 // (block_c * block_h)), next_power_of_2(T, 1))
    batches = min(4, next_power_of_2(B // 2 + 1, 1)) if permute else 1
    launch(
        _rope_rotate_kernel, (cdiv(B, batches) * cdiv(T, block_t),), x, y, B, T, H, offset, *x.stride()[:3], *y.stride()[:3],
        P=P, N=n, LOG2_BASE=math.log2(base), CONJUGATE=conjugate, PERMUTE=permute,
        BATCHES=batches, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_C=block_c,
        BLOCK_R=0 if permute or rest == 0 else next_power_of_2(rest), num_warps=4,
    )  # fmt: skip


@opaque(lambda x, n, base, offset, conjugate: None, mutates=("x",))
def rope_rotate_(x: Tensor, n: int, base: float, offset: int, conjugate: bool) -> None:
    """Rotate the first n (even) channels of x [B, T, H, P], rows contiguous, by position offset + t, or back when conjugate."""
    if n > 0:
        _launch(x, x, n, base, offset, conjugate)


def _launch_pairs(x: Tensor, y: Tensor, n: int, base: float, offset: int, width: int, full: int) -> None:
    B, T, H, _ = x.shape
    block_c, block_h = next_power_of_2(full), min(8, next_power_of_2(H, 1))
    block_t = min(256 if INTERPRET else max(1, 4096 // (block_c * block_h)), next_power_of_2(T, 1))
    batches = min(4, next_power_of_2(B // 2 + 1, 1))
    launch(
        _rope_pairs_kernel, (cdiv(B, batches) * cdiv(T, block_t),), x, y, B, T, H, offset, *x.stride()[:3], *y.stride()[:3],
        P=width, FULL_P=full, N=n, LOG2_BASE=math.log2(base), BATCHES=batches, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_C=block_c,
        num_warps=4,
    )  # fmt: skip


@opaque(lambda x, n, base, offset: None, mutates=("x",))
def rope_pairs_(x: Tensor, n: int, base: float, offset: int) -> None:
    """As `rope_rotate_`, of pairs side by side."""
    width = min(x.shape[3], cdiv(n, 8) * 8)  # in whole words
    if n > 0:
        _launch_pairs(x, x, n, base, offset, width, width)


@opaque(lambda x, n, base, offset, width: x.new_empty(*x.shape[:3], width))
def rope_pairs(x: Tensor, n: int, base: float, offset: int, width: int) -> Tensor:
    """The same as a copy of heads that are `width` channels apart, with zeros in the rest."""
    if n == 0:
        return torch.nn.functional.pad(x, (0, width - x.shape[3]))
    y = x.new_empty(*x.shape[:3], width)
    _launch_pairs(x, y, n, base, offset, x.shape[3], width)
    return y


def _rope_rotate_fake(x, n, base, offset, conjugate):
    return x.new_empty(x.shape)


@opaque(_rope_rotate_fake)
def rope_rotate(x: Tensor, n: int, base: float, offset: int, conjugate: bool) -> Tensor:
    """A rotated copy, contiguous."""
    if n == 0:
        return x.clone(memory_format=torch.contiguous_format)
    y = _rope_rotate_fake(x, n, base, offset, conjugate)
    _launch(rows(x), y, n, base, offset, conjugate)
    return y
