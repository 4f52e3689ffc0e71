"""The public functions. Each checks its arguments, composes the kernels, and is differentiable once.

Letters: B sequences, T queries, S keys, N = B*T tokens, D model width, H heads, E experts per head, TOP_K chosen experts, P head
width, G width of one MLP expert. Formulas: kernels/gating.py, projection.py, attention.py, position.py.

NOTE [Composition]
    Every layer is two plain functions, `*_forward` -> (outputs, saved) and `*_backward`(gradients, saved), which call launchers
    and torch's GEMMs and know nothing of autograd. The differentiable function wraps that pair in one autograd.Function, so both
    are the same computation. Tensors a backward needs are in `Saved.tensors`, everything else in `Saved.config`.

NOTE [Compute dtype]
    Under torch.autocast every floating input is cast to the autocast dtype first; otherwise all share one dtype. Gradients come
    back in each input's own dtype. Gates, logits and log-sum-exps are float32 always.

NOTE [Head widths]
    Odd head widths cost more than they save: rows that split a sector of memory load slowly, and tiles are powers of two. So
    16-bit heads of a layer are padded with channels of zeros to a multiple of 32, which changes neither scores nor outputs;
    the scale and the rotated channels are those of the width itself.

NOTE [Streams]
    Random masks are a function of (seed, token, column, stream); the stream tells the masks of one layer apart.
"""

import contextlib
import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check
from .kernels.attention import attention_backward, attention_forward
from .kernels.cast import assemble, cast
from .kernels.common import cdiv, input_precision
from .kernels.gating import MAX_EXPERTS, Plan, gating_backward, gating_forward, plan_shapes, routing_plan
from .kernels.mlp import COLUMNS, mlp_backward, mlp_backward_input, mlp_forward
from .kernels.position import rope_rotate, rope_rotate_
from .kernels.projection import (
    dropout_rows,
    output_backward,
    output_forward,
    value_backward,
    value_backward_rows,
    value_forward,
)
from .kernels.sets import fits
from .kernels.xl import xl_query, xl_query_backward_
from .replay import remembered, replayed

__all__ = [
    "XL",
    "RoPE",
    "Routing",
    "Saved",
    "SigmaMoEWeights",
    "SwitchAllGradients",
    "SwitchAllWeights",
    "SwitchHeadGradients",
    "SwitchHeadWeights",
    "attention",
    "entropy_regularizer",
    "gating",
    "output_projection",
    "sigma_moe",
    "switchall",
    "switchall_backward",
    "switchall_forward",
    "switchhead",
    "switchhead_backward",
    "switchhead_forward",
    "value_projection",
]

MODES = ("sigmoid", "softmax", "softmax_topk")
ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "geglu")
MAX_HEAD_WIDTH = 256

# NOTE [Streams]
STREAM_GATE, STREAM_ACTIVATION = 0, 1
STREAM_GATE_V, STREAM_GATE_O, STREAM_QUERY = 2, 3, 4
STREAM_RESIDUAL_ATTENTION, STREAM_RESIDUAL_MOE = 5, 6


class Routing(NamedTuple):
    """What `gating` chose. Only the first two fields are needed to build one by hand.

    weights: [N, H, TOP_K] float32, differentiable; experts: [N, H, TOP_K] int32 in [0, E), in order of selection;
    logits: [N, H, E] float32, differentiable; plan: the orders in which the projections work (kernels.gating.Plan). Without one
    it is made from `experts`, which may then repeat an expert in a row; the projections take their general and slower way.
    """

    weights: Tensor
    experts: Tensor
    logits: Tensor | None = None
    plan: Plan | None = None


class RoPE(NamedTuple):
    """Rotary positions on the first int(fraction * P) channels, rounded down to even (RoFormer, arXiv 2104.09864)."""

    fraction: float = 0.5
    base: float = 10000.0


class XL(NamedTuple):
    """Transformer-XL positions (arXiv 1901.02860): score = scale * ((q + u).k + (q + v).(W_pos R)), sinusoidal R.

    weight: W_pos [H*P, D]; content_bias: u [H, P]; position_bias: v [H, P]; the biases are optional. `switchhead` takes the
    weight from its own `pos_to_pk`.
    """

    weight: Tensor | None = None
    content_bias: Tensor | None = None
    position_bias: Tensor | None = None


class SigmaMoEWeights(NamedTuple):
    """keys [E, D, G] ([E, D, 2G] for gated pairs, the gate first), values [E, G, D_out], expert_sel [E, D], bias [E, G or 2G],
    o_bias [D_out]."""

    keys: Tensor
    values: Tensor
    expert_sel: Tensor
    bias: Tensor | None = None
    o_bias: Tensor | None = None


class SwitchHeadWeights(NamedTuple):
    """q, k [H*P, D]; v [H*E, D, P]; o [H*E, P, D]; sel_v, sel_o [H*E, D]; pos_to_pk [H*P, D].

    Without sel_v, sel_o serves both sides. One expert per head: v [H*P, D], o [D, H*P], sel_o [H, D], no sel_v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    sel_v: Tensor | None = None
    sel_o: Tensor | None = None
    pos_to_pk: Tensor | None = None


class SwitchAllWeights(NamedTuple):
    """norm1, norm2: (weight, bias) of a LayerNorm, [D] each."""

    norm1: tuple[Tensor, Tensor]
    attention: SwitchHeadWeights
    norm2: tuple[Tensor, Tensor]
    moe: SigmaMoEWeights


class Saved(NamedTuple):
    """What a forward keeps for its backward."""

    tensors: tuple[Tensor | None, ...]
    config: Any


class SwitchHeadGradients(NamedTuple):
    """k_src and v_src are None where the forward was given none (their gradient is then in x, or in k_src)."""

    x: Tensor
    k_src: Tensor | None
    v_src: Tensor | None
    weights: SwitchHeadWeights


class SwitchAllGradients(NamedTuple):
    x: Tensor
    weights: SwitchAllWeights


# ---- shared by the functions below


def _autocast(x: Tensor) -> bool:
    """Whether torch.autocast applies to x; on a device that has none `_check.same` then says what is wrong."""
    return x.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(x.device.type)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """For tensors that autograd follows; the functions it does not look into use `cast`."""
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def _tokens(x: Tensor) -> int:
    """How many tokens x [..., D] holds."""
    return math.prod(x.shape[:-1])


def _dtypes(tensors) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)


def _to(tensors, dtypes) -> tuple[Any, ...]:
    """Each tensor in its dtype; None where either is."""
    return tuple(None if t is None or d is None else cast(t, d) for t, d in zip(tensors, dtypes, strict=True))


def _distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For an autograd.Function under torch.compile, which loses gradients of a tensor that comes twice (2.11) or refuses it."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(t if t is None or all(t is not u for u in tensors[:i]) else t.view_as(t) for i, t in enumerate(tensors))


def _as_they_are(x: Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtype of their operands, which the forward pass chose, also where a backward is called under autocast."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.autocast(x.device.type, enabled=False)


def _saved_config(saved: Saved, layer: str):
    """-> config, input dtypes, y and logits, from what this layer's forward saved."""
    kind, config, dtypes, y, *logits = _check.instance("saved", saved, Saved).config
    if kind != layer:
        raise ValueError(f"saved must come from {layer}_forward, got what {kind}_forward saved")
    return config, dtypes, y, logits


