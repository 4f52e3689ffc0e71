"""`python -m triton_moe bench`: our kernels beside their rivals, after checking their results.

Each row first compares our output and every gradient with `reference/` in float64, held to the bar of testing.assert_close. It
does so at the timed size: the cotangent is zero everywhere but on the last sequence, so all gradients are those of that sequence
alone, which the reference computes in no time. A row that fails is not timed. Then ours and one rival run alternately in the same
process, and medians are compared. Without a GPU only the checks run, on tiny shapes in Triton's interpreter.

Read top to bottom: what a row is, the check, the timing, the rows by name, the report, the command.
"""

import argparse
import gc
import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .demo import DenseAttention, DenseBlock, DenseMLP, positive, switchall_weights, write_atomically, write_problem

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
# What one H200 reaches on large bfloat16 matrix products and copies: the two ceilings behind every "floor".
FLOPS_PER_SECOND, BYTES_PER_SECOND = 717e12, 4.27e12

Inputs = dict[str, Any]

# What a row is


@dataclass
class Task:
    """A differentiable computation to time: its output, and the tensors that its gradient goes to."""

    call: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]


@dataclass(frozen=True)
class Target:
    """Bounds on our time (or memory) over the rival's: what must be reached, and what is aimed for."""

    must: float
    aim: float

    def verdict(self, ratio: float) -> str:
        reached = "aim reached" if ratio <= self.aim else "must reached" if ratio <= self.must else "must MISSED"
        return f"{reached} (must {self.must:.3g}, aim {self.aim:.3g})"


@dataclass(frozen=True)
class Rival:
    name: str
    build: Callable[[Inputs], Task]  # ImportError where it is not installed
    targets: dict[str, Target] = field(default_factory=dict)  # by FORWARD, BOTH or BACKWARD
    memory: Target | None = None
    compiled: bool = False  # by torch.compile; then ours is too
    graph: bool = True  # False: it synchronises with the host, so nothing captures it


@dataclass(frozen=True)
class Row:
    """One computation. Tensors in `inputs` that require gradients are its leaves; those in `batched` have the batch in front."""

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[[Inputs], torch.Tensor]  # [B, ...]
    experts: Callable[[Inputs], Any]  # what ours chooses, given the inputs cut to their last sequence
    reference: Callable[[Inputs, Any], torch.Tensor]  # [1, ...], following that choice
    batched: tuple[str, ...]
    flops: dict[str, float]  # by FORWARD and BOTH: which are timed
    rivals: tuple[Rival, ...]
    autocast: bool  # bfloat16 over float32 inputs
    milliseconds: Target | None = None  # bounds on our forward's time itself


def leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}


# The check


def check(row: Row, inputs: Inputs) -> float:
    """The largest relative error of our output and gradients; AssertionError when one is out of bounds."""
    from .testing import assert_close

    ours = leaves(inputs)
    cut = {name: t[-1:].detach() if name in row.batched else t for name, t in inputs.items()}
    device = ours[row.batched[0]].device.type
    dtype = torch.bfloat16 if row.autocast else ours[row.batched[0]].dtype
    with autocast(row, device):
        with torch.no_grad():
            experts = row.experts(cut)
        actual = row.ours(inputs)

    cotangent = torch.zeros_like(actual)
    cotangent[-1:] = torch.randn_like(actual[-1:])
    gradients = dict(zip(ours, torch.autograd.grad(actual, list(ours.values()), cotangent), strict=True))
    results = {"output": actual[-1:]}
    for name, gradient in gradients.items():
        if name in row.batched:
            if gradient[:-1].any():
                raise AssertionError(f"d{name}: sequences influence each other")
            gradient = gradient[-1:]
        results[f"d{name}"] = gradient

    def run_reference(lower: torch.dtype, gates: torch.dtype) -> dict[str, torch.Tensor]:
        # Gates are float32 inputs where the others are bfloat16; under autocast all inputs are cast down.
        dtypes = {name: lower if row.autocast or t.dtype == dtype else gates for name, t in ours.items()}
        again = {name: cut[name].detach().to(dtypes[name]).requires_grad_() for name in ours}
        output = row.reference({**cut, **again}, experts)
        parts = torch.autograd.grad(output, list(again.values()), cotangent[-1:].to(output.dtype))
        return {"output": output, **{f"d{name}": part for name, part in zip(again, parts, strict=True)}}

    truth, twin = run_reference(torch.float64, torch.float64), run_reference(dtype, torch.float32)
    for name, result in results.items():
        assert_close(result, truth[name], twin[name], name=f"{row.name}: {name}")
    with torch.no_grad():
        return max(float((r - truth[name]).norm() / truth[name].norm()) for name, r in results.items())


