"""Compile every kernel as its launcher would launch it, for any target, on a machine without a GPU.

    python -m triton_moe compile --target sm_90 --op attention
    python -m triton_moe compile --all --target all --json report.jsonl       every configuration that may be tuned
    python -m triton_moe compile --cache DIR --shapes FILE                    ahead of time, for the GPU of this machine

The workloads run on `meta` tensors: the launchers allocate, look their configuration up and launch as ever, but `common.launch`
hands the kernel over to `compile_case` here. Triton then specialises on the real arguments (alignment, divisibility,
equality with 1) and compiles for the target that a stand-in for its driver reports.

NOTE [Spaces]
    A kernel's SPACE has what came within 5 % of the best in any of 98 tunes and two whole sweeps on an H200, and the small tiles
    and few stages that GPUs with less shared memory need. So went, among others, 256 columns in the MLP and in grouped_dw, a
    BLOCK_K of 128 in up, 4 stages in up and grouped_dw, 128 keys in attention's forward and dq. `candidates` also leaves out
    what a thread cannot hold.
    float16 is not compiled by `--all` unless it is asked for: the tuner does not tell it from bfloat16.

Registers are those of one thread. Spills are the bytes of local memory one thread needs: the stack frame on NVIDIA,
scratch on AMD.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

TARGETS = {  # name: (backend, architecture, threads of a warp), bytes of shared memory one block may have
    "sm_80": (("cuda", 80, 32), 166912),
    "sm_86": (("cuda", 86, 32), 101376),
    "sm_90": (("cuda", 90, 32), 232448),
    "sm_100": (("cuda", 100, 32), 232448),
    "sm_120": (("cuda", 120, 32), 101376),
    "gfx942": (("hip", "gfx942", 64), 65536),
}
MAIN_TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
DTYPES = ("float16", "bfloat16", "float32")
TIMEOUT = 120  # seconds for one configuration; a sound one takes 0.2 to 16
LIFE = 200  # configurations a process compiles, for what Triton keeps of each

FLOAT_ATOMIC = {
    "ptx": re.compile(r"^\s*(?:@!?%\w+\s+)?(?:atom|red|cp\.reduce)\.[\w.:]*\.(?:f|bf)(?:16|32|64)", re.MULTILINE),
    "amdgcn": re.compile(r"^\s*(?:global|flat|buffer)_atomic_\w*f(?:16|32|64)", re.MULTILINE),
}


@dataclass
class Compiled:
    """One kernel, compiled for one target; `error` says why it was not, and the numbers are then None."""

    op: str
    kernel: str
    target: str
    dtype: str
    shape: str
    config: dict
    seconds: float
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    float_atomics: bool | None = None
    warning: bool = False  # of the assembler: matrix products wait for one another
    error: str | None = None


def targets() -> list[str]:
    return list(TARGETS)


def compile_all(target: str, dtypes: list[str], ops: list[str] | None = None) -> list[Compiled]:
    """Every kernel of `ops` (default: all) in each of `dtypes` for `target`, one after the other in this process."""
    return [
        row
        for op in (CASES if ops is None else ops)
        for shape in CASES[op]
        for dtype in dtypes
        for row in compile_case(target, dtype, op, shape)
    ]


def compile_case(
    target: str, dtype: str, op: str, shape: dict, choose: Callable | None = None, only: Callable | None = None, stored: str = ""
) -> list[Compiled]:
    """The kernels that one op launches, forward and backward, for one shape.

    choose: what `tuning.lookup` asks instead of returning the default
    only:   compile a kernel only if this returns True for it
    stored: as of workloads.Inputs
    """
    from triton import knobs

    rows, seen = [], set()

    def compile_kernel(kernel, grid, args, meta):
        if only is not None and not only(kernel):
            return
        config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in meta.items()}
        row = Compiled(op, kernel.__name__, target, dtype, _text(shape), config, 0.0)
        start = time.perf_counter()
        try:
            with knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
                knobs.nvidia.dump_ptxas_log = True
                compiled = kernel.warmup(*args, grid=grid, **meta)
            row.warning = "Potential Performance Loss" in log.getvalue()
            if compiled.hash in seen:  # the same kernel again, for other tensors
                return
            seen.add(compiled.hash)
            _measure(compiled, row)
        except Exception as error:  # whatever the compiler throws is this row's result, and the next kernel's turn comes
            row.error = f"{type(error).__name__}: {error}"
        row.seconds = round(time.perf_counter() - start, 3)
        rows.append(row)

    _on_meta(target, dtype, op, shape, choose, compile_kernel, stored)
    return rows


def _text(shape: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in shape.items())


def _on_meta(target, dtype, op, shape, choose, on_launch, stored="") -> None:
    import torch
    from triton.runtime import driver

    from . import tuning, workloads
    from .kernels import common

    if common.INTERPRET:
        raise RuntimeError("nothing can be compiled while TRITON_INTERPRET=1: unset it before Python starts")
    active, before = driver._active, common.on_launch
    driver.set_active(_Driver(target))
    common.on_launch = on_launch
    try:
        with tuning.overriding(choose or (lambda kernel, key, default: default)):
            workloads.WORKLOADS[op](workloads.Inputs("meta", *(getattr(torch, d) for d in (dtype, stored) if d)), **shape)
    finally:
        driver.set_active(active)
        common.on_launch = before


def lookups(op: str, target: str, dtype: str, shape: dict) -> list[tuple]:
    """(kernel, key, default configuration) of every lookup that a workload makes, each once."""
    found = {}

    def note(kernel, key, default):
        found.setdefault(key, (kernel, key, dict(default)))
        return default

    _on_meta(target, dtype, op, shape, note, None)
    return list(found.values())


def compile_candidate(target: str, dtype: str, op: str, shape: dict, key, config: dict) -> Compiled:
    """The kernel of one lookup with one configuration in place of its default; of several kernels, the worst of each number."""
    latest: dict = {}  # the last key asked for, by kernel

    def choose(kernel, asked, default):
        latest[kernel] = asked
        return default | config if asked == key else default

    worst, *others = compile_case(target, dtype, op, shape, choose, lambda kernel: latest.get(kernel) == key)
    for row in others:
        worst.seconds += row.seconds
        worst.warning |= row.warning
        worst.error = worst.error or row.error
        worst.float_atomics = worst.float_atomics or row.float_atomics
        for name in ("registers", "spill_bytes", "shared_bytes"):
            numbers = getattr(worst, name), getattr(row, name)
            setattr(worst, name, None if None in numbers else max(numbers))
    return worst


def steps(config: dict, other: dict, space: dict) -> int:
    """How many values of the space lie between two configurations, over all names."""
    return sum(abs(_place(values, config[k]) - _place(values, other[k])) for k, values in space.items())


def _place(values: list[int], value: int) -> int:
    return sum(v < value for v in values)


def candidates(space: dict[str, list[int]], key, default: dict[str, int]) -> list[dict[str, int]]:
    """All of a kernel's space that makes sense at these widths, the default first and then what is nearest to it."""
    start = {name: default[name] for name in space}
    widths = dict(key.widths)
    found = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    held, widest = HELD[key.dtype]
    found = [config for config in found if _held(config, key, widths) <= held]
    for name in space:
        width = widths.get(name.removeprefix("BLOCK_"), 0) if name.startswith("BLOCK_") else 0
        most = widest
        if width:  # no tile wider than it must be
            most = min(most, max(16, 1 << (width - 1).bit_length()))
        if name.startswith("BLOCK_"):
            found = [config for config in found if config[name] <= max(most, start[name])]
    found.sort(key=lambda config: steps(config, start, space))
    return [start, *(config for config in found if config != start)]


