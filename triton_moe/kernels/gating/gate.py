"""The gate: logits, the choice of experts and their weights, forward and backward. The formulas are in __init__.py.

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
"""

import torch
import triton
import triton.language as tl

from ... import tuning
from .. import sets
from ..cast import cast
from ..common import INTERPRET, cdiv, default_config, launch, next_power_of_2, opaque, rows, uniform

MAX_EXPERTS = 1024  # per head: one tile holds all logits of a head
MAX_COLUMNS = 64  # of logits a program of several heads computes
MAX_CAST_COLUMNS = 128  # of logits a program that also casts x computes
NAN, TAKEN = tl.constexpr(1 - 2**31), tl.constexpr(-(2**31))  # selection keys, below those of all other logits

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
