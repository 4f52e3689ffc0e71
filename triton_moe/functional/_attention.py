"""Attention and its positions: kernels/attention/, position.py and xl.py, differentiable."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from ..kernels.attention import attention_backward, attention_forward, heads_side_by_side
from ..kernels.common import input_precision
from ..kernels.position import rope_rotate, rope_rotate_
from ..kernels.xl import xl_query, xl_query_backward_
from ..replay import replayed
from ._shared import _as_they_are, _autocast, _cast, _compute_dtype, _distinct, _sum_leading
from ._types import MAX_HEAD_WIDTH, XL, RoPE

FEW_KEYS, FEW_QUERIES, MANY_HEADS = 256, 64, 64  # rotated on load without a gradient: NOTE [RoPE]


class _AttentionConfig(NamedTuple):
    kind: str  # "none", "rope" or "xl"
    rotated: int  # channels of a head, with RoPE
    on_load: bool  # in the kernels, not in copies
    base: float
    causal: bool
    window: int
    scale: float
    precision: str


@replayed
def _attention_forward(tensors, c: _AttentionConfig):
    """-> o [B, T, H, Pv], lse [B, H, T], then the tensors `_attention_backward` takes."""
    q, k, v, pos, content_bias, position_bias, mask, cu_seqlens = tensors
    H, P = q.shape[2:]
    S = k.shape[1]
    offset = S - q.shape[1]
    position_q = q_pos = k_pos = narrow = None
    if c.rotated and not c.on_load:
        q, k = rope_rotate(q, c.rotated, c.base, offset, False), rope_rotate(k, c.rotated, c.base, 0, False)
    elif c.kind == "xl":
        position_q = q if position_bias is None else q + position_bias
        q_pos, k_pos, narrow = xl_query(position_q, pos, S, c.window, c.causal, c.precision)
        q = q if content_bias is None else q + content_bias
    o, lse = attention_forward(
        q, k, v, q_pos, k_pos, mask, cu_seqlens, c.causal, c.window, c.scale, c.precision, c.rotated if c.on_load else 0, c.base
    )
    return o, lse, q, k, v, pos, content_bias, position_bias, mask, cu_seqlens, position_q, q_pos, k_pos, o, lse, narrow


@replayed
def _attention_backward(tensors, c: _AttentionConfig):
    """do, dlse and what the forward kept -> dq, dk, dv, d pos, d content_bias, d position_bias (None without an input)."""
    with _as_they_are(tensors[0]):
        return _attention_gradients(*tensors, c, False)


def _attention_gradients(
    do, dlse, q, k, v, pos, content_bias, position_bias, mask, cu_seqlens, position_q, q_pos, k_pos, o, lse, narrow, c, joint,
    pairs=0, width=0, spare=0,
):  # fmt: skip
    """As `_attention_backward` returns them; with `joint`, the rows of dq and dk side by side and `spare` columns, then None.
    `pairs`: rotated channels of a layer, whose dq and dk are rotated back, and have `width` channels."""
    H, P = q.shape[2:]
    offset = k.shape[1] - q.shape[1]
    first, dk, dv, dq_pos = attention_backward(
        do, dlse, q, k, v, q_pos, k_pos, mask, cu_seqlens, o, lse, c.causal, c.window, c.scale, c.precision, joint,
        c.rotated if c.on_load else pairs, c.base, c.on_load, width, spare,
    )  # fmt: skip
    dq = heads_side_by_side(first, H, k.shape[2], width or P)[0] if joint else first
    dpos = dcontent = dposition = None
    if c.rotated and not c.on_load:
        rope_rotate_(dq, c.rotated, c.base, offset, True)
        rope_rotate_(dk, c.rotated, c.base, 0, True)
    elif c.kind == "xl":
        dcontent = None if content_bias is None else _sum_leading(dq, 2)
        dposition_q = dq if position_bias is None else torch.zeros_like(dq)
        sizes = pos.shape[1], k.shape[1], c.window, c.causal, c.precision
        dpos = xl_query_backward_(dq_pos, dposition_q, position_q, narrow, *sizes)
        if position_bias is not None:
            dposition = _sum_leading(dposition_q, 2)
            dq += dposition_q  # a part of `first`
    return first, None if joint else dk, dv, dpos, dcontent, dposition


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pos, content_bias, position_bias, mask, cu_seqlens, *config):
        ctx.config = config
        tensors = q, k, v, pos, content_bias, position_bias, mask, cu_seqlens
        o, lse, *saved = _attention_forward(tensors, _AttentionConfig(*config))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        saved = ctx.saved_tensors
        do = torch.zeros_like(saved[11]) if do is None else do
        grads = _attention_backward((do, dlse, *saved), _AttentionConfig(*ctx.config))
        return *grads, None, None, *[None] * len(ctx.config)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    position: RoPE | XL | None = None,
    causal: bool = True,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * (q k^T + position) + mask) v, fused: memory linear in T.

    q: [B, T, H, P]; k: [B, S, Hkv, P]; v: [B, S, Hkv, Pv], query head h reads key head h // (H // Hkv). The queries are the last
    T positions: S >= T, and any S with causal=False and position=None. scale defaults to P**-0.5. window=w: a query sees the
    last w keys up to itself (causal) or the keys at distance < w. key_padding_mask: bool [B, S], True = removed. cu_seqlens:
    int32 [n+1], n sequences packed along T, with B = 1 and S = T; max_seqlen is accepted for compatibility and not needed.
    recompute: with RoPE, queries and keys are rotated whenever they are loaded, and not once into copies that are kept for the
    backward pass: less memory, more time, results equal within rounding. Where no gradient is wanted, that is done without asking
    for short sequences, or few queries of many heads, which it is faster for.
    Returns [B, T, H, Pv], and with return_lse also the log-sum-exp [B, H, T], float32, natural log. A row with every key masked
    gives 0, log-sum-exp -inf and no gradient. Raises ValueError or TypeError for anything that does not fit.
    """
    _check.tensor("q", q, None, None, None, None)
    B, T, H, P = q.shape
    _check.tensor("k", k, B, None, None, P)
    S, Hkv = k.shape[1:3]
    _check.tensor("v", v, B, S, Hkv, None)
    _check.integer("the head width of q", P, 1, MAX_HEAD_WIDTH)
    _check.integer("the head width of v", v.shape[-1], 1, MAX_HEAD_WIDTH)
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"the {H} heads of q must be a multiple of the {Hkv} heads of k")
    tensors: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
    kind, pos, fraction, base = "none", None, 0.0, 0.0
    content_bias = position_bias = None
    if isinstance(position, RoPE):
        kind, fraction, base = "rope", *_check_rope(position)
    elif isinstance(position, XL):
        kind, (pos, content_bias, position_bias) = "xl", position
        _check_xl(position, H, P)
        tensors |= {
            "position.weight": pos,
            "position.content_bias": content_bias,
            "position.position_bias": position_bias,
        }
    elif position is not None:
        raise TypeError(f"position must be RoPE, XL or None, got {type(position).__name__}")
    _check.same(q, tensors, autocast=_autocast(q))
    _check_masks(B, T, S, causal, window, key_padding_mask, cu_seqlens, max_seqlen, position, q.device)
    _check.instance("recompute", recompute, bool)
    scale = P**-0.5 if scale is None else _check.number("scale", scale)
    dtype = _compute_dtype(q)
    q, k, v, pos, content_bias, position_bias = _cast(dtype, q, k, v, pos, content_bias, position_bias)
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = Hkv == H and (S <= FEW_KEYS or (T <= FEW_QUERIES and B * H >= MANY_HEADS))
    on_load = kind == "rope" and (recompute or (few and not wanted))
    config = _AttentionConfig(kind, _rotated(fraction, P), on_load, base, causal, window or 0, scale, input_precision(dtype))
    inputs = _distinct(q, k, v, pos, content_bias, position_bias)
    o, lse = _Attention.apply(*inputs, key_padding_mask, cu_seqlens, *config)
    return (o, lse) if return_lse else o


