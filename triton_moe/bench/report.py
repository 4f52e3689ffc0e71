"""What is printed, and the JSON."""

import json
import math
import sys
from dataclasses import asdict
from typing import Any

import torch

from .timing import Result


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
    rate = f", {r.flops / r.ours_ms / 1e9:.0f} TFLOP/s" if r.flops else ""
    rate += f", {r.tokens / r.ours_ms * 1e3:,.0f} tokens/s" if r.tokens else ""
    parts = [f"{r.work}: ours {r.ours_ms:.3f} ms{rate}", f"{r.rival} {r.rival_ms:.3f} ms", ratio]
    if r.milliseconds:
        parts.append(f"ours in ms: {r.milliseconds.verdict(r.ours_ms)}")
    if r.floor_ms:
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
