"""Compile every kernel as its launcher would launch it, for any target, on a machine without a GPU.

    python -m triton_moe compile --target sm_90 --op attention

The launchers run on `meta` tensors: they allocate, look their configuration up and launch as ever, but `common.launch`
hands the kernel over to `compile_case` here. Triton then specialises on the real arguments (alignment, divisibility,
equality with 1) and compiles for the target that a stand-in for its driver reports.

Registers are those of one thread. Spills are the bytes of local memory one thread needs: the stack frame on NVIDIA,
scratch on AMD.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

TARGETS = {  # name: (backend, architecture, threads of a warp), bytes of shared memory one block may have
    "sm_80": (("cuda", 80, 32), 166912),
    "sm_90": (("cuda", 90, 32), 232448),
    "sm_100": (("cuda", 100, 32), 232448),
    "gfx942": (("hip", "gfx942", 64), 65536),
}
DTYPES = ("float16", "bfloat16", "float32")

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
    error: str | None = None


def targets() -> list[str]:
    return list(TARGETS)


def compile_all(target: str, dtypes: list[str], ops: list[str] | None = None) -> list[Compiled]:
    """Every kernel of `ops` (default: all) in each of `dtypes` for `target`, one after the other in this process."""
    return [
        row
        for op in (CASES if ops is None else ops)
        for shape in CASES[op][1]
        for dtype in dtypes
        for row in compile_case(target, dtype, op, shape)
    ]


def compile_case(target: str, dtype: str, op: str, shape: dict) -> list[Compiled]:
    """The kernels that one op launches, forward and backward, for one shape."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from .kernels import common

    if common.INTERPRET:
        raise RuntimeError("nothing can be compiled while TRITON_INTERPRET=1: unset it before Python starts")
    label = " ".join(f"{name}={value}" for name, value in shape.items())
    rows, seen = [], set()

    def compile_kernel(kernel, grid, args, meta):
        config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in meta.items()}
        row = Compiled(op, kernel.__name__, target, dtype, label, config, 0.0)
        start = time.perf_counter()
        try:
            compiled = kernel.warmup(*args, grid=grid, **meta)
            if compiled.hash in seen:  # the same kernel again, for other tensors
                return
            seen.add(compiled.hash)
            _measure(compiled, row)
        except Exception as error:  # whatever the compiler throws is this row's result, and the next kernel's turn comes
            row.error = f"{type(error).__name__}: {error}"
        row.seconds = round(time.perf_counter() - start, 3)
        rows.append(row)

    active, on_meta = driver._active, common.on_meta
    driver.set_active(_Driver(target, GPUTarget(*TARGETS[target][0])))
    common.on_meta = compile_kernel
    try:
        CASES[op][0](getattr(torch, dtype), **shape)
    finally:
        driver.set_active(active)
        common.on_meta = on_meta
    return rows


class _Driver:
    """As much of a Triton driver as compilation needs. Triton caches by device, so each target is its own device."""

    def __init__(self, name, target):
        self.name, self.target = name, target

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


# The launchers of each op, forward and backward, on meta tensors.


def _empty(dtype, *shape):
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


def _seed():
    import torch

    return _empty(torch.int64)


def _route(dtype, N, H, E, TOP_K, D):
    """weights, experts and the fields of a plan"""
    from .kernels import gating, sets

    args = _empty(dtype, N, D), _empty(dtype, H * E, D), None, 1, H, TOP_K, "sigmoid", 0.0, 0
    weights, experts, _ = gating.gating_forward(*args)
    plan = gating.routing_plan(experts, E, sets.fits(N, H, E, TOP_K, dtype))
    return weights[0], experts[0], *(t[0] for t in plan)


