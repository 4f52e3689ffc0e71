"""What the kernels of attention share: where a program stands, tiles of rows in one or two parts, and products of them."""

import triton
import triton.language as tl


@triton.jit
def _exp(x):
    """exp(x) for x <= 0, within about one ulp where `tl.exp`, which rounds x * log2(e), is four wrong at best: exp(x) =
    2^n exp(r), r = x - n ln 2 in two steps, |r| < 0.35, by Taylor."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, n * 0.0 - 0.693359375, x)  # ln 2 = 0.693359375 - 2.12194440e-4, the first exact times any n
    r = tl.fma(n, n * 0.0 + 2.12194440e-4, r)
    p = r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0))))))
    return tl.where(n <= -150.0, 0.0, tl.exp2(n) * (1.0 + (r + r * p)))  # NaN stays


@triton.jit
def _place(tiles, sections):
    """The tile, in order of launch, and the head of this program. See NOTE [Order]."""
    pid = tl.program_id(0)
    heads = (tl.num_programs(0) // tiles).to(tl.int64)
    section = ((pid // tiles + 1) * sections.to(tl.int64) - 1) // heads
    first = (section * heads // sections).to(tl.int32)
    width = ((section + 1) * heads // sections).to(tl.int32) - first
    pid -= first * tiles
    return pid // width, first + pid % width


@triton.jit
def _zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros((ROWS, COLS), tl.float32)


@triton.jit
def _zero_chunks(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(CHUNKS)):
        parts = parts + (_zeros(ROWS, CHUNKS[i]),)
    return parts


@triton.jit
def _load_chunk(ptr, offs, cols, mask_rows, INSIDE: tl.constexpr, WIDTH: tl.constexpr):
    ptrs = ptr + (offs[:, None] + cols[None, :])
    if INSIDE:
        if mask_rows is None:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=mask_rows[:, None], other=0.0)
    else:
        mask = (cols < WIDTH)[None, :]
        if mask_rows is not None:
            mask = mask & mask_rows[:, None]
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _load_rows(
    ptr, b, h, first, stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr, mask_rows,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr = 0,
):  # fmt: skip
    """The BLOCK rows x[b, first:, h] as a tuple of [BLOCK, chunk], zero in masked rows and beyond WIDTH channels. With HALF the
    first two parts hold as many channels each."""
    ptr += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    offs = tl.arange(0, BLOCK) * stride_t
    parts = ()
    start: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        cols = start + tl.arange(0, CHUNKS[i])
        end = (i + 1) * HALF if i < 2 and HALF > 0 else WIDTH
        parts = parts + (_load_chunk(ptr, offs, cols, mask_rows, start + CHUNKS[i] <= end, end),)
        start = end if i < 2 and HALF > 0 else start + CHUNKS[i]
    return parts


@triton.jit
def _store_rows(
    ptr, x, b, h, first, stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr, mask_rows,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr = 0,
):  # fmt: skip
    ptr += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    offs = tl.arange(0, BLOCK) * stride_t
    start: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        cols = start + tl.arange(0, CHUNKS[i])
        end = (i + 1) * HALF if i < 2 and HALF > 0 else WIDTH
        start = end if i < 2 and HALF > 0 else start + CHUNKS[i]
        mask = mask_rows[:, None] & (cols < end)[None, :]
        tl.store(ptr + (offs[:, None] + cols[None, :]), x[i].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dot_rows(a, b, PRECISION: tl.constexpr):
    """A B^T."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def _add_positions(
    s, q_pos_ptr, k_pos_ptr, h, t, n, mask_t, mask_n, H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_M, BLOCK_N] + q_pos . k_pos of the queries from t and the keys from n on, BLOCK_F channels at a time."""
    q_ptrs = q_pos_ptr + (t.to(tl.int64) * H + h) * F + (tl.arange(0, BLOCK_M) * (H * F))[:, None]
    k_ptrs = k_pos_ptr + n.to(tl.int64) * F + (tl.arange(0, BLOCK_N) * F)[:, None]
    for f in range(0, F, BLOCK_F):
        cols = f + tl.arange(0, BLOCK_F)[None, :]
        keep_q = cols < F if mask_t is None else (cols < F) & mask_t[:, None]
        keep_k = cols < F if mask_n is None else (cols < F) & mask_n[:, None]
        q = tl.load(q_ptrs + cols, mask=keep_q, other=0.0)
        k = tl.load(k_ptrs + cols, mask=keep_k, other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    return s


@triton.jit
def _add_dots(acc, p, x, PRECISION: tl.constexpr):
    """acc + P X."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(p, x[i], acc[i], input_precision=PRECISION),)
    return parts


@triton.jit
def _times(x, factor):
    parts = ()
    for i in tl.static_range(len(x)):
        parts = parts + (x[i] * factor,)
    return parts
