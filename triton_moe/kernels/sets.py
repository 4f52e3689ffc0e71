"""Sparse projections of 16-bit inputs with few experts a head: rows grouped by the set of experts they chose.

    gather   u[n,h,j] = x[n] W[h,e_j]              v[n,h] = sum_j g[n,h,j] u[n,h,j]         x [N, D]     W [H*E, D, P]
    spread   y[n] = sum_h sum_j g[n,h,j] a[n,h] W[h,e_j]                                    a [N, H, P]  W [H*E, P, D]

`gather` is the value projection and, with W transposed, the output projection's d a; `spread` is the output projection and, with
W transposed, the value projection's d x. projection.py chooses between these kernels and its own, which work for everything.

NOTE [Expert sets]
    TOP_K of E experts make S = C(E, TOP_K) sets: 6 for 2 of 4. Where all rows of a tile chose the same set, `gather` reads each
    row of x once for two products, keeps them in registers and sums them there: nothing as large as [N, H*TOP_K, D] exists.
    What a tile is (its rows, head and experts) stands in the plan; finding it in the kernel itself took 2 us in each wave. Tiles
    that are equally far in their sets run at about the same time and read the same rows of x: 123 us against 128 set by set.

NOTE [Signatures]
    `spread` sums over heads and experts in one accumulator, so y is written once. No order of the tokens makes the sets of all
    heads agree in a tile, so tokens are sorted by their sets (gating/plan.py) and each tile visits the experts (h, e) that any of
    its tokens chose, a bit each: two thirds of all for 4 heads and 2 of 4 experts. `pack` writes the operand as the tile reads
    it, gated and expert after expert, with rows of zeros for tokens that did not choose the expert: a product or a gather in
    front of `tl.dot` keeps Hopper's matrix units waiting. Where tiles would visit many experts that few of their rows chose
    (`joint`), heads are added to y one by one, each with its rows in the order of its sets.

NOTE [Descriptors]
    Weights and packed rows are read through tensor descriptors: Hopper's and Blackwell's copy engine then moves them. Elsewhere
    Triton turns them into pointers, and knows what it may join only of descriptors that the kernel makes itself (`_blocks`): of
    the host's it would load every number on its own. A descriptor wants rows a multiple of 16 bytes apart, reads zeros outside,
    and is slow at that and at rows that split sectors: P 112 took longer than P 128. So weights are padded with zeros, by
    `_padded`.

NOTE [One loop]
    A tile of `spread` is some twenty short steps, and a fifth of its time was what comes before the first and after the last. So
    on Hopper there are as many programs as run at a time, and each goes through all steps of all its tiles in one loop (MANY):
    the next tile's first blocks arrive while this one's sum is stored. Three things keep that loop asynchronous; look for
    `warp_group_dot_wait {pendings = 1}`, num_stages buffers, and no word of ptxas about serialized wgmma. Where a step is follows
    by `tl.where`: a branch would be joined with the one that stores, and the copies would wait for it. The sum becomes zeros
    inside that branch, by a condition that the compiler cannot decide: plain zeros are moved out of it and become a choice in
    every step. And there is one sum: with two, as `gather` has, ptxas serializes.
    Elsewhere a program has one tile: sm_100 would spill up to 568 bytes, A100s and AMD have no copy engine. So it has where there
    is b c, whose product would be a second sum in the branch, and head by head with D no multiple of 8, which spills 24 to 56.
    On an H200 143 -> 135 us, and 131 in another run; H 4, E 10 258 -> 240 (236); the same bits. `gather` so: 155 us for 120
    (serialized); one sum over both experts' weights side by side 122, 224 with u (it spills); two nested loops that load the next
    tile's rows ahead 115, with u 132 for 135, with the dots 131 for 135. Tokens loaded a tile ahead: 135 for 131; what is added
    to y loaded at a tile's first step, E 10: 262 for 236, it spills; with 8 warps 313 and more.

On an H200, bfloat16, N = 32768, D = 1024, H 4, E 4, TOP_K 2, P 128, cuBLAS of the same FLOPs taking 99 us: gather 119 us, 136
with u written, 141 with the dots; pack 35 and spread 140 (before it had one loop), in one graph 172; pack with the dots of u 64,
alone 30. Experiments on the way: pointers in place of descriptors 129 against 122 us for gather and 154 against 140 for spread;
spread gathering its rows itself 211; 64 rows a tile and twice the programs 187; windows of tokens for the cache's sake 142.
Later, each alone in a graph: spread with tiles of 128 columns 148 us, of 256 columns and 8 warps 144, the same with 64 rows 184,
programs that go on to further tiles in nested loops 140 to 145, two passes of two heads each 169. One head at a time sums are
short and 128 columns better (H 4, E 10: 240 us, with 256 columns 260; 256 or 512 columns of all heads before the next, so that
what they add to stays in the cache, 28 and 11 us more). gather with both experts' weights side by side 125 against 133 us, but
they must first be copied so; writing the gated rows for the weight's gradient as well 164 against 142, as long as a launch of
their own (24), and at TOP_K 4 far longer. pack by 16 rows and 4 warps 44 against 38 us; with the dots that is the fastest; a
program for all experts of a head 35 to 37 against 37, with the dots 64.
H 2, E 8, TOP_K 4: gather with u takes 197 us for P 128, and 351 for P 132 with a product of 16 columns more in each tile. In
place of 64 rows a tile 128 with the sum of the first two experts in global memory 478, with 16 warps 597, all in registers 751,
one expert at a time 709: they spill. Heads one by one: pack and spread of P 132 take 255 us in place of 229.

What cuBLAS has and Triton has not: blocks that work in pairs and share what they load. Triton 3.6 and 3.7 compile num_ctas = 2,
but without multicast. So each step of 128 x 256 x 64 fetches its 48 KB alone, by count 805 MB in gather and 1.05 GB in spread,
which is 6.7 and 8 TB/s out of the second-level cache; larger tiles find no registers.

NOTE [Last columns]
    A few columns more than a power of two, 132 = 128 + 4, would fill tiles of their own with little. So the last columns of all
    experts of all heads are one dense product: H*E times 4 columns. `gather` takes those of the chosen experts from it, and
    `spread` adds as a further term. The dense product is ours: cuBLAS's sums depend on the number of rows. On an H200, H 2, E 8,
    TOP_K 4, P 132 (N = 32768, D = 1024), where cuBLAS takes 122 us: gather 214 us, 24 of them for the dense product, and 303 with
    16 columns more in each tile; pack and spread 229 and 257; with the backward pass values 772 and 836, outputs 676 and 853.
    H 4, E 4, TOP_K 2: 166 and 199, 213 and 248, 650 and 687, 590 and 734. A weight's last columns are a product for torch, as
    the gates' are.
    A layer's heads come padded to a tile of attention, 144 channels, and so without this: as 132, padded by attention, the layer
    (D 1024, N 32768, T 1024, forward and backward) takes 2181 us in place of 2240 with H 2, E 8, TOP_K 4, but 2652 in place of
    2496 with H 4, E 4, TOP_K 2. What tiles save, 355 and 240 us, goes into copies, the dense products and torch's.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tuning
from .common import INTERPRET, cdiv, launch, next_power_of_2, rows

TILE = 128  # rows of one tile in the tables; kernels take it whole or in parts

CONFIGS = {
    "gather": {
        "half": {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
        "half_small": {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
        "interpret": {"BLOCK_M": 128, "BLOCK_K": 128, "num_warps": 1, "num_stages": 1},
    },
    "spread": {
        "half": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        "half_small": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        "interpret": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 256, "num_warps": 1, "num_stages": 1},
    },
    "pack": {
        "half": {"BLOCK_M": 64, "num_warps": 2},
        "half_small": {"BLOCK_M": 64, "num_warps": 4},
        "interpret": {"BLOCK_M": 128, "num_warps": 1},
    },
}
SPACE = {  # what may be tuned; see tuning.py. BLOCK_M divides TILE.
    "gather": {"BLOCK_M": [32, 64, 128], "BLOCK_K": [32, 64], "num_warps": [4, 8], "num_stages": [2, 3, 4]},
    "spread": {
        "BLOCK_M": [64, 128],
        "BLOCK_N": [64, 128, 256],
        "BLOCK_K": [32, 64],
        "num_warps": [4, 8],
        "num_stages": [3, 4, 5, 6],
    },
    "pack": {"BLOCK_M": [16, 32, 64, 128], "num_warps": [1, 2, 4, 8]},
}
MAX_TOP_K = 4
DENSE = 64  # last columns of all experts, see NOTE [Last columns]


def fits(N: int, H: int, E: int, TOP_K: int, dtype: torch.dtype) -> bool:
    """Whether a plan for projections in this dtype sorts by sets: those must be few and full."""
    S = math.comb(E, TOP_K)
    return dtype != torch.float32 and TOP_K <= MAX_TOP_K and H * E <= 64 and H * S <= 512 and TILE * S <= N


def serve(set_order: torch.Tensor, x: torch.Tensor, P: int) -> bool:
    """Whether these kernels serve a projection: its plan, maybe of another dtype's gate, sorts by sets, and tiles fit."""
    return set_order.numel() > 0 and x.dtype != torch.float32 and P <= 256