def _gating(dtype, sides, H, E, TOP_K, D, mode, dropout, N=4096):
    import torch

    from .kernels import gating, sets

    x, sel, seed = _empty(dtype, N, D), _empty(dtype, sides * H * E, D), _seed() if dropout else None
    routing = gating.gating_forward(x, sel, seed, sides, H, TOP_K, mode, dropout, 0)
    gating.routing_plan(routing[1], E, sets.fits(N, H, E, TOP_K, dtype))
    gating.gating_backward(torch.empty_like(routing[0]), torch.empty_like(routing[2]), x, sel, *routing, mode)


def _projection(dtype, H, E, TOP_K, P, D, N=4096):
    import torch

    from .kernels import common, projection

    precision = common.input_precision(dtype)
    x, w_v, w_o = _empty(dtype, N, D), _empty(dtype, H * E, D, P), _empty(dtype, H * E, P, D)
    routing = _route(dtype, N, H, E, TOP_K, D)
    v, u = projection.value_forward(x, w_v, *routing, True, precision)
    gates = projection.value_backward_gates(torch.empty_like(v), u, TOP_K)
    dlogits, sel = _empty(dtype, N, H * E), _empty(dtype, H * E, D)
    for added in ((None, None, None), (x, dlogits, sel)):
        projection.value_backward(torch.empty_like(v), x, w_v, gates, *routing[1:], *added, precision)
    y = projection.output_forward(v, w_o, *routing, precision)
    projection.output_backward(torch.empty_like(y), v, w_o, *routing, precision)
    projection.dropout_rows(y, _seed(), 0.1, 0)


def _mlp(dtype, E, G, TOP_K, D, activation, bias, dropout, N=4096):
    import torch

    from .kernels import common, mlp

    x, keys = _empty(dtype, N, D), _empty(dtype, E, D, 2 * G if activation in ("swiglu", "geglu") else G)
    values, biases = (
        _empty(dtype, E, G, D),
        (_empty(dtype, *keys.shape[::2]), _empty(dtype, D)) if bias else (None, None),
    )
    args = keys, values, *biases, _seed() if dropout else None, *_route(dtype, N, 1, E, TOP_K, D)[:4]
    options = activation, dropout, 0, common.input_precision(dtype)
    y, z = mlp.mlp_forward(x, *args, *options)
    dz, *_ = mlp.mlp_backward(torch.empty_like(y), x, *args, z, *options)
    for gate in ((None, None), (_empty(dtype, N, E), _empty(dtype, E, D))):
        mlp.mlp_backward_input(dz, keys, *args[-2:], TOP_K, *gate, options[-1], dtype)


def _attention(dtype, P, H=4, Hkv=4, causal=True, window=0, padding=False, packed=False, xl=0, T=1024):
    """`xl` is the model width of a Transformer-XL layer, with as many tokens of memory as queries."""
    import torch

    from .kernels import attention, common, position

    B, S = (1, T) if packed else (8, 2 * T if xl else T)
    q, k, v = (_empty(dtype, B, n, h, P) for n, h in ((T, H), (S, Hkv), (S, Hkv)))
    q_pos = position.xl_query(_empty(dtype, B, T, H, xl), xl, S - T, False) if xl else None
    k_pos = position.xl_keys(q, S, xl) if xl else None
    masks = _empty(torch.bool, B, S) if padding else None, _empty(torch.int32, 17) if packed else None
    args = q, k, v, q_pos, k_pos, *masks
    options = causal, window, P**-0.5, common.input_precision(dtype)
    o, lse = attention.attention_forward(*args, *options)
    dlse = torch.empty_like(lse) if padding else None
    attention.attention_backward(torch.empty_like(o), dlse, *args, o, lse, *options)


