"""The sigma-MoE MLP: kernels/mlp.py with its gate, differentiable."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check
from ..kernels.cast import assemble, cast
from ..kernels.common import input_precision
from ..kernels.gating import cast_and_gate, gating_backward, routing_plan
from ..kernels.mlp import COLUMNS, columns_alone, mlp_backward, mlp_backward_input, mlp_forward
from ..replay import Kept, remembered, replayed
from ._gating import _check_gate
from ._shared import _as_they_are, _autocast, _compute_dtype, _distinct, _dtypes, _seed, _sum_leading, _to, _tokens
from ._types import ACTIVATIONS, MODES, STREAM_ACTIVATION, STREAM_GATE, SigmaMoEWeights


class _MoEConfig(NamedTuple):
    top_k: int
    activation: str
    mode: str
    dropout: float
    expert_dropout: float
    precision: str


@functools.partial(replayed, shown=2)
def _moe_forward(tensors, dtype: torch.dtype, c: _MoEConfig, columns: int):
    """x [N, D], gate_input [N, D] or None, the weights, seed, base and added [N, D_out] or None -> y [N, D_out] in dtype, or, on
    top of both, in base's; logits [N, E]; then the tensors `_moe_backward` takes."""
    x, gate_input, keys, values, expert_sel, bias, o_bias, seed, base, added = tensors
    given = [w for w in (keys, values, expert_sel, bias, o_bias) if w is not None]
    blocks = [w.view(1, *w.shape) if w.ndim == 2 else w.view(1, 1, -1) if w.ndim == 1 else w for w in given]
    made = iter(assemble(dtype, *(((w,), tuple(w.shape[1:]), 0) for w in blocks)))
    new: Any = [None if w is None else next(made).view(w.shape) for w in (keys, values, expert_sel, bias, o_bias)]
    keys, values, expert_sel, bias, o_bias = new
    options = expert_sel, seed, 1, 1, c.top_k, c.mode, c.expert_dropout, STREAM_GATE
    if gate_input is None:
        weights, experts, logits, x = cast_and_gate(x, *options)
    else:
        weights, experts, logits, gate_input = cast_and_gate(gate_input, *options)
        x = cast(x, dtype)
    order, offsets = (t[0] for t in routing_plan(experts, expert_sel.shape[0], False)[:2])
    y, z = mlp_forward(
        x, keys, values, bias, o_bias, seed, weights[0], experts[0], order, offsets,
        c.activation, c.dropout, STREAM_ACTIVATION, c.precision, base, added, columns,
    )  # fmt: skip
    return (
        y, logits.view(x.shape[0], expert_sel.shape[0]),
        x, gate_input, keys, values, expert_sel, bias, o_bias, seed, weights, experts, logits if c.mode == "softmax" else None,
        order, offsets, z,
    )  # fmt: skip


@replayed
def _moe_backward(tensors, dtypes, c: _MoEConfig):
    """dy, dlogits and what the forward kept -> gradients of x, gate_input, keys, values, expert_sel, bias, o_bias in their dtypes
    (None where the input was None)."""
    E, G, _ = tensors[5].shape
    with _as_they_are(tensors[0]):
        return _moe_gradients(*tensors, dtypes, c, columns_alone(E, G, c.top_k))


def _moe_gradients(
    dy, dlogits, x, gate_input, keys, values, expert_sel, bias, o_bias, seed, weights, experts, logits, order, offsets, z,
    dtypes, c: _MoEConfig, columns: int,
):  # fmt: skip
    dz, dkeys, dvalues, dbias, dweights = mlp_backward(
        dy, x, keys, values, bias, o_bias, seed, weights[0], experts[0], order, offsets, z,
        c.activation, c.dropout, STREAM_ACTIVATION, c.precision, dtypes[2], dtypes[3],
    )  # fmt: skip
    dlogits = None if dlogits is None else dlogits.reshape(*experts.shape[:3], expert_sel.shape[0])
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
        y, logits, kept = _moe_forward((*inputs, seed, None, None), dtype, _MoEConfig(*config), COLUMNS)
        ctx.set_materialize_grads(False)
        kept = kept.to_save()
        ctx.save_for_backward(*kept.tensors)
        ctx.layout = kept.layout
        ctx.y_shape = y.shape
        return y, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlogits):
        kept = Kept(ctx.saved_tensors, ctx.layout)
        dy = kept.flat()[0].new_zeros(ctx.y_shape) if dy is None else dy
        grads = _moe_backward((dy, dlogits), ctx.dtypes, _MoEConfig(*ctx.config), kept=kept)
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
