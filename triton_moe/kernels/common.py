"""What every launcher shares: the one place that starts a kernel, the opaque-operator decorator, and the random bits.

NOTE [Interpreter]
    With TRITON_INTERPRET=1 kernels run on CPU tensors through NumPy, which has no bfloat16: the interpreter computes on the raw
    bits. So `launch` hands the kernel float32 copies of bfloat16 tensors and writes the results back, rounding to nearest.
    Kernels therefore need no flag for it; in exchange, casts to bfloat16 inside a kernel are only seen by a compiler, which is
    why tests/test_compile.py compiles every kernel in bfloat16.

NOTE [Meta tensors]
    A launcher called on `meta` tensors runs nothing. But first `launch` hands the kernel and its arguments to `on_launch`:
    compiler.py compiles them there, just as the launch would have, and the tuner keeps those that it wants to repeat.

NOTE [Sums of products]
    After tl.sum all threads that share a row hold its sum, and a store takes it from any of them. They do not always agree: the
    compiler makes a * b + (what another lane sent) one fma, so where every thread has one product, lane i holds a_i b_i, not
    rounded, plus a_j b_j, rounded, and lane j the reverse. compute-sanitizer's racecheck sees such sums as races. So products are
    added up tile by tile and summed over threads at the end, or a thread has several, whose own sum comes first. LayerNorm's
    rstd, for an odd width of at most 32, is left: a product a thread, in one warp. Its repeats were never seen to differ.

NOTE [Launches]
    A layer at a small size waits for the host, and most of that was Triton's: with 30 arguments it binds them by name, reads its
    environment, and asks the driver about every pointer. `start` does that once per kernel and kind of arguments: it keys
    what Triton specializes on (dtypes, pointers and integers divisible by 16, ones, values of constants) and starts the compiled
    kernel with plain addresses. A profiler's launch hooks, and HIP, which specializes on more, take the long way.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def uniform(seed, row, col, stream):
    """Uniform in [0, 1) from Philox4x32-10, key `seed`, counter (row, col, stream, 0): the top 24 bits of the first word.

    A function of its arguments alone, so a mask never depends on tile sizes. `row` and `col` are int32 and broadcast together.
    """
    row = (row + col * 0).to(tl.uint32)
    col = (row * 0 + col).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, row, col, row * 0 + stream, row * 0)
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@triton.jit
def find_tile(offsets_ptr, pid, GROUPS, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(group, first row, end of the group's rows) of tile `pid`; first >= end for a program without a tile."""
    offs_g = tl.arange(0, BLOCK_G)
    start = tl.load(offsets_ptr + offs_g, mask=offs_g < GROUPS, other=0)
    end = tl.load(offsets_ptr + offs_g + 1, mask=offs_g < GROUPS, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= pid).to(tl.int32), 0)
    here = offs_g == group
    first = tl.sum(tl.where(here, start + (pid - last + tiles) * BLOCK_M, 0), 0)
    return group, first, tl.sum(tl.where(here, end, 0), 0)


# Both Triton's own functions and ours were decorated for the interpreter: TRITON_INTERPRET was set in time.
INTERPRET = not any(isinstance(f, triton.runtime.JITFunction) for f in (uniform, tl.cdiv))

# What `launch` calls first, with (kernel, grid, args, meta-parameters); compiler.py and measure.py set it.
on_launch: Callable | None = None

# Writes down what `start` does; replay/recorder.py sets it.
recorder: Any = None

constants: dict[int, torch.Tensor] = {}  # by storage: tables that no argument's values have a part in, and that never change


def constant(t: torch.Tensor) -> torch.Tensor:
    """t, which stays as it is as long as the process lives."""
    constants[t.untyped_storage()._cdata] = t
    return t


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """Start `kernel` on the device of its first argument; an empty grid starts nothing. See the notes above."""
    if 0 in grid:
        return
    first = args[0]
    device = first.device if isinstance(first, torch.Tensor) else first.base.device
    if on_launch is not None:
        on_launch(kernel, grid, args, meta)
    if device.type == "meta":
        return
    if INTERPRET:
        with _disable_current_modes():
            started = _interpret(kernel, grid, args, meta)
    elif device.index == torch.cuda.current_device():
        started = start(kernel, grid, args, meta)
    else:
        with torch.cuda.device(device):
            started = start(kernel, grid, args, meta)
    if recorder is not None and recorder.thread == threading.get_ident():
        recorder.launch(started, grid, args)


def start(kernel, grid, args, meta) -> tuple[Any, ...]:
    """On the current device and its current stream. See NOTE [Launches]. -> the compiled kernel, what runs it, its arguments
    with addresses for tensors."""
    device = torch.cuda.current_device()
    key: list[Any] = [kernel.fn, device, *meta, *meta.values()]
    values: list[Any] = []
    for a, param in zip(args, kernel.params, strict=False):
        if isinstance(a, torch.Tensor):
            pointer = a.data_ptr()
            values.append(pointer)
            key.append(a.dtype if pointer % 16 == 0 else (a.dtype,))
            continue
        values.append(a)
        if isinstance(a, TensorDescriptor):
            key += [a.base.dtype, *a.block_shape]
        elif param.is_constexpr or a is None or isinstance(a, bool):
            key.append(a)
        elif isinstance(a, int):
            key.append((a == 1, a % 16 == 0, -(2**31) <= a < 2**31))
        else:
            key.append(type(a))
    known = tuple(key)
    ready = _ready.get(known)
    if ready is None or hooked():
        compiled = compile_and_start(kernel, grid, args, meta)
        ready = compiled, compiled.run, [meta[name] for name in kernel.arg_names[len(args) :]]
        if not (torch.version.hip or hooked()):
            _ready[known] = ready
        return *ready[:2], values + ready[2]
    compiled, run, rest = ready
    values += rest
    x, y, z = *grid, *(1,) * (3 - len(grid))
    run(x, y, z, current_stream()(device), compiled.function, compiled.packed_metadata, None, None, None, *values)
    return compiled, run, values


