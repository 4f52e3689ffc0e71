"""sigma-MoE gating: which experts each (token, head) uses, how much, and the orders in which their work is done.

    logits[n,h,e] = sum_d x[n,d] sel[h*E+e,d]                               float32
    experts[n,h,:] = the TOP_K largest logits, in descending order
    weights[n,h,j] = gate(logits[n,h,:])[experts[n,h,j]]                    sigmoid, softmax, or softmax over the chosen

    d logit = d weight * gate * (1 - gate) for a chosen expert, 0 elsewhere (sigmoid);  selection is not differentiated

Csordas, Irie, Schmidhuber 2023 (arXiv 2310.10837), equation 10 and section 5; SwitchHead (arXiv 2312.07987), equations 7 to 9.
A layer may have several gates on the same x, its sides: they are computed in one pass over x.

NOTE [Selection key]
    Ties, NaN and expert dropout are one total order, so selection is TOP_K times the maximum of an int64 key, which is unique:
    bit 48 = the expert survived dropout; bits 16..47 = the logit's float32 bits made monotonic (-0 as +0; NaN below -inf);
    bits 0..15 = the lower expert id wins. A key already taken, or past E, is -1. Ids are therefore unique and in range whatever
    the logits hold.

NOTE [Batch invariance]
    The gate's matrix product is ours and sums over d in one fixed order, so a token's choice does not depend on its batch.
    The two products of the backward pass are plain GEMMs and go to torch.

NOTE [Partial sums]
    Tensor cores truncate when they add to their accumulator, and a long float32 sum loses digits however it is rounded. So a
    few tiles of the sum over d are accumulated apart, and those partial sums are then added in float32. On an H200 the largest
    error of bfloat16 logits at D = 1024 was three times that of a float32 product without this, and is within twice with it.

NOTE [Counting sort]
    The routing plan is three stable sorts of every side: the routes by expert, the (token, head) rows by the set of experts that
    they chose, the tokens by their signature (sets.py says what these are for). Each head is a problem of its own, as its items
    have their fixed place, and all problems share two launches: the first counts the keys of each chunk of tokens, the second
    adds up the counts of all chunks before its own and places the chunk's items in turn. Keys are computed from the experts
    whenever they are needed; they are never stored.
    A set's key is its rank in the revolving-door order (Knuth, The Art of Computer Programming 4A, 7.2.1.3, algorithm R), in
    which neighbours differ in one expert. A signature's digits are the ranks of the heads, and a digit runs backwards where the
    digits before it make an odd number (reflected Gray code), so neighbouring signatures differ in one expert too. Signatures
    are divided until MAX_SIGNATURES are left. For 4 heads, 2 of 4 experts and N = 32768, a tile of 64 tokens then holds 10.1
    different experts of all heads in the mean, of 128 tokens 10.7; lexicographic ranks in full give 10.6 and 11.3.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuning
from .common import INTERPRET, cdiv, launch, next_power_of_2, opaque, rows, uniform

MAX_EXPERTS = 1024  # per head: one tile holds all logits of a head
MAX_SIGNATURES = 512
MAX_COLUMNS = 64  # of logits a program of several heads computes
FEW_KEYS = tl.constexpr(32)  # sorted with a column of counts a key; more by comparing items
CHUNKS, MIN_CHUNK = 64, 128  # of the tokens of a side: every program of the second launch reads the counts of all

CONFIGS = {
    "gating_fwd": {
        "half": {"BLOCK_N": 64, "BLOCK_D": 64, "PARTS": 2, "num_warps": 4, "num_stages": 3},
        "float32": {"BLOCK_N": 32, "BLOCK_D": 32, "PARTS": 2, "num_warps": 4, "num_stages": 2},
        "interpret": {"BLOCK_N": 512, "BLOCK_D": 64, "PARTS": 2, "num_warps": 1, "num_stages": 1},
    },
}


PLAN_CONFIG = {"FEW": 512, "MANY": 128, "TILE": 8192, "num_warps": 4}


class Plan(NamedTuple):
    """The orders of one side's routes r = (n*H + h)*TOP_K + j, int32.

    order: [N*H*TOP_K], the routes sorted by expert h*E + e and then by themselves; offsets: [H*E + 1], where each expert's begin.
    set_order: [N*H], the rows n*H + h sorted by head and chosen set; set_offsets: [H*C(E, TOP_K) + 1]; token_order: [N], the
    tokens sorted by the sets of all heads. The last three are empty where nobody needs them.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    set_order: torch.Tensor
    set_offsets: torch.Tensor
    token_order: torch.Tensor


