"""LayerNorm of a residual stream, with the sums that stand around it, in one pass over the rows each way.

    s = x + a              where a branch's output a joins the stream, rounded to its dtype; s = x where none does
    h = (s - m) r w + b    m = the mean of s over its row, r = (its variance + eps)^(-1/2)

Backwards, with g = dh w and z = (s - m) r, d s being the gradient of s from all that follows but h:

    d x = d a = d s + r (g - mean(g) - z mean(g z))    d w = sum over rows of dh z    d b = sum over rows of dh

All is bound by memory. The stream and its gradient keep their dtype; h and dh are of the dtype of the products, and so is the
copy of d x that the branch's own backward pass takes. A program has whole rows in its registers, so that mean and variance take
two passes over them and none over memory. d w and d b are sums over a fixed set of rows in each program, and then over programs.
s itself is never written: whoever needs it adds x and a again, and of 16 bits a is half as much to read, and to keep, as s.

On an H200, N = 32768, D = 1024, a float32 stream and bfloat16 products: 51 us forward and 119 backward, and the two norms of a
block together 114 and 255, which is 3.9 to 4.1 TB/s of what must be moved (a copy of the stream: 4.1). Programs of 1 to 8 warps
with 8 to 64 elements a thread took 50 to 62 us forward and 119 to 235 backward, where too few or too many programs cost most.
"""

import torch
import triton
import triton.language as tl

from .common import INTERPRET, cdiv, launch, next_power_of_2, opaque, rows

# ---- jit helpers


