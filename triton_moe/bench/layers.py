"""Layers: SwitchHead against dense attention and the public layer, SwitchAll against a dense block; what they cost the host."""

import importlib
from dataclasses import replace

import torch

from ..demo import switchall_weights
from ..model import Block, DenseAttention, DenseMLP
from .mlp import mlp_row
from .row import BOTH, FORWARD, HOST, Inputs, Rival, Row, Target, Task
from .shared import (
    PUBLIC_HEAD,
    Shape,
    attention_flops,
    head_inputs,
    head_weights,
    layer_projection_flops,
    module_task,
    moe_inputs,
    randn,
)


def layer_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        tiny = Shape(2, 3, 2, 20, 48, 2, 24)
        rows = [switchhead_row(tiny, device), switchall_row(tiny, 6, 16, 2, device)]
        return [*rows, switchhead_row(tiny, device, fraction=None)] if full else rows
    p100, p128, xl = Target(1 / 14, 1 / 20), Target(1 / 5, 1 / 8), Target(1 / 10, 1 / 20)
    dense = {1024: Target(0.75, 0.5), 4096: Target(0.55, 0.4), 16384: Target(0.5, 0.4)}
    lengths = (512, 1024, 2048, 4096, 8192, 16384) if full else (1024, 4096, 16384)
    narrow, wide = Shape(4, 4, 2, 100), Shape(4, 4, 2, 128)
    small = Shape(2, 5, 3, 76, D=412, B=16)
    return [
        *(switchhead_row(narrow.of_length(T), device, dense=dense.get(T), public=p100) for T in lengths),
        *(switchhead_row(wide.of_length(T), device, public=p128) for T in (1024, 4096)),
        switchhead_row(narrow, device, recompute=True),
        switchhead_row(narrow, device, fraction=None, public=xl),
        switchhead_row(small, device, heads=(10, 42), dense=Target(0.8, 0.55)),
        switchall_row(narrow, 32, 128, 4, device),
        switchall_row(narrow, 32, 128, 4, device, recompute=True),
        *host_rows(narrow._replace(B=1, T=256), 32, 128, 4, device),
    ]


def position(package, fraction: float | None):
    """RoPE of that fraction of the channels, or Transformer-XL's."""
    return package.XL() if fraction is None else package.RoPE(fraction=fraction)


def dense_rivals(name: str, module, **targets) -> tuple[Rival, Rival]:
    """The same layer compiled and eager. module(): makes it."""

    def build(p: Inputs, compiling: bool) -> Task:
        def output(result):
            return result if isinstance(result, torch.Tensor) else result[0]

        return module_task(module(), p, compiling=compiling, take=output)

    compiled = Rival(f"{name}, torch.compile", lambda p: build(p, True), compiled=True, **targets)
    return compiled, Rival(f"{name}, eager", lambda p: build(p, False), graph=False)