# What a kernel sums up over its loop, in the registers of its threads: the sides of that tile, each a block's or a width.
# Twice as much where something as large lies beside it: a key of each logit; the scores; dk and dv.
SUMS = {
    "gating_fwd": ("BLOCK_N", "E", 2),
    "up": ("BLOCK_M", "BLOCK_N"),
    "up_bwd": ("BLOCK_M", "BLOCK_N"),
    "down": ("BLOCK_M", "BLOCK_N"),
    "grouped_gemm": ("BLOCK_M", "BLOCK_N"),
    "grouped_dw": ("BLOCK_I", "BLOCK_J"),
    "gather": ("BLOCK_M", "P"),
    "spread": ("BLOCK_M", "BLOCK_N"),
    "attention_fwd": ("BLOCK_M", "PV", 2),
    "attention_bwd_dkdv": ("BLOCK_N", "P", 2),
    "attention_bwd_dq": ("BLOCK_M", "P", 2),
}
# The most float32 values of these a thread can hold, and the widest block. Products of float32 have their operands there, too.
# Of 1218 programs of a wider space 66 of 72 beyond this spilled in float32, and 36 of 47 of attention and gating, and they took
# two to five times as long to compile.
HELD = {"half": (128, 256), "float32": (16, 64)}


def _held(config: dict, key, widths: dict[str, int]) -> float:
    """Values of one thread, if 32 are a warp."""
    known = config | {name: 1 << (width - 1).bit_length() for name, width in widths.items()}
    return math.prod(known.get(side, side) for side in SUMS.get(key.kernel, ())) / (32 * config["num_warps"])


