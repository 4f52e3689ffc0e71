"""`python -m triton_moe bench`: our kernels beside their rivals, after checking their results.

Each row first compares our output and every gradient with `reference/` in float64, held to the bar of testing.assert_close. It
does so at the timed size: the cotangent is zero everywhere but on the last sequence, so all gradients are those of that sequence
alone, which the reference computes in no time. A row that fails is not timed. Then ours and one rival run alternately in the same
process, and medians are compared. Without a GPU only the checks run, on tiny shapes in Triton's interpreter.

Read row.py (what a row is), correctness.py (the check) and timing.py first. The rows by group are in gating.py, projection.py
(its rivals in peers.py), mlp.py, attention.py, layers.py and models.py; shared.py has what they share, groups.py lists them.
preparation.py checks and compiles all rows in parallel, report.py prints, results.py makes the README's tables of a JSON. The
command is here.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..demo import positive, write_atomically, write_problem
from .groups import GROUPS
from .preparation import prepare, quick_autotuning
from .report import as_json, header, show
from .results import render
from .timing import EAGER, GRAPHS, Result, measure

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
    parser.add_argument(
        "--render",
        type=Path,
        nargs=2,
        metavar=("JSON", "README"),
        help="measure nothing: put that JSON's tables there, and plot it",
    )
    parser.add_argument("--repeats", type=positive, default=20, help="samples behind each median (default 20)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when a row failed its check; 2 when the arguments are wrong."""
    if args.render:
        return render(*args.render)
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
    seconds: list[tuple[float, str]] = []
    if device == "cuda":
        print("bfloat16, random inputs; ratio = our median time over the rival's, both measured in turns in this run;")
        print("TFLOP/s = useful work alone; floor = FLOPs at 717 TFLOP/s or bytes at 4.27 TB/s (an H200's), whichever takes")
        print("longer; error = the largest relative error of output and gradients against reference/ in float64;")
        print("peak memory = above the inputs and results, ours and the rival's; of a training step, all of it;")
        print(f"a sample is {GRAPHS:g} ms or more of passes one after the other, without CUDA graphs {EAGER:g} ms, on both sides")
        print(f"checking and compiling {len(rows)} rows ...", end=" ", flush=True)
        memory = torch.cuda.get_device_properties(0).total_memory
        processes = min((os.cpu_count() or 1) - 2, memory // (10 << 30))
        if processes > 1:
            os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each process would start as many as there are cores
            checked, seconds = prepare(rows, device, args.full, processes)
        print(f"{time.perf_counter() - start:.0f} s; {processes} processes, the longest jobs:")
        for took, job in seconds[:5]:
            print(f"    {took:.0f} s {job}")
    else:
        print("no GPU: tiny shapes in float32, to check results only; times in the interpreter mean nothing")
    results, group = [], None
    with quick_autotuning(threads=os.cpu_count() or 1):
        for key, row in rows.items():
            if key[0] != group:
                group = key[0]
                print(f"\n{group}")
            found = [replace(r, group=group) for r in measure(row, args.repeats, device == "cuda", checked.get(key))]
            show(row.name, found)
            results += found
            if args.json:  # at every row, for whoever interrupts it
                write_atomically(args.json, as_json(about, results))
    if device == "cuda":
        print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        print(f"wrote {args.json}")
    return 1 if any(result.failed for result in results) else 0