def hooked() -> bool:
    """Whether a profiler wants to know of every launch."""
    runtime = triton.knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)  # a chain of them, None, or a function


@functools.cache
def current_stream() -> Callable[[int], int]:
    """A device's current stream, as the driver takes it."""
    return triton.runtime.driver.active.get_current_stream


def compile_and_start(kernel, grid, args, meta):
    """With fewer stages where a block does not have the shared memory for more: the same result, a little later."""
    try:
        return kernel[grid](*args, **meta)
    except OutOfResources as error:
        if error.name != "shared memory" or meta.get("num_stages", 1) == 1:
            raise
        fewer = {**meta, "num_stages": meta["num_stages"] - 1}
        if (kernel, fewer["num_stages"]) not in _said:
            _said.add((kernel, fewer["num_stages"]))
            warnings.warn(f"{error} {kernel.__name__} runs with fewer; tune it: python -m triton_moe autotune", stacklevel=2)
        return compile_and_start(kernel, grid, args, fewer)


_ready: dict[tuple, tuple] = {}  # compiled kernels, by all that Triton distinguishes
_said: set[tuple] = set()  # warnings


def _interpret(kernel, grid, args, meta) -> Callable:
    """-> what does the same with other arguments."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by identity: a tensor passed twice stays one tensor
    for a in args:
        a = a.base if isinstance(a, TensorDescriptor) else a
        if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 and id(a) not in copies:
            span = 1 + sum((n - 1) * stride for n, stride in zip(a.shape, a.stride(), strict=True)) if a.numel() else 0
            storage = a.as_strided((span,), (1,)).float()  # all of a's memory: its strides, also 0, stay as they are
            copies[id(a)] = (a, storage.as_strided(a.shape, a.stride(), 0))
    before = [copy.clone() for _, copy in copies.values()]

    def copied(a):
        if isinstance(a, TensorDescriptor):
            return TensorDescriptor(copied(a.base), a.shape, a.strides, a.block_shape)
        return copies[id(a)][1] if id(a) in copies else a

    kernel[grid](*(copied(a) for a in args), **meta)
    for (a, copy), old in zip(copies.values(), before, strict=True):
        if not torch.equal(copy.view(torch.int32), old.view(torch.int32)):  # outputs only: inputs may be saved for backward
            a.copy_(copy)
    return lambda args: _interpret(kernel, grid, args, meta)


def opaque(fake: Callable, mutates: tuple[str, ...] = ()) -> Callable:
    """Make a launcher one opaque operator under torch.compile, and leave it a plain function call in eager mode.

    Dynamo can trace neither the interpreter nor a config lookup. `fake` returns empty outputs of the right shape and dtype. The
    launcher takes and returns tensors (or None), ints, floats, bools and strings, annotated; it returns fresh tensors only, and
    writes to no argument but those it `mutates`.
    """

    def decorate(function: Callable) -> Callable:
        op = torch.library.custom_op(f"triton_moe::{function.__name__}", function, mutates_args=mutates)
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args):
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        return call

    return decorate


@torch.compiler.assume_constant_result
def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32 operands: "ieee", or "tf32" where the user allowed torch the same.

    Read at every forward; under torch.compile when the graph is traced, as Dynamo cannot trace torch's getters.
    """
    if dtype != torch.float32 or not torch.cuda.is_available() or torch.version.hip:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch >= 2.9; get_float32_matmul_precision() raises once this has been set
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def next_power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of two >= n and >= least (16: the smallest side `tl.dot` takes everywhere)."""
    return max(least, 1 << (n - 1).bit_length()) if n > 0 else least


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, D] or [B, T, H, P] as the kernels take it: unit stride along the last axis, and rows (and heads) a constant of the
    model apart. A stride beyond 32 widths depends on the number of tokens, as in x[:, -1] or a transposed [B, H, T, P]: it
    would compile the kernel anew for each length, so those tensors are copied.
    """
    width = x.shape[-1] if x.ndim == 2 else x.shape[-2] * x.shape[-1]
    constant = x.stride(-1) == 1 and all(stride <= 32 * width for stride in x.stride()[x.ndim // 2 - 1 : -1])
    return x if constant else x.contiguous()


def default_config(configs: dict[str, dict[str, int]], dtype: torch.dtype) -> dict[str, int]:
    """A copy of a kernel's default for a dtype, or of its rung for the interpreter, which pays per launch and per tile whatever
    the tile, so that it wants few and large ones."""
    return dict(configs["interpret" if INTERPRET else "float32" if dtype == torch.float32 else "half"])


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def interpreter_hint() -> str:
    state = "is set, but was not when Triton was first imported" if os.environ.get("TRITON_INTERPRET") == "1" else "is not set"
    return (
        "triton_moe runs on CUDA devices, and on the CPU through Triton's interpreter only; TRITON_INTERPRET=1 "
        f"{state}: set it in the environment before Python starts"
    )
