"""The layers, from the operations of the other files: sigma-MoE (arXiv 2310.10837), SwitchHead (2312.07987), SwitchAll.

    sigma_moe    y = sum_k gate_k * (phi(x W_up[e_k] + b_up[e_k]) W_down[e_k]) + b_down
    switchhead   y = output_projection(attention(q, k, value_projection(x_v))), either projection with a gate of its own
    switchall    x += drop(switchhead(norm1 x));  x += drop(sigma_moe(norm2 x))

Every dropout has its own stream of random bits, and a mask is a function of (seed, token, column, stream) alone.
"""

import math

import numpy as np
import torch
from torch.nn import functional

from .attention import attention, attention_numpy
from .gating import drop, drop_numpy, gating, gating_numpy, no_autocast, wide
from .position import XL
from .projection import output_projection, output_projection_numpy, value_projection, value_projection_numpy

__all__ = [
    "entropy_regularizer",
    "entropy_regularizer_numpy",
    "sigma_moe",
    "sigma_moe_numpy",
    "switchall",
    "switchall_numpy",
    "switchhead",
    "switchhead_numpy",
]

MOE_GATE, MOE_HIDDEN, VALUE_GATE, OUTPUT_GATE, QUERY, AFTER_ATTENTION, AFTER_MOE = range(7)  # streams

# sigma-MoE


def _activation_numpy(name: str, x: np.ndarray) -> np.ndarray:
    if name in ("swiglu", "geglu"):
        gate, rest = np.split(x, 2, axis=-1)
        return _activation_numpy({"swiglu": "silu", "geglu": "gelu"}[name], gate) * rest
    if name == "relu":
        return np.maximum(x, 0.0)
    if name == "gelu":
        return np.array([0.5 * a * (1.0 + math.erf(a / math.sqrt(2.0))) for a in x])
    if name == "silu":
        return x * np.exp(-np.logaddexp(0.0, -x))
    raise ValueError(f"activation must be 'relu', 'gelu', 'silu', 'swiglu' or 'geglu', got {name!r}")


def _activation(name: str, x: torch.Tensor) -> torch.Tensor:
    if name == "relu":
        return functional.relu(x)
    if name == "gelu":
        return functional.gelu(x)
    if name == "silu":
        return functional.silu(x)
    gate, rest = x.chunk(2, dim=-1)
    if name == "swiglu":
        return functional.silu(gate) * rest
    if name == "geglu":
        return functional.gelu(gate) * rest
    raise ValueError(f"activation must be 'relu', 'gelu', 'silu', 'swiglu' or 'geglu', got {name!r}")


def sigma_moe_numpy(
    x,
    weights,
    *,
    top_k,
    gate_input=None,
    activation="relu",
    mode="sigmoid",
    dropout=0.0,
    expert_dropout=0.0,
    training=False,
    seed=None,
    experts=None,
):
    """x [..., D] -> (y [..., D_out], logits [..., E]).

    `weights` has keys [E, D, G] (2G for the gated pairs), values [E, G, D_out], expert_sel [E, D], bias [E, G] or None,
    o_bias [D_out] or None. The gate sees `gate_input`, x by default. `experts` replaces the selection.
    """
    keys, values = np.asarray(weights.keys, np.float64), np.asarray(weights.values, np.float64)
    E, G, D_out = values.shape
    routing = gating_numpy(
        x if gate_input is None else gate_input,
        weights.expert_sel,
        top_k=top_k,
        mode=mode,
        expert_dropout=expert_dropout if training else 0.0,
        seed=seed,
        stream=MOE_GATE,
        experts=experts,
    )
    rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    y = np.zeros((len(rows), D_out))
    for n in range(len(rows)):
        for k in range(top_k):
            e = routing.experts[n, 0, k]
            before = rows[n] @ keys[e]
            if weights.bias is not None:
                before = before + weights.bias[e]
            u = _activation_numpy(activation, before)
            if training:
                u = drop_numpy(u, dropout, seed, n, MOE_HIDDEN, offset=e * G)
            y[n] += routing.weights[n, 0, k] * (u @ values[e])
    if weights.o_bias is not None:
        y = y + weights.o_bias
    return y.reshape(*x.shape[:-1], D_out), routing.logits.reshape(*x.shape[:-1], E)