def joint(E: int, TOP_K: int) -> bool:
    """Whether `spread` takes all heads in one pass: tiles must not visit many experts that few of their rows chose."""
    return 3 * TOP_K >= E


def tables(N: int, H: int, E: int, TOP_K: int) -> tuple[int, int, int]:
    """At most how many tiles `gather` has, how many passes `spread` makes, and how many tokens it wants sorted."""
    together = joint(E, TOP_K)
    return cdiv(N * H, TILE) + H * math.comb(E, TOP_K), 1 if together else H, N if together else 0


def packed_shape(N: int, H: int, E: int, TOP_K: int, P: int) -> tuple[int, int]:
    """Of what `pack` returns: a block of rows for each tile and expert that it may visit. One head's tile, in the order of its
    sets, visits TOP_K experts and one more for each set that ends in it."""
    tiles = cdiv(N, TILE)
    blocks = tiles * H * E if joint(E, TOP_K) else H * (tiles * TOP_K + math.comb(E, TOP_K))
    width = first_columns(P, H * E)
    return blocks * TILE, width + -width % 32


def first_columns(P: int, HE: int) -> int:
    """How many of P columns go through the tiles of experts: all, or all but a few. See NOTE [Last columns]."""
    first = 1 << (P.bit_length() - 1)
    return first if first >= 64 and first < P and next_power_of_2(P - first, 1) * HE <= DENSE else P


# ---- jit helpers