@triton.jit
def _selection_key(logits, offs_e, E, survived):
    """int64, of the logits' shape, see NOTE [Selection key]."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648  # [0, 2**32), monotonic
    ordered = tl.where(logits != logits, 0, ordered)
    key = (survived.to(tl.int64) << 48) | (ordered << 16) | (65535 - offs_e)
    return tl.where(offs_e < E, key, -1)


@triton.jit
def _softmax(logits, axis: tl.constexpr):
    largest = tl.max(tl.where(logits == logits, logits, float("-inf")), axis=axis, keep_dims=True)
    gate = tl.exp(logits - largest)
    return gate / tl.sum(gate, axis=axis, keep_dims=True)


@triton.jit
def _gating_fwd_kernel(
    x_ptr, sel_ptr, seed_ptr, logits_ptr, weights_ptr, experts_ptr,
    N, D: tl.constexpr, stride_xn: tl.constexpr, stride_se: tl.constexpr, dropout,
    SIDES: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, MODE: tl.constexpr, STREAM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HEADS: tl.constexpr, BLOCK_E: tl.constexpr,
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
            x = tl.load(x_ptrs + offs_d[None, :], mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)
            sel = tl.load(sel_ptrs + offs_d[:, None], mask=mask_c[None, :] & (offs_d < D)[:, None], other=0.0)
            part = tl.dot(x, sel, part, input_precision="ieee")  # logits are never rounded below float32
        logits += part

    logits = tl.reshape(logits, (BLOCK_N, HEADS, BLOCK_E))
    head = head0 + tl.arange(0, HEADS)
    side, h = head // H, head % H
    row = (side[None, :] * N.to(tl.int64) + offs_n[:, None]) * H + h[None, :]  # of the outputs [SIDES, N, H, ...]
    mask_r = mask_n[:, None] & (head < SIDES * H)[None, :]
    offs_e = tl.arange(0, BLOCK_E)[None, None, :]
    tl.store(logits_ptr + row[:, :, None] * E + offs_e, logits, mask=mask_r[:, :, None] & (offs_e < E))

    if HAS_DROPOUT:
        column = (h * E)[None, :, None] + offs_e
        u = uniform(tl.load(seed_ptr), offs_n.to(tl.int32)[:, None, None], column, (STREAM + side)[None, :, None])
        survived = u >= dropout
    else:
        survived = mask_r[:, :, None] & (offs_e < E)
    key = _selection_key(logits, offs_e, E, survived)

    if MODE == "sigmoid":
        gate = tl.sigmoid(logits)
    else:
        eligible = tl.broadcast_to(offs_e < E, (BLOCK_N, HEADS, BLOCK_E))
        if MODE == "softmax_topk":
            rest = key
            for _ in range(TOP_K):
                rest = tl.where(rest == tl.max(rest, axis=2)[:, :, None], -1, rest)
            eligible = (rest < 0) & eligible
        gate = _softmax(tl.where(eligible, logits, float("-inf")), 2)

    for j in range(TOP_K):
        best = tl.max(key, axis=2)
        chosen = key == best[:, :, None]
        tl.store(experts_ptr + row * TOP_K + j, (65535 - (best & 65535)).to(tl.int32), mask=mask_r)
        tl.store(weights_ptr + row * TOP_K + j, tl.sum(tl.where(chosen, gate, 0.0), axis=2), mask=mask_r)
        key = tl.where(chosen, -1, key)


@triton.jit
def _gating_bwd_kernel(
    dweights_ptr, weights_ptr, experts_ptr, logits_ptr, dlogits_in_ptr, dlogits_ptr, N, M,
    SIDES: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, MODE: tl.constexpr,
    HAS_DLOGITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (token, side, head), as d logits is laid out
    mask_m = offs_m < M
    head = offs_m % (SIDES * H)
    row = (head // H * N + offs_m // (SIDES * H)) * H + head % H  # (side, token, head), as everything else is
    offs_e = tl.arange(0, BLOCK_E)
    mask = mask_m[:, None] & (offs_e < E)[None, :]
    offs = row[:, None] * E + offs_e[None, :]

    dgate = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)  # d weight, scattered to the experts
    gate = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    inner = tl.zeros((BLOCK_M,), tl.float32)  # sum_j d weight_j weight_j
    for j in range(TOP_K):
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
            gate = _softmax(logits, 1)
        dlogits = gate * (dgate - inner[:, None])
    if HAS_DLOGITS:
        dlogits += tl.load(dlogits_in_ptr + offs, mask=mask, other=0.0)
    dlogits_ptrs = dlogits_ptr + offs_m[:, None] * E + offs_e[None, :]
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
def _key(
    experts_ptr, n, mask, h, KIND: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SORTED_HEADS: tl.constexpr, DIVISOR: tl.constexpr,
):  # fmt: skip
    """The rank of the set that head h of token n chose, or the token's signature."""
    if KIND == "sets":
        key = _set_rank(experts_ptr + (n * H + h) * TOP_K, mask, TOP_K, SETS)
    else:
        key = mask.to(tl.int32) * 0
        for head in tl.static_range(SORTED_HEADS):
            rank = _set_rank(experts_ptr + (n * H + head) * TOP_K, mask, TOP_K, SETS)
            key = key * SETS + tl.where(key % 2 == 1, SETS - 1 - rank, rank)
        key = key // DIVISOR
    return key


