"""`python -m triton_moe bench`: our kernels beside their rivals, after checking their results.

Each row first compares our output and every gradient with `reference/` in float64, held to the bar of testing.assert_close. It
does so at the timed size: the cotangent is zero everywhere but on the last sequence, so all gradients are those of that sequence
alone, which the reference computes in no time. A row that fails is not timed. Then ours and one rival run alternately in the same
process, and medians are compared. Without a GPU only the checks run, on tiny shapes in Triton's interpreter.

Read top to bottom: what a row is, the check, the timing, the preparation in parallel, the rows by group (gating, projection, mlp,
attention, layers), the report, the command.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .demo import DenseAttention, DenseBlock, DenseMLP, positive, switchall_weights, write_atomically, write_problem

FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"  # the backward is the difference of the other two
# What one H200 reaches on large bfloat16 matrix products and copies: the two ceilings behind every "floor".
FLOPS_PER_SECOND, BYTES_PER_SECOND = 717e12, 4.27e12

Inputs = dict[str, Any]

# What a row is


@dataclass
class Task:
    """A differentiable computation to time: its output, and the tensors that its gradient goes to."""

    call: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around both directions


Mix = list[tuple[float, Task]]  # a rival's time may be put together from several, each with its share


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
    build: Callable[[Inputs], Task | Mix]  # ImportError where it is not installed
    targets: dict[str, Target] = field(default_factory=dict)  # by FORWARD, BOTH or BACKWARD
    memory: Target | None = None
    compiled: bool = False  # by torch.compile; then ours is too
    graph: bool = True  # False: it synchronises with the host, so nothing captures it
    compiles: bool = False  # other things than ours, when first run


@dataclass(frozen=True)
class Row:
    """One computation. Tensors in `inputs` that require gradients are its leaves; those in `batched` have the batch in front."""

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[[Inputs], torch.Tensor]  # [B, ...]
    reference: Callable[[Inputs, Any], torch.Tensor]  # [1, ...], following that choice
    batched: tuple[str, ...]
    flops: dict[str, float]  # useful ones, by what is timed: FORWARD, BOTH, and BACKWARD after the two
    rivals: tuple[Rival, ...]
    autocast: bool = False  # bfloat16 over float32 inputs
    experts: Callable[[Inputs], Any] = lambda inputs: None  # what ours chooses, given the inputs cut to their last sequence
    milliseconds: Target | None = None  # bounds on our forward's time itself
    best: dict[str, Target] = field(default_factory=dict)  # bounds over the fastest rival
    packed: int | None = None  # the batch is one row of packed sequences, the last of this length
    kernels: str = ""  # rows with the same name here share kernels, and so the process that compiles them


def leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def task(row: Row, inputs: Inputs, function: Callable[[Inputs], torch.Tensor] | None = None) -> Task:
    """Our side of a row."""
    function = function or row.ours
    return Task(lambda: function(inputs), list(leaves(inputs).values()))


# The check


def last(row: Row, t: torch.Tensor) -> torch.Tensor:
    """The last sequence of a batched tensor."""
    return t[-1:] if row.packed is None else t[:, -row.packed :]


def before_last(row: Row, t: torch.Tensor) -> torch.Tensor:
    return t[:-1] if row.packed is None else t[:, : -row.packed]


def check(row: Row, inputs: Inputs) -> float:
    """The largest relative error of our output and gradients; AssertionError when one is out of bounds."""
    from .testing import assert_close

    ours = leaves(inputs)
    cut = {name: last(row, t).detach() if name in row.batched else t for name, t in inputs.items()}
    device = ours[row.batched[0]].device.type
    dtype = torch.bfloat16 if row.autocast else ours[row.batched[0]].dtype
    with autocast(row, device):
        with torch.no_grad():
            experts = row.experts(cut)
        actual = row.ours(inputs)

    cotangent = torch.zeros_like(actual)
    last(row, cotangent).copy_(torch.randn_like(last(row, actual)))
    gradients = dict(zip(ours, torch.autograd.grad(actual, list(ours.values()), cotangent), strict=True))
    results = {"output": last(row, actual)}
    for name, gradient in gradients.items():
        if name in row.batched:
            if before_last(row, gradient).any():
                raise AssertionError(f"d{name}: sequences influence each other")
            gradient = last(row, gradient)
        results[f"d{name}"] = gradient

    def run_reference(lower: torch.dtype, gates: torch.dtype) -> dict[str, torch.Tensor]:
        # Gates are float32 inputs where the others are bfloat16; under autocast all inputs are cast down.
        dtypes = {name: lower if row.autocast or t.dtype == dtype else gates for name, t in ours.items()}
        again = {name: cut[name].detach().to(dtypes[name]).requires_grad_() for name in ours}
        output = row.reference({**cut, **again}, experts)
        parts = torch.autograd.grad(output, list(again.values()), last(row, cotangent).to(output.dtype))
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
            with torch.no_grad(), autocast(row, "cuda"), task.context():
                return task.call()

        return forward

    with torch.no_grad(), autocast(row, "cuda"), task.context():
        cotangent = torch.randn_like(task.call())

    def both():
        with task.context():
            with autocast(row, "cuda"):
                output = task.call()
            return torch.autograd.grad(output, task.leaves, cotangent)

    return both


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
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
        milliseconds(run, 1)
        times.append(max(1, math.ceil(2.0 / milliseconds(run, 3))))
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, n, seen in zip(runs, times, samples, strict=True):
            seen.append(milliseconds(run, n))
    return [statistics.median(seen) for seen in samples]


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB above what was there before and the results that remain (the output, or the gradients)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    results = [results] if isinstance(results, torch.Tensor) else results
    kept = sum(t.numel() * t.element_size() for t in results)
    return max(0.0, (torch.cuda.max_memory_allocated() - before - kept) / 2**20)


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
    flops: float | None = None
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


def sides(row: Row, inputs: Inputs, rival: Rival) -> tuple[Task, Mix]:
    """Ours and the rival's; ours compiled where the rival is."""
    theirs = rival.build(inputs)
    function = compiled(row.ours) if rival.compiled else row.ours
    return task(row, inputs, function), theirs if isinstance(theirs, list) else [(1.0, theirs)]


