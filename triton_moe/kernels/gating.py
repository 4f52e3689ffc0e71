"""sigma-MoE gating: which experts each (token, head) uses, and how much.

    logits[n,h,e] = sum_d x[n,d] sel[h*E+e,d]                               float32
    experts[n,h,:] = the TOP_K largest logits, in descending order
    weights[n,h,j] = gate(logits[n,h,:])[experts[n,h,j]]                    sigmoid, softmax, or softmax over the chosen

    d logit = d weight * gate * (1 - gate) for a chosen expert, 0 elsewhere (sigmoid);  selection is not differentiated

Csordas, Irie, Schmidhuber 2023 (arXiv 2310.10837), equation 10 and section 5; SwitchHead (arXiv 2312.07987), equations 7 to 9.

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
"""

import torch
import triton
import triton.language as tl

from .. import tuning
from .common import INTERPRET, cdiv, key_dtype, launch, next_power_of_2, opaque, rows, uniform

MAX_EXPERTS = 1024  # per head: one tile holds all logits of a head

CONFIGS = {
    "gating_fwd": {
        "half": {"BLOCK_N": 64, "BLOCK_D": 64, "PARTS": 2, "num_warps": 4, "num_stages": 3},
        "float32": {"BLOCK_N": 32, "BLOCK_D": 32, "PARTS": 2, "num_warps": 4, "num_stages": 2},
        "interpret": {"BLOCK_N": 512, "BLOCK_D": 64, "PARTS": 2, "num_warps": 1, "num_stages": 1},
    },
}


