"""SwitchHead: gates, projections and attention as one layer.

NOTE [Joint gradients]
    Where queries, keys and gates read the same x, the rows of dq, dk and d logits lie side by side: one product makes the
    gradients of all their weights, and one their share of d x. On an H200 (N 32768, D 1024, H 4, E 4, P 100) that of the weights
    takes 84 us, and two take 83 and 27; d logits in the other cost it nothing. Of 832 columns (and some other multiples of 64)
    cuBLAS 13 makes 133 us, of 840 again 84, so there are then 8 more that nobody fills in, and always as many as rows need to
    start on 16 bytes. d x of the values comes first and
    cuBLAS adds to it on the way, 96 us in place of 88: `spread` takes 146 us, and 177 where it adds something, 198 into float32.
    Then the cast of d x, 49 us, is one of its own, which a compiler joins with what stands next to it.
"""

import functools
import inspect
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from ..kernels.attention import tile_width
from ..kernels.cast import assemble, cast
from ..kernels.common import cdiv, input_precision, opaque
from ..kernels.gating import cast_and_gate, gating_backward, gating_backward_
from ..kernels.position import rope_pairs, rope_pairs_
from ..kernels.projection import (
    dropout_rows,
    output_backward,
    output_forward,
    value_backward,
    value_backward_rows,
    value_forward,
)
from ..replay import Kept, remembered, replayed
from ._attention import _attention_forward, _attention_gradients, _AttentionConfig, _check_masks, _check_rope, _check_xl, _rotated
from ._gating import _check_gate
from ._shared import (
    ROUTE,
    _add,
    _as_they_are,
    _autocast,
    _compute_dtype,
    _distinct,
    _dtypes,
    _routing_plan,
    _saved_config,
    _seed,
    _to,
)
from ._types import (
    MAX_HEAD_WIDTH,
    STREAM_GATE_O,
    STREAM_GATE_V,
    STREAM_QUERY,
    XL,
    RoPE,
    Saved,
    SwitchHeadGradients,
    SwitchHeadWeights,
)


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
    recompute: bool
    keep: bool  # what only a backward pass needs


def _attention_config(c: _HeadConfig) -> _AttentionConfig:
    """Of queries and keys that the layer has rotated itself."""
    return _AttentionConfig(c.kind, 0, False, c.base, c.causal, c.window, c.width**-0.5, c.precision)


def _product_width(c: _HeadConfig, dtype: torch.dtype) -> int:
    """Channels of a head in the products that make queries and keys: those of a tile, or where these are many more no padding,
    which the launch that rotates then adds. Rows must start on 16 bytes for cuBLAS; Transformer-XL adds to dq what has the
    channels of a tile. On an H200 (N 32768, D 1024, 2 * H = 8) the three products of a forward and a backward pass take 271 us
    with heads of 100 channels, and 323 with 128."""
    wide = tile_width(c.width, dtype)
    narrow = 8 * c.width <= 7 * wide and c.n_heads * c.width % 8 == 0 and c.kind != "xl"
    return c.width if narrow else wide


def _head_weights(dtype: torch.dtype, c: _HeadConfig, q, k, v, o, sel_v, sel_o, pos):
    """The weights as the kernels take them: in dtype, heads padded (NOTE [Head widths]), those of the experts further, to what
    `sets` reads. Those of queries and keys, of heads of W channels (`_product_width`), rotary ones in pairs (position.py), and
    then those of both gates are the rows of one -> [2*H*W + 2*H*E (or H*E), D], v, o, pos."""
    H, P, D, W, n = c.n_heads, c.width, q.shape[1], _product_width(c, dtype), _rotated(c.fraction, c.width)
    wide = tile_width(P, dtype)
    whole = P if dtype == torch.float32 else cdiv(wide, 32) * 32
    sels = tuple(s[None] for s in (sel_v, sel_o) if s is not None)
    rows, pairs = (W, W, *(len(sel_o) for _ in sels)), (n, n, *(0 for _ in sels))
    groups: list[Any] = [((q.reshape(H, P, D), k.reshape(H, P, D), *sels), (rows, D), pairs)]
    groups.append(((v,), (D, whole), 0) if v.ndim == 3 else ((v.reshape(H, P, D),), (wide, D), 0))
    groups.append(((o,), (whole, o.shape[2]), 0) if o.ndim == 3 else ((o.reshape(-1, H, P),), (H, wide), 0))
    if pos is not None:
        groups.append(((pos.reshape(H, P, -1),), (wide, pos.shape[1]), 0))
    joined, new_v, new_o, *new_pos = assemble(dtype, *groups)
    return (
        joined, new_v if v.ndim == 3 else new_v.flatten(0, 1), new_o if o.ndim == 3 else new_o.flatten(1),
        new_pos[0].flatten(0, 1) if new_pos else None,
    )  # fmt: skip