def autocast(row: Row, device: str):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=row.autocast)


# Timing


def runnable(row: Row, task: Task, work: str) -> Callable[[], Any]:
    if work == FORWARD:

        def forward():
            with torch.no_grad(), autocast(row, "cuda"):
                return task.call()

        return forward

    with torch.no_grad(), autocast(row, "cuda"):
        cotangent = torch.randn_like(task.call())

    def both():
        with autocast(row, "cuda"):
            output = task.call()
        return torch.autograd.grad(output, task.leaves, cotangent)

    return both


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], Any], times: int) -> float:
    """The mean of `times` back-to-back runs, by CUDA events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def alternate(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each, measured in turns; a sample lasts two milliseconds or more."""
    times = []
    for run in runs:
        milliseconds(run, 3)
        times.append(max(1, math.ceil(2.0 / milliseconds(run, 3))))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, n, seen in zip(runs, times, samples, strict=True):
            seen.append(milliseconds(run, n))
    return [statistics.median(seen) for seen in samples]


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB of forward and backward above what was there before and the gradients that remain."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = run()
    torch.cuda.synchronize()
    kept = sum(g.numel() * g.element_size() for g in gradients)
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


@dataclass
class Result:
    """One line of the report: ours against one rival in one direction, or why there is none."""

    row: str
    work: str = ""
    rival: str = ""
    problem: str | None = None  # why nothing was timed
    failed: bool = False  # the check did
    error: float | None = None  # relative, against the reference
    ours_ms: float | None = None
    rival_ms: float | None = None
    floor_ms: float | None = None
    target: Target | None = None
    milliseconds: Target | None = None
    ours_mib: float | None = None
    rival_mib: float | None = None
    memory: Target | None = None
    graph: bool = False

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.rival_ms if self.ours_ms and self.rival_ms else math.nan


def floor_ms(row: Row, task: Task, output: torch.Tensor, work: str) -> float:
    """Each input read and each output written once; with the backward, their gradients too."""
    moved = sum(t.numel() * t.element_size() for t in [*task.leaves, output]) * (1 if work == FORWARD else 2)
    return max(row.flops[work] / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND) * 1e3


def compare(row: Row, inputs: Inputs, rival: Rival, error: float, repeats: int) -> list[Result]:
    """Time ours and one rival in every direction the row asks for."""
    try:
        theirs = rival.build(inputs)
    except ImportError as missing:
        return [Result(row.name, rival=rival.name, problem=f"not installed ({missing})", error=error)]
    function = torch.compile(row.ours, dynamic=False) if rival.compiled else row.ours
    ours = Task(lambda: function(inputs), list(leaves(inputs).values()))
    with torch.no_grad(), autocast(row, "cuda"):
        output = ours.call()

    results = {}
    for work in row.flops:
        runs = [runnable(row, ours, work), runnable(row, theirs, work)]
        result = Result(row.name, work, rival.name, error=error, target=rival.targets.get(work))
        result.floor_ms = floor_ms(row, ours, output, work)
        if work == FORWARD:
            result.milliseconds = row.milliseconds
        for run in runs:
            for _ in range(3):  # compiles
                run()
        if work == BOTH:
            result.ours_mib, result.rival_mib = (peak_memory(run) for run in runs)
            result.memory = rival.memory
        if rival.graph:
            try:
                runs = [captured(run) for run in runs]
                result.graph = True
            except RuntimeError:  # the report says that no graph was used
                torch.cuda.synchronize()
        result.ours_ms, result.rival_ms = alternate(runs, repeats)
        results[work] = result
    if BACKWARD in rival.targets:
        forward, both = results[FORWARD], results[BOTH]
        results[BACKWARD] = Result(
            row.name,
            BACKWARD,
            rival.name,
            error=error,
            ours_ms=both.ours_ms - forward.ours_ms,
            rival_ms=both.rival_ms - forward.rival_ms,
            floor_ms=both.floor_ms - forward.floor_ms,
            target=rival.targets[BACKWARD],
            graph=both.graph,
        )
    return list(results.values())


