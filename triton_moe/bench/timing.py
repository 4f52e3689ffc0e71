"""A row beside its rivals: both run in turns, and medians are compared."""

import gc
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .correctness import autocast, check
from .row import BACKWARD, BOTH, FORWARD, HOST, TRAINING, Inputs, Mix, Rival, Row, Target, Task, compiled, task

# What one H200 reaches on large bfloat16 matrix products and copies: the two ceilings behind every "floor".
FLOPS_PER_SECOND, BYTES_PER_SECOND = 717e12, 4.27e12
# Milliseconds of a sample, at the least. Without a graph the first pass of one waits for the host, which training, pass after
# pass, does not; that wait has rows of its own.
GRAPHS, EAGER = 2.0, 20.0


def runnable(row: Row, task: Task, work: str) -> Callable[[], Any]:
    if work == TRAINING:
        return task.call
    if work == HOST:

        def start():
            with autocast(row, "cuda"):
                return task.call()

        return start
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


def alternate(runs: list[Callable[[], Any]], repeats: int, least: float) -> list[float]:
    """Median milliseconds of each, measured in turns; a sample lasts `least` milliseconds or more."""
    times = []
    for run in runs:
        milliseconds(run, 1)
        times.append(1)
        while (took := milliseconds(run, times[-1])) * times[-1] < least:
            times[-1] = math.ceil(least / took)
    samples: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, n, seen in zip(runs, times, samples, strict=True):
            seen.append(milliseconds(run, n))
    return [statistics.median(seen) for seen in samples]


def host_milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """The median wall time of a call that does not wait for its kernels, and finds no others before it."""
    samples = []
    for _ in range(5 * repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return 1e3 * statistics.median(samples)


def peak_memory(run: Callable[[], Any]) -> float:
    """MiB above what was there before and the results that remain (the output, or the gradients)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    results = [results] if isinstance(results, torch.Tensor) else results
    return max(0.0, (torch.cuda.max_memory_allocated() - before) / 2**20 - mebibytes(results))


def mebibytes(tensors: Iterable[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


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
    tokens: int = 0
    group: str = ""

    @property
    def ratio(self) -> float:
        return self.ours_ms / self.rival_ms if self.ours_ms and self.rival_ms else math.nan


def floor_ms(row: Row, task: Task, work: str) -> float:
    """Each input read and each output written once; with the backward, their gradients too. Of a model, its FLOPs alone."""
    if work in (HOST, TRAINING):
        return row.flops[work] / FLOPS_PER_SECOND * 1e3
    with torch.no_grad(), autocast(row, "cuda"):
        output = task.call()
    moved = sum(t.numel() * t.element_size() for t in [*task.leaves, output]) * (1 if work == FORWARD else 2)
    return max(row.flops[work] / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND) * 1e3


def sides(row: Row, inputs: Inputs, rival: Rival) -> tuple[Task, Mix]:
    """Ours and the rival's; ours compiled where the rival is."""
    theirs = rival.build(inputs)
    function = compiled(row.ours) if rival.compiled else row.ours
    ours = row.step(inputs) if row.step else task(row, inputs, function)
    return ours, theirs if isinstance(theirs, list) else [(1.0, theirs)]


def compare(row: Row, inputs: Inputs, rival: Rival, error: float, repeats: int) -> list[Result]:
    """Time ours and one rival in every direction the row asks for."""
    try:
        ours, theirs = sides(row, inputs, rival)
    except ImportError as missing:
        return [Result(row.name, rival=rival.name, problem=f"not installed ({missing})", error=error)]
    tasks = [ours, *(t for _, t in theirs)]

    def total(parts):  # of the rival, from those of its parts
        return sum(share * part for (share, _), part in zip(theirs, parts, strict=True))

    results = {}
    for work, flops in row.flops.items():
        if work == BACKWARD:
            results[work] = difference(results[FORWARD], results[BOTH], flops, rival.targets.get(work))
            continue
        runs = [runnable(row, t, work) for t in tasks]
        result = Result(row.name, work, rival.name, error=error, flops=flops, tokens=row.tokens)
        result.target, result.milliseconds = rival.targets.get(work), row.milliseconds.get(work)
        result.floor_ms = floor_ms(row, ours, work)
        before = [run() for run in runs]  # compiles
        for run in runs:
            run()
        results[work] = result
        if work == HOST:
            result.ours_ms, *parts = (host_milliseconds(run, repeats) for run in runs)
            result.rival_ms = total(parts)
            continue
        steps = runs
        result.ours_mib, *parts = (peak_memory(run) + mebibytes(t.held()) for run, t in zip(runs, tasks, strict=True))
        result.rival_mib = total(parts)
        if work != FORWARD:
            result.memory = rival.memory
        if rival.graph:
            try:
                runs = [captured(run) for run in runs]
                result.graph = True
            except RuntimeError:  # the report says that no graph was used
                torch.cuda.synchronize()
        result.ours_ms, *parts = alternate(runs, repeats, GRAPHS if result.graph else EAGER)
        result.rival_ms = total(parts)
        if work == TRAINING:
            check_learning(before, [step() for step in steps])
    return list(results.values())


def check_learning(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """On a batch that is always the same, every loss falls."""
    for side, first, last in zip(("ours", "the rival"), before, after, strict=True):
        if not last < first:
            raise AssertionError(f"{side}: training took the loss from {first:.3f} to {last:.3f}")


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


def shortened(text: str) -> str:
    """On one line; compilers put the place first and the reason last."""
    text = " ".join(text.split())
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
            results.append(
                Result(row.name, rival=rival.name, problem=shortened(f"{type(problem).__name__}: {problem}"), error=error)
            )
        release()
    for work, target in row.best.items():
        against = [result for result in results if result.work == work and result.rival_ms]
        if against:
            fastest = min(against, key=lambda result: result.rival_ms)
            fastest.target, fastest.rival = target, f"{fastest.rival} (the fastest)"
    return results


def release() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
