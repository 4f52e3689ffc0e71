"""`python -m triton_moe autotune`: find the launch configurations that this GPU runs fastest.

    enumerate   each kernel's SPACE, for every lookup that the shapes make
    compile     in processes, what is nearest to the default first; what cannot run is dropped, the rest ranked (`cost`)
    measure     in a child process, in groups with the default in each; every configuration must first compute the right values
    adopt       what beats the default beyond noise, confirmed by a longer measurement

Everything learnt goes to a journal, a line each, so that a run which was interrupted or killed goes on with --resume. The
result is a file of plain data for each op (tuning.py), in TRITON_MOE_CONFIG_DIR or the user's folder.
"""

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from . import tuning
from .compiler import seconds

OPS = ("gating", "projection", "mlp", "attention")
PRESETS = ("paper", "moeut", "llm")
GROUP, ROUNDS, CONFIRM = 6, 9, 31  # configurations measured in turns; rounds of those; rounds of the last comparison
LEAST_GAIN = 0.01  # of the default's time
COMPILE = 0.5  # of the budget; a core compiles two configurations a second, and 20 to 30 of them are measured in one
IN_BLOCK, IN_MULTIPROCESSOR = 1024, 65536  # bytes of shared memory a block costs besides its own; registers


@dataclass
class Problem:
    """One lookup of one workload: what is to be decided. `rows` has the compiler's word on each candidate, `times` the measured
    ns of each relative to the default in the same group, `failed` why others are out."""

    op: str
    dtype: str
    shape: dict
    file: str
    key: tuning.Key
    source: str
    space: dict[str, list[int]]
    configs: list[dict[str, int]]  # the default first
    costs: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)
    result: dict | None = None

    @property
    def workload(self) -> tuple[str, str, dict]:
        return self.op, self.dtype, self.shape

    def place(self, config) -> int | None:
        return self.configs.index(config) if config in self.configs else None


def problems(shapes: list[tuple[str, str, dict]], target: str) -> list[Problem]:
    from .compiler import candidates, lookups

    found: dict[tuple, Problem] = {}
    for op, dtype, shape in shapes:
        for kernel, key, default in lookups(op, target, dtype, shape):
            file = tuning.op_of(kernel)
            space = tuning.space(file).get(key.kernel)
            if space is not None and key not in found and (file != "gating" or op == "gating"):
                configs = candidates(space, key, default)
                found[key] = Problem(op, dtype, shape, file, key, tuning.source_hash(kernel), space, configs)
    return list(found.values())


# ---- journal


class Journal:
    """Lines of JSON, each written at once. What was read from one is data about candidates, never a candidate itself."""

    def __init__(self, path: Path, resume: bool):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume and path.exists():
            os.replace(path, path.with_name(path.name + ".old"))
        self.rows = list(_lines(path)) if path.exists() else []
        self.file = open(path, "a+b", buffering=0)  # noqa: SIM115
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":  # a line that was being written when its process died
                self.file.write(b"\n")

    def close(self) -> None:
        self.file.close()

    def add(self, kind: str, device: str, problem: Problem, config: dict, **what) -> None:
        key = [problem.key.kernel, problem.key.dtype, problem.key.widths, problem.key.sizes]
        row = {"kind": kind, "device": device, "source": problem.source, "key": key, "config": config, **what}
        self.file.write(json.dumps(row).encode() + b"\n")

    def replay(self, device: str, arch: str, found: list[Problem]) -> None:
        """Put what is known into the problems. Compilations are of an architecture, measurements of a device."""
        by_key = {json.dumps([p.key.kernel, p.key.dtype, p.key.widths, p.key.sizes]) + p.source: p for p in found}
        for row in self.rows:
            try:
                problem = by_key[json.dumps(row["key"]) + row["source"]]
                i, kind = problem.place(row["config"]), row["kind"]
                if i is None or row["device"] != (arch if kind == "compile" else device):
                    continue
                if kind == "compile":
                    _take_compiled(problem, i, row["error"], row["cost"])
                elif kind == "time" and row["error"] is not None:
                    problem.failed[i] = str(row["error"])
                elif kind == "time":
                    problem.ratios[i] = _positive(row["ns"]) / _positive(row["default_ns"])
                elif kind == "final":
                    result = {k: _positive(row[k]) for k in ("ns", "default_ns")} | {"noise_ns": int(row["noise_ns"])}
                    problem.result = {"place": i, "adopted": row["adopted"] is True} | result
            except (KeyError, TypeError, ValueError, OverflowError):
                continue