def measure(row: Row, repeats: int, timed: bool) -> list[Result]:
    """Check one row, then compare it with each rival."""
    try:
        inputs = row.inputs()
        error = check(row, inputs)
    except Exception as problem:  # whatever it was: what cannot be checked is not timed
        return [Result(row.name, problem=f"{type(problem).__name__}: {problem}", failed=True)]
    if not timed:
        return [Result(row.name, error=error)]
    results = []
    for rival in row.rivals:
        try:
            results += compare(row, inputs, rival, error, repeats)
        except RuntimeError as problem:  # out of memory, or a rival that does not run here
            results.append(Result(row.name, rival=rival.name, problem=f"RuntimeError: {problem}", error=error))
        gc.collect()
        torch.cuda.empty_cache()
    torch.compiler.reset()
    return results


# Layers: SwitchHead against dense attention


def randn(*shape: int, std: float = 1.0, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * std).to(dtype).requires_grad_()


def head_inputs(D: int, H: int, E: int, P: int, device: str) -> Inputs:
    return {
        "attention.q.weight": randn(H * P, D, std=D**-0.5, device=device),
        "attention.k.weight": randn(H * P, D, std=D**-0.5, device=device),
        "attention.v": randn(H * E, D, P, std=D**-0.5, device=device),
        "attention.o": randn(H * E, P, D, std=(H * P) ** -0.5, device=device),
        "attention.sel_v": randn(H * E, D, std=D**-0.5, device=device),
        "attention.sel_o": randn(H * E, D, std=D**-0.5, device=device),
    }


def moe_inputs(D: int, E: int, G: int, device: str) -> Inputs:
    return {
        "moe.keys": randn(E, D, G, std=D**-0.5, device=device),
        "moe.values": randn(E, G, D, std=(E * G) ** -0.5, device=device),
        "moe.expert_sel": randn(E, D, std=D**-0.5, device=device),
    }


def head_weights(p: Inputs):
    from .functional import SwitchHeadWeights

    names = ("q.weight", "k.weight", "v", "o", "sel_v", "sel_o")
    return SwitchHeadWeights(*(p[f"attention.{name}"] for name in names))


def moe_weights(p: Inputs):
    from .functional import SigmaMoEWeights

    return SigmaMoEWeights(*(p[f"moe.{name}"] for name in ("keys", "values", "expert_sel")))


def projection_flops(N: int, D: int, H: int, TOP_K: int, P: int) -> float:
    """Queries, keys, chosen values and chosen outputs."""
    return 2.0 * N * D * H * P * (2 + 2 * TOP_K)


def attention_flops(N: int, T: int, H: int, P: int) -> float:
    return 2.0 * N * T * H * P  # two products, half of them masked


def module_task(module: torch.nn.Module, inputs: Inputs, *, compiled: bool = False, take=lambda result: result) -> Task:
    x = inputs["x"]
    module = module.to(x.device)
    function = torch.compile(module, dynamic=False) if compiled else module
    return Task(lambda: take(function(x)), [x, *module.parameters()])


