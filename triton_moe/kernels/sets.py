"""Sparse projections of 16-bit inputs with few experts a head: rows grouped by the set of experts they chose.

    gather   b[n,h,j] = x[n] W[h,e_j]              v[n,h] = sum_j g[n,h,j] b[n,h,j]         x [N, D]     W [H*E, D, P]
    spread   y[n] = sum_h sum_j g[n,h,j] a[n,h] W[h,e_j]                                    a [N, H, P]  W [H*E, P, D]

`gather` is the value projection and, with W transposed, the output projection's d a; `spread` is the output projection and, with
W transposed, the value projection's d x. projection.py chooses between these kernels and its own, which work for everything.

NOTE [Expert sets]
    TOP_K of E experts make S = C(E, TOP_K) sets: 6 for 2 of 4. Where all rows of a tile chose the same set, `gather` reads each
    row of x once for all TOP_K products, keeps them in registers and sums them there: nothing as large as [N, H*TOP_K, D] exists.

NOTE [Signatures]
    `spread` sums over heads and experts in one accumulator, so y is written once. No order of the tokens makes the sets of all
    heads agree in a tile, so tokens are sorted by their sets, the first head's first, and each tile visits the experts (h, e)
    that any of its tokens chose: two thirds of all for 4 heads and 2 of 4 experts. Operands are gated beforehand, [N, H*TOP_K,
    P], because a product in front of `tl.dot` keeps Hopper's matrix units waiting; a token that did not choose the expert
    contributes a row of zeros that is not loaded.

On an H200, bfloat16, N = 32768, D = 1024, H 4, E 4, TOP_K 2, P 128, cuBLAS of the same FLOPs taking 101 us: gather 171 us with b
written, 182 us with the dots; spread 211 us, 248 with the gates applied in registers, 311 in one pass a head over exact sets. The
kernels of projection.py took 244 us for the value and 517 us for the output projection.
"""

import math

import torch
import triton
import triton.language as tl

from .. import tuning
from .common import INTERPRET, cdiv, find_tile, launch, next_power_of_2, rows