def compare(row: Row, inputs: Inputs, rival: Rival, error: float, repeats: int) -> list[Result]:
    """Time ours and one rival in every direction the row asks for."""
    try:
        ours, theirs = sides(row, inputs, rival)
    except ImportError as missing:
        return [Result(row.name, rival=rival.name, problem=f"not installed ({missing})", error=error)]
    with torch.no_grad(), autocast(row, "cuda"):
        output = ours.call()

    results = {}
    for work, flops in row.flops.items():
        if work == BACKWARD:
            results[work] = difference(results[FORWARD], results[BOTH], flops, rival.targets.get(work))
            continue
        runs = [runnable(row, t, work) for t in (ours, *(t for _, t in theirs))]
        result = Result(row.name, work, rival.name, error=error, flops=flops, target=rival.targets.get(work))
        result.floor_ms = floor_ms(row, ours, output, work)
        if work == FORWARD:
            result.milliseconds = row.milliseconds
        else:
            result.memory = rival.memory
        for run in runs:
            for _ in range(2):  # compiles
                run()
        result.ours_mib, *parts = (peak_memory(run) for run in runs)
        result.rival_mib = sum(share * part for (share, _), part in zip(theirs, parts, strict=True))
        if rival.graph:
            try:
                runs = [captured(run) for run in runs]
                result.graph = True
            except RuntimeError:  # the report says that no graph was used
                torch.cuda.synchronize()
        result.ours_ms, *parts = alternate(runs, repeats)
        result.rival_ms = sum(share * part for (share, _), part in zip(theirs, parts, strict=True))
        results[work] = result
    return list(results.values())


def difference(forward: Result, both: Result, flops: float, target: Target | None) -> Result:
    if not (both.ours_ms > forward.ours_ms and both.rival_ms > forward.rival_ms):
        return Result(both.row, BACKWARD, both.rival, error=both.error, problem="the backward drowns in the noise")
    return Result(
        both.row,
        BACKWARD,
        both.rival,
        error=both.error,
        ours_ms=both.ours_ms - forward.ours_ms,
        rival_ms=both.rival_ms - forward.rival_ms,
        floor_ms=both.floor_ms - forward.floor_ms,
        flops=flops,
        target=target,
        graph=both.graph,
    )


def seeded_inputs(row: Row) -> Inputs:
    """The same in every process and whatever ran before."""
    torch.manual_seed(zlib.crc32(row.name.encode()))
    return row.inputs()


def shortened(problem: Exception) -> str:
    """On one line; compilers put the place first and the reason last."""
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    return text if len(text) < 240 else f"{text[:80]} ... {text[-150:]}"


def failure(row: Row, problem: Exception) -> Result:
    return Result(row.name, problem=f"{type(problem).__name__}: {problem}", failed=True)


def measure(row: Row, repeats: int, timed: bool, checked: Result | None = None) -> list[Result]:
    """Check one row unless that was done, then compare it with each rival."""
    if checked is not None and checked.failed:
        return [checked]
    try:
        inputs = seeded_inputs(row)
        error = check(row, inputs) if checked is None else checked.error
    except Exception as problem:  # whatever it was: what cannot be checked is not timed
        return [failure(row, problem)]
    if not timed:
        return [Result(row.name, error=error)]
    results = []
    for rival in row.rivals:
        try:
            results += compare(row, inputs, rival, error, repeats)
        except Exception as problem:  # out of memory, or a rival that does not run here
            results.append(Result(row.name, rival=rival.name, problem=shortened(problem), error=error))
        release()
    for work, target in row.best.items():
        against = [result for result in results if result.work == work and result.rival_ms]
        if against:
            fastest = min(against, key=lambda result: result.rival_ms)
            fastest.target, fastest.rival = target, f"{fastest.rival} (the fastest)"
    return results


# Preparation: the checks, and all compiling, in several processes at once


@contextlib.contextmanager
def quick_autotuning(threads: int):
    """Triton's autotuner, which some rivals use, compiles dozens of candidates one after the other and times each for 125 ms,
    for every new shape. Here they compile side by side and are timed for 20 ms each."""
    import triton
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def compile_together(self, kwargs):
        configs = prune(self, kwargs)
        options = {name: value for name, value in kwargs.items() if name != "warmup"}
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **options, **config.all_kwargs())
        self._do_bench = functools.partial(triton.testing.do_bench, warmup=5, rep=20)
        return configs

    Autotuner.prune_configs = compile_together
    try:
        yield
    finally:
        Autotuner.prune_configs = prune