def switchhead_row(D, H, E, TOP_K, P, B, T, device, *, dense: Target | None = None, public: Target | None = None) -> Row:
    def inputs():
        return {"x": randn(B, T, D, device=device), **head_inputs(D, H, E, P, device)}

    def ours(p):
        from . import functional as F

        return F.switchhead(p["x"], head_weights(p), top_k=TOP_K, position=F.RoPE(fraction=1.0))

    def experts(p):
        from .functional import gating

        sides = (p["attention.sel_v"], p["attention.sel_o"])
        return tuple(gating(p["x"], sel, n_heads=H, top_k=TOP_K).experts for sel in sides)

    def truth(p, experts):
        from . import reference

        position = reference.RoPE(fraction=1.0)
        return reference.switchhead(p["x"], head_weights(p), top_k=TOP_K, position=position, experts=experts)

    def dense_attention(p):
        return module_task(DenseAttention(D, D // 64), p, compiled=True)

    def public_switchhead(p):
        package = importlib.import_module("switchhead")
        layer = package.SwitchHeadRope(D, n_heads=H, n_experts=E, d_head=P, moe_k=TOP_K, rotate_fraction=1.0)
        layer, x = layer.to(device), p["x"]
        return Task(lambda: layer(x, x, x, None)[0], [x, *layer.parameters()])

    projections, attention = projection_flops(B * T, D, H, TOP_K, P), attention_flops(B * T, T, H, P)
    return Row(
        f"SwitchHead H {H} E {E} TOP_K {TOP_K} P {P}, T {T}",
        inputs,
        ours,
        experts,
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
            Rival("public SwitchHead", public_switchhead, {BOTH: public} if public else {}, graph=False),
        ),
        autocast=device == "cuda",
    )


def layers(device: str) -> list[Row]:
    if device == "cpu":
        return [switchhead_row(48, 2, 3, 2, 20, B=2, T=24, device=device)]
    p100, p128 = Target(1 / 14, 1 / 20), Target(1 / 5, 1 / 8)
    return [
        switchhead_row(1024, 4, 4, 2, 100, 32, 1024, device, dense=Target(0.75, 0.5), public=p100),
        switchhead_row(1024, 4, 4, 2, 100, 8, 4096, device, dense=Target(0.55, 0.4), public=p100),
        switchhead_row(1024, 4, 4, 2, 128, 32, 1024, device, public=p128),
        switchhead_row(1024, 4, 4, 2, 128, 8, 4096, device, public=p128),
    ]


# The MLP: sigma-MoE against a dense MLP of the same parameters


def moe_row(D, E, G, TOP_K, B, T, device, *, dense: Target | None = None, memory: Target | None = None) -> Row:
    def inputs():
        return {"x": randn(B, T, D, device=device), **moe_inputs(D, E, G, device)}

    def ours(p):
        from .functional import sigma_moe

        return sigma_moe(p["x"], moe_weights(p), top_k=TOP_K)[0]

    def experts(p):
        from .functional import gating

        return gating(p["x"], p["moe.expert_sel"], top_k=TOP_K).experts

    def truth(p, experts):
        from . import reference

        return reference.sigma_moe(p["x"], moe_weights(p), top_k=TOP_K, experts=experts)[0]

    def dense_mlp(p):
        return module_task(DenseMLP(D, E * G), p, compiled=True)

    def public_moe(p):
        package = importlib.import_module("moe_layer")
        layer = package.MoE(D, n_experts=E, expert_size=G, k=TOP_K)
        return module_task(layer, p, take=lambda result: result[0])

    def scattermoe(p):
        package = importlib.import_module("scattermoe.mlp")
        relu = torch.nn.functional.relu
        mlp = package.MLP(D, G, E, TOP_K, activation=relu).to(device, torch.bfloat16)
        gate = torch.nn.Linear(D, E, bias=False, device=device, dtype=torch.bfloat16)
        x = p["x"]

        def call():
            rows = x.view(-1, D).to(torch.bfloat16)
            weights, chosen = torch.topk(torch.sigmoid(gate(rows)), TOP_K, dim=-1)
            return mlp(rows, weights.to(torch.bfloat16), chosen)

        return Task(call, [x, gate.weight, *mlp.parameters()])

    flops = 4.0 * B * T * D * G * TOP_K
    return Row(
        f"sigma-MoE E {E} G {G} TOP_K {TOP_K}, T {T}",
        inputs,
        ours,
        experts,
        truth,
        batched=("x",),
        flops={FORWARD: flops, BOTH: 3 * flops},
        rivals=(
            Rival(
                f"dense MLP {D}-{E * G}-{D}, torch.compile",
                dense_mlp,
                {BOTH: dense} if dense else {},
                memory=memory,
                compiled=True,
            ),
            Rival("public sigma-MoE (moe_layer)", public_moe, graph=False),
            Rival("ScatterMoE (bfloat16 parameters)", scattermoe, {BOTH: Target(1 / 2.5, 1 / 4)}, graph=False),
        ),
        autocast=device == "cuda",
    )


def moe(device: str) -> list[Row]:
    if device == "cpu":
        return [moe_row(48, 6, 16, 2, B=2, T=24, device=device)]
    return [
        moe_row(1024, 32, 128, 4, 32, 1024, device, dense=Target(0.4, 0.22), memory=Target(0.5, 0.35)),
        moe_row(1024, 128, 128, 8, 32, 1024, device),
    ]


# The block: SwitchAll against a dense block


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
        from . import functional as F

        return F.switchall(p["x"], switchall_weights(p), **tops, position=F.RoPE(fraction=1.0))[0]

    def experts(p):
        from . import functional as F

        def norm(x, name):
            return torch.nn.functional.layer_norm(x, (D,), p[f"{name}.weight"], p[f"{name}.bias"])

        h = norm(p["x"], "norm1")
        value, output = (F.gating(h, p[f"attention.{s}"], n_heads=H, top_k=TOP_K).experts for s in ("sel_v", "sel_o"))
        attended = F.switchhead(h, head_weights(p), top_k=TOP_K, position=F.RoPE(fraction=1.0))
        h = norm(p["x"] + attended, "norm2")
        return value, output, F.gating(h, p["moe.expert_sel"], top_k=MOE_TOP_K).experts

    def truth(p, experts):
        from . import reference

        position = reference.RoPE(fraction=1.0)
        return reference.switchall(p["x"], switchall_weights(p), **tops, position=position, experts=experts)[0]

    def dense_block(p):
        return module_task(DenseBlock(D, D // 64, MOE_E * G), p, compiled=True, take=lambda result: result[0])

    dense = projection_flops(B * T, D, H, TOP_K, P) + 4.0 * B * T * D * G * MOE_TOP_K
    attention = attention_flops(B * T, T, H, P)
    return Row(
        f"SwitchAll H {H} E {E} TOP_K {TOP_K} P {P}, MLP E {MOE_E} G {G} TOP_K {MOE_TOP_K}, T {T}",
        inputs,
        ours,
        experts,
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
    )


def switchall(device: str) -> list[Row]:
    if device == "cpu":
        return [switchall_row(48, 2, 3, 2, 20, 6, 16, 2, B=2, T=24, device=device)]
    return [switchall_row(1024, 4, 4, 2, 100, 32, 128, 4, 32, 1024, device)]


# The operations against cuBLAS of the same active FLOPs, and against cuDNN


def ops(device: str) -> list[Row]:
    if device == "cpu":
        shape = {"D": 48, "H": 2, "E": 3, "TOP_K": 2, "P": 20, "B": 2, "T": 24, "device": device}
        return [gating_row(**shape), *projection_rows(**shape), attention_row(2, 20, 2, 24, device)]
    shape = {"D": 1024, "H": 4, "E": 4, "TOP_K": 2, "P": 128, "B": 32, "T": 1024, "device": device}
    return [
        gating_row(**shape),
        *projection_rows(**shape),
        attention_row(4, 64, 8, 4096, device),
        attention_row(4, 128, 8, 4096, device),
    ]


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


def gating_row(D, H, E, TOP_K, P, B, T, device) -> Row:
    """Both gates of SwitchHead at once, as one selection matrix of 2 H heads, with the routing plan."""
    dtype = op_dtype(device)

    def inputs():
        sel = randn(2 * H * E, D, std=D**-0.5, device=device, dtype=dtype)
        return {"x": randn(B, T, D, device=device, dtype=dtype), "sel": sel}

    def route(p):
        from .functional import gating

        return gating(p["x"], p["sel"], n_heads=2 * H, top_k=TOP_K)

    def truth(p, experts):
        from . import reference

        return reference.gating(p["x"], p["sel"], n_heads=2 * H, top_k=TOP_K, experts=experts).weights[None]

    return Row(
        f"gating, both sides, H {H} E {E} TOP_K {TOP_K}",
        inputs,
        ours=lambda p: route(p).weights.view(B, T, 2 * H, TOP_K),
        experts=lambda p: route(p).experts,
        reference=truth,
        batched=("x",),
        flops={FORWARD: 2.0 * B * T * D * 2 * H * E},
        rivals=(Rival("cuBLAS GEMM of the logits alone", lambda p: products(p["x"], 2 * H * E)),),
        autocast=False,
        milliseconds=Target(0.040, 0.028),
    )


def projection_rows(D, H, E, TOP_K, P, B, T, device) -> list[Row]:
    """Value projection, output projection, and the two in sequence with their gates."""
    dtype, flops = op_dtype(device), 2.0 * B * T * D * H * TOP_K * P
    shape = f"H {H} E {E} TOP_K {TOP_K} P {P}"

    def routed(**tensors):  # a routing from random logits, its gates a leaf of their own
        from .functional import gating

        logits = torch.randn(B * T, H * E, device=device)
        routing = gating(logits, torch.eye(H * E, device=device), n_heads=H, top_k=TOP_K)
        gates = routing.weights.detach().view(B, T, H, TOP_K).requires_grad_()
        return {**tensors, "gates": gates, "routing": routing}

    def routing(p):
        return p["routing"]._replace(weights=p["gates"].flatten(0, 1))

    def experts(p):
        return p["routing"].experts[-T:]

    def value_inputs():
        w = randn(H * E, D, P, std=D**-0.5, device=device, dtype=dtype)
        return routed(x=randn(B, T, D, device=device, dtype=dtype), w=w)

    def output_inputs():
        w = randn(H * E, P, D, std=P**-0.5, device=device, dtype=dtype)
        return routed(a=randn(B, T, H, P, device=device, dtype=dtype), w=w)

    def value(p):
        from .functional import value_projection

        return value_projection(p["x"], p["w"], routing(p))

    def output(p):
        from .functional import output_projection

        return output_projection(p["a"], p["w"], routing(p))

    def value_truth(p, experts):
        from . import reference

        return reference.value_projection(p["x"], p["w"], p["gates"].flatten(0, 1), experts)

    def output_truth(p, experts):
        from . import reference

        return reference.output_projection(p["a"], p["w"], p["gates"].flatten(0, 1), experts)

    def both_inputs():
        made = head_inputs(D, H, E, P, device)
        parts = {name: made[f"attention.{name}"].detach().to(dtype).requires_grad_() for name in ("v", "o", "sel_v", "sel_o")}
        return {"x": randn(B, T, D, device=device, dtype=dtype), **parts}

    def gates(p):
        from .functional import gating

        return [gating(p["x"], p[sel], n_heads=H, top_k=TOP_K) for sel in ("sel_v", "sel_o")]

    def both(p):
        from .functional import output_projection, value_projection

        value_gate, output_gate = gates(p)
        return output_projection(value_projection(p["x"], p["v"], value_gate), p["o"], output_gate)

    def both_truth(p, experts):
        from . import reference

        chosen = zip(("sel_v", "sel_o"), experts, strict=True)
        value, output = (reference.gating(p["x"], p[sel], n_heads=H, top_k=TOP_K, experts=ids) for sel, ids in chosen)
        v = reference.value_projection(p["x"], p["v"], value.weights, value.experts)
        return reference.output_projection(v, p["o"], output.weights, output.experts)

    gemm = f"cuBLAS GEMM {B * T} x {D} x {H * TOP_K * P}"
    wide = H * TOP_K * P
    return [
        Row(
            f"value projection, {shape}",
            value_inputs,
            value,
            experts,
            value_truth,
            batched=("x", "gates"),
            flops={FORWARD: flops},
            rivals=(Rival(gemm, lambda p: products(p["x"], wide), {FORWARD: Target(1.25, 1.1)}),),
            autocast=False,
        ),
        Row(
            f"output projection, {shape}",
            output_inputs,
            output,
            experts,
            output_truth,
            batched=("a", "gates"),
            flops={FORWARD: flops},
            rivals=(
                Rival(
                    gemm,
                    lambda p: products(torch.randn(B * T, wide, device=device, dtype=dtype), D),
                    {FORWARD: Target(1.75, 1.2)},
                ),
            ),
            autocast=False,
        ),
        Row(
            f"value and output projection, gates included, {shape}",
            both_inputs,
            both,
            lambda p: [gate.experts for gate in gates(p)],
            both_truth,
            batched=("x",),
            flops={BOTH: 6 * flops},
            rivals=(Rival("6 cuBLAS GEMMs", lambda p: products(p["x"], wide, D), {BOTH: Target(1.6, 1.25)}),),
            autocast=False,
        ),
    ]


def attention_row(H, P, B, T, device) -> Row:
    dtype = op_dtype(device)

    def inputs():
        return {name: randn(B, T, H, P, device=device, dtype=dtype) for name in ("q", "k", "v")}

    def ours(p):
        from .functional import attention

        return attention(p["q"], p["k"], p["v"])

    def truth(p, _):
        from . import reference

        return reference.attention(p["q"], p["k"], p["v"])

    def cudnn(p):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (p[name].detach().transpose(1, 2).contiguous().requires_grad_() for name in ("q", "k", "v"))

        def call():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return Task(call, [q, k, v])

    flops = attention_flops(B * T, T, H, P)
    return Row(
        f"attention, causal, H {H} P {P}, T {T}",
        inputs,
        ours,
        lambda p: None,
        truth,
        batched=("q", "k", "v"),
        flops={FORWARD: flops, BOTH: 3.5 * flops},
        rivals=(Rival("cuDNN SDPA", cudnn, {FORWARD: Target(1 / 0.85, 1.0), BACKWARD: Target(1 / 0.7, 1 / 0.85)}),),
        autocast=False,
    )


# The report

ROWS: dict[str, Callable[[str], list[Row]]] = {"layers": layers, "moe": moe, "switchall": switchall, "ops": ops}


def red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text


def show(result: Result) -> None:
    title = ", ".join(part for part in (result.row, result.work) if part)
    if result.failed:
        print(f"{title}\n    {red('not timed: failed its check')}: {result.problem}", flush=True)
        return
    error = f"error {result.error:.1e}"
    if result.problem:
        print(f"{title}\n    {result.rival}: {result.problem} | {error}", flush=True)
    elif result.ours_ms is None:
        print(f"{title}\n    agrees with the reference | {error}", flush=True)
    else:
        print(f"{title}\n    {' | '.join([*timing_parts(result), error])}", flush=True)


def timing_parts(r: Result) -> list[str]:
    ratio = f"ratio {r.ratio:.3f}" + (f": {r.target.verdict(r.ratio)}" if r.target else "")
    parts = [f"ours {r.ours_ms:.3f} ms", f"{r.rival} {r.rival_ms:.3f} ms", ratio]
    if r.milliseconds:
        parts.append(f"ours in ms: {r.milliseconds.verdict(r.ours_ms)}")
    parts.append(f"floor {r.floor_ms:.3f} ms, {100 * r.floor_ms / r.ours_ms:.0f} % of it reached")
    if r.ours_mib is not None:
        share = r.ours_mib / r.rival_mib if r.rival_mib else math.nan
        verdict = f", ratio {share:.2f}: {r.memory.verdict(share)}" if r.memory else ""
        parts.append(f"peak memory {r.ours_mib:.0f} and {r.rival_mib:.0f} MiB{verdict}")
    parts.append("CUDA graphs" if r.graph else "no CUDA graph on either side")
    return parts


def header(device: str, repeats: int) -> dict[str, Any]:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), **versions, "repeats": repeats}
    return {"device": "cpu, in Triton's interpreter", **versions, "repeats": 0}


def as_json(about: dict[str, Any], results: list[Result]) -> bytes:
    rows = [{**asdict(r), "ratio": None if math.isnan(r.ratio) else r.ratio} for r in results]
    return json.dumps({**about, "rows": rows}, indent=1, allow_nan=False).encode() + b"\n"


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="NAME[,NAME]", help=f"some of: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there too")
    parser.add_argument("--repeats", type=positive, default=20, help="samples behind each median (default 20)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a row failed its check; 2 when the arguments are wrong."""
    names = args.only.split(",") if args.only else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        print(f"triton_moe bench: no row is called {unknown[0]!r}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 2
    if args.json and (problem := write_problem(args.json)):
        print(f"triton_moe bench: cannot write the JSON file: {problem}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = header(device, args.repeats)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if device == "cuda":
        print("bfloat16, random inputs; ratio = our median time over the rival's, both measured in turns in this run;")
        print("floor = FLOPs at 717 TFLOP/s or bytes at 4.27 TB/s (an H200's), whichever takes longer;")
        print("error = the largest relative error of output and gradients against reference/ in float64")
    else:
        print("no GPU: tiny shapes in float32, to check results only; times in the interpreter mean nothing")
    torch.manual_seed(0)
    results = []
    for name in names:
        print(f"\n{name}")
        for row in ROWS[name](device):
            for result in measure(row, args.repeats, timed=device == "cuda"):
                show(result)
                results.append(result)
    if args.json:
        write_atomically(args.json, as_json(about, results))
        print(f"\nwrote {args.json}")
    return 1 if any(result.failed for result in results) else 0