@no_autocast
def sigma_moe(
    x,
    weights,
    *,
    top_k,
    gate_input=None,
    activation="relu",
    mode="sigmoid",
    dropout=0.0,
    expert_dropout=0.0,
    training=False,
    seed=None,
    experts=None,
):
    """Expert by expert. The pre-activation, u and each product are rounded to x's dtype, as torch would return them."""
    dtype = wide(x.dtype)
    keys, values = weights.keys.to(dtype), weights.values.to(dtype)
    E, G, D_out = values.shape
    routing = gating(
        x if gate_input is None else gate_input,
        weights.expert_sel,
        top_k=top_k,
        mode=mode,
        expert_dropout=expert_dropout if training else 0.0,
        seed=seed,
        stream=MOE_GATE,
        experts=experts,
    )
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    bias = None if weights.bias is None else weights.bias.to(dtype)
    y = rows.new_zeros(len(rows), D_out)
    for e, (key, value) in enumerate(zip(keys.unbind(), values.unbind(), strict=True)):
        n, k = (routing.experts[:, 0] == e).nonzero(as_tuple=True)
        before = rows[n] @ key
        if bias is not None:
            before = before + bias[e]
        u = _activation(activation, before.to(x.dtype).to(dtype)).to(x.dtype)
        if training:
            u = drop(u, dropout, seed, MOE_HIDDEN, rows=n, offset=e * G)
        y = y.index_add(0, n, routing.weights[n, 0, k, None] * (u.to(dtype) @ value).to(x.dtype))
    if weights.o_bias is not None:
        y = y + weights.o_bias.to(dtype)
    return y.to(x.dtype).view(*x.shape[:-1], D_out), routing.logits.view(*x.shape[:-1], E)


def entropy_regularizer_numpy(logits) -> float:
    """sum_e p_e log p_e with p the mean over tokens of softmax(logits [..., E])."""
    logits = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    p = np.zeros(logits.shape[1])
    for row in logits:
        shifted = np.exp(row - row.max())
        p += shifted / shifted.sum() / len(logits)
    return float(sum(a * np.log(a) for a in p if a > 0.0))


