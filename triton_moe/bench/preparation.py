"""All checks and all compiling, in several processes at once, before anything is timed."""

import contextlib
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from .correctness import check
from .groups import GROUPS
from .row import BACKWARD, Row, compiled, task
from .shared import AUTOTUNED
from .timing import Result, failure, release, runnable, seeded_inputs


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


CHECK, OURS = "check", "ours, compiled"


def prepare_rows(group: str, device: str, full: bool, indices: list[int], work: str) -> tuple[list[Result | None], float]:
    """In a process of its own: check rows, or run ours or a rival once -> results, seconds. The caches on disk then hold what was
    compiled."""
    rows, began = GROUPS[group](device, full), time.perf_counter()
    with quick_autotuning(threads=6):
        found = [check_row(rows[i]) if work == CHECK else run_once(rows[i], work) for i in indices]
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


def run_once(row: Row, work: str) -> None:
    with contextlib.suppress(Exception):  # it will be reported when it fails again
        inputs = {**seeded_inputs(row), "n_layers": 1}  # a model of one layer compiles what the whole one needs
        if work == OURS:
            tasks = [row.step(inputs) if row.step else task(row, inputs, compiled(row.ours))]
        else:
            built = next(rival for rival in row.rivals if rival.name == work).build(inputs)
            tasks = [t for _, t in built] if isinstance(built, list) else [built]
        for t in tasks:
            for timed in row.flops:
                if timed != BACKWARD:
                    runnable(row, t, timed)()
    release()


def jobs_of(rows: dict[tuple[str, int], Row]) -> dict[tuple[str, str, str], list[int]]:
    """(group, kernels, work): the rows it is for, which share kernels; the longest first, and what compiles our kernels before
    what joins them with others'."""
    jobs: dict[tuple[str, str, str], list[int]] = {}
    for (group, i), row in rows.items():
        works = [CHECK, *(rival.name for rival in row.rivals if rival.compiled or rival.compiles)]
        if row.step or any(rival.compiled for rival in row.rivals):
            works.append(OURS)
        for work in works:
            jobs.setdefault((group, row.kernels or row.name, work), []).append(i)
    return dict(sorted(jobs.items(), key=lambda job: (job[0][2] not in AUTOTUNED, job[0][2] != CHECK, job[0][2] == OURS)))


def prepare(
    rows: dict[tuple[str, int], Row], device: str, full: bool, processes: int
) -> tuple[dict[tuple[str, int], Result], list[tuple[float, str]]]:
    """What `check_row` returned for each row, after the same processes have compiled what all sides need; and how many seconds
    every job took."""
    checked: dict[tuple[str, int], Result] = {}
    seconds: list[tuple[float, str]] = []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [
            (group, kernels, work, indices, pool.submit(prepare_rows, group, device, full, indices, work))
            for (group, kernels, work), indices in jobs_of(rows).items()
        ]
        for group, kernels, work, indices, future in running:
            with contextlib.suppress(BrokenProcessPool):  # what the others could not do is done before the row is timed
                found, took = future.result()
                checked.update({(group, i): result for i, result in zip(indices, found, strict=True) if result})
                seconds.append((took, f"{group}, {kernels}: {work}"))
    return checked, sorted(seconds, reverse=True)
