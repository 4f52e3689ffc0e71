"""Expert-sparse projections: the value and output projection of SwitchHead.

    value    v[n,h] = sum_j g[n,h,j] x[n] W[h,e_j]                x [N, D]     W [H*E, D, P]   v [N, H, P]
    output   y[n]   = sum_h sum_j g[n,h,j] a[n,h] W[h,e_j]        a [N, H, P]  W [H*E, P, D]   y [N, D]

A route r = (n*H + h)*TOP_K + j is one (token, head, choice). Everything is built of the same few steps over routes:

    grouped_gemm    c[r] = a[r // DIV] W[expert of r]             routes taken in the order of their experts, rows gathered
    combine         y[m] = sum_j s[m*J + j] c[m*J + j]            the gates and the sum over choices (and heads)
    route_dot       d g[r] = b[r] . a[r // TOP_K]
    gate_rows       c[m*J + j] = s[m*J + j] a[m]
    grouped_dw      d W[e] = sum_{r of e} a[r // DIV_A]^T b[r // DIV_B]

The backward pass of the value projection is the output projection with W transposed, and the other way round:

    d x = output(g, d v, W^T)     d a = value(g, d y, W^T)     d g[r] = (x W)[r] . d v = (d y W^T)[r] . a

SwitchHead (arXiv 2312.07987), equations 7 to 10.

Sums longer than PARTS tiles are taken in parts, as in gating/gate.py, NOTE [Partial sums]; 16-bit results do not need it.

NOTE [Constant widths]
    Widths and strides are constexpr: constants of a model, and the compiler can only join loads into vectors when it sees how
    rows are aligned. A run-time stride of 412 or 76 would be loaded element by element (a stride is specialised only if it is
    a multiple of 16). The number of tokens never is a constant.

NOTE [Tiles of routes]
    `routing_plan` (gating/plan.py) gives the routes sorted by expert and each expert's range. A tile never straddles two
    experts. The number of tiles is only known on the device, so the grid has its upper bound, cdiv(R, BLOCK_M) + groups, and each
    program finds its tile from the ranges (`find_tile`); programs past the last tile stop.
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from . import sets
from .common import INTERPRET, cdiv, default_config, find_tile, launch, next_power_of_2, opaque, rows, uniform

CONFIGS = {
    "grouped_gemm": {
        "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 1, "num_warps": 8, "num_stages": 3},
        "float32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "PARTS": 4, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
    "grouped_dw": {
        "half": {"BLOCK_I": 128, "BLOCK_J": 128, "BLOCK_R": 64, "PARTS": 1, "num_warps": 4, "num_stages": 3},
        "float32": {"BLOCK_I": 32, "BLOCK_J": 64, "BLOCK_R": 16, "PARTS": 4, "num_warps": 4, "num_stages": 1},
        "interpret": {"BLOCK_I": 256, "BLOCK_J": 256, "BLOCK_R": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
}
SPACE = {  # what may be tuned; see tuning.py
    "grouped_gemm": {
        "BLOCK_M": [64, 128], "BLOCK_N": [64, 128, 256], "BLOCK_K": [32, 64], "num_warps": [4, 8], "num_stages": [2, 3],
    },
    "grouped_dw": {
        "BLOCK_I": [64, 128], "BLOCK_J": [64, 128], "BLOCK_R": [32, 64, 128], "num_warps": [4, 8], "num_stages": [2, 3],
    },
}  # fmt: skip

PROGRAMS = 264  # that run at a time: two on each multiprocessor of an H200
LEAST_CHUNK = 512  # routes; see NOTE [Chunks]


# ---- jit helpers


@triton.jit
def product(
    a_ptrs, w_ptrs, offs_n, N: tl.constexpr, KA: tl.constexpr, K: tl.constexpr, stride_wk: tl.constexpr, PAIR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile of rows times a tile of w [K, N], and with PAIR the same for the columns PAIR elements further on.

    Every row can be read; its columns from K to KA are zeros. Masks that are always true are left out: they cost time.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, KA, PARTS * BLOCK_K):
        part = acc if PARTS == 1 else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        part2 = acc2 if PARTS == 1 else tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(PARTS):
            offs_k = (k + i * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
            tile = w_ptrs + offs_k[:, None] * stride_wk
            if KA % (PARTS * BLOCK_K) == 0:
                a = tl.load(a_ptrs + offs_k[None, :])
            else:
                a = tl.load(a_ptrs + offs_k[None, :], mask=(offs_k < KA)[None, :], other=0.0)
            if K % (PARTS * BLOCK_K) == 0 and N % BLOCK_N == 0:
                part = tl.dot(a, tl.load(tile), part, input_precision=PRECISION)
                if PAIR > 0:
                    part2 = tl.dot(a, tl.load(tile + PAIR), part2, input_precision=PRECISION)
            else:
                mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
                part = tl.dot(a, tl.load(tile, mask=mask, other=0.0), part, input_precision=PRECISION)
                if PAIR > 0:
                    part2 = tl.dot(a, tl.load(tile + PAIR, mask=mask, other=0.0), part2, input_precision=PRECISION)
        acc = part if PARTS == 1 else acc + part
        acc2 = part2 if PARTS == 1 else acc2 + part2
    return acc, acc2


@triton.jit
def _chunks(offsets_ptr, GROUPS, CHUNK, BLOCK_G: tl.constexpr):
    """For each group: its first row, its rows, the chunks they make (see NOTE [Chunks]) and how many of those are kept apart."""
    offs_g = tl.arange(0, BLOCK_G)
    start = tl.load(offsets_ptr + offs_g, mask=offs_g < GROUPS, other=0)
    count = tl.load(offsets_ptr + offs_g + 1, mask=offs_g < GROUPS, other=0) - start
    chunks = tl.where(offs_g < GROUPS, tl.maximum((count + CHUNK - 1) // CHUNK, 1), 0)
    return start, count, chunks, tl.where(chunks > 1, chunks, 0)


# ---- kernels


@triton.jit
def _grouped_gemm_kernel(
    a_ptr, w_ptr, c_ptr, order_ptr, offsets_ptr, GROUPS,
    N: tl.constexpr, K: tl.constexpr, DIV: tl.constexpr, stride_am: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group, first, end = find_tile(offsets_ptr, pid // tiles_n, GROUPS, BLOCK_M, BLOCK_G)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    route = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N

    a_ptrs = a_ptr + (route // DIV).to(tl.int64)[:, None] * stride_am
    w_ptrs = w_ptr + group.to(tl.int64) * stride_wg + offs_n.to(tl.int64)[None, :] * stride_wn
    acc, _ = product(a_ptrs, w_ptrs, offs_n, N, K, K, stride_wk, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS)
    c_ptrs = c_ptr + route.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _combine_kernel(
    c_ptr, s_ptr, bias_ptr, a_ptr, b_ptr, base_ptr, added_ptr, y_ptr, M, N: tl.constexpr, WIDTH: tl.constexpr, J: tl.constexpr,
    K: tl.constexpr, stride_cm: tl.constexpr, stride_bk: tl.constexpr, stride_base: tl.constexpr, stride_added: tl.constexpr,
    stride_ym: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    mask_c = mask & (offs_n < WIDTH)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if K > 0:  # apart: with acc as its sum, every c would be brought into the layout of tensor cores
        offs_k = tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :], mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        ab = tl.dot(a, b)
    for j in tl.range(0, J, loop_unroll_factor=UNROLL):
        rows = offs_m * J + j
        c = tl.load(c_ptr + rows[:, None] * stride_cm + offs_n[None, :], mask=mask_c, other=0.0).to(tl.float32)
        if HAS_SCALE:
            c *= tl.load(s_ptr + rows, mask=mask_m, other=0.0)[:, None]
        acc += c
    if K > 0:
        acc += ab
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if base_ptr is not None:
        base = tl.load(base_ptr + offs_m[:, None] * stride_base + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        added = tl.load(added_ptr + offs_m[:, None] * stride_added + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += base + added
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _route_dot_kernel(
    b_ptr, a_ptr, dot_ptr, R, N: tl.constexpr, DIV: tl.constexpr, stride_am: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < R
    acc = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask = mask_r[:, None] & (offs_n < N)[None, :]
        b = tl.load(b_ptr + offs_r[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + (offs_r // DIV)[:, None] * stride_am + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += tl.sum(tl.fma(a, b, 0.0), axis=1)  # see NOTE [Sums of products] in common.py
    tl.store(dot_ptr + offs_r, acc, mask=mask_r)


@triton.jit
def _grouped_dw_kernel(
    a_ptr, b_ptr, dw_ptr, parts_ptr, order_ptr, order_b_ptr, offsets_ptr, GROUPS, CHUNK,
    I: tl.constexpr, J: tl.constexpr, WIDTH_A: tl.constexpr, WIDTH_B: tl.constexpr, DIV_A: tl.constexpr, DIV_B: tl.constexpr,
    stride_am: tl.constexpr, stride_bm: tl.constexpr, stride_i: tl.constexpr, stride_j: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dw of a group with one chunk, the float32 part of one chunk of another. With BLOCK_Q, the columns of the only tile are
    BLOCK_J and that many more."""
    tiles_i: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    tiles_j: tl.constexpr = 1 if BLOCK_Q > 0 else (J + BLOCK_J - 1) // BLOCK_J
    pid = tl.program_id(0)
    place = pid // (tiles_i * tiles_j)
    offs_g = tl.arange(0, BLOCK_G)
    start, count, chunks, apart = _chunks(offsets_ptr, GROUPS, CHUNK, BLOCK_G)
    length = tl.cdiv(tl.cdiv(count, tl.maximum(chunks, 1)), BLOCK_R) * BLOCK_R
    if BLOCK_G <= 64:  # the longest first: the last to run are then short
        earlier = (length[:, None] > length[None, :]) | (
            (length[:, None] == length[None, :]) & (offs_g[:, None] < offs_g[None, :])
        )
        before = tl.sum(tl.where(earlier, chunks[:, None], 0), 0)
    else:
        before = tl.cumsum(chunks, 0) - chunks
    here = (before <= place) & (place < before + chunks)
    group = tl.max(tl.where(here, offs_g, -1), 0)
    if group < 0:
        return
    own = tl.sum(tl.where(here, chunks, 0), 0)
    chunk = place - tl.sum(tl.where(here, before, 0), 0)
    part = tl.sum(tl.where(offs_g < group, apart, 0), 0) + chunk
    first = tl.sum(tl.where(here, start, 0), 0)
    end = first + tl.sum(tl.where(here, count, 0), 0)
    first += chunk * tl.sum(tl.where(here, length, 0), 0)
    end = tl.minimum(first + tl.sum(tl.where(here, length, 0), 0), end)

    offs_i = pid // tiles_j % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = pid % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_r = tl.arange(0, BLOCK_R)
    a_ptrs, b_ptrs = a_ptr + offs_i[:, None], b_ptr + offs_j[None, :]
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    if BLOCK_Q > 0:
        offs_q = BLOCK_J + tl.arange(0, BLOCK_Q)
        rest = tl.zeros((BLOCK_I, BLOCK_Q), tl.float32)
    route = tl.load(order_ptr + first + offs_r, mask=first + offs_r < end, other=0)
    if order_b_ptr is not None:
        next_b = tl.load(order_b_ptr + first + offs_r, mask=first + offs_r < end, other=0)
    for row in range(first, end, PARTS * BLOCK_R):
        sub = acc if PARTS == 1 else tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        if BLOCK_Q > 0:
            sub_q = rest if PARTS == 1 else tl.zeros((BLOCK_I, BLOCK_Q), tl.float32)
        for i in tl.static_range(PARTS):
            offs = row + i * BLOCK_R + offs_r
            mask_r = offs < end
            row_a = offs if DIV_A == 0 else route // DIV_A
            if order_b_ptr is None:
                row_b = offs if DIV_B == 0 else route // DIV_B
            else:
                row_b = next_b
                next_b = tl.load(order_b_ptr + offs + BLOCK_R, mask=offs + BLOCK_R < end, other=0)
            # One step ahead: a load that waits for another load is not copied ahead of the product that needs it.
            route = tl.load(order_ptr + offs + BLOCK_R, mask=offs + BLOCK_R < end, other=0)
            mask_a = mask_r[None, :] if WIDTH_A % BLOCK_I == 0 else mask_r[None, :] & (offs_i < WIDTH_A)[:, None]
            mask_b = mask_r[:, None] if WIDTH_B % BLOCK_J == 0 else mask_r[:, None] & (offs_j < WIDTH_B)[None, :]
            a = tl.load(a_ptrs + row_a.to(tl.int64)[None, :] * stride_am, mask=mask_a, other=0.0)
            b = tl.load(b_ptrs + row_b.to(tl.int64)[:, None] * stride_bm, mask=mask_b, other=0.0)
            sub = tl.dot(a, b, sub, input_precision=PRECISION)
            if BLOCK_Q > 0:
                q_ptrs = b_ptr + row_b.to(tl.int64)[:, None] * stride_bm + offs_q[None, :]
                q = tl.load(q_ptrs, mask=mask_r[:, None] & (offs_q < WIDTH_B)[None, :], other=0.0)
                sub_q = tl.dot(a, q, sub_q, input_precision=PRECISION)
        acc = sub if PARTS == 1 else acc + sub
        if BLOCK_Q > 0:
            rest = sub_q if PARTS == 1 else rest + sub_q

    dw_ptr += group.to(tl.int64) * I * J
    parts_ptr += part.to(tl.int64) * I * J
    offs = offs_i[:, None] * stride_i + offs_j[None, :] * stride_j
    mask = (offs_i < I)[:, None] & (offs_j < J)[None, :]
    if own == 1:
        tl.store(dw_ptr + offs, acc.to(dw_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(parts_ptr + offs, acc, mask=mask)
    if BLOCK_Q > 0:
        offs = offs_i[:, None] * stride_i + offs_q[None, :] * stride_j
        mask = (offs_i < I)[:, None] & (offs_q < J)[None, :]
        if own == 1:
            tl.store(dw_ptr + offs, rest.to(dw_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(parts_ptr + offs, rest, mask=mask)


@triton.jit
def _sum_chunks_kernel(
    parts_ptr, dw_ptr, offsets_ptr, GROUPS, CHUNK, SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """dw[g] = the sum of the group's chunks, in their order, where there is more than one."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    group = pid // blocks
    apart = _chunks(offsets_ptr, GROUPS, CHUNK, BLOCK_G)[3]
    offs_g = tl.arange(0, BLOCK_G)
    own = tl.sum(tl.where(offs_g == group, apart, 0), 0)
    if own > 0:
        first = tl.sum(tl.where(offs_g < group, apart, 0), 0)
        offs = pid % blocks * BLOCK + tl.arange(0, BLOCK)
        part_ptrs = parts_ptr + first.to(tl.int64) * SIZE + offs
        acc = tl.zeros((BLOCK,), tl.float32)
        for _i in range(own):
            acc += tl.load(part_ptrs, mask=offs < SIZE, other=0.0)
            part_ptrs += SIZE
        tl.store(dw_ptr + group.to(tl.int64) * SIZE + offs, acc.to(dw_ptr.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def _gate_rows_kernel(
    a_ptr, s_ptr, out_ptr, M, TOP_K, P: tl.constexpr, stride_am: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[m, j] = s[m, j] a[m]."""
    tiles_p: tl.constexpr = (P + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    offs_m = (pid // tiles_p).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = pid % tiles_p * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_p < P)[None, :]
    a = tl.load(a_ptr + offs_m[:, None] * stride_am + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    for j in range(TOP_K):
        s = tl.load(s_ptr + offs_m * TOP_K + j, mask=mask_m, other=0.0)
        out_ptrs = out_ptr + (offs_m * TOP_K + j)[:, None] * P + offs_p[None, :]
        tl.store(out_ptrs, (a * s[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dropout_kernel(
    x_ptr, y_ptr, seed_ptr, M, N: tl.constexpr, dropout, PITCH: tl.constexpr, WIDTH: tl.constexpr,
    N_PAIRED: tl.constexpr, STREAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    channel = offs_n % PITCH
    if N_PAIRED > 0:
        channel = tl.where(channel < N_PAIRED, channel % 2 * (N_PAIRED // 2) + channel // 2, channel)
    column = offs_n // PITCH * WIDTH + channel  # as if heads were not padded
    rnd = uniform(tl.load(seed_ptr), offs_m.to(tl.int32)[:, None], column[None, :], STREAM)
    tl.store(y_ptr + offs, tl.where(rnd < dropout, 0.0, x / (1.0 - dropout)).to(y_ptr.dtype.element_ty), mask=mask)


# ---- launchers of one step


def _grouped_gemm(a, w, order, offsets, div, precision):
    """a [R // div, K], w [groups, K, N] of any strides -> c [R, N], c[r] = a[r // div] w[expert of r]."""
    groups, K, N = w.shape
    R = order.shape[0]
    c = a.new_empty(R, N)
    config = default_config(CONFIGS["grouped_gemm"], a.dtype)
    config["BLOCK_N"] = min(config["BLOCK_N"], next_power_of_2(N))
    config["BLOCK_K"] = min(config["BLOCK_K"], next_power_of_2(K))
    if INTERPRET:
        config["BLOCK_M"] = min(config["BLOCK_M"], next_power_of_2(R))
    flags = {"DIV": div, "transposed": w.stride(2) != 1, "tf32": precision == "tf32"}
    config = tuning.lookup(_grouped_gemm_kernel, config, a, (R,), N=N, K=K, groups=groups, **flags)
    grid = (cdiv(R, config["BLOCK_M"]) + groups) * cdiv(N, config["BLOCK_N"]) if R else 0
    launch(
        _grouped_gemm_kernel, (grid,),
        a, w, c, order, offsets, groups, N=N, K=K, DIV=div, stride_am=a.stride(0),
        stride_wg=w.stride(0), stride_wk=w.stride(1), stride_wn=w.stride(2),
        PRECISION=precision, BLOCK_G=next_power_of_2(groups, 1), **config,
    )  # fmt: skip
    return c


def _tile(M, N):
    """Tile of the elementwise kernels: few and large for the interpreter."""
    block_n = min(next_power_of_2(N), 512 if INTERPRET else 128)
    block_m = 512 if INTERPRET else 4096 // block_n
    return cdiv(M, block_m), cdiv(N, block_n), {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}


def _combine(c, s, J, bias=None, y=None, a=None, b=None, base=None, added=None):
    """c [M*J, N], s [M*J] float32 or None -> y [M, N], into `y` if there is one: of fewer columns, or of more, which become
    the bias or zeros. With a [M, K] and b [K, N], 16-bit and of few K, a b is added too, and so are base and added [M, N].

    Sums of 16-bit rows and nothing else take 8 warps and 8 rows at a time. On an H200, 512 columns, M = 32768: 75.5 us where
    4 warps and 4 rows took 79 for J 8, 41.7 for 43.6 with J 4; 256 columns, M = 16384, J 16: 36.8 for 43.7. Tiles of 16 x 128 or
    4 x 512 elements are as fast, but 412 columns like the former less. With an a b of K 128, 512 columns of J 8 into float32
    take 86 us, 105 where acc begins with it, and 103 to 217 in 11 other tiles; with K 32, 256 columns of J 4 all take 31 to 37.
    """
    M = c.shape[0] // J
    y = c.new_empty(M, c.shape[1]) if y is None else y
    N, K = y.shape[1], 0 if a is None else a.shape[1]
    tiles_m, tiles_n, tile = _tile(M, N)
    plain = c.element_size() == 2 and s is None and a is None and base is None
    spilling = a is not None and not INTERPRET and sets.capability(a) == 10  # with 4 rows at a time, a few registers
    tile |= {"num_warps": 8 if plain else 4, "UNROLL": 8 if plain and J % 8 == 0 else 2 if spilling else 4}
    launch(
        _combine_kernel, (tiles_m * tiles_n,),
        c, c if s is None else s, c if bias is None else bias, a, b, base, added, y, M, N, c.shape[1], J, K,
        c.stride(0), *(0 if t is None else t.stride(0) for t in (b, base, added)), y.stride(0),
        HAS_SCALE=s is not None, HAS_BIAS=bias is not None, BLOCK_K=next_power_of_2(K), **tile,
    )  # fmt: skip
    return y


def _route_dot(b, a, div):
    """b [R, N], a [R // div, N] -> [R] float32."""
    R, N = b.shape
    dot = b.new_empty(R, dtype=torch.float32)
    tiles_m, _, tile = _tile(R, N)
    launch(_route_dot_kernel, (tiles_m,), b, a, dot, R, N, div, a.stride(0), **tile)
    return dot


def _grouped_dw(a, b, order, offsets, div_a, div_b, precision, size=None, order_b=None, dtype=None, turned=False):
    """a [R // div_a, I], b [R // div_b, J] -> dw [groups, I, J], the sum of a[r // div_a]^T b[r // div_b] over a group's routes,
    in a's dtype or `dtype`.

    With div 0 a row is that of the route's place in `order`, and with order_b [R] it is the one that this names for that place.
    size = (I, J) where a or b are padded with further columns. turned: dw is [groups, J, I].

    NOTE [Chunks]
        Few groups make few programs, and skewed routing makes one of them long. So the routes of a group with more than `chunk`
        are cut into equal parts, each summed on its own in float32, and the parts are added in their order: the same bits every
        time. A group at most a quarter larger than the mean is not cut: writing and adding parts takes time too.

    On an H200 (H 4, E 4, TOP_K 2, P 128, D 1024, N 32768, bfloat16): 131 us with 4 warps, 139 with 8; 125 to 154 with 256 rows
    or columns a tile; 164 and more with the gates multiplied in here.
    """
    groups, (I, J), R = offsets.shape[0] - 1, size or (a.shape[1], b.shape[1]), order.shape[0]
    dw = a.new_empty(groups, *((J, I) if turned else (I, J)), dtype=dtype)
    config = default_config(CONFIGS["grouped_dw"], a.dtype)
    config["BLOCK_I"] = min(config["BLOCK_I"], next_power_of_2(I))
    whole, rest = (next_power_of_2(J), 0) if a.dtype == torch.float32 else sets.columns(J)
    config["BLOCK_J"] = min(config["BLOCK_J"], whole)
    if INTERPRET:
        config["BLOCK_R"] = min(config["BLOCK_R"], next_power_of_2(R))
    elif a.dtype != torch.float32 and sets.capability(a) in (8, 12):  # 64 rows would spill a few registers
        config["BLOCK_R"] = 32
    flags = {"placed": order_b is not None, "turned": turned, "tf32": precision == "tf32"}
    config = tuning.lookup(_grouped_dw_kernel, config, a, (R,), I=I, J=J, groups=groups, DIV_A=div_a, DIV_B=div_b, **flags)
    BLOCK_Q = rest if config["BLOCK_J"] == whole else 0
    tiles = cdiv(I, config["BLOCK_I"]) * cdiv(J - BLOCK_Q, config["BLOCK_J"])
    chunk = max(cdiv(5 * R, 4 * groups * max(1, PROGRAMS // (groups * tiles))), cdiv(R, 64), LEAST_CHUNK)
    chunk = cdiv(chunk, 16) * 16  # Triton compiles integers anew that are no multiples of 16
    parts = a.new_empty(2 * (R // chunk), I, J, dtype=torch.float32)
    BLOCK_G = next_power_of_2(groups, 1)
    launch(
        _grouped_dw_kernel, ((groups + R // chunk) * tiles,),
        a, b, dw, parts, order, order_b, offsets, groups, chunk,
        I=I, J=J, WIDTH_A=a.shape[1], WIDTH_B=b.shape[1], DIV_A=div_a, DIV_B=div_b, stride_am=a.stride(0), stride_bm=b.stride(0),
        stride_i=1 if turned else J, stride_j=I if turned else 1, PRECISION=precision, BLOCK_G=BLOCK_G, BLOCK_Q=BLOCK_Q, **config,
    )  # fmt: skip
    if parts.shape[0]:
        block = min(next_power_of_2(I * J), 1024)
        meta = {"SIZE": I * J, "BLOCK_G": BLOCK_G, "BLOCK": block}
        launch(_sum_chunks_kernel, (groups * cdiv(I * J, block),), parts, dw, offsets, groups, chunk, **meta, num_warps=4)
    return dw


def _projection_dw(x, gated, last, order, offsets, div, precision, size, placed, dtype, turned):
    """x [N, D], gated rows, what `sets.last` made, or None -> dw [H*E, *size], or turned. See NOTE [Last columns] in sets.py."""
    if last is None:
        return _grouped_dw(x, gated, order, offsets, div, 1, precision, size, placed, dtype, turned)
    first, HE = sets.first_columns(gated.shape[1], offsets.shape[0] - 1), offsets.shape[0] - 1
    dw = _grouped_dw(x, gated[:, :first], order, offsets, div, 1, precision, (size[0], first), placed, dtype, turned)
    more = (last.t() @ x).view(HE, -1, x.shape[1])[:, : size[1] - first].to(dw.dtype)
    return torch.cat((dw, more), 1) if turned else torch.cat((dw, more.transpose(1, 2)), 2)


def _gate_rows(a, s):
    """a [M, P], s [M * TOP_K] float32 -> s a [M * TOP_K, P], the narrow operand gated."""
    (M, P), TOP_K = a.shape, s.numel() // a.shape[0] if a.shape[0] else 1
    out = a.new_empty(M * TOP_K, P)
    tiles_m, tiles_p, tile = _tile(M, P)
    launch(_gate_rows_kernel, (tiles_m * tiles_p,), a, s, out, M, TOP_K, P=P, stride_am=a.stride(0), **tile)
    return out


# ---- value projection


def _kept_width(P: int, keep: int) -> int:
    """How many columns of u are kept: `keep`, and so many more that rows start on 16 bytes."""
    return min(P, keep + -keep % 8)


def _value_forward_fake(
    x, w, weights, experts, order, offsets, rank, set_order, set_tiles, token_order, visited, keep, precision, width=None
):
    (N, H, _), P = weights.shape, w.shape[2] if width is None else width
    return x.new_empty(N, H, P), x.new_empty(weights.numel(), _kept_width(P, keep))


@opaque(_value_forward_fake)
def value_forward(
    x: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, rank: torch.Tensor, set_order: torch.Tensor, set_tiles: torch.Tensor, token_order: torch.Tensor,
    visited: torch.Tensor, keep: int, precision: str, width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [N, D], w [H*E, D, P], weights and experts [N, H, TOP_K] and their plan -> v [N, H, P] and, for the backward pass, the
    first `keep` columns (or a few more) of each route's product u [N*H*TOP_K, P]; of w's columns only the first `width`.

    Columns of w from `keep` on, if that is not 0, are zeros."""
    (N, H, TOP_K), P = weights.shape, w.shape[2] if width is None else width
    U = _kept_width(P, keep)
    if sets.serve(set_order, x, P):
        return sets.gather(x, w, False, weights.contiguous(), experts.contiguous(), set_order, set_tiles, P, keep=U)
    u = _grouped_gemm(rows(x), w[:, :, : U or P], order, offsets, H * TOP_K, precision)
    v = _combine(u, weights.contiguous().view(-1), TOP_K, y=u.new_empty(N * H, P)).view(N, H, P)
    return v, u if keep else u.new_empty(weights.numel(), 0)


def _together(token_order, dv):
    """Whether rows are gated as `sets.spread` wants them for all heads together."""
    return sets.serve(token_order, dv, dv.shape[2])


def _value_backward_rows_fake(
    dv, u, weights, experts, order, offsets, rank, set_order, set_tiles, token_order, visited
):  # fmt: skip
    N, H, TOP_K = weights.shape
    if not _together(token_order, dv):
        return dv.new_empty(N * H * TOP_K, dv.shape[2]), experts.new_empty(0), torch.empty_like(weights)
    packed = sets.packed_shape(N, H, (offsets.shape[0] - 1) // H, TOP_K, dv.shape[2])
    return dv.new_empty(packed), experts.new_empty(N * H * TOP_K), torch.empty_like(weights)


@opaque(_value_backward_rows_fake)
def value_backward_rows(
    dv: torch.Tensor, u: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, rank: torch.Tensor, set_order: torch.Tensor, set_tiles: torch.Tensor, token_order: torch.Tensor,
    visited: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dv [N, H, P], u [N*H*TOP_K, P or less] -> dv gated, a row for each route, and the rows of the routes in the order of the
    experts unless those are the routes' own numbers, both for `value_backward`; d weights [N, H, TOP_K]."""
    N, H, P = dv.shape
    dv, weights = dv.contiguous(), weights.contiguous()
    if _together(token_order, dv):
        E = (offsets.shape[0] - 1) // H
        gated, order_b, dweights = sets.pack(dv, weights, experts.contiguous(), E, set_order, token_order, visited, rank, u)
        return gated, order_b, dweights.view(weights.shape)
    dv = dv.view(N * H, P)
    return _gate_rows(dv, weights.view(-1)), experts.new_empty(0), _route_dot(u, dv, weights.shape[2]).view(weights.shape)


def _value_backward_fake(
    dv, gated, order_b, x, w, weights, experts, order, offsets, rank, set_order, set_tiles, token_order, visited, precision,
    dw_dtype=None, width=None,
):  # fmt: skip
    return x.new_empty(x.shape), w.new_empty(*w.shape[:2], w.shape[2] if width is None else width, dtype=dw_dtype)


@opaque(_value_backward_fake)
def value_backward(
    dv: torch.Tensor, gated: torch.Tensor, order_b: torch.Tensor, x: torch.Tensor, w: torch.Tensor, weights: torch.Tensor,
    experts: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, rank: torch.Tensor, set_order: torch.Tensor,
    set_tiles: torch.Tensor, token_order: torch.Tensor, visited: torch.Tensor, precision: str,
    dw_dtype: torch.dtype | None = None, width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dv [N, H, P] and what `value_backward_rows` made of it -> dx [N, D], dw [H*E, D, P] in w's dtype or dw_dtype, of dw the
    first `width` columns. w may have more than P."""
    _, H, TOP_K = experts.shape
    size = (w.shape[1], w.shape[2] if width is None else width)
    x, placed, last = rows(x), order_b if order_b.shape[0] else None, None
    if sets.serve(set_order, x, dv.shape[2]):
        gates = dv.contiguous(), weights.contiguous(), experts.contiguous(), w.shape[0] // H
        packed, last = gated, sets.last(*gates)
        if placed is None:  # heads go one by one
            packed, _, _ = sets.pack(*gates, set_order, token_order, visited)
        dx = sets.spread(packed, last, w, True, H, TOP_K, set_order, token_order, visited)
    else:
        dx = _combine(_grouped_gemm(gated, w[:, :, : dv.shape[2]].transpose(1, 2), order, offsets, 1, precision), None, H * TOP_K)
    dw = _projection_dw(x, gated, last, order, offsets, H * TOP_K, precision, size, placed, dw_dtype, False)
    return dx, dw


# ---- output projection


def _output_forward_fake(a, w, weights, experts, order, offsets, rank, set_order, set_tiles, token_order, visited, precision):
    return a.new_empty(a.shape[0], w.shape[2])


@opaque(_output_forward_fake)
def output_forward(
    a: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, rank: torch.Tensor, set_order: torch.Tensor, set_tiles: torch.Tensor, token_order: torch.Tensor,
    visited: torch.Tensor, precision: str,
) -> torch.Tensor:  # fmt: skip
    """a [N, H, P], w [H*E, P or more, D], weights and experts [N, H, TOP_K] and their plan -> y [N, D]."""
    N, H, TOP_K = weights.shape
    a, weights = a.contiguous(), weights.contiguous()
    if sets.serve(set_order, a, a.shape[2]):
        gates = a, weights, experts.contiguous(), w.shape[0] // H
        packed, _, _ = sets.pack(*gates, set_order, token_order, visited)
        return sets.spread(packed, sets.last(*gates), w, False, H, TOP_K, set_order, token_order, visited)
    gated = _gate_rows(a.view(N * H, a.shape[2]), weights.view(-1))
    return _combine(_grouped_gemm(gated, w[:, : a.shape[2]], order, offsets, 1, precision), None, H * TOP_K)


def _output_backward_fake(
    dy,
    a,
    w,
    weights,
    experts,
    order,
    offsets,
    rank,
    set_order,
    set_tiles,
    token_order,
    visited,
    precision,
    dw_dtype=None,
    width=None,
):
    width = w.shape[1] if width is None else width
    dw = w.new_empty(w.shape[0], width, w.shape[2], dtype=dw_dtype)
    return a.new_empty(a.shape), dw, weights.new_empty(weights.shape)


@opaque(_output_backward_fake)
def output_backward(
    dy: torch.Tensor, a: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, rank: torch.Tensor, set_order: torch.Tensor, set_tiles: torch.Tensor, token_order: torch.Tensor,
    visited: torch.Tensor, precision: str,
    dw_dtype: torch.dtype | None = None, width: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> da [N, H, P], dw [H*E, P, D] in w's dtype or dw_dtype, of its rows the first `width`, d weights [N, H, TOP_K]. w
    may have more rows than P."""
    N, H, TOP_K = weights.shape
    dy, a, weights = rows(dy), a.contiguous(), weights.contiguous()
    a_rows, s, last, first = a.view(N * H, a.shape[2]), weights.view(-1), None, a.shape[2]
    if sets.serve(set_order, a, a.shape[2]):
        da, dweights = sets.gather(dy, w, True, weights, experts.contiguous(), set_order, set_tiles, a.shape[2], a)
        last = sets.last(a, weights, experts.contiguous(), w.shape[0] // H)
        first = sets.first_columns(a.shape[2], w.shape[0])
    else:
        b = _grouped_gemm(dy, w[:, : a.shape[2]].transpose(1, 2), order, offsets, H * TOP_K, precision)
        da, dweights = _combine(b, s, TOP_K).view(a.shape), _route_dot(b, a_rows, TOP_K)
    size = (dy.shape[1], a.shape[2] if width is None else width)
    gated = _gate_rows(a_rows[:, :first], s)
    dw = _projection_dw(dy, gated, last, order, offsets, H * TOP_K, precision, size, None, dw_dtype, True)
    return da, dw, dweights.view(N, H, TOP_K)


# ---- dropout of whole rows (queries, residual branches)


def _dropout_fake(x, seed, dropout, stream, pitch=1, width=1):
    return x.new_empty(x.shape)


@opaque(_dropout_fake)
def dropout_rows(
    x: torch.Tensor, seed: torch.Tensor, dropout: float, stream: int, pitch: int = 1, width: int = 1, pairs: int = 0
) -> torch.Tensor:
    """x [M, N] -> x / (1 - dropout) where uniform(seed, m, column, stream) >= dropout, else 0. Its own gradient.

    column is n, or where every `pitch` columns hold `width` and padding, the place of n without the padding,
    and without the order of `pairs` channels (position.py).
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    tiles_m, tiles_n, tile = _tile(*x.shape)
    meta = dict(PITCH=pitch, WIDTH=width, N_PAIRED=pairs, STREAM=stream, **tile)
    launch(_dropout_kernel, (tiles_m * tiles_n,), x, y, seed, *x.shape, dropout, **meta)
    return y