@no_autocast
def entropy_regularizer(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.to(wide(logits.dtype)).reshape(-1, logits.shape[-1])
    log_p = logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
    p = log_p.exp()
    return (p * log_p.masked_fill(p == 0.0, 0.0)).sum()


# SwitchHead


def switchhead_numpy(
    x,
    weights,
    *,
    top_k,
    position,
    k_src=None,
    v_src=None,
    causal=True,
    window=None,
    key_padding_mask=None,
    cu_seqlens=None,
    dropout=0.0,
    expert_dropout=0.0,
    training=False,
    seed=None,
    return_logits=False,
    experts=None,
):
    """x [B, T, D] -> y [B, T, D], and (logits_v, logits_o), both [N, H, E], if asked for.

    `weights` has q, k [H*P, D], v [H*E, D, P], o [H*E, P, D], sel_v, sel_o [H*E, D] and pos_to_pk [H*P, D], which
    Transformer-XL needs. With one dense expert v is [H*P, D], o [D, H*P], sel_o [H, D], and logits_v is None. With
    sel_v None, sel_o serves both sides. k_src [B, S, D] is x by default, v_src is k_src. `experts` (value side, output
    side) replaces the selection.
    """
    shared = weights.sel_v is None and (k_src is None or k_src is x)
    k_src = x if k_src is None else k_src
    v_src = k_src if v_src is None else v_src
    experts_v, experts_o = (None, None) if experts is None else experts
    dropout, expert_dropout = (dropout, expert_dropout) if training else (0.0, 0.0)
    dense = np.ndim(weights.v) == 2
    H = len(weights.sel_o) if dense else len(weights.q) // weights.v.shape[2]
    P = len(weights.q) // H
    (B, T, D), S = x.shape, k_src.shape[1]

    q, k = np.empty((B, T, H, P)), np.empty((B, S, H, P))
    for b in range(B):
        for t in range(T):
            row = drop_numpy(weights.q @ x[b, t], dropout, seed, b * T + t, QUERY)
            q[b, t] = row.reshape(H, P)
        for s in range(S):
            k[b, s] = (weights.k @ k_src[b, s]).reshape(H, P)

    gate = {"n_heads": H, "top_k": top_k, "expert_dropout": expert_dropout, "seed": seed}
    if dense:
        v = np.stack([v_src @ weights.v[h * P : (h + 1) * P].T for h in range(H)], axis=2)
        logits_v, logits_o = None, (x @ weights.sel_o.T).reshape(B * T, H, 1)
    else:
        gate_o = gating_numpy(x, weights.sel_o, stream=OUTPUT_GATE, experts=experts_o, **gate)
        if shared:
            gate_v = gate_o
        else:
            sel = weights.sel_o if weights.sel_v is None else weights.sel_v
            gate_v = gating_numpy(k_src, sel, stream=VALUE_GATE, experts=experts_v, **gate)
        v = value_projection_numpy(v_src, weights.v, gate_v.weights, gate_v.experts)
        logits_v, logits_o = gate_v.logits, gate_o.logits

    if hasattr(position, "weight"):
        position = XL(weights.pos_to_pk, position.content_bias, position.position_bias)
    a = attention_numpy(
        q,
        k,
        v,
        position=position,
        causal=causal,
        window=window,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
    )
    if dense:
        y = np.zeros((B, T, D))
        for h in range(H):
            sigmoid = np.exp(-np.logaddexp(0.0, -logits_o[:, h])).reshape(B, T, 1)
            y += sigmoid * (a[:, :, h] @ weights.o[:, h * P : (h + 1) * P].T)
    else:
        y = output_projection_numpy(a, weights.o, gate_o.weights, gate_o.experts)
    return (y, (logits_v, logits_o)) if return_logits else y


@no_autocast
def switchhead(
    x,
    weights,
    *,
    top_k,
    position,
    k_src=None,
    v_src=None,
    causal=True,
    window=None,
    key_padding_mask=None,
    cu_seqlens=None,
    dropout=0.0,
    expert_dropout=0.0,
    training=False,
    seed=None,
    return_logits=False,
    experts=None,
):
    """q, k, v and a are stored, so they are rounded to x's dtype. A dense W_o is the only expert of each head."""
    shared = weights.sel_v is None and (k_src is None or k_src is x)
    k_src = x if k_src is None else k_src
    v_src = k_src if v_src is None else v_src
    experts_v, experts_o = (None, None) if experts is None else experts
    dropout, expert_dropout = (dropout, expert_dropout) if training else (0.0, 0.0)
    dense = weights.v.ndim == 2
    H = len(weights.sel_o) if dense else len(weights.q) // weights.v.shape[2]
    P = len(weights.q) // H
    (B, T, D), S = x.shape, k_src.shape[1]

    q = drop(_linear(x, weights.q).view(B * T, H * P), dropout, seed, QUERY).view(B, T, H, P)
    k = _linear(k_src, weights.k).view(B, S, H, P)

    gate = {"n_heads": H, "top_k": top_k, "expert_dropout": expert_dropout, "seed": seed}
    gate_o = gating(x, weights.sel_o, stream=OUTPUT_GATE, experts=experts_o, **gate)
    if dense:
        v = _linear(v_src, weights.v).view(B, S, H, P)
        o, logits_v = weights.o.T.reshape(H, P, D), None
    else:
        gate_v = gate_o
        if not shared:
            sel = weights.sel_o if weights.sel_v is None else weights.sel_v
            gate_v = gating(k_src, sel, stream=VALUE_GATE, experts=experts_v, **gate)
        v = value_projection(v_src, weights.v, gate_v.weights, gate_v.experts)
        o, logits_v = weights.o, gate_v.logits

    if hasattr(position, "weight"):
        position = XL(weights.pos_to_pk, position.content_bias, position.position_bias)
    a = attention(
        q,
        k,
        v,
        position=position,
        causal=causal,
        window=window,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
    )
    y = output_projection(a, o, gate_o.weights, gate_o.experts)
    return (y, (logits_v, gate_o.logits)) if return_logits else y


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.to(wide(x.dtype)) @ weight.to(wide(x.dtype)).T).to(x.dtype)


