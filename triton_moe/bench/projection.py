"""Projections: the value side, the output side, and both with their gates."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .peers import BOTH_PEERS, OUTPUT_PEERS, VALUE_PEERS
from .row import BOTH, FORWARD, Inputs, Mix, Rival, Row, Target, Task, task
from .shared import (
    ALL,
    GROUPED,
    PEERS,
    SCATTER,
    SHAPES,
    SYNCHRONISING,
    Shape,
    head_inputs,
    op_dtype,
    products,
    projection_flops,
    randn,
)


def projection_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        tiny = Shape(2, 3, 2, 20, 48, 2, 24)
        return [*three(tiny, device), *three(tiny, device, skew=0.7)] if full else three(tiny, device)
    first = SHAPES[0]
    found = three(first, device, [VALUE, OUTPUT, BOTH_SIDES], peers=PEERS if full else (ALL, GROUPED, SCATTER))
    for shape in SHAPES[1:]:
        found += three(shape, device, [Target(2.2, 1.5)] * 3, peers=PEERS if full else ())
    found += three(first, device, skew=0.7)
    for P in (64, 76, 100, 112, 132) if full else (64, 100):
        made = three(first._replace(P=P), device, widths=True)
        found += made if full else made[-1:]
    return found + three(first._replace(D=412), device, widths=True) if full else found


VALUE, OUTPUT, BOTH_SIDES = Target(1.25, 1.1), Target(1.75, 1.2), Target(1.6, 1.25)


def three(
    s: Shape,
    device: str,
    targets: Sequence[Target | None] = (None, None, None),
    *,
    peers: Sequence[str] = (),
    skew: float = 0.0,
    widths: bool = False,
) -> list[Row]:
    """The three rows of one shape. Each faces cuBLAS of the same active FLOPs and, where asked, the peers; itself with balanced
    routing (skew > 0); its own time per useful FLOP at P 64 and 128 and D 1024, interpolated."""
    made = []
    for make, target in zip((value_row, output_row, both_sides_row), targets, strict=True):
        row = make(s, device, skew, target, peers)
        if skew:
            balanced = make(s, device, 0.0, None, ())
            bounds = dict.fromkeys(row.flops, Target(1.25, 1.1))
            rival = Rival("ours, balanced", functools.partial(own, balanced), bounds)
            row = replace(row, name=f"{row.name}, skewed", rivals=(rival,))
        elif widths and (s.P not in (64, 128) or s.D != 1024):
            between = {P: make(s._replace(P=P, D=1024), device, 0.0, None, ()) for P in (64, 128)}
            rival = Rival("ours per FLOP at P 64 and 128", interpolation(row, s.P, between))
            row = replace(row, rivals=(*row.rivals, rival))
        made.append(row)
    return made


def own(row: Row, _: Inputs) -> Task:
    return task(row, row.inputs())


def interpolation(row: Row, P: int, between: dict[int, Row]) -> Callable[[Inputs], Mix]:
    """The time of as many FLOPs as `row` has, at a rate between (beyond 128: past) those of the rows for two other widths."""
    (low, slow), (high, fast) = between.items()
    at, work = (P - low) / (high - low), next(iter(row.flops))
    parts = [(share * row.flops[work] / other.flops[work], other) for share, other in ((1 - at, slow), (at, fast)) if share]
    return lambda p: [(share, own(other, p)) for share, other in parts]


def one_side_row(s: Shape, device: str, skew: float, target: Target | None, peers: Sequence[str], *, side: str) -> Row:
    """side: "value", x [B, T, D] to heads, or "output", a [B, T, H, P] to the model's width."""
    dtype, wide, E = op_dtype(device), s.H * s.TOP_K * s.P, s.H * s.E
    name, one_token, matrix = ("x", [s.D], [s.D, s.P]) if side == "value" else ("a", [s.H, s.P], [s.P, s.D])
    widths, known = ((s.D, wide), VALUE_PEERS) if side == "value" else ((wide, s.D), OUTPUT_PEERS)

    def inputs():
        from ..functional import gating

        tokens = randn(s.B, s.T, *one_token, device=device, dtype=dtype)
        w = randn(E, *matrix, std=matrix[0] ** -0.5, device=device, dtype=dtype)
        logits = torch.randn(s.N, E, device=device) + skew * torch.randn(E, device=device)
        routing = gating(logits, torch.eye(E, device=device), n_heads=s.H, top_k=s.TOP_K)
        gates = routing.weights.detach().view(s.B, s.T, s.H, s.TOP_K).requires_grad_()
        return {name: tokens, "w": w, "gates": gates, "routing": routing}

    def ours(p):
        from .. import functional

        project = getattr(functional, f"{side}_projection")
        return project(p[name], p["w"], p["routing"]._replace(weights=p["gates"].flatten(0, 1)))

    def truth(p, experts):
        from .. import reference

        return getattr(reference, f"{side}_projection")(p[name], p["w"], p["gates"].flatten(0, 1), experts)

    def gemm(p):
        return products(torch.randn(s.N, widths[0], device=device, dtype=dtype), widths[1])

    cublas = Rival(f"cuBLAS GEMM {s.N} x {widths[0]} x {widths[1]}", gemm, {FORWARD: target} if target else {})
    return Row(
        f"{side} projection, {s}",
        inputs,
        ours,
        truth,
        batched=(name, "gates"),
        flops={FORWARD: projection_flops(s.N, s.D, s.H, s.TOP_K, s.P)},
        kernels=str(s),
        rivals=(cublas, *(Rival(peer, functools.partial(known[peer], s), compiles=True) for peer in peers)),
        experts=lambda p: p["routing"].experts,
    )