def prepare_rows(group: str, device: str, full: bool, indices: list[int], rival: str | None) -> list[Result | None]:
    """In a process of its own: check rows, or run a rival of theirs once. The caches on disk then hold what was compiled."""
    rows = GROUPS[group](device, full)
    with quick_autotuning(threads=6):
        return [check_row(rows[i]) if rival is None else run_once(rows[i], rival) for i in indices]


def check_row(row: Row) -> Result | None:
    """None where the row could not be checked for any reason but a wrong result: another process may have had the memory."""
    try:
        return Result(row.name, error=check(row, seeded_inputs(row)))
    except AssertionError as wrong:
        return failure(row, wrong)
    except Exception:
        return None
    finally:
        release()


def run_once(row: Row, name: str) -> None:
    for rival in row.rivals:
        if rival.name == name:
            with contextlib.suppress(Exception):  # it will be reported when it fails again
                ours, theirs = sides(row, seeded_inputs(row), rival)
                for t in ([ours] if rival.compiled else []) + [t for _, t in theirs]:
                    for work in row.flops:
                        if work != BACKWARD:
                            runnable(row, t, work)()
            release()


def release() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def prepare(rows: dict[tuple[str, int], Row], device: str, full: bool, processes: int) -> dict[tuple[str, int], Result]:
    """What `check_row` returned for each row, after the same processes have compiled what the rivals need."""
    jobs: dict[tuple[str, str, str | None], list[int]] = {}  # one process for what shares kernels
    for (group, i), row in rows.items():
        for rival in (None, *(rival.name for rival in row.rivals if rival.compiled or rival.compiles)):
            jobs.setdefault((group, row.kernels or row.name, rival), []).append(i)
    order = sorted(jobs, key=lambda job: (job[2] not in AUTOTUNED, job[2] is not None))  # the longest first
    checked: dict[tuple[str, int], Result] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [(job, pool.submit(prepare_rows, job[0], device, full, jobs[job], job[2])) for job in order]
        for job, future in running:
            with contextlib.suppress(BrokenProcessPool):  # what the others could not do is done before the row is timed
                checked.update({(job[0], i): found for i, found in zip(jobs[job], future.result(), strict=True) if found})
    return checked


# What the rows share


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

    @property
    def N(self) -> int:
        return self.B * self.T


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


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def module_task(module: torch.nn.Module, inputs: Inputs, *, compiling: bool = False, take=lambda result: result) -> Task:
    x = inputs["x"]
    module = module.to(x.device)
    function = compiled(module) if compiling else module
    return Task(lambda: take(function(x)), [x, *module.parameters()])


# Gating: the gates and the routing plan


def gating_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        return [gating_row(Shape(2, 3, 2, 20, 48, 2, 24), device)]
    shapes = SHAPES if full else SHAPES[:1]
    return [gating_row(shape, device) for shape in shapes] + [gating_row(SHAPES[0], device, calls=2)]


# The published and the users' shapes of one layer.
SHAPES = [Shape(4, 4, 2, 128), Shape(2, 8, 4, 132), Shape(2, 5, 3, 76, D=412), Shape(4, 10, 2, 128)]


def gating_row(s: Shape, device: str, calls: int = 1) -> Row:
    """Both gates of a layer with their routing plans: one selection matrix of 2 H heads, or one call for each side."""
    dtype = op_dtype(device)

    def inputs():
        sel = randn(2 * s.H * s.E, s.D, std=s.D**-0.5, device=device, dtype=dtype)
        return {"x": randn(s.B, s.T, s.D, device=device, dtype=dtype), "sel": sel}

    def route(p):
        from .functional import gating

        heads = 2 * s.H // calls
        return [gating(p["x"], sel, n_heads=heads, top_k=s.TOP_K) for sel in p["sel"].chunk(calls)]

    def ours(p):
        return join([routing.weights for routing in route(p)]).view(s.B, s.T, 2 * s.H, s.TOP_K)

    def join(parts):  # for the report to have one output
        return parts[0] if calls == 1 else torch.cat(parts, dim=1)

    def truth(p, experts):
        from . import reference

        return reference.gating(p["x"], p["sel"], n_heads=2 * s.H, top_k=s.TOP_K, experts=experts).weights[None]

    logits = 2.0 * s.N * s.D * 2 * s.H * s.E
    return Row(
        f"gating and plan, both sides{', two calls' if calls == 2 else ''}, {s}",
        inputs,
        ours,
        truth,
        batched=("x",),
        flops={FORWARD: logits, BOTH: 3 * logits},
        rivals=(Rival("cuBLAS GEMM of the logits alone", lambda p: products(p["x"], 2 * s.H * s.E)),),
        experts=lambda p: join([routing.experts for routing in route(p)]),
        milliseconds=Target(0.040, 0.028) if s == SHAPES[0] and calls == 1 else None,
    )


# Projections: the value side, the output side, and both with their gates


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


def projection_flops(N: int, D: int, H: int, TOP_K: int, P: int) -> float:
    """One side: the chosen values or the chosen outputs."""
    return 2.0 * N * D * H * P * TOP_K