# SwitchAll


def _layer_norm_numpy(x, norm, eps) -> np.ndarray:
    weight, bias = norm
    y = np.empty(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        centred = x[index] - x[index].mean()
        y[index] = centred / np.sqrt((centred**2).mean() + eps) * weight + bias
    return y


def _layer_norm(x: torch.Tensor, norm, eps: float) -> torch.Tensor:
    weight, bias = (a.to(wide(x.dtype)) for a in norm)
    return functional.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def switchall_numpy(
    x,
    weights,
    *,
    top_k,
    moe_top_k,
    position,
    eps=1e-5,
    dropout=0.0,
    mode="sigmoid",
    activation="relu",
    attention_dropout=0.0,
    moe_dropout=0.0,
    expert_dropout=0.0,
    moe_expert_dropout=0.0,
    causal=True,
    window=None,
    key_padding_mask=None,
    cu_seqlens=None,
    training=False,
    seed=None,
    experts=None,
):
    """One pre-norm block: x [B, T, D] -> (y [B, T, D], logits of the MLP [B, T, E]).

    `weights` has norm1 and norm2 (weight, bias), attention (as `switchhead`) and moe (as `sigma_moe`). `dropout` acts on
    what both halves add, `attention_dropout` on q, `moe_dropout` on u. `experts` (value side, output side, MLP)
    replaces the selection.
    """
    experts_v, experts_o, experts_moe = (None, None, None) if experts is None else experts

    def add(x, y, stream):
        if not training:
            return x + y
        rows = y.reshape(-1, y.shape[-1])
        kept = [drop_numpy(row, dropout, seed, n, stream) for n, row in enumerate(rows)]
        return x + np.reshape(kept, x.shape)

    y = switchhead_numpy(
        _layer_norm_numpy(x, weights.norm1, eps),
        weights.attention,
        top_k=top_k,
        position=position,
        causal=causal,
        window=window,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        dropout=attention_dropout,
        expert_dropout=expert_dropout,
        training=training,
        seed=seed,
        experts=None if experts is None else (experts_v, experts_o),
    )
    x = add(x, y, AFTER_ATTENTION)
    y, logits = sigma_moe_numpy(
        _layer_norm_numpy(x, weights.norm2, eps),
        weights.moe,
        top_k=moe_top_k,
        activation=activation,
        mode=mode,
        dropout=moe_dropout,
        expert_dropout=moe_expert_dropout,
        training=training,
        seed=seed,
        experts=experts_moe,
    )
    return add(x, y, AFTER_MOE), logits


@no_autocast
def switchall(
    x,
    weights,
    *,
    top_k,
    moe_top_k,
    position,
    eps=1e-5,
    dropout=0.0,
    mode="sigmoid",
    activation="relu",
    attention_dropout=0.0,
    moe_dropout=0.0,
    expert_dropout=0.0,
    moe_expert_dropout=0.0,
    causal=True,
    window=None,
    key_padding_mask=None,
    cu_seqlens=None,
    training=False,
    seed=None,
    experts=None,
):
    experts_v, experts_o, experts_moe = (None, None, None) if experts is None else experts

    def add(x, y, stream):
        rows = drop(y.reshape(-1, y.shape[-1]), dropout if training else 0.0, seed, stream)
        return (x.to(wide(x.dtype)) + rows.view(x.shape)).to(x.dtype)

    y = switchhead(
        _layer_norm(x, weights.norm1, eps),
        weights.attention,
        top_k=top_k,
        position=position,
        causal=causal,
        window=window,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        dropout=attention_dropout,
        expert_dropout=expert_dropout,
        training=training,
        seed=seed,
        experts=None if experts is None else (experts_v, experts_o),
    )
    x = add(x, y, AFTER_ATTENTION)
    y, logits = sigma_moe(
        _layer_norm(x, weights.norm2, eps),
        weights.moe,
        top_k=moe_top_k,
        activation=activation,
        mode=mode,
        dropout=moe_dropout,
        expert_dropout=moe_expert_dropout,
        training=training,
        seed=seed,
        experts=experts_moe,
    )
    return add(x, y, AFTER_MOE), logits