value_row = functools.partial(one_side_row, side="value")
output_row = functools.partial(one_side_row, side="output")


def both_sides_row(s: Shape, device: str, skew: float, target: Target | None, peers: Sequence[str]) -> Row:
    dtype, wide = op_dtype(device), s.H * s.TOP_K * s.P

    def inputs():
        x = torch.randn(s.B, s.T, s.D, device=device)
        made = {name: t.detach() for name, t in head_inputs(s.D, s.H, s.E, s.P, device).items()}
        if skew:  # a channel that is always 1 carries the experts' own offsets
            x[..., 0] = 1.0
            for side in ("sel_v", "sel_o"):
                made[f"attention.{side}"][:, 0] = skew * torch.randn(s.H * s.E, device=device)
        parts = {name: made[f"attention.{name}"].to(dtype).requires_grad_() for name in ("v", "o", "sel_v", "sel_o")}
        return {"x": x.to(dtype).requires_grad_(), **parts}

    def gates(p):
        from ..functional import gating

        return gating(p["x"], (p["sel_v"], p["sel_o"]), n_heads=s.H, top_k=s.TOP_K)

    def ours(p):
        from ..functional import output_projection, value_projection

        value_gate, output_gate = gates(p)
        return output_projection(value_projection(p["x"], p["v"], value_gate), p["o"], output_gate)

    def truth(p, experts):
        from .. import reference

        chosen = zip(("sel_v", "sel_o"), experts, strict=True)
        value, output = (reference.gating(p["x"], p[sel], n_heads=s.H, top_k=s.TOP_K, experts=ids) for sel, ids in chosen)
        v = reference.value_projection(p["x"], p["v"], value.weights, value.experts)
        return reference.output_projection(v, p["o"], output.weights, output.experts)

    known = [
        Rival(peer, functools.partial(BOTH_PEERS[peer], s), graph=peer not in SYNCHRONISING, compiles=True) for peer in peers
    ]
    gemms = Rival("6 cuBLAS GEMMs", lambda p: products(p["x"], wide, s.D), {BOTH: target} if target else {})
    return Row(
        f"value and output projection, gates included, {s}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={BOTH: 6 * projection_flops(s.N, s.D, s.H, s.TOP_K, s.P)},
        kernels=str(s),
        rivals=(gemms, *known),
        experts=lambda p: [gate.experts for gate in gates(p)],
    )
