"""Layers: SwitchHead against dense attention, SwitchAll against a dense block."""

import importlib

import torch

from ..demo import switchall_weights
from ..model import Block, DenseAttention
from .row import BOTH, FORWARD, Rival, Row, Target, Task
from .shared import (
    PUBLIC_HEAD,
    attention_flops,
    head_inputs,
    head_weights,
    layer_projection_flops,
    module_task,
    moe_inputs,
    randn,
)


def switchhead_row(D, H, E, TOP_K, P, B, T, device, *, dense: Target | None = None, public: Target | None = None) -> Row:
    def inputs():
        return {"x": randn(B, T, D, device=device), **head_inputs(D, H, E, P, device)}

    def ours(p):
        from .. import functional as F

        return F.switchhead(p["x"], head_weights(p), top_k=TOP_K, position=F.RoPE(fraction=1.0))

    def experts(p):
        from ..functional import gating

        sides = (p["attention.sel_v"], p["attention.sel_o"])
        return tuple(gating(p["x"], sel, n_heads=H, top_k=TOP_K).experts for sel in sides)

    def truth(p, experts):
        from .. import reference

        position = reference.RoPE(fraction=1.0)
        return reference.switchhead(p["x"], head_weights(p), top_k=TOP_K, position=position, experts=experts)

    def dense_attention(p):
        return module_task(DenseAttention(D, D // 64, 64), p, compiling=True)

    def public_switchhead(p):
        package = importlib.import_module("switchhead")
        layer = package.SwitchHeadRope(D, n_heads=H, n_experts=E, d_head=P, moe_k=TOP_K, rotate_fraction=1.0)
        layer, x = layer.to(device), p["x"]
        return Task(lambda: layer(x, x, x, None)[0], [x, *layer.parameters()])

    projections, attention = layer_projection_flops(B * T, D, H, TOP_K, P), attention_flops(B * T, T, H, P)
    return Row(
        f"SwitchHead H {H} E {E} TOP_K {TOP_K} P {P}, T {T}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: projections + attention, BOTH: 3 * projections + 3.5 * attention},
        rivals=(
            Rival(
                f"dense attention {D // 64} x 64, torch.compile and SDPA",
                dense_attention,
                {BOTH: dense} if dense else {},
                memory=Target(0.7, 0.5),
                compiled=True,
            ),
            Rival(PUBLIC_HEAD, public_switchhead, {BOTH: public} if public else {}, graph=False, compiles=True),
        ),
        autocast=device == "cuda",
        kernels=f"P {P}",
        experts=experts,
    )


def switchall_row(D, H, E, TOP_K, P, MOE_E, G, MOE_TOP_K, B, T, device) -> Row:
    tops = {"top_k": TOP_K, "moe_top_k": MOE_TOP_K}

    def inputs():
        norms = {}
        for name in ("norm1", "norm2"):
            norms[f"{name}.weight"] = torch.ones(D, device=device, requires_grad=True)
            norms[f"{name}.bias"] = torch.zeros(D, device=device, requires_grad=True)
        parameters = {**norms, **head_inputs(D, H, E, P, device), **moe_inputs(D, MOE_E, G, device)}
        return {"x": randn(B, T, D, device=device), **parameters}

    def ours(p):
        from .. import functional as F

        return F.switchall(p["x"], switchall_weights(p), **tops, position=F.RoPE(fraction=1.0))[0]

    def experts(p):
        from .. import functional as F

        def norm(x, name):
            return torch.nn.functional.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"])

        h = norm(p["x"], "norm1")
        value, output = (F.gating(h, p[f"attention.{s}"], n_heads=H, top_k=TOP_K).experts for s in ("sel_v", "sel_o"))
        attended = F.switchhead(h, head_weights(p), top_k=TOP_K, position=F.RoPE(fraction=1.0))
        h = norm(p["x"] + attended, "norm2")
        return value, output, F.gating(h, p["moe.expert_sel"], top_k=MOE_TOP_K).experts

    def truth(p, experts):
        from .. import reference

        position = reference.RoPE(fraction=1.0)
        return reference.switchall(p["x"], switchall_weights(p), **tops, position=position, experts=experts)[0]

    def dense_block(p):
        return module_task(Block(D, DenseAttention(D, D // 64, 64), MOE_E * G), p, compiling=True, take=lambda result: result[0])

    dense = layer_projection_flops(B * T, D, H, TOP_K, P) + 4.0 * B * T * D * G * MOE_TOP_K
    attention = attention_flops(B * T, T, H, P)
    return Row(
        f"SwitchAll H {H} E {E} TOP_K {TOP_K} P {P}, MLP E {MOE_E} G {G} TOP_K {MOE_TOP_K}, T {T}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: dense + attention, BOTH: 3 * dense + 3.5 * attention},
        rivals=(
            Rival(
                f"dense block, attention {D // 64} x 64 and MLP {MOE_E * G}, torch.compile",
                dense_block,
                {BOTH: Target(0.6, 0.4)},
                compiled=True,
            ),
        ),
        autocast=device == "cuda",
        experts=experts,
    )


def layer_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        return [
            switchhead_row(48, 2, 3, 2, 20, B=2, T=24, device=device),
            switchall_row(48, 2, 3, 2, 20, 6, 16, 2, B=2, T=24, device=device),
        ]
    p100, p128 = Target(1 / 14, 1 / 20), Target(1 / 5, 1 / 8)
    return [
        switchhead_row(1024, 4, 4, 2, 100, 32, 1024, device, dense=Target(0.75, 0.5), public=p100),
        switchhead_row(1024, 4, 4, 2, 100, 8, 4096, device, dense=Target(0.55, 0.4), public=p100),
        switchhead_row(1024, 4, 4, 2, 128, 32, 1024, device, public=p128),
        switchhead_row(1024, 4, 4, 2, 128, 8, 4096, device, public=p128),
        switchall_row(1024, 4, 4, 2, 100, 32, 128, 4, 32, 1024, device),
    ]
