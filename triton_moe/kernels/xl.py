"""The Transformer-XL term: a . R_{j-i} for query i and key j, as the product of a query's channels and a key's.

    a = W_h^T x                      W_h [P, D], the position weight of a head; x its query, with the position bias
    R_m[2c] = sin(m w_c), R_m[2c+1] = cos(m w_c)                                            w_c = 10000^(-2c/D)

With a_s[c] = a[2c] and a_c[c] = a[2c+1] (0 where an odd D ends) the addition theorems split it into two rotations:

    a . R_{j-i} = sum_c (a_s cos iw + a_c sin iw) sin jw + (a_c cos iw - a_s sin iw) cos jw = q_pos_i . k_pos_j

k_pos is a table that all heads share, and has no gradient; that of q_pos is rotated back.

NOTE [Few channels]
    Over a span of L distances sinusoids closer together than 2 pi / L are alike. So the frequencies above the c-th stay as they
    are, and the others, which lie more densely than that, become combinations of an even grid, by least squares: R_m = M F_m
    with fewer channels F, M [D, F], and W_h M takes the place of W_h. For D 1024 and L 1024 that makes 256 channels of 1024, with
    an error of at most 1e-4 of a sinusoid in the mean of squares, far below the rounding of 16 bits; and 320 with one of 1e-8 for
    float32, which rounds 320 terms less than 1024.

    On an H200 (bfloat16, causal, N = 32768, T 1024) attention takes 285 us forward and 743 backward for H 4, P 128, D 1024, and
    without positions 110 and 290; 363 and 928 for H 8, P 64, D 512, and without 133 and 340.

    The fit is best around distance 0, so the keys are moved by half a span where all distances are negative.
"""

import math
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, cdiv, constant, launch, next_power_of_2, opaque, rows
from .position import angles

BASE = 10000.0
SPLITS = 32  # of the tokens, for the gradient of the weight


@triton.jit
def _load_halves(ptr, offs, cols, mask_rows, HALF: tl.constexpr):
    """x[.., c] and x[.., HALF + c]."""
    ptrs = ptr + (offs[:, None] + cols[None, :])
    mask = mask_rows[:, None] & (cols < HALF)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + HALF, mask=mask, other=0.0)