def _parts(joined: Tensor, c: _HeadConfig) -> tuple[Tensor, Tensor]:
    """Of what `_head_weights` joined, the rows of queries and keys and those of the gates."""
    rows = 2 * c.n_heads * _product_width(c, joined.dtype)
    return joined[:rows], joined[rows:]


HEAD_INPUTS = 10  # tensors that `_head_forward` keeps of what it was given
HEAD_SAVED = HEAD_INPUTS + 15 + 2 * ROUTE  # and all that it keeps


def _sel_sides(sel: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """sel_v, None where the output side's serves both, and sel_o."""
    if v.ndim == 2 or len(sel) == len(v):
        return None, sel
    sel_v, sel_o = sel.chunk(2)
    return sel_v, sel_o


def _expert_out(o: Tensor, H: int) -> Tensor:
    """The output weight as experts [H*E, P, D]: for one expert per head, o is [D, H*P]."""
    return o if o.ndim == 3 else o.view(o.shape[0], H, o.shape[1] // H).permute(1, 2, 0)


@functools.partial(replayed, shown=3)
def _head_forward(tensors, dtype: torch.dtype, c: _HeadConfig):
    """x [B, T, D], k_src and v_src [B, S, D] or None, the weights, mask, cu_seqlens, seed -> y [B, T, D], logits_v, logits_o,
    then what `_head_backward` takes.

    The tensors kept are: the 10 inputs, tokens in dtype and weights as `_head_weights` made them; what the gates on x made
    (weights, experts and the seven of the plan, each with the sides as another first axis: value and output, or output
    alone); the same of the value gate on k_src (None without one); u (None with one expert or to be made again); then those of
    the attention.
    """
    x, k_src, v_src, *weights, mask, cu_seqlens, seed = tensors
    B, T, D = x.shape
    joined, v, o, pos = _head_weights(dtype, c, *weights)
    qk, sel = _parts(joined, c)
    H, P, W = c.n_heads, tile_width(c.width, dtype), _product_width(c, dtype)
    sel_v, sel_o = _sel_sides(sel, v)

    def route(tokens, sel, sides, stream):
        """-> the tokens in dtype, their logits, and their gates and plans"""
        made = cast_and_gate(tokens.reshape(-1, D), sel, seed, sides, H, c.top_k, "sigmoid", c.expert_dropout, stream)
        plans = _routing_plan(made[1], sel.shape[0] // (sides * H), dtype)
        return tokens if tokens.dtype == dtype else made[3].view(tokens.shape), made[2], (*made[:2], *plans)

    both = k_src is None and sel_v is not None
    x, logits_x, route_x = route(x, sel, 2, STREAM_GATE_V) if both else route(x, sel_o, 1, STREAM_GATE_O)
    logits_k, route_k = None, (None,) * len(route_x)
    if v.ndim == 3 and k_src is not None:
        k_src, logits_k, route_k = route(k_src, sel_o if sel_v is None else sel_v, 1, STREAM_GATE_V)
    k_src, v_src = (t if t is None else cast(t, dtype) for t in (k_src, v_src))
    inputs = x, k_src, v_src, joined, v, o, pos, mask, cu_seqlens, seed
    ks = x if k_src is None else k_src
    vs = ks if v_src is None else v_src
    S = ks.shape[1]
    x2, k2, v2 = x.reshape(B * T, D), ks.reshape(B * S, D), vs.reshape(B * S, D)
    of_values, of_outputs = _sides((logits_x, *route_x), (logits_k, *route_k))
    (logits_v, weights_v, experts_v, *plan_v), (logits_o, weights_o, experts_o, *plan_o) = of_values, of_outputs

    u = None
    if v.ndim == 2:  # one expert: a dense value projection
        values, logits_v = v2 @ v.t(), None
    else:
        keep = c.keep and not c.recompute
        values, u = value_forward(v2, v, weights_v, experts_v, *plan_v, c.width if keep else 0, c.precision, P)
        u = u if keep else None
    rotated = _rotated(c.fraction, c.width)
    if _joint(k_src, c):
        queries, keys = _turned((x2 @ qk.t()).view(B, T, 2 * H, W), rotated, c.base, 0, P).split(H, 2)
    else:
        q, k = qk.chunk(2)
        queries, keys = x2 @ q.t(), (k2 @ k.t()).view(B, S, H, W)
        if c.dropout > 0:
            queries = dropout_rows(queries, seed, c.dropout, STREAM_QUERY, W, c.width, rotated)
        queries = _turned(queries.view(B, T, H, W), rotated, c.base, S - T, P)
        keys = _turned(keys, rotated, c.base, 0, P)
    a, _, *attention_saved = _attention_forward(
        (queries, keys, values.view(B, S, H, P), pos, None, None, mask, cu_seqlens), _attention_config(c)
    )
    y = output_forward(a.view(B * T, H, P), _expert_out(o, H), weights_o, experts_o, *plan_o, c.precision)
    return y.view(B, T, y.shape[1]), logits_v, logits_o, *inputs, *route_x, *route_k, u, *attention_saved


def _spare(columns: int, gates: int) -> int:
    """How many columns rows of `columns` have for the gradients of so many logits, and then unused. NOTE [Joint gradients]"""
    return gates + (8 - columns % 8 if columns % 8 else 8 if columns % 64 == 0 and columns % 256 else 0)


def _turned(x: Tensor, rotated: int, base: float, offset: int, P: int) -> Tensor:
    """Queries or keys [B, T, H, W] as attention takes them: rotated, in heads of P channels. x itself is used up."""
    if x.shape[3] < P:
        return rope_pairs(x, rotated, base, offset, P)
    rope_pairs_(x, rotated, base, offset)
    return x


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
    x, k_src, v_src, joined, v, o, _, _, _, seed = saved[:HEAD_INPUTS]
    middle, after = HEAD_INPUTS + ROUTE, HEAD_INPUTS + 2 * ROUTE
    route_x, route_k, u, attention_saved = saved[HEAD_INPUTS:middle], saved[middle:after], saved[after], saved[after + 1 :]
    qk, sel = _parts(joined, c)
    sel_v, sel_o = _sel_sides(sel, v)
    (weights_v, experts_v, *plan_v), (weights_o, experts_o, *plan_o) = _sides(route_x, route_k)
    a = attention_saved[11]
    B, T, D = x.shape
    H, P, W = c.n_heads, a.shape[3], qk.shape[0] // (2 * c.n_heads)
    ks = x if k_src is None else k_src
    vs = ks if v_src is None else v_src
    S = ks.shape[1]
    x2, k2, v2 = x.reshape(B * T, D), ks.reshape(B * S, D), vs.reshape(B * S, D)

    dy = dy.reshape(B * T, dy.shape[2])
    a = a.view(B * T, H, P)
    da, do, dweights_o = output_backward(dy, a, _expert_out(o, H), weights_o, experts_o, *plan_o, c.precision, dtypes[6], c.width)
    if o.ndim == 2:
        do = do.permute(2, 0, 1).reshape(o.shape[0], H * c.width)
    joint, rotated = _joint(k_src, c), _rotated(c.fraction, c.width)
    dqueries, dkeys, dvalues, dpos, _, _ = _attention_gradients(
        da.view(B, T, H, P), None, *attention_saved, _attention_config(c), joint, rotated, W, _spare(len(joined), len(sel))
    )
    dvalues = dvalues.view(B * S, H, P)

    # the gates
    of_values: Any = (None, None, None)
    if v.ndim == 3:
        if u is None:
            u = value_forward(v2, v, weights_v, experts_v, *plan_v, c.width, c.precision, P)[1]
        of_values = value_backward_rows(dvalues, u, weights_v, experts_v, *plan_v)
    gated, order_b, dweights_v = of_values
    dweights, dlogits = dweights_o[None], dlogits_o
    if route_k[0] is None and sel_v is not None:  # both sides in one
        dweights = torch.stack([dweights_v, dweights_o])
        if dlogits_v is not None or dlogits_o is not None:
            none = weights_o.new_zeros(*weights_o.shape[:2], len(sel_o) // H)
            dlogits = torch.stack([none if g is None else g for g in (dlogits_v, dlogits_o)])
    elif route_k[0] is None and dweights_v is not None:  # both sides share the output side's routing
        dweights, dlogits = dweights + dweights_v, _add(dlogits_o, dlogits_v)

    if v.ndim == 3:
        args = dvalues, gated, order_b, v2, v, weights_v, experts_v, *plan_v, c.precision, dtypes[5], c.width
        of_source, dv = value_backward(*args)
    else:
        flat = dvalues.view(B * S, H * P)
        of_source, dv = flat @ v, flat.t() @ v2
    dx: Any = None
    dk2: Any = None
    dv2: Any = None
    if v_src is not None:
        dv2 = of_source
    elif k_src is not None:
        dk2 = of_source
    else:
        dx = of_source
    if joint:  # NOTE [Joint gradients]
        every = dqueries.flatten(0, 1)
        gating_backward_(every, len(qk), dweights, dlogits, *route_x[:2], len(sel) // (len(dweights) * H))
        dq, dk, dsel_x = (every.t() @ x2)[: len(joined)].split([len(qk) // 2, len(qk) // 2, len(sel)])
        dx, dsel_k = _plus(dx, every[:, : len(joined)], joined), None
    else:
        dqueries, dkeys = dqueries.view(B * T, H * W), dkeys.view(B * S, H * W)
        if c.dropout > 0:
            dqueries = dropout_rows(dqueries, seed, c.dropout, STREAM_QUERY, W, c.width, rotated)
        q, k = qk.chunk(2)
        sel_x = sel if len(dweights) == 2 else sel_o
        dgate_x, dsel_x = gating_backward(dweights, dlogits, x2, sel_x, *route_x[:2], None, "sigmoid")
        dq, dk = dqueries.t() @ x2, dkeys.t() @ k2
        dx, dsel_k = _plus(_plus(dx, dqueries, q), dgate_x, sel_x), None
        if k_src is None:
            dx = _plus(dx, dkeys, k)
        else:
            dk2 = _plus(dk2, dkeys, k)
        if route_k[0] is not None:
            sel_k = sel_o if sel_v is None else sel_v
            dgate_k, dsel_k = gating_backward(dweights_v[None], dlogits_v, k2, sel_k, *route_k[:2], None, "sigmoid")
            dk2 = _plus(dk2, dgate_k, sel_k)
    dsel_v, dsel_o = (None, dsel_x) if len(dsel_x) == len(sel_o) else dsel_x.split(len(sel_o))
    if dsel_k is not None:
        dsel_v, dsel_o = (None, dsel_o + dsel_k) if sel_v is None else (dsel_k, dsel_o)
    dx, dk2 = dx.view(x.shape), None if k_src is None else dk2.view(ks.shape)
    dv2 = None if dv2 is None else dv2.view(vs.shape)
    grads = dx, dk2, dv2, dq, dk, dv, do, dsel_v, dsel_o, dpos
    return _without_padding(_to(grads[:3], dtypes[:3]) + grads[3:], dtypes, H, c.width, rotated)


@opaque(lambda d, a, b: None, mutates=("d",))
def _add_product(d: Tensor, a: Tensor, b: Tensor) -> None:
    """d += a b: a compiler left to itself makes a copy of d first, 32 us of a layer (NOTE [Joint gradients]'s sizes)."""
    d.addmm_(a, b)


def _plus(d: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """d + a b, in d."""
    if d is None:
        return a @ b
    _add_product(d, a, b)
    return d


def _without_padding(grads, dtypes, H: int, width: int, rotated: int) -> tuple[Tensor | None, ...]:
    """The gradients in their dtypes, and those of q, k, v with one expert and pos without their rows of padding, `rotated`
    channels of q and k in their order: in one launch, where they share a dtype."""
    grads, groups = list(grads), defaultdict(list)
    for i, (d, dtype) in enumerate(zip(grads, dtypes, strict=True)):
        if d is None or dtype is None:
            grads[i] = None
        elif i in (3, 4, 5, 9) and d.ndim == 2:
            groups[dtype].append((i, ((d.view(H, -1, d.shape[1]),), (width, d.shape[1]), -rotated if i in (3, 4) else 0)))
        elif i in (7, 8) and d.dtype == dtype:
            grads[i] = d.clone()  # of the one product, which would otherwise live as long
        elif i in (7, 8):
            groups[dtype].append((i, ((d[None],), d.shape, 0)))
    for dtype, some in groups.items():
        for (i, _), d in zip(some, assemble(dtype, *(group for _, group in some)), strict=True):
            grads[i] = d.flatten(0, 1)
    return tuple(grads)


class _SwitchHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        inputs, (mask, cu_seqlens, seed, dtype, wanted), config = args[:10], args[10:15], _HeadConfig(*args[15:])
        ctx.config, ctx.dtypes = args[15:], _dtypes(inputs)
        y, logits_v, logits_o, kept = _head_forward((*inputs, mask, cu_seqlens, seed), dtype, config)
        ctx.set_materialize_grads(False)
        kept = kept.to_save()
        ctx.save_for_backward(*kept.tensors)
        ctx.layout, ctx.y_shape = kept.layout, y.shape
        if not wanted:  # a compiler would make gradients of zeros for logits that nobody uses
            return y
        if logits_v is None:
            return y, logits_o
        if logits_v is logits_o:
            logits_v = logits_v.clone()
        elif torch.compiler.is_compiling():  # parts of one tensor, whose gradients 2.11 would lose
            logits_v, logits_o = logits_v.clone(), logits_o.clone()
        return y, logits_v, logits_o

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *dlogits):
        kept = Kept(ctx.saved_tensors, ctx.layout)
        if dy is None:
            dy = kept.flat()[0].new_zeros(ctx.y_shape)
        dlogits = (None,) * (2 - len(dlogits)) + dlogits
        grads = _head_backward((dy, *dlogits), ctx.dtypes, _HeadConfig(*ctx.config), kept=kept)
        return *grads, *[None] * (5 + len(ctx.config))


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
    cu_seqlens=None, max_seqlen=None, dropout=0.0, expert_dropout=0.0, training=False, recompute=False, what="",
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
    _check.instance("recompute", recompute, bool)
    on = float(training)
    return _HeadConfig(
        H, w.q.shape[0] // H, top_k, kind, fraction, base, causal, window or 0, on * p, on * delta,
        input_precision(_compute_dtype(x)), recompute, torch.is_grad_enabled(),
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
    recompute: bool = False,
    return_logits: bool = False,
):
    """SwitchHead attention (arXiv 2312.07987, equations 7 to 10): few heads whose values and outputs are mixtures of experts.

    x: [B, T, D], the queries' source; k_src: [B, S, D], the keys' and the value gate's (default x); v_src: [B, S, D], what the
    value experts see (default k_src). S > T means memory or a prefix in front of x. H, E and P follow from the weights' shapes.
    position: RoPE(), XL() (which takes weights.pos_to_pk) or None. dropout acts on q. Masks as in `attention`.
    recompute: the value experts' products [B*S, H, TOP_K, P] are not kept for the backward pass, which makes them again.
    Returns y [B, T, D], no residual and no norm; with return_logits also (logits_v [B*S, H, E] or None with one expert,
    logits_o [B*T, H, E]), float32 and differentiable. Raises ValueError or TypeError for anything that does not fit.
    """
    config = _check_head(
        x, weights, top_k=top_k, position=position, k_src=k_src, v_src=v_src, causal=causal, window=window,
        key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, dropout=dropout,
        expert_dropout=expert_dropout, training=training, recompute=recompute,
    )  # fmt: skip
    seed = _seed(seed, x.device, config.dropout > 0 or config.expert_dropout > 0)
    k_src, v_src, pos = _head_sources(x, weights, position, k_src, v_src)
    tensors = x, k_src, v_src, *weights[:6], pos
    result = _SwitchHead.apply(
        *_distinct(*tensors), key_padding_mask, cu_seqlens, seed, _compute_dtype(x), return_logits, *config
    )
    if not return_logits:
        return result
    y, *logits = result
    return y, (None, *logits) if len(logits) == 1 else tuple(logits)


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
        y, logits_v, logits_o, kept = _head_forward(given, _compute_dtype(x), config)
    outputs = (y, (logits_v, logits_o)) if return_logits else y
    return outputs, Saved(kept.flat(), ("switchhead", config, _dtypes(inputs), y, logits_v, logits_o))


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


HEAD_KEYWORDS = frozenset(inspect.signature(switchhead).parameters) - {"x", "weights", "return_logits"}
