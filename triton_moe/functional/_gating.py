"""The gate: kernels/gating, differentiable."""

from typing import overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from ..kernels.cast import cast
from ..kernels.gating import MAX_EXPERTS, Plan, cast_and_gate, gating_backward
from ..replay import replayed
from ._shared import _as_they_are, _autocast, _cast, _compute_dtype, _routing_plan, _seed, _tokens
from ._types import MODES, STREAM_GATE, STREAM_GATES, Routing


@replayed
def _gating_backward(tensors, dtype: torch.dtype, mode: str):
    """dweights, dlogits (or None), and what `gating_forward` took and gave -> dx in dtype, dsel."""
    dweights, dlogits, x, sel, weights, experts, logits = tensors
    with _as_they_are(x):
        dlogits, dsel = gating_backward(dweights, dlogits, x, sel, weights, experts, logits, mode)
        return cast(dlogits @ sel, dtype), dsel


class _Gating(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sel, seed, *config):
        weights, experts, logits, narrow = cast_and_gate(x, sel, seed, *config)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(narrow, sel, weights, experts, logits if config[3] == "softmax" else None)
        ctx.dtype, ctx.mode = x.dtype, config[3]
        ctx.mark_non_differentiable(experts)
        return weights, experts, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _, dlogits):
        saved = ctx.saved_tensors
        if dweights is None:
            dweights = torch.zeros_like(saved[2])
        return *_gating_backward((dweights, dlogits, *saved), ctx.dtype, ctx.mode), None, *[None] * 6


@overload
def gating(
    x: Tensor, sel: Tensor, *, n_heads: int = 1, top_k: int, mode: str = ..., expert_dropout: float = ...,
    training: bool = ..., seed: int | Tensor | None = ...,
) -> Routing: ...  # fmt: skip
@overload
def gating(
    x: Tensor, sel: tuple[Tensor, ...], *, n_heads: int = 1, top_k: int, mode: str = ..., expert_dropout: float = ...,
    training: bool = ..., seed: int | Tensor | None = ...,
) -> tuple[Routing, ...]: ...  # fmt: skip
def gating(
    x: Tensor,
    sel: Tensor | tuple[Tensor, ...],
    *,
    n_heads: int = 1,
    top_k: int,
    mode: str = "sigmoid",
    expert_dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Routing | tuple[Routing, ...]:
    """The experts each (token, head) uses and their gates (sigma-MoE, arXiv 2310.10837, equation 10 and section 5).

    x: [..., D]; sel: [H*E, D], row h*E + e. mode: "sigmoid"; "softmax" over all E; "softmax_topk" over the chosen. Equal logits:
    the lower expert id wins; NaN ranks below -inf. expert_dropout strikes (token, head, expert) from selection in training, as a
    function of (seed, token, head, expert) alone; seed: int, int64 scalar tensor, or None (drawn on x's device).
    Returns a Routing of N = x.numel() / D tokens. sel may be a tuple of several, all of one shape, such as (sel_v, sel_o): then
    as many Routings, made in one pass over x; each draws a dropout mask of its own.
    Raises ValueError or TypeError for shapes, dtypes, devices or top_k > E.
    """
    _check.tensor("x", x, ndim=1)
    D = _check.integer("the width of x", x.shape[-1], 1)
    named = {f"sel[{i}]": t for i, t in enumerate(sel)} if isinstance(sel, tuple) else {"sel": sel}
    if not named:
        raise ValueError("sel must be a tensor or a tuple of one or more, got an empty tuple")
    first = next(iter(named))
    rows = _check.tensor(first, named[first], None, D).shape[0]
    for name, t in named.items():
        _check.tensor(name, t, rows, D)
    autocast = _autocast(x)
    _check.same(x, {"x": x, **named}, autocast=autocast)
    _check_gate(first, named[first], n_heads, top_k)
    _check.choice("mode", mode, MODES)
    p = _check.probability("expert_dropout", expert_dropout) * float(_check.instance("training", training, bool))
    x, sels = x.reshape(_tokens(x), D), _cast(_compute_dtype(x), *named.values())
    seed = _seed(seed, x.device, p > 0)
    joined, stream = (torch.cat(sels), STREAM_GATES) if isinstance(sel, tuple) else (sels[0], STREAM_GATE)
    gates = _Gating.apply(x, joined, seed, len(sels), n_heads, top_k, mode, p, stream)
    plan = _routing_plan(gates[1], rows // n_heads, torch.bfloat16)  # a float32 gate may serve 16-bit projections
    if isinstance(sel, tuple):
        return tuple(Routing(*side[:3], Plan(*side[3:])) for side in zip(*(t.unbind() for t in (*gates, *plan)), strict=True))
    weights, experts, logits, *orders = (t.squeeze(0) for t in (*gates, *plan))
    return Routing(weights, experts, logits, Plan(*orders))


def _check_gate(name: str, sel: Tensor, n_heads: int, top_k: int, what: str = "top_k") -> None:
    _check.integer("n_heads", n_heads, 1)
    if sel.shape[0] == 0 or sel.shape[0] % n_heads:
        raise ValueError(f"{name} must have n_heads * E rows with n_heads = {n_heads}, got {sel.shape[0]}")
    E = sel.shape[0] // n_heads
    if E > MAX_EXPERTS:
        raise ValueError(f"{name} must have at most {MAX_EXPERTS} experts per head, got {E}")
    _check.integer(what, top_k, 1, E, f" (the number of experts per head is {E})")
