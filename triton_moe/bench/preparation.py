"""All checks and all compiling, in several processes at once, before anything is timed."""

import contextlib
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from .correctness import check
from .groups import GROUPS
from .row import BACKWARD, Row
from .shared import AUTOTUNED
from .timing import Result, failure, release, runnable, seeded_inputs, sides


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


def prepare_rows(group: str, device: str, full: bool, indices: list[int], rival: str | None) -> tuple[list[Result | None], float]:
    """In a process of its own: check rows, or run a rival of theirs once -> results, seconds. The caches on disk then hold what
    was compiled."""
    rows, began = GROUPS[group](device, full), time.perf_counter()
    with quick_autotuning(threads=6):
        found = [check_row(rows[i]) if rival is None else run_once(rows[i], rival) for i in indices]
    return found, time.perf_counter() - began


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
                inputs = {**seeded_inputs(row), "n_layers": 1}  # a model of one layer compiles what the whole one needs
                ours, theirs = sides(row, inputs, rival)
                for t in ([ours] if rival.compiled or row.step else []) + [t for _, t in theirs]:
                    for work in row.flops:
                        if work != BACKWARD:
                            runnable(row, t, work)()
            release()


def prepare(
    rows: dict[tuple[str, int], Row], device: str, full: bool, processes: int
) -> tuple[dict[tuple[str, int], Result], list[tuple[float, str]]]:
    """What `check_row` returned for each row, after the same processes have compiled what the rivals need; and how many seconds
    every job took."""
    jobs: dict[tuple[str, str, str | None], list[int]] = {}  # one process for what shares kernels
    for (group, i), row in rows.items():
        for rival in (None, *(rival.name for rival in row.rivals if rival.compiled or rival.compiles)):
            jobs.setdefault((group, row.kernels or row.name, rival), []).append(i)
    order = sorted(jobs, key=lambda job: (job[2] not in AUTOTUNED, job[2] is not None))  # the longest first
    checked: dict[tuple[str, int], Result] = {}
    seconds: list[tuple[float, str]] = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [(job, pool.submit(prepare_rows, job[0], device, full, jobs[job], job[2])) for job in order]
        for job, future in running:
            with contextlib.suppress(BrokenProcessPool):  # what the others could not do is done before the row is timed
                found, took = future.result()
                checked.update({(job[0], i): result for i, result in zip(jobs[job], found, strict=True) if result})
                seconds.append((took, f"{job[2] or 'check'}, {job[0]}, {job[1]}"))
    return checked, sorted(seconds, reverse=True)