@triton.jit
def _selection_key(logits, offs_e, E, survived):
    """int64 [BLOCK_N, BLOCK_E], see NOTE [Selection key]."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648  # [0, 2**32), monotonic
    ordered = tl.where(logits != logits, 0, ordered)
    key = (survived.to(tl.int64) << 48) | (ordered << 16) | (65535 - offs_e)
    return tl.where(offs_e < E, key, -1)


@triton.jit
def _gating_fwd_kernel(
    x_ptr, sel_ptr, seed_ptr, logits_ptr, weights_ptr, experts_ptr,
    N, D: tl.constexpr, stride_xn: tl.constexpr, stride_se: tl.constexpr, dropout,
    H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, MODE: tl.constexpr, STREAM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    offs_n = (pid // H) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, BLOCK_E)
    mask_n = offs_n < N
    mask_e = offs_e < E

    logits = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    x_ptrs = x_ptr + offs_n[:, None] * stride_xn
    sel_ptrs = sel_ptr + (h * E + offs_e)[None, :] * stride_se
    for d in range(0, D, PARTS * BLOCK_D):
        part = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)  # see NOTE [Partial sums]
        for i in tl.static_range(PARTS):
            offs_d = d + i * BLOCK_D + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptrs + offs_d[None, :], mask=mask_n[:, None] & (offs_d < D)[None, :], other=0.0)
            sel = tl.load(sel_ptrs + offs_d[:, None], mask=mask_e[None, :] & (offs_d < D)[:, None], other=0.0)
            part = tl.dot(x, sel, part, input_precision="ieee")  # logits are never rounded below float32
        logits += part

    mask = mask_n[:, None] & mask_e[None, :]
    tl.store(logits_ptr + (offs_n[:, None] * H + h) * E + offs_e[None, :], logits, mask=mask)

    if HAS_DROPOUT:
        u = uniform(tl.load(seed_ptr), offs_n.to(tl.int32)[:, None], (h * E + offs_e).to(tl.int32)[None, :], STREAM)
        survived = u >= dropout
    else:
        survived = mask
    key = _selection_key(logits, offs_e[None, :], E, survived)

    if MODE == "sigmoid":
        gate = tl.sigmoid(logits)
    else:
        eligible = tl.broadcast_to(mask_e[None, :], (BLOCK_N, BLOCK_E))
        if MODE == "softmax_topk":
            rest = key
            for _ in range(TOP_K):
                rest = tl.where(rest == tl.max(rest, axis=1)[:, None], -1, rest)
            eligible = (rest < 0) & eligible
        exponent = tl.where(eligible, logits, float("-inf"))
        gate = tl.exp(exponent - tl.max(exponent, axis=1)[:, None])
        gate = gate / tl.sum(gate, axis=1)[:, None]

    for j in range(TOP_K):
        best = tl.max(key, axis=1)
        chosen = key == best[:, None]
        offs_r = (offs_n * H + h) * TOP_K + j
        tl.store(experts_ptr + offs_r, (65535 - (best & 65535)).to(tl.int32), mask=mask_n)
        tl.store(weights_ptr + offs_r, tl.sum(tl.where(chosen, gate, 0.0), axis=1), mask=mask_n)
        key = tl.where(chosen, -1, key)


@triton.jit
def _gating_bwd_kernel(
    dweights_ptr, weights_ptr, experts_ptr, logits_ptr, dlogits_in_ptr, dlogits_ptr, M,
    E: tl.constexpr, TOP_K: tl.constexpr, MODE: tl.constexpr, HAS_DLOGITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (token, head) pairs
    offs_e = tl.arange(0, BLOCK_E)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_e < E)[None, :]
    offs = offs_m[:, None] * E + offs_e[None, :]

    dgate = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)  # d weight, scattered to the experts
    gate = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    inner = tl.zeros((BLOCK_M,), tl.float32)  # sum_j d weight_j weight_j
    for j in range(TOP_K):
        e = tl.load(experts_ptr + offs_m * TOP_K + j, mask=mask_m, other=0)
        w = tl.load(weights_ptr + offs_m * TOP_K + j, mask=mask_m, other=0.0)
        dw = tl.load(dweights_ptr + offs_m * TOP_K + j, mask=mask_m, other=0.0)
        here = offs_e[None, :] == e[:, None]
        dgate = tl.where(here, dw[:, None], dgate)
        gate = tl.where(here, w[:, None], gate)
        inner += dw * w

    if MODE == "sigmoid":
        dlogits = dgate * gate * (1.0 - gate)
    else:
        if MODE == "softmax":  # the gates of all experts, not only the chosen
            logits = tl.load(logits_ptr + offs, mask=mask, other=float("-inf"))
            gate = tl.exp(logits - tl.max(logits, axis=1)[:, None])
            gate = gate / tl.sum(gate, axis=1)[:, None]
        dlogits = gate * (dgate - inner[:, None])
    if HAS_DLOGITS:
        dlogits += tl.load(dlogits_in_ptr + offs, mask=mask, other=0.0)
    tl.store(dlogits_ptr + offs, dlogits, mask=mask)


def _gating_forward_fake(x, sel, seed, n_heads, top_k, mode, dropout, stream):
    N, E = x.shape[0], sel.shape[0] // n_heads
    return (
        x.new_empty(N, n_heads, top_k, dtype=torch.float32),
        x.new_empty(N, n_heads, top_k, dtype=torch.int32),
        x.new_empty(N, n_heads, E, dtype=torch.float32),
    )


@opaque(_gating_forward_fake)
def gating_forward(
    x: torch.Tensor, sel: torch.Tensor, seed: torch.Tensor | None, n_heads: int, top_k: int, mode: str, dropout: float,
    stream: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [N, D], sel [H*E, D] -> weights [N, H, TOP_K], experts [N, H, TOP_K], logits [N, H, E]."""
    x, sel = rows(x), rows(sel)
    N, D = x.shape
    H, E = n_heads, sel.shape[0] // n_heads
    weights, experts, logits = _gating_forward_fake(x, sel, seed, n_heads, top_k, mode, dropout, stream)
    config = dict(tuning.lookup(CONFIGS["gating_fwd"], x.dtype, INTERPRET))
    BLOCK_E = next_power_of_2(E)
    if BLOCK_E > 64 and not INTERPRET:  # a tile of logits stays within the registers, one of sel within shared memory
        config["BLOCK_N"] = max(8 if x.dtype == torch.float32 else 16, min(config["BLOCK_N"], 4096 // BLOCK_E))
        config["BLOCK_D"] = max(16, min(config["BLOCK_D"], 8192 // BLOCK_E))
        config["num_warps"], config["num_stages"] = 8, 1
    launch(
        _gating_fwd_kernel, (cdiv(N, config["BLOCK_N"]) * H,),
        x, sel, seed if seed is not None else experts, logits, weights, experts,
        N, D, x.stride(0), sel.stride(0), dropout,
        H=H, E=E, TOP_K=top_k, MODE=mode, STREAM=stream, HAS_DROPOUT=dropout > 0,
        BLOCK_E=BLOCK_E, **config,
    )  # fmt: skip
    return weights, experts, logits


def _gating_backward_fake(dweights, dlogits, x, sel, weights, experts, logits, mode):
    return x.new_empty(x.shape[0], sel.shape[0]), sel.new_empty(sel.shape)


@opaque(_gating_backward_fake)
def gating_backward(
    dweights: torch.Tensor, dlogits: torch.Tensor | None, x: torch.Tensor, sel: torch.Tensor, weights: torch.Tensor,
    experts: torch.Tensor, logits: torch.Tensor, mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """d weights [N, H, TOP_K], d logits [N, H, E] or None -> all of d logits, [N, H*E] in x's dtype, and d sel [H*E, D].

    d x = d logits sel is left to the caller, who mostly has something to add it to.
    """
    N, H, TOP_K = experts.shape
    E = logits.shape[-1]
    total = torch.empty_like(logits)
    BLOCK_E = next_power_of_2(E)
    BLOCK_M = 512 if INTERPRET else max(1, 4096 // BLOCK_E)
    launch(
        _gating_bwd_kernel, (cdiv(N * H, BLOCK_M),),
        dweights.contiguous(), weights, experts, logits, total if dlogits is None else dlogits.contiguous(), total, N * H,
        E=E, TOP_K=TOP_K, MODE=mode, HAS_DLOGITS=dlogits is not None,
        BLOCK_M=BLOCK_M, BLOCK_E=BLOCK_E, num_warps=4,
    )  # fmt: skip
    total = total.view(N, H * E).to(x.dtype)
    return total, total.t() @ x


def _routing_plan_fake(experts, n_experts):
    H = experts.shape[1]
    return experts.new_empty(experts.numel()), experts.new_empty(H * n_experts + 1)


@opaque(_routing_plan_fake)
def routing_plan(experts: torch.Tensor, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """experts [N, H, TOP_K] -> the routes (n*H + h)*TOP_K + j sorted by expert h*E + e and then by themselves, int32
    [N*H*TOP_K], and where each expert's routes begin and end in that order, int32 [H*E + 1]. Nothing visits the host."""
    H = experts.shape[1]
    heads = torch.arange(H, device=experts.device, dtype=torch.int32) * n_experts
    dtype = key_dtype(H * n_experts)
    expert, order = torch.sort((experts + heads[:, None]).reshape(-1).to(dtype), stable=True)
    groups = torch.arange(H * n_experts + 1, device=experts.device, dtype=dtype)
    return order.to(torch.int32), torch.searchsorted(expert, groups, out_int32=True)
