"""Value and output projections: kernels/projection.py, differentiable."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from ..kernels.common import input_precision
from ..kernels.gating import Plan, plan_shapes, routing_plan
from ..kernels.projection import (
    output_backward,
    output_forward,
    value_backward,
    value_backward_rows,
    value_forward,
)
from ._shared import _autocast, _cast, _compute_dtype, _tokens
from ._types import Routing


class _ValueProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep, x, w, weights, experts, *plan):
        ctx.precision = input_precision(x.dtype)
        v, u = value_forward(x, w, weights, experts, *plan, w.shape[2] if keep else 0, ctx.precision)
        ctx.save_for_backward(x, w, weights, experts, *plan, u)
        return v

    @staticmethod
    @once_differentiable
    def backward(ctx, dv):
        x, w, weights, experts, *plan, u = ctx.saved_tensors
        gated, order_b, dweights = value_backward_rows(dv, u, weights, experts, *plan)
        dx, dw = value_backward(dv, gated, order_b, x, w, weights, experts, *plan, ctx.precision)
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
