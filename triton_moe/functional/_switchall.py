"""SwitchAll: one pre-norm block of SwitchHead and a sigma-MoE MLP."""

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from ..kernels.cast import cast
from ..kernels.mlp import COLUMNS
from ..kernels.norm import norm_again, norm_backward, norm_forward
from ..kernels.projection import dropout_rows
from ..replay import Kept, remembered, replayed
from ._moe import _check_moe, _moe_forward, _moe_gradients, _MoEConfig
from ._shared import ROUTE, _as_they_are, _autocast, _compute_dtype, _distinct, _dtypes, _saved_config, _seed
from ._switchhead import HEAD_INPUTS, HEAD_SAVED, _check_head, _head_forward, _head_gradients, _head_sources, _HeadConfig
from ._types import (
    STREAM_RESIDUAL_ATTENTION,
    STREAM_RESIDUAL_MOE,
    XL,
    RoPE,
    Saved,
    SigmaMoEWeights,
    SwitchAllGradients,
    SwitchAllWeights,
    SwitchHeadWeights,
)


class _BlockConfig(NamedTuple):
    eps: float
    dropout: float
    head: _HeadConfig
    moe: _MoEConfig


OWN_SAVED = 11  # tensors that `_block_forward` keeps beside those of both halves


@functools.partial(replayed, shown=2)
def _block_forward(tensors, dtype: torch.dtype, c: _BlockConfig):
    """x, norm 1, (q, k, v, o, sel_v, sel_o, pos), norm 2, (keys, values, expert_sel, bias, o_bias), mask, cu_seqlens, seed; the
    dtype of the products.

    -> y, logits, then the tensors `_block_backward` takes: x, both norms and their statistics, what attention adds to x, the
    seed, then those of both halves.
    """
    (x, w1, b1), head, (w2, b2), moe, (mask, cu_seqlens, seed) = (
        tensors[:3], tensors[3:10], tensors[10:12], tensors[12:17], tensors[17:],
    )  # fmt: skip
    B, T, D = x.shape
    x2 = x.reshape(B * T, D)

    def dropped(branch, stream):
        return dropout_rows(branch, seed, c.dropout, stream) if c.dropout > 0 else branch

    h, mean1, rstd1 = norm_forward(x2, None, w1, b1, c.eps, dtype)
    attended, _, _, head_kept = _head_forward((h.view(B, T, D), None, None, *head, mask, cu_seqlens, seed), dtype, c.head)
    attended = dropped(attended.view(B * T, D), STREAM_RESIDUAL_ATTENTION)
    h, mean2, rstd2 = norm_forward(x2, attended, w2, b2, c.eps, dtype)
    below = (x2, attended) if c.dropout == 0 else (None, None)
    y, logits, moe_kept = _moe_forward((h, None, *moe, seed, *below), dtype, c.moe, 2 * COLUMNS)
    if c.dropout > 0:
        y = (x2 + attended + dropped(y, STREAM_RESIDUAL_MOE)).to(x.dtype)
    own = (x, w1, b1, mean1, rstd1, attended, w2, b2, mean2, rstd2, seed)
    head_kept, moe_kept = head_kept.flat(), moe_kept.flat()
    if c.head.recompute:  # what the norms made
        head_kept, moe_kept = (None, *head_kept[1:]), (None, *moe_kept[1:])
    return y.view(B, T, D), logits.view(B, T, logits.shape[1]), *own, *head_kept, *moe_kept


@replayed
def _block_backward(tensors, dtypes, c: _BlockConfig):
    """dy, dlogits and what the forward kept -> gradients of x, w1, b1, the seven of head, w2, b2, the five of moe, in their
    dtypes (None where the input was None)."""
    with _as_they_are(tensors[0]):
        return _block_gradients(*tensors[:2], tensors[2:], dtypes, c)