def one_side_row(s: Shape, device: str, skew: float, target: Target | None, peers: Sequence[str], *, side: str) -> Row:
    """side: "value", x [B, T, D] to heads, or "output", a [B, T, H, P] to the model's width."""
    dtype, wide, E = op_dtype(device), s.H * s.TOP_K * s.P, s.H * s.E
    name, one_token, matrix = ("x", [s.D], [s.D, s.P]) if side == "value" else ("a", [s.H, s.P], [s.P, s.D])
    widths, known = ((s.D, wide), VALUE_PEERS) if side == "value" else ((wide, s.D), OUTPUT_PEERS)

    def inputs():
        from .functional import gating

        tokens = randn(s.B, s.T, *one_token, device=device, dtype=dtype)
        w = randn(E, *matrix, std=matrix[0] ** -0.5, device=device, dtype=dtype)
        logits = torch.randn(s.N, E, device=device) + skew * torch.randn(E, device=device)
        routing = gating(logits, torch.eye(E, device=device), n_heads=s.H, top_k=s.TOP_K)
        gates = routing.weights.detach().view(s.B, s.T, s.H, s.TOP_K).requires_grad_()
        return {name: tokens, "w": w, "gates": gates, "routing": routing}

    def ours(p):
        from . import functional

        project = getattr(functional, f"{side}_projection")
        return project(p[name], p["w"], p["routing"]._replace(weights=p["gates"].flatten(0, 1)))

    def truth(p, experts):
        from . import reference

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
        experts=lambda p: p["routing"].experts[-s.T :],
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
        from .functional import gating

        return [gating(p["x"], p[sel], n_heads=s.H, top_k=s.TOP_K) for sel in ("sel_v", "sel_o")]

    def ours(p):
        from .functional import output_projection, value_projection

        value_gate, output_gate = gates(p)
        return output_projection(value_projection(p["x"], p["v"], value_gate), p["o"], output_gate)

    def truth(p, experts):
        from . import reference

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


# The peers of the projections, each with the routing and the layout of weights that it likes best. Ids of experts are flat here:
# h E + e, [N, H, TOP_K]. Where the gates are not part of the row everything that depends on the choice alone is made beforehand.


def flat_experts(experts: torch.Tensor, E: int) -> torch.Tensor:
    return experts.long() + E * torch.arange(experts.shape[1], device=experts.device)[:, None]


