"""Gating: the gates and the routing plan."""

import torch

from .row import BOTH, FORWARD, Rival, Row, Target
from .shared import SHAPES, Shape, op_dtype, products, randn


def gating_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        return [gating_row(Shape(2, 3, 2, 20, 48, 2, 24), device)]
    shapes = SHAPES if full else SHAPES[:1]
    return [gating_row(shape, device) for shape in shapes] + [gating_row(SHAPES[0], device, sides=2)]


def gating_row(s: Shape, device: str, sides: int = 1) -> Row:
    """Both gates of a layer with their routing plans: one selection matrix of 2 H heads, or one for each side."""
    dtype = op_dtype(device)

    def inputs():
        sel = randn(2 * s.H * s.E, s.D, std=s.D**-0.5, device=device, dtype=dtype)
        return {"x": randn(s.B, s.T, s.D, device=device, dtype=dtype), "sel": sel}

    def route(p):
        from ..functional import gating

        if sides == 1:
            return [gating(p["x"], p["sel"], n_heads=2 * s.H, top_k=s.TOP_K)]
        return gating(p["x"], p["sel"].chunk(sides), n_heads=s.H, top_k=s.TOP_K)

    def ours(p):
        return join([routing.weights for routing in route(p)]).view(s.B, s.T, 2 * s.H, s.TOP_K)

    def join(parts):  # for the report to have one output
        return parts[0] if sides == 1 else torch.cat(parts, dim=1)

    def truth(p, experts):
        from .. import reference

        return reference.gating(p["x"], p["sel"], n_heads=2 * s.H, top_k=s.TOP_K, experts=experts).weights[None]

    logits = 2.0 * s.N * s.D * 2 * s.H * s.E
    return Row(
        f"gating and plan, both sides{', two matrices' if sides == 2 else ''}, {s}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: logits, BOTH: 3 * logits},
        rivals=(Rival("cuBLAS GEMM of the logits alone", lambda p: products(p["x"], 2 * s.H * s.E)),),
        experts=lambda p: join([routing.experts for routing in route(p)]),
        milliseconds={FORWARD: Target(0.040, 0.028)} if s == SHAPES[0] and sides == 1 else {},
    )