def _block_gradients(dy, dlogits, saved, dtypes, c: _BlockConfig):
    x, w1, b1, mean1, rstd1, attended, w2, b2, mean2, rstd2, seed = saved[:OWN_SAVED]
    head_saved, moe_saved = saved[OWN_SAVED : OWN_SAVED + HEAD_SAVED], saved[OWN_SAVED + HEAD_SAVED :]
    B, T, D = x.shape
    dtype = attended.dtype
    x2, dy = x.reshape(B * T, D), dy.reshape(B * T, D)

    def dropped(d, stream):
        return dropout_rows(d, seed, c.dropout, stream) if c.dropout > 0 else d

    if c.head.recompute:
        moe_saved = norm_again(x2, attended, w2, b2, c.eps, dtype), *moe_saved[1:]
    moe_rest = dlogits, *moe_saved, (dtype, None, *dtypes[12:17]), c.moe, 2 * COLUMNS
    dh, _, *dmoe = _moe_gradients(dropped(cast(dy, dtype), STREAM_RESIDUAL_MOE), *moe_rest)
    dx1, copy, dw2, db2 = norm_backward(dh, dy, x2, attended, mean2, rstd2, w2, x.dtype != dtype, *dtypes[10:12])
    dattended = dropped(dx1 if x.dtype == dtype else copy, STREAM_RESIDUAL_ATTENTION).view(B, T, D)
    del moe_rest, moe_saved
    if c.head.recompute:
        head_saved = norm_again(x2, None, w1, b1, c.eps, dtype).view(B, T, D), *head_saved[1:]
    head_dtypes = dtype, None, None, *dtypes[3:10]
    dh, _, _, *dhead = _head_gradients(dattended, None, None, head_saved, head_dtypes, c.head)
    dx, _, dw1, db1 = norm_backward(dh.view(B * T, D), dx1, x2, None, mean1, rstd1, w1, False, *dtypes[1:3])
    return dx.view(B, T, D), dw1, db1, *dhead, dw2, db2, *dmoe


class _SwitchAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        # 17 differentiable ones, mask, cu_seqlens, seed, then dtype, eps, dropout and both configs
        tensors, (dtype, eps, dropout) = args[:20], args[20:23]
        n = len(_HeadConfig._fields)
        ctx.config, ctx.dtypes = (eps, dropout, args[23 : 23 + n], args[23 + n :]), _dtypes(args[:17])
        config = _BlockConfig(eps, dropout, _HeadConfig(*ctx.config[2]), _MoEConfig(*ctx.config[3]))
        y, logits, kept = _block_forward(tensors, dtype, config)
        ctx.set_materialize_grads(False)
        kept = kept.to_save()
        ctx.save_for_backward(*kept.tensors)
        ctx.layout = kept.layout
        return y, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlogits):
        kept = Kept(ctx.saved_tensors, ctx.layout)
        if dy is None:
            dy = torch.zeros_like(kept.flat()[0])
        eps, dropout, head, moe = ctx.config
        config = _BlockConfig(eps, dropout, _HeadConfig(*head), _MoEConfig(*moe))
        grads = _block_backward((dy, dlogits), ctx.dtypes, config, kept=kept)
        return *grads, *[None] * (6 + len(head) + len(moe))


@remembered
def _check_block(
    x, weights, *, top_k, moe_top_k, eps=1e-5, dropout=0.0, attention_dropout=0.0, expert_dropout=0.0,
    activation="relu", mode="sigmoid", moe_dropout=0.0, moe_expert_dropout=0.0, training=False, **masks,
) -> _BlockConfig:  # fmt: skip
    _check.instance("weights", weights, SwitchAllWeights)
    _check.tensor("x", x, None, None, None)
    D = x.shape[-1]
    for name, norm in (("norm1", weights.norm1), ("norm2", weights.norm2)):
        if not isinstance(norm, (tuple, list)) or len(norm) != 2:
            raise TypeError(f"weights.{name} must be a pair (weight, bias), got {type(norm).__name__}")
        for part, t in zip(("weight", "bias"), norm, strict=True):
            _check.tensor(f"weights.{name} {part}", t, D)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    head = _check_head(
        x, weights.attention, top_k=top_k, dropout=attention_dropout, expert_dropout=expert_dropout,
        training=training, what="attention_", **masks,
    )  # fmt: skip
    moe = _check_moe(x, weights.moe, moe_top_k, None, activation, mode, moe_dropout, moe_expert_dropout, training, "moe_")
    for name, t, axis in (("weights.attention.o", weights.attention.o, 2), ("weights.moe.values", weights.moe.values, 2)):
        width = t.shape[0] if t.ndim == 2 else t.shape[axis]
        if width != D:
            raise ValueError(f"{name} must produce width {D} like x, for the residual, got {width}")
    norms = {"weights.norm1": weights.norm1[0], "norm1 bias": weights.norm1[1], "weights.norm2": weights.norm2[0]}
    norms["norm2 bias"] = weights.norm2[1]
    _check.same(x, {"x": x, **norms}, autocast=_autocast(x))
    p = _check.probability("dropout", dropout)
    return _BlockConfig(float(eps), float(training) * p, head, moe)


