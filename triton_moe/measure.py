"""The tuner's measurements. They run in a process of their own, which a bad configuration may crash or hang.

`Bench` runs one workload on the GPU with a configuration forced, compares what comes out, keeps the launches of the kernel in
question, and times those alone: in CUDA graphs, configurations in turns, the L2 cache emptied before each.
"""

import signal
import statistics
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from . import tuning, workloads
from .kernels import common
from .testing import assert_close, poisoned

FOLLOWERS = {"grouped_dw": "_sum_chunks_kernel"}  # launches that a kernel's tiles make longer or shorter
WARM_UP = 0.05  # seconds
LARGEST_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the default; twice it, of the others


class Bench:
    def __init__(self, op: str, dtype: str, shape: dict):
        self.op, self.dtype, self.shape = op, getattr(torch, dtype), shape
        with tuning.overriding(lambda kernel, key, default: default):  # whatever has been tuned before
            self.twin = self.run(self.dtype)
            exact = workloads.has_twin(op, shape)
            self.truth = truth(self.run(torch.float64 if exact else torch.float32), self.twin, self.dtype)
            self.ulps = 16 if exact else 64  # of float32, where a truth in float32 has rounding of its own: sums of 412 up to 48
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list]] = {}  # and its launches, for they hold its tensors
        self.flush = torch.empty(
            2 * torch.cuda.get_device_properties().L2_cache_size + (1 << 26), dtype=torch.int8, device="cuda"
        )

    def run(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return workloads.WORKLOADS[self.op](workloads.Inputs("cuda", dtype, self.dtype), **self.shape)

    def check(self, key: tuning.Key, config: dict[str, int]) -> None:
        """Raise unless the workload's results are right with `config` for the lookups of `key`; then it can be timed."""
        latest: dict[str, tuning.Key] = {}  # the last key asked for, by kernel
        launches = []

        def choose(kernel, asked, default):
            latest[kernel.fn.__name__] = latest["any"] = asked
            return default | config if asked == key else default

        def keep(kernel, grid, args, meta):
            name = kernel.fn.__name__
            if latest.get(name) == key or (latest.get("any") == key and name == FOLLOWERS.get(key.kernel)):
                launches.append((kernel, grid, args, meta))

        common.on_launch = keep
        try:
            with tuning.overriding(choose), poisoned(1 << 40):
                results = self.run(self.dtype)
        finally:
            common.on_launch = None
        for name, right in self.truth.items():
            assert_close(results[name], right, self.twin[name], name=name, ulps=self.ulps)
        if not launches:
            raise AssertionError("no launch to time")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                common.start(*launch)
        graph.replay()
        torch.cuda.synchronize()
        self.graphs[key, tuple(config.values())] = graph, launches

    def time(self, key: tuning.Key, configs: list[dict[str, int]], rounds: int) -> list[list[int]]:
        """Nanoseconds of every configuration in every round."""
        graphs = [self.graphs[key, tuple(config.values())][0] for config in configs]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        warm = 0.0
        while warm < WARM_UP:
            start.record()
            for graph in graphs:
                graph.replay()
            end.record()
            end.synchronize()
            warm += start.elapsed_time(end) / 1000 + 1e-4
        samples: list[list[int]] = [[] for _ in graphs]
        for r in range(rounds):
            for i in [*range(r % len(graphs), len(graphs)), *range(r % len(graphs))]:
                self.flush.zero_()
                start.record()
                graphs[i].replay()
                end.record()
                end.synchronize()
                samples[i].append(round(start.elapsed_time(end) * 1e6))
        return samples

    def forget(self, key: tuning.Key, configs: list[dict[str, int]]) -> None:
        for config in configs:
            self.graphs.pop((key, tuple(config.values())), None)


def truth(exact: dict[str, torch.Tensor], default: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """In float64, what candidates that compute in `dtype` are compared with; but first the default itself."""
    right = {name: exact[name].double() for name in default if name in exact}
    for name, value in right.items():
        off = float((default[name] - value).norm() / value.norm()) if value.numel() else 0.0
        if not off <= LARGEST_ERROR[dtype]:
            raise AssertionError(f"{name} of the default configurations is wrong, by {off:.2g} of its norm")
    return right


def serve(pipe) -> None:
    """Answer (method, arguments) until there are no more, or a fault leaves this process without a GPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    if torch.cuda.is_available():
        torch.empty(1, device="cuda")  # a second, while nobody waits
    bench = None
    while (request := pipe.recv()) is not None:
        method, *args = request
        try:
            if method == "open":
                bench = None  # its memory first
                bench = Bench(*args)
                answer = None
            else:
                answer = getattr(bench, method)(*args)
            torch.cuda.synchronize()
            pipe.send(("ok", answer))
        except Exception as error:  # a verdict on the configuration
            try:
                torch.cuda.synchronize()
            except Exception:
                pipe.send(("broken", _text(error)))
                return
            pipe.send(("failed", _text(error)))


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


class Failed(Exception):
    """This configuration, for good; the message says why."""


class Measurer:
    """A `Bench` in a child process, started again whenever it has died."""

    def __init__(self, seconds: float = 60, target: Callable = serve):
        self.seconds, self.target, self.deaths = seconds, target, 0
        self.process: Any = None
        self.workload: tuple = ()

    def open(self, *workload) -> None:
        self.workload = workload
        self._ask("open", *workload)

    def check(self, key, config) -> None:
        self._ask("check", key, config)

    def time(self, key, configs, rounds):
        return self._ask("time", key, configs, rounds)

    def forget(self, key, configs) -> None:
        self._ask("forget", key, configs)

    def start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=self.target, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def _ask(self, *request):
        if self.process is None:
            self.start()
            if request[0] != "open":
                self._ask("open", *self.workload)
        try:
            self.pipe.send(request)
            if not self.pipe.poll(self.seconds):
                raise TimeoutError
            kind, answer = self.pipe.recv()
        except TimeoutError:
            self.close()
            raise Failed(f"no answer after {self.seconds:g} s") from None
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.close()
            raise Failed(f"the process died (exit {code})") from None
        if kind == "broken":
            self.close()
        if kind != "ok":
            raise Failed(answer)
        return answer

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.deaths += 1
        self.process = None


def gain(default: list[int], config: list[int]) -> tuple[int, int]:
    """By how many ns `config` is faster, as the median over rounds, and how far from it that may be by chance."""
    saved = [a - b for a, b in zip(default, config, strict=True)]
    middle = statistics.median(saved)
    spread = 1.4826 * statistics.median(abs(s - middle) for s in saved)
    return round(middle), round(3 * 1.2533 * spread / len(saved) ** 0.5)
