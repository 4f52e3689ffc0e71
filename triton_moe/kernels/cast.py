"""Casts: of one large tensor, and of all the weights of a layer side by side in one launch.

    cast       y = x in another dtype
    assemble   w [A, R, C] -> [A, R', C'], cut off or filled up with zeros; those of one group one after another

Both are bound by memory. torch's own float32 to bfloat16 took 100 us for [32768, 1024] on an H200, this cast 47; and to
cast, pad and join the weights of SwitchHead one by one cost the host 280 of the 1750 us of a profiled forward pass. To cut the
padding off their gradients, 8 operators of torch, cost it 145 of the 635 us of a replayed backward pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .common import INTERPRET, cdiv, launch, next_power_of_2, opaque

BLOCK = 4096
MOST = 6  # weights in one launch

# ---- kernels


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < SIZE, other=0.0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def _place(
    w_ptr, out_ptr, program, PROGRAMS: tl.constexpr, SIZE: tl.constexpr, A: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, FULL_R: tl.constexpr, FULL_C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one weight, and zeros up to the next one: nothing where `program` is not one of its own."""
    if (program >= 0) & (program < PROGRAMS):
        offs = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if SIZE < 2**31:
            offs = offs.to(tl.int32)
        c, r = offs % FULL_C, offs // FULL_C % FULL_R
        if N > 0:
            r = tl.where(r < N, r % 2 * (N // 2) + r // 2, r)
        elif N < 0:
            r = tl.where(r < -N, r % (-N // 2) * 2 + r // (-N // 2), r)
        source = (offs // (FULL_R * FULL_C) * R + r) * C + c
        w = tl.load(w_ptr + source, mask=(offs < A * FULL_R * FULL_C) & (r < R) & (c < C), other=0.0)
        tl.store(out_ptr + offs, w.to(out_ptr.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def _assemble_kernel(
    w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, out_ptr, SHAPES: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """SHAPES: for each weight its first program, how many it has, where it begins in `out`, and SIZE to N of `_place`."""
    ptrs = (w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr)
    for i in tl.static_range(COUNT):
        _place(
            ptrs[i], out_ptr + SHAPES[10 * i + 2], tl.program_id(0) - SHAPES[10 * i], SHAPES[10 * i + 1], SHAPES[10 * i + 3],
            SHAPES[10 * i + 4], SHAPES[10 * i + 5], SHAPES[10 * i + 6], SHAPES[10 * i + 7], SHAPES[10 * i + 8],
            SHAPES[10 * i + 9], BLOCK,
        )  # fmt: skip


# ---- launchers


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another floating dtype; a compiler joins the cast with what stands next to it."""
    if x.dtype == dtype or not x.is_contiguous() or INTERPRET or torch.compiler.is_compiling():
        return x.to(dtype)
    y = torch.empty_like(x, dtype=dtype)
    launch(_cast_kernel, (cdiv(x.numel(), BLOCK),), x, y, x.numel(), BLOCK=BLOCK, num_warps=8)
    return y


def _assemble_fake(weights, layout, dtype):
    return weights[0].new_empty(layout[-1], dtype=dtype)


@opaque(_assemble_fake)
def _assemble(weights: list[torch.Tensor], layout: list[int], dtype: torch.dtype) -> torch.Tensor:
    """layout: of each weight [A, R, C] its first element in the result, R', C' and pairs; then the size of the result."""
    out = _assemble_fake(weights, layout, dtype)
    block = next_power_of_2(min(out.numel(), 1 << 18)) if INTERPRET else BLOCK
    for start in range(0, len(weights), MOST):
        some = [w.contiguous() for w in weights[start : start + MOST]]
        shapes: list[int] = []
        programs = 0
        for i, w in enumerate(some, start):
            begin, *full, pairs, end = layout[4 * i : 4 * i + 5]
            size = end - begin
            shapes += [programs, cdiv(size, block), begin, size, *w.shape, *full, pairs]
            programs += cdiv(size, block)
        ptrs = some + some[:1] * (MOST - len(some))
        launch(_assemble_kernel, (programs,), *ptrs, out, SHAPES=tuple(shapes), COUNT=len(some), BLOCK=block, num_warps=8)
    return out


def assemble(dtype: torch.dtype, *groups: tuple[tuple[torch.Tensor, ...], tuple[Any, int], Any]) -> list[torch.Tensor]:
    """Of each group, its weights [A, R, C], (R', C') and n, the tensor [sum of A, R', C'] in dtype: a weight itself where nothing
    is to be done. The first n rows become 0, n/2, 1, n/2 + 1, ..., the pairs of position.py; those of -n go back. Where weights
    of a group differ in R' and n, tuples of them, it is [sum of A * R', C']."""
    weights: list[torch.Tensor] = []
    layout: list[int] = []
    places: list[Any] = []
    size = 0
    for group, (rows, columns), pairs in groups:
        if len(group) == 1 and group[0].dtype == dtype and group[0].shape[1:] == (rows, columns) and pairs == 0:
            places.append(None)
            continue
        begin, each = size, isinstance(rows, tuple)
        for w, r, n in zip(group, rows if each else [rows] * len(group), pairs if each else [pairs] * len(group), strict=True):
            weights.append(w)
            layout += [size, r, columns, n]
            size += w.shape[0] * r * columns
        places.append((begin, size, (-1, columns) if each else (-1, rows, columns)))
        size = cdiv(size, 64) * 64  # every group begins on 16 bytes
    if not weights:
        return [group[0] for group, _, _ in groups]
    out = _assemble(weights, [*layout, size], dtype)
    return [
        group[0] if place is None else out[place[0] : place[1]].view(place[2])
        for (group, _, _), place in zip(groups, places, strict=True)
    ]