def _block_arguments(x, weights, position, config, seed):
    """-> the 17 differentiable inputs, the seed and the compute dtype."""
    head, moe = config.head, config.moe
    pos = _head_sources(x, weights.attention, position)[2]
    needed = max(config.dropout, head.dropout, head.expert_dropout, moe.dropout, moe.expert_dropout) > 0
    tensors = (x, *weights.norm1, *weights.attention[:6], pos, *weights.norm2, *weights.moe)
    return tensors, _seed(seed, x.device, needed), _compute_dtype(x)


def switchall(
    x: Tensor,
    weights: SwitchAllWeights,
    *,
    top_k: int,
    moe_top_k: int,
    eps: float = 1e-5,
    dropout: float = 0.0,
    position: RoPE | XL | None = RoPE(),
    causal: bool = True,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    attention_dropout: float = 0.0,
    expert_dropout: float = 0.0,
    activation: str = "relu",
    mode: str = "sigmoid",
    moe_dropout: float = 0.0,
    moe_expert_dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One pre-norm SwitchAll block: x += drop(SwitchHead(LN1 x)); x += drop(sigma_moe(LN2 x)) (arXiv 2312.07987, section 4).

    x: [B, T, D]. dropout acts on both residual branches, attention_dropout on q, moe_dropout on the activated experts, the expert
    dropouts on the two selections; all in training only. recompute: what `switchhead` then does not keep and what the norms made
    is made again in the backward pass. The other keywords are those of `switchhead` and `sigma_moe`.
    Returns y [B, T, D] in x's dtype and the MLP gate's logits [B, T, E], float32.
    """
    config = _check_block(
        x, weights, top_k=top_k, moe_top_k=moe_top_k, eps=eps, dropout=dropout, position=position, causal=causal,
        window=window, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        attention_dropout=attention_dropout, expert_dropout=expert_dropout, activation=activation, mode=mode,
        moe_dropout=moe_dropout, moe_expert_dropout=moe_expert_dropout, training=training, recompute=recompute,
    )  # fmt: skip
    tensors, seed, dtype = _block_arguments(x, weights, position, config, seed)
    return _SwitchAll.apply(
        *_distinct(*tensors), key_padding_mask, cu_seqlens, seed, dtype, config.eps, config.dropout, *config.head, *config.moe
    )


def switchall_forward(x: Tensor, weights: SwitchAllWeights, **options) -> tuple[tuple[Tensor, Tensor], Saved]:
    """`switchall` without autograd, with the same keywords -> ((y, logits), saved)."""
    _check.keywords("switchall_forward", options, BLOCK_KEYWORDS)
    seed = options.pop("seed", None)
    config = _check_block(x, weights, **options)
    config = config._replace(head=config.head._replace(keep=True))
    mask, cu_seqlens = options.get("key_padding_mask"), options.get("cu_seqlens")
    with torch.no_grad():
        t, seed, dtype = _block_arguments(x, weights, options.get("position"), config, seed)
        y, logits, kept = _block_forward((*t, mask, cu_seqlens, seed), dtype, config)
    return (y, logits), Saved(kept.flat(), ("switchall", config, _dtypes(t), y, logits))


def switchall_backward(grad_y: Tensor, saved: Saved, grad_logits: Tensor | None = None) -> SwitchAllGradients:
    """The gradients of `switchall_forward`. grad_y: [B, T, D]; grad_logits: [B, T, E] or None."""
    config, dtypes, y, (logits,) = _saved_config(saved, "switchall")
    _check.gradient("grad_y", _check.tensor("grad_y", grad_y), y)
    _check.gradient("grad_logits", grad_logits, logits)
    with torch.no_grad():
        g = _block_backward((grad_y, grad_logits, *saved.tensors), dtypes, config)
    weights = SwitchAllWeights(g[1:3], SwitchHeadWeights(*g[3:10]), g[10:12], SigmaMoEWeights(*g[12:]))
    return SwitchAllGradients(g[0], weights)


def _chosen_experts(saved: Saved) -> tuple[Tensor, ...]:
    """What a forward chose, for the reference to follow: [N, H, TOP_K] for values and for outputs, of a block the MLP's too."""
    block = saved.config[0] == "switchall"
    head: Any = saved.tensors[OWN_SAVED:] if block else saved.tensors
    of_x, of_k_src = head[HEAD_INPUTS + 1], head[HEAD_INPUTS + 1 + ROUTE]
    return ((of_x if of_k_src is None else of_k_src)[0], of_x[-1], *([head[HEAD_SAVED + 9][0]] if block else []))


BLOCK_KEYWORDS = frozenset(inspect.signature(switchall).parameters) - {"x", "weights"}
