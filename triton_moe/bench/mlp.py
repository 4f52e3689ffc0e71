"""The MLP: sigma-MoE against a dense MLP of the same parameters."""

import importlib
import sys

import torch

from ..model import DenseMLP
from .row import BOTH, FORWARD, Rival, Row, Target, Task
from .shared import PUBLIC_MOE, module_task, moe_inputs, moe_weights, randn


def mlp_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        return [mlp_row(6, 2, 48, activation, device, G=16, B=2, T=24) for activation in ("relu", "swiglu")[: 1 + full]]
    rows = [
        mlp_row(32, 4, 1024, "relu", device, dense=Target(0.4, 0.22), scatter=FASTER, memory=Target(0.5, 0.35), public=full),
        mlp_row(128, 8, 1024, "relu", device, scatter=FASTER, public=full),
    ]
    others = [(16, 4, 412, "relu")]
    if full:
        cross = [(E, K, D, phi) for E, K in MLPS for D in (412, 1024) for phi in ("relu", "swiglu")]
        others = [shape for shape in cross if shape not in ((32, 4, 1024, "relu"), (128, 8, 1024, "relu"))]
    return rows + [mlp_row(*shape, device) for shape in others]


MLPS = ((16, 4), (32, 4), (128, 8), (387, 16))  # E, TOP_K
FASTER = Target(1 / 2.5, 1 / 4)  # than ScatterMoE


class DenseSwiGLU(torch.nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = torch.nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = torch.nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.up(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(first) * second)


def mlp_row(
    E: int,
    TOP_K: int,
    D: int,
    activation: str,
    device: str,
    *,
    G: int = 128,
    B: int = 32,
    T: int = 1024,
    dense: Target | None = None,
    scatter: Target | None = None,
    memory: Target | None = None,
    public: bool = False,
) -> Row:
    gated = activation == "swiglu"

    def inputs():
        return {"x": randn(B, T, D, device=device), **moe_inputs(D, E, G, device, G * (1 + gated))}

    def ours(p):
        from ..functional import sigma_moe

        return sigma_moe(p["x"], moe_weights(p), top_k=TOP_K, activation=activation)[0]

    def experts(p):
        from ..functional import gating

        return gating(p["x"], p["moe.expert_sel"], top_k=TOP_K).experts

    def truth(p, experts):
        from .. import reference

        return reference.sigma_moe(p["x"], moe_weights(p), top_k=TOP_K, activation=activation, experts=experts)[0]

    def dense_mlp(p):
        return module_task((DenseSwiGLU if gated else DenseMLP)(D, E * G), p, compiling=True)

    def public_moe(p):
        # Both public packages register the same operator; switchhead's copy of the file also knows bfloat16 and serves both.
        sys.modules["moe_layer.cvmm"] = importlib.import_module("switchhead.cvmm")
        package = importlib.import_module("moe_layer")
        layer = package.MoE(D, n_experts=E, expert_size=G, k=TOP_K)
        return module_task(layer, p, take=lambda result: result[0])

    def scattermoe(p):
        package = importlib.import_module("scattermoe.mlp")
        make, phi = (package.GLUMLP, torch.nn.functional.silu) if gated else (package.MLP, torch.nn.functional.relu)
        mlp = make(D, G, E, TOP_K, activation=phi).to(device, torch.bfloat16)
        gate = torch.nn.Linear(D, E, bias=False, device=device, dtype=torch.bfloat16)
        x = p["x"]

        def call():
            rows = x.view(-1, D).to(torch.bfloat16)
            weights, chosen = torch.topk(torch.sigmoid(gate(rows)), TOP_K, dim=-1)
            return mlp(rows, weights.to(torch.bfloat16), chosen)

        return Task(call, [x, gate.weight, *mlp.parameters()])

    flops = 2.0 * (3 if gated else 2) * B * T * D * G * TOP_K
    rivals = [
        Rival(
            f"dense MLP {D}-{E * G}-{D}, torch.compile",
            dense_mlp,
            {BOTH: dense} if dense else {},
            memory=memory,
            compiled=True,
        ),
        Rival("ScatterMoE (bfloat16 parameters)", scattermoe, {BOTH: scatter} if scatter else {}, graph=False, compiles=True),
    ]
    if public:
        rivals.append(Rival(PUBLIC_MOE, public_moe, graph=False, compiles=True))
    return Row(
        f"sigma-MoE E {E} G {G} TOP_K {TOP_K} D {D}, {activation}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: flops, BOTH: 3 * flops},
        rivals=tuple(rivals),
        autocast=device == "cuda",
        experts=experts,
    )