def _positive(value) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError(value)
    return value


def _lines(path: Path) -> Iterator[dict]:
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


# ---- the order in which candidates are tried


def cost(row, shared: int) -> float:
    """A guess at relative time from what the compiler says: spills are slow, and products that wait for one another; few warps on
    a multiprocessor hide little, small tiles load more for each product."""
    warps = row.config["num_warps"]
    blocks = min(
        (shared + IN_BLOCK) // (row.shared_bytes + IN_BLOCK),
        IN_MULTIPROCESSOR // max(1, row.registers * 32 * warps),
        64 // warps,
    )
    sides = sorted(v for k, v in row.config.items() if k in ("BLOCK_M", "BLOCK_N", "BLOCK_I", "BLOCK_J", "BLOCK_P"))[-2:]
    small = 1 / sides[0] + 1 / sides[-1] if sides else 0.0
    return (1.5 if row.warning else 1) * (1 + row.spill_bytes / 64) * (1 + 4 / (max(1, blocks) * warps)) * (1 + 16 * small)


def next_group(problem: Problem, n: int) -> list[int]:
    """The n candidates to measure next: in turn the best neighbour of the fastest so far and the best of all, by cost."""
    from .compiler import steps

    left = [i for i in problem.costs if i not in problem.ratios and i not in problem.failed and i != 0]
    if not left:
        return []
    best = min({0: 1.0} | problem.ratios, key=lambda i: ({0: 1.0} | problem.ratios)[i])
    rank = sorted(left, key=lambda i: (problem.costs[i], i))
    near = sorted(left, key=lambda i: (steps(problem.configs[i], problem.configs[best], problem.space), problem.costs[i], i))
    chosen = list(dict.fromkeys(i for pair in zip(near, rank, strict=True) for i in pair))
    return chosen[:n]


# ---- stages


class Clock:
    """The budget: seconds since the start of the process's work."""

    def __init__(self, budget: float):
        self.start, self.budget = time.monotonic(), budget

    def left(self, share: float = 1.0) -> float:
        return self.start + share * self.budget - time.monotonic()

    def __str__(self) -> str:
        return f"{max(0.0, self.left()):.0f} s of the budget left"


def compile_stage(found: list[Problem], device: tuning.Device, journal: Journal, clock: Clock, jobs: int, measured: bool) -> None:
    """Compile candidates, of all problems in turn, the nearest to the default first; for a share of the budget when there is
    something to measure after that."""
    from tqdm import tqdm

    from . import compiler
    from .workloads import has_twin

    todo = []
    for n in range(max((len(p.configs) for p in found), default=0)):
        todo += [(p, n) for p in found if n < len(p.configs) and n not in p.costs and n not in p.failed]
    workloads = {json.dumps(p.workload): p.workload for p in found if measured}
    whole = [(op, d, shape, d) for op, d, shape in workloads.values()]
    whole += [(op, "float32", shape, d) for op, d, shape in workloads.values() if d != "float32" and not has_twin(op, shape)]

    def work():  # what the measuring process runs besides candidates comes first: its workloads, and their truth
        for op, dtype, shape, stored in whole:
            yield "whole", None, (device.arch, dtype, op, shape, None, None, stored)
        for problem, i in todo:
            if clock.left(COMPILE if measured else 1.0) <= 0:
                return
            yield "one", (problem, i), (device.arch, problem.dtype, problem.op, problem.shape, problem.key, problem.configs[i])

    if not todo:
        return
    with tqdm(total=len(todo), desc="compile", unit="config") as bar:
        for (_, which, _), row in compiler.each(_compile, work(), jobs, compiler.TIMEOUT):
            if which is None:
                continue
            problem, i = which
            error = row if isinstance(row, str) else row.error
            if error is None and 0 < device.shared < row.shared_bytes:
                error = f"wants {row.shared_bytes} bytes of shared memory of {device.shared}"
            worth = None if error else round(cost(row, device.shared), 4)
            facts = (
                {}
                if isinstance(row, str)
                else {k: getattr(row, k) for k in ("registers", "spill_bytes", "shared_bytes", "warning", "seconds")}
            )
            error = error and error.strip().splitlines()[-1][:300]
            journal.add("compile", device.arch, problem, problem.configs[i], cost=worth, error=error, **facts)
            _take_compiled(problem, i, error, worth)
            bar.set_postfix_str(str(clock), refresh=False)
            bar.update()