class _Driver:
    """As much of a Triton driver as compilation needs. Triton caches by device, so each target is its own device."""

    def __init__(self, name):
        from triton.backends.compiler import GPUTarget

        if name in TARGETS:
            description = TARGETS[name][0]
        elif match := re.fullmatch(r"sm_(\d+)", name):  # one that is not in the table
            description = "cuda", int(match[1]), 32
        else:
            description = "hip", name, 32 if name.startswith(("gfx10", "gfx11", "gfx12")) else 64
        self.name, self.target = name, GPUTarget(*description)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name

    def get_current_stream(self, device):
        return 0


def _measure(compiled, row: Compiled) -> None:
    row.shared_bytes = compiled.metadata.shared
    if "ptx" in compiled.asm:
        from triton import knobs

        cubin = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        row.registers, row.spill_bytes = int(registers), int(stack) + int(local)
    else:
        text = compiled.asm["amdgcn"]
        row.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        row.spill_bytes = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    row.float_atomics = any(p.search(compiled.asm[kind]) is not None for kind, p in FLOAT_ATOMIC.items() if kind in compiled.asm)


CASES = {  # op: shapes of its workload, published ones and what lies at the edges
    "gating": [
        {"sides": 2, "H": 4, "E": 4, "TOP_K": 2, "D": 1024, "mode": "sigmoid", "dropout": 0.0},
        {"sides": 2, "H": 2, "E": 5, "TOP_K": 3, "D": 412, "mode": "softmax_topk", "dropout": 0.1},
        {"sides": 1, "H": 1, "E": 128, "TOP_K": 8, "D": 1024, "mode": "sigmoid", "dropout": 0.0},
        {"sides": 1, "H": 1, "E": 128, "TOP_K": 8, "D": 1024, "mode": "sigmoid", "dropout": 0.1},
        {"sides": 1, "H": 1, "E": 565, "TOP_K": 24, "D": 1536, "mode": "softmax", "dropout": 0.1},
    ],
    "projection": [
        {"H": 4, "E": 4, "TOP_K": 2, "P": 128, "D": 1024},
        {"H": 2, "E": 5, "TOP_K": 3, "P": 76, "D": 412},
        {"H": 4, "E": 16, "TOP_K": 4, "P": 100, "D": 1024},
        {"H": 4, "E": 4, "TOP_K": 2, "P": 132, "D": 1024},
    ],
    "mlp": [
        {"E": 16, "G": 128, "TOP_K": 8, "D": 1024, "activation": "relu", "bias": False, "dropout": 0.0},
        {"E": 16, "G": 128, "TOP_K": 4, "D": 412, "activation": "geglu", "bias": True, "dropout": 0.1},
    ],
    "attention": [
        {"P": 64, "packed": True, "window": 256},
        {"P": 100, "padding": True, "causal": False, "Hkv": 2},
        {"P": 128},
        {"P": 128, "rope": "pairs"},
        {"P": 128, "rope": "halves"},
        {"P": 256},
        {"P": 112, "H": 2, "Hkv": 2, "xl": 1024, "T": 512},
    ],
    "position": [{"P": 82, "D": 412}],
    "cast": [{"H": 4, "E": 4, "P": 100, "D": 1024}],
    "norm": [{"D": 412}, {"D": 1024}, {"D": 4096}],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = f"default: {' '.join(MAIN_TARGETS)}"
    parser.add_argument("--target", nargs="+", choices=[*TARGETS, "all"], default=MAIN_TARGETS, help=default)
    parser.add_argument("--op", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: all; of --all, bfloat16 and float32")
    parser.add_argument("--all", action="store_true", help="every configuration of the search spaces, not only the defaults")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="also write each row, with its configuration, as a line of a file"
    )
    parser.add_argument(
        "--budget", type=seconds, default=math.inf, metavar="TIME", help="of --all, such as 90s, 10m, 1h: then stop"
    )
    parser.add_argument("--resume", action="store_true", help="of --all: what the --json file has is not compiled again")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="fill this Triton cache, for this GPU or else for --target")
    parser.add_argument(
        "--shapes", type=Path, metavar="FILE", help="of shapes instead of the built-in ones, as autotune takes it"
    )