def _seed(seed, device: torch.device, needed: bool) -> Tensor | None:
    _check.seed(seed, device)
    if not needed:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.detach()
    return torch.full((), seed, dtype=torch.int64, device=device)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


ROUTE = 3 + len(Plan._fields)  # tensors that a gate and its plan make


def _routing_plan(experts: Tensor, E: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The plans of experts [sides, N, H, TOP_K], stacked, for projections in this dtype."""
    _, N, H, TOP_K = experts.shape
    return routing_plan(experts, E, fits(N, H, E, TOP_K, dtype))


def _sum_leading(x: Tensor, keep: int) -> Tensor:
    """Sum over all but the last `keep` axes, in float32."""
    return x.sum(dim=tuple(range(x.ndim - keep)), dtype=torch.float32).to(x.dtype)


# ---- gating


@replayed
def _gating_backward(tensors, mode: str):
    """dweights, dlogits (or None), and what `gating_forward` took and gave -> dx, dsel."""
    dweights, dlogits, x, sel, weights, experts, logits = tensors
    with _as_they_are(x):
        dlogits, dsel = gating_backward(dweights, dlogits, x, sel, weights, experts, logits, mode)
        return dlogits @ sel, dsel


class _Gating(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sel, seed, n_heads, top_k, mode, dropout, stream):
        weights, experts, logits = gating_forward(x, sel, seed, 1, n_heads, top_k, mode, dropout, stream)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, sel, weights, experts, logits)
        ctx.mode = mode
        experts = experts[0]
        ctx.mark_non_differentiable(experts)
        return weights[0], experts, logits[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _, dlogits):
        saved = ctx.saved_tensors
        if dweights is None:
            dweights = torch.zeros_like(saved[2])
        return *_gating_backward((dweights, dlogits, *saved), ctx.mode), None, None, None, None, None, None


def gating(
    x: Tensor,
    sel: Tensor,
    *,
    n_heads: int = 1,
    top_k: int,
    mode: str = "sigmoid",
    expert_dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> Routing:
    """The experts each (token, head) uses and their gates (sigma-MoE, arXiv 2310.10837, equation 10 and section 5).

    x: [..., D]; sel: [H*E, D], row h*E + e. mode: "sigmoid"; "softmax" over all E; "softmax_topk" over the chosen. Equal logits:
    the lower expert id wins; NaN ranks below -inf. expert_dropout strikes (token, head, expert) from selection in training, as a
    function of (seed, token, head, expert) alone; seed: int, int64 scalar tensor, or None (drawn on x's device).
    Returns a Routing of N = x.numel() / D tokens. Raises ValueError or TypeError for shapes, dtypes, devices or top_k > E.
    """
    _check.tensor("x", x, ndim=1)
    D = _check.integer("the width of x", x.shape[-1], 1)
    _check.tensor("sel", sel, None, D)
    autocast = _autocast(x)
    _check.same(x, {"x": x, "sel": sel}, autocast=autocast)
    _check_gate("sel", sel, n_heads, top_k)
    _check.choice("mode", mode, MODES)
    p = _check.probability("expert_dropout", expert_dropout) * float(_check.instance("training", training, bool))
    x, sel = _cast(_compute_dtype(x), x.reshape(_tokens(x), D), sel)
    seed = _seed(seed, x.device, p > 0)
    weights, experts, logits = _Gating.apply(x, sel, seed, n_heads, top_k, mode, p, STREAM_GATE)
    plan = _routing_plan(experts[None], sel.shape[0] // n_heads, torch.bfloat16)  # a float32 gate may serve 16-bit projections
    return Routing(weights, experts, logits, Plan(*(t[0] for t in plan)))


def _check_gate(name: str, sel: Tensor, n_heads: int, top_k: int, what: str = "top_k") -> None:
    _check.integer("n_heads", n_heads, 1)
    if sel.shape[0] == 0 or sel.shape[0] % n_heads:
        raise ValueError(f"{name} must have n_heads * E rows with n_heads = {n_heads}, got {sel.shape[0]}")
    E = sel.shape[0] // n_heads
    if E > MAX_EXPERTS:
        raise ValueError(f"{name} must have at most {MAX_EXPERTS} experts per head, got {E}")
    _check.integer(what, top_k, 1, E, f" (the number of experts per head is {E})")


# ---- projections


class _ValueProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep, x, w, weights, experts, *plan):
        ctx.precision = input_precision(x.dtype)
        v, u = value_forward(x, w, weights, experts, *plan, keep, ctx.precision)
        ctx.save_for_backward(x, w, weights, experts, *plan, u)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        x, w, weights, experts, *plan, u = ctx.saved_tensors
        gated, order_b, dweights = value_backward_rows(dv, u, weights, experts, *plan)
        dx, dw = value_backward(dv, gated, order_b, x, w, weights, experts, *plan, None, None, None, ctx.precision)
        return None, dx, dw, dweights, None, *[None] * len(Plan._fields)


class _OutputProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, w, weights, experts, *plan):
        ctx.precision = input_precision(a.dtype)
        ctx.save_for_backward(a, w, weights, experts, *plan)
        return output_forward(a, w, weights, experts, *plan, ctx.precision)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *output_backward(dy, *ctx.saved_tensors, ctx.precision), None, *[None] * len(Plan._fields)


def value_projection(x: Tensor, w: Tensor, routing: Routing) -> Tensor:
    """v[..., h, :] = sum_j weights[n, h, j] x[n] W[h*E + e_j] (SwitchHead, arXiv 2312.07987, equations 7 and 9).

    x: [..., D]; w: [H*E, D, P]; routing over the same tokens. Returns [..., H, P] in the compute dtype. Gradients reach x, w and
    routing.weights. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check.tensor("x", x, ndim=1)
    D = _check.integer("the width of x", x.shape[-1], 1)
    _check.integer("the head width of w", _check.tensor("w", w, None, D, None).shape[2], 1)
    N = _tokens(x)
    routed, (x2, w2) = _routed(x, N, w, routing, {"x": x, "w": w})
    v = _ValueProjection.apply(torch.is_grad_enabled(), x2.reshape(N, D), w2, *routed[:2], *routed.plan)
    return v.view(*x.shape[:-1], *v.shape[1:])


def output_projection(a: Tensor, w: Tensor, routing: Routing) -> Tensor:
    """y = sum_h sum_j weights[n, h, j] a[n, h] W[h*E + e_j], one reduction (SwitchHead, arXiv 2312.07987, equations 8 and 10).

    a: [..., H, P]; w: [H*E, P, D]; routing over the same tokens. Returns [..., D] in the compute dtype. Gradients reach a, w and
    routing.weights. Raises ValueError or TypeError for shapes, dtypes or devices that do not fit.
    """
    _check.tensor("a", a, ndim=2)
    P = _check.integer("the head width of a", a.shape[-1], 1)
    _check.integer("the output width of w", _check.tensor("w", w, None, P, None).shape[2], 1)
    N = math.prod(a.shape[:-2])
    routed, (a2, w2) = _routed(a, N, w, routing, {"a": a, "w": w}, a.shape[-2])
    H = a.shape[-2]
    y = _OutputProjection.apply(a2.reshape(N, H, P), w2, *routed[:2], *routed.plan)
    return y.view(*a.shape[:-2], w.shape[2])


def _routed(x: Tensor, N: int, w: Tensor, routing: Routing, tensors: dict, heads: int | None = None) -> tuple[Any, Any]:
    """Check a routing against N tokens, the heads if any and the experts of w; complete its plan; cast the tensors."""
    _check.instance("routing", routing, Routing)
    _check.same(x, tensors, autocast=_autocast(x))
    weights = _check.tensor("routing.weights", routing.weights, N, None, None)
    experts = _check.tensor("routing.experts", routing.experts, *weights.shape)
    if weights.dtype != torch.float32 or experts.dtype != torch.int32:
        raise TypeError(f"routing.weights and routing.experts must be float32 and int32, got {weights.dtype} and {experts.dtype}")
    for name, t in (("routing.weights", weights), ("routing.experts", experts)):
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, expected {x.device} like the other arguments")
    H = _check.integer("the number of heads of routing", weights.shape[1], 1)
    if heads not in (None, H):
        raise ValueError(f"a must have shape [..., {H}, {w.shape[1]}] for a routing of {H} heads, got {list(x.shape)}")
    if w.shape[0] == 0 or w.shape[0] % H:
        raise ValueError(f"w must have H * E experts for a routing of H = {H} heads, got {w.shape[0]}")
    E, TOP_K = w.shape[0] // H, weights.shape[2]
    _check.integer("TOP_K of routing", TOP_K, 1, E)
    if routing.plan is None:
        experts = experts.clamp(0, E - 1)  # whatever it holds, no access leaves the tensors
        plan = Plan(*(t[0] for t in routing_plan(experts[None], E, False)))  # without sets: experts by hand may repeat
        routing = routing._replace(experts=experts, plan=plan)
    else:
        plan = _check.instance("routing.plan", routing.plan, Plan)
        _check.tensor("routing.plan.set_order", plan.set_order, ndim=1)
        for name, t, expected in zip(Plan._fields, plan, plan_shapes(N, H, E, TOP_K, plan.set_order.numel() > 0), strict=True):
            _check.tensor(f"routing.plan.{name}", t, *expected)
            dtype = torch.int64 if name == "visited" else torch.int32
            if t.dtype != dtype or t.device != x.device:
                raise TypeError(f"routing.plan.{name} must be {dtype} on {x.device}, got {t.dtype} on {t.device}")
    return routing, _cast(_compute_dtype(x), *tensors.values())


# ---- attention


class _AttentionConfig(NamedTuple):
    kind: str  # "none", "rope" or "xl"
    rotated: int  # channels of a head, with RoPE
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
    if c.rotated:
        q, k = rope_rotate(q, c.rotated, c.base, offset, False), rope_rotate(k, c.rotated, c.base, 0, False)
    elif c.kind == "xl":
        position_q = q if position_bias is None else q + position_bias
        q_pos, k_pos, narrow = xl_query(position_q, pos, S, c.window, c.causal, c.precision)
        q = q if content_bias is None else q + content_bias
    o, lse = attention_forward(q, k, v, q_pos, k_pos, mask, cu_seqlens, c.causal, c.window, c.scale, c.precision)
    return o, lse, q, k, v, pos, content_bias, position_bias, mask, cu_seqlens, position_q, q_pos, k_pos, o, lse, narrow


@replayed
def _attention_backward(tensors, c: _AttentionConfig, joint: bool = False):
    """do, dlse and what the forward kept -> dq, dk, dv, d pos, d content_bias, d position_bias (None where the input was None);
    with `joint`, dq and dk side by side and None."""
    with _as_they_are(tensors[0]):
        return _attention_gradients(*tensors, c, joint)


def _attention_gradients(
    do, dlse, q, k, v, pos, content_bias, position_bias, mask, cu_seqlens, position_q, q_pos, k_pos, o, lse, narrow, c, joint
):
    H, P = q.shape[2:]
    offset = k.shape[1] - q.shape[1]
    first, dk, dv, dq_pos = attention_backward(
        do, dlse, q, k, v, q_pos, k_pos, mask, cu_seqlens, o, lse, c.causal, c.window, c.scale, c.precision, joint
    )
    dq = first[:, :, :H]
    dpos = dcontent = dposition = None
    if c.rotated:
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
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * (q k^T + position) + mask) v, fused: memory linear in T.

    q: [B, T, H, P]; k: [B, S, Hkv, P]; v: [B, S, Hkv, Pv], query head h reads key head h // (H // Hkv). The queries are the last
    T positions: S >= T, and any S with causal=False and position=None. scale defaults to P**-0.5. window=w: a query sees the
    last w keys up to itself (causal) or the keys at distance < w. key_padding_mask: bool [B, S], True = removed. cu_seqlens:
    int32 [n+1], n sequences packed along T, with B = 1 and S = T; max_seqlen is accepted for compatibility and not needed.
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
    scale = P**-0.5 if scale is None else _check.number("scale", scale)
    dtype = _compute_dtype(q)
    q, k, v, pos, content_bias, position_bias = _cast(dtype, q, k, v, pos, content_bias, position_bias)
    config = _AttentionConfig(kind, _rotated(fraction, P), base, causal, window or 0, scale, input_precision(dtype))
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


# ---- sigma-MoE


class _MoEConfig(NamedTuple):
    top_k: int
    activation: str
    mode: str
    dropout: float
    expert_dropout: float
    precision: str


@replayed
def _moe_forward(tensors, dtype: torch.dtype, c: _MoEConfig):
    """x [N, D], gate_input [N, D] or None, the weights, seed -> y [N, D_out] in dtype, logits [N, E], then the tensors
    `_moe_backward` takes."""
    x, gate_input, keys, values, expert_sel, bias, o_bias, seed = tensors
    x, gate_input = cast(x, dtype), gate_input if gate_input is None else cast(gate_input, dtype)
    given = [w for w in (keys, values, expert_sel, bias, o_bias) if w is not None]
    blocks = [w.view(1, *w.shape) if w.ndim == 2 else w.view(1, 1, -1) if w.ndim == 1 else w for w in given]
    made = iter(assemble(dtype, *(((w,), tuple(w.shape[1:])) for w in blocks)))
    new: Any = [None if w is None else next(made).view(w.shape) for w in (keys, values, expert_sel, bias, o_bias)]
    keys, values, expert_sel, bias, o_bias = new
    gate_x = x if gate_input is None else gate_input
    weights, experts, logits = gating_forward(gate_x, expert_sel, seed, 1, 1, c.top_k, c.mode, c.expert_dropout, STREAM_GATE)
    order, offsets = (t[0] for t in routing_plan(experts, expert_sel.shape[0], False)[:2])
    y, z = mlp_forward(
        x, keys, values, bias, o_bias, seed, weights[0], experts[0], order, offsets,
        c.activation, c.dropout, STREAM_ACTIVATION, c.precision,
    )  # fmt: skip
    return (
        y, logits.view(x.shape[0], expert_sel.shape[0]),
        x, gate_input, keys, values, expert_sel, bias, o_bias, seed, weights, experts, logits, order, offsets, z,
    )  # fmt: skip


@replayed
def _moe_backward(tensors, dtypes, c: _MoEConfig):
    """dy, dlogits and what the forward kept -> gradients of x, gate_input, keys, values, expert_sel, bias, o_bias in their dtypes
    (None where the input was None)."""
    with _as_they_are(tensors[0]):
        return _moe_gradients(*tensors, dtypes, c, COLUMNS // 2)


def _moe_gradients(
    dy, dlogits, x, gate_input, keys, values, expert_sel, bias, o_bias, seed, weights, experts, logits, order, offsets, z,
    dtypes, c: _MoEConfig, columns: int,
):  # fmt: skip
    dz, dkeys, dvalues, dbias, dweights = mlp_backward(
        dy, x, keys, values, bias, o_bias, seed, weights[0], experts[0], order, offsets, z,
        c.activation, c.dropout, STREAM_ACTIVATION, c.precision, dtypes[2], dtypes[3],
    )  # fmt: skip
    dlogits = None if dlogits is None else dlogits.reshape(logits.shape)
    gate_x = x if gate_input is None else gate_input
    dlogits, dsel = gating_backward(dweights, dlogits, gate_x, expert_sel, weights, experts, logits, c.mode)
    reaching_x, dgate = ((dlogits, expert_sel), None) if gate_input is None else ((None, None), dlogits @ expert_sel)
    dx = mlp_backward_input(dz, keys, order, offsets, c.top_k, *reaching_x, c.precision, dtypes[0], columns)
    do_bias = None if o_bias is None else _sum_leading(dy, 1)
    return _to((dx, dgate, dkeys, dvalues, dsel, dbias, do_bias), dtypes)


class _SigmaMoE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        inputs, seed, dtype, config = args[:7], args[7], args[8], args[9:]
        ctx.config, ctx.dtypes = config, _dtypes(inputs)
        y, logits, *saved = _moe_forward((*inputs, seed), dtype, _MoEConfig(*config))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.y_shape = y.shape
        return y, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlogits):
        saved = ctx.saved_tensors
        dy = saved[0].new_zeros(ctx.y_shape) if dy is None else dy
        grads = _moe_backward((dy, dlogits, *saved), ctx.dtypes, _MoEConfig(*ctx.config))
        return *grads, None, None, *[None] * len(ctx.config)


def sigma_moe(
    x: Tensor,
    weights: SigmaMoEWeights,
    *,
    top_k: int,
    gate_input: Tensor | None = None,
    activation: str = "relu",
    mode: str = "sigmoid",
    dropout: float = 0.0,
    expert_dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = sum_j gate_j * (phi(x W_up[e_j] + b_up[e_j]) W_down[e_j]) + b_down (sigma-MoE, arXiv 2310.10837, equation 11).

    x: [..., D]; weights: SigmaMoEWeights; gate_input: [..., D], computes the gate instead of x (MoEUT). activation: "relu",
    "gelu" (exact), "silu", "swiglu", "geglu". dropout acts on the activated experts, expert_dropout on the selection, both in
    training only.
    Returns y [..., D_out] in the compute dtype and the gate's logits [..., E], float32, for `entropy_regularizer`.
    """
    config = _check_moe(x, weights, top_k, gate_input, activation, mode, dropout, expert_dropout, training)
    D = x.shape[-1]
    N = _tokens(x)
    tensors = x.reshape(N, D), None if gate_input is None else gate_input.reshape(N, D), *weights
    seed = _seed(seed, x.device, config.dropout > 0 or config.expert_dropout > 0)
    y, logits = _SigmaMoE.apply(*_distinct(*tensors), seed, _compute_dtype(x), *config)
    return y.view(*x.shape[:-1], y.shape[1]), logits.view(*x.shape[:-1], logits.shape[1])


@remembered
def _check_moe(x, weights, top_k, gate_input, activation, mode, dropout, expert_dropout, training, what="") -> _MoEConfig:
    _check.tensor("x", x, ndim=1)
    _check.instance("weights", weights, SigmaMoEWeights)
    _check.choice("activation", activation, ACTIVATIONS)
    _check.choice("mode", mode, MODES)
    D = _check.integer("the width of x", x.shape[-1], 1)
    keys = _check.tensor("weights.keys", weights.keys, None, D, None)
    E, width = keys.shape[0], keys.shape[2]
    gated = activation in ("swiglu", "geglu")
    if width == 0 or (gated and width % 2):
        expected = "[E, D, 2G]" if gated else "[E, D, G]"
        raise ValueError(f"weights.keys must have shape {expected} for activation {activation!r}, got {list(keys.shape)}")
    values = _check.tensor("weights.values", weights.values, E, width // 2 if gated else width, None)
    _check.integer("the output width of weights.values", values.shape[2], 1)
    _check.tensor("weights.expert_sel", weights.expert_sel, E, D)
    _check_gate("weights.expert_sel", weights.expert_sel, 1, top_k, f"{what}top_k")
    if weights.bias is not None:
        _check.tensor("weights.bias", weights.bias, E, width)
    if weights.o_bias is not None:
        _check.tensor("weights.o_bias", weights.o_bias, weights.values.shape[2])
    if gate_input is not None:
        _check.tensor("gate_input", gate_input, *x.shape)
    tensors = {"x": x, "gate_input": gate_input, **{f"weights.{k}": v for k, v in weights._asdict().items()}}
    _check.same(x, tensors, autocast=_autocast(x))
    p, delta = (
        _check.probability(f"{what}dropout", dropout),
        _check.probability(f"{what}expert_dropout", expert_dropout),
    )
    _check.instance("training", training, bool)
    on = float(training)
    return _MoEConfig(top_k, activation, mode, on * p, on * delta, input_precision(_compute_dtype(x)))


def entropy_regularizer(logits: Tensor) -> Tensor:
    """sum_e p_e log p_e with p the mean over tokens of softmax(logits): <= 0, to be added to the loss (sigma-MoE, equation 21).

    logits: [..., E], the raw logits of a gate. Returns a float32 scalar; worked in log space.
    """
    _check.tensor("logits", logits, ndim=1)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be a floating tensor, got {logits.dtype}")
    if logits.numel() == 0:
        raise ValueError(f"logits must hold at least one token and one expert, got shape {list(logits.shape)}")
    log_p = torch.log_softmax(logits.reshape(_tokens(logits), logits.shape[-1]).float(), dim=-1)
    log_p = log_p.clamp(min=-1e4)  # 0 log 0 = 0 for an expert that is impossible
    log_mean = torch.logsumexp(log_p, dim=0) - math.log(log_p.shape[0])
    return torch.sum(log_mean.exp() * log_mean)


# ---- SwitchHead


class _HeadConfig(NamedTuple):
    n_heads: int
    width: int  # P, not padded
    top_k: int
    kind: str
    fraction: float
    base: float
    causal: bool
    window: int
    dropout: float
    expert_dropout: float
    precision: str
    keep: bool  # what only a backward pass needs


def _attention_config(c: _HeadConfig) -> _AttentionConfig:
    """Of queries and keys that the layer has rotated itself, in place."""
    return _AttentionConfig(c.kind, 0, c.base, c.causal, c.window, c.width**-0.5, c.precision)


def _head_inputs(dtype: torch.dtype, c: _HeadConfig, x, k_src, v_src, q, k, v, o, sel_v, sel_o, pos):
    """What `switchhead` was given, as the kernels take it: in dtype, heads padded (NOTE [Head widths]), the weights of queries
    and keys in one tensor, and those of both gates -> x, k_src, v_src, qk [2*H*P, D], v, o, sel [2*H*E or H*E, D], pos."""
    H, P, D = c.n_heads, c.width, x.shape[2]
    wide = P if dtype == torch.float32 else cdiv(P, 32) * 32
    x, k_src, v_src = (t if t is None else cast(t, dtype) for t in (x, k_src, v_src))
    rows = (wide, D)
    groups: list[tuple[tuple[Tensor, ...], tuple[int, int]]] = [((q.reshape(H, P, D), k.reshape(H, P, D)), rows)]
    groups.append(((v,), (D, wide)) if v.ndim == 3 else ((v.reshape(H, P, D),), rows))
    groups.append(((o,), (wide, o.shape[2])) if o.ndim == 3 else ((o.reshape(-1, H, P),), (H, wide)))
    groups.append((tuple(s[None] for s in (sel_v, sel_o) if s is not None), tuple(sel_o.shape)))
    if pos is not None:
        groups.append(((pos.reshape(H, P, -1),), (wide, pos.shape[1])))
    qk, new_v, new_o, sel, *new_pos = assemble(dtype, *groups)
    return (
        x, k_src, v_src, qk.flatten(0, 1), new_v if v.ndim == 3 else new_v.flatten(0, 1),
        new_o if o.ndim == 3 else new_o.flatten(1), sel.flatten(0, 1), new_pos[0].flatten(0, 1) if new_pos else None,
    )  # fmt: skip


def _sel_sides(sel: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """sel_v, None where the output side's serves both, and sel_o."""
    if v.ndim == 2 or len(sel) == len(v):
        return None, sel
    sel_v, sel_o = sel.chunk(2)
    return sel_v, sel_o


def _expert_out(o: Tensor, H: int) -> Tensor:
    """The output weight as experts [H*E, P, D]: for one expert per head, o is [D, H*P]."""
    return o if o.ndim == 3 else o.view(o.shape[0], H, o.shape[1] // H).permute(1, 2, 0)


@replayed
def _head_forward(tensors, dtype: torch.dtype, c: _HeadConfig):
    """x [B, T, D], k_src and v_src [B, S, D] or None, the weights, mask, cu_seqlens, seed -> y [B, T, D], logits_v, logits_o,
    then what `_head_backward` takes.

    The tensors kept are: the 11 inputs, as `_head_inputs` made them; what the gates on x made (weights, experts, logits and the
    seven of the plan, each with the sides as another first axis: value and output, or output alone); the same of the value gate
    on k_src (None without one); u (None with one expert); then those of the attention.
    """
    *given, mask, cu_seqlens, seed = tensors
    inputs = (*_head_inputs(dtype, c, *given), mask, cu_seqlens, seed)
    x, k_src, v_src, qk, v, o, sel, pos = inputs[:8]
    B, T, D = x.shape
    H, P = c.n_heads, qk.shape[0] // (2 * c.n_heads)
    sel_v, sel_o = _sel_sides(sel, v)
    ks = x if k_src is None else k_src
    vs = ks if v_src is None else v_src
    S = ks.shape[1]
    x2, k2, v2 = x.reshape(B * T, D), ks.reshape(B * S, D), vs.reshape(B * S, D)

    def route(tokens, sel, sides, stream):
        gates = gating_forward(tokens, sel, seed, sides, H, c.top_k, "sigmoid", c.expert_dropout, stream)
        return *gates, *_routing_plan(gates[1], sel.shape[0] // (sides * H), tokens.dtype)

    both = k_src is None and sel_v is not None
    route_x = route(x2, sel, 2, STREAM_GATE_V) if both else route(x2, sel_o, 1, STREAM_GATE_O)
    route_k: tuple[Tensor | None, ...] = (None,) * len(route_x)
    if v.ndim == 3 and k_src is not None:
        route_k = route(k2, sel_o if sel_v is None else sel_v, 1, STREAM_GATE_V)
    (weights_v, experts_v, logits_v, *plan_v), (weights_o, experts_o, logits_o, *plan_o) = _sides(route_x, route_k)

    u = None
    if v.ndim == 2:  # one expert: a dense value projection
        values, logits_v = v2 @ v.t(), None
    else:
        values, u = value_forward(v2, v, weights_v, experts_v, *plan_v, c.keep, c.precision)
    rotated = _rotated(c.fraction, c.width)
    if _joint(k_src, c):
        both = (x2 @ qk.t()).view(B, T, 2 * H, P)
        rope_rotate_(both, rotated, c.base, 0, False)
        queries, keys = both.split(H, 2)
    else:
        q, k = qk.chunk(2)
        queries, keys = x2 @ q.t(), (k2 @ k.t()).view(B, S, H, P)
        if c.dropout > 0:
            queries = dropout_rows(queries, seed, c.dropout, STREAM_QUERY, P, c.width)
        queries = queries.view(B, T, H, P)
        rope_rotate_(queries, rotated, c.base, S - T, False)
        rope_rotate_(keys, rotated, c.base, 0, False)
    a, _, *attention_saved = _attention_forward(
        (queries, keys, values.view(B, S, H, P), pos, None, None, mask, cu_seqlens), _attention_config(c)
    )
    y = output_forward(a.view(B * T, H, P), _expert_out(o, H), weights_o, experts_o, *plan_o, c.precision)
    return y.view(B, T, y.shape[1]), logits_v, logits_o, *inputs, *route_x, *route_k, u, *attention_saved


def _joint(k_src, c: _HeadConfig) -> bool:
    """Whether queries and keys are made by one product, side by side."""
    return k_src is None and c.dropout == 0


def _sides(route_x, route_k):
    """What `_head_forward` kept of the gates -> the value side's and the output side's, one and the same where they share it."""
    output = [t[-1] for t in route_x]
    if route_k[0] is not None:
        return [t[0] for t in route_k], output
    return [t[0] for t in route_x] if len(route_x[0]) == 2 else output, output


@replayed
def _head_backward(tensors, dtypes, c: _HeadConfig):
    """dy, dlogits_v, dlogits_o and what the forward kept -> gradients of x, k_src, v_src, q, k, v, o, sel_v, sel_o, pos as
    `switchhead` was given them, in their dtypes (None where the input was None)."""
    with _as_they_are(tensors[0]):
        return _head_gradients(*tensors[:3], tensors[3:], dtypes, c)


def _head_gradients(dy, dlogits_v, dlogits_o, saved, dtypes, c: _HeadConfig):
    x, k_src, v_src, qk, v, o, sel, _, _, _, seed = saved[:11]
    after = 11 + 2 * ROUTE
    route_x, route_k, u, attention_saved = saved[11 : 11 + ROUTE], saved[11 + ROUTE : after], saved[after], saved[after + 1 :]
    sel_v, sel_o = _sel_sides(sel, v)
    (weights_v, experts_v, _, *plan_v), (weights_o, experts_o, _, *plan_o) = _sides(route_x, route_k)
    a = attention_saved[11]
    B, T, D = x.shape
    H, P = c.n_heads, qk.shape[0] // (2 * c.n_heads)
    ks = x if k_src is None else k_src
    vs = ks if v_src is None else v_src
    S = ks.shape[1]
    x2, k2, v2 = x.reshape(B * T, D), ks.reshape(B * S, D), vs.reshape(B * S, D)

    def rows(d):
        """[.., H*P, D] without the rows of padding."""
        return d.view(-1, P, D)[:, : c.width].reshape(-1, D)

    dy = dy.reshape(B * T, dy.shape[2])
    a = a.view(B * T, H, P)
    da, do, dweights_o = output_backward(dy, a, _expert_out(o, H), weights_o, experts_o, *plan_o, c.precision, dtypes[6], c.width)
    if o.ndim == 2:
        do = do.permute(2, 0, 1).reshape(o.shape[0], H * c.width)
    joint, rotated = _joint(k_src, c), _rotated(c.fraction, c.width)
    dqueries, dkeys, dvalues, dpos, _, _ = _attention_gradients(
        da.view(B, T, H, P), None, *attention_saved, _attention_config(c), joint
    )
    dvalues = dvalues.view(B * S, H, P)
    if joint:
        rope_rotate_(dqueries, rotated, c.base, 0, True)
        both = dqueries.view(B * T, 2 * H * P)
        dq, dk = (both.t() @ x2).chunk(2)
        dx = both @ qk
    else:
        rope_rotate_(dqueries, rotated, c.base, S - T, True)
        rope_rotate_(dkeys, rotated, c.base, 0, True)
        dqueries, dkeys = dqueries.view(B * T, H * P), dkeys.view(B * S, H * P)
        if c.dropout > 0:
            dqueries = dropout_rows(dqueries, seed, c.dropout, STREAM_QUERY, P, c.width)
        q, k = qk.chunk(2)
        dq, dk = dqueries.t() @ x2, dkeys.t() @ k2
        dx, dk2 = dqueries @ q, dkeys @ k
        if k_src is None:
            dx += dk2

    # the gates
    of_values: Any = (None, None, None)
    if v.ndim == 3:
        of_values = value_backward_rows(dvalues, u, weights_v, experts_v, *plan_v)
    gated, order_b, dweights_v = of_values
    sel_k = dgate_k = dsel_k = None
    sel_x, dweights, dlogits = sel_o, dweights_o[None], dlogits_o
    if route_k[0] is not None:
        sel_k = sel_o if sel_v is None else sel_v
        dgate_k, dsel_k = gating_backward(dweights_v[None], dlogits_v, k2, sel_k, *route_k[:3], "sigmoid")
    elif sel_v is not None:  # both sides in one
        sel_x, dweights = sel, torch.stack([dweights_v, dweights_o])
        if dlogits_v is not None or dlogits_o is not None:
            none = torch.zeros_like(route_x[2][0])
            dlogits = torch.stack([none if g is None else g for g in (dlogits_v, dlogits_o)])
    elif dweights_v is not None:  # both sides share the output side's routing
        dweights, dlogits = dweights + dweights_v, _add(dlogits_o, dlogits_v)
    dgate_x, dsel_x = gating_backward(dweights, dlogits, x2, sel_x, *route_x[:3], "sigmoid")
    dsel_v, dsel_o = (None, dsel_x) if len(sel_x) == len(sel_o) else dsel_x.split(len(sel_o))
    if dsel_k is not None:
        dsel_v, dsel_o = (None, dsel_o + dsel_k) if sel_v is None else (dsel_k, dsel_o)

    def value(dtype, base, dgate, sel):
        """The gradient of the source of values, with what else reaches it, and of v."""
        if v.ndim == 3:
            added = base, dgate, sel, c.precision, dtype, dtypes[5], c.width
            return value_backward(dvalues, gated, order_b, v2, v, weights_v, experts_v, *plan_v, *added)
        flat = dvalues.view(B * S, H * P)
        d = flat @ v if base is None else base.addmm_(flat, v)
        return d if dgate is None else d.addmm_(dgate, sel), rows(flat.t() @ v2)

    dv2 = None
    if v_src is not None:
        (dv2, dv), dx = value(dtypes[2], None, None, None), dx.addmm_(dgate_x, sel_x)
        if k_src is not None and dgate_k is not None:
            dk2.addmm_(dgate_k, sel_k)
    elif k_src is not None:
        (dk2, dv), dx = value(dtypes[1], dk2, dgate_k, sel_k), dx.addmm_(dgate_x, sel_x)
    else:
        dx, dv = value(dtypes[0], dx, dgate_x, sel_x)
    dpos = None if dpos is None else rows(dpos)
    dx, dk2 = dx.view(x.shape), None if k_src is None else dk2.view(ks.shape)
    dv2 = None if dv2 is None else dv2.view(vs.shape)
    return _to((dx, dk2, dv2, rows(dq), rows(dk), dv, do, dsel_v, dsel_o, dpos), dtypes)


class _SwitchHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        inputs, (mask, cu_seqlens, seed, dtype), config = args[:10], args[10:14], _HeadConfig(*args[14:])
        ctx.config, ctx.dtypes = args[14:], _dtypes(inputs)
        y, logits_v, logits_o, *saved = _head_forward((*inputs, mask, cu_seqlens, seed), dtype, config)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if logits_v is logits_o:
            logits_v = logits_v.clone()
        elif torch.compiler.is_compiling() and logits_v is not None:  # parts of one tensor, whose gradients 2.11 would lose
            logits_v, logits_o = logits_v.clone(), logits_o.clone()
        ctx.y_shape = y.shape
        return y, logits_v, logits_o

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlogits_v, dlogits_o):
        saved = ctx.saved_tensors
        if dy is None:
            dy = saved[0].new_zeros(ctx.y_shape)
        grads = _head_backward((dy, dlogits_v, dlogits_o, *saved), ctx.dtypes, _HeadConfig(*ctx.config))
        return *grads, *[None] * (4 + len(ctx.config))


def _head_sources(x, weights, position=None, k_src=None, v_src=None, **_) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """k_src and v_src where they differ from x (and from each other), and the position weight."""
    k_src = None if k_src is x else k_src
    v_src = None if v_src is (x if k_src is None else k_src) else v_src
    pos = None
    if isinstance(position, XL):
        pos = weights.pos_to_pk if position.weight is None else position.weight
    return k_src, v_src, pos


@remembered
def _check_head(
    x, weights, *, top_k, position=RoPE(), k_src=None, v_src=None, causal=True, window=None, key_padding_mask=None,
    cu_seqlens=None, max_seqlen=None, dropout=0.0, expert_dropout=0.0, training=False, what="",
) -> _HeadConfig:  # fmt: skip
    _check.tensor("x", x, None, None, None)
    B, T, D = x.shape
    _check.integer("the width of x", D, 1)
    _check.instance("weights", weights, SwitchHeadWeights)
    w = weights
    names = {f"weights.{name}": value for name, value in w._asdict().items()}
    for name, t in names.items():
        if t is not None:
            _check.tensor(name, t)
    _check.tensor("weights.q", w.q, None, D)
    if w.sel_o is None:
        raise ValueError("weights.sel_o must be a tensor [H*E, D] ([H, D] with one expert per head), got None")
    if w.v.ndim == 3:
        P = w.v.shape[2]
        if P == 0 or w.q.shape[0] == 0 or w.q.shape[0] % P:
            raise ValueError(f"weights.q must have shape [H*P, D] with P = {P} from weights.v, got {list(w.q.shape)}")
        H = w.q.shape[0] // P
        if w.v.shape[0] == 0 or w.v.shape[0] % H:
            raise ValueError(f"weights.v must have H*E experts with H = {H} from weights.q, got {w.v.shape[0]}")
        rows = w.v.shape[0]
        _check.tensor("weights.v", w.v, rows, D, P)
        _check.integer("the output width of weights.o", _check.tensor("weights.o", w.o, rows, P, None).shape[2], 1)
        _check.tensor("weights.sel_o", w.sel_o, rows, D)
        if w.sel_v is not None:
            _check.tensor("weights.sel_v", w.sel_v, rows, D)
    else:
        _check.tensor("weights.sel_o", w.sel_o, None, D)
        H = w.sel_o.shape[0]
        if H == 0 or w.q.shape[0] == 0 or w.q.shape[0] % H:
            raise ValueError(f"weights.q must have shape [H*P, D] with H = {H} from weights.sel_o, got {list(w.q.shape)}")
        P = w.q.shape[0] // H
        _check.tensor("weights.v", w.v, H * P, D)
        _check.integer("the output width of weights.o", _check.tensor("weights.o", w.o, None, H * P).shape[0], 1)
        if w.sel_v is not None:
            raise ValueError("weights.sel_v must be None with one expert per head (a dense value projection)")
    _check.tensor("weights.k", w.k, H * P, D)
    _check.integer("the head width P", P, 1, MAX_HEAD_WIDTH)
    _check_gate("weights.sel_o", w.sel_o, H, top_k)

    kind, fraction, base, pos = "none", 0.0, 0.0, None
    if isinstance(position, RoPE):
        kind, fraction, base = "rope", *_check_rope(position)
    elif isinstance(position, XL):
        if position.weight is not None and w.pos_to_pk is not None:
            raise ValueError("position.weight and weights.pos_to_pk are both given: expected exactly one")
        if position.content_bias is not None or position.position_bias is not None:
            raise ValueError("position.content_bias and position.position_bias must be None: SwitchHead has neither")
        kind, pos = "xl", w.pos_to_pk if position.weight is None else position.weight
        _check_xl(XL(pos), H, P)
        _check.tensor("the position weight", pos, H * P, D)
    elif position is not None:
        raise TypeError(f"position must be RoPE, XL or None, got {type(position).__name__}")
    if kind != "xl" and w.pos_to_pk is not None:
        raise ValueError("weights.pos_to_pk is given but position is not XL()")

    if k_src is not None:
        _check.tensor("k_src", k_src, B, None, D)
    S = T if k_src is None else k_src.shape[1]
    if v_src is not None:
        _check.tensor("v_src", v_src, B, S, D)
    _check.same(
        x,
        {"x": x, "k_src": k_src, "v_src": v_src, **names, "position.weight": pos},
        autocast=_autocast(x),
    )
    _check_masks(B, T, S, causal, window, key_padding_mask, cu_seqlens, max_seqlen, position, x.device)
    p = _check.probability(f"{what}dropout", dropout)
    delta = _check.probability("expert_dropout", expert_dropout)
    _check.instance("training", training, bool)
    on = float(training)
    return _HeadConfig(
        H, w.q.shape[0] // H, top_k, kind, fraction, base, causal, window or 0, on * p, on * delta,
        input_precision(_compute_dtype(x)), torch.is_grad_enabled(),
    )  # fmt: skip


def switchhead(
    x: Tensor,
    weights: SwitchHeadWeights,
    *,
    top_k: int,
    position: RoPE | XL | None = RoPE(),
    k_src: Tensor | None = None,
    v_src: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout: float = 0.0,
    expert_dropout: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    return_logits: bool = False,
):
    """SwitchHead attention (arXiv 2312.07987, equations 7 to 10): few heads whose values and outputs are mixtures of experts.

    x: [B, T, D], the queries' source; k_src: [B, S, D], the keys' and the value gate's (default x); v_src: [B, S, D], what the
    value experts see (default k_src). S > T means memory or a prefix in front of x. H, E and P follow from the weights' shapes.
    position: RoPE(), XL() (which takes weights.pos_to_pk) or None. dropout acts on q. Masks as in `attention`.
    Returns y [B, T, D], no residual and no norm; with return_logits also (logits_v [B*S, H, E] or None with one expert,
    logits_o [B*T, H, E]), float32 and differentiable. Raises ValueError or TypeError for anything that does not fit.
    """
    config = _check_head(
        x, weights, top_k=top_k, position=position, k_src=k_src, v_src=v_src, causal=causal, window=window,
        key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, dropout=dropout,
        expert_dropout=expert_dropout, training=training,
    )  # fmt: skip
    seed = _seed(seed, x.device, config.dropout > 0 or config.expert_dropout > 0)
    k_src, v_src, pos = _head_sources(x, weights, position, k_src, v_src)
    tensors = x, k_src, v_src, *weights[:6], pos
    y, logits_v, logits_o = _SwitchHead.apply(
        *_distinct(*tensors), key_padding_mask, cu_seqlens, seed, _compute_dtype(x), *config
    )
    return (y, (logits_v, logits_o)) if return_logits else y


def switchhead_forward(x: Tensor, weights: SwitchHeadWeights, *, return_logits: bool = False, **options):
    """`switchhead` without autograd, with the same keywords -> (outputs, saved), outputs as `switchhead` returns them."""
    _check.keywords("switchhead_forward", options, HEAD_KEYWORDS)
    seed = options.pop("seed", None)
    config = _check_head(x, weights, **options)
    k_src, v_src, pos = _head_sources(x, weights, **options)
    needed = config.dropout > 0 or config.expert_dropout > 0
    seed = _seed(seed, x.device, needed)
    mask, cu_seqlens = options.get("key_padding_mask"), options.get("cu_seqlens")
    inputs = (x, k_src, v_src, *weights[:6], pos)
    config = config._replace(keep=True)
    with torch.no_grad():
        given = (*inputs, mask, cu_seqlens, seed)
        y, logits_v, logits_o, *saved = _head_forward(given, _compute_dtype(x), config)
    outputs = (y, (logits_v, logits_o)) if return_logits else y
    return outputs, Saved(tuple(saved), ("switchhead", config, _dtypes(inputs), y, logits_v, logits_o))


def switchhead_backward(
    grad_y: Tensor, saved: Saved, grad_logits: tuple[Tensor | None, Tensor | None] | None = None
) -> SwitchHeadGradients:
    """The gradients of `switchhead_forward`. grad_y: [B, T, D]; grad_logits: those of (logits_v, logits_o), or None.

    A source that was x itself, or v_src that was k_src itself, has its gradient added there and None of its own.
    """
    config, dtypes, y, logits = _saved_config(saved, "switchhead")
    dlogits = (None, None) if grad_logits is None else grad_logits
    if not isinstance(dlogits, (tuple, list)) or len(dlogits) != 2:
        raise TypeError(f"grad_logits must be a pair or None, got {type(grad_logits).__name__}")
    _check.gradient("grad_y", _check.tensor("grad_y", grad_y), y)
    for i in (0, 1):
        _check.gradient(f"grad_logits[{i}]", dlogits[i], logits[i])
    with torch.no_grad():
        grads = _head_backward((grad_y.to(y.dtype), *dlogits, *saved.tensors), dtypes, config)
    return SwitchHeadGradients(*grads[:3], SwitchHeadWeights(*grads[3:]))


# ---- SwitchAll


class _BlockConfig(NamedTuple):
    eps: float
    dropout: float
    head: _HeadConfig
    moe: _MoEConfig


HEAD_SAVED = 26 + 2 * ROUTE  # tensors that `_head_forward` keeps


def _norm_forward(x, weight, bias, eps):
    """LayerNorm in float32 or x's own dtype -> output, mean, rstd."""
    return torch.ops.aten.native_layer_norm(x, [x.shape[-1]], weight.to(x.dtype), bias.to(x.dtype), eps)


def _norm_backward(dh, x, mean, rstd, weight, bias):
    w, b = weight.to(x.dtype), bias.to(x.dtype)
    return torch.ops.aten.native_layer_norm_backward(cast(dh, x.dtype), x, [x.shape[-1]], mean, rstd, w, b, [True, True, True])


@replayed
def _block_forward(tensors, dtype: torch.dtype, c: _BlockConfig):
    """x, norm 1, (q, k, v, o, sel_v, sel_o, pos), norm 2, (keys, values, expert_sel, bias, o_bias), mask, cu_seqlens, seed; the
    dtype of the products.

    -> y, logits, then the tensors `_block_backward` takes: x, norm weights and statistics, x1, mask seed, then both halves'.
    """
    (x, w1, b1), head, (w2, b2), moe, (mask, cu_seqlens, seed) = (
        tensors[:3], tensors[3:10], tensors[10:12], tensors[12:17], tensors[17:],
    )  # fmt: skip
    B, T, D = x.shape

    def residual(branch, stream):
        if c.dropout > 0:
            branch = dropout_rows(branch.reshape(B * T, D), seed, c.dropout, stream).view(B, T, D)
        return branch if x.dtype == torch.float32 else branch.to(x.dtype)  # float32 is what the sum has anyway

    h, mean1, rstd1 = _norm_forward(x, w1, b1, c.eps)
    attended, _, _, *head_saved = _head_forward((h, None, None, *head, mask, cu_seqlens, seed), dtype, c.head)
    x1 = x + residual(attended, STREAM_RESIDUAL_ATTENTION)
    h, mean2, rstd2 = _norm_forward(x1, w2, b2, c.eps)
    y, logits, *moe_saved = _moe_forward((h.view(B * T, D), None, *moe, seed), dtype, c.moe)
    y = x1 + residual(y.view(B, T, D), STREAM_RESIDUAL_MOE)
    own = (x, w1, b1, mean1, rstd1, x1, w2, b2, mean2, rstd2, seed)
    return y, logits.view(B, T, logits.shape[1]), *own, *head_saved, *moe_saved


@replayed
def _block_backward(tensors, dtypes, c: _BlockConfig):
    """dy, dlogits and what the forward kept -> gradients of x, w1, b1, the seven of head, w2, b2, the five of moe, in their
    dtypes (None where the input was None)."""
    with _as_they_are(tensors[0]):
        return _block_gradients(*tensors[:2], tensors[2:], dtypes, c)


def _block_gradients(dy, dlogits, saved, dtypes, c: _BlockConfig):
    x, w1, b1, mean1, rstd1, x1, w2, b2, mean2, rstd2, seed = saved[:11]
    head_saved, moe_saved = saved[11 : 11 + HEAD_SAVED], saved[11 + HEAD_SAVED :]
    B, T, D = x.shape
    dtype = head_saved[0].dtype

    def residual(d, stream):
        d = cast(d, dtype).reshape(B * T, D)
        return dropout_rows(d, seed, c.dropout, stream) if c.dropout > 0 else d

    moe_dtypes = dtype, None, *dtypes[12:17]
    dh, _, *dmoe = _moe_gradients(residual(dy, STREAM_RESIDUAL_MOE), dlogits, *moe_saved, moe_dtypes, c.moe, COLUMNS)
    dx1, dw2, db2 = _norm_backward(dh.view(B, T, D), x1, mean2, rstd2, w2, b2)
    dx1 = dx1 + dy
    dattended = residual(dx1, STREAM_RESIDUAL_ATTENTION).view(B, T, D)
    head_dtypes = dtype, None, None, *dtypes[3:10]
    dh, _, _, *dhead = _head_gradients(dattended, None, None, head_saved, head_dtypes, c.head)
    dx, dw1, db1 = _norm_backward(dh.view(B, T, D), x, mean1, rstd1, w1, b1)
    return _to((dx + dx1, dw1, db1, *dhead, dw2, db2, *dmoe), dtypes)


class _SwitchAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        # 17 differentiable ones, mask, cu_seqlens, seed, then dtype, eps, dropout and both configs
        tensors, (dtype, eps, dropout) = args[:20], args[20:23]
        n = len(_HeadConfig._fields)
        ctx.config, ctx.dtypes = (eps, dropout, args[23 : 23 + n], args[23 + n :]), _dtypes(args[:17])
        config = _BlockConfig(eps, dropout, _HeadConfig(*ctx.config[2]), _MoEConfig(*ctx.config[3]))
        y, logits, *saved = _block_forward(tensors, dtype, config)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return y, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlogits):
        saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(saved[0])
        eps, dropout, head, moe = ctx.config
        config = _BlockConfig(eps, dropout, _HeadConfig(*head), _MoEConfig(*moe))
        grads = _block_backward((dy, dlogits, *saved), ctx.dtypes, config)
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
) -> tuple[Tensor, Tensor]:
    """One pre-norm SwitchAll block: x += drop(SwitchHead(LN1 x)); x += drop(sigma_moe(LN2 x)) (arXiv 2312.07987, section 4).

    x: [B, T, D]. dropout acts on both residual branches, attention_dropout on q, moe_dropout on the activated experts, the expert
    dropouts on the two selections; all in training only. The other keywords are those of `switchhead` and `sigma_moe`.
    Returns y [B, T, D] in x's dtype and the MLP gate's logits [B, T, E], float32.
    """
    config = _check_block(
        x, weights, top_k=top_k, moe_top_k=moe_top_k, eps=eps, dropout=dropout, position=position, causal=causal,
        window=window, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
        attention_dropout=attention_dropout, expert_dropout=expert_dropout, activation=activation, mode=mode,
        moe_dropout=moe_dropout, moe_expert_dropout=moe_expert_dropout, training=training,
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
        y, logits, *saved = _block_forward((*t, mask, cu_seqlens, seed), dtype, config)
    return (y, logits), Saved(tuple(saved), ("switchall", config, _dtypes(t), y, logits))


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
    head: Any = saved.tensors[11:] if block else saved.tensors
    of_x, of_k_src = head[12], head[12 + ROUTE]
    return ((of_x if of_k_src is None else of_k_src)[0], of_x[-1], *([head[HEAD_SAVED + 9][0]] if block else []))


HEAD_KEYWORDS = frozenset(inspect.signature(switchhead).parameters) - {"x", "weights", "return_logits"}
BLOCK_KEYWORDS = frozenset(inspect.signature(switchall).parameters) - {"x", "weights"}