def _position(dtype, P, D, H=4, T=1024):
    from .kernels import position

    q, a = _empty(dtype, 8, T, H, P), _empty(dtype, 8, T, H, D)
    for conjugate in (False, True):
        position.rope_rotate_(q, P // 4 * 2, 10000.0, 0, conjugate)
    y = position.xl_query(a, D, T, False)
    position.xl_query(y, D, T, True)
    position.xl_keys(q, 2 * T, D)


CASES = {  # op: its launchers and the shapes to call them with, published ones and what lies at the edges
    "gating": (
        _gating,
        [
            {"sides": 2, "H": 4, "E": 4, "TOP_K": 2, "D": 1024, "mode": "sigmoid", "dropout": 0.0},
            {"sides": 2, "H": 2, "E": 5, "TOP_K": 3, "D": 412, "mode": "softmax_topk", "dropout": 0.1},
            {"sides": 1, "H": 1, "E": 565, "TOP_K": 24, "D": 1536, "mode": "softmax", "dropout": 0.1},
        ],
    ),
    "projection": (
        _projection,
        [
            {"H": 4, "E": 4, "TOP_K": 2, "P": 128, "D": 1024},
            {"H": 2, "E": 5, "TOP_K": 3, "P": 76, "D": 412},
            {"H": 4, "E": 16, "TOP_K": 4, "P": 100, "D": 1024},
        ],
    ),
    "mlp": (
        _mlp,
        [
            {"E": 16, "G": 128, "TOP_K": 8, "D": 1024, "activation": "relu", "bias": False, "dropout": 0.0},
            {"E": 16, "G": 128, "TOP_K": 4, "D": 412, "activation": "geglu", "bias": True, "dropout": 0.1},
        ],
    ),
    "attention": (
        _attention,
        [
            {"P": 64, "packed": True, "window": 256},
            {"P": 100, "padding": True, "causal": False, "Hkv": 2},
            {"P": 128},
            {"P": 256},
            {"P": 76, "H": 2, "Hkv": 2, "xl": 412},
        ],
    ),
    "position": (_position, [{"P": 82, "D": 412}]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", nargs="+", choices=targets(), default=targets(), help="default: all")
    parser.add_argument("--op", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows, with their configurations, to a file")


def run(args: argparse.Namespace) -> int:
    if args.json and not args.json.parent.is_dir():
        raise NotADirectoryError(f"--json: no directory {args.json.parent}")
    cases = [(t, d, op, shape) for op in args.op for shape in CASES[op][1] for d in args.dtype for t in args.target]
    start = time.perf_counter()
    header = f"{'op':<11}{'kernel':<28}{'dtype':<10}{'target':<8}{'regs':>5}{'spill B':>9}{'shared B':>10}{'s':>7}  shape"
    print(header)
    rows = []
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with _ctrl_c_later():
            futures = [(case, pool.submit(compile_case, *case)) for case in cases]
        for case, future in futures:
            for row in _result(future, case):
                rows.append(row)
                print(_line(row), flush=True)
    except KeyboardInterrupt:
        for child in active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    failed = [row for row in rows if row.error]
    spilling = sum(bool(row.spill_bytes) for row in rows)
    print(
        f"{len(rows)} kernels compiled in {time.perf_counter() - start:.0f} s: {len(failed)} failed, "
        f"{spilling} spill registers, {sum(bool(row.float_atomics) for row in rows)} use float atomics"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failed else 0


@contextmanager
def _ctrl_c_later():
    """A pool that is interrupted while it starts its threads can neither go on nor be shut down."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Triton prints the whole program when ptxas refuses it


def _result(future: Future, case: tuple) -> list[Compiled]:
    target, dtype, op, shape = case
    try:
        return future.result()
    except BrokenProcessPool as error:
        label = " ".join(f"{name}={value}" for name, value in shape.items())
        return [Compiled(op, "?", target, dtype, label, {}, 0.0, error=f"a compiler process died: {error}")]


def _line(row: Compiled) -> str:
    text = f"{row.op:<11}{row.kernel.strip('_'):<28}{row.dtype:<10}{row.target:<8}"
    if row.error:
        return f"{text}{'failed':>14}{'':>17}  {row.shape}: {row.error.strip().splitlines()[-1]}"
    return f"{text}{row.registers:>5}{row.spill_bytes:>9}{row.shared_bytes:>10}{row.seconds:>7.1f}  {row.shape}"
