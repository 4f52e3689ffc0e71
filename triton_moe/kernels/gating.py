"""sigma-MoE gating: which experts each (token, head) uses, how much, and the orders in which their work is done.

    logits[n,h,e] = sum_d x[n,d] sel[h*E+e,d]                               float32
    experts[n,h,:] = the TOP_K largest logits, in descending order
    weights[n,h,j] = gate(logits[n,h,:])[experts[n,h,j]]                    sigmoid, softmax, or softmax over the chosen

    d logit = d weight * gate * (1 - gate) for a chosen expert, 0 elsewhere (sigmoid);  selection is not differentiated

Csordas, Irie, Schmidhuber 2023 (arXiv 2310.10837), equation 10 and section 5; SwitchHead (arXiv 2312.07987), equations 7 to 9.
A layer may have several gates on the same x, its sides: they are computed in one pass over x.

NOTE [Selection key]
    Ties, NaN and expert dropout are one total order: those that survived dropout come first, then the larger logit (-0 as +0,
    NaN below -inf), then the lower expert id. A logit's key is its float32 bits made monotonic, an int32. Selection is TOP_K
    times the largest key left and the lowest id that has it; with dropout, the largest of those that survived as long as there
    is one. One taken, or past E, has a key below all others. Ids are therefore unique and in range whatever the logits hold.
    The chosen logits come back from their keys, so that gates are computed of TOP_K logits and not of all.
    On an H200 (N = 32768, D = 1024, E = 128, TOP_K = 8) the launch takes 46 us, and 60 in the same tiles with one int64 key of
    all three and the gates of all logits, which need all registers there are. For 8 heads of E 4, TOP_K 2 it takes 26, without
    the choice and its gates 22. Tiles of 128 rows take 28 to 29, of 32 rows 27 to 35, loads of one part of d at a time 26 to 29,
    programs that stay for several tiles 27 to 29, x marked as not needed again 26.

NOTE [Cast]
    Under autocast x comes in float32. The launch that reads it for the gate also writes the 16-bit copy that everything else
    reads, and multiplies those rounded values, so it chooses what it would choose after a cast. On an H200 (N = 32768, D = 1024)
    it takes 62 us for two sides of H 4, E 4, where the cast and the gate take 72; 67 and 77 for E = 64; 83 and 95 for E = 128;
    36 and 40 for H 2, E 5, D = 412. To read and write alone takes 48. The cast stays apart with more than MAX_CAST_COLUMNS
    columns (E = 155, D = 412: 123 and 111), where several programs read the same rows (two sides of H 4, E 10: 109 and 88), and
    under torch.compile, which joins it with what stands before it. Tiles are the same with and without it, but for stages.
    Sums over twice as many columns of x (BLOCK_D 128) would save 2 us more, but truncate more; tiles of 32 rows cost 10 to 20.

NOTE [Batch invariance]
    The gate's matrix product is ours and sums over d in one fixed order, so a token's choice does not depend on its batch.
    The two products of the backward pass are plain GEMMs and go to torch.

NOTE [Partial sums]
    Tensor cores truncate when they add to their accumulator, and a long float32 sum loses digits however it is rounded. So a
    few tiles of the sum over d are accumulated apart, and those partial sums are then added in float32. On an H200 the largest
    error of bfloat16 logits at D = 1024 was three times that of a float32 product without this, and is within twice with it.

NOTE [Counting sort]
    The routing plan is three stable sorts of every side: the routes by expert, the (token, head) rows by the set of experts that
    they chose, the tokens by their signature (sets.py says what these are for). Keys are few, so all sorts are counted, in the
    same three launches: how often each key occurs in each chunk of tokens; the sums over the chunks before each; each item's
    place, which is where its key begins, what the earlier chunks hold of it, and its rank among its like in the chunk. The last
    launch also writes what sets.py wants to know of each tile. Two launches with large chunks, in which every program adds up the
    counts of all chunks itself, need so many registers that they took twice the time.
    A set's key is its rank in the revolving-door order (Knuth, The Art of Computer Programming 4A, 7.2.1.3, algorithm R), in
    which neighbours differ in one expert. A signature's digits are the ranks of the heads, and a digit runs backwards where the
    digits before it make an odd number (reflected Gray code), so neighbouring signatures differ in one expert too. Signatures
    are divided until MAX_SIGNATURES are left. For 4 heads, 2 of 4 experts and N = 32768, a tile of 64 tokens then holds 10.1
    different experts of all heads in the mean, of 128 tokens 10.7; lexicographic ranks in full give 10.6 and 11.3. An
    order of the last two heads' sets that was found by annealing takes a hundredth off.

NOTE [Ranks]
    An item's rank among its like in the chunk is how many of the earlier items have its key: a sum along a row for each expert,
    comparisons of items with items for sets and signatures. On an H200 (N = 32768, two sides, a graph) the plan takes 21.5 us
    for H 4, E 4, TOP_K 2, 24 for H 4, E 10, TOP_K 2, and 28 for H 2, E 8, TOP_K 4. With a row for each set too: 22, 44 and 43
    (the last two by 16 rows). By 16 rows 24, 26 and 28; with four warps too, 31, 33 and 29, and chunks of 128 tokens 28, 30
    and 29. Ranks made by the first launch, so that the last only adds, took the first from 5 to 19 us and more (by comparisons,
    products with a triangular matrix, sums of packed counters), and left 10 of the last. Counts at the end of the gate's own
    launch made that 4 us longer, and all together 1 us shorter. For one side of H 8, E 4, TOP_K 2 the three launches take 5, 3
    and 12.4 us. The last with a word of 8-bit counters for each (token, head), scanned over the tokens, in place of rows and
    comparisons, and a third as many programs: 13.5 to 14.9, with 2 to 8 warps and chunks of 32 to 128 tokens up to 22; for E 10
    16.8 to 29 where it takes 15.7. Of that, the routes alone took 14.2, whose 2^19 places are scattered either in `order` or in
    `rank`: a quarter of the routes, without `rank`, takes 4.
    With 65 to 128 experts a row each would be too many: a chunk of ROUTES routes is compared with itself. E 128, TOP_K 8: 24 us,
    by torch.sort 38 in 15 launches; chunks of 64 and 256 routes 37 and 32; E 387, TOP_K 16: 57 and 59, so that is sorted.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuning
from . import sets
from .cast import cast
from .common import INTERPRET, cdiv, default_config, launch, next_power_of_2, opaque, rows, uniform
from .sets import _lowest

MAX_EXPERTS = 1024  # per head: one tile holds all logits of a head
MAX_SIGNATURES = 512
MAX_COLUMNS = 64  # of logits a program of several heads computes
MAX_CAST_COLUMNS = 128  # of logits a program that also casts x computes
MAX_COUNTED = 64  # experts of all heads, for a row each
MAX_COMPARED, MAX_ROUTES = 128, 1 << 19  # experts of all heads, and routes, for comparisons of routes with routes
NAN, TAKEN = tl.constexpr(1 - 2**31), tl.constexpr(-(2**31))  # selection keys, below those of all other logits
CHUNK, ROWS = 64, 8  # tokens of a side that a program of the plan takes, and how many experts
ROUTES = 128  # that a program takes where they are compared

CONFIGS = {
    "gating_fwd": {
        "half": {"BLOCK_N": 64, "BLOCK_D": 64, "PARTS": 2, "num_warps": 4, "num_stages": 4},
        "float32": {"BLOCK_N": 32, "BLOCK_D": 32, "PARTS": 2, "num_warps": 4, "num_stages": 2},
        "interpret": {"BLOCK_N": 512, "BLOCK_D": 64, "PARTS": 2, "num_warps": 1, "num_stages": 1},
    },
}
SPACE = {  # what may be tuned; see tuning.py
    "gating_fwd": {"BLOCK_N": [16, 32, 64], "BLOCK_D": [16, 32, 64], "num_warps": [4, 8], "num_stages": [2, 3, 4]},
}


class Plan(NamedTuple):
    """The orders of one side's routes r = (n*H + h)*TOP_K + j, int32.

    order: [N*H*TOP_K], the routes sorted by expert h*E + e and then by themselves; offsets: [H*E + 1], where each expert's begin;
    rank: [N*H*TOP_K], each route's place in that order. set_order: [N*H], the rows n*H + h sorted by head and chosen set;
    set_tiles: [tiles, 3 + TOP_K], of each tile of a set its first row in that order, the end of its set, its head and experts;
    token_order: [N], the tokens sorted by the sets of all heads; visited: [tiles, 2] int64, of each tile of tokens (or of rows
    of a head) its experts, a bit each, and the number of its first block of packed rows (sets.py). rank and token_order are
    empty where heads go one by one, all but the first two where nobody needs them.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    rank: torch.Tensor
    set_order: torch.Tensor
    set_tiles: torch.Tensor
    token_order: torch.Tensor
    visited: torch.Tensor