@triton.jit
def _blocks(
    w, G: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The descriptor of w [G, ROWS, COLS] that `_weights` reads, where w is not one. See NOTE [Descriptors]."""
    if not w.dtype.is_ptr():
        return w
    elif TRANSPOSED:
        return tl.make_tensor_descriptor(w, [G, ROWS, COLS], [ROWS * COLS, COLS, 1], [1, BLOCK_P, BLOCK_K])
    else:
        return tl.make_tensor_descriptor(w, [G, ROWS, COLS], [ROWS * COLS, COLS, 1], [1, BLOCK_K, BLOCK_P])


@triton.jit
def _weights(desc, he, k, p, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    """W[he, k:, p:], [BLOCK_K, BLOCK_P]; TRANSPOSED: stored as [he, p, k]."""
    if TRANSPOSED:
        return desc.load([he, p, k]).reshape(BLOCK_P, BLOCK_K).T
    else:
        return desc.load([he, k, p]).reshape(BLOCK_K, BLOCK_P)


@triton.jit
def _at(ptr, row, cols, P: tl.constexpr):
    """Rows may be kept in 32 bits until here."""
    return ptr + row.to(tl.int64)[:, None] * P + cols[None, :]


@triton.jit
def _choice(e, row, mask_m, s_ptr, experts_ptr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """The gate and the route of expert e in each row: rows of one set list it in different orders."""
    s = tl.zeros((BLOCK_M,), tl.float32)
    route = row * TOP_K
    for j in tl.static_range(TOP_K):
        here = tl.load(experts_ptr + row * TOP_K + j, mask=mask_m, other=-1) == e
        s = tl.where(here, tl.load(s_ptr + row * TOP_K + j, mask=mask_m, other=0.0), s)
        route = tl.where(here, row * TOP_K + j, route)
    return s, route


@triton.jit
def _count(bits, HE: tl.constexpr):
    count = 0
    for i in tl.static_range(HE):
        count += ((bits >> i) & 1).to(tl.int32)
    return count


@triton.jit
def _lowest(bits):
    """The place of the lowest bit of an int64: the exponent of that bit as a float."""
    low = (bits & -bits).to(tl.float32)
    return ((low.to(tl.int32, bitcast=True) >> 23) & 255) - 127


# ---- kernels


@triton.jit
def _dense_kernel(
    x_ptr, w_ptr, y_ptr, N, D: tl.constexpr, C: tl.constexpr, stride_xn: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [N, C] = x [N, D] w^T, w [C, D]."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m, mask_c = (offs_m < N)[:, None], (offs_c < C)[:, None]
    x_ptrs, w_ptrs = x_ptr + offs_m[:, None] * stride_xn, w_ptr + offs_c[:, None] * D
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k in range(0, D, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + offs_k, mask=mask_m & (offs_k < D), other=0.0)
        w = tl.load(w_ptrs + offs_k, mask=mask_c & (offs_k < D), other=0.0)
        acc = tl.dot(x, tl.trans(w), acc)
    tl.store(y_ptr + offs_m[:, None] * C + offs_c[None, :], acc, mask=mask_m & (offs_c < C)[None, :])


@triton.jit
def _last_kernel(
    a_ptr, s_ptr, experts_ptr, b_ptr, N, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr,
    FIRST: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HE: tl.constexpr,
):  # fmt: skip
    """b[n, (h, e, r)] = the gate of expert e, 0 where it was not chosen, times a[n, h, FIRST + r]."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    he, r = tl.arange(0, BLOCK_HE)[None, :], tl.arange(0, R)[None, None, :]
    mask = (offs_n < N)[:, None] & (he < H * E)
    row = offs_n[:, None] * H + he // E
    s = tl.zeros((BLOCK_M, BLOCK_HE), tl.float32)
    for j in tl.static_range(TOP_K):
        here = tl.load(experts_ptr + row * TOP_K + j, mask=mask, other=-1) == he % E
        s = tl.where(here, tl.load(s_ptr + row * TOP_K + j, mask=mask, other=0.0), s)
    a_ptrs = a_ptr + row[:, :, None] * P + (FIRST + r)
    a = tl.load(a_ptrs, mask=mask[:, :, None] & (FIRST + r < P), other=0.0).to(tl.float32)
    b_ptrs = b_ptr + ((offs_n * (H * E))[:, None] + he)[:, :, None] * R + r
    tl.store(b_ptrs, (a * s[:, :, None]).to(b_ptr.dtype.element_ty), mask=mask[:, :, None])


@triton.jit
def _gather_kernel(
    x_ptr, w_desc, w_rest_desc, last_ptr, s_ptr, experts_ptr, v_ptr, u_ptr, a_ptr, dot_ptr, order_ptr, table_ptr,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, U: tl.constexpr,
    stride_xn: tl.constexpr, W_ROWS: tl.constexpr, W_COLS: tl.constexpr,
    TRANSPOSED: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """KEEP: u's first U columns are stored; DOT: u . a is. Columns are BLOCK_P and, where that is less than P, BLOCK_Q more, of
    which `last`, [N, H*E*BLOCK_Q] float32, has the products where it is given."""
    w_desc = _blocks(w_desc, H * E, W_ROWS, W_COLS, TRANSPOSED, BLOCK_K, BLOCK_P)
    if BLOCK_Q > 0 and last_ptr is None:
        w_rest_desc = _blocks(w_rest_desc, H * E, W_ROWS, W_COLS, TRANSPOSED, BLOCK_K, BLOCK_Q)
    tile = tl.program_id(0) // (TILE // BLOCK_M)
    table_ptr += tile * (3 + TOP_K)
    first = tl.load(table_ptr) + tl.program_id(0) % (TILE // BLOCK_M) * BLOCK_M
    end = tl.load(table_ptr + 1)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < end
    row = tl.load(order_ptr + offs_m, mask=mask_m, other=0)  # n*H + h
    if BLOCK_Q == 0:  # otherwise, with what is made of them, they would take all registers
        row = row.to(tl.int64)
    x_ptrs = x_ptr + (row // H).to(tl.int64)[:, None] * stride_xn
    offs_p = tl.arange(0, BLOCK_P)
    mask = mask_m[:, None] & (offs_p < P)[None, :]
    mask_u = mask_m[:, None] & (offs_p < U)[None, :]
    he = tl.load(table_ptr + 2) * E
    if BLOCK_Q > 0:
        offs_q = BLOCK_P + tl.arange(0, BLOCK_Q)
        mask_q = mask_m[:, None] & (offs_q < P)[None, :]
        mask_uq = mask_m[:, None] & (offs_q < U)[None, :]
    if DOT:
        a = tl.load(_at(a_ptr, row, offs_p, P), mask=mask, other=0.0)  # long before it is needed
    for j in tl.static_range(0, TOP_K, 2):  # two experts at a time
        e0 = tl.load(table_ptr + 3 + j)
        s0, route0 = _choice(e0, row, mask_m, s_ptr, experts_ptr, TOP_K, BLOCK_M)
        acc0 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        if BLOCK_Q > 0 and last_ptr is None:
            rest0 = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
        if j + 1 < TOP_K:
            e1 = tl.load(table_ptr + 4 + j)
            s1, route1 = _choice(e1, row, mask_m, s_ptr, experts_ptr, TOP_K, BLOCK_M)
            acc1 = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
            if BLOCK_Q > 0 and last_ptr is None:
                rest1 = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
        for k in range(0, D, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptrs + offs_k[None, :], mask=mask_m[:, None] & (offs_k < D)[None, :], other=0.0)
            acc0 = tl.dot(x, _weights(w_desc, he + e0, k, 0, TRANSPOSED, BLOCK_K, BLOCK_P), acc0)
            if j + 1 < TOP_K:
                acc1 = tl.dot(x, _weights(w_desc, he + e1, k, 0, TRANSPOSED, BLOCK_K, BLOCK_P), acc1)
            if BLOCK_Q > 0 and last_ptr is None:
                rest0 = tl.dot(x, _weights(w_rest_desc, he + e0, k, BLOCK_P, TRANSPOSED, BLOCK_K, BLOCK_Q), rest0)
                if j + 1 < TOP_K:
                    rest1 = tl.dot(x, _weights(w_rest_desc, he + e1, k, BLOCK_P, TRANSPOSED, BLOCK_K, BLOCK_Q), rest1)

        if last_ptr is not None:
            last_ptrs = _at(last_ptr, row // H, tl.arange(0, BLOCK_Q), H * E * BLOCK_Q)
            rest0 = tl.load(last_ptrs + (he + e0) * BLOCK_Q, mask=mask_m[:, None], other=0.0)
            if j + 1 < TOP_K:
                rest1 = tl.load(last_ptrs + (he + e1) * BLOCK_Q, mask=mask_m[:, None], other=0.0)
        if DOT:
            dot0 = tl.sum(a.to(tl.float32) * acc0, axis=1)
            if j + 1 < TOP_K:
                dot1 = tl.sum(a.to(tl.float32) * acc1, axis=1)
            if BLOCK_Q > 0:
                a_rest = tl.load(_at(a_ptr, row, offs_q, P), mask=mask_q, other=0.0).to(tl.float32)
                dot0 += tl.sum(a_rest * rest0, axis=1)
                if j + 1 < TOP_K:
                    dot1 += tl.sum(a_rest * rest1, axis=1)
            tl.store(dot_ptr + route0, dot0, mask=mask_m)
            if j + 1 < TOP_K:
                tl.store(dot_ptr + route1, dot1, mask=mask_m)
        if KEEP:
            tl.store(_at(u_ptr, route0, offs_p, U), acc0.to(u_ptr.dtype.element_ty), mask=mask_u)
            if BLOCK_Q > 0:
                tl.store(_at(u_ptr, route0, offs_q, U), rest0.to(u_ptr.dtype.element_ty), mask=mask_uq)
            if j + 1 < TOP_K:
                tl.store(_at(u_ptr, route1, offs_p, U), acc1.to(u_ptr.dtype.element_ty), mask=mask_u)
                if BLOCK_Q > 0:
                    tl.store(_at(u_ptr, route1, offs_q, U), rest1.to(u_ptr.dtype.element_ty), mask=mask_uq)
        if j == 0:
            v = acc0 * s0[:, None]
            if BLOCK_Q > 0:
                v_rest = rest0 * s0[:, None]
        else:
            v += acc0 * s0[:, None]
            if BLOCK_Q > 0:
                v_rest += rest0 * s0[:, None]
        if j + 1 < TOP_K:
            v += acc1 * s1[:, None]
            if BLOCK_Q > 0:
                v_rest += rest1 * s1[:, None]
    tl.store(_at(v_ptr, row, offs_p, P), v.to(v_ptr.dtype.element_ty), mask=mask)
    if BLOCK_Q > 0:
        tl.store(_at(v_ptr, row, offs_q, P), v_rest.to(v_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _pack_kernel(
    a_ptr, u_ptr, s_ptr, experts_ptr, order_ptr, visited_ptr, rank_ptr, packed_ptr, order_b_ptr, dot_ptr, N,
    PASSES: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr, U: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A block of packed rows: the gate of one expert times the a of each row of a tile, or 0. With u, of U columns,
    order_b[the route's rank] = the route's row and dot[route] = u[route] . a."""
    experts: tl.constexpr = H * E // PASSES  # that a tile may visit
    parts: tl.constexpr = TILE // BLOCK_M
    pid = tl.program_id(0)
    tile = (tl.num_programs(0) - 1 - pid) // (experts * parts)  # the first last: `spread` then finds them in the cache
    i = pid // parts % experts
    bits = tl.load(visited_ptr + tile * 2)
    if (bits >> i) & 1 == 0:
        return
    tiles = (N + TILE - 1) // TILE
    offs_m = pid % parts * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % tiles * TILE + offs_m  # of the pass
    mask_m = offs_n < N
    row = tl.load(order_ptr + tile // tiles * N + offs_n, mask=mask_m, other=0).to(tl.int64)  # n*H + h
    if PASSES == 1:
        row = row * H + i // E
    s = tl.zeros((BLOCK_M,), tl.float32)
    j = tl.full((BLOCK_M,), TOP_K, tl.int32)
    for choice in tl.static_range(TOP_K):
        here = mask_m & (tl.load(experts_ptr + row * TOP_K + choice, mask=mask_m, other=-1) == i % E)
        s = tl.where(here, tl.load(s_ptr + row * TOP_K + choice, mask=mask_m, other=0.0), s)
        j = tl.where(here, choice, j)
    chosen = j < TOP_K
    route = row * TOP_K + j
    block = tl.load(visited_ptr + tile * 2 + 1) + _count(bits & ((tl.full((), 1, tl.int64) << i) - 1), experts)
    place = block * TILE + offs_m
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for p in tl.static_range(0, WIDTH, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask = chosen[:, None] & (offs_p < P)[None, :]
        a = tl.load(a_ptr + row[:, None] * P + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        if u_ptr is not None:
            u = tl.load(u_ptr + route[:, None] * U + offs_p[None, :], mask=mask & (offs_p < U)[None, :], other=0.0).to(tl.float32)
            dot += tl.sum(u * a, axis=1)
        tl.store(packed_ptr + place[:, None] * WIDTH + offs_p[None, :], (a * s[:, None]).to(packed_ptr.dtype.element_ty))
    if u_ptr is not None and P > WIDTH:  # see NOTE [Last columns]
        offs_p = WIDTH + tl.arange(0, BLOCK_R)
        mask = chosen[:, None] & (offs_p < P)[None, :]
        a = tl.load(a_ptr + row[:, None] * P + offs_p[None, :], mask=mask, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + route[:, None] * U + offs_p[None, :], mask=mask & (offs_p < U)[None, :], other=0.0).to(tl.float32)
        dot += tl.sum(tl.fma(u, a, 0.0), axis=1)
    if u_ptr is not None:
        tl.store(dot_ptr + route, dot, mask=chosen)
        tl.store(order_b_ptr + tl.load(rank_ptr + route, mask=chosen, other=0), place.to(tl.int32), mask=chosen)


@triton.jit
def _store_sum(
    acc, t, y_ptr, base_ptr, order_ptr, N, DIV: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y = base + acc in tile t -> its tokens."""
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    offs_m, offs_n = t // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), t % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.load(order_ptr + offs_m, mask=offs_m < N, other=0) // DIV
    mask = (offs_m < N)[:, None] & (offs_n < D)[None, :]
    if base_ptr is not None:
        acc += tl.load(_at(base_ptr, n, offs_n, D), mask=mask, other=0.0).to(tl.float32)
    tl.store(_at(y_ptr, n, offs_n, D), acc.to(y_ptr.dtype.element_ty), mask=mask)
    return n


@triton.jit
def _spread_kernel(
    packed_desc, w_desc, y_ptr, base_ptr, b_ptr, c_ptr, order_ptr, visited_ptr, N,
    HE: tl.constexpr, E: tl.constexpr, DIV: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    G: tl.constexpr, W_ROWS: tl.constexpr, W_COLS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
    MANY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = base + b c + the sparse product, base and b c [N, C] [C, D] where given. MANY: several tiles a program, no b c; see
    NOTE [One loop]."""
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    parts: tl.constexpr = TILE // BLOCK_M * tiles_n  # tiles here of a tile of the tables
    w_desc = _blocks(w_desc, G, W_ROWS, W_COLS, TRANSPOSED, BLOCK_K, BLOCK_N)
    if packed_desc.dtype.is_ptr():
        packed_desc = tl.make_tensor_descriptor(packed_desc, [1 << 30, P], [P, 1], [BLOCK_M, BLOCK_K])
    programs, tiles = tl.num_programs(0), (N + TILE - 1) // TILE * parts
    t = tl.program_id(0)
    first = tl.load(order_ptr) % DIV * E if DIV > 1 else 0  # expert of the pass
    bits = tl.load(visited_ptr + t // parts * 2)
    block = tl.load(visited_ptr + t // parts * 2 + 1).to(tl.int32)
    visits = _count(bits, HE)
    if MANY:
        for start in range(t + programs, tiles, 32 * programs):
            later = start + tl.arange(0, 32) * programs
            visits += tl.sum(_count(tl.load(visited_ptr + later // parts * 2, mask=later < tiles, other=0), HE))
        later_ptr = visited_ptr + tl.minimum(t + programs, tiles - 1) // parts * 2
        later_bits, later_block = tl.load(later_ptr), tl.load(later_ptr + 1).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_m, offs_n = t // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M), t % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if not MANY and base_ptr is not None:
        n = tl.load(order_ptr + offs_m, mask=offs_m < N, other=0) // DIV
        mask = (offs_m < N)[:, None] & (offs_n < D)[None, :]
        base = tl.load(_at(base_ptr, n, offs_n, D), mask=mask, other=0.0)  # long before it is needed
    for column in tl.static_range(0, C, BLOCK_C):
        offs_c = column + tl.arange(0, BLOCK_C)
        n = tl.load(order_ptr + offs_m, mask=offs_m < N, other=0) // DIV
        b = tl.load(_at(b_ptr, n, offs_c, C), mask=(offs_m < N)[:, None] & (offs_c < C)[None, :], other=0.0)
        c = tl.load(c_ptr + offs_c[:, None] * D + offs_n[None, :], mask=(offs_c < C)[:, None] & (offs_n < D)[None, :], other=0.0)
        acc = tl.dot(b, c, acc)
    if not MANY and base_ptr is not None and D % 8 > 0:  # in so narrow pieces it takes too many registers to wait in
        acc += base.to(tl.float32)
    k = 0
    for _ in range(visits * ((P + BLOCK_K - 1) // BLOCK_K)):
        a = packed_desc.load([block * TILE + t // tiles_n * BLOCK_M % TILE, k])
        w = _weights(w_desc, first + _lowest(bits), k, t % tiles_n * BLOCK_N, TRANSPOSED, BLOCK_K, BLOCK_N)
        acc = tl.dot(a, w, acc)
        k += BLOCK_K
        through = k >= P  # with this expert
        k = tl.where(through, 0, k)
        bits = tl.where(through, bits & (bits - 1), bits)
        block = tl.where(through, block + 1, block)
        if MANY:
            done = bits == 0
            if done:
                n = _store_sum(acc, t, y_ptr, base_ptr, order_ptr, N, DIV, D, BLOCK_M, BLOCK_N)
                acc = tl.where((n < 0)[:, None], acc, 0.0)
            t = tl.where(done, t + programs, t)
            bits = tl.where(done, later_bits, bits)
            block = tl.where(done, later_block, block)
            later_ptr = visited_ptr + tl.minimum(t + programs, tiles - 1) // parts * 2
            later_bits, later_block = tl.load(later_ptr), tl.load(later_ptr + 1).to(tl.int32)
    if not MANY:
        if base_ptr is not None and D % 8 == 0:
            acc += base.to(tl.float32)
        _store_sum(acc, t, y_ptr, None, order_ptr, N, DIV, D, BLOCK_M, BLOCK_N)


# ---- launchers


def capability(x: torch.Tensor) -> int:
    """Of x's device, or of the one that is compiled for: 9 for sm_90, 0 for AMD."""
    if x.is_meta:
        target = triton.runtime.driver.active.get_current_target()
        return target.arch // 10 if target.backend == "cuda" else 0
    return 0 if torch.version.hip else torch.cuda.get_device_capability(x.device)[0]


def _programs(x: torch.Tensor, size: int) -> int:
    """About how many tiles of that size Hopper works at."""
    return _multiprocessors(x.device) * max(1, 128 * 256 // size)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _config(name: str, x: torch.Tensor) -> dict[str, int]:
    """Hopper and the Blackwell of data centres hold the large tiles; others spill them or have 64 to 100 KB of shared memory."""
    if INTERPRET:
        return dict(CONFIGS[name]["interpret"])
    return dict(CONFIGS[name]["half" if capability(x) in (9, 10) else "half_small"])


def _padded(w: torch.Tensor, transposed: bool) -> torch.Tensor:
    """w [H*E, D, P] (or transposed, [H*E, P, D]), P a multiple of 32, D of 8, starting on 16 bytes; see NOTE [Descriptors]."""
    rows, cols = (-w.shape[1] % 32, -w.shape[2] % 8) if transposed else (0, -w.shape[2] % 32)
    if rows or cols:
        w = torch.nn.functional.pad(w, (0, cols, 0, rows))
    elif w.stride()[1:] != (w.shape[2], 1) or w.stride(0) % w.shape[2]:  # the first rows of each expert may stay where they are
        w = w.contiguous()
    return w.clone() if w.data_ptr() % 16 else w


def _descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor | torch.Tensor:
    """x itself where kernels make the descriptor. See NOTE [Descriptors]."""
    return TensorDescriptor.from_tensor(x, block) if INTERPRET or capability(x) >= 9 else x


def _weight_descriptor(w: torch.Tensor, transposed: bool, block_k: int, block_n: int) -> TensorDescriptor | torch.Tensor:
    return _descriptor(w, [1, block_n, block_k] if transposed else [1, block_k, block_n])


def gather(x, w, transposed, s, experts, order, table, P, a=None, keep=0):
    """x [N, D], w [H*E, D, P or more] (or transposed, [H*E, P or more, D]), s and experts [N, H, TOP_K], the rows n*H + h in the
    order of their sets and a plan's tiles of them -> v [N, H, P] and the first `keep` columns of u, [N*H*TOP_K, keep]; with
    a [N, H, P] the dots u . a instead, float32 [N*H*TOP_K]."""
    x, ((N, D), (H, TOP_K)) = rows(x), (x.shape, experts.shape[1:])
    first, E, last = first_columns(P, w.shape[0]), w.shape[0] // H, None
    if first < P:
        last = _dense(x, _last_rows(w, transposed, first, next_power_of_2(P - first, 1)))
        w = w[:, :first] if transposed else w[:, :, :first]
    w = _padded(w, transposed)
    v = x.new_empty(N, H, P)
    u = x.new_empty(N * H * TOP_K, keep)
    dot = x.new_empty(0 if a is None else N * H * TOP_K, dtype=torch.float32)
    config = _config("gather", x)
    BLOCK_P, BLOCK_Q = columns(first)
    few = (BLOCK_P + BLOCK_Q) * min(TOP_K, 2) <= 192  # columns: two tiles fit on one multiprocessor
    if few and config["BLOCK_M"] == 128 and not INTERPRET:
        config["num_warps"], config["num_stages"] = 4, 3
    if BLOCK_P + BLOCK_Q > 128:  # as much shared memory as there is
        config["num_stages"] = min(config["num_stages"], 3)
    if BLOCK_P > 128 or TOP_K > 2:  # the sum of the first two waits in registers
        config["BLOCK_M"], config["num_stages"] = min(config["BLOCK_M"], 64), min(config["num_stages"], 3)
    if BLOCK_Q and BLOCK_P == 64:  # for the registers of what there is twice; 128 + 16 columns, TOP_K 4, lose: 306 to 372 us
        config["BLOCK_M"], config["BLOCK_K"] = min(config["BLOCK_M"], 64), config["BLOCK_K"] // 2
    if keep % 8 and not INTERPRET:  # u in pieces: 128 rows of it spill. P 82, D 412, E 10: 158 us, not 253; P 41 104, not 120
        config["BLOCK_M"] = min(config["BLOCK_M"], 64)
    if last is not None and keep and config["BLOCK_M"] == 128 and not INTERPRET:  # 8 warps spill: 187 us in place of 208
        config |= {"num_warps": 16} if capability(x) == 9 else {"BLOCK_M": 64}
    flags = {"transposed": transposed, "keep": keep > 0, "dot": a is not None}
    config = tuning.lookup(_gather_kernel, config, x, (N,), H=H, E=E, TOP_K=TOP_K, K=D, P=P, **flags)
    w_desc = _weight_descriptor(w, transposed, config["BLOCK_K"], BLOCK_P)
    launch(
        _gather_kernel, (table.shape[0] * (TILE // config["BLOCK_M"]),),
        x, w_desc, _weight_descriptor(w, transposed, config["BLOCK_K"], BLOCK_Q) if BLOCK_Q else w_desc, last,
        s, experts, v, u, v if a is None else a.contiguous(), dot, order, table,
        H=H, E=E, TOP_K=TOP_K, D=D, P=P, U=keep, stride_xn=x.stride(0), W_ROWS=w.stride(0) // w.stride(1), W_COLS=w.shape[2],
        TRANSPOSED=transposed, KEEP=keep > 0, DOT=a is not None, TILE=TILE,
        BLOCK_P=BLOCK_P, BLOCK_Q=BLOCK_Q if last is None else last.shape[1] // (H * E), **config,
    )  # fmt: skip
    return v, u if a is None else dot


def _last_rows(w, transposed, first, R):
    """R columns of w [H*E, D, P] (or transposed, [H*E, P, D]) from `first` on, zeros beyond P, as rows [H*E*R, D]."""
    some = w[:, first : first + R] if transposed else w[:, :, first : first + R].transpose(1, 2)
    missing = R - some.shape[1]
    return (torch.nn.functional.pad(some, (0, 0, 0, missing)) if missing else some).flatten(0, 1)


def _dense(x, w):
    """x [N, D], w [C, D] -> x w^T, [N, C] float32."""
    (N, D), C = x.shape, w.shape[0]
    y = x.new_empty(N, C, dtype=torch.float32)
    block = 256 if INTERPRET else 64
    tile = dict(BLOCK_M=block, BLOCK_K=block, BLOCK_C=next_power_of_2(C), num_warps=4, num_stages=4)
    launch(_dense_kernel, (cdiv(N, block),), x, w.contiguous(), y, N, D, C, x.stride(0), **tile)
    return y


def last(a, s, experts, E):
    """a [N, H, P], s and experts [N, H, TOP_K] -> what `spread` multiplies with the last columns of w, [N, H*E*R] in a's dtype;
    None without such columns."""
    (N, H, TOP_K), P = experts.shape, a.shape[2]
    first = first_columns(P, H * E)
    if first == P:
        return None
    R = next_power_of_2(P - first, 1)
    b, block = a.new_empty(N, H * E * R), 256 if INTERPRET else 32
    meta = dict(H=H, E=E, TOP_K=TOP_K, P=P, FIRST=first, R=R, BLOCK_M=block, BLOCK_HE=next_power_of_2(H * E), num_warps=4)
    launch(_last_kernel, (cdiv(N, block),), a, s, experts, b, N, **meta)
    return b


def columns(P: int) -> tuple[int, int]:
    """P columns as one power of two, or as two where that wastes much less."""
    whole = next_power_of_2(P)
    half = whole // 2
    rest = next_power_of_2(P - half) if half < P else 0
    return (half, rest) if half >= 64 and 4 * rest <= half and not INTERPRET else (whole, 0)


def pack(a, s, experts, E, set_order, token_order, visited, rank=None, u=None):
    """a [N, H, P], s and experts [N, H, TOP_K], of a plan -> packed [rows, P padded], what `spread` reads; with rank and u
    [N*H*TOP_K, P or less] also the packed rows in the order of the experts, int32, and the dots u . a, float32, [N*H*TOP_K]."""
    (N, H, TOP_K), P, together = experts.shape, a.shape[2], joint(E, experts.shape[2])
    packed = a.new_empty(packed_shape(N, H, E, TOP_K, P))
    order_b = experts.new_empty(0 if u is None else N * H * TOP_K)
    dot = a.new_empty(order_b.shape, dtype=torch.float32)
    config = _config("pack", a)
    if u is not None:  # twice the rows
        config |= {} if INTERPRET else {"BLOCK_M": 16, "num_warps": 4}
    config = tuning.lookup(_pack_kernel, config, a, (N,), H=H, E=E, TOP_K=TOP_K, P=P, dot=u is not None)
    launch(
        _pack_kernel, (visited.shape[0] * (H * E if together else E) * (TILE // config["BLOCK_M"]),),
        a, u, s, experts, token_order if together else set_order, visited, rank, packed, order_b, dot, N,
        PASSES=1 if together else H, H=H, E=E, TOP_K=TOP_K, P=P, U=P if u is None else u.shape[1], WIDTH=packed.shape[1],
        TILE=TILE, BLOCK_P=packed.shape[1] & -packed.shape[1], BLOCK_R=next_power_of_2(max(P - packed.shape[1], 0), 1), **config,
    )  # fmt: skip
    return packed, order_b, dot


def _spread(packed, visited, w, transposed, order, heads, HE, y, base, b, c):
    """Packed rows, padded w [H*E, P, D] (or transposed, [H*E, D, P]), the order and experts of a pass -> y [N, D], filled in."""
    (N, D), P, C = y.shape, packed.shape[1], 0 if b is None else b.shape[1]
    config = _config("spread", packed)
    if heads == 1 and config["BLOCK_N"] == 256 and not INTERPRET:  # short sums: two tiles on one multiprocessor
        config |= {"BLOCK_N": 128, "num_warps": 4}
    if P % config["BLOCK_K"]:
        config["BLOCK_K"], config["num_stages"] = 32, config["num_stages"] + (3 if config["num_warps"] == 8 else 1)
    config["BLOCK_N"] = min(config["BLOCK_N"], next_power_of_2(D))
    flags = {"heads": heads, "C": C, "base": base is not None, "transposed": transposed}
    config = tuning.lookup(_spread_kernel, config, packed, (N,), HE=HE, N=D, K=P, **flags)
    tiles = visited.shape[0] * (TILE // config["BLOCK_M"]) * cdiv(D, config["BLOCK_N"])
    many = C == 0 and (heads > 1 or D % 8 == 0) and (INTERPRET or capability(packed) == 9)  # see NOTE [One loop]
    launch(
        _spread_kernel, (min(tiles, _programs(packed, config["BLOCK_M"] * config["BLOCK_N"])) if many else tiles,),
        _descriptor(packed, [config["BLOCK_M"], config["BLOCK_K"]]),
        _weight_descriptor(w, transposed, config["BLOCK_K"], config["BLOCK_N"]), y, base, b, c, order, visited, N,
        HE=HE, E=HE // heads, DIV=w.shape[0] // HE, P=P, D=D, C=C, G=w.shape[0],
        W_ROWS=w.stride(0) // w.stride(1), W_COLS=w.shape[2], TRANSPOSED=transposed, TILE=TILE,
        MANY=many, BLOCK_C=min(64, next_power_of_2(C)), **config,
    )  # fmt: skip


def spread(packed, last, w, transposed, H, TOP_K, set_order, token_order, visited):
    """What `pack` and `last` returned, w [H*E, P, D] (or transposed, [H*E, D, P]), a plan's orders -> y [N, D]."""
    E, D, first = w.shape[0] // H, w.shape[1 if transposed else 2], packed.shape[1]
    more = None
    if last is not None:
        more = _last_rows(w, not transposed, first, last.shape[1] // (H * E)).contiguous()
        w = w[:, :, :first] if transposed else w[:, :first]
    w = _padded(w, not transposed)
    N = set_order.shape[0] // H
    y = packed.new_empty(N, D)
    if joint(E, TOP_K):
        _spread(packed, visited, w, transposed, token_order, H, H * E, y, None, last, more)
        return y
    base = None
    for order, tiles in zip(set_order.view(H, N), visited.view(H, -1, 2), strict=True):  # a head's rows in the order of its sets
        _spread(packed, tiles, w, transposed, order, 1, E, y, base, last, more)
        base, last, more = y, None, None
    return y
