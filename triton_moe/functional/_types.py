"""What the public functions take and return, and the names of their random streams."""

from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.gating import Plan

MODES = ("sigmoid", "softmax", "softmax_topk")
ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "geglu")
MAX_HEAD_WIDTH = 256

# NOTE [Streams]
STREAM_GATE, STREAM_ACTIVATION = 0, 1
STREAM_GATE_V, STREAM_GATE_O, STREAM_QUERY = 2, 3, 4
STREAM_RESIDUAL_ATTENTION, STREAM_RESIDUAL_MOE = 5, 6
STREAM_GATES = 7  # and up: of several gates in one call


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
