"""Modules: parameters, initialisation, and one call of triton_moe.functional each. State dicts as in the public code."""

import math

import torch
from torch import Tensor, nn

from . import _check
from . import functional as F

__all__ = ["SigmaMoE", "SwitchAll", "SwitchHead"]


def _normal(parameter: Tensor, std: float) -> None:
    nn.init.normal_(parameter, 0.0, std)


def _selection(parameter: Tensor, std: float) -> None:
    """N(0, std^2), then every row is given the same norm, the overall standard deviation kept (sigma-MoE, appendix A)."""
    nn.init.normal_(parameter, 0.0, std)
    with torch.no_grad():
        overall = parameter.square().mean().sqrt()  # the mean is 0
        parameter.mul_(overall * parameter.shape[-1] ** 0.5 / parameter.norm(dim=-1, keepdim=True))


class SigmaMoE(nn.Module):
    """The sigma-MoE MLP (arXiv 2310.10837): `forward(x [..., D], gate_input=None) -> (y [..., d_out], logits [..., E])`.

    d_model: D; n_experts: E; expert_size: G; top_k: experts per token. init_scale: the paper's sqrt(2 / n_layers). Parameters:
    keys [E, D, G] ([E, D, 2G] for "swiglu" and "geglu"), values [E, G, d_out], expert_sel [E, D], bias [E, G], o_bias [d_out].
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        expert_size: int,
        top_k: int,
        *,
        activation: str = "relu",
        mode: str = "sigmoid",
        bias: bool = False,
        d_out: int | None = None,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        init_scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.d_model = _check.integer("d_model", d_model, 1)
        self.n_experts = _check.integer("n_experts", n_experts, 1)
        self.expert_size = _check.integer("expert_size", expert_size, 1)
        self.top_k = _check.integer("top_k", top_k, 1, n_experts, f" (n_experts is {n_experts})")
        self.activation = _check.choice("activation", activation, F.ACTIVATIONS)
        self.mode = _check.choice("mode", mode, F.MODES)
        self.d_out = d_model if d_out is None else _check.integer("d_out", d_out, 1)
        self.dropout = _check.probability("dropout", dropout)
        self.expert_dropout = _check.probability("expert_dropout", expert_dropout)
        self.init_scale = init_scale

        width = 2 * expert_size if activation in ("swiglu", "geglu") else expert_size
        factory = {"device": device, "dtype": dtype}
        self.keys = nn.Parameter(torch.empty(n_experts, d_model, width, **factory))
        self.values = nn.Parameter(torch.empty(n_experts, expert_size, self.d_out, **factory))
        self.expert_sel = nn.Parameter(torch.empty(n_experts, d_model, **factory))
        self.bias = nn.Parameter(torch.empty(n_experts, width, **factory)) if bias else None
        self.o_bias = nn.Parameter(torch.empty(self.d_out, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.init_scale
        _normal(self.keys, c / math.sqrt(self.d_model))
        _normal(self.values, c / math.sqrt(self.n_experts * self.expert_size))
        _selection(self.expert_sel, c / math.sqrt(self.d_model))
        for bias in (self.bias, self.o_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def weights(self) -> F.SigmaMoEWeights:
        return F.SigmaMoEWeights(self.keys, self.values, self.expert_sel, self.bias, self.o_bias)

    def forward(self, x: Tensor, gate_input: Tensor | None = None, *, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.sigma_moe(
            x,
            self.weights,
            top_k=self.top_k,
            gate_input=gate_input,
            activation=self.activation,
            mode=self.mode,
            dropout=self.dropout,
            expert_dropout=self.expert_dropout,
            training=self.training,
            seed=seed,
        )

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, n_experts={self.n_experts}, expert_size={self.expert_size}, top_k={self.top_k}, "
            f"activation={self.activation!r}, mode={self.mode!r}, bias={self.bias is not None}, d_out={self.d_out}, "
            f"dropout={self.dropout}, expert_dropout={self.expert_dropout}"
        )


class SwitchHead(nn.Module):
    """SwitchHead attention (arXiv 2312.07987): `forward(x [B, T, D], k_src=None, v_src=None, ...) -> y [B, T, D]`.

    d_model: D; n_heads: H attention matrices; n_experts: E per head; d_head: P (default d_model // n_heads); top_k: experts per
    token and head; position: "rope", "xl" or None. shared_selection: one gate weight for values and outputs. recompute: as of
    `functional.switchhead`, less memory for more time; it may be changed at any time. Parameters:
    q.weight, k.weight [H*P, D], v [H*E, D, P], o [H*E, P, D], sel_v, sel_o [H*E, D], pos_to_pk [H*P, D] ("xl"); with one expert
    v [H*P, D], o [D, H*P], sel_o [H, D].
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_experts: int,
        *,
        d_head: int | None = None,
        top_k: int = 2,
        position: str | None = "rope",
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
        dropout: float = 0.0,
        expert_dropout: float = 0.0,
        init_scale: float = 1.0,
        shared_selection: bool = False,
        recompute: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.d_model = _check.integer("d_model", d_model, 1)
        self.n_heads = _check.integer("n_heads", n_heads, 1)
        self.n_experts = _check.integer("n_experts", n_experts, 1)
        self.d_head = _check.integer("d_head", d_model // n_heads if d_head is None else d_head, 1, F.MAX_HEAD_WIDTH)
        top_k = min(top_k, 1) if n_experts == 1 else top_k
        self.top_k = _check.integer("top_k", top_k, 1, n_experts, f" (n_experts is {n_experts})")
        if position not in ("rope", "xl", None):
            raise ValueError(f"position must be 'rope', 'xl' or None, got {position!r}")
        self.position = position
        self.rotate_fraction, self.rope_base = F._check_rope(F.RoPE(rotate_fraction, rope_base))
        self.dropout = _check.probability("dropout", dropout)
        self.expert_dropout = _check.probability("expert_dropout", expert_dropout)
        self.init_scale = init_scale
        self.recompute = recompute

        factory = {"device": device, "dtype": dtype}
        H, E, P = self.n_heads, self.n_experts, self.d_head
        self.q = nn.Linear(d_model, H * P, bias=False, **factory)
        self.k = nn.Linear(d_model, H * P, bias=False, **factory)
        self.sel_v = None
        if E == 1:
            self.v = nn.Parameter(torch.empty(H * P, d_model, **factory))
            self.o = nn.Parameter(torch.empty(d_model, H * P, **factory))
        else:
            self.v = nn.Parameter(torch.empty(H * E, d_model, P, **factory))
            self.o = nn.Parameter(torch.empty(H * E, P, d_model, **factory))
            if not shared_selection:
                self.sel_v = nn.Parameter(torch.empty(H * E, d_model, **factory))
        self.sel_o = nn.Parameter(torch.empty(H * E, d_model, **factory))
        self.pos_to_pk = nn.Parameter(torch.empty(H * P, d_model, **factory)) if position == "xl" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = self.init_scale / math.sqrt(self.d_model)
        for parameter in (self.q.weight, self.k.weight, self.v, self.pos_to_pk):
            if parameter is not None:
                _normal(parameter, std)
        _normal(self.o, self.init_scale / math.sqrt(self.n_heads * self.d_head))
        for sel in (self.sel_v, self.sel_o):
            if sel is not None:
                _selection(sel, std)

    @property
    def weights(self) -> F.SwitchHeadWeights:
        return F.SwitchHeadWeights(self.q.weight, self.k.weight, self.v, self.o, self.sel_v, self.sel_o, self.pos_to_pk)

    @property
    def position_encoding(self) -> F.RoPE | F.XL | None:
        if self.position is None:
            return None
        return F.XL() if self.position == "xl" else F.RoPE(self.rotate_fraction, self.rope_base)

    def forward(
        self,
        x: Tensor,
        k_src: Tensor | None = None,
        v_src: Tensor | None = None,
        *,
        causal: bool = True,
        window: int | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: int | Tensor | None = None,
        return_logits: bool = False,
    ):
        return F.switchhead(
            x,
            self.weights,
            top_k=self.top_k,
            position=self.position_encoding,
            k_src=k_src,
            v_src=v_src,
            causal=causal,
            window=window,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            dropout=self.dropout,
            expert_dropout=self.expert_dropout,
            training=self.training,
            seed=seed,
            recompute=self.recompute,
            return_logits=return_logits,
        )

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, n_heads={self.n_heads}, n_experts={self.n_experts}, d_head={self.d_head}, "
            f"top_k={self.top_k}, position={self.position!r}, dropout={self.dropout}, expert_dropout={self.expert_dropout}, "
            f"shared_selection={self.n_experts > 1 and self.sel_v is None}, recompute={self.recompute}"
        )


class SwitchAll(nn.Module):
    """One pre-norm SwitchAll block: `forward(x [B, T, D], ...) -> (y [B, T, D], logits [B, T, E])`.

    Children norm1, attention (SwitchHead), norm2, moe (SigmaMoE). dropout acts on both residual branches; attention_dropout on q;
    moe_dropout on the activated experts; expert_dropout and moe_expert_dropout on the two selections. recompute: less memory for
    more time, as of `functional.switchall`; to be changed later in `attention.recompute`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_experts: int,
        moe_n_experts: int,
        expert_size: int,
        *,
        top_k: int = 2,
        moe_top_k: int = 4,
        dropout: float = 0.0,
        eps: float = 1e-5,
        d_head: int | None = None,
        position: str | None = "rope",
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
        attention_dropout: float = 0.0,
        expert_dropout: float = 0.0,
        shared_selection: bool = False,
        recompute: bool = False,
        activation: str = "relu",
        mode: str = "sigmoid",
        bias: bool = False,
        moe_dropout: float = 0.0,
        moe_expert_dropout: float = 0.0,
        init_scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dropout = _check.probability("dropout", dropout)
        self.eps = eps
        self.norm1 = nn.LayerNorm(d_model, eps=eps, **factory)
        self.attention = SwitchHead(
            d_model,
            n_heads,
            n_experts,
            d_head=d_head,
            top_k=top_k,
            position=position,
            rotate_fraction=rotate_fraction,
            rope_base=rope_base,
            dropout=attention_dropout,
            expert_dropout=expert_dropout,
            init_scale=init_scale,
            shared_selection=shared_selection,
            recompute=recompute,
            **factory,
        )
        self.norm2 = nn.LayerNorm(d_model, eps=eps, **factory)
        self.moe = SigmaMoE(
            d_model,
            moe_n_experts,
            expert_size,
            moe_top_k,
            activation=activation,
            mode=mode,
            bias=bias,
            dropout=moe_dropout,
            expert_dropout=moe_expert_dropout,
            init_scale=init_scale,
            **factory,
        )

    def reset_parameters(self) -> None:
        for child in (self.norm1, self.attention, self.norm2, self.moe):
            child.reset_parameters()

    @property
    def weights(self) -> F.SwitchAllWeights:
        return F.SwitchAllWeights(
            (self.norm1.weight, self.norm1.bias),
            self.attention.weights,
            (self.norm2.weight, self.norm2.bias),
            self.moe.weights,
        )

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return F.switchall(
            x,
            self.weights,
            top_k=self.attention.top_k,
            moe_top_k=self.moe.top_k,
            eps=self.eps,
            dropout=self.dropout,
            position=self.attention.position_encoding,
            causal=causal,
            window=window,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            attention_dropout=self.attention.dropout,
            expert_dropout=self.attention.expert_dropout,
            activation=self.moe.activation,
            mode=self.moe.mode,
            moe_dropout=self.moe.dropout,
            moe_expert_dropout=self.moe.expert_dropout,
            training=self.training,
            seed=seed,
            recompute=self.attention.recompute,
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, eps={self.eps}"
