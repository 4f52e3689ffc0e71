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

    On an H200 (bfloat16, causal, N = 32768, T 1024) the forward pass of attention takes 323 us for H 8, P 64, D 512, and without
    positions 114; 249 for H 4, P 112, D 1024, and without 107.

    The fit is best around distance 0, so the keys are moved by half a span where all distances are negative.

NOTE [Tiles]
    The kernels take the channels as sines and cosines in turns: the two that a rotation mixes are then in the same thread, and a
    tile is read, multiplied and written as one. A program for q_pos keeps its tiles of W and of the table over several sequences.
    Microseconds on an H200, bfloat16, N = 32768, T 1024, for H 8, P 64, D 512 and H 4, P 112, D 1024; before, sines and cosines
    were two tiles and nothing was kept:

        q_pos 44 and 33, before 70 and 53; a program with all heads of its rows 67 and 59, with all channels of a head 46 and 39
        dx    55 and 53, before 65 and 55; with W and the table kept 79 and 77
        dw    43 and 41, before 62 and 48; dx and dw of one kernel, which reads the gradient once, 129 and 172 together
        W M    4 and  6, before 12 and 16 as a product in float64 between two casts, which it still is for float32
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
from .sets import capability

BASE = 10000.0
PROGRAMS = 256  # for q_pos, where a head of one sequence does not have more tiles
SPLITS = 16  # of the tokens, for the gradient of the weight