@triton.jit
def _selection_key(logits, offs_e, E):
    """int32, see NOTE [Selection key]."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    key = tl.where(logits != logits, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(offs_e < E, key, TAKEN)


@triton.jit
def _logit(key):
    """What has this key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return tl.where(key == NAN, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _normalizer(logits, axis: tl.constexpr):
    """(largest, total): the softmax is exp(logits - largest) / total."""
    largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=axis, keep_dims=True)
    return largest, tl.sum(tl.exp(logits - largest), axis=axis, keep_dims=True)


@triton.jit
def _gating_fwd_kernel(
    x_ptr, sel_ptr, seed_ptr, logits_ptr, weights_ptr, experts_ptr, copy_ptr,
    N, D: tl.constexpr, stride_xn: tl.constexpr, stride_se: tl.constexpr, dropout,
    SIDES: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, MODE: tl.constexpr, STREAM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HEADS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (SIDES * H + HEADS - 1) // HEADS  # HEADS heads a program, counted through all sides
    pid = tl.program_id(0).to(tl.int64)
    offs_n = (pid // groups) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    head0 = (pid % groups).to(tl.int32) * HEADS

    columns = tl.arange(0, HEADS * BLOCK_E)
    column_head = head0 + columns // BLOCK_E
    column_e = columns % BLOCK_E
    mask_c = (column_head < SIDES * H) & (column_e < E)
    x_ptrs = x_ptr + offs_n[:, None] * stride_xn
    sel_ptrs = sel_ptr + (column_head * E + column_e).to(tl.int64)[None, :] * stride_se
    logits = tl.zeros((BLOCK_N, HEADS * BLOCK_E), tl.float32)
    for d in range(0, D, PARTS * BLOCK_D):
        part = tl.zeros((BLOCK_N, HEADS * BLOCK_E), tl.float32)  # see NOTE [Partial sums]
        for i in tl.static_range(PARTS):
            offs_d = d + i * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_x = mask_n[:, None] & (offs_d < D)[None, :]
            x = tl.load(x_ptrs + offs_d[None, :], mask=mask_x, other=0.0)
            if copy_ptr is not None:
                x = x.to(copy_ptr.dtype.element_ty)
                tl.store(copy_ptr + offs_n[:, None] * D + offs_d[None, :], x, mask=mask_x)  # `groups` is 1
            sel = tl.load(sel_ptrs + offs_d[:, None], mask=mask_c[None, :] & (offs_d < D)[:, None], other=0.0)
            part = tl.dot(x, sel, part, input_precision="ieee")  # logits are never rounded below float32
        logits += part

    logits = tl.reshape(logits, (BLOCK_N, HEADS, BLOCK_E))
    head = head0 + tl.arange(0, HEADS)
    side, h = head // H, head % H
    row = (side.to(tl.int64)[None, :] * N + offs_n[:, None]) * H + h[None, :]  # of the outputs [SIDES, N, H, ...]
    mask_r = mask_n[:, None] & (head < SIDES * H)[None, :]
    offs_e = tl.arange(0, BLOCK_E)[None, None, :]
    tl.store(logits_ptr + row[:, :, None] * E + offs_e, logits, mask=mask_r[:, :, None] & (offs_e < E))

    if HAS_DROPOUT:
        column = (h * E)[None, :, None] + offs_e
        u = uniform(tl.load(seed_ptr), offs_n.to(tl.int32)[:, None, None], column, (STREAM + side)[None, :, None])
        survived = u >= dropout
    else:
        survived = None
    key = _selection_key(logits, offs_e, E)
    if MODE == "softmax":
        largest, total = _normalizer(tl.where(offs_e < E, logits, float("-inf")), 2)

    offs_k = tl.arange(0, BLOCK_K)[None, None, :]
    keys = tl.full((BLOCK_N, HEADS, BLOCK_K), TAKEN, tl.int32)  # of the chosen
    experts = tl.zeros((BLOCK_N, HEADS, BLOCK_K), tl.int32)
    for j in range(TOP_K):
        left = key
        if HAS_DROPOUT:
            left = tl.where(survived, key, TAKEN)
            left = tl.where(tl.max(left, axis=2)[:, :, None] == TAKEN, key, left)
        best = tl.max(left, axis=2)[:, :, None]
        e = tl.min(tl.where(left == best, offs_e, BLOCK_E), axis=2)[:, :, None]
        key = tl.where(offs_e == e, TAKEN, key)
        keys = tl.where(offs_k == j, best, keys)
        experts = tl.where(offs_k == j, e, experts)

    chosen = _logit(keys)
    if MODE == "sigmoid":
        weights = tl.sigmoid(chosen)
    else:
        if MODE == "softmax_topk":
            largest, total = _normalizer(tl.where(offs_k < TOP_K, chosen, float("-inf")), 2)
        weights = tl.exp(chosen - largest) / total
    mask_k = mask_r[:, :, None] & (offs_k < TOP_K)
    tl.store(experts_ptr + row[:, :, None] * TOP_K + offs_k, experts, mask=mask_k)
    tl.store(weights_ptr + row[:, :, None] * TOP_K + offs_k, weights, mask=mask_k)


@triton.jit
def _gating_bwd_kernel(
    dweights_ptr, weights_ptr, experts_ptr, logits_ptr, dlogits_in_ptr, dlogits_ptr, N, M,
    stride_n: tl.constexpr, COLUMN: tl.constexpr, SIDES: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
    TOP_K: tl.constexpr, MODE: tl.constexpr, HAS_DLOGITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (token, side, head), as d logits is laid out
    mask_m = offs_m < M
    n, head = offs_m // (SIDES * H), offs_m % (SIDES * H)
    row = (head // H * N + n) * H + head % H  # (side, token, head), as everything else is
    offs_e = tl.arange(0, BLOCK_E)
    mask = mask_m[:, None] & (offs_e < E)[None, :]
    offs = row[:, None] * E + offs_e[None, :]

    dgate = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)  # d weight, scattered to the experts
    gate = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    inner = tl.zeros((BLOCK_M,), tl.float32)  # sum_j d weight_j weight_j
    # Unrolled, the loads do not wait for one another: on an H200 9.2 us in place of 16.2 for E 128, TOP_K 8, 2.3 of 3.4 for
    # E 32, TOP_K 4, 62 of 84 for E 387, TOP_K 16.
    for j in tl.range(0, TOP_K, loop_unroll_factor=min(TOP_K, 8)):
        e = tl.load(experts_ptr + row * TOP_K + j, mask=mask_m, other=0)
        w = tl.load(weights_ptr + row * TOP_K + j, mask=mask_m, other=0.0)
        dw = tl.load(dweights_ptr + row * TOP_K + j, mask=mask_m, other=0.0)
        here = offs_e[None, :] == e[:, None]
        dgate = tl.where(here, dw[:, None], dgate)
        gate = tl.where(here, w[:, None], gate)
        inner += dw * w

    if MODE == "sigmoid":
        dlogits = dgate * gate * (1.0 - gate)
    else:
        if MODE == "softmax":  # the gates of all experts, not only the chosen
            logits = tl.load(logits_ptr + offs, mask=mask, other=float("-inf"))
            largest, total = _normalizer(logits, 1)
            gate = tl.exp(logits - largest) / total
        dlogits = gate * (dgate - inner[:, None])
    if HAS_DLOGITS:
        dlogits += tl.load(dlogits_in_ptr + offs, mask=mask, other=0.0)
    dlogits_ptrs = dlogits_ptr + (n * stride_n + COLUMN + head * E)[:, None] + offs_e[None, :]
    tl.store(dlogits_ptrs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


# ---- the plan, see NOTE [Counting sort]


@triton.jit
def _binomial(n, k: tl.constexpr):
    """C(n, k) for small k."""
    c = n * 0 + 1
    for i in tl.static_range(k):
        c = c * (n - i) // (i + 1)
    return c


@triton.jit
def _set_rank(experts_ptrs, mask, TOP_K: tl.constexpr, SETS: tl.constexpr):
    """The rank of each set of TOP_K experts in the revolving-door order."""
    rank = tl.zeros(mask.shape, tl.int32) - TOP_K % 2
    for j in tl.static_range(TOP_K):
        e = tl.load(experts_ptrs + j, mask=mask, other=0)
        smaller = tl.zeros(mask.shape, tl.int32)
        for i in tl.static_range(TOP_K):
            smaller += (tl.load(experts_ptrs + i, mask=mask, other=0) < e).to(tl.int32)
        for i in tl.static_range(TOP_K):
            term = _binomial(e + 1, i + 1) * (1 - (TOP_K - 1 - i) % 2 * 2)
            rank += tl.where(smaller == i, term, 0)
    return tl.minimum(tl.maximum(rank, 0), SETS - 1)  # experts by hand may repeat


@triton.jit
def _plan_count_kernel(
    experts_ptr, keys_ptr, counts_ptr, N, chunks,
    BY_SETS: tl.constexpr, JOINT: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SORTED_HEADS: tl.constexpr, DIVISOR: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """counts[side, chunk]: how many of the chunk's items have each key; keys[side]: set ranks [N, H], then signatures [N]."""
    route_blocks: tl.constexpr = (H * E + ROWS - 1) // ROWS
    problems: tl.constexpr = route_blocks + 1 if BY_SETS else route_blocks
    chunk = tl.program_id(0) // problems % chunks
    problem = tl.program_id(0) % problems
    side = (tl.program_id(0) // problems // chunks).to(tl.int64)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = n < N
    experts_ptr += side * N * (H * TOP_K)
    counts_ptr += (side * chunks + chunk) * COLUMNS
    if problem < route_blocks:
        row = problem * ROWS + tl.arange(0, ROWS)
        mask_row = row < H * E
        count = tl.zeros((ROWS, CHUNK), tl.int32)
        for j in tl.static_range(TOP_K):
            e_ptrs = experts_ptr + (n[None, :] * H + (row // E)[:, None]) * TOP_K + j
            e = tl.load(e_ptrs, mask=mask_row[:, None] & mask[None, :], other=-1)
            count += (e == (row % E)[:, None]).to(tl.int32)
        tl.store(counts_ptr + row, tl.sum(count, axis=1), mask=mask_row)
    elif BY_SETS:
        keys_ptr += side * N * (H + 1)
        for column in tl.static_range(H * E, COLUMNS, 128):
            offs_k = column + tl.arange(0, 128)
            tl.store(counts_ptr + offs_k, tl.zeros((128,), tl.int32), mask=offs_k < COLUMNS)
        tl.debug_barrier()
        h = tl.arange(0, BLOCK_H)[None, :]
        item = n[:, None] * H + h
        mask_h = mask[:, None] & (h < H)
        rank = _set_rank(experts_ptr + item * TOP_K, mask_h, TOP_K, SETS)
        tl.store(keys_ptr + item, rank, mask=mask_h)
        tl.atomic_add(counts_ptr + H * E + h * SETS + rank, 1, mask=mask_h, sem="relaxed")
        if JOINT:
            signature = tl.zeros((CHUNK,), tl.int32)
            for i in tl.static_range(SORTED_HEADS):
                digit = tl.sum(tl.where(h == i, rank, 0), axis=1)
                signature = signature * SETS + tl.where(signature % 2 == 1, SETS - 1 - digit, digit)
            signature = signature // DIVISOR
            tl.store(keys_ptr + N * H + n, signature, mask=mask)
            tl.atomic_add(counts_ptr + H * (E + SETS) + signature, 1, mask=mask, sem="relaxed")


@triton.jit
def _plan_sum_kernel(
    counts_ptr, totals_ptr, visited_ptr, N, chunks,
    JOINT: tl.constexpr, HE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each count becomes the sum of the chunks before its own; totals[side] are the sums of all.

    JOINT: visited[side] is made ready for `_plan_place_kernel`: no experts yet, and each tile's first block of packed rows."""
    blocks: tl.constexpr = (COLUMNS + BLOCK_K - 1) // BLOCK_K
    side = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < COLUMNS
    total = tl.zeros((BLOCK_K,), tl.int32)
    for c in range(0, chunks, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask = (offs_c < chunks)[:, None] & mask_k[None, :]
        ptrs = counts_ptr + (side * chunks + offs_c)[:, None] * COLUMNS + offs_k[None, :]
        count = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, axis=0)
    tl.store(totals_ptr + side * COLUMNS + offs_k, total, mask=mask_k)
    if JOINT:
        tiles = (N + TILE - 1) // TILE
        for t in range(block * BLOCK_C, tiles, blocks * BLOCK_C):
            tile = t + tl.arange(0, BLOCK_C)
            visited_ptrs = visited_ptr + (side * tiles + tile) * 2
            tl.store(visited_ptrs, tile.to(tl.int64) * 0, mask=tile < tiles)
            tl.store(visited_ptrs + 1, tile.to(tl.int64) * HE, mask=tile < tiles)


@triton.jit
def _first_place(totals_ptr, row, KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Where the items of key `row` begin."""
    offs_k = tl.arange(0, BLOCK_KEYS)
    total = tl.load(totals_ptr + offs_k, mask=offs_k < KEYS, other=0)
    return tl.sum(tl.where(offs_k[None, :] < row[:, None], total[None, :], 0), axis=1)


@triton.jit
def _place(key, mask, counts_ptr, totals_ptr, KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Of a chunk's items: where their key begins, and how many earlier ones have it, in the chunks before and in this."""
    offs_k = tl.arange(0, BLOCK_KEYS)
    total = tl.load(totals_ptr + offs_k, mask=offs_k < KEYS, other=0)
    before = tl.load(counts_ptr + key, mask=mask, other=0)
    size: tl.constexpr = key.shape[0]
    offs = tl.arange(0, size)
    # Of the same key and earlier: key * size + place is from key * size to less than the item's own, in one comparison.
    apart = (key * size + offs)[:, None] - (key * size)[None, :]
    earlier = apart.to(tl.uint32, bitcast=True) < offs.to(tl.uint32)[None, :]
    return tl.gather(tl.cumsum(total, 0) - total, key, 0) + before + tl.sum(earlier.to(tl.int32), axis=0)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _tables(
    totals_ptr, set_tiles_ptr, visited_ptr, N, program, programs, set_tiles,
    JOINT: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of set_tiles the i-th tiles of all sets and, unless JOINT, of visited those of all heads; i is program, + programs, .."""
    head_tiles = (N + TILE - 1) // TILE
    if (program >= head_tiles) & (program > 0):
        return
    offs = tl.arange(0, BLOCK_H * BLOCK_S)
    h, s = offs // BLOCK_S, offs % BLOCK_S
    count = tl.load(totals_ptr + h * SETS + s, mask=(h < H) & (s < SETS), other=0)
    end = tl.cumsum(count, 0)
    tiles = (count + TILE - 1) // TILE
    bits = tl.zeros((BLOCK_H * BLOCK_S,), tl.int64)  # the experts of each set
    rest = s
    for j in tl.static_range(TOP_K):  # the set of that rank, its largest expert first
        e = rest * 0
        for smaller in tl.static_range(1, E):
            e += (_binomial(rest * 0 + smaller, TOP_K - j) <= rest).to(tl.int32)
        rest = _binomial(e + 1, TOP_K - j) - 1 - rest
        bits |= tl.full(bits.shape, 1, tl.int64) << e.to(tl.int64)
    for i in range(program, head_tiles, programs):
        here = i < tiles
        # Tiles that are equally far in their sets stand together: they read the same tokens at about the same time.
        entry = tl.sum(tl.minimum(tiles, i), 0) + tl.cumsum(here.to(tl.int32), 0) - 1
        entry_ptrs = set_tiles_ptr + entry * (3 + TOP_K)
        tl.store(entry_ptrs, end - count + i * TILE, mask=here)
        tl.store(entry_ptrs + 1, end, mask=here)
        tl.store(entry_ptrs + 2, h, mask=here)
        left = bits
        for j in tl.static_range(TOP_K):
            tl.store(entry_ptrs + 3 + j, _lowest(left), mask=here)
            left = left & (left - 1)
        if not JOINT:
            first = h * N + i * TILE
            inside = (end - count < tl.minimum(first + TILE, h * N + N)) & (end > first) & (count > 0)
            used = tl.reduce(tl.reshape(tl.where(inside, bits, 0), (BLOCK_H, BLOCK_S)), 1, _or)
            rank = tl.min(tl.reshape(tl.where(inside, s, SETS), (BLOCK_H, BLOCK_S)), axis=1)
            head = tl.arange(0, BLOCK_H)
            visited_ptrs = visited_ptr + (head * head_tiles + i) * 2
            tl.store(visited_ptrs, used, mask=head < H)
            block = head * (head_tiles * TOP_K + SETS) + i * TOP_K + rank
            tl.store(visited_ptrs + 1, block.to(tl.int64), mask=head < H)
    if program == 0:  # up to the grid's bound
        entry = tl.sum(tiles, 0) + offs
        for column in tl.static_range(3 + TOP_K):
            tl.store(set_tiles_ptr + entry * (3 + TOP_K) + column, offs * 0, mask=entry < set_tiles)


@triton.jit
def _plan_place_kernel(
    experts_ptr, keys_ptr, counts_ptr, totals_ptr,
    order_ptr, offsets_ptr, rank_ptr, set_order_ptr, set_tiles_ptr, token_order_ptr, visited_ptr, N, chunks, set_tiles,
    BY_SETS: tl.constexpr, JOINT: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SIGNATURES: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_HE: tl.constexpr, BLOCK_SIGNATURES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write each item of the chunk to its place, and what a tile of each set (and head) is."""
    route_blocks: tl.constexpr = (H * E + ROWS - 1) // ROWS
    set_blocks: tl.constexpr = H if BY_SETS else 0
    problems: tl.constexpr = route_blocks + set_blocks + (2 if JOINT else 1) if BY_SETS else route_blocks
    chunk = tl.program_id(0) // problems % chunks
    problem = tl.program_id(0) % problems
    side = (tl.program_id(0) // problems // chunks).to(tl.int64)
    offs = tl.arange(0, CHUNK)
    n = chunk * CHUNK + offs
    mask = n < N
    experts_ptr += side * N * (H * TOP_K)
    keys_ptr += side * N * (H + 1)
    counts_ptr += (side * chunks + chunk) * COLUMNS
    totals_ptr += side * COLUMNS
    if problem < route_blocks:
        row = problem * ROWS + tl.arange(0, ROWS)
        mask_row = row < H * E
        mask_tile = mask_row[:, None] & mask[None, :]
        count = tl.zeros((ROWS, CHUNK), tl.int32)
        first_route = (n[None, :] * H + (row // E)[:, None]) * TOP_K
        for j in tl.static_range(TOP_K):
            e = tl.load(experts_ptr + first_route + j, mask=mask_tile, other=-1)
            count += (e == (row % E)[:, None]).to(tl.int32)
        begin = _first_place(totals_ptr, row, H * E, BLOCK_HE)
        base = begin + tl.load(counts_ptr + row, mask=mask_row, other=0)
        place = base[:, None] + tl.cumsum(count, 1) - count
        order_ptr += side * N * (H * TOP_K)
        rank_ptr += side * N * (H * TOP_K)
        for j in tl.static_range(TOP_K):
            e = tl.load(experts_ptr + first_route + j, mask=mask_tile, other=-1)
            here = e == (row % E)[:, None]
            tl.store(order_ptr + place, first_route + j, mask=here)
            if JOINT:
                tl.store(rank_ptr + first_route + j, place, mask=here)
            place += here.to(tl.int32)
        if chunk == 0:
            offsets_ptr += side * (H * E + 1)
            tl.store(offsets_ptr + row, begin, mask=mask_row)
            tl.store(offsets_ptr + H * E, N * (H * TOP_K))
    elif problem < route_blocks + set_blocks:
        h = problem - route_blocks
        key = tl.load(keys_ptr + n * H + h, mask=mask, other=0)
        place = _place(key, mask, counts_ptr + H * E + h * SETS, totals_ptr + H * E + h * SETS, SETS, BLOCK_S)
        tl.store(set_order_ptr + (side * H + h) * N + place, n * H + h, mask=mask)
    elif BY_SETS and problem == route_blocks + set_blocks:
        tiles = (N + TILE - 1) // TILE
        set_tiles_ptr += side * set_tiles * (3 + TOP_K)
        visited_ptr += side * tiles * (2 if JOINT else 2 * H)
        _tables(
            totals_ptr + H * E, set_tiles_ptr, visited_ptr, N, chunk, chunks, set_tiles,
            JOINT, H, E, TOP_K, SETS, BLOCK_H, BLOCK_S, TILE,
        )  # fmt: skip
    elif JOINT:
        key = tl.load(keys_ptr + N * H + n, mask=mask, other=0)
        bits = tl.zeros((CHUNK,), tl.int64)
        for r in tl.static_range(H * TOP_K):
            e = tl.load(experts_ptr + n * (H * TOP_K) + r, mask=mask, other=0)
            bits |= tl.full((CHUNK,), 1, tl.int64) << (r // TOP_K * E + e).to(tl.int64)
        first: tl.constexpr = H * (E + SETS)
        place = _place(key, mask, counts_ptr + first, totals_ptr + first, SIGNATURES, BLOCK_SIGNATURES)
        tl.store(token_order_ptr + side * N + place, n, mask=mask)
        visited_ptr += side * ((N + TILE - 1) // TILE) * 2
        tl.atomic_or(visited_ptr + place // TILE * 2, bits, mask=mask, sem="relaxed")


@triton.jit
def _key_of_route(experts_ptr, routes, mask, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr):
    """Its expert, counted through all heads."""
    return tl.load(experts_ptr + routes, mask=mask, other=0) + routes // TOP_K % H * E


@triton.jit
def _routes_count_kernel(
    experts_ptr, counts_ptr, R, chunks, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_HE: tl.constexpr,
):  # fmt: skip
    """counts[side, chunk]: how many of the chunk's routes each expert has."""
    side = (tl.program_id(0) // chunks).to(tl.int64)
    routes = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    mask = routes < R
    key = _key_of_route(experts_ptr + side * R, routes, mask, H, E, TOP_K)
    offs = tl.arange(0, BLOCK_HE)
    count = tl.histogram(tl.where(mask, key, BLOCK_HE - 1), BLOCK_HE)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * (H * E) + offs, count, mask=offs < H * E)


@triton.jit
def _routes_place_kernel(
    experts_ptr, counts_ptr, totals_ptr, order_ptr, offsets_ptr, R, chunks,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HE: tl.constexpr,
):  # fmt: skip
    """Write each of the chunk's routes to its place."""
    side, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    routes = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = routes < R
    key = _key_of_route(experts_ptr + side * R, routes, mask, H, E, TOP_K)
    counts_ptr += tl.program_id(0).to(tl.int64) * (H * E)
    totals_ptr += side * (H * E)
    tl.store(order_ptr + side * R + _place(key, mask, counts_ptr, totals_ptr, H * E, BLOCK_HE), routes, mask=mask)
    if chunk == 0:
        offs = tl.arange(0, BLOCK_HE)
        end = tl.cumsum(tl.load(totals_ptr + offs, mask=offs < H * E, other=0), 0)
        offsets_ptr += side * (H * E + 1)
        tl.store(offsets_ptr + 1 + offs, end, mask=offs < H * E)
        tl.store(offsets_ptr, 0)


# ---- launchers


def _gating_forward_fake(x, sel, seed, sides, n_heads, top_k, mode, dropout, stream):
    N, E = x.shape[0], sel.shape[0] // (sides * n_heads)
    return (
        x.new_empty(sides, N, n_heads, top_k, dtype=torch.float32),
        x.new_empty(sides, N, n_heads, top_k, dtype=torch.int32),
        x.new_empty(sides, N, n_heads, E, dtype=torch.float32),
    )


@opaque(_gating_forward_fake)
def gating_forward(
    x: torch.Tensor, sel: torch.Tensor, seed: torch.Tensor | None, sides: int, n_heads: int, top_k: int, mode: str,
    dropout: float, stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [N, D], sel [sides*H*E, D] -> weights [sides, N, H, TOP_K], experts [sides, N, H, TOP_K], logits [sides, N, H, E].

    Side s draws its dropout from stream + s.
    """
    return _gating_forward(x, sel, seed, sides, n_heads, top_k, mode, dropout, stream, None)


def cast_and_gate(
    x: torch.Tensor, sel: torch.Tensor, seed: torch.Tensor | None, sides: int, n_heads: int, *options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gating_forward` of x in sel's dtype, and that x too; see NOTE [Cast]."""
    C, E = sides * n_heads, sel.shape[0] // (sides * n_heads)
    HEADS, BLOCK_E = _heads_of_a_program(C, E)
    narrows = x.dtype == torch.float32 and sel.dtype != torch.float32
    together = narrows and HEADS >= C and HEADS * BLOCK_E <= MAX_CAST_COLUMNS
    # A compiler joins the cast with what stands next to it, and the interpreter does not round to bfloat16.
    if not together or torch.compiler.is_compiling() or (INTERPRET and sel.dtype == torch.bfloat16):
        x = cast(x, sel.dtype)
        return *gating_forward(x, sel, seed, sides, n_heads, *options), x
    copy = x.new_empty(x.shape, dtype=sel.dtype)
    return *_gating_forward(x, sel, seed, sides, n_heads, *options, copy), copy


def _heads_of_a_program(C: int, E: int) -> tuple[int, int]:
    """Of C heads of all sides how many a program takes, and to how many columns of each the experts are filled up."""
    BLOCK_E = next_power_of_2(E, 1)
    HEADS = min(next_power_of_2(C, 1), max(1, MAX_COLUMNS // BLOCK_E))
    return max(HEADS, 16 // BLOCK_E), BLOCK_E  # `tl.dot` takes no less than 16 columns


def _gating_forward(x, sel, seed, sides, n_heads, top_k, mode, dropout, stream, copy):
    """Also writes x to `copy` in that one's dtype, unless it is None."""
    x, sel = rows(x), rows(sel)
    N, D = x.shape
    H, E = n_heads, sel.shape[0] // (sides * n_heads)
    weights, experts, logits = _gating_forward_fake(x, sel, seed, sides, n_heads, top_k, mode, dropout, stream)
    config = default_config(CONFIGS["gating_fwd"], sel.dtype)
    HEADS, BLOCK_E = _heads_of_a_program(sides * H, E)
    columns = HEADS * BLOCK_E
    config["num_stages"] = min(config["num_stages"], 2 if columns > 64 else 3 if columns > 32 else 4)
    if columns > 64 and not INTERPRET:  # a tile of logits stays within the registers, one of sel within shared memory
        # elsewhere than on Hopper 64 rows of 128 logits spill: with dropout, or of a float32 x that is cast here
        large = sel.dtype != torch.float32 and sets.capability(sel) == 9
        least, most = 8 if sel.dtype == torch.float32 else 16, 8192 if large else 4096
        config["BLOCK_N"] = max(least, min(config["BLOCK_N"], most // columns))
        config["BLOCK_D"] = max(16, min(config["BLOCK_D"], 8192 // columns))
        if sel.dtype == torch.float32 or columns > 512:
            config["num_warps"], config["num_stages"] = 8, 1
    # No sizes: a choice of experts may not depend on how many tokens there are, nor, under autocast, on who casts x.
    config = tuning.lookup(_gating_fwd_kernel, config, sel, C=sides * H, E=E, TOP_K=top_k, D=D)
    if copy is not None:  # a tile of x takes twice the shared memory
        config["num_stages"] = min(config["num_stages"], 3)
    launch(
        _gating_fwd_kernel, (cdiv(N, config["BLOCK_N"]) * cdiv(sides * H, HEADS),),
        x, sel, seed if seed is not None else experts, logits, weights, experts, copy,
        N, D, x.stride(0), sel.stride(0), dropout,
        SIDES=sides, H=H, E=E, TOP_K=top_k, MODE=mode, STREAM=stream, HAS_DROPOUT=dropout > 0,
        HEADS=HEADS, BLOCK_E=BLOCK_E, BLOCK_K=next_power_of_2(top_k, 1), **config,
    )  # fmt: skip
    return weights, experts, logits


def _gating_backward(out, column, dweights, dlogits, weights, experts, logits, E, mode):
    sides, N, H, TOP_K = experts.shape
    BLOCK_E = next_power_of_2(E, 1)
    BLOCK_M = 512 if INTERPRET else max(1, 1024 // BLOCK_E)
    launch(
        _gating_bwd_kernel, (cdiv(N * sides * H, BLOCK_M),),
        dweights.contiguous(), weights, experts, logits, None if dlogits is None else dlogits.contiguous(), out,
        N, N * sides * H, out.stride(0), column,
        SIDES=sides, H=H, E=E, TOP_K=TOP_K, MODE=mode, HAS_DLOGITS=dlogits is not None,
        BLOCK_M=BLOCK_M, BLOCK_E=BLOCK_E, num_warps=4,
    )  # fmt: skip


def _gating_backward_fake(dweights, dlogits, x, sel, weights, experts, logits, mode):
    return x.new_empty(x.shape[0], sel.shape[0]), sel.new_empty(sel.shape)


@opaque(_gating_backward_fake)
def gating_backward(
    dweights: torch.Tensor, dlogits: torch.Tensor | None, x: torch.Tensor, sel: torch.Tensor, weights: torch.Tensor,
    experts: torch.Tensor, logits: torch.Tensor | None, mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """d weights [sides, N, H, TOP_K], d logits [sides, N, H, E] or None -> all of d logits, [N, sides*H*E] in x's dtype, and
    d sel [sides*H*E, D]. Only of mode "softmax" are logits read.

    d x = d logits sel is left to the caller, who mostly has something to add it to.
    """
    total = x.new_empty(x.shape[0], sel.shape[0])
    sides, _, H, _ = experts.shape
    _gating_backward(total, 0, dweights, dlogits, weights, experts, logits, sel.shape[0] // (sides * H), mode)
    return total, total.t() @ x


@opaque(lambda *_: None, mutates=("out",))
def gating_backward_(
    out: torch.Tensor, column: int, dweights: torch.Tensor, dlogits: torch.Tensor | None, weights: torch.Tensor,
    experts: torch.Tensor, n_experts: int,
) -> None:  # fmt: skip
    """All of d logits of sigmoid gates, written to sides*H*E columns of `out` [N, ...] from `column` on.

    A compiler would copy `out` first if it were only the part with these columns.
    """
    _gating_backward(out, column, dweights, dlogits, weights, experts, None, n_experts, "sigmoid")


def plan_shapes(N: int, H: int, E: int, TOP_K: int, by_sets: bool) -> tuple[tuple[int, ...], ...]:
    """Of the fields of a Plan."""
    entries, passes, tokens = sets.tables(N, H, E, TOP_K) if by_sets else (0, 0, 0)
    rows = N * H if by_sets else 0
    return (
        (N * H * TOP_K,),
        (H * E + 1,),
        (tokens * H * TOP_K,),
        (rows,),
        (entries, 3 + TOP_K),
        (tokens,),
        (passes * cdiv(N, sets.TILE), 2),
    )


def _routing_plan_fake(experts, n_experts, by_sets):
    sides, N, H, TOP_K = experts.shape
    *ints, visited = plan_shapes(N, H, n_experts, TOP_K, by_sets)
    return *(experts.new_empty(sides, *shape) for shape in ints), experts.new_empty(sides, *visited, dtype=torch.int64)


@opaque(_routing_plan_fake)
def routing_plan(
    experts: torch.Tensor, n_experts: int, by_sets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """experts [sides, N, H, TOP_K] -> the fields of a Plan, each with the sides as another first axis. Nothing visits the host.

    `by_sets`: whether to sort by sets too, of which there must be few (sets.py).
    """
    experts = experts.contiguous()
    sides, N, H, TOP_K = experts.shape
    plan = _routing_plan_fake(experts, n_experts, by_sets)
    HE = H * n_experts
    if HE > MAX_COUNTED:
        few = HE <= MAX_COMPARED and N * H * TOP_K <= MAX_ROUTES
        return *(_compared_routes if few else _sorted_routes)(experts, n_experts), *plan[2:]
    S, heads, joint = (math.comb(n_experts, TOP_K), H, sets.joint(n_experts, TOP_K)) if by_sets else (1, 1, False)
    while heads > 1 and S**heads >= 2**31:  # as many heads as fit an int32: any order is right
        heads -= 1
    divisor = cdiv(S**heads, MAX_SIGNATURES)
    signatures = cdiv(S**heads, divisor) if joint else 0
    columns = HE + (H * S + signatures if by_sets else 0)
    chunks = max(cdiv(N, CHUNK), 1)
    counts, totals = experts.new_empty(sides, chunks, columns), experts.new_empty(sides, columns)
    keys = experts.new_empty(sides, N * (H + 1)) if by_sets else counts
    meta = {
        "BY_SETS": by_sets, "JOINT": joint, "H": H, "E": n_experts, "TOP_K": TOP_K, "SETS": S, "COLUMNS": columns,
        "CHUNK": CHUNK, "ROWS": ROWS, "BLOCK_H": next_power_of_2(H, 1), "num_warps": 2,
    }  # fmt: skip
    blocks = cdiv(HE, ROWS)
    launch(
        _plan_count_kernel, (sides * chunks * (blocks + by_sets),),
        experts, keys, counts, N, chunks, SORTED_HEADS=heads, DIVISOR=divisor, **meta,
    )  # fmt: skip
    _sum_counts(counts, totals, plan[6], N, joint, HE)
    launch(
        _plan_place_kernel, (sides * chunks * (blocks + (H + 1 + joint if by_sets else 0)),),
        experts, keys, counts, totals, *plan, N, chunks, plan[4].shape[1],
        SIGNATURES=signatures, TILE=sets.TILE, BLOCK_HE=next_power_of_2(HE), BLOCK_S=next_power_of_2(S, 1),
        BLOCK_SIGNATURES=next_power_of_2(signatures), **meta,
    )  # fmt: skip
    return plan


def _sum_counts(counts, totals, visited, N, joint, HE):
    sides, chunks, columns = counts.shape
    launch(
        _plan_sum_kernel, (sides * cdiv(columns, 8),),
        counts, totals, visited, N, chunks, JOINT=joint, HE=HE, COLUMNS=columns, TILE=sets.TILE, BLOCK_C=512, BLOCK_K=8,
    )  # fmt: skip


def _compared_routes(experts, n_experts):
    """order and offsets, without a row for each expert."""
    sides, N, H, TOP_K = experts.shape
    R, HE = N * H * TOP_K, H * n_experts
    chunks = max(cdiv(R, ROUTES), 1)
    order, offsets = experts.new_empty(sides, R), experts.new_empty(sides, HE + 1)
    counts, totals = experts.new_empty(sides, chunks, HE), experts.new_empty(sides, HE)
    meta = {"H": H, "E": n_experts, "TOP_K": TOP_K, "CHUNK": ROUTES, "BLOCK_HE": next_power_of_2(HE + 1), "num_warps": 4}
    launch(_routes_count_kernel, (sides * chunks,), experts, counts, R, chunks, **meta)
    _sum_counts(counts, totals, totals, N, False, HE)
    launch(_routes_place_kernel, (sides * chunks,), experts, counts, totals, order, offsets, R, chunks, **meta)
    return order, offsets


def _sorted_routes(experts, n_experts):
    """order and offsets by torch.sort, which is faster where experts or routes are many."""
    sides, N, H, TOP_K = experts.shape
    R, HE = N * H * TOP_K, H * n_experts
    heads = torch.arange(sides * H, device=experts.device, dtype=torch.int32).view(sides, 1, H, 1) * n_experts
    dtype = torch.uint8 if sides * HE <= 255 else torch.int16 if sides * HE <= 32767 else torch.int32  # fewer bytes, fewer passes
    expert, order = torch.sort((experts + heads).reshape(-1).to(dtype), stable=True)
    groups = torch.arange(sides * HE + 1, device=experts.device, dtype=dtype)
    order, offsets = order.to(torch.int32).view(sides, R), torch.searchsorted(expert, groups, out_int32=True)
    if sides == 1:
        return order, offsets[None]
    first = torch.arange(sides, device=experts.device, dtype=torch.int32)[:, None] * R
    return order - first, offsets.unfold(0, HE + 1, HE) - first