def _check_rope(position: RoPE) -> tuple[float, float]:
    fraction, base = _check.number("position.fraction", position.fraction), _check.number("position.base", position.base)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"position.fraction must be between 0 and 1, got {fraction}")
    if not base > 0.0:
        raise ValueError(f"position.base must be positive, got {base}")
    return fraction, base


def _rotated(fraction: float, P: int) -> int:
    return int(fraction * P) // 2 * 2


def _check_xl(position: XL, H: int, P: int) -> None:
    if position.weight is None:
        raise ValueError("position.weight must be the [H*P, D] position projection, got None")
    _check.tensor("position.weight", position.weight, H * P, None)
    _check.integer("the width D of position.weight", position.weight.shape[1], 1)
    for name, bias in (("content_bias", position.content_bias), ("position_bias", position.position_bias)):
        if bias is not None:
            _check.tensor(f"position.{name}", bias, H, P)


def _check_masks(B, T, S, causal, window, key_padding_mask, cu_seqlens, max_seqlen, position, device) -> None:
    _check.instance("causal", causal, bool)
    if S < T and (causal or position is not None):
        raise ValueError(f"the {S} keys must be at least the {T} queries when causal=True or a position is given")
    if window is not None:
        _check.integer("window", window, 1)
    if max_seqlen is not None:
        _check.integer("max_seqlen", max_seqlen, 1)
    _check.mask("key_padding_mask", key_padding_mask, (B, S), device)
    if cu_seqlens is not None:
        _check.tensor("cu_seqlens", cu_seqlens, None)
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens must have dtype torch.int32, got {cu_seqlens.dtype}")
        if cu_seqlens.device != device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, expected {device} like the other arguments")
        if cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must have n + 1 >= 2 entries, got {cu_seqlens.shape[0]}")
        if B != 1 or S != T:
            raise ValueError(f"cu_seqlens needs one packed row (B = 1, S = T), got B = {B}, T = {T}, S = {S}")