def switchhead_row(
    s: Shape,
    device: str,
    *,
    fraction: float | None = 1.0,
    heads: tuple[int, int] | None = None,
    dense: Target | None = None,
    public: Target | None = None,
    recompute: bool = False,
) -> Row:
    """fraction: None for Transformer-XL's positions. heads: of the dense rival, their number and width."""
    n_heads, d_head = heads or (s.D // 64, 64)
    tops = {"top_k": s.TOP_K}

    def inputs():
        made = {"x": randn(s.B, s.T, s.D, device=device), **head_inputs(s.D, s.H, s.E, s.P, device)}
        if fraction is None:
            made["attention.pos_to_pk"] = randn(s.H * s.P, s.D, std=s.D**-0.5, device=device)
        return made

    def ours(p):
        from .. import functional as F

        return F.switchhead(p["x"], head_weights(p), position=position(F, fraction), recompute=recompute, **tops)

    def experts(p):
        from .. import functional as F

        _, saved = F.switchhead_forward(p["x"], head_weights(p), position=position(F, fraction), **tops)
        return F._chosen_experts(saved)

    def truth(p, experts):
        from .. import reference

        return reference.switchhead(p["x"], head_weights(p), position=position(reference, fraction), experts=experts, **tops)

    def public_switchhead(p):
        package = importlib.import_module("switchhead")
        widths = {"n_heads": s.H, "n_experts": s.E, "d_head": s.P, "moe_k": s.TOP_K}
        if fraction is None:
            layer = package.SwitchHeadXL(s.D, **widths)
            torch.nn.init.normal_(layer.pos_to_pk, std=s.D**-0.5)  # it leaves this one as the memory was
        else:
            layer = package.SwitchHeadRope(s.D, **widths, rotate_fraction=fraction)
        layer, x = layer.to(device), p["x"]
        return Task(lambda: layer(x, x, x, None)[0], [x, *layer.parameters()])

    rivals = []
    if fraction is not None:
        name, targets = f"dense attention {n_heads} x {d_head}", {BOTH: dense} if dense else {}
        attention = dense_rivals(name, lambda: DenseAttention(s.D, n_heads, d_head), targets=targets, memory=Target(0.7, 0.5))
        rivals += attention
    if public:
        rivals.append(Rival(PUBLIC_HEAD, public_switchhead, {BOTH: public}, graph=False, compiles=True))
    projections, pairs = layer_projection_flops(s.N, s.D, s.H, s.TOP_K, s.P), attention_flops(s.N, s.T, s.H, s.P)
    return Row(
        f"SwitchHead{' XL' if fraction is None else ''} {s}, T {s.T}{', recompute' if recompute else ''}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: projections + pairs, BOTH: 3 * projections + 3.5 * pairs},
        rivals=tuple(rivals),
        autocast=device == "cuda",
        kernels=f"P {s.P}",
        experts=experts,
    )


def switchall_row(
    s: Shape, MOE_E: int, G: int, MOE_TOP_K: int, device: str, *, fraction: float = 1.0, recompute: bool = False
) -> Row:
    tops = {"top_k": s.TOP_K, "moe_top_k": MOE_TOP_K}

    def inputs():
        norms = {}
        for name in ("norm1", "norm2"):
            norms[f"{name}.weight"] = torch.ones(s.D, device=device, requires_grad=True)
            norms[f"{name}.bias"] = torch.zeros(s.D, device=device, requires_grad=True)
        parameters = {**norms, **head_inputs(s.D, s.H, s.E, s.P, device), **moe_inputs(s.D, MOE_E, G, device)}
        return {"x": randn(s.B, s.T, s.D, device=device), **parameters}

    def ours(p):
        from .. import functional as F

        return F.switchall(p["x"], switchall_weights(p), position=position(F, fraction), recompute=recompute, **tops)[0]

    def experts(p):
        from .. import functional as F

        _, saved = F.switchall_forward(p["x"], switchall_weights(p), position=position(F, fraction), **tops)
        return F._chosen_experts(saved)

    def truth(p, experts):
        from .. import reference

        weights, turned = switchall_weights(p), position(reference, fraction)
        return reference.switchall(p["x"], weights, position=turned, experts=experts, **tops)[0]

    def dense_block():
        return Block(s.D, DenseAttention(s.D, s.D // 64, 64), MOE_E * G)

    dense = layer_projection_flops(s.N, s.D, s.H, s.TOP_K, s.P) + 4.0 * s.N * s.D * G * MOE_TOP_K
    attention = attention_flops(s.N, s.T, s.H, s.P)
    name = f"dense block, attention {s.D // 64} x 64 and MLP {MOE_E * G}"
    return Row(
        f"SwitchAll {s}, MLP E {MOE_E} G {G} TOP_K {MOE_TOP_K}, T {s.T}{', recompute' if recompute else ''}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: dense + attention, BOTH: 3 * dense + 3.5 * attention},
        rivals=dense_rivals(name, dense_block, targets={BOTH: Target(0.6, 0.4)}),
        autocast=device == "cuda",
        experts=experts,
    )


def host_rows(s: Shape, MOE_E: int, G: int, MOE_TOP_K: int, device: str) -> list[Row]:
    """How long the host takes to start a forward pass of so few tokens that the GPU waits for it."""
    mlp = mlp_row(MOE_E, MOE_TOP_K, s.D, "relu", device, G=G, B=s.B, T=s.T)
    dense = Rival(f"dense MLP {s.D}-{MOE_E * G}-{s.D}, eager", lambda p: module_task(DenseMLP(s.D, MOE_E * G), p))
    layers = [switchhead_row(s, device), replace(mlp, rivals=(dense,))]
    bounds = {HOST: Target(0.3, 0.1)}
    rows = [replace(row, milliseconds=bounds) for row in layers] + [switchall_row(s, MOE_E, G, MOE_TOP_K, device)]
    return [replace(row, name=f"{row.name}, {s.N} tokens", flops={HOST: 0.0}, rivals=row.rivals[-1:]) for row in rows]