@triton.jit
def _sort(
    experts_ptr, keys_ptr, counts_ptr, order_ptr, offsets_ptr, N, chunk, chunks, first, end, h,
    KIND: tl.constexpr, PLACE: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SORTED_HEADS: tl.constexpr, DIVISOR: tl.constexpr, COLUMNS: tl.constexpr,
    W: tl.constexpr, KEYS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count the keys of the tokens first ... end - 1, or write these tokens' W items each to their places in order."""
    offs_k = tl.arange(0, BLOCK_KEYS)
    mask_k = offs_k < KEYS
    base = tl.zeros((BLOCK_KEYS,), tl.int32)
    if PLACE:
        total = tl.zeros((BLOCK_KEYS,), tl.int32)
        for c in range(0, chunks, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            counts_ptrs = counts_ptr + offs_c[:, None] * COLUMNS + offs_k[None, :]
            counts = tl.load(counts_ptrs, mask=(offs_c < chunks)[:, None] & mask_k[None, :], other=0)
            total += tl.sum(counts, axis=0)
            base += tl.sum(tl.where((offs_c < chunk)[:, None], counts, 0), axis=0)
        begin = h * N * W + tl.cumsum(total, 0) - total
        base += begin
        if KIND != "tokens":
            if chunk == 0:
                tl.store(offsets_ptr + h * KEYS + offs_k, begin, mask=mask_k)
                tl.store(offsets_ptr + H * KEYS, H * N * W)

    offs = tl.arange(0, BLOCK)
    for start in range(first * W, end * W, BLOCK):
        i = start + offs
        mask = i < end * W
        item = i if KIND == "tokens" else (i // W * H + h) * W + i % W
        if PLACE or KIND == "routes":
            key = tl.load(keys_ptr + item, mask=mask, other=0)
        else:
            key = _key(experts_ptr, i, mask, h, KIND, H, TOP_K, SETS, SORTED_HEADS, DIVISOR)
            tl.store(keys_ptr + item, key, mask=mask)
        if BLOCK_KEYS <= FEW_KEYS:
            here = (offs_k[:, None] == key[None, :]) & mask[None, :]  # scans are cheap along the last axis
            if PLACE:
                place = tl.sum(tl.where(here, base[:, None] + tl.cumsum(here.to(tl.int32), 1) - 1, 0), axis=0)
            count = tl.sum(here.to(tl.int32), axis=1)
        else:
            if PLACE:
                earlier = (key[:, None] == key[None, :]) & (offs[:, None] < offs[None, :])
                place = tl.gather(base, key, 0) + tl.sum(earlier.to(tl.int32), axis=0)
            digit0 = (tl.arange(0, BLOCK_KEYS // 16)[:, None] == (key // 16)[None, :]) & mask[None, :]
            digit1 = (key % 16)[:, None] == tl.arange(0, 16)[None, :]
            pairs = tl.dot(digit0.to(tl.float16), digit1.to(tl.float16))  # a histogram of two digits, exact
            count = tl.reshape(pairs.to(tl.int32), (BLOCK_KEYS,))
        if PLACE:
            tl.store(order_ptr + place, item, mask=mask)
        base += count
    if not PLACE:
        tl.store(counts_ptr + chunk * COLUMNS + offs_k, base, mask=mask_k)


@triton.jit
def _plan_kernel(
    experts_ptr, keys_ptr, counts_ptr, order_ptr, offsets_ptr, set_order_ptr, set_offsets_ptr, token_order_ptr, N, CHUNK, chunks,
    PLACE: tl.constexpr, SORT_SETS: tl.constexpr, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SETS: tl.constexpr,
    SORTED_HEADS: tl.constexpr, DIVISOR: tl.constexpr, SIGNATURES: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_SETS: tl.constexpr, BLOCK_SIGNATURES: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    problems: tl.constexpr = 2 * H + 1 if SORT_SETS else H
    pid = tl.program_id(0)
    chunk = pid % chunks
    problem = pid // chunks % problems
    side = (pid // chunks // problems).to(tl.int64)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, N)
    experts_ptr += side * N * (H * TOP_K)
    keys_ptr += side * N * (H + 1)
    counts_ptr += side * chunks * COLUMNS
    if problem < H:
        _sort(
            experts_ptr, experts_ptr, counts_ptr + problem * E,
            order_ptr + side * N * (H * TOP_K), offsets_ptr + side * (H * E + 1), N, chunk, chunks, first, end, problem,
            "routes", PLACE, H, TOP_K, SETS, SORTED_HEADS, DIVISOR, COLUMNS,
            TOP_K, E, BLOCK_E, FEW if BLOCK_E <= FEW_KEYS else MANY, TILE // BLOCK_E,
        )  # fmt: skip
    elif problem < 2 * H:
        _sort(
            experts_ptr, keys_ptr, counts_ptr + H * E + (problem - H) * SETS,
            set_order_ptr + side * N * H, set_offsets_ptr + side * (H * SETS + 1), N, chunk, chunks, first, end, problem - H,
            "sets", PLACE, H, TOP_K, SETS, SORTED_HEADS, DIVISOR, COLUMNS,
            1, SETS, BLOCK_SETS, FEW if BLOCK_SETS <= FEW_KEYS else MANY, TILE // BLOCK_SETS,
        )  # fmt: skip
    elif SORT_SETS:
        _sort(
            experts_ptr, keys_ptr + N * H, counts_ptr + H * (E + SETS),
            token_order_ptr + side * N, offsets_ptr, N, chunk, chunks, first, end, 0,
            "tokens", PLACE, H, TOP_K, SETS, SORTED_HEADS, DIVISOR, COLUMNS,
            1, SIGNATURES, BLOCK_SIGNATURES, FEW if BLOCK_SIGNATURES <= FEW_KEYS else MANY, TILE // BLOCK_SIGNATURES,
        )  # fmt: skip


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
    x, sel = rows(x), rows(sel)
    N, D = x.shape
    H, E = n_heads, sel.shape[0] // (sides * n_heads)
    weights, experts, logits = _gating_forward_fake(x, sel, seed, sides, n_heads, top_k, mode, dropout, stream)
    config = dict(tuning.lookup(CONFIGS["gating_fwd"], x.dtype, INTERPRET))
    BLOCK_E = next_power_of_2(E, 1)
    HEADS = min(next_power_of_2(sides * H, 1), max(1, MAX_COLUMNS // BLOCK_E))
    HEADS = max(HEADS, 16 // BLOCK_E)  # `tl.dot` takes no less than 16 columns
    columns = HEADS * BLOCK_E
    if columns > 64 and not INTERPRET:  # a tile of logits stays within the registers, one of sel within shared memory
        config["BLOCK_N"] = max(8 if x.dtype == torch.float32 else 16, min(config["BLOCK_N"], 4096 // columns))
        config["BLOCK_D"] = max(16, min(config["BLOCK_D"], 8192 // columns))
        config["num_warps"], config["num_stages"] = 8, 1
    launch(
        _gating_fwd_kernel, (cdiv(N, config["BLOCK_N"]) * cdiv(sides * H, HEADS),),
        x, sel, seed if seed is not None else experts, logits, weights, experts,
        N, D, x.stride(0), sel.stride(0), dropout,
        SIDES=sides, H=H, E=E, TOP_K=top_k, MODE=mode, STREAM=stream, HAS_DROPOUT=dropout > 0,
        HEADS=HEADS, BLOCK_E=BLOCK_E, **config,
    )  # fmt: skip
    return weights, experts, logits


def _gating_backward_fake(dweights, dlogits, x, sel, weights, experts, logits, mode):
    return x.new_empty(x.shape[0], sel.shape[0]), sel.new_empty(sel.shape)


@opaque(_gating_backward_fake)
def gating_backward(
    dweights: torch.Tensor, dlogits: torch.Tensor | None, x: torch.Tensor, sel: torch.Tensor, weights: torch.Tensor,
    experts: torch.Tensor, logits: torch.Tensor, mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """d weights [sides, N, H, TOP_K], d logits [sides, N, H, E] or None -> all of d logits, [N, sides*H*E] in x's dtype, and
    d sel [sides*H*E, D].

    d x = d logits sel is left to the caller, who mostly has something to add it to.
    """
    sides, N, H, TOP_K = experts.shape
    E = logits.shape[-1]
    total = x.new_empty(N, sides * H * E)
    BLOCK_E = next_power_of_2(E, 1)
    BLOCK_M = 512 if INTERPRET else max(1, 2048 // BLOCK_E)
    launch(
        _gating_bwd_kernel, (cdiv(N * sides * H, BLOCK_M),),
        dweights.contiguous(), weights, experts, logits, logits if dlogits is None else dlogits.contiguous(), total,
        N, N * sides * H,
        SIDES=sides, H=H, E=E, TOP_K=TOP_K, MODE=mode, HAS_DLOGITS=dlogits is not None,
        BLOCK_M=BLOCK_M, BLOCK_E=BLOCK_E, num_warps=4,
    )  # fmt: skip
    return total, total.t() @ x


def _routing_plan_fake(experts, n_experts, sets):
    sides, N, H, TOP_K = experts.shape
    S = math.comb(n_experts, TOP_K)
    return (
        experts.new_empty(sides, N * H * TOP_K),
        experts.new_empty(sides, H * n_experts + 1),
        experts.new_empty(sides, N * H if sets else 0),
        experts.new_empty(sides, H * S + 1 if sets else 0),
        experts.new_empty(sides, N if sets else 0),
    )


def _block_keys(count):
    return next_power_of_2(count, 2 if count <= FEW_KEYS.value else 256)


@opaque(_routing_plan_fake)
def routing_plan(
    experts: torch.Tensor, n_experts: int, sets: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """experts [sides, N, H, TOP_K] -> the fields of a Plan, each with the sides as another first axis. Nothing visits the host."""
    experts = experts.contiguous()
    sides, N, H, TOP_K = experts.shape
    plan = _routing_plan_fake(experts, n_experts, sets)
    S, heads, signatures = 1, 1, 1
    if sets:
        S, heads = math.comb(n_experts, TOP_K), H
        while heads > 1 and S**heads >= 2**31:  # as many heads as fit an int32: any order is right
            heads -= 1
        signatures = S**heads
    divisor = cdiv(signatures, MAX_SIGNATURES)
    signatures = cdiv(signatures, divisor)
    chunk = max(cdiv(cdiv(N, CHUNKS), MIN_CHUNK), 1) * MIN_CHUNK
    chunks = max(cdiv(N, chunk), 1)
    columns = H * n_experts + (H * S + signatures if sets else 0)
    counts = experts.new_empty(sides, chunks, columns)
    keys = experts.new_empty(sides, N * (H + 1)) if sets else counts
    meta = {
        "SORT_SETS": sets, "H": H, "E": n_experts, "TOP_K": TOP_K, "SETS": S, "SORTED_HEADS": heads, "DIVISOR": divisor,
        "SIGNATURES": signatures, "COLUMNS": columns, "BLOCK_E": _block_keys(n_experts),
        "BLOCK_SETS": _block_keys(S), "BLOCK_SIGNATURES": _block_keys(signatures),
    }  # fmt: skip
    grid = (sides * (2 * H + 1 if sets else H) * chunks,)
    for place in (False, True):
        launch(_plan_kernel, grid, experts, keys, counts, *plan, N, chunk, chunks, PLACE=place, **meta, **PLAN_CONFIG)
    return plan