def choose(x: torch.Tensor, sel: torch.Tensor, s: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [N, H, TOP_K] and experts, as one writes it in torch."""
    weights, experts = (x @ sel.t()).float().sigmoid().view(-1, s.H, s.E).topk(s.TOP_K, dim=-1)
    return weights, experts


def given(s: Shape, p: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, D] or a [N, H, P], the weights, gates [N, H, TOP_K] and flat experts of a row without gradients."""
    tokens = (p["x"] if "x" in p else p["a"]).detach().flatten(0, 1)
    return tokens, p["w"].detach(), p["gates"].detach().flatten(0, 1), flat_experts(p["routing"].experts, s.E)


def leaves_of(p: Inputs, turned: bool = False) -> list[torch.Tensor]:
    """x [N, D], v [H*E, D, P], o [H*E, P, D] (both [.., out, in] if turned), sel_v, sel_o as leaves of their own."""
    x, v, o, sel_v, sel_o = (p[name].detach() for name in ("x", "v", "o", "sel_v", "sel_o"))
    if turned:
        v, o = v.transpose(1, 2).contiguous(), o.transpose(1, 2).contiguous()
    return [t.clone().requires_grad_() for t in (x.flatten(0, 1), v, o, sel_v, sel_o)]


# Every expert by cuBLAS, then the gates.


def gates_of_all(weights: torch.Tensor, experts: torch.Tensor, E: int) -> torch.Tensor:
    """[N, H, E], 0 for an expert that was not chosen."""
    return weights.new_zeros(*weights.shape[:2], E).scatter(2, experts.long(), weights)


def weigh(u: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return (u.view(*gates.shape, -1) * gates[..., None]).sum(2).to(u.dtype)


def spread(a: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return (a[:, :, None] * gates[..., None]).to(a.dtype).flatten(1)


def value_by_all(s: Shape, p: Inputs) -> Task:
    x, w, weights, _ = given(s, p)
    w, gates = w.transpose(0, 1).reshape(s.D, -1), gates_of_all(weights, p["routing"].experts, s.E)
    combine = compiled(weigh)
    return Task(lambda: combine(x @ w, gates), [])


def output_by_all(s: Shape, p: Inputs) -> Task:
    a, w, weights, _ = given(s, p)
    w, gates = w.reshape(-1, s.D), gates_of_all(weights, p["routing"].experts, s.E)
    expand = compiled(spread)
    return Task(lambda: expand(a, gates) @ w, [])


def both_by_all(s: Shape, p: Inputs) -> Task:
    x, v, o, sel_v, sel_o = leaves_of(p)
    v = v.detach().transpose(0, 1).reshape(s.D, -1).requires_grad_()
    o = o.detach().reshape(-1, s.D).requires_grad_()

    def forward(x, v, o, sel_v, sel_o):
        value, output = (gates_of_all(*choose(x, sel, s), s.E) for sel in (sel_v, sel_o))
        return spread(weigh(x @ v, value), output) @ o

    function = compiled(forward)
    return Task(lambda: function(x, v, o, sel_v, sel_o), [x, v, o, sel_v, sel_o])


# torch's grouped GEMM, with a gather before and a reduction after it.


class Permute(torch.autograd.Function):
    """rows[order], whose gradient is a gather too."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows[order]

    @staticmethod
    def backward(ctx, d):
        order, inverse = ctx.saved_tensors
        return d[inverse], None, None


def sort_routes(experts: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order of the routes by expert, its inverse, and where each expert's rows end."""
    ids, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ids, torch.arange(groups, device=ids.device), right=True)
    return order, inverse, ends.to(torch.int32)


def grouped_value(x, w, weights, order, inverse, ends):
    """w [H*E, P, D]"""
    N, H, TOP_K = weights.shape
    rows = x[:, None].expand(N, H * TOP_K, x.shape[1]).reshape(-1, x.shape[1])
    u = torch.nn.functional.grouped_mm(Permute.apply(rows, order, inverse), w.transpose(1, 2), offs=ends)
    return weigh(Permute.apply(u, inverse, order), weights)


def grouped_output(a, w, weights, order, inverse, ends):
    """w [H*E, D, P]"""
    rows = spread(a, weights).view(-1, a.shape[2])
    u = torch.nn.functional.grouped_mm(Permute.apply(rows, order, inverse), w.transpose(1, 2), offs=ends)
    return Permute.apply(u, inverse, order).view(len(a), -1, w.shape[1]).sum(1)


def one_side_grouped(function: Callable, s: Shape, p: Inputs) -> Task:
    tokens, w, weights, experts = given(s, p)
    w, routes, function = w.transpose(1, 2).contiguous(), sort_routes(experts, s.H * s.E), compiled(function)
    return Task(lambda: function(tokens, w, weights, *routes), [])


def both_grouped(s: Shape, p: Inputs) -> Task:
    parameters = leaves_of(p, turned=True)

    def forward(x, v, o, sel_v, sel_o):
        (value, chosen_v), (output, chosen_o) = choose(x, sel_v, s), choose(x, sel_o, s)
        a = grouped_value(x, v, value, *sort_routes(flat_experts(chosen_v, s.E), s.H * s.E))
        return grouped_output(a, o, output, *sort_routes(flat_experts(chosen_o, s.E), s.H * s.E))

    function = compiled(forward)
    return Task(lambda: function(*parameters), parameters)


# The authors' own kernel, cvmm of github.com/RobertCsordas/switchhead.


def cvmm_value(package, x, w, weights, experts):
    return package.cvmm(x, package.cvmm_prepare_sel2(experts.flatten(1).int(), weights), w)


def cvmm_output(package, a, w, weights, experts):
    selection = package.cvmm_prepare_sel2(experts.flatten(1).int(), weights)
    selection.sel_index = selection.out_index // weights.shape[2]
    selection.reduction_weight = weights.flatten(1)
    return package.cvmm(a, selection, w)


def one_side_cvmm(function: Callable, s: Shape, p: Inputs) -> Task:
    package, arguments = importlib.import_module("switchhead.cvmm"), given(s, p)

    def call():
        with torch.autocast("cuda", torch.bfloat16):  # without it cvmm computes in float32
            return function(package, *arguments)

    return Task(call, [])


def both_cvmm(s: Shape, p: Inputs) -> Task:
    package = importlib.import_module("switchhead.cvmm")
    x, v, o, sel_v, sel_o = parameters = leaves_of(p)

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            (value, chosen_v), (output, chosen_o) = choose(x, sel_v, s), choose(x, sel_o, s)
            a = cvmm_value(package, x, v, value, flat_experts(chosen_v, s.E))
            return cvmm_output(package, a, o, output, flat_experts(chosen_o, s.E))

    return Task(call, parameters)


# github.com/shawntan/scattermoe: weights [.., out, in].


def scatter_value(package, x, w, weights, routes):
    gates = weights.flatten(0, 1).to(x.dtype)  # a row for each head
    v = package.parallel_linear(x, w.transpose(1, 2), weights.shape[1] * weights.shape[2], *routes, gates=gates)
    return v.view(*weights.shape[:2], -1)


def scatter_output(package, a, w, weights, routes):
    gates = weights.flatten(1).to(a.dtype)
    return package.parallel_linear(a.flatten(0, 1), w.transpose(1, 2), weights.shape[2], *routes, gates=gates)


def one_side_scattermoe(function: Callable, s: Shape, p: Inputs) -> Task:
    package = importlib.import_module("scattermoe.parallel_experts")
    tokens, w, weights, experts = given(s, p)
    w, routes = w.transpose(1, 2).contiguous(), package.flatten_sort_count(experts, s.H * s.E)
    return Task(lambda: function(package, tokens, w, weights, routes), [])


def both_scattermoe(s: Shape, p: Inputs) -> Task:
    package = importlib.import_module("scattermoe.parallel_experts")
    x, v, o, sel_v, sel_o = parameters = leaves_of(p, turned=True)

    def call():
        (value, chosen_v), (output, chosen_o) = choose(x, sel_v, s), choose(x, sel_o, s)
        routes_v, routes_o = (package.flatten_sort_count(flat_experts(chosen, s.E), s.H * s.E) for chosen in (chosen_v, chosen_o))
        return scatter_output(package, scatter_value(package, x, v, value, routes_v), o, output, routes_o)

    return Task(call, parameters)


ALL, GROUPED, CVMM, SCATTER = "cuBLAS over all experts, then the gates", "torch grouped_mm", "public cvmm", "ScatterMoE"
PEERS = (ALL, GROUPED, CVMM, SCATTER)
PUBLIC_HEAD, PUBLIC_MOE = "public SwitchHead", "public sigma-MoE (moe_layer)"
SYNCHRONISING, AUTOTUNED = (CVMM, SCATTER), (CVMM, PUBLIC_HEAD, PUBLIC_MOE)
VALUE_PEERS = {
    ALL: value_by_all,
    GROUPED: functools.partial(one_side_grouped, grouped_value),
    CVMM: functools.partial(one_side_cvmm, cvmm_value),
    SCATTER: functools.partial(one_side_scattermoe, scatter_value),
}
OUTPUT_PEERS = {
    ALL: output_by_all,
    GROUPED: functools.partial(one_side_grouped, grouped_output),
    CVMM: functools.partial(one_side_cvmm, cvmm_output),
    SCATTER: functools.partial(one_side_scattermoe, scatter_output),
}
BOTH_PEERS = {ALL: both_by_all, GROUPED: both_grouped, CVMM: both_cvmm, SCATTER: both_scattermoe}


# The MLP: sigma-MoE against a dense MLP of the same parameters


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


def moe_inputs(D: int, E: int, G: int, device: str, width: int | None = None) -> Inputs:
    """width: of the keys, where it is not G."""
    return {
        "moe.keys": randn(E, D, width or G, std=D**-0.5, device=device),
        "moe.values": randn(E, G, D, std=(E * G) ** -0.5, device=device),
        "moe.expert_sel": randn(E, D, std=D**-0.5, device=device),
    }


def moe_weights(p: Inputs):
    from .functional import SigmaMoEWeights

    return SigmaMoEWeights(*(p[f"moe.{name}"] for name in ("keys", "values", "expert_sel")))


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
        from .functional import sigma_moe

        return sigma_moe(p["x"], moe_weights(p), top_k=TOP_K, activation=activation)[0]

    def experts(p):
        from .functional import gating

        return gating(p["x"], p["moe.expert_sel"], top_k=TOP_K).experts

    def truth(p, experts):
        from . import reference

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


# Attention


def attention_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        rows = [attention_row(2, 20, 24, device, B=2)]
        if full:
            rows += [attention_row(2, 20, 24, device, B=2, window=7), packed_row(2, 20, [5, 24], device)]
            rows.append(xl_row(2, 20, 48, 24, device, B=2))
        return rows
    rows = [attention_row(H, P, 4096, device) for H, P in ((4, 64), (16, 64), (4, 128))]
    rows += [attention_row(4, P, T, device) for P in (76, 100, 132) for T in (1024, 4096)]
    if full:
        rows += [
            attention_row(H, P, T, device)
            for H, P in ((16, 64), (4, 128), (4, 100))
            for T in (512, 1024, 16384)
            if P != 100 or T != 1024
        ]
        rows += [attention_row(4, P, T, device) for P in (41, 82, 96, 112, 256) for T in (1024, 4096)]
        rows += [attention_row(4, P, 4096, device, window=512) for P in (64, 128, 100)]
        rows += [packed_row(4, P, PACKED, device) for P in (64, 128)]
        rows += [xl_row(H, P, D, 1024, device) for H, P, D in ((8, 64, 512), (4, 112, 1024))]
    return rows


PACKED = [1024, 4608, 1536, 5120, 8192, 5632, 4608, 2048]  # lengths of sequences packed into one row, 32768 in all


def causal_pairs(T: int, window: int | None = None) -> float:
    """How many (query, key) pairs one sequence computes, on average over the diagonal."""
    w = T if window is None else min(window, T)
    return T * w - w * w / 2


def attention_flops(N: int, T: int, H: int, P: int, window: int | None = None) -> float:
    return 4.0 * N / T * causal_pairs(T, window) * H * P  # two products


def stored(B: int, T: int, H: int, P: int, device: str) -> torch.Tensor:
    """[B, T, H, P] as a layer stores it: rows start at multiples of 16 bytes."""
    pitch = -(-P // 8) * 8
    return torch.randn(B, T, H, pitch, device=device).to(op_dtype(device))[..., :P].requires_grad_()


def attention_case(
    name: str,
    shape: tuple[int, int, int, int],
    device: str,
    flops: float,
    rivals: Sequence[Rival],
    *,
    options: Callable = lambda package, p: {},
    reference_options: Callable | None = None,
    extra: Callable[[], Inputs] = dict,
    **more,
) -> Row:
    """shape: B, T, H, P; options: the keywords of `attention` in this package (functional or reference) for these inputs."""

    def ours(p):
        from . import functional

        return functional.attention(p["q"], p["k"], p["v"], **options(functional, p))

    def truth(p, _):
        from . import reference

        return reference.attention(p["q"], p["k"], p["v"], **(reference_options or options)(reference, p))

    return Row(
        f"attention, causal, {name}H {shape[2]} P {shape[3]}, T {shape[1]}",
        lambda: {**{leaf: stored(*shape, device) for leaf in ("q", "k", "v")}, **extra()},
        ours,
        truth,
        batched=("q", "k", "v"),
        flops={FORWARD: flops, BOTH: 3.5 * flops, BACKWARD: 2.5 * flops},
        rivals=tuple(rivals),
        kernels=f"{name}P {shape[3]}",
        **more,
    )


def attention_row(H: int, P: int, T: int, device: str, *, B: int | None = None, window: int | None = None) -> Row:
    B = B or 32768 // T
    cudnn, flash, flex = sdpa(CUDNN), sdpa(FLASH), flex_attention(T, window)
    flops = attention_flops(B * T, T, H, P, window)
    if window:
        rivals = [Rival(f"{FLEX}, padded" if P % 8 else FLEX, flex, compiles=True)]
        return attention_case(
            f"window {window}, ", (B, T, H, P), device, flops, rivals, options=lambda package, p: {"window": window}
        )
    if P % 8:
        rivals = [
            Rival(f"{CUDNN}, padded", cudnn),
            Rival(f"{FLASH}, padded", flash),
            Rival(f"{FLEX}, padded", flex, compiles=True),
        ]
        best = dict.fromkeys((FORWARD, BACKWARD), Target(1.0, 1 / 1.3))
        return attention_case("", (B, T, H, P), device, flops, rivals, best=best)
    bounds = {FORWARD: Target(1 / 0.85, 1.0), BACKWARD: Target(1 / 0.7, 1 / 0.85)}
    rivals = [Rival(CUDNN, cudnn, bounds if P in (64, 128) and T == 4096 else {})]
    if T == 4096:
        rivals.append(Rival(f"{CUDNN}, deterministic", sdpa(CUDNN, deterministic_algorithms)))
    if P > 128:
        rivals += [Rival(FLASH, flash), Rival(FLEX, flex, compiles=True)]
    return attention_case("", (B, T, H, P), device, flops, rivals)


def packed_row(H: int, P: int, lengths: list[int], device: str) -> Row:
    """Sequences packed into one row of the batch."""
    N, ends = sum(lengths), torch.tensor(lengths).cumsum(0).tolist()
    return attention_case(
        f"{len(lengths)} sequences packed, ",
        (1, N, H, P),
        device,
        sum(attention_flops(n, n, H, P) for n in lengths),
        [Rival(FLEX, flex_attention(N, ends=ends), compiles=True)],
        options=lambda package, p: {"cu_seqlens": p["cu_seqlens"]},
        reference_options=lambda package, p: {},  # it is given the last sequence alone
        extra=lambda: {"cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32, device=device)},
        packed=lengths[-1],
    )


def xl_row(H: int, P: int, D: int, T: int, device: str, *, B: int = 32) -> Row:
    """Transformer-XL positions, against none."""
    without = attention_row(H, P, T, device, B=B)
    plain = Rival(
        "our plain attention", lambda p: Task(lambda: without.ours(p), [p["q"], p["k"], p["v"]]), {FORWARD: Target(3.0, 2.0)}
    )
    return attention_case(
        f"Transformer-XL of width {D}, ",
        (B, T, H, P),
        device,
        attention_flops(B * T, T, H, P),
        [plain],
        options=lambda package, p: {"position": package.XL(p["weight"])},
        extra=lambda: {"weight": randn(H * P, D, std=D**-0.5, device=device, dtype=op_dtype(device))},
    )


CUDNN, FLASH, FLEX = "cuDNN", "FlashAttention-2", "FlexAttention"


class Widen(torch.autograd.Function):
    """x copied to the front channels of `wide`, whose others are 0: one pass over memory, and none for the gradient."""

    @staticmethod
    def forward(ctx, x, wide):
        ctx.width = x.shape[-1]
        ctx.mark_dirty(wide)
        wide[..., : ctx.width].copy_(x)
        return wide

    @staticmethod
    def backward(ctx, d):
        return d[..., : ctx.width], None


def rival_attention(p: Inputs, attend: Callable, context=contextlib.nullcontext) -> Task:
    """attend(q, k, v, scale) on [B, H, T, P], the width padded to a multiple of 8 where it is none; the padding is timed."""
    q, k, v = inputs = [p[name].detach().transpose(1, 2).contiguous().requires_grad_() for name in ("q", "k", "v")]
    P = q.shape[-1]
    if P % 8 == 0:
        return Task(lambda: attend(q, k, v, P**-0.5), inputs, context)
    wide = [torch.zeros(*t.shape[:-1], P + -P % 8, device=t.device, dtype=t.dtype) for t in inputs]

    def padded():
        q, k, v = (Widen.apply(t, buffer.detach()) for t, buffer in zip(inputs, wide, strict=True))
        return attend(q, k, v, P**-0.5)[..., :P]

    return Task(padded, inputs, context)


def sdpa(name: str, also: Callable = contextlib.nullcontext) -> Callable[[Inputs], Task]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}[name]

    def attend(q, k, v, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    @contextlib.contextmanager
    def context():
        with sdpa_kernel(backend), also():
            yield

    return lambda p: rival_attention(p, attend, context)


@contextlib.contextmanager
def deterministic_algorithms():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def flex_attention(T: int, window: int | None = None, ends: list[int] | None = None) -> Callable[[Inputs], Task]:
    """ends: where packed sequences end."""

    def build(p):
        from torch.nn.attention import flex_attention as flex

        device = p["q"].device
        sequence = None if ends is None else torch.searchsorted(
            torch.tensor(ends, device=device), torch.arange(T, device=device), right=True
        )  # fmt: skip

        def sees(b, h, i, j):
            seen = i >= j
            if window is not None:
                seen = seen & (i - j < window)
            if sequence is not None:
                seen = seen & (sequence[i] == sequence[j])
            return seen

        mask = flex.create_block_mask(sees, None, None, T, T, device=device)

        function = compiled(flex.flex_attention)  # uncompiled it writes all scores
        return rival_attention(p, lambda q, k, v, scale: function(q, k, v, block_mask=mask, scale=scale))

    return build


# Layers: SwitchHead against dense attention, SwitchAll against a dense block


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
    from .functional import SwitchHeadWeights

    names = ("q.weight", "k.weight", "v", "o", "sel_v", "sel_o")
    return SwitchHeadWeights(*(p[f"attention.{name}"] for name in names))


def layer_projection_flops(N: int, D: int, H: int, TOP_K: int, P: int) -> float:
    """Queries, keys, chosen values and chosen outputs."""
    return 2.0 * N * D * H * P * (2 + 2 * TOP_K)


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
        return module_task(DenseAttention(D, D // 64), p, compiling=True)

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
        return module_task(DenseBlock(D, D // 64, MOE_E * G), p, compiling=True, take=lambda result: result[0])

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


GROUPS: dict[str, Callable[[str, bool], list[Row]]] = {
    "gating": gating_rows,
    "projection": projection_rows,
    "mlp": mlp_rows,
    "attention": attention_rows,
    "layers": layer_rows,
}

# The report


def red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text


def show(row: str, results: list[Result]) -> None:
    """The row's name, then a line for each of its results."""
    print(row)
    for result in results:
        print(f"    {line(result)}", flush=True)


def line(result: Result) -> str:
    if result.failed:
        return f"{red('not timed: failed its check')}: {result.problem}"
    error = f"error {result.error:.1e}"
    if result.problem:
        return f"{result.rival}: {result.problem} | {error}"
    if result.ours_ms is None:
        return f"agrees with the reference | {error}"
    return " | ".join([*timing_parts(result), error])


def timing_parts(r: Result) -> list[str]:
    ratio = f"ratio {r.ratio:.3f}" + (f": {r.target.verdict(r.ratio)}" if r.target else "")
    rate = f"{r.flops / r.ours_ms / 1e9:.0f} TFLOP/s"
    parts = [f"{r.work}: ours {r.ours_ms:.3f} ms, {rate}", f"{r.rival} {r.rival_ms:.3f} ms", ratio]
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

RIVALS = """Rivals that are no part of torch are used where Python can import them, and named as missing where it cannot:

  for name in RobertCsordas/switchhead RobertCsordas/moe_layer shawntan/scattermoe; do
    git clone https://github.com/$name .rivals/${name#*/}
  done
  PYTHONPATH=.rivals/switchhead:.rivals/moe_layer/triton_src:.rivals/scattermoe python -m triton_moe bench
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = RIVALS
    parser.add_argument("--only", metavar="GROUP[,GROUP]", help=f"some of: {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--full", action="store_true", help="more shapes, lengths, widths and masks, and every rival for each")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there too")
    parser.add_argument("--repeats", type=positive, default=20, help="samples behind each median (default 20)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a row failed its check; 2 when the arguments are wrong."""
    names = args.only.split(",") if args.only else list(GROUPS)
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        print(f"triton_moe bench: there is no group {unknown[0]!r}; the groups are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    if args.json and (problem := write_problem(args.json)):
        print(f"triton_moe bench: cannot write the JSON file: {problem}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = header(device, args.repeats)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = {(name, i): row for name in names for i, row in enumerate(GROUPS[name](device, args.full))}
    checked: dict[tuple[str, int], Result] = {}
    if device == "cuda":
        print("bfloat16, random inputs; ratio = our median time over the rival's, both measured in turns in this run;")
        print("TFLOP/s = useful work alone; floor = FLOPs at 717 TFLOP/s or bytes at 4.27 TB/s (an H200's), whichever takes")
        print("longer; error = the largest relative error of output and gradients against reference/ in float64;")
        print("peak memory = above the inputs and results, ours and the rival's")
        print(f"checking and compiling {len(rows)} rows ...", end=" ", flush=True)
        memory = torch.cuda.get_device_properties(0).total_memory
        processes = min((os.cpu_count() or 1) - 2, memory // (10 << 30))
        if processes > 1:
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each process would start as many as there are cores
            checked = prepare(rows, device, args.full, processes)
        print(f"{time.perf_counter() - start:.0f} s")
    else:
        print("no GPU: tiny shapes in float32, to check results only; times in the interpreter mean nothing")
    results, group = [], None
    with quick_autotuning(threads=os.cpu_count() or 1):
        for key, row in rows.items():
            if key[0] != group:
                group = key[0]
                print(f"\n{group}")
            found = measure(row, args.repeats, device == "cuda", checked.get(key))
            show(row.name, found)
            results += found
            if args.json:  # at every row, for whoever interrupts it
                write_atomically(args.json, as_json(about, results))
    if device == "cuda":
        print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        print(f"wrote {args.json}")
    return 1 if any(result.failed for result in results) else 0