def _compile(kind: str, which, job: tuple):
    from . import compiler

    return compiler.compile_case(*job) if kind == "whole" else compiler.compile_candidate(*job)


def _take_compiled(problem: Problem, i: int, error: str | None, worth: float | None) -> None:
    if error is not None or type(worth) is not float or not worth > 0:
        problem.failed[i] = str(error)
    else:
        problem.costs[i] = worth


def measure_stage(found: list[Problem], device: tuning.Device, journal: Journal, clock: Clock, measurer) -> None:
    """Workload by workload, each with its share of the time left; its problems in turn, a group of candidates at a time."""
    from tqdm import tqdm

    todo: dict[str, list[Problem]] = {}
    for p in found:
        if 0 in p.costs and (p.result is None or next_group(p, 1)):
            todo.setdefault(json.dumps(p.workload), []).append(p)
    with tqdm(total=sum(len(p.costs) - 1 for ps in todo.values() for p in ps), desc="measure", unit="config") as bar:
        for n, group in enumerate(todo.values()):
            if clock.left() <= 0:
                break
            try:
                measurer.open(*group[0].workload)
            except _failed() as error:
                tqdm.write(f"{_label(group[0])}: {error}")
                continue
            until = clock.left() * (1 - 1 / (len(todo) - n))
            active = list(group)
            while active and clock.left() > max(0, until):
                for p in list(active):
                    if not measure_group(p, next_group(p, GROUP), device, journal, measurer):
                        active.remove(p)
                    bar.n = sum(len(q.ratios) + sum(i in q.costs for i in q.failed) for ps in todo.values() for q in ps)
                    bar.set_postfix_str(f"{p.key.kernel}, {clock}", refresh=True)
            for p in group:
                confirm(p, device, journal, measurer)


def _failed() -> type[Exception]:
    from .measure import Failed

    return Failed


def _checked(problem: Problem, group: list[int], device, journal: Journal, measurer) -> list[int]:
    """Those of the group, the default first, that compute the right values; all of them again if the process died on the way."""
    good = [0, *group]
    while True:
        deaths = measurer.deaths
        for i in list(good):
            try:
                measurer.check(problem.key, problem.configs[i])
            except _failed() as error:
                good.remove(i)
                problem.failed[i] = str(error)
                journal.add("time", device.name, problem, problem.configs[i], error=str(error))
        if measurer.deaths == deaths:
            return good


def measure_group(problem: Problem, group: list[int], device, journal: Journal, measurer) -> bool:
    """False when there is nothing left to measure."""
    if not group or 0 in problem.failed:
        return False
    good = _checked(problem, group, device, journal, measurer)
    if good[:1] != [0]:
        return False
    if len(good) > 1:
        samples = _timed(problem, good, ROUNDS, device, journal, measurer)
        for i, ns in list(samples.items())[1:]:
            default, middle = (max(1, round(statistics.median(s))) for s in (samples[0], ns))
            journal.add("time", device.name, problem, problem.configs[i], error=None, ns=middle, default_ns=default)
            problem.ratios[i] = middle / default
    return True


def _timed(problem: Problem, places: list[int], rounds: int, device, journal: Journal, measurer) -> dict[int, list[int]]:
    configs = [problem.configs[i] for i in places]
    try:
        samples = measurer.time(problem.key, configs, rounds)
    except _failed() as error:  # one of them hangs or crashes after all: none is trusted
        for i in places[1:]:
            problem.failed[i] = str(error)
            journal.add("time", device.name, problem, problem.configs[i], error=str(error))
        return {}
    measurer.forget(problem.key, configs[1:])
    return dict(zip(places, samples, strict=True))


