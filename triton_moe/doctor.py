"""`python -m triton_moe doctor`: what is installed here, which launch configurations would be used, and what to do next."""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import warnings
from collections import Counter

from . import __version__, tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="paper", choices=("paper", "moeut", "llm"), help="for which shapes (default paper)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when something is wrong."""
    import torch

    from .compiler import this_gpu

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    print(f"triton-moe {__version__}, Python {platform.python_version()}, torch {torch.__version__}, Triton {version('triton')}")
    device = this_gpu()
    if device is None:
        print("GPU        none that torch sees: kernels run in Triton's interpreter, slowly")
    else:
        print(f"GPU        {device.name}, {device.arch}, {device.shared} bytes of shared memory a block, driver {_driver()}")
    bad = _files()
    if device is None:
        print("next       on a machine with a GPU: python -m triton_moe autotune; here: python -m triton_moe autotune --dry-run")
        return 1 if bad else 0
    kinds = _configurations(device, args.preset)
    missing = sum(kinds.values()) - kinds["exact"]
    if bad:
        print("next       correct or delete the invalid files above")
    elif missing:
        print(
            f"next       python -m triton_moe autotune --preset {args.preset}  ({missing} of these {sum(kinds.values())} to tune)"
        )
    else:
        print("next       nothing: all of these are tuned for this GPU")
    print(f"digest     {tuning.digest(device)} (equal on all ranks of a job, if they are to choose alike)")
    return 1 if bad else 0


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _files() -> int:
    """Print what is in the folders; the number of files that cannot be used."""
    bad = 0
    for folder in tuning.folders():
        print(f"folder     {folder}{'' if folder.is_dir() else ' (does not exist)'}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuning.reload()
        for op in tuning.OPS:
            for file in tuning.files(op):
                print(f"  file     {file.path}: {len(file.entries)} entries for {file.device.name}")
    for warning in caught:
        bad += 1
        print(f"  INVALID  {warning.message}")
    return bad


def _configurations(device: tuning.Device, preset: str) -> Counter:
    from .compiler import lookups
    from .workloads import PRESETS

    kinds: Counter = Counter()
    for op, dtype, shape in PRESETS[preset]:
        print(f"{op} {dtype} " + " ".join(f"{name}={value}" for name, value in shape.items()))
        for kernel, key, _ in lookups(op, device.arch, dtype, shape):
            if key.kernel in tuning.space(tuning.op_of(kernel)):
                found = tuning.resolve(kernel, key, device)
                kind = "stale" if found.kind == "default" and found.stale else found.kind
                kinds[kind] += 1
                print(f"  {kind:<9}{key.kernel:<20}{found.why}")
    print(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return kinds


if os.environ.get("TRITON_INTERPRET") == "1":  # the command line unsets it; see __main__.py
    warnings.warn("TRITON_INTERPRET=1 is set: kernels run in the interpreter even where there is a GPU", stacklevel=1)
