"""Expert-sparse projections: the value and output projection of SwitchHead, and both halves of the sigma-MoE MLP.

    value    v[n,h] = sum_j g[n,h,j] x[n] W[h,e_j]                x [N, D]     W [H*E, D, P]   v [N, H, P]
    output   y[n]   = sum_h sum_j g[n,h,j] a[n,h] W[h,e_j]        a [N, H, P]  W [H*E, P, D]   y [N, D]
    mlp      y[n]   = sum_j g[n,j] (phi(x[n] W_up[e_j] + b_up[e_j]) W_down[e_j]) + b_down

A route r = (n*H + h)*TOP_K + j is one (token, head, choice). Everything is built of the same few steps over routes:

    grouped_gemm    c[r] = a[r // DIV] W[expert of r]             routes taken in the order of their experts, rows gathered
    combine         y[m] = sum_j s[m*J + j] c[m*J + j]            the gates and the sum over choices (and heads)
    route_dot       d g[r] = b[r] . a[r // TOP_K]
    gate_rows       c[m*J + j] = s[m*J + j] a[m]
    grouped_dw      d W[e] = sum_{r of e} a[r // DIV_A]^T b[r // DIV_B]

The backward pass of the value projection is the output projection with W transposed, and the other way round:

    d x = output(g, d v, W^T)     d a = value(g, d y, W^T)     d g[r] = (x W)[r] . d v = (d y W^T)[r] . a

SwitchHead (arXiv 2312.07987), equations 7 to 10; sigma-MoE (arXiv 2310.10837), equation 11.

Sums longer than PARTS tiles are taken in parts, as in gating.py, NOTE [Partial sums]; 16-bit results do not need it.

NOTE [Constant widths]
    Widths and strides are constexpr: constants of a model, and the compiler can only join loads into vectors when it sees how
    rows are aligned. A run-time stride of 412 or 76 would be loaded element by element (a stride is specialised only if it is
    a multiple of 16). The number of tokens never is a constant.

NOTE [Tiles of routes]
    `routing_plan` (gating.py) gives the routes sorted by expert and each expert's range. A tile never straddles two experts. The
    number of tiles is only known on the device, so the grid has its upper bound, cdiv(R, BLOCK_M) + groups, and each program
    finds its tile from the ranges (`find_tile`); programs past the last tile stop.
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from . import sets
from .common import INTERPRET, cdiv, find_tile, launch, next_power_of_2, opaque, rows, uniform

CONFIGS = {
    "grouped_gemm": {
        "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 1, "num_warps": 8, "num_stages": 3},
        "float32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "PARTS": 4, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
    "grouped_dw": {
        "half": {"BLOCK_I": 128, "BLOCK_J": 128, "BLOCK_R": 64, "PARTS": 1, "num_warps": 8, "num_stages": 3},
        "float32": {"BLOCK_I": 32, "BLOCK_J": 64, "BLOCK_R": 16, "PARTS": 4, "num_warps": 4, "num_stages": 1},
        "interpret": {"BLOCK_I": 256, "BLOCK_J": 256, "BLOCK_R": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
}


CHUNK = 8192  # routes of an expert summed apart for dw, where there would be fewer than MANY_PROGRAMS otherwise
MANY_PROGRAMS = 264  # two for each multiprocessor of an H200


# ---- jit helpers


@triton.jit
def _phi(z, ACTIVATION: tl.constexpr):
    """The activation of z (for a gated pair, of its first half)."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    else:  # silu, swiglu
        return z * tl.sigmoid(z)


@triton.jit
def _dphi(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return (z > 0.0).to(tl.float32)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))


# ---- kernels