CONFIGS = {
    "gather": {
        "half": {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        "half_small": {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        "interpret": {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 1, "num_stages": 1},
    },
    "spread": {
        "half": {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        "half_small": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        "interpret": {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 256, "num_warps": 1, "num_stages": 1},
    },
}
MAX_TOP_K = 4


def sets_pay(N: int, H: int, E: int, TOP_K: int, dtype: torch.dtype) -> bool:
    """Whether sets are few and full enough for these kernels to pay, so that a plan should sort by them."""
    few_experts = TOP_K <= MAX_TOP_K and 3 * TOP_K >= E and H * E <= 64
    S = math.comb(E, TOP_K)
    return dtype != torch.float32 and few_experts and H * S <= 512 and 128 * S <= N


def fits(N: int, H: int, E: int, TOP_K: int, P: int, dtype: torch.dtype) -> bool:
    """Whether these kernels serve a projection: few sets, and tiles that fit."""
    return TOP_K * next_power_of_2(P) <= 512 and sets_pay(N, H, E, TOP_K, dtype)


@triton.jit
def _lists_kernel(
    experts_ptr, order_ptr, list_ptr, count_ptr, slot_ptr, N, ROWS,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BLOCK_HE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For each tile of `spread`: the experts it visits and how many; slot[he, m] = which choice of row m that is, or -1."""
    tile = tl.program_id(0)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    n = tl.load(order_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    offs_he = tl.arange(0, BLOCK_HE)
    slot = tl.full((BLOCK_M, BLOCK_HE), -1, tl.int32)
    for s in range(H * TOP_K):
        e = tl.load(experts_ptr + n * (H * TOP_K) + s, mask=mask_m, other=-1)
        chosen = mask_m[:, None] & ((s // TOP_K * E + e)[:, None] == offs_he[None, :])
        slot = tl.where(chosen, s, slot)
    tl.store(
        slot_ptr + offs_he[None, :] * ROWS + offs_m[:, None], slot, mask=(offs_he < H * E)[None, :] & (offs_m < ROWS)[:, None]
    )
    used = (tl.max(slot, axis=0) >= 0).to(tl.int32)
    place = tl.cumsum(used, 0) - used
    tl.store(list_ptr + tile * (H * E) + place, offs_he, mask=used > 0)
    tl.store(count_ptr + tile, tl.sum(used, 0))


@triton.jit
def _gather_out(
    acc, e, row, mask_m, s_ptr, experts_ptr, b_ptr, a_ptr, dot_ptr,
    TOP_K: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What becomes of acc = x W[e]: stored as b, or dotted with a; returned times its gate."""
    s = tl.zeros((BLOCK_M,), tl.float32)
    route = row * TOP_K
    for j in tl.static_range(TOP_K):  # rows of one set list it in different orders
        here = tl.load(experts_ptr + row * TOP_K + j, mask=mask_m, other=-1) == e
        s = tl.where(here, tl.load(s_ptr + row * TOP_K + j, mask=mask_m, other=0.0), s)
        route = tl.where(here, row * TOP_K + j, route)
    offs_p = tl.arange(0, BLOCK_P)
    mask = mask_m[:, None] & (offs_p < P)[None, :]
    if DOT:
        a = tl.load(a_ptr + row[:, None] * P + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dot_ptr + route, tl.sum(a * acc, axis=1), mask=mask_m)
    else:
        tl.store(b_ptr + route[:, None] * P + offs_p[None, :], acc.to(b_ptr.dtype.element_ty), mask=mask)
    return acc * s[:, None]


@triton.jit
def _gather_kernel(
    x_ptr, w_ptr, s_ptr, experts_ptr, v_ptr, b_ptr, a_ptr, dot_ptr, order_ptr, ranges_ptr, GROUPS,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, stride_xn: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr, DOT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _, first, end = find_tile(ranges_ptr, tl.program_id(0), GROUPS, BLOCK_M, BLOCK_G)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    row = tl.load(order_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)  # n*H + h
    row0 = tl.load(order_ptr + first).to(tl.int64)  # its set is the tile's
    h = row0 % H
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    x_ptrs = x_ptr + (row // H)[:, None] * stride_xn
    w_ptrs = w_ptr + h * E * stride_wg + offs_p[None, :] * stride_wn
    experts = tl.load(experts_ptr + row0 * TOP_K + tl.arange(0, 4), mask=tl.arange(0, 4) < TOP_K, other=E)
    e0 = tl.min(experts, 0).to(tl.int64)  # in ascending order: the sum's, whichever row is the tile's first
    acc0 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if TOP_K > 1:
        e1 = tl.min(tl.where(experts > e0, experts, E), 0).to(tl.int64)
        acc1 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if TOP_K > 2:
        e2 = tl.min(tl.where(experts > e1, experts, E), 0).to(tl.int64)
        acc2 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if TOP_K > 3:
        e3 = tl.min(tl.where(experts > e2, experts, E), 0).to(tl.int64)
        acc3 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for k in range(0, D, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < D
        x = tl.load(x_ptrs + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        tile = w_ptrs + offs_k[:, None] * stride_wk
        mask = mask_k[:, None] & mask_p[None, :]
        acc0 = tl.dot(x, tl.load(tile + e0 * stride_wg, mask=mask, other=0.0), acc0)
        if TOP_K > 1:
            acc1 = tl.dot(x, tl.load(tile + e1 * stride_wg, mask=mask, other=0.0), acc1)
        if TOP_K > 2:
            acc2 = tl.dot(x, tl.load(tile + e2 * stride_wg, mask=mask, other=0.0), acc2)
        if TOP_K > 3:
            acc3 = tl.dot(x, tl.load(tile + e3 * stride_wg, mask=mask, other=0.0), acc3)

    v = _gather_out(acc0, e0, row, mask_m, s_ptr, experts_ptr, b_ptr, a_ptr, dot_ptr, TOP_K, P, DOT, BLOCK_M, BLOCK_P)
    if TOP_K > 1:
        v += _gather_out(acc1, e1, row, mask_m, s_ptr, experts_ptr, b_ptr, a_ptr, dot_ptr, TOP_K, P, DOT, BLOCK_M, BLOCK_P)
    if TOP_K > 2:
        v += _gather_out(acc2, e2, row, mask_m, s_ptr, experts_ptr, b_ptr, a_ptr, dot_ptr, TOP_K, P, DOT, BLOCK_M, BLOCK_P)
    if TOP_K > 3:
        v += _gather_out(acc3, e3, row, mask_m, s_ptr, experts_ptr, b_ptr, a_ptr, dot_ptr, TOP_K, P, DOT, BLOCK_M, BLOCK_P)
    v_ptrs = v_ptr + row[:, None] * P + offs_p[None, :]
    tl.store(v_ptrs, v.to(v_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_p[None, :])


@triton.jit
def _spread_kernel(
    a_ptr, w_ptr, y_ptr, order_ptr, list_ptr, count_ptr, slot_ptr, N, ROWS,
    HE: tl.constexpr, SLOTS: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    steps: tl.constexpr = (P + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    tile = pid // tiles_n
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    n = tl.load(order_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < D
    a_ptrs = a_ptr + n[:, None] * (SLOTS * P)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.load(count_ptr + tile) * steps):
        he = tl.load(list_ptr + tile * HE + i // steps).to(tl.int64)
        slot = tl.load(slot_ptr + he * ROWS + offs_m)
        offs_k = i % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < P
        a = tl.load(a_ptrs + slot[:, None] * P + offs_k[None, :], mask=(slot >= 0)[:, None] & mask_k[None, :], other=0.0)
        w_ptrs = w_ptr + he * stride_wg + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(a, w, acc)
    y_ptrs = y_ptr + n[:, None] * D + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _config(name: str, x: torch.Tensor) -> dict[str, int]:
    """Hopper and later hold the large tiles; an A100 spills them, and AMD's CDNA has 64 KB of shared memory."""
    if INTERPRET:
        return dict(CONFIGS[name]["interpret"])
    if x.is_meta:
        target = triton.runtime.driver.active.get_current_target()
        large = target.backend == "cuda" and target.arch >= 90
    else:
        large = not torch.version.hip and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return dict(tuning.lookup(CONFIGS[name], x.dtype, INTERPRET) if large else CONFIGS[name]["half_small"])


def gather(x, w, s, experts, order, offsets, a=None):
    """x [N, D], w [H*E, D, P], s and experts [N, H, TOP_K], a plan's set_order and set_offsets -> v [N, H, P] and
    b [N*H*TOP_K, P]; with a [N, H, P] instead of b the dots b . a, float32 [N*H*TOP_K]."""
    x = rows(x)
    (N, D), (H, TOP_K), P = x.shape, experts.shape[1:], w.shape[2]
    E = w.shape[0] // H
    groups = offsets.shape[0] - 1
    v = x.new_empty(N, H, P)
    out = x.new_empty(N * H * TOP_K, P) if a is None else x.new_empty(N * H * TOP_K, dtype=torch.float32)
    config = _config("gather", x)
    BLOCK_P = next_power_of_2(P)
    if TOP_K * BLOCK_P > 256:
        config["BLOCK_M"], config["num_stages"] = min(config["BLOCK_M"], 64), min(config["num_stages"], 3)
    launch(
        _gather_kernel, (cdiv(N * H, config["BLOCK_M"]) + groups,),
        x, w, s, experts, v, out, v if a is None else a.contiguous(), out, order, offsets, groups,
        H=H, E=E, TOP_K=TOP_K, D=D, P=P, stride_xn=x.stride(0),
        stride_wg=w.stride(0), stride_wk=w.stride(1), stride_wn=w.stride(2), DOT=a is not None,
        BLOCK_G=next_power_of_2(groups, 1), BLOCK_P=BLOCK_P, **config,
    )  # fmt: skip
    return v, out


def spread(gated, w, experts, order):
    """gated [N*H*TOP_K, P], w [H*E, P, D], experts [N, H, TOP_K], a plan's token_order -> y [N, D]."""
    (N, H, TOP_K), P, D = experts.shape, gated.shape[1], w.shape[2]
    E = w.shape[0] // H
    config = _config("spread", gated)
    config["BLOCK_N"] = min(config["BLOCK_N"], next_power_of_2(D))
    config["BLOCK_K"] = min(config["BLOCK_K"], next_power_of_2(P))
    BLOCK_M = config["BLOCK_M"]
    tiles = cdiv(N, BLOCK_M)
    lists, counts, slots = experts.new_empty(tiles, H * E), experts.new_empty(tiles), experts.new_empty(H * E, tiles * BLOCK_M)
    meta = {"H": H, "E": E, "TOP_K": TOP_K, "BLOCK_HE": next_power_of_2(H * E), "BLOCK_M": BLOCK_M}
    launch(_lists_kernel, (tiles,), experts, order, lists, counts, slots, N, tiles * BLOCK_M, **meta, num_warps=4)
    y = gated.new_empty(N, D)
    launch(
        _spread_kernel, (tiles * cdiv(D, config["BLOCK_N"]),),
        gated, w, y, order, lists, counts, slots, N, tiles * BLOCK_M,
        HE=H * E, SLOTS=H * TOP_K, P=P, D=D, stride_wg=w.stride(0), stride_wk=w.stride(1), stride_wn=w.stride(2), **config,
    )  # fmt: skip
    return y