@triton.jit
def _sum(x_ptr, added_ptr, offs_n, offs_d, mask, stride_x: tl.constexpr, stride_added: tl.constexpr):
    """x + a as the stream would store it, float32."""
    x = tl.load(x_ptr + offs_n[:, None] * stride_x + offs_d[None, :], mask=mask, other=0.0)
    if added_ptr is not None:
        added = tl.load(added_ptr + offs_n[:, None] * stride_added + offs_d[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return x.to(tl.float32)


# ---- kernels


@triton.jit
def _norm_fwd_kernel(
    x_ptr, added_ptr, weight_ptr, bias_ptr, h_ptr, mean_ptr, rstd_ptr, N, eps, D: tl.constexpr,
    stride_x: tl.constexpr, stride_added: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n, mask_d = offs_n < N, offs_d < D
    mask = mask_n[:, None] & mask_d[None, :]
    x = _sum(x_ptr, added_ptr, offs_n, offs_d, mask, stride_x, stride_added)
    mean = tl.sum(x, axis=1) * (1.0 / D)
    z = tl.where(mask_d[None, :], x - mean[:, None], 0.0)
    z = tl.where(mask_d[None, :], z - (tl.sum(z, axis=1) * (1.0 / D))[:, None], 0.0)  # what the mean's own rounding left
    rstd = tl.rsqrt(tl.sum(tl.fma(z, z, 0.0), axis=1) * (1.0 / D) + eps)  # see NOTE [Sums of products]
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    h = z * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(h_ptr + offs_n[:, None] * D + offs_d[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_n, mean, mask=mask_n)
    tl.store(rstd_ptr + offs_n, rstd, mask=mask_n)


@triton.jit
def _norm_bwd_kernel(
    dh_ptr, dsum_ptr, x_ptr, added_ptr, mean_ptr, rstd_ptr, weight_ptr, dx_ptr, copy_ptr, parts_ptr, N, D: tl.constexpr,
    stride_dh: tl.constexpr, stride_dsum: tl.constexpr, stride_x: tl.constexpr, stride_added: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of as many tiles of rows as there are programs, one; then the next ones. And their part of d w and d b."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(pid, tl.cdiv(N, BLOCK_N), programs):
        offs_n = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_d[None, :]
        dh = tl.load(dh_ptr + offs_n[:, None] * stride_dh + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        x = _sum(x_ptr, added_ptr, offs_n, offs_d, mask, stride_x, stride_added)
        dsum = tl.load(dsum_ptr + offs_n[:, None] * stride_dsum + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0)
        rstd = tl.load(rstd_ptr + offs_n, mask=mask_n, other=0.0)
        z = tl.where(mask_d[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dh * z
        dbias += dh
        g = tl.fma(dh, weight[None, :], 0.0)  # rounded: a row of equal g must give g - mean(g) = 0, as its r may be large
        mean_g, mean_z = tl.sum(g, axis=1) * (1.0 / D), tl.sum(z, axis=1) * (1.0 / D)  # of z, what the mean's rounding left
        mean_gz = tl.sum(tl.fma(g, z, 0.0), axis=1) * (1.0 / D) - mean_g * mean_z
        dx = dsum + (g - mean_g[:, None] - (z - mean_z[:, None]) * mean_gz[:, None]) * rstd[:, None]
        offs = offs_n[:, None] * D + offs_d[None, :]
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + offs, dx.to(copy_ptr.dtype.element_ty), mask=mask)
    parts_ptrs = parts_ptr + pid * D + offs_d
    tl.store(parts_ptrs, tl.sum(dweight, axis=0), mask=mask_d)
    tl.store(parts_ptrs + programs * D, tl.sum(dbias, axis=0), mask=mask_d)


@triton.jit
def _norm_sum_kernel(
    parts_ptr, dweight_ptr, dbias_ptr, programs, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """d w from the first half of the parts [2, programs, D], d b from the second."""
    tiles = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    side = pid // tiles
    offs_d = pid % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for p in range(0, programs, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        ptrs = parts_ptr + (side * programs + offs_p)[:, None] * D + offs_d[None, :]
        acc += tl.load(ptrs, mask=(offs_p < programs)[:, None] & mask_d[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if side == 0:
        tl.store(dweight_ptr + offs_d, total.to(dweight_ptr.dtype.element_ty), mask=mask_d)
    else:
        tl.store(dbias_ptr + offs_d, total.to(dbias_ptr.dtype.element_ty), mask=mask_d)


# ---- launchers

ELEMENTS = 2048  # of a program, or one row
PER_THREAD = 16
WARPS = 2112  # of all programs of the backward pass: 16 on each multiprocessor of an H200


def _tile(D):
    """Rows as a power of two of columns. It follows from D alone, as does the order of a row's sums."""
    block_d = next_power_of_2(D, 1)
    block_n = 16 if INTERPRET else max(1, ELEMENTS // block_d)
    num_warps = min(16, max(1, block_n * block_d // (32 * PER_THREAD)))
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": num_warps}


def _rows(x, added):
    """Both as the kernels take them, and how far apart their rows are."""
    x, added = rows(x), None if added is None else rows(added)
    return x, added, {"stride_x": x.stride(0), "stride_added": 0 if added is None else added.stride(0)}


def _norm_forward_fake(x, added, weight, bias, eps, dtype):
    statistics = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), *statistics


@opaque(_norm_forward_fake)
def norm_forward(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x, added [N, D], weight, bias [D] -> h [N, D] in dtype, mean and rstd [N] float32."""
    h, mean, rstd = _norm_forward_fake(x, added, weight, bias, eps, dtype)
    N, D = x.shape
    x, added, strides = _rows(x, added)
    tile = _tile(D)
    launch(
        _norm_fwd_kernel, (cdiv(N, tile["BLOCK_N"]),),
        x, added, weight.contiguous(), bias.contiguous(), h, mean, rstd, N, eps, D=D, **strides, **tile,
    )  # fmt: skip
    return h, mean, rstd


def _norm_again_fake(x, added, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@opaque(_norm_again_fake)
def norm_again(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """The h of `norm_forward` once more. An operator of its own, as a compiler keeps the result of a call that occurs twice."""
    return norm_forward(x, added, weight, bias, eps, dtype)[0]


def _norm_backward_fake(dh, dsum, x, added, mean, rstd, weight, copied, dweight_dtype, dbias_dtype):
    N, D = x.shape
    dweight, dbias = (weight.new_empty(D, dtype=dtype) for dtype in (dweight_dtype, dbias_dtype))
    return x.new_empty(N, D), dh.new_empty(N if copied else 0, D), dweight, dbias


@opaque(_norm_backward_fake)
def norm_backward(
    dh: torch.Tensor, dsum: torch.Tensor, x: torch.Tensor, added: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor,
    weight: torch.Tensor, copied: bool, dweight_dtype: torch.dtype, dbias_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dh, dsum [N, D] and what the forward had -> dx in x's dtype, where `copied` the same in dh's (no rows elsewhere), d weight
    and d bias."""
    dx, copy, dweight, dbias = _norm_backward_fake(dh, dsum, x, added, mean, rstd, weight, copied, dweight_dtype, dbias_dtype)
    N, D = x.shape
    dh, dsum = rows(dh), rows(dsum)
    x, added, strides = _rows(x, added)
    tile = _tile(D)
    programs = min(WARPS // tile["num_warps"], cdiv(N, tile["BLOCK_N"]))
    parts = x.new_empty(2, programs, D, dtype=torch.float32)
    launch(
        _norm_bwd_kernel, (programs,),
        dh, dsum, x, added, mean, rstd, weight.contiguous(), dx, copy if copied else None, parts, N,
        D=D, stride_dh=dh.stride(0), stride_dsum=dsum.stride(0), **strides, **tile,
    )  # fmt: skip
    launch(_norm_sum_kernel, (2 * cdiv(D, 16),), parts, dweight, dbias, programs, D=D, BLOCK_P=512, BLOCK_D=16, num_warps=4)
    return dx, copy, dweight, dbias