def run(args: argparse.Namespace) -> int:
    from . import workloads

    if args.resume and not (args.all and args.json):
        print("triton-moe compile: --resume is for --all and --json", file=sys.stderr)
        return 2
    if args.json and not args.json.parent.is_dir():
        raise NotADirectoryError(f"--json: no directory {args.json.parent}")
    # What is tuned in bfloat16 is used in float16, too: the same program but for the type of its products.
    dtypes = args.dtype or (("bfloat16", "float32") if args.all else DTYPES)
    if args.shapes:
        given = workloads.read_shapes(args.shapes, args.op)
    else:
        given = [(op, dtype, shape) for op in args.op for shape in CASES[op] for dtype in dtypes]
    targets = list(TARGETS) if "all" in args.target else args.target
    function: Callable = compile_case
    jobs = [(target, dtype, op, shape) for op, dtype, shape in given for target in targets]
    if args.cache:
        os.environ["TRITON_CACHE_DIR"] = str(args.cache)
        if device := this_gpu():
            function, jobs = compile_for, [(device, dtype, op, shape) for op, dtype, shape in given]
    start = time.perf_counter()
    print(f"{'op':<11}{'kernel':<28}{'dtype':<10}{'target':<8}{'regs':>5}{'spill B':>9}{'shared B':>10}{'s':>7}  shape")
    sys.stdout.flush()
    rows, names = [], {}
    if args.all:
        function, names = compile_candidate, whole_space(jobs)
        jobs = list(names.values())
        if args.resume:
            known = {name: row for name, row in _reported(args.json) if name in names}
            rows = list(known.values())
            jobs = [job for name, job in names.items() if name not in known]
    name_of = {id(job): name for name, job in names.items()}
    report = open(args.json, "a" if args.resume else "w") if args.json else None  # noqa: SIM115
    if report and report.tell():
        print(file=report)  # after a line that may have been cut
    in_time = itertools.takewhile(lambda _: time.perf_counter() - start < args.budget, jobs)
    for job, result in each(function, in_time, args.jobs, TIMEOUT if args.all else 10 * TIMEOUT):
        if isinstance(result, str):  # the process died
            target, dtype, op, shape = job[:4]
            kernel, config = (f"_{job[4].kernel}_kernel", job[5]) if args.all else ("?", {})
            result = Compiled(op, kernel, str(target), dtype, _text(shape), config, 0.0, error=result)
        for row in result if isinstance(result, list) else [result]:
            rows.append(row)
            print(_line(row), flush=True)
            if report:
                print(json.dumps(asdict(row) | ({"name": name_of[id(job)]} if args.all else {})), file=report, flush=True)
    for target in dict.fromkeys(row.target for row in rows):
        some = [row for row in rows if row.target == target]
        print(
            f"{target}: {len(some)} kernels compiled"
            f"{f' of {sum(job[0] == target for job in names.values())}' if args.all else ''}: "
            f"{sum(row.error is not None for row in some)} failed, {sum(bool(row.spill_bytes) for row in some)} spill registers, "
            f"of {sum(row.warning for row in some)} the assembler warns, "
            f"{sum(map(too_large, some))} want more shared memory than a block has, "
            f"{sum(bool(row.float_atomics) for row in some)} use float atomics"
        )
    print(f"{len(rows)} rows, {time.perf_counter() - start:.0f} s")
    return 1 if not args.all and any(row.error for row in rows) else 0


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must look like 90s, 10m or 1h, got {text!r}")
    return float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]]


def too_large(row: Compiled) -> bool:
    return row.target in TARGETS and (row.shared_bytes or 0) > TARGETS[row.target][1]