def confirm(problem: Problem, device, journal: Journal, measurer) -> None:
    """Measure the fastest once more, at length: the smallest of many times is smaller than it should be."""
    from .measure import gain

    if not problem.ratios or 0 in problem.failed:
        return
    best = min(problem.ratios, key=lambda i: problem.ratios[i])
    if problem.result is not None and problem.result["place"] == best:
        return
    if _checked(problem, [best], device, journal, measurer) != [0, best]:
        return
    samples = _timed(problem, [0, best], CONFIRM, device, journal, measurer)
    if not samples:
        return
    saved, noise = gain(samples[0], samples[best])
    default = round(statistics.median(samples[0]))
    adopted = saved > max(noise, LEAST_GAIN * default)
    problem.result = {"place": best, "adopted": adopted, "ns": max(1, default - saved), "default_ns": default, "noise_ns": noise}
    journal.add("final", device.name, problem, problem.configs[best], **{k: v for k, v in problem.result.items() if k != "place"})


def adopt(found: list[Problem], folder: Path, device: tuning.Device) -> list[Path]:
    """Write what was decided: the winners, and the default where it won, so that no neighbouring size takes its place."""
    import triton

    paths = []
    for op in sorted({p.file for p in found}):
        entries = []
        for p in found:
            if p.file != op or p.result is None:
                continue
            r, won = p.result, p.result["adopted"]
            config = p.configs[r["place"] if won else 0]
            if all(config[name] in values for name, values in p.space.items()):
                ns = r["ns"] if won else r["default_ns"]
                entries.append(tuning.Entry(p.key, p.source, config, triton.__version__, ns, r["default_ns"], r["noise_ns"]))
        if entries:
            paths.append(tuning.save(folder, op, device, entries))
    return paths


# ---- report


def _label(problem: Problem) -> str:
    return f"{problem.op} " + " ".join(f"{k}={v}" for k, v in problem.shape.items())


def _values(config: dict[str, int]) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')[:6]}={value}" for name, value in config.items())


def report(found: list[Problem]) -> list[str]:
    done = [(p, p.result) for p in found if p.result]
    lines = [f"{'kernel':<19}{'default us':>10}  {'tuned us':>8}  {'gain':>6}  {'noise':>6}  {'tried':>5}  configuration, shape"]
    for p, r in done:
        gained = r["default_ns"] / r["ns"] - 1 if r["adopted"] else 0.0
        lines.append(
            f"{p.key.kernel:<19}{r['default_ns'] / 1000:>10.1f}  {(r['ns'] if r['adopted'] else r['default_ns']) / 1000:>8.1f}  "
            f"{gained:>6.1%}  {r['noise_ns'] / r['default_ns']:>6.1%}  {len(p.ratios):>5}  "
            f"{_values(p.configs[r['place'] if r['adopted'] else 0])}; {_label(p)}"
        )
    for kernel in sorted({p.key.kernel for p, _ in done}):
        gains = [r["default_ns"] / r["ns"] if r["adopted"] else 1.0 for p, r in done if p.key.kernel == kernel]
        mean = math.exp(statistics.fmean(map(math.log, gains)))
        lines.append(
            f"{kernel}: {mean:.3f} times as fast in the geometric mean of {len(gains)}, {min(gains):.3f} to {max(gains):.3f}"
        )
    return lines


def rank_correlation(a: list[float], b: list[float]) -> float | None:
    """Spearman's, between the guess and the measurement: how good the ranking was."""
    if len(a) != len(b) or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    ranks = [[sum(y < x for y in values) + sum(y == x for y in values) / 2 for x in values] for values in (a, b)]
    return round(statistics.correlation(*ranks), 3)


