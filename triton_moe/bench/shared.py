"""What the rows share: shapes, inputs, the work they count, the names of rivals."""

from typing import NamedTuple

import torch

from .row import Inputs, Task, compiled


class Shape(NamedTuple):
    """The widths of one SwitchHead layer, and the batch."""

    H: int
    E: int
    TOP_K: int
    P: int
    D: int = 1024
    B: int = 32
    T: int = 1024

    def __str__(self):
        return f"H {self.H} E {self.E} TOP_K {self.TOP_K} P {self.P}" + (f" D {self.D}" if self.D != 1024 else "")

    def of_length(self, T: int) -> "Shape":
        """As many tokens, in sequences of T."""
        return self._replace(B=self.N // T, T=T)

    @property
    def N(self) -> int:
        return self.B * self.T


# The published and the users' shapes of one layer.
SHAPES = [Shape(4, 4, 2, 128), Shape(2, 8, 4, 132), Shape(2, 5, 3, 76, D=412), Shape(4, 10, 2, 128)]


def randn(*shape: int, std: float = 1.0, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * std).to(dtype).requires_grad_()


def op_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def products(x: torch.Tensor, *widths: int) -> Task:
    """x [..., D] through matrices [D, widths[0]], [widths[0], widths[1]], ... by cuBLAS."""
    x = x.detach().flatten(0, -2).requires_grad_()
    weights, before = [], x.shape[-1]
    for width in widths:
        weights.append(randn(before, width, std=before**-0.5, device=x.device.type, dtype=x.dtype))
        before = width

    def call():
        y = x
        for weight in weights:
            y = y @ weight
        return y

    return Task(call, [x, *weights])


def module_task(module: torch.nn.Module, inputs: Inputs, *, compiling: bool = False, take=lambda result: result) -> Task:
    x = inputs["x"]
    module = module.to(x.device)
    function = compiled(module) if compiling else module
    return Task(lambda: take(function(x)), [x, *module.parameters()])


def head_inputs(D: int, H: int, E: int, P: int, device: str) -> Inputs:
    return {
        "attention.q.weight": randn(H * P, D, std=D**-0.5, device=device),
        "attention.k.weight": randn(H * P, D, std=D**-0.5, device=device),
        "attention.v": randn(H * E, D, P, std=D**-0.5, device=device),
        "attention.o": randn(H * E, P, D, std=(H * P) ** -0.5, device=device),
        "attention.sel_v": randn(H * E, D, std=D**-0.5, device=device),
        "attention.sel_o": randn(H * E, D, std=D**-0.5, device=device),
    }


def head_weights(p: Inputs):
    from ..functional import SwitchHeadWeights

    names = ("q.weight", "k.weight", "v", "o", "sel_v", "sel_o", "pos_to_pk")
    return SwitchHeadWeights(*(p.get(f"attention.{name}") for name in names))


def moe_inputs(D: int, E: int, G: int, device: str, width: int | None = None) -> Inputs:
    """width: of the keys, where it is not G."""
    return {
        "moe.keys": randn(E, D, width or G, std=D**-0.5, device=device),
        "moe.values": randn(E, G, D, std=(E * G) ** -0.5, device=device),
        "moe.expert_sel": randn(E, D, std=D**-0.5, device=device),
    }


def moe_weights(p: Inputs):
    from ..functional import SigmaMoEWeights

    return SigmaMoEWeights(*(p[f"moe.{name}"] for name in ("keys", "values", "expert_sel")))


def projection_flops(N: int, D: int, H: int, TOP_K: int, P: int) -> float:
    """One side: the chosen values or the chosen outputs."""
    return 2.0 * N * D * H * P * TOP_K


def layer_projection_flops(N: int, D: int, H: int, TOP_K: int, P: int) -> float:
    """Queries, keys, chosen values and chosen outputs."""
    return 2.0 * N * D * H * P * (2 + 2 * TOP_K)


def causal_pairs(T: int, window: int | None = None) -> float:
    """How many (query, key) pairs one sequence computes, on average over the diagonal."""
    w = T if window is None else min(window, T)
    return T * w - w * w / 2


def attention_flops(N: int, T: int, H: int, P: int, window: int | None = None) -> float:
    return 4.0 * N / T * causal_pairs(T, window) * H * P  # two products


ALL, GROUPED, CVMM, SCATTER = "cuBLAS over all experts, then the gates", "torch grouped_mm", "public cvmm", "ScatterMoE"
PEERS = (ALL, GROUPED, CVMM, SCATTER)
PUBLIC_HEAD, PUBLIC_XL, PUBLIC_MOE = "public SwitchHead", "public SwitchHeadXL", "public sigma-MoE (moe_layer)"
SYNCHRONISING, AUTOTUNED = (CVMM, SCATTER), (CVMM, PUBLIC_HEAD, PUBLIC_XL, PUBLIC_MOE)