@triton.jit
def _grouped_gemm_kernel(
    a_ptr, w_ptr, bias_ptr, c_ptr, order_ptr, offsets_ptr, GROUPS,
    N: tl.constexpr, K: tl.constexpr, DIV: tl.constexpr, stride_am: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, PARTS * BLOCK_K):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(PARTS):
            offs_k = (k + i * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
            mask_k = offs_k < K
            a = tl.load(a_ptrs + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs + offs_k[:, None] * stride_wk, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            part = tl.dot(a, w, part, input_precision=PRECISION)
        acc += part
    if HAS_BIAS:
        acc += tl.load(bias_ptr + group * N + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    c_ptrs = c_ptr + route.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _combine_kernel(
    c_ptr, s_ptr, bias_ptr, y_ptr, M, N: tl.constexpr, J,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(J):
        rows = offs_m * J + j
        c = tl.load(c_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            c *= tl.load(s_ptr + rows, mask=mask_m, other=0.0)[:, None]
        acc += c
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


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
        acc += tl.sum(a * b, axis=1)
    tl.store(dot_ptr + offs_r, acc, mask=mask_r)


@triton.jit
def _grouped_dw_kernel(
    a_ptr, b_ptr, dw_ptr, dbias_ptr, order_ptr, offsets_ptr, GROUPS,
    I: tl.constexpr, J: tl.constexpr, DIV_A: tl.constexpr, DIV_B: tl.constexpr,
    stride_am: tl.constexpr, stride_bm: tl.constexpr, CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dw of a whole group, or, with CHUNK > 0, float32 dw of each CHUNK of its routes (see NOTE [Chunks])."""
    tiles_i: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    tiles_j: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J
    pid = tl.program_id(0)
    group = pid // (tiles_i * tiles_j)
    pid_i = pid // tiles_j % tiles_i
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_j = (pid % tiles_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    mask_i, mask_j = offs_i < I, offs_j < J
    if CHUNK > 0:
        _, start, end = find_tile(offsets_ptr, group, GROUPS, CHUNK, BLOCK_G)
        if start >= end:
            return
        end = tl.minimum(end, start + CHUNK)
    else:
        start = tl.load(offsets_ptr + group)
        end = tl.load(offsets_ptr + group + 1)

    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    dbias = tl.zeros((BLOCK_J,), tl.float32)
    for first in range(start, end, PARTS * BLOCK_R):
        part = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        for i in tl.static_range(PARTS):
            offs_r = first + i * BLOCK_R + tl.arange(0, BLOCK_R)
            mask_r = offs_r < end
            route = tl.load(order_ptr + offs_r, mask=mask_r, other=0)
            a_ptrs = a_ptr + (route // DIV_A).to(tl.int64)[None, :] * stride_am + offs_i[:, None]
            b_ptrs = b_ptr + (route // DIV_B).to(tl.int64)[:, None] * stride_bm + offs_j[None, :]
            a = tl.load(a_ptrs, mask=mask_i[:, None] & mask_r[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=mask_r[:, None] & mask_j[None, :], other=0.0)
            if HAS_BIAS:
                dbias += tl.sum(b.to(tl.float32), axis=0)
            part = tl.dot(a, b, part, input_precision=PRECISION)
        acc += part

    dw_ptrs = dw_ptr + group.to(tl.int64) * I * J + offs_i.to(tl.int64)[:, None] * J + offs_j[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask_i[:, None] & mask_j[None, :])
    if HAS_BIAS:
        if pid_i == 0:
            tl.store(dbias_ptr + group * J + offs_j, dbias.to(dbias_ptr.dtype.element_ty), mask=mask_j)


@triton.jit
def _sum_chunks_kernel(
    part_ptr, dw_ptr, offsets_ptr, GROUPS,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw[g] = the sum of the group's chunks, in their order; zero without any."""
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    group = pid // blocks
    offs_g = tl.arange(0, BLOCK_G)
    count = tl.load(offsets_ptr + offs_g + 1, mask=offs_g < GROUPS, other=0)
    chunks = (count - tl.load(offsets_ptr + offs_g, mask=offs_g < GROUPS, other=0) + CHUNK - 1) // CHUNK
    first = tl.sum(tl.where(offs_g < group, chunks, 0), 0)
    own = tl.sum(tl.where(offs_g == group, chunks, 0), 0)
    offs = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    part_ptrs = part_ptr + first.to(tl.int64) * SIZE + offs
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(own):
        acc += tl.load(part_ptrs, mask=offs < SIZE, other=0.0)
        part_ptrs += SIZE
    tl.store(dw_ptr + group.to(tl.int64) * SIZE + offs, acc.to(dw_ptr.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def _gate_rows_kernel(
    a_ptr, s_ptr, out_ptr, M, TOP_K, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out[m, j] = s[m, j] a[m]."""
    tiles_p: tl.constexpr = (P + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    offs_m = (pid // tiles_p).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p = pid % tiles_p * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_p < P)[None, :]
    a = tl.load(a_ptr + offs_m[:, None] * P + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
    for j in range(TOP_K):
        s = tl.load(s_ptr + offs_m * TOP_K + j, mask=mask_m, other=0.0)
        out_ptrs = out_ptr + (offs_m * TOP_K + j)[:, None] * P + offs_p[None, :]
        tl.store(out_ptrs, (a * s[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_fwd_kernel(
    z_ptr, u_ptr, experts_ptr, seed_ptr, R, G: tl.constexpr, TOP_K, dropout,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """u[r] = phi(z[r]) or phi(first half) * second half, then dropout with counter (token, e*G + g)."""
    tiles_n = tl.cdiv(G, BLOCK_N)
    pid = tl.program_id(0)
    offs_r = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_g = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r = offs_r < R
    mask = mask_r[:, None] & (offs_g < G)[None, :]
    width = 2 * G if GATED else G
    z = tl.load(z_ptr + offs_r[:, None] * width + offs_g[None, :], mask=mask, other=0.0).to(tl.float32)
    u = _phi(z, ACTIVATION)
    if GATED:
        u *= tl.load(z_ptr + offs_r[:, None] * width + G + offs_g[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        e = tl.load(experts_ptr + offs_r, mask=mask_r, other=0)
        rnd = uniform(tl.load(seed_ptr), (offs_r // TOP_K).to(tl.int32)[:, None], e[:, None] * G + offs_g[None, :], STREAM)
        u = tl.where(rnd < dropout, 0.0, u / (1.0 - dropout))
    tl.store(u_ptr + offs_r[:, None] * G + offs_g[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_bwd_kernel(
    z_ptr, b_ptr, weights_ptr, u_ptr, dz_ptr, dweights_ptr, experts_ptr, seed_ptr, R, G: tl.constexpr, TOP_K, dropout,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From b = d y W_down^T: d weight[r] = b . u, d z = weight * b * du/dz, and u = weight * u for d W_down."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < R
    weight = tl.load(weights_ptr + offs_r, mask=mask_r, other=0.0)
    width = 2 * G if GATED else G
    dweight = tl.zeros((BLOCK_M,), tl.float32)
    for g in range(0, G, BLOCK_N):
        offs_g = g + tl.arange(0, BLOCK_N)
        mask = mask_r[:, None] & (offs_g < G)[None, :]
        z_offs = offs_r[:, None] * width + offs_g[None, :]
        z = tl.load(z_ptr + z_offs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + offs_r[:, None] * G + offs_g[None, :], mask=mask, other=0.0).to(tl.float32)
        u = _phi(z, ACTIVATION)
        du = _dphi(z, ACTIVATION)
        if GATED:
            second = tl.load(z_ptr + z_offs + G, mask=mask, other=0.0).to(tl.float32)
            du *= second
            dsecond = u
            u *= second
        if HAS_DROPOUT:
            e = tl.load(experts_ptr + offs_r, mask=mask_r, other=0)
            rnd = uniform(tl.load(seed_ptr), (offs_r // TOP_K).to(tl.int32)[:, None], e[:, None] * G + offs_g[None, :], STREAM)
            keep = tl.where(rnd < dropout, 0.0, 1.0 / (1.0 - dropout))
            u *= keep
            b_kept = b * keep
        else:
            b_kept = b
        dweight += tl.sum(b * u, axis=1)
        db = weight[:, None] * b_kept
        gated = (weight[:, None] * u).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + offs_r[:, None] * G + offs_g[None, :], gated, mask=mask)
        tl.store(dz_ptr + z_offs, (db * du).to(dz_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(dz_ptr + z_offs + G, (db * dsecond).to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dweights_ptr + offs_r, dweight, mask=mask_r)


@triton.jit
def _dropout_kernel(
    x_ptr, y_ptr, seed_ptr, M, N: tl.constexpr, dropout,
    STREAM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    rnd = uniform(tl.load(seed_ptr), offs_m.to(tl.int32)[:, None], offs_n[None, :], STREAM)
    tl.store(y_ptr + offs, tl.where(rnd < dropout, 0.0, x / (1.0 - dropout)).to(y_ptr.dtype.element_ty), mask=mask)


# ---- launchers of one step


def _grouped_gemm(a, w, bias, order, offsets, div, precision):
    """a [R // div, K], w [groups, K, N] of any strides -> c [R, N], c[r] = a[r // div] w[expert of r] (+ bias)."""
    groups, K, N = w.shape
    R = order.shape[0]
    c = a.new_empty(R, N)
    config = dict(tuning.lookup(CONFIGS["grouped_gemm"], a.dtype, INTERPRET))
    config["BLOCK_N"] = min(config["BLOCK_N"], next_power_of_2(N))
    config["BLOCK_K"] = min(config["BLOCK_K"], next_power_of_2(K))
    if INTERPRET:
        config["BLOCK_M"] = min(config["BLOCK_M"], next_power_of_2(R))
    grid = (cdiv(R, config["BLOCK_M"]) + groups) * cdiv(N, config["BLOCK_N"]) if R else 0
    launch(
        _grouped_gemm_kernel, (grid,),
        a, w, c if bias is None else bias, c, order, offsets,
        groups, N=N, K=K, DIV=div, stride_am=a.stride(0),
        stride_wg=w.stride(0), stride_wk=w.stride(1), stride_wn=w.stride(2),
        HAS_BIAS=bias is not None, PRECISION=precision, BLOCK_G=next_power_of_2(groups, 1), **config,
    )  # fmt: skip
    return c


def _tile(M, N):
    """Tile of the elementwise kernels: few and large for the interpreter."""
    block_n = min(next_power_of_2(N), 512 if INTERPRET else 128)
    block_m = 512 if INTERPRET else 4096 // block_n
    return cdiv(M, block_m), cdiv(N, block_n), {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}


def _combine(c, s, J, bias=None):
    """c [M*J, N], s [M*J] float32 or None -> y [M, N]."""
    M, N = c.shape[0] // J, c.shape[1]
    y = c.new_empty(M, N)
    tiles_m, tiles_n, tile = _tile(M, N)
    launch(
        _combine_kernel, (tiles_m * tiles_n,),
        c, c if s is None else s, c if bias is None else bias, y, M, N, J,
        HAS_SCALE=s is not None, HAS_BIAS=bias is not None, **tile,
    )  # fmt: skip
    return y


def _route_dot(b, a, div):
    """b [R, N], a [R // div, N] -> [R] float32."""
    R, N = b.shape
    dot = b.new_empty(R, dtype=torch.float32)
    tiles_m, _, tile = _tile(R, N)
    launch(_route_dot_kernel, (tiles_m,), b, a, dot, R, N, div, a.stride(0), **tile)
    return dot


def _grouped_dw(a, b, order, offsets, div_a, div_b, precision, with_bias=False):
    """a [R // div_a, I], b [R // div_b, J] -> dw [groups, I, J] (and, of b, the bias gradient [groups, J]).

    NOTE [Chunks]
        Few experts make few programs, and skewed routing makes one of them long. So the routes of an expert are cut into chunks,
        each summed on its own in float32, and the chunks are added in order: balanced, and the same bits every time.
    """
    groups, I, J, R = offsets.shape[0] - 1, a.shape[1], b.shape[1], order.shape[0]
    dw = a.new_empty(groups, I, J)
    dbias = a.new_empty(groups, J) if with_bias else None
    config = dict(tuning.lookup(CONFIGS["grouped_dw"], a.dtype, INTERPRET))
    config["BLOCK_I"] = min(config["BLOCK_I"], next_power_of_2(I))
    config["BLOCK_J"] = min(config["BLOCK_J"], next_power_of_2(J))
    if INTERPRET:
        config["BLOCK_R"] = min(config["BLOCK_R"], next_power_of_2(R))
    tiles = cdiv(I, config["BLOCK_I"]) * cdiv(J, config["BLOCK_J"])
    chunk = CHUNK if groups * tiles < MANY_PROGRAMS and R > CHUNK and not with_bias else 0
    parts = a.new_empty(cdiv(R, chunk) + groups, I, J, dtype=torch.float32) if chunk else dw
    BLOCK_G = next_power_of_2(groups, 1)
    launch(
        _grouped_dw_kernel, (parts.shape[0] * tiles,),
        a, b, parts, dw if dbias is None else dbias, order, offsets, groups,
        I=I, J=J, DIV_A=div_a, DIV_B=div_b, stride_am=a.stride(0), stride_bm=b.stride(0), CHUNK=chunk,
        HAS_BIAS=with_bias, PRECISION=precision, BLOCK_G=BLOCK_G, **config,
    )  # fmt: skip
    if chunk:
        block = min(next_power_of_2(I * J), 1024)
        meta = {"SIZE": I * J, "CHUNK": chunk, "BLOCK_G": BLOCK_G, "BLOCK": block}
        launch(_sum_chunks_kernel, (groups * cdiv(I * J, block),), parts, dw, offsets, groups, **meta, num_warps=4)
    return (dw, dbias) if with_bias else dw


def _gate_rows(a, s):
    """a [M, P], s [M * TOP_K] float32 -> s a [M * TOP_K, P], the narrow operand gated."""
    (M, P), TOP_K = a.shape, s.numel() // a.shape[0] if a.shape[0] else 1
    out = a.new_empty(M * TOP_K, P)
    tiles_m, tiles_p, tile = _tile(M, P)
    launch(_gate_rows_kernel, (tiles_m * tiles_p,), a, s, out, M, TOP_K, P=P, **tile)
    return out


# ---- value projection


def _value_forward_fake(x, w, weights, experts, order, offsets, set_order, set_offsets, token_order, precision):
    N, H, _ = weights.shape
    return x.new_empty(N, H, w.shape[2]), x.new_empty(weights.numel(), w.shape[2])


@opaque(_value_forward_fake)
def value_forward(
    x: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, set_order: torch.Tensor, set_offsets: torch.Tensor, token_order: torch.Tensor, precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [N, D], w [H*E, D, P], weights and experts [N, H, TOP_K] -> v [N, H, P] and each route's product u [N*H*TOP_K, P]."""
    N, H, TOP_K = weights.shape
    if set_order.numel() and sets.fits(N, H, w.shape[0] // H, TOP_K, w.shape[2], x.dtype):
        return sets.gather(x, w, weights.contiguous(), experts.contiguous(), set_order, set_offsets)
    u = _grouped_gemm(rows(x), w, None, order, offsets, H * TOP_K, precision)
    return _combine(u, weights.contiguous().view(-1), TOP_K).view(N, H, w.shape[2]), u


def _value_backward_fake(dv, x, w, weights, experts, order, offsets, set_order, set_offsets, token_order, u, precision):
    return x.new_empty(x.shape), w.new_empty(w.shape), weights.new_empty(weights.shape)


@opaque(_value_backward_fake)
def value_backward(
    dv: torch.Tensor, x: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, set_order: torch.Tensor, set_offsets: torch.Tensor, token_order: torch.Tensor, u: torch.Tensor,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx [N, D], dw [H*E, D, P], d weights [N, H, TOP_K]."""
    N, H, TOP_K = weights.shape
    x, dv = rows(x), dv.contiguous().view(N * H, dv.shape[2])
    dweights = _route_dot(u, dv, TOP_K).view(N, H, TOP_K)
    gated = _gate_rows(dv, weights.contiguous().view(-1))
    if set_order.numel() and sets.fits(N, H, w.shape[0] // H, TOP_K, w.shape[2], x.dtype):
        dx = sets.spread(gated, w.transpose(1, 2), experts.contiguous(), token_order)
    else:
        dx = _combine(_grouped_gemm(gated, w.transpose(1, 2), None, order, offsets, 1, precision), None, H * TOP_K)
    dw = _grouped_dw(x, gated, order, offsets, H * TOP_K, 1, precision)
    return dx, dw, dweights


# ---- output projection


def _output_forward_fake(a, w, weights, experts, order, offsets, set_order, set_offsets, token_order, precision):
    return a.new_empty(a.shape[0], w.shape[2])


@opaque(_output_forward_fake)
def output_forward(
    a: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, set_order: torch.Tensor, set_offsets: torch.Tensor, token_order: torch.Tensor, precision: str,
) -> torch.Tensor:  # fmt: skip
    """a [N, H, P], w [H*E, P, D], weights and experts [N, H, TOP_K] -> y [N, D]."""
    N, H, TOP_K = weights.shape
    gated = _gate_rows(a.contiguous().view(N * H, a.shape[2]), weights.contiguous().view(-1))
    if set_order.numel() and sets.fits(N, H, w.shape[0] // H, TOP_K, w.shape[1], a.dtype):
        return sets.spread(gated, w, experts.contiguous(), token_order)
    return _combine(_grouped_gemm(gated, w, None, order, offsets, 1, precision), None, H * TOP_K)


def _output_backward_fake(dy, a, w, weights, experts, order, offsets, set_order, set_offsets, token_order, precision):
    return a.new_empty(a.shape), w.new_empty(w.shape), weights.new_empty(weights.shape)


@opaque(_output_backward_fake)
def output_backward(
    dy: torch.Tensor, a: torch.Tensor, w: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, set_order: torch.Tensor, set_offsets: torch.Tensor, token_order: torch.Tensor, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> da [N, H, P], dw [H*E, P, D], d weights [N, H, TOP_K]."""
    N, H, TOP_K = weights.shape
    dy, a, s = rows(dy), a.contiguous().view(N * H, a.shape[2]), weights.contiguous().view(-1)
    if set_order.numel() and sets.fits(N, H, w.shape[0] // H, TOP_K, w.shape[1], a.dtype):
        w = w.transpose(1, 2)
        da, dweights = sets.gather(
            dy, w, weights.contiguous(), experts.contiguous(), set_order, set_offsets, a.view(N, H, a.shape[1])
        )
    else:
        b = _grouped_gemm(dy, w.transpose(1, 2), None, order, offsets, H * TOP_K, precision)
        da, dweights = _combine(b, s, TOP_K).view(N, H, a.shape[1]), _route_dot(b, a, TOP_K)
    dw = _grouped_dw(_gate_rows(a, s), dy, order, offsets, 1, H * TOP_K, precision)
    return da, dw, dweights.view(N, H, TOP_K)


# ---- sigma-MoE MLP


def _activation_args(z, weights, experts, seed, activation, dropout, stream):
    gated = activation in ("swiglu", "geglu")
    R, G = z.shape[0], z.shape[1] // 2 if gated else z.shape[1]
    meta = {"ACTIVATION": activation, "GATED": gated, "HAS_DROPOUT": dropout > 0, "STREAM": stream}
    return R, G, (experts, experts if seed is None else seed, R, G, weights.shape[-1], dropout), meta


def _mlp_forward_fake(
    x, keys, values, bias, o_bias, seed, weights, experts, order, offsets, activation, dropout, stream, precision
):
    return x.new_empty(x.shape[0], values.shape[2]), x.new_empty(weights.numel(), keys.shape[2])


@opaque(_mlp_forward_fake)
def mlp_forward(
    x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, o_bias: torch.Tensor | None,
    seed: torch.Tensor | None, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor,
    activation: str, dropout: float, stream: int, precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [N, D], keys [E, D, G or 2G], values [E, G, D_out] -> y [N, D_out] and the pre-activation z [N*TOP_K, G or 2G]."""
    TOP_K = weights.shape[-1]
    bias, o_bias = (None if b is None else b.contiguous() for b in (bias, o_bias))
    z = _grouped_gemm(rows(x), keys, bias, order, offsets, TOP_K, precision)
    R, G, args, meta = _activation_args(z, weights, experts, seed, activation, dropout, stream)
    u = z.new_empty(R, G)
    tiles_m, tiles_n, tile = _tile(R, G)
    launch(_activation_fwd_kernel, (tiles_m * tiles_n,), z, u, *args, **meta, **tile)
    return _combine(_grouped_gemm(u, values, None, order, offsets, 1, precision), weights.contiguous().view(-1), TOP_K, o_bias), z


def _mlp_backward_fake(
    dy, x, keys, values, bias, o_bias, seed, weights, experts, order, offsets, z, activation, dropout, stream, precision
):
    return (
        x.new_empty(x.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
        keys.new_empty(keys.shape[0], keys.shape[2]),
        torch.empty_like(weights),
    )


@opaque(_mlp_backward_fake)
def mlp_backward(
    dy: torch.Tensor, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None,
    o_bias: torch.Tensor | None, seed: torch.Tensor | None, weights: torch.Tensor, experts: torch.Tensor,
    order: torch.Tensor, offsets: torch.Tensor, z: torch.Tensor, activation: str, dropout: float, stream: int, precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dx, d keys, d values, d bias (of z, whether or not there is a bias), d weights."""
    x, dy, TOP_K = rows(x), rows(dy), weights.shape[-1]
    b = _grouped_gemm(dy, values.transpose(1, 2), None, order, offsets, TOP_K, precision)
    R, G, args, meta = _activation_args(z, weights, experts, seed, activation, dropout, stream)
    u, dz, dweights = z.new_empty(R, G), torch.empty_like(z), torch.empty_like(weights)
    tiles_m, _, tile = _tile(R, G)
    launch(_activation_bwd_kernel, (tiles_m,), z, b, weights, u, dz, dweights, *args, **meta, **tile)
    dx = _combine(_grouped_gemm(dz, keys.transpose(1, 2), None, order, offsets, 1, precision), None, TOP_K)
    dkeys, dbias = _grouped_dw(x, dz, order, offsets, TOP_K, 1, precision, with_bias=True)
    dvalues = _grouped_dw(u, dy, order, offsets, 1, TOP_K, precision)
    return dx, dkeys, dvalues, dbias, dweights


# ---- dropout of whole rows (queries, residual branches)


def _dropout_fake(x, seed, dropout, stream):
    return x.new_empty(x.shape)


@opaque(_dropout_fake)
def dropout_rows(x: torch.Tensor, seed: torch.Tensor, dropout: float, stream: int) -> torch.Tensor:
    """x [M, N] -> x / (1 - dropout) where uniform(seed, m, n, stream) >= dropout, else 0. Its own gradient."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tiles_m, tiles_n, tile = _tile(*x.shape)
    launch(_dropout_kernel, (tiles_m * tiles_n,), x, y, seed, *x.shape, dropout, STREAM=stream, **tile)
    return y
