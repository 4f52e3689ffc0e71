"""The sigma-MoE MLP: the two products of each token's experts, the activation between them, and all gradients.

    z[r] = x[n] W_up[e] + b_up[e]                  x [N, D]     W_up [E, D, G], or [E, D, 2G] for a gated pair
    u[r] = phi(z[r])                               or phi(first half) * second half; then dropout
    y[n] = sum_j g[n,j] u[r] W_down[e] + b_down    W_down [E, G, D_out]

for the route r = n*TOP_K + j to the expert e = e_j of token n. Backwards, with b[r] = d y[n] W_down[e]^T:

    d g[r] = b[r] . u[r]    d z[r] = g[r] b[r] phi'(z[r])    d x[n] = sum_j d z[r] W_up[e]^T
    d W_up[e] = sum_r x[n]^T d z[r]    d b_up[e] = sum_r d z[r]    d W_down[e] = sum_r (g[r] u[r])^T d y[n]

sigma-MoE (arXiv 2310.10837), equation 11. Only x and z are kept for the backward pass.

NOTE [Sorted rows]
    z, u and d z hold the routes in the order of their experts (`routing_plan` in gating/plan.py): a tile of an expert's routes is
    then a block of rows, and only x and d y are gathered. u is stored times its gate: it is needed in no other form.

NOTE [Columns]
    y and d x are sums over a token's routes, which lie in the tiles of different experts: their products [N*TOP_K, D] are
    written out and then added in the order of the choices, so that a token does not depend on its batch. As that is by far the
    largest tensor, it is made a few columns at a time: COLUMNS, and twice as many within a block. On an H200 this takes 2 % of
    the time of a SwitchAll block away and adds 113 MiB (its dense twin: 1146 in all); a model of 18, with all that they keep, has
    the same peak. For d x of an MLP that stands alone this tensor is what its peak of memory comes from: it may have a quarter of
    the elements of the hidden layer of a dense MLP with the same parameters, [N, E*G / 4], but has at least COLUMNS / 2. E 128,
    TOP_K 8, D 1024, N 32768: 512 columns of d x's products take 135 us and their sum 105 (86 since), twice 256 take 174 and 110.

On an H200, bfloat16, N = 32768, D = 1024, E 32, G 128, TOP_K 4, ReLU, forward and backward in a CUDA graph: up 84 us (cuBLAS of
the same FLOPs on contiguous rows: 83), up_bwd 95, down 274 in 4 launches, the sums over choices 214 (with what reaches x through
the gate, d x in float32) and the weight gradients 117 (with 8 warps; skewed routing: 177). 1024 columns at a time take 883 us in
all where 512 take 936, 256 take 1024 and 128 take 1143.

What bounds `down`, E 128, TOP_K 8, else the same, 512 columns of 1024: 136 to 143 us. Of that, 81 take the stores alone (filling
as much memory: 80), 85 the loads and products alone, 102 the loads of W and the stores, 122 the products of one tile of W and the
stores: memory reads 84 MB and writes 268 MB at 2.5 TB/s. None of the following was faster: W and rows through tensor descriptors
142 to 148; c in the order of the experts, through the copy engine 141, its rows gathered by the sum over choices in the same 76
us; tiles of 128 columns, two programs a multiprocessor, 145 to 149; 256 rows 152 to 168; the transposed product 143 to 146; a
tile stored while the next is multiplied 149; other cache hints 136; last tiles first, for u in the cache, 0.4 % less. Up and down
as one kernel: 512 columns 277 us in place of 313, but u must then be made again, or written, 297; all 1024 columns 378 in place
of 423, with all of [N*TOP_K, D]. Up, 173 us: W through descriptors 179, 256 rows 182 to 229, 4 warps 172; up_bwd, 191: 256 rows
227 to 244.
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from .cast import cast
from .common import INTERPRET, cdiv, default_config, find_tile, launch, next_power_of_2, opaque, rows, uniform
from .projection import _combine, _grouped_dw, product

CONFIGS = {
    "up": {
        "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 1, "num_warps": 8, "num_stages": 3},
        "float32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "PARTS": 4, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
    "up_bwd": {
        "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 1, "num_warps": 8, "num_stages": 3},
        "float32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "PARTS": 4, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
    "down": {  # the whole width of a row at once
        "half": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "PARTS": 1, "num_warps": 4, "num_stages": 3},
        "float32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "PARTS": 1, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
    "down_wide": {  # for wider rows
        "half": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "PARTS": 1, "num_warps": 8, "num_stages": 3},
        "float32": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "PARTS": 4, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256, "PARTS": 1, "num_warps": 1, "num_stages": 1},
    },
}
SPACE = {  # what may be tuned; see tuning.py
    "up": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [64, 128],
        "BLOCK_K": [32, 64],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "up_bwd": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [64, 128],
        "BLOCK_K": [32, 64],
        "num_warps": [4, 8],
        "num_stages": [2, 3],
    },
    "down": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [32, 64, 128],
        "BLOCK_K": [64, 128],
        "num_warps": [4, 8],
        "num_stages": [2, 3, 4],
    },
}

COLUMNS = 512  # of [N*TOP_K, D] at a time, at most; see NOTE [Columns]
FEW_ELEMENTS = 1 << 24  # of [N*TOP_K, D] that are made at once
MAX_ADDED = 128  # experts whose d logits reach d x in the pass over it


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


@triton.jit
def _keep(seed_ptr, token, column, dropout, STREAM: tl.constexpr):
    """What dropout multiplies by: 0, or 1 / (1 - dropout)."""
    drawn = uniform(tl.load(seed_ptr), token.to(tl.int32)[:, None], column[None, :], STREAM)
    return tl.where(drawn < dropout, 0.0, 1.0 / (1.0 - dropout))


@triton.jit
def _up_bwd_columns(
    b, n, weight, seed_ptr, z_ptr, u_ptr, dz_ptr, token, offs_m, mask_m, group, dropout, G: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store d z and the gated u of the columns n ...; return their share of d weight.

    A part of the columns at a time: all at once need twice the registers, and only one program would fit a multiprocessor.
    """
    MOST: tl.constexpr = 32 if GATED else 64
    if BLOCK_N > MOST:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(b, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        dweight = _up_bwd_columns(
            left, n, weight, seed_ptr, z_ptr, u_ptr, dz_ptr, token, offs_m, mask_m, group, dropout,
            G, ACTIVATION, GATED, HAS_DROPOUT, STREAM, BLOCK_M, HALF,
        )  # fmt: skip
        return dweight + _up_bwd_columns(
            right, n + HALF, weight, seed_ptr, z_ptr, u_ptr, dz_ptr, token, offs_m, mask_m, group, dropout,
            G, ACTIVATION, GATED, HAS_DROPOUT, STREAM, BLOCK_M, HALF,
        )  # fmt: skip
    width: tl.constexpr = 2 * G if GATED else G
    offs_n = n + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < G)[None, :]
    offs_z = offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
    z = tl.load(z_ptr + offs_z, mask=mask, other=0.0).to(tl.float32)
    u, du = _phi(z, ACTIVATION), _dphi(z, ACTIVATION)
    if HAS_DROPOUT:
        keep = _keep(seed_ptr, token, group * G + offs_n, dropout, STREAM)
        b *= keep
    db = b * weight[:, None]
    if GATED:
        second = tl.load(z_ptr + offs_z + G, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + offs_z + G, (db * u).to(dz_ptr.dtype.element_ty), mask=mask)
        du *= second
        u *= second
    tl.store(dz_ptr + offs_z, (db * du).to(dz_ptr.dtype.element_ty), mask=mask)
    dweight = tl.sum(tl.fma(b, u, 0.0), axis=1)  # see NOTE [Sums of products] in common.py
    if HAS_DROPOUT:
        u *= keep
    u_ptrs = u_ptr + offs_m.to(tl.int64)[:, None] * G + offs_n[None, :]
    tl.store(u_ptrs, (weight[:, None] * u).to(u_ptr.dtype.element_ty), mask=mask)
    return dweight


