"""Every configuration that may be tuned, run on this GPU: values and gradients against float64, into memory filled with NaN.

python tests/space.py --processes 16 --budget 300 --rows rows.jsonl

Takes the cases of `compile --all` and a few more, one for each kind of lookup, in bfloat16 and float32, in a random order. A
configuration that crashes, hangs or is wrong costs only itself. Rows are appended as they come, and those that are there are not
checked again. One runs as it would for a user: in fewer stages where it does not fit the shared memory, in two where one is known
to be wrong (NOTE [One stage] in triton_moe/kernels/attention). Exit code 1: one was wrong, or not reached.
"""

import argparse
import json
import queue
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

from triton_moe import compiler
from triton_moe.measure import Failed, Measurer

# Widths of which no case of `compile` has a tile: values in two parts, rotated on load and not.
HALVES = {"H": 2, "causal": False, "rope": "halves"}
MORE = {"attention": [{"P": 76, **HALVES}, {"P": 40, **HALVES}, {"P": 80, "H": 2, "T": 500}]}
PIECE = 40  # configurations that a process takes at a time; first it computes what is right for their case


def work(pieces: queue.Queue, rows, until: float) -> None:
    measurer = Measurer(seconds=120)
    while time.monotonic() < until:
        try:
            case, some = pieces.get_nowait()
        except queue.Empty:
            break
        try:
            measurer.open(*case)
        except Failed as problem:
            for name, key, config in some:
                rows({"name": name, "case": str(case), "kernel": key.kernel, "config": config, "verdict": f"defaults: {problem}"})
            continue
        for name, key, config in some:
            if time.monotonic() > until:
                break
            try:
                measurer.check(key, config)
                verdict = "right"
                measurer.forget(key, [config])
            except Failed as problem:
                verdict = str(problem)
            rows({"name": name, "case": str(case), "kernel": key.kernel, "config": config, "verdict": verdict})
    measurer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--budget", type=float, default=300, help="seconds (default 300)")
    parser.add_argument("--part", default="1/1", help="2/3: every third configuration, from the second on (default: all)")
    parser.add_argument("--rows", type=Path, default=Path("space.jsonl"))
    options = parser.parse_args()

    until = time.monotonic() + options.budget
    device = compiler.this_gpu()
    if device is None:
        parser.error("needs a GPU")
    shapes = [(op, s) for op, some in compiler.CASES.items() for s in [*some, *MORE.get(op, [])]]
    jobs = [(device.arch, d, op, s) for op, s in shapes for d in ("bfloat16", "float32")]
    part, parts = map(int, options.part.split("/"))
    space = dict(list(compiler.whole_space(jobs).items())[part - 1 :: parts])
    seen = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    done = {row["name"]: row for row in seen if row["name"] in space}

    cases = defaultdict(list)
    for name, (_, dtype, op, shape, key, config) in space.items():
        if name not in done:
            cases[op, dtype, json.dumps(shape)].append((name, key, config))
    pieces: queue.Queue = queue.Queue()
    for start in range(0, max(map(len, cases.values()), default=0), PIECE):
        for (op, dtype, shape), some in cases.items():
            if some[start : start + PIECE]:
                pieces.put(((op, dtype, json.loads(shape)), some[start : start + PIECE]))

    lock = threading.Lock()
    with options.rows.open("a") as file:

        def write(row):
            with lock:
                file.write(json.dumps(row) + "\n")
                file.flush()
                done[row["name"]] = row

        threads = [threading.Thread(target=work, args=(pieces, write, until)) for _ in range(options.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    wrong = [row for row in done.values() if row["verdict"] != "right"]
    for row in wrong:
        print(row["kernel"], row.get("config"), row["case"], row["verdict"])
    kernels = Counter(key.kernel for _, _, _, _, key, _ in space.values())
    right = Counter(row["kernel"] for row in done.values() if row["verdict"] == "right")
    for kernel, all_of_it in kernels.items():
        print(f"{kernel}: {right[kernel]} of {all_of_it} right")
    print(f"{sum(right.values())} of {len(space)} right, {len(wrong)} wrong, {len(space) - len(done)} not reached")
    return bool(wrong) or len(done) < len(space)


if __name__ == "__main__":
    sys.exit(main())