def whole_space(jobs: list[tuple]) -> dict[str, tuple]:
    """The arguments of `compile_candidate` for all configurations of the lookups that these workloads make, by a name of all that
    decides the outcome. They are sorted by name, which is a hash: any first part of them is a fair sample.

    Of lookups that only differ in how long a loop is or where a mask ends, the first stands for all."""
    import triton

    from . import tuning

    found: dict[str, tuple] = {}
    first: dict[tuple, Any] = {}
    for target, dtype, op, shape in jobs:
        for kernel, key, default in lookups(op, target, dtype, shape):
            file = tuning.op_of(kernel)
            space = tuning.space(file).get(key.kernel)
            if space is None or (file == "gating" and op != "gating"):
                continue
            sides = SUMS.get(key.kernel, ())
            kind = tuple((name, width if name in sides else width > 0) for name, width in key.widths)
            if first.setdefault((target, dtype, key.kernel, kind), key) == key:
                what = target, dtype, key, tuning.source_hash(kernel), triton.__version__
                for config in candidates(space, key, default):
                    name = hashlib.sha256(json.dumps([*what, config]).encode()).hexdigest()[:16]
                    found.setdefault(name, (target, dtype, op, shape, key, config))
    return dict(sorted(found.items()))


def _reported(path: Path) -> Iterator[tuple[str, Compiled]]:
    """The rows of an earlier run; a line that was being written when it ended is none."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            yield row.pop("name"), Compiled(**row)


def this_gpu():
    """None where there is no GPU."""
    import torch

    from . import tuning

    return tuning.this_device(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None


def compile_for(device, dtype: str, op: str, shape: dict) -> list[Compiled]:
    """As it will run on this device, tuned configurations included."""
    from . import tuning

    def choose(kernel, key, default):
        return default | (tuning.resolve(kernel, key, device).config or {})

    return compile_case(device.arch, dtype, op, shape, choose)


# ---- processes


def each(function: Callable, jobs: Iterable[tuple], processes: int, seconds: float) -> Iterator[tuple[tuple, Any]]:
    """(job, function(*job)) in the order in which they end. A process that crashes, or runs longer than `seconds` and is then
    killed, only costs the result of the job it had: a string instead, which says what happened; another one takes its place.

    A process does many jobs, for the first takes Triton five times as long as others; it is forked from a server that has the
    modules loaded, and does not hear Ctrl-C, which is for the caller.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["triton_moe.workloads"])
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    waiting, running, idle = iter(jobs), {}, []
    try:
        while True:
            while len(running) < processes and (job := next(waiting, None)) is not None:
                if idle:
                    pipe, process, done = idle.pop()
                else:
                    (pipe, theirs), done = context.Pipe(), 0
                    process = context.Process(target=_child, args=(theirs, function), daemon=True)
                    process.start()
                    theirs.close()
                running[pipe] = job, process, done, time.monotonic() + seconds
                with suppress(OSError):  # it died meanwhile: the answer is none
                    pipe.send(job)
            if not running:
                return
            first = min(deadline for *_, deadline in running.values())
            ready = connection.wait(list(running), max(0.0, first - time.monotonic()))
            late = [pipe for pipe, (*_, deadline) in running.items() if deadline <= time.monotonic() and pipe not in ready]
            for pipe in [*ready, *late]:
                job, process, done, _ = running[pipe]
                try:
                    result, more = (pipe.recv(), done + 1 < LIFE) if pipe in ready else (f"no result after {seconds:g} s", False)
                except (EOFError, OSError):
                    process.join()
                    result, more = f"the process died (exit {process.exitcode})", False
                del running[pipe]
                if more:
                    idle.append((pipe, process, done + 1))
                else:
                    _kill(process)
                    pipe.close()
                yield job, result
    finally:
        for process in [process for _, process, *_ in running.values()] + [process for _, process, _ in idle]:
            _kill(process)


def _kill(process) -> None:
    """With what it started, like the assembler."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _child(pipe, function: Callable) -> None:
    os.setsid()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # Triton prints the whole program when ptxas refuses it, and MLIR what it thinks of it
        os.dup2(nowhere, stream)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*job)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        pipe.send(result)


def _line(row: Compiled) -> str:
    text = f"{row.op:<11}{row.kernel.strip('_'):<28}{row.dtype:<10}{row.target:<8}"
    if row.error:
        return f"{text}{'failed':>14}{'':>17}  {row.shape}: {row.error.strip().splitlines()[-1]}"
    return f"{text}{row.registers:>5}{row.spill_bytes:>9}{row.shared_bytes:>10}{row.seconds:>7.1f}  {row.shape}"