@triton.jit
def _load(ptr, offs, cols, mask_rows, WIDTH: tl.constexpr):
    return tl.load(ptr + (offs[:, None] + cols[None, :]), mask=mask_rows[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def _split(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x[.., 2c] and x[.., 2c + 1]: neighbours are in the same thread."""
    return tl.split(tl.reshape(x, ROWS, COLS // 2, 2))


@triton.jit
def _join(x, y, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.reshape(tl.join(x, y), ROWS, COLS)


@triton.jit
def _xl_table_kernel(
    table_ptr, k_pos_ptr, frequency_ptr, shift, ROWS, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Sines and cosines, in turns, of positions from 0 on; those from `shift` on are k_pos."""
    offs_s = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_F) // 2 + tl.arange(0, BLOCK_F // 2)
    cos, sin = angles(offs_s, tl.load(frequency_ptr + c, mask=c < HALF, other=0.0))
    y = _join(sin, cos, BLOCK_T, BLOCK_F).to(table_ptr.dtype.element_ty)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    ptrs = table_ptr + (offs_s[:, None] * (2 * HALF) + f[None, :])
    mask = (offs_s < ROWS)[:, None] & (f < 2 * HALF)[None, :]
    tl.store(ptrs, y, mask=mask)
    if k_pos_ptr is not None:
        ptrs = k_pos_ptr + ((offs_s - shift)[:, None] * (2 * HALF) + f[None, :])
        tl.store(ptrs, y, mask=mask & (offs_s >= shift)[:, None])


@triton.jit
def _xl_weight_kernel(
    w_ptr, m_ptr, y_ptr, R: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [R, F] = W M for W [R, D] in 16 bits, and M [3, D, F] as a sum of three parts, which have all bits of a float32."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        w = _load(w_ptr, r * D, d, r < R, D)
        for part in tl.static_range(3):
            acc = tl.dot(w, _load(m_ptr, (part * D + d) * F, f, d < D, F), acc)
    tl.store(y_ptr + r[:, None] * F + f[None, :], acc, mask=(r < R)[:, None] & (f < F)[None, :])


@triton.jit
def _xl_query_kernel(
    x_ptr, w_ptr, table_ptr, y_ptr, B, T, H: tl.constexpr, offset, per,
    stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y [B, T, H, F]: a = x W for w [H, P, F], rotated. A program owns BLOCK_T positions and BLOCK_F channels of a head in `per`
    sequences, which share W and the table."""
    tiles, across = tl.cdiv(T, BLOCK_T), tl.cdiv(F, BLOCK_F)
    tile = tl.program_id(0) // across
    f = tl.program_id(0) % across * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_t = (tile % tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    h = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    w = _load(w_ptr + h * (P * F), p * F, f, p < P, F)
    sin, cos = _split(_load(table_ptr, (offset + offs_t) * F, f, mask_t, F), BLOCK_T, BLOCK_F)
    first = (tile // tiles).to(tl.int64) * per
    for i in range(0, tl.minimum(per, B - first)):
        b = first + i
        a = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            if BLOCK_P < P:
                w = _load(w_ptr + h * (P * F), p * F, f, p < P, F)
            x = _load(x_ptr + b * stride_b + h * stride_h, offs_t * stride_t, p, mask_t, P)
            a = tl.dot(x, w, a, input_precision=PRECISION)
        a_sin, a_cos = _split(a, BLOCK_T, BLOCK_F)
        y = _join(a_sin * cos + a_cos * sin, a_cos * cos - a_sin * sin, BLOCK_T, BLOCK_F)
        y_ptrs = y_ptr + (((b * T + offs_t) * H + h) * F)[:, None] + f[None, :]
        tl.store(y_ptrs, y, mask=mask_t[:, None] & (f < F)[None, :])


@triton.jit
def _rotated_back(
    g_ptr, table_ptr, b, offs_t, mask_t, h, f, T, offset,
    H: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """da, in the dtype of g [B, T, H, F], the gradient of q_pos."""
    sin, cos = _split(_load(table_ptr, (offset + offs_t) * F, f, mask_t, F).to(tl.float32), BLOCK_T, BLOCK_F)
    g = _load(g_ptr, ((b * T + offs_t) * H + h) * F, f, mask_t, F)
    g_sin, g_cos = _split(g.to(tl.float32), BLOCK_T, BLOCK_F)
    da = _join(g_sin * cos - g_cos * sin, g_sin * sin + g_cos * cos, BLOCK_T, BLOCK_F).to(g.dtype)
    # for sm_100 Triton 3.6 cannot take a factor that was reshaped last
    return tl.where(mask_t[:, None], da, 0.0) if g.dtype == tl.float32 else da


@triton.jit
def _xl_dx_kernel(
    g_ptr, w_ptr, table_ptr, dx_ptr, T, H: tl.constexpr, offset,
    stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx += da W^T."""
    tiles = tl.cdiv(T, BLOCK_T)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    offs_t = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_t = offs_t < T
    p = tl.arange(0, BLOCK_P)
    dx_ptrs = dx_ptr + b * stride_b + (offs_t * stride_t)[:, None] + h * stride_h + p[None, :]
    mask = mask_t[:, None] & (p < P)[None, :]
    acc = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        da = _rotated_back(g_ptr, table_ptr, b, offs_t, mask_t, h, f, T, offset, H, F, BLOCK_T, BLOCK_F)
        w = _load(w_ptr + h * (P * F), p * F, f, p < P, F)
        acc = tl.dot(da, tl.trans(w), acc, input_precision=PRECISION)
    tl.store(dx_ptrs, acc, mask=mask)


@triton.jit
def _xl_dw_kernel(
    g_ptr, x_ptr, table_ptr, dw_ptr, B, T, H: tl.constexpr, offset, per,
    stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr,
    P: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dw [splits, H, P, F] float32: x^T da of `per` tiles of BLOCK_T rows, those of the same positions one after another."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    h = tl.program_id(2).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    first = tl.program_id(1).to(tl.int64) * per
    for i in range(0, tl.minimum(per, B * tl.cdiv(T, BLOCK_T) - first)):
        b = (first + i) % B
        offs_t = (first + i) // B * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        x = _load(x_ptr + b * stride_b + h * stride_h, offs_t * stride_t, p, mask_t, P)
        da = _rotated_back(g_ptr, table_ptr, b, offs_t, mask_t, h, f, T, offset, H, F, BLOCK_T, BLOCK_F)
        acc = tl.dot(tl.trans(x), da, acc, input_precision=PRECISION)
    dw_ptrs = dw_ptr + ((tl.program_id(1) * H + h) * P + p)[:, None] * F + f[None, :]
    tl.store(dw_ptrs, acc, mask=(p < P)[:, None] & (f < F)[None, :])


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
def _on_host(D: int, span: int, shift: int, exact: bool, dtype: torch.dtype, pinned: bool) -> list[Tensor]:
    """The frequencies in quarter turns and M, float64, whose products autocast leaves alone; then M in three parts of 16 bits.
    Here and from here on the channels are sines and cosines in turns: a rotation needs neighbours."""
    frequencies, basis = _basis(D, span, shift, exact)
    M = torch.from_numpy(basis).view(D, 2, -1).mT.reshape(D, -1)
    tensors, rest = [torch.from_numpy(frequencies * (2 / math.pi)), M], M
    if dtype != torch.float32:
        parts = M.new_empty(3, *M.shape, dtype=dtype)
        for part in parts:
            part.copy_(rest)
            rest = rest - part
        tensors.append(parts)
    return [t.pin_memory() for t in tensors] if pinned else tensors


def _basis_on(device: torch.device, *basis) -> list[Tensor]:
    """`_on_host`, copied to the device once, and then without waiting; what a CUDA graph copies stays its own."""
    key, cuda = (device, *basis), device.type == "cuda"
    found = _on_device.get(key)
    if found is None:
        found = [t.to(device, non_blocking=True) for t in _on_host(*basis, cuda)]
        if not (cuda and torch.cuda.is_current_stream_capturing()):
            _on_device[key] = [constant(t) for t in found]
    return found


def _constants(
    x: Tensor, k_pos: Tensor | None, D: int, S: int, window: int, causal: bool, precision: str
) -> tuple[Tensor, list[Tensor]]:
    """A table of positions [S + shift, F], of which k_pos is written as well, and M. In float16, for bfloat16, it is exact to
    2**-12."""
    span = _span(S, window, causal)
    shift = span // 2 if causal else 0
    frequencies, *M = _basis_on(x.device, D, span, shift, _exact(x, precision), x.dtype)
    F = M[0].shape[1]
    table = x.new_empty(S + shift, F, dtype=torch.float16 if x.dtype == torch.bfloat16 else torch.float32)
    block_t, block_f = (256, 512) if INTERPRET else (16, 64)
    launch(
        _xl_table_kernel, (cdiv(S + shift, block_t), cdiv(F, block_f)),
        table, k_pos, frequencies, shift, S + shift, HALF=F // 2, BLOCK_T=block_t, BLOCK_F=block_f, num_warps=4,
    )  # fmt: skip
    return table, M


def _tiles(x: Tensor, columns: int) -> dict[str, int]:
    if INTERPRET:
        return dict(BLOCK_T=256, BLOCK_F=512, BLOCK_P=columns, num_warps=1)
    if x.dtype == torch.float32:
        return dict(BLOCK_T=16, BLOCK_F=16, BLOCK_P=columns, num_warps=4)
    warps, stages = (4, 3) if columns <= 128 else (8, 2)
    return dict(BLOCK_T=64, BLOCK_F=64, BLOCK_P=columns, num_warps=warps, num_stages=stages)


def _query_tiles(x: Tensor, P: int, F: int) -> dict[str, int]:
    columns = next_power_of_2(P)
    tiles = _tiles(x, columns if INTERPRET else min(columns, 32 if x.dtype == torch.float32 else 128))
    wide = x.dtype == torch.bfloat16 and F % 128 == 0 and not INTERPRET  # in float16 the table is twice as wide
    return tiles | dict(BLOCK_F=128, num_warps=8) if wide else tiles


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
    q_pos, k_pos, narrow = _xl_query_fake(x, weight, S, window, causal, precision)
    D, F = weight.shape[1], q_pos.shape[-1]
    table, M = _constants(x, k_pos, D, S, window, causal, precision)
    if weight.dtype == torch.float32:
        narrow = (weight.double() @ M[0]).to(weight.dtype).view(H, P, F)
    else:
        block = 512 if INTERPRET else 128
        tiles = dict(BLOCK_R=block // 2, BLOCK_F=block // 8, BLOCK_D=block, num_warps=4, num_stages=3)
        grid = cdiv(H * P, tiles["BLOCK_R"]), cdiv(F, tiles["BLOCK_F"])
        launch(_xl_weight_kernel, grid, weight.contiguous(), M[1], narrow, H * P, D, F, **tiles)
    x, tiles = rows(x), _query_tiles(x, P, F)
    across, along = cdiv(F, tiles["BLOCK_F"]), cdiv(T, tiles["BLOCK_T"])
    per = max(1, cdiv(B * across * along * H, PROGRAMS))
    launch(
        _xl_query_kernel, (across * along * cdiv(B, per), H),
        x, narrow, table, q_pos, B, T, H, S - T, per, *x.stride()[:3], P=P, F=F, PRECISION=precision, **tiles,
    )  # fmt: skip
    return q_pos, k_pos, narrow


def _xl_query_backward_fake(dq_pos, dx, x, narrow, D, S, window, causal, precision):
    return narrow.new_empty(narrow.shape[0] * narrow.shape[1], D)


@opaque(_xl_query_backward_fake, mutates=("dx",))
def xl_query_backward_(
    dq_pos: Tensor, dx: Tensor, x: Tensor, narrow: Tensor, D: int, S: int, window: int, causal: bool, precision: str
) -> Tensor:
    """Adds x's gradient to dx, whose rows are contiguous, and returns the weight's; narrow is W M."""
    B, T, H, P = x.shape
    table, M = _constants(x, None, D, S, window, causal, precision)
    x, dq_pos, F = rows(x), dq_pos.contiguous(), M[0].shape[1]
    shared = dict(P=P, F=F, PRECISION=precision, **_tiles(x, next_power_of_2(P)))
    number = B * cdiv(T, shared["BLOCK_T"])
    spilling = x.dtype != torch.float32 and not INTERPRET and capability(x) in (8, 12)  # a few registers of four warps
    tiles = shared | {"num_warps": 8} if spilling else shared
    launch(_xl_dx_kernel, (number, H), dq_pos, narrow, table, dx, T, H, S - T, *dx.stride()[:3], **tiles)
    per = max(1, cdiv(number, SPLITS))
    parts = x.new_empty(cdiv(number, per), H, P, F, dtype=torch.float32)
    launch(
        _xl_dw_kernel, (cdiv(F, shared["BLOCK_F"]), len(parts), H),
        dq_pos, x, table, parts, B, T, H, S - T, per, *x.stride()[:3], **shared,
    )  # fmt: skip
    return (parts.sum(0).view(H * P, -1).double() @ M[0].t()).to(narrow.dtype)