@triton.jit
def _xl_table_kernel(y_ptr, frequency_ptr, S, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sines, then cosines of positions from 0 on."""
    offs_s = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    cos, sin = angles(offs_s, tl.load(frequency_ptr + c, mask=c < HALF, other=0.0))
    mask = (offs_s < S)[:, None] & (c < HALF)[None, :]
    y_ptrs = y_ptr + offs_s[:, None] * (2 * HALF) + c[None, :]
    tl.store(y_ptrs, sin, mask=mask)
    tl.store(y_ptrs + HALF, cos, mask=mask)


@triton.jit
def _xl_query_kernel(
    x_ptr, w_ptr, table_ptr, y_ptr, T, H: tl.constexpr, offset,
    stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, F]: a = x W for w [H, P, F], rotated. A program owns BLOCK_T rows and BLOCK_C frequencies of a head."""
    tiles = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    offs_t = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_t = offs_t < T
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.program_id(2)
    a_sin = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    a_cos = a_sin
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x_ptrs = x_ptr + b * stride_b + (offs_t * stride_t)[:, None] + h.to(tl.int64) * stride_h + p[None, :]
        x = tl.load(x_ptrs, mask=mask_t[:, None] & (p < P)[None, :], other=0.0)
        w_sin, w_cos = _load_halves(w_ptr + h * (P * 2 * HALF), p * (2 * HALF), c, p < P, HALF)
        a_sin = tl.dot(x, w_sin, a_sin, input_precision=PRECISION)
        a_cos = tl.dot(x, w_cos, a_cos, input_precision=PRECISION)
    sin, cos = _load_halves(table_ptr, (offset + offs_t) * (2 * HALF), c, mask_t, HALF)
    mask = mask_t[:, None] & (c < HALF)[None, :]
    y_ptrs = y_ptr + (((b * T + offs_t) * H + h) * (2 * HALF))[:, None] + c[None, :]
    tl.store(y_ptrs, a_sin * cos + a_cos * sin, mask=mask)
    tl.store(y_ptrs + HALF, a_cos * cos - a_sin * sin, mask=mask)


@triton.jit
def _rotated_back(g_ptr, table_ptr, b, offs_t, mask_t, h, c, T, offset, H: tl.constexpr, HALF: tl.constexpr):
    """d a_s and d a_c, in the dtype of g [B, T, H, F], the gradient of q_pos."""
    sin, cos = _load_halves(table_ptr, (offset + offs_t) * (2 * HALF), c, mask_t, HALF)
    g_sin, g_cos = _load_halves(g_ptr, ((b * T + offs_t) * H + h) * (2 * HALF), c, mask_t, HALF)
    g_sin, g_cos = g_sin.to(tl.float32), g_cos.to(tl.float32)
    da_sin, da_cos = g_sin * cos - g_cos * sin, g_sin * sin + g_cos * cos
    return da_sin.to(g_ptr.dtype.element_ty), da_cos.to(g_ptr.dtype.element_ty)


@triton.jit
def _xl_dx_kernel(
    g_ptr, w_ptr, table_ptr, dx_ptr, T, H: tl.constexpr, offset,
    stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx += da W^T."""
    tiles = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(1)
    offs_t = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_t = offs_t < T
    p = tl.arange(0, BLOCK_P)
    dx_ptrs = dx_ptr + b * stride_b + (offs_t * stride_t)[:, None] + h.to(tl.int64) * stride_h + p[None, :]
    mask = mask_t[:, None] & (p < P)[None, :]
    acc = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    for start in range(0, HALF, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        da_sin, da_cos = _rotated_back(g_ptr, table_ptr, b, offs_t, mask_t, h, c, T, offset, H, HALF)
        w_sin, w_cos = _load_halves(w_ptr + h * (P * 2 * HALF), p * (2 * HALF), c, p < P, HALF)
        acc = tl.dot(da_sin, tl.trans(w_sin), acc, input_precision=PRECISION)
        acc = tl.dot(da_cos, tl.trans(w_cos), acc, input_precision=PRECISION)
    tl.store(dx_ptrs, acc, mask=mask)


@triton.jit
def _xl_dw_kernel(
    g_ptr, x_ptr, table_ptr, dw_ptr, B, T, H: tl.constexpr, offset, per,
    stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dw [splits, H, P, F] float32: x^T da of `per` tiles of BLOCK_T rows."""
    h = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    tiles = tl.cdiv(T, BLOCK_T)
    acc_sin = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    acc_cos = acc_sin
    first = tl.program_id(0).to(tl.int64) * per
    for i in range(0, tl.minimum(per, B * tiles - first)):
        b = (first + i) // tiles
        offs_t = (first + i) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        x_ptrs = x_ptr + b * stride_b + (offs_t * stride_t)[:, None] + h.to(tl.int64) * stride_h + p[None, :]
        x = tl.trans(tl.load(x_ptrs, mask=mask_t[:, None] & (p < P)[None, :], other=0.0))
        da_sin, da_cos = _rotated_back(g_ptr, table_ptr, b, offs_t, mask_t, h, c, T, offset, H, HALF)
        acc_sin = tl.dot(x, da_sin, acc_sin, input_precision=PRECISION)
        acc_cos = tl.dot(x, da_cos, acc_cos, input_precision=PRECISION)
    dw_ptrs = dw_ptr + ((tl.program_id(0) * H + h) * P + p).to(tl.int64)[:, None] * (2 * HALF) + c[None, :]
    mask = (p < P)[:, None] & (c < HALF)[None, :]
    tl.store(dw_ptrs, acc_sin, mask=mask)
    tl.store(dw_ptrs + HALF, acc_cos, mask=mask)


def _exact(x: Tensor, precision: str) -> bool:
    return x.dtype == torch.float32 and precision == "ieee"


def _frequencies(D: int) -> np.ndarray:
    return BASE ** (-2 * np.arange(cdiv(D, 2)) / D)


def _span(S: int, window: int, causal: bool) -> int:
    """The distances from -span to 0, or from -span / 2 to span / 2, hold all that occur; a power of two, to have few fits."""
    reach = min(S, window) if window else S
    span = 64
    while span < reach:
        span *= 2
    return span if causal else 2 * span


@cache
def _fit(D: int, span: int, exact: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frequencies [F / 2], and how their sines and cosines make those of R, both [F / 2, D / 2], for |m| <= span / 2. F is a
    width that tiles have. See NOTE [Few channels]."""
    w = _frequencies(D)
    spacing, beyond, tolerance = (4.0, 12, 1e-8) if exact else (5.5, 3, 1e-4)
    count = np.arange(len(w)) + np.ceil(w * span / spacing).astype(int) + beyond
    kept, wanted = int(count.argmin()), 2 * int(count.min())
    while True:
        half = next_power_of_2(wanted) // 2
        F = cdiv(wanted, 16) * 16 if exact else half + next_power_of_2(wanted - half)
        if F >= D:
            break
        number = F // 2 - kept
        grid = min(1.02 * spacing / span, w[kept] / (number - max(beyond, 5.5))) * (np.arange(number) + 0.5)
        m = np.linspace(-span / 2, span / 2, 8 * number)[:, None]
        fits, error = np.zeros((2, F // 2, len(w))), 0.0
        for fit, f in zip(fits, (np.sin, np.cos), strict=True):
            fit[:kept, :kept] = np.eye(kept)
            fit[kept:, kept:] = np.linalg.lstsq(f(m * grid), f(m * w[kept:]), rcond=tolerance)[0]
            error = max(error, np.square(f(m * grid) @ fit[kept:, kept:] - f(m * w[kept:])).mean(0).max() ** 0.5)
        if error < tolerance:
            return np.concatenate([w[:kept], grid]), *fits
        wanted = F + 1
    half = cdiv(D + D % 2, 16) * 8
    return np.concatenate([w, np.zeros(half - len(w))]), *np.eye(half, len(w))[None].repeat(2, 0)


def _basis(D: int, span: int, shift: int, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """The frequencies [F / 2] and M [D, F], such that R_m = M F_{m + shift} for |m + shift| <= span / 2."""
    frequencies, sines, cosines = _fit(D, span, exact)
    back = _frequencies(D) * shift  # sin(m w) = sin((m + shift) w) cos(back) - cos((m + shift) w) sin(back), and so on
    sin_rows = np.concatenate([sines * np.cos(back), -cosines * np.sin(back)])
    cos_rows = np.concatenate([sines * np.sin(back), cosines * np.cos(back)])
    return frequencies, np.stack([sin_rows.T, cos_rows.T], 1).reshape(-1, len(sin_rows))[:D]


_on_device: dict[tuple, list[Tensor]] = {}


@cache
def _on_host(D: int, span: int, shift: int, exact: bool, pinned: bool) -> list[Tensor]:
    """The frequencies in quarter turns and M, float64, whose products autocast leaves alone."""
    frequencies, M = _basis(D, span, shift, exact)
    tensors = [torch.from_numpy(frequencies * (2 / math.pi)), torch.from_numpy(M)]
    return [t.pin_memory() for t in tensors] if pinned else tensors


def _basis_on(device: torch.device, *basis: int) -> list[Tensor]:
    """`_on_host`, copied to the device once, and then without waiting; what a CUDA graph copies stays its own."""
    key, cuda = (device, *basis), device.type == "cuda"
    found = _on_device.get(key)
    if found is None:
        found = [t.to(device, non_blocking=True) for t in _on_host(*basis, cuda)]
        if not (cuda and torch.cuda.is_current_stream_capturing()):
            _on_device[key] = [constant(t) for t in found]
    return found


def _constants(x: Tensor, D: int, S: int, window: int, causal: bool, precision: str) -> tuple[Tensor, Tensor, int]:
    """A table of positions [S + shift, F], M, and the shift of the keys. In float16, for bfloat16, it is exact to 2**-12."""
    span = _span(S, window, causal)
    shift = span // 2 if causal else 0
    frequencies, M = _basis_on(x.device, D, span, shift, _exact(x, precision))
    dtype, half = torch.float16 if x.dtype == torch.bfloat16 else torch.float32, M.shape[1] // 2
    table, tiles = x.new_empty(S + shift, 2 * half, dtype=dtype), _tiles(x, half, 0)
    tiles = {name: tiles[name] for name in ("BLOCK_T", "BLOCK_C", "num_warps")}
    grid = cdiv(S + shift, tiles["BLOCK_T"]), cdiv(half, tiles["BLOCK_C"])
    launch(_xl_table_kernel, grid, table, frequencies, S + shift, HALF=half, **tiles)
    return table, M, shift


def _tiles(x: Tensor, half: int, columns: int) -> dict[str, int]:
    if INTERPRET:
        return dict(BLOCK_T=256, BLOCK_C=512, BLOCK_P=columns, num_warps=1)
    if x.dtype == torch.float32:
        return dict(BLOCK_T=16, BLOCK_C=16, BLOCK_P=columns, num_warps=4)
    stages = 3 if half % 64 and x.dtype == torch.bfloat16 else 2  # in float16 the table is twice as wide
    return dict(BLOCK_T=64, BLOCK_C=32 if half % 64 else 64, BLOCK_P=columns, num_warps=4, num_stages=stages)


def channels(D: int, S: int, window: int, causal: bool, exact: bool) -> int:
    """F, for a weight of width D and S keys; exact: for float32 that is multiplied as such."""
    return 2 * len(_fit(D, _span(S, window, causal), exact)[0])


def _xl_query_fake(x, weight, S, window, causal, precision):
    D = int(weight.shape[1])  # a constant of the model, never symbolic
    F = channels(D, S, window, causal, _exact(x, precision))
    return x.new_empty(*x.shape[:3], F), x.new_empty(S, F), x.new_empty(*x.shape[2:], F)


@opaque(_xl_query_fake)
def xl_query(x: Tensor, weight: Tensor, S: int, window: int, causal: bool, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """q_pos [B, T, H, F] of x [B, T, H, P], the last of S positions, k_pos [S, F], and W M [H, P, F]; weight [H*P, D]."""
    B, T, H, P = x.shape
    q_pos = _xl_query_fake(x, weight, S, window, causal, precision)[0]
    table, M, shift = _constants(x, weight.shape[1], S, window, causal, precision)
    x, half, wide = rows(x), M.shape[1] // 2, next_power_of_2(P)
    narrow = (weight.double() @ M).to(weight.dtype).view(H, P, 2 * half)
    tiles = _tiles(x, half, wide if INTERPRET else min(wide, 32 if x.dtype == torch.float32 else 128))
    launch(
        _xl_query_kernel, (B * cdiv(T, tiles["BLOCK_T"]), cdiv(half, tiles["BLOCK_C"]), H),
        x, narrow, table, q_pos, T, H, S - T, *x.stride()[:3], P=P, HALF=half, PRECISION=precision, **tiles,
    )  # fmt: skip
    return q_pos, table[shift:].to(x.dtype, copy=True), narrow


def _xl_query_backward_fake(dq_pos, dx, x, narrow, D, S, window, causal, precision):
    return narrow.new_empty(narrow.shape[0] * narrow.shape[1], D)


@opaque(_xl_query_backward_fake, mutates=("dx",))
def xl_query_backward_(
    dq_pos: Tensor, dx: Tensor, x: Tensor, narrow: Tensor, D: int, S: int, window: int, causal: bool, precision: str
) -> Tensor:
    """Adds x's gradient to dx, whose rows are contiguous, and returns the weight's; narrow is W M."""
    B, T, H, P = x.shape
    table, M, _ = _constants(x, D, S, window, causal, precision)
    x, dq_pos, half = rows(x), dq_pos.contiguous(), M.shape[1] // 2
    tiles = _tiles(x, half, next_power_of_2(P))
    number = B * cdiv(T, tiles["BLOCK_T"])
    shared = dict(P=P, HALF=half, PRECISION=precision, **tiles)
    launch(_xl_dx_kernel, (number, H), dq_pos, narrow, table, dx, T, H, S - T, *dx.stride()[:3], **shared)
    per = max(1, cdiv(number, SPLITS))
    splits = cdiv(number, per)
    parts = x.new_empty(splits, H, P, 2 * half, dtype=torch.float32)
    launch(
        _xl_dw_kernel, (splits, H, cdiv(half, tiles["BLOCK_C"])),
        dq_pos, x, table, parts, B, T, H, S - T, per, *x.stride()[:3], **shared,
    )  # fmt: skip
    return (parts.sum(0).view(H * P, -1).double() @ M.t()).to(narrow.dtype)