def as_json(found: list[Problem]) -> list[dict]:
    return [
        {
            "op": p.op,
            "dtype": p.dtype,
            "shape": p.shape,
            "key": p.key._asdict(),
            "default": p.configs[0],
            "candidates": len(p.configs),
        }
        | {"compiled": len(p.costs), "measured": len(p.ratios), "failed": {str(i): e for i, e in p.failed.items()}}
        | {"rank_correlation": rank_correlation([p.costs[i] for i in p.ratios if i in p.costs], list(p.ratios.values()))}
        | ({"best": p.configs[p.result["place"]], **p.result} if p.result else {})
        for p in found
    ]


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", metavar="OP", help=f"some of {', '.join(OPS)} (default: all)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--preset", nargs="+", choices=PRESETS, default=["paper"], help="shapes of published models, or of larger ones"
    )
    which.add_argument(
        "--shapes", type=Path, metavar="FILE", help='your own: [{"op": "mlp", "dtype": "bfloat16", "shape": {...}}]'
    )
    parser.add_argument("--budget", type=seconds, default=600.0, metavar="TIME", help="such as 90s, 10m, 1h (default 10m)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="compiling processes (default: one a core)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the journal of an earlier run")
    parser.add_argument("--dry-run", action="store_true", help="compile and rank only; needs no GPU")
    parser.add_argument("--target", help="what a dry run compiles for (default: this GPU; sm_90 where there is none)")
    parser.add_argument("--report", type=Path, metavar="PATH", help="also write the results to a file (JSON)")


def run(args: argparse.Namespace) -> int:
    """0; 2 when it cannot start; 130 when Ctrl-C ended it, with all that was measured kept."""
    from . import compiler, workloads

    def fail(message) -> int:
        print(f"triton-moe autotune: {message}", file=sys.stderr)
        return 2

    if unknown := [op for op in args.op if op not in OPS]:
        return fail(f"there is no op {unknown[0]!r}; the ops are {', '.join(OPS)}")
    if importlib.util.find_spec("tqdm") is None:
        return fail("needs tqdm: pip install 'triton-moe[demo]'")
    if args.report and not args.report.parent.is_dir():
        return fail(f"--report: no directory {args.report.parent}")
    try:
        ops = args.op or list(OPS)
        if args.shapes:
            shapes = workloads.read_shapes(args.shapes, ops)
        else:
            shapes = [row for name in args.preset for row in workloads.PRESETS[name] if row[0] in ops]
    except ValueError as error:
        return fail(error)
    device = None if args.target else compiler.this_gpu()
    if device is None:
        target = args.target or "sm_90"
        if not args.dry_run:
            return fail(
                "--target is for --dry-run" if args.target else "torch sees no GPU; --dry-run compiles and ranks without one"
            )
        if target not in compiler.TARGETS:
            return fail(f"--target must be one of {', '.join(compiler.TARGETS)}")
        device = tuning.Device(target, target, compiler.TARGETS[target][1])
    chosen = os.environ.get("TRITON_MOE_CONFIG_DIR")
    folder = Path(chosen) if chosen else tuning.user_folder()
    measurer = None
    if not args.dry_run:
        from .measure import Measurer

        measurer = Measurer()
    return tune(shapes, device, folder, args, measurer)


def tune(
    shapes, device: tuning.Device, folder: Path, args: argparse.Namespace, measurer, compile_stage: Callable = compile_stage
) -> int:
    clock, interrupted = Clock(args.budget), False
    found = problems(shapes, device.arch)
    path = folder / f"journal.{tuning.file_name('', device).strip('.').removesuffix('.json')}.jsonl"
    journal = Journal(path, args.resume)
    journal.replay(device.name, device.arch, found)
    print(f"{len(found)} kernels and shapes, {sum(len(p.configs) for p in found)} configurations, {device.name} ({device.arch})")
    print(f"journal {path}", flush=True)
    try:
        if measurer is not None:
            measurer.start()  # while others compile
        compile_stage(found, device, journal, clock, args.jobs, measurer is not None)
        if measurer is not None:
            measure_stage(found, device, journal, clock, measurer)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        journal.close()
        if measurer is not None:
            measurer.close()
    for line in report(found) if measurer is not None else ranking(found):
        print(line)
    for written in adopt(found, folder, device):
        print(f"wrote {written}")
    if args.report:
        tuning.write_atomically(args.report, json.dumps(as_json(found), indent=1).encode() + b"\n")
    if interrupted:
        print("interrupted; --resume goes on from here", file=sys.stderr)
    return 130 if interrupted else 0


def ranking(found: list[Problem], n: int = 3) -> list[str]:
    lines = []
    for p in found:
        lines.append(f"{p.key.kernel}, {_label(p)}: {len(p.costs)} of {len(p.configs)} compiled and fit, {len(p.failed)} do not")
        for i in sorted(p.costs, key=lambda i: p.costs[i])[:n]:
            lines.append(f"    {p.costs[i]:.2f}  {_values(p.configs[i])}{'  (default)' if i == 0 else ''}")
    return lines