# ---- kernels


@triton.jit
def _up_kernel(
    x_ptr, w_ptr, bias_ptr, weights_ptr, seed_ptr, z_ptr, u_ptr, order_ptr, offsets_ptr, GROUPS, dropout,
    G: tl.constexpr, K: tl.constexpr, KA: tl.constexpr, TOP_K: tl.constexpr, stride_xn: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tiles_n: tl.constexpr = (G + BLOCK_N - 1) // BLOCK_N
    width: tl.constexpr = 2 * G if GATED else G
    pid = tl.program_id(0)
    group, first, end = find_tile(offsets_ptr, pid // tiles_n, GROUPS, BLOCK_M, BLOCK_G)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    route = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < G
    a_ptrs = x_ptr + (route // TOP_K).to(tl.int64)[:, None] * stride_xn
    w_ptrs = w_ptr + group.to(tl.int64) * stride_wg + offs_n.to(tl.int64)[None, :] * stride_wn
    PAIR: tl.constexpr = G * stride_wn if GATED else 0
    z, second = product(a_ptrs, w_ptrs, offs_n, G, KA, K, stride_wk, PAIR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS)

    mask = mask_m[:, None] & mask_n[None, :]
    z_ptrs = z_ptr + offs_m.to(tl.int64)[:, None] * width + offs_n[None, :]
    bias_ptrs = bias_ptr + group * width + offs_n
    if HAS_BIAS:
        z += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask)
    u = _phi(z, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            second += tl.load(bias_ptrs + G, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        tl.store(z_ptrs + G, second.to(z_ptr.dtype.element_ty), mask=mask)
        u *= second
    if HAS_DROPOUT:
        u *= _keep(seed_ptr, route // TOP_K, group * G + offs_n, dropout, STREAM)
    u *= tl.load(weights_ptr + route, mask=mask_m, other=0.0)[:, None]
    tl.store(u_ptr + offs_m.to(tl.int64)[:, None] * G + offs_n[None, :], u.to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _up_bwd_kernel(
    dy_ptr, w_ptr, weights_ptr, seed_ptr, z_ptr, u_ptr, dz_ptr, dweights_ptr, order_ptr, offsets_ptr, GROUPS, R, dropout,
    G: tl.constexpr, K: tl.constexpr, KA: tl.constexpr, TOP_K: tl.constexpr, stride_yn: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_DROPOUT: tl.constexpr, STREAM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz, the gated u, and for each tile of columns its share of d weights."""
    tiles_n: tl.constexpr = (G + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group, first, end = find_tile(offsets_ptr, pid // tiles_n, GROUPS, BLOCK_M, BLOCK_G)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    route = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    offs_n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptrs = dy_ptr + (route // TOP_K).to(tl.int64)[:, None] * stride_yn
    w_ptrs = w_ptr + group.to(tl.int64) * stride_wg + offs_n.to(tl.int64)[None, :] * stride_wn
    b, _ = product(a_ptrs, w_ptrs, offs_n, G, KA, K, stride_wk, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS)

    dweight = _up_bwd_columns(
        b, (pid % tiles_n) * BLOCK_N, tl.load(weights_ptr + route, mask=mask_m, other=0.0), seed_ptr, z_ptr, u_ptr, dz_ptr,
        route // TOP_K, offs_m, mask_m, group, dropout, G, ACTIVATION, GATED, HAS_DROPOUT, STREAM, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    tl.store(dweights_ptr + (pid % tiles_n).to(tl.int64) * R + route, dweight, mask=mask_m)


@triton.jit
def _down_kernel(
    a_ptr, w_ptr, c_ptr, order_ptr, offsets_ptr, GROUPS, N: tl.constexpr, K: tl.constexpr,
    stride_wg: tl.constexpr, stride_wk: tl.constexpr, stride_wn: tl.constexpr, PITCH: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """c[r] = a[place of r] w[expert of r]; the last columns of c, N to PITCH, become zeros.

    A program takes all columns where a fits one BLOCK_K: it stays while tiles of w pass by. Otherwise it takes one tile.
    """
    ALL: tl.constexpr = K <= BLOCK_K
    tiles_n: tl.constexpr = 1 if ALL else (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group, first, end = find_tile(offsets_ptr, pid // tiles_n, GROUPS, BLOCK_M, BLOCK_G)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    route = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
    offs_n, offs_k = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(offs_m, end - 1).to(tl.int64)[:, None] * K
    w_ptrs = w_ptr + group.to(tl.int64) * stride_wg + offs_n.to(tl.int64)[None, :] * stride_wn
    c_ptrs = c_ptr + route.to(tl.int64)[:, None] * PITCH
    if ALL:
        a = tl.load(a_ptrs + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
        w_ptrs += offs_k.to(tl.int64)[:, None] * stride_wk
        for n in range(0, N, BLOCK_N):
            offs = n + offs_n
            w = tl.load(w_ptrs + n * stride_wn, mask=(offs_k < K)[:, None] & (offs < N)[None, :], other=0.0)
            acc = tl.dot(a, w, input_precision=PRECISION)
            tl.store(c_ptrs + offs[None, :], acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs < PITCH)[None, :])
    else:
        acc, _ = product(a_ptrs, w_ptrs, offs_n, N, K, K, stride_wk, 0, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS)
        tl.store(c_ptrs + offs_n[None, :], acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < PITCH)[None, :])


# ---- launchers


def columns_alone(E: int, G: int, top_k: int) -> int:
    """Of d x, where an MLP stands alone. NOTE [Columns]"""
    return min(COLUMNS, max(COLUMNS // 2, E * G // (4 * top_k)))


def _aligned(width, x):
    """The next width whose rows are multiples of 16 bytes."""
    unit = 16 // x.element_size()
    return cdiv(width, unit) * unit


def _padded(x):
    """x, or a copy with columns of zeros, so that rows are multiples of 16 bytes: others load element by element or in pieces."""
    width = _aligned(x.shape[-1], x)
    if width == x.shape[-1]:
        return x
    x = x.contiguous()
    padded = x.new_empty(*x.shape[:-1], width)
    _combine(x.view(-1, x.shape[-1]), None, 1, y=padded.view(-1, width))
    return padded


def _config(name, x, R, N, K):
    config = default_config(CONFIGS[name], x.dtype)
    config["BLOCK_N"] = min(config["BLOCK_N"], next_power_of_2(N))
    config["BLOCK_K"] = min(config["BLOCK_K"], next_power_of_2(K))
    if INTERPRET:
        config["BLOCK_M"] = min(config["BLOCK_M"], next_power_of_2(R))
    return config


def _down(a, w, order, offsets, top_k, bias, d_out, precision, most, dtype, b=None, c=None, base=None, added=None):
    """a [R, K] in the order of the routes, w [E, K, >= d_out] -> y [R // top_k, d_out], y[n] = the sum of a w over n's routes, in
    a's dtype or `dtype`; plus base and added, which are of its size. With b [R // top_k, C] and c [C, d_out], y += b c: in the
    same pass where C is small."""
    groups, K, _ = w.shape
    R = order.shape[0]
    wide = b is not None and (b.shape[1] > MAX_ADDED or b.dtype == torch.float32)
    y = a.new_empty(R // top_k, d_out, dtype=None if wide else dtype)
    width = w.shape[2]
    columns = width
    if R * width > FEW_ELEMENTS:  # equal shares
        columns = cdiv(cdiv(width, cdiv(width, most)), 64) * 64
    parts = a.new_empty(R, _aligned(min(columns, width), a))
    for n in range(0, width, columns):
        w_here, y_here = w[:, :, n : n + columns], y[:, n : n + columns]
        N = w_here.shape[2]
        pitch = _aligned(N, a)
        config = _config("down", a, R, N, K)
        if config["BLOCK_K"] < K:
            config = _config("down_wide", a, R, N, K)
        flags = {"transposed": w.stride(2) != 1, "tf32": precision == "tf32"}
        config = tuning.lookup(_down_kernel, config, a, (R,), N=N, K=K, groups=groups, **flags)
        tiles_n = 1 if config["BLOCK_K"] >= K else cdiv(N, config["BLOCK_N"])
        launch(
            _down_kernel, ((cdiv(R, config["BLOCK_M"]) + groups) * tiles_n if R else 0,),
            a, w_here, parts, order, offsets, groups, N=N, K=K,
            stride_wg=w.stride(0), stride_wk=w.stride(1), stride_wn=w.stride(2), PITCH=pitch,
            PRECISION=precision, BLOCK_G=next_power_of_2(groups, 1), **config,
        )  # fmt: skip
        c_here = parts.view(-1)[: R * pitch].view(R, pitch)
        a_here, b_here = (None, None) if b is None or wide else (b, c[:, n : n + columns])
        bias_here, base_here, added_here = (None if t is None else t[..., n : n + columns] for t in (bias, base, added))
        _combine(c_here, None, top_k, bias_here, y_here, a_here, b_here, base_here, added_here)
    return y if not wide else cast(y.addmm_(b, c), dtype or y.dtype)


def _up_args(G, TOP_K, activation, dropout, stream, precision, config, w, groups):
    gated = activation in ("swiglu", "geglu")
    return {
        "G": G, "K": w.shape[1], "TOP_K": TOP_K, "stride_wg": w.stride(0), "stride_wk": w.stride(1), "stride_wn": w.stride(2),
        "ACTIVATION": activation, "GATED": gated, "HAS_DROPOUT": dropout > 0, "STREAM": stream, "PRECISION": precision,
        "BLOCK_G": next_power_of_2(groups, 1), **config,
    }  # fmt: skip


def _mlp_forward_fake(
    x, keys, values, bias, o_bias, seed, weights, experts, order, offsets, activation, dropout, stream, precision,
    base=None, added=None, columns=COLUMNS,
):  # fmt: skip
    y = (x if base is None else base).new_empty(x.shape[0], values.shape[2])
    return y, x.new_empty(weights.numel(), keys.shape[2])


@opaque(_mlp_forward_fake)
def mlp_forward(
    x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, o_bias: torch.Tensor | None,
    seed: torch.Tensor | None, weights: torch.Tensor, experts: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor,
    activation: str, dropout: float, stream: int, precision: str, base: torch.Tensor | None = None,
    added: torch.Tensor | None = None, columns: int = COLUMNS,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [N, D], keys [E, D, G or 2G], values [E, G, D_out] -> y [N, D_out], where base and added are given on top of both and in
    base's dtype, and the pre-activation z [N*TOP_K, G or 2G], its rows in the order of `order`. `columns`: NOTE [Columns]."""
    (groups, G, d_out), R, TOP_K = values.shape, order.shape[0], weights.shape[-1]
    bias, o_bias = (None if b is None else b.contiguous() for b in (bias, o_bias))
    x = _padded(rows(x))
    z, u = x.new_empty(R, keys.shape[2]), x.new_empty(R, G)
    config = _config("up", x, R, G, x.shape[1])
    if keys.shape[2] == 2 * G:  # two tiles of products
        config["BLOCK_N"] = max(16, config["BLOCK_N"] // 2)
    flags = {"gated": keys.shape[2] != G, "dropout": dropout > 0, "tf32": precision == "tf32"}
    config = tuning.lookup(_up_kernel, config, x, (R,), N=G, K=x.shape[1], groups=groups, TOP_K=TOP_K, **flags)
    launch(
        _up_kernel, ((cdiv(R, config["BLOCK_M"]) + groups) * cdiv(G, config["BLOCK_N"]) if R else 0,),
        x, keys, z if bias is None else bias, weights.contiguous(), order if seed is None else seed, z, u, order, offsets, groups,
        dropout, KA=x.shape[1], stride_xn=x.stride(0), HAS_BIAS=bias is not None,
        **_up_args(G, TOP_K, activation, dropout, stream, precision, config, keys, groups),
    )  # fmt: skip
    base, added = (t if t is None else rows(t) for t in (base, added))
    dtype = x.dtype if base is None else base.dtype
    return _down(u, _padded(values), order, offsets, TOP_K, o_bias, d_out, precision, columns, dtype, base=base, added=added), z


def _mlp_backward_fake(
    dy, x, keys, values, bias, o_bias, seed, weights, experts, order, offsets, z, activation, dropout, stream, precision,
    dkeys_dtype=None, dvalues_dtype=None,
):  # fmt: skip
    return (
        torch.empty_like(z),
        keys.new_empty(keys.shape, dtype=dkeys_dtype),
        values.new_empty(values.shape, dtype=dvalues_dtype),
        keys.new_empty(0 if bias is None else keys.shape[0], keys.shape[2]),
        torch.empty_like(weights),
    )


@opaque(_mlp_backward_fake)
def mlp_backward(
    dy: torch.Tensor, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None,
    o_bias: torch.Tensor | None, seed: torch.Tensor | None, weights: torch.Tensor, experts: torch.Tensor,
    order: torch.Tensor, offsets: torch.Tensor, z: torch.Tensor, activation: str, dropout: float, stream: int, precision: str,
    dkeys_dtype: torch.dtype | None = None, dvalues_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """-> dz [N*TOP_K, G or 2G] for `mlp_backward_input`, d keys, d values, d bias [E, G or 2G] (no rows without a bias) and d
    weights; d keys and d values in the dtypes of keys and values or those given."""
    (groups, G, d_out), D, R, TOP_K = values.shape, x.shape[1], order.shape[0], weights.shape[-1]
    x, dy, w = _padded(rows(x)), _padded(rows(dy)), _padded(values).transpose(1, 2)
    config = _config("up_bwd", x, R, G, dy.shape[1])
    flags = {"gated": z.shape[1] != G, "dropout": dropout > 0, "tf32": precision == "tf32"}
    config = tuning.lookup(_up_bwd_kernel, config, x, (R,), N=G, K=dy.shape[1], groups=groups, TOP_K=TOP_K, **flags)
    tiles_n = cdiv(G, config["BLOCK_N"])
    u, dz = z.new_empty(R, G), torch.empty_like(z)
    dweights = torch.empty((tiles_n, *weights.shape), dtype=weights.dtype, device=weights.device)
    launch(
        _up_bwd_kernel, ((cdiv(R, config["BLOCK_M"]) + groups) * tiles_n if R else 0,),
        dy, w, weights.contiguous(), order if seed is None else seed, z, u, dz, dweights, order, offsets, groups, R, dropout,
        KA=dy.shape[1], stride_yn=dy.stride(0),
        **_up_args(G, TOP_K, activation, dropout, stream, precision, config, w, groups),
    )  # fmt: skip
    dvalues = _grouped_dw(u, dy, order, offsets, 0, TOP_K, precision, size=(G, d_out), dtype=dvalues_dtype)
    del u
    dkeys = _grouped_dw(x, dz, order, offsets, TOP_K, 0, precision, size=(D, dz.shape[1]), dtype=dkeys_dtype)
    dbias = keys.new_empty(0, keys.shape[2])
    if bias is not None:  # the weight gradient of an input that is always one
        one = x.new_ones(1, 1).expand(R, 1)
        dbias = _grouped_dw(one, dz, order, offsets, 0, 0, precision).view(groups, -1)
    return dz, dkeys, dvalues, dbias, dweights[0] if tiles_n == 1 else dweights.sum(0)


def _mlp_backward_input_fake(dz, keys, order, offsets, top_k, dlogits, sel, precision, dtype, columns):
    return dz.new_empty(dz.shape[0] // top_k, keys.shape[1], dtype=dtype)


@opaque(_mlp_backward_input_fake)
def mlp_backward_input(
    dz: torch.Tensor, keys: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, top_k: int,
    dlogits: torch.Tensor | None, sel: torch.Tensor | None, precision: str, dtype: torch.dtype, columns: int,
) -> torch.Tensor:  # fmt: skip
    """-> dx [N, D] in `dtype`, with what reaches x through its gate, dlogits [N, E] sel [E, D], where given. At most so many
    columns at a time: NOTE [Columns]."""
    gate = (None, None) if dlogits is None else (dlogits.contiguous(), sel.contiguous())
    return _down(dz, keys.transpose(1, 2), order, offsets, top_k, None, keys.shape[1], precision, columns, dtype, *gate)
