"""Fused attention: softmax over the keys without a [T, S] tensor.

    s_ij = scale * (q_i . k_j + q_pos_i . k_pos_j)   where query i sees key j, else -inf
    o_i  = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)

    delta_i = do_i . o_i                   ds_ij = p_ij (do_i . v_j - delta_i + dlse_i)
    dv_j = sum_i p_ij do_i                 dk_j = scale * sum_i ds_ij q_i
    dq_i = scale * sum_j ds_ij k_j         dq_pos_i = scale * sum_j ds_ij k_pos_j

Query head h reads key head h // GROUP, GROUP = H // Hkv. q_pos and k_pos carry the Transformer-XL term (xl.py): F channels, k_pos
[S, F] a constant table. Masks: masks.py. A query that sees no key has o = 0, lse = -inf and zero gradients.

NOTE [Order]
    The heads go in sections, one after the other, of as many as SECTION_BYTES hold the rows of, so that the second-level cache
    keeps what their programs share; in a section the longest tiles of a causal mask start first. At T 1024 (NOTE [Hopper])
    that takes the forward pass from 112 to 105 us, dq from 151 to 133 and dk with dv from 212 to 197. Sections differ by one head
    at most: a small one at the end would leave most of the device idle during its longest tiles.

NOTE [Position channels]
    The Transformer-XL term is a second product of queries and keys, so a tile of queries holds the F channels of q_pos beside
    those of q, a tile of keys those of k_pos, and dq_pos is made with dq: nothing has T^2 elements. That is for at most
    WIDEST_POSITIONS channels of 16 bits. More, or float32, would not fit: then scores take POSITION_CHUNK channels at a time, and
    so does dq_pos, in programs that make the scores once more.

NOTE [Float32]
    What rounds float32 most is not the products but the differences. So without tf32 (EXACT) scores and lse stay in natural
    units and exp is our own; 16-bit inputs and tf32 fold log2(e) into the scale, as exp2 is what the hardware has. And the
    backward pass of EXACT first loops over the keys once more, for two numbers of each query: norm = 1 / sum_j p_ij, which takes
    the rounding of lse out of p again, and delta as the average of the very do.v that it is subtracted from, against which it
    cancels where a query sees few keys. The others need no norm, and take delta - dlse from do.o in the kernel of dq.

NOTE [Head widths]
    A tile spans a head in one or two powers of two, 80 = 64 + 16, and 16-bit rows start on 16 bytes, if need be in a padded copy:
    on an H200 (bfloat16, causal, N = 32768, T 4096, H 4) 80 channels take 229 us forward in two parts and 311 us as 128.

NOTE [Hopper]
    Measured on an H200, bfloat16, causal, N = 32768, H 4, P 128, in us at T 1024 and 4096: forward 105 and 281, dq 133 and
    360, dk with dv 177 and 499. At T 4096 the tensor cores work 51 to 58 % of the cycles. Triton waits for a product before it
    goes on, so in a block products and exponentials take turns, and only the other block of a multiprocessor fills in; a third
    finds no registers. The rest is spent at the barriers of the loop and waiting for copies: with two stages, all that fit
    beside two blocks, a tile's copy starts when the tile before it ends. What was tried, forward / dq / dk with dv at T 4096,
    against 284 / 385 / 578 before sections:
    * one loop for all tiles, with the mask in a branch: 324 / 423 / 647, as then all loads are masked;
    * tiles of 32 for three blocks a multiprocessor, or four stages: 330 / 405 / 606;
    * 8 warps on 128 rows: 328 / 354 / 672, and slower at T 1024;
    * the next tile's scores, or its do.v, in flight during this one's exponentials: 358 / 516, and with Triton 3.6 mostly wrong;
    * the statistics in the layout of the tile, each thread fetching them number by number: 569 instead of 509 for dk with dv;
    * RoPE on load: forward 734 instead of 305, and 222 instead of 109 at T 1024, as rotated keys cannot be copied ahead;
    * tensor descriptors: 176 for dk with dv at T 1024, no faster than pointers now; one shape died with an illegal instruction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from .common import INTERPRET, cdiv, default_config, launch, next_power_of_2, opaque, rows
from .masks import (
    covering_tiles,
    inside,
    kept_keys,
    key_range,
    nth_tile,
    padding_bytes,
    query_range,
    sequence_bounds,
    visible_keys,
)


def _tile(BLOCK_M: int, BLOCK_N: int, num_warps: int, num_stages: int, **others: int) -> dict[str, int]:
    """BLOCK_M queries by BLOCK_N keys."""
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages, **others)


# "hopper" lists the widest head and its tiles; elsewhere heads of more than 128 channels are "half_wide". "hopper_xl" lists the
# largest 2 (P + F) + Pv, as shared memory limits it; elsewhere position channels, and anywhere too many of them, are "half_xl".
CONFIGS = {
    "attention_forward": {
        "hopper": (
            (64, _tile(128, 64, 4, 3)),
            (80, _tile(64, 64, 4, 3)),
            (96, _tile(128, 64, 4, 3)),
            (112, _tile(128, 64, 8, 3)),
            (128, _tile(64, 64, 4, 3)),
            (160, _tile(64, 32, 4, 3)),
            (256, _tile(128, 64, 8, 2)),
        ),
        "hopper_xl": (
            (640, _tile(64, 64, 4, 2)),
            (900, _tile(128, 64, 8, 2)),
            (1160, _tile(128, 32, 8, 2)),
            (1792, _tile(64, 32, 8, 2)),
        ),
        "half": _tile(64, 32, 4, 2),
        "half_wide": _tile(64, 32, 8, 1),
        "half_xl": _tile(64, 32, 4, 1),
        "float32": _tile(32, 32, 8, 1),
        "interpret": _tile(256, 256, 1, 1),
    },
    "attention_dkdv": {
        "hopper": (
            (64, _tile(128, 64, 4, 2)),
            (96, _tile(64, 64, 4, 3)),
            (128, _tile(64, 64, 4, 2)),
            (160, _tile(32, 64, 4, 3)),
            (256, _tile(32, 32, 4, 2)),
        ),
        "hopper_xl": (
            (640, _tile(64, 128, 8, 2)),
            (900, _tile(32, 128, 8, 3)),
            (1000, _tile(32, 128, 8, 2)),
            (1420, _tile(32, 64, 4, 2)),
            (1792, _tile(32, 32, 4, 2)),
        ),
        "hopper_spare": (  # grouped heads and key padding take registers
            (64, _tile(128, 64, 4, 2)),
            (96, _tile(64, 64, 4, 2)),
            (128, _tile(32, 128, 8, 3)),
            (256, _tile(32, 32, 4, 2)),
        ),
        "half": _tile(32, 32, 4, 2),
        "half_wide": _tile(16, 32, 4, 1),
        "half_xl": _tile(16, 32, 4, 1),
        "float32": _tile(16, 32, 8, 1),
        "interpret": _tile(256, 256, 1, 1),
    },
    "attention_dq": {
        "hopper": (
            (64, _tile(64, 64, 4, 3)),
            (80, _tile(64, 64, 4, 2)),
            (96, _tile(64, 32, 4, 3)),
            (112, _tile(128, 64, 8, 3)),
            (128, _tile(64, 64, 4, 2)),
            (160, _tile(128, 64, 8, 3)),
            (256, _tile(64, 16, 4, 3)),
        ),
        "hopper_xl": (
            (640, _tile(64, 32, 4, 3)),
            (900, _tile(128, 32, 8, 3)),
            (1160, _tile(64, 32, 8, 2)),
            (1792, _tile(64, 16, 8, 2)),
        ),
        "half": _tile(64, 32, 4, 2),
        "half_wide": _tile(32, 32, 4, 1),
        "half_xl": _tile(32, 16, 4, 1),
        "float32": _tile(16, 16, 8, 1),
        "interpret": _tile(256, 256, 1, 1),
    },
}
SPACE = {  # what may be tuned; see tuning.py
    "attention_fwd": {"BLOCK_M": [64, 128], "BLOCK_N": [32, 64, 128], "num_warps": [4, 8], "num_stages": [1, 2, 3, 4]},
    "attention_bwd_dkdv": {"BLOCK_M": [32, 64, 128], "BLOCK_N": [32, 64, 128], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
    "attention_bwd_dq": {"BLOCK_M": [64, 128], "BLOCK_N": [16, 32, 64, 128], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
}


SECTION_BYTES = 8 << 20  # NOTE [Order]
WIDEST_POSITIONS, POSITION_CHUNK = 512, 512 if INTERPRET else 64  # NOTE [Position channels]


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
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The BLOCK rows x[b, first:, h] as a tuple of [BLOCK, chunk], zero in masked rows and beyond WIDTH channels."""
    ptr += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    offs = tl.arange(0, BLOCK) * stride_t
    parts = ()
    start: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        cols = start + tl.arange(0, CHUNKS[i])
        start = start + CHUNKS[i]
        parts = parts + (_load_chunk(ptr, offs, cols, mask_rows, start <= WIDTH, WIDTH),)
    return parts


@triton.jit
def _store_rows(
    ptr, x, b, h, first, stride_b, stride_t: tl.constexpr, stride_h: tl.constexpr, mask_rows,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ptr += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + first.to(tl.int64) * stride_t
    offs = tl.arange(0, BLOCK) * stride_t
    start: tl.constexpr = 0
    for i in tl.static_range(len(CHUNKS)):
        cols = start + tl.arange(0, CHUNKS[i])
        start = start + CHUNKS[i]
        mask = mask_rows[:, None] & (cols < WIDTH)[None, :]
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


@triton.jit(do_not_specialize=["sections", "tiles"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, o_ptr, lse_ptr,
    T, S, H: tl.constexpr, window, sections, tiles,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr,
    stride_ob, stride_ot: tl.constexpr, stride_oh: tl.constexpr, scale,
    PV: tl.constexpr, F: tl.constexpr, LOAD_P: tl.constexpr, LOAD_PV: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    CHUNKS_P: tl.constexpr, CHUNKS_PV: tl.constexpr, CHUNKS_F: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, head = _place(tiles, sections)
    b = head // H
    h = head % H
    hk = h // GROUP
    row = head.to(tl.int64) * T  # of lse
    first = (tiles - 1 - tile) * BLOCK_M  # the longest rows of a causal mask first
    offs_t = first + tl.arange(0, BLOCK_M)
    mask_t = offs_t < T
    low, high = key_range(offs_t, T, S, bounds_ptr, window, IS_CAUSAL, HAS_WINDOW)
    LOW: tl.constexpr = HAS_WINDOW or bounds_ptr is not None
    q = _load_rows(q_ptr, b, h, first, stride_qb, stride_qt, stride_qh, mask_t, LOAD_P, CHUNKS_P, BLOCK_M)
    if q_pos_ptr is not None:
        q_pos_ptr += b.to(tl.int64) * T * (H * F)
        q = q + _load_rows(q_pos_ptr, b, h, first, 0, H * F, F, mask_t, F, CHUNKS_F, BLOCK_M)
    if padding_ptr is not None:
        padding_ptr += b.to(tl.int64) * S

    unit = scale * 1.4426950408889634  # times log2(e)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # running maximum
    total = tl.zeros((BLOCK_M,), tl.float32)  # running sum of exp(s - m)
    acc = _zero_chunks(BLOCK_M, CHUNKS_PV)
    start, count, begin, end = covering_tiles(low, high, BLOCK_N, padding_ptr is not None)
    for MASKED in tl.static_range(1, -1, -1):
        for i in range(count - (end - begin) if MASKED else end - begin):
            n = start + nth_tile(i, begin, end, MASKED) * BLOCK_N
            offs_n = n + tl.arange(0, BLOCK_N)
            keep = kept_keys(padding_ptr, offs_n, S) if MASKED else None
            k = _load_rows(k_ptr, b, hk, n, stride_kb, stride_kt, stride_kh, keep, LOAD_P, CHUNKS_P, BLOCK_N)
            if q_pos_ptr is not None:
                k = k + _load_rows(k_pos_ptr, b, h, n, 0, F, 0, keep, F, CHUNKS_F, BLOCK_N)
            s = _dot_rows(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
            if BLOCK_F > 0:
                s = _add_positions(s, q_pos_ptr, k_pos_ptr, h, first, n, mask_t, keep, H, F, BLOCK_M, BLOCK_N, BLOCK_F, PRECISION)
            if MASKED:
                s = tl.where(visible_keys(n, low, high, keep, padding_ptr, LOW, BLOCK_N), s, float("-inf"))
            if EXACT:
                s *= scale
                m_new = tl.maximum(m, tl.max(s, 1))
            else:
                m_new = tl.maximum(m, tl.max(s, 1) * unit)
            pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # finite also while no key was visible
            if EXACT:
                p = _exp(s - pivot[:, None])
                alpha = _exp(m - pivot)
            else:
                p = tl.exp2(s * unit - pivot[:, None])
                alpha = tl.exp2(m - pivot)
            m = m_new
            total = total * alpha + tl.sum(p, 1)
            v = _load_rows(v_ptr, b, hk, n, stride_vb, stride_vt, stride_vh, keep, LOAD_PV, CHUNKS_PV, BLOCK_N)
            acc = _add_dots(_times(acc, alpha[:, None]), p.to(v[0].dtype), v, PRECISION)

    empty = total == 0.0  # not where a score was NaN
    total = tl.where(empty, 1.0, total)
    if EXACT:
        o = (tl.div_rn(acc[0], tl.broadcast_to(total[:, None], acc[0].shape)),)
        lse = m + tl.log(total)
    else:
        o = _times(acc, (1.0 / total)[:, None])
        lse = (m + tl.log2(total)) * 0.6931471805599453  # ln 2
    _store_rows(o_ptr, o, b, h, first, stride_ob, stride_ot, stride_oh, mask_t, PV, CHUNKS_PV, BLOCK_M)
    tl.store(lse_ptr + row + offs_t, tl.where(empty, float("-inf"), lse), mask=mask_t)


@triton.jit
def _load_stats(stats_ptr, row, t, T, other: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK_M numbers of a row of the statistics, from query t on. Each is loaded twice: to load fewer numbers than there are
    threads Triton takes the layout of the tile, in which a thread fetches a whole row of it, one by one."""
    offs_t = (t + tl.arange(0, BLOCK_M))[:, None] + tl.arange(0, 2)[None, :] * 0
    ptrs = stats_ptr + row.to(tl.int64) * T + offs_t
    if MASKED:
        x, _ = tl.split(tl.load(ptrs, mask=offs_t < T, other=other))
    else:
        x, _ = tl.split(tl.load(ptrs))
    return x


@triton.jit
def _probability(s, lse, norm, visible, scale, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """p from the products s; lse in the units of scale * s, and +inf where p is to be 0."""
    x = s * scale - lse
    if MASKED:
        x = tl.where(visible, x, float("-inf"))
    if EXACT:
        p = _exp(x)
        if norm is not None:
            p *= norm
    else:
        p = tl.exp2(x)
    return p


@triton.jit(do_not_specialize=["sections", "tiles"])
def _attention_bwd_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, stats_ptr, dk_ptr, dv_ptr,
    T, S, H: tl.constexpr, window, sections, tiles,
    stride_dob, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr,
    stride_dkb, stride_dkt: tl.constexpr, stride_dkh: tl.constexpr,
    stride_dvb, stride_dvt: tl.constexpr, stride_dvh: tl.constexpr, scale,
    P: tl.constexpr, PV: tl.constexpr, F: tl.constexpr, LOAD_P: tl.constexpr, LOAD_PV: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    CHUNKS_P: tl.constexpr, CHUNKS_PV: tl.constexpr, CHUNKS_F: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    h_kv: tl.constexpr = H // GROUP
    tile, head = _place(tiles, sections)
    b = head // h_kv
    hk = head % h_kv
    first = tile * BLOCK_N  # the keys that most queries of a causal mask see first
    offs_n = first + tl.arange(0, BLOCK_N)
    if padding_ptr is not None:
        padding_ptr += b.to(tl.int64) * S
    mask_n = offs_n < S
    keep = kept_keys(padding_ptr, offs_n, S)
    low, high = query_range(offs_n, T, S, bounds_ptr, window, IS_CAUSAL, HAS_WINDOW)
    k = _load_rows(k_ptr, b, hk, first, stride_kb, stride_kt, stride_kh, keep, LOAD_P, CHUNKS_P, BLOCK_N)
    v = _load_rows(v_ptr, b, hk, first, stride_vb, stride_vt, stride_vh, keep, LOAD_PV, CHUNKS_PV, BLOCK_N)
    if q_pos_ptr is not None:
        q_pos_ptr += b.to(tl.int64) * T * (H * F)
        k = k + _load_rows(k_pos_ptr, b, hk, first, 0, F, 0, keep, F, CHUNKS_F, BLOCK_N)

    unit = scale if EXACT else scale * 1.4426950408889634  # log2(e)
    HIGH: tl.constexpr = HAS_WINDOW or bounds_ptr is not None
    plane = tl.num_programs(0) // tiles * GROUP  # rows of the statistics: B * H
    dk = _zero_chunks(BLOCK_N, CHUNKS_P)
    dv = _zero_chunks(BLOCK_N, CHUNKS_PV)
    start, count, begin, end = covering_tiles(low, high, BLOCK_M, padding_ptr is not None)
    for g in range(GROUP):
        h = hk * GROUP + g
        row = b * H + h
        for MASKED in tl.static_range(1, -1, -1):
            for i in range(count - (end - begin) if MASKED else end - begin):
                t = start + nth_tile(i, begin, end, MASKED) * BLOCK_M
                offs_t = t + tl.arange(0, BLOCK_M)
                mask_t = offs_t < T if MASKED else None
                q = _load_rows(q_ptr, b, h, t, stride_qb, stride_qt, stride_qh, mask_t, LOAD_P, CHUNKS_P, BLOCK_M)
                both = q
                if q_pos_ptr is not None:
                    both = both + _load_rows(q_pos_ptr, b, h, t, 0, H * F, F, mask_t, F, CHUNKS_F, BLOCK_M)
                s = _dot_rows(k, both, PRECISION)  # [BLOCK_N, BLOCK_M]
                if BLOCK_F > 0:
                    s = tl.trans(s)
                    s = _add_positions(
                        s, q_pos_ptr, k_pos_ptr, h, t, first, mask_t, keep, H, F, BLOCK_M, BLOCK_N, BLOCK_F, PRECISION
                    )
                    s = tl.trans(s)
                do = _load_rows(do_ptr, b, h, t, stride_dob, stride_dot, stride_doh, mask_t, LOAD_PV, CHUNKS_PV, BLOCK_M)
                EARLY: tl.constexpr = BLOCK_M == 64  # Triton waits for dp; if before p, no longer for dv
                if EARLY:
                    dp = _dot_rows(v, do, PRECISION)
                visible = None
                if MASKED:
                    low_t, high_t = (low - t)[:, None], (high - t)[:, None]
                    visible = inside(tl.arange(0, BLOCK_M)[None, :], low_t, high_t, IS_CAUSAL or HIGH, HIGH)
                    if padding_ptr is not None:
                        visible &= keep[:, None]
                lse = _load_stats(stats_ptr, row, t, T, float("inf"), BLOCK_M, MASKED)
                norm = None
                if EXACT:
                    norm = _load_stats(stats_ptr, row + 2 * plane, t, T, 0.0, BLOCK_M, MASKED)[None, :]
                p = _probability(s, lse[None, :], norm, visible, unit, EXACT, MASKED)
                dv = _add_dots(dv, p.to(do[0].dtype), do, PRECISION)
                if not EARLY:
                    dp = _dot_rows(v, do, PRECISION)
                ds = dp - _load_stats(stats_ptr, row + plane, t, T, 0.0, BLOCK_M, MASKED)[None, :]
                if EXACT:
                    ds += _load_stats(stats_ptr, row + 3 * plane, t, T, 0.0, BLOCK_M, MASKED)[None, :]
                dk = _add_dots(dk, (p * ds).to(q[0].dtype), q, PRECISION)

    dk = _times(dk, scale)
    _store_rows(dk_ptr, dk, b, hk, first, stride_dkb, stride_dkt, stride_dkh, mask_n, P, CHUNKS_P, BLOCK_N)
    _store_rows(dv_ptr, dv, b, hk, first, stride_dvb, stride_dvt, stride_dvh, mask_n, PV, CHUNKS_PV, BLOCK_N)


@triton.jit(do_not_specialize=["sections", "tiles"])
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr,
    o_ptr, lse_ptr, dlse_ptr, stats_ptr, dq_pos_ptr, out_ptr,
    T, S, H: tl.constexpr, window, sections, tiles,
    stride_dob, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr,
    stride_ob, stride_ot: tl.constexpr, stride_oh: tl.constexpr,
    stride_outb, stride_outt: tl.constexpr, stride_outh: tl.constexpr, scale,
    P: tl.constexpr, PV: tl.constexpr, F: tl.constexpr, LOAD_P: tl.constexpr, LOAD_PV: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    CHUNKS_P: tl.constexpr, CHUNKS_PV: tl.constexpr, CHUNKS_F: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """OUT "dq", and dq_pos where the position channels are held whole; "dq_pos", BLOCK_F channels a program, where they are not;
    or "delta", which is launched for EXACT and first. The first launch writes the statistics that the others load."""
    tile, head = _place(tiles, sections)
    b = head // H
    h = head % H
    hk = h // GROUP
    row = head.to(tl.int64) * T  # of lse
    first = (tiles - 1 - tile) * BLOCK_M
    offs_t = first + tl.arange(0, BLOCK_M)
    mask_t = offs_t < T
    low, high = key_range(offs_t, T, S, bounds_ptr, window, IS_CAUSAL, HAS_WINDOW)
    LOW: tl.constexpr = HAS_WINDOW or bounds_ptr is not None
    q = _load_rows(q_ptr, b, h, first, stride_qb, stride_qt, stride_qh, mask_t, LOAD_P, CHUNKS_P, BLOCK_M)
    do = _load_rows(do_ptr, b, h, first, stride_dob, stride_dot, stride_doh, mask_t, LOAD_PV, CHUNKS_PV, BLOCK_M)
    if q_pos_ptr is not None:
        q_pos_ptr += b.to(tl.int64) * T * (H * F)
        dq_pos_ptr += b.to(tl.int64) * T * (H * F)
        q = q + _load_rows(q_pos_ptr, b, h, first, 0, H * F, F, mask_t, F, CHUNKS_F, BLOCK_M)
    if padding_ptr is not None:
        padding_ptr += b.to(tl.int64) * S

    unit = scale if EXACT else scale * 1.4426950408889634  # log2(e)
    rows = row + offs_t
    plane = (tl.num_programs(0) // tiles).to(tl.int64) * T
    stats_ptr += rows
    dlse = tl.zeros((BLOCK_M,), tl.float32)
    norm = dlse + 1.0
    delta = dlse
    if OUT == "delta" or (OUT != "dq_pos" and not EXACT):
        lse = tl.load(lse_ptr + rows, mask=mask_t, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # without a key p is then 0
        if dlse_ptr is not None:  # merging two empty rows makes it NaN
            dlse = tl.where(lse == float("inf"), 0.0, tl.load(dlse_ptr + rows, mask=mask_t, other=0.0))
        if not EXACT:
            lse *= 1.4426950408889634
            o = _load_rows(o_ptr, b, h, first, stride_ob, stride_ot, stride_oh, mask_t, PV, CHUNKS_PV, BLOCK_M)
            delta -= dlse
            for i in tl.static_range(len(CHUNKS_PV)):
                delta += tl.sum(do[i].to(tl.float32) * o[i].to(tl.float32), 1)
            tl.store(stats_ptr + plane, delta, mask=mask_t)
        tl.store(stats_ptr, lse, mask=mask_t)
    else:
        lse = tl.load(stats_ptr, mask=mask_t, other=float("inf"))
        delta = tl.load(stats_ptr + plane, mask=mask_t, other=0.0)
        if EXACT:
            norm = tl.load(stats_ptr + 2 * plane, mask=mask_t, other=0.0)
            dlse = tl.load(stats_ptr + 3 * plane, mask=mask_t, other=0.0)

    total = tl.zeros((BLOCK_M,), tl.float32)
    if OUT == "delta":
        acc = (total,)
    elif OUT == "dq":
        acc = _zero_chunks(BLOCK_M, CHUNKS_P) + _zero_chunks(BLOCK_M, CHUNKS_F)
    else:
        cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        acc = (_zeros(BLOCK_M, BLOCK_F),)
    start, count, begin, end = covering_tiles(low, high, BLOCK_N, padding_ptr is not None)
    for MASKED in tl.static_range(1, -1, -1):
        for i in range(count - (end - begin) if MASKED else end - begin):
            n = start + nth_tile(i, begin, end, MASKED) * BLOCK_N
            offs_n = n + tl.arange(0, BLOCK_N)
            keep = kept_keys(padding_ptr, offs_n, S) if MASKED else None
            k = _load_rows(k_ptr, b, hk, n, stride_kb, stride_kt, stride_kh, keep, LOAD_P, CHUNKS_P, BLOCK_N)
            if q_pos_ptr is not None:
                k = k + _load_rows(k_pos_ptr, b, h, n, 0, F, 0, keep, F, CHUNKS_F, BLOCK_N)
            s = _dot_rows(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
            if BLOCK_F > 0:
                s = _add_positions(s, q_pos_ptr, k_pos_ptr, h, first, n, mask_t, keep, H, F, BLOCK_M, BLOCK_N, BLOCK_F, PRECISION)
            visible = visible_keys(n, low, high, keep, padding_ptr, LOW, BLOCK_N) if MASKED else None
            p = _probability(s, lse[:, None], norm[:, None], visible, unit, EXACT, MASKED)
            v = _load_rows(v_ptr, b, hk, n, stride_vb, stride_vt, stride_vh, keep, LOAD_PV, CHUNKS_PV, BLOCK_N)
            dp = _dot_rows(do, v, PRECISION)
            if OUT == "delta":
                total += tl.sum(p, 1)
                acc = (acc[0] + tl.sum(p * dp, 1),)
            else:
                ds = dp - delta[:, None]
                if EXACT:
                    ds += dlse[:, None]
                ds *= p
                ds = ds.to(k[0].dtype)
                if OUT == "dq_pos":
                    rows_n = k_pos_ptr + n.to(tl.int64) * F
                    part = _load_chunk(rows_n, tl.arange(0, BLOCK_N) * F, cols, keep, False, F)
                    acc = _add_dots(acc, ds, (part,), PRECISION)
                else:
                    acc = _add_dots(acc, ds, k, PRECISION)

    if OUT == "delta":
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(stats_ptr + plane, acc[0] / total, mask=mask_t)
        tl.store(stats_ptr + 2 * plane, 1.0 / total, mask=mask_t)
        tl.store(stats_ptr + 3 * plane, dlse, mask=mask_t)
    elif OUT == "dq":
        acc = _times(acc, scale)
        _store_rows(out_ptr, acc, b, h, first, stride_outb, stride_outt, stride_outh, mask_t, P, CHUNKS_P, BLOCK_M)
        if len(CHUNKS_F) > 0:
            _store_rows(dq_pos_ptr, acc[len(CHUNKS_P) :], b, h, first, 0, H * F, F, mask_t, F, CHUNKS_F, BLOCK_M)
    else:
        ptrs = dq_pos_ptr + (first.to(tl.int64) * H + h) * F + (tl.arange(0, BLOCK_M) * (H * F))[:, None] + cols[None, :]
        tl.store(ptrs, (acc[0] * scale).to(dq_pos_ptr.dtype.element_ty), mask=mask_t[:, None] & (cols < F)[None, :])


def _exact(dtype: torch.dtype, precision: str) -> bool:
    """See NOTE [Float32]."""
    return dtype == torch.float32 and precision == "ieee"


def _sections(x: Tensor, y: Tensor, heads: int) -> int:
    """See NOTE [Order]: into how many the `heads` go, whose programs read the rows of x and y, [B, S, H, P]."""
    return max(1, min(heads, cdiv((x.numel() + y.numel()) * x.element_size(), SECTION_BYTES)))


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def _rows(x: Tensor) -> Tensor:
    """As `common.rows`. 16-bit rows that do not consist of whole 16 bytes, like those of width 100, get a copy with zeros to the
    next multiple of 32 channels: to load them in pieces costs more."""
    x = rows(x)
    if x.element_size() == 4 or (x.shape[-1] % 8 == 0 and _aligned(x)):
        return x
    channels = -x.shape[-1] % 32 if x.shape[-1] % 8 else 0
    return torch.nn.functional.pad(x, (0, channels)) if channels else x.clone(memory_format=torch.contiguous_format)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _chunks(width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The head width as one or two powers of two, 80 = 64 + 16: what a tile spans."""
    chunk = next_power_of_2(width)
    if dtype != torch.float32 and chunk >= 64 and width <= chunk // 2 + chunk // 4:
        return chunk // 2, next_power_of_2(width - chunk // 2)
    return (chunk,)


def _positions(q_pos: Tensor | None) -> dict:
    """How the kernels take the F position channels: whole, beside those of a head, or BLOCK_F at a time."""
    F = 0 if q_pos is None else q_pos.shape[-1]
    if F == 0 or (q_pos.element_size() == 2 and F <= WIDEST_POSITIONS):
        return dict(F=F, CHUNKS_F=_chunks(F, q_pos.dtype) if F else (), BLOCK_F=0)
    return dict(F=F, CHUNKS_F=(), BLOCK_F=POSITION_CHUNK)


def _hopper(x: Tensor) -> bool:
    if x.is_meta:
        target = triton.runtime.driver.active.get_current_target()
        return target.backend == "cuda" and target.arch // 10 == 9
    return not INTERPRET and not torch.version.hip and torch.cuda.get_device_capability(x.device)[0] == 9


def _config(kernel: str, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, rung: str = "hopper") -> dict[str, int]:
    """The kernel's tiles, no larger than the problem."""
    configs, width = CONFIGS[kernel], max(q.shape[-1], v.shape[-1])
    if INTERPRET or q.dtype == torch.float32:
        config = default_config(configs, q.dtype)
        if width > 128 and not INTERPRET:
            config |= {"BLOCK_M": max(16, config["BLOCK_M"] // 2), "BLOCK_N": max(16, config["BLOCK_N"] // 2)}
    elif q_pos is not None:
        F = q_pos.shape[-1]
        wide = 2 * (q.shape[-1] + F) + v.shape[-1] if _hopper(q) and F <= WIDEST_POSITIONS else 1 << 30
        config = next((tile for widest, tile in configs["hopper_xl"] if wide <= widest), configs["half_xl"])
    elif _hopper(q):
        config = next(tile for widest, tile in configs[rung] if width <= widest)
    else:
        config = configs["half" if width <= 128 else "half_wide"]
    limits = {"BLOCK_M": q.shape[1], "BLOCK_N": k.shape[1]}
    return {name: min(value, next_power_of_2(limits[name])) if name in limits else value for name, value in config.items()}


def _tuned(kernel, config, q, k, v, q_pos, key_padding_mask, cu_seqlens, causal, window, precision) -> dict[str, int]:
    sizes, F = (q.shape[0] * q.shape[2], q.shape[1], k.shape[1]), 0 if q_pos is None else q_pos.shape[-1]
    widths = {"P": q.shape[-1], "PV": v.shape[-1], "F": F, "GROUP": q.shape[2] // k.shape[2], "tf32": precision == "tf32"}
    flags = {"padding": key_padding_mask is not None, "packed": cu_seqlens is not None, "window": window > 0, "causal": causal}
    return tuning.lookup(kernel, config, q, sizes, **widths, **flags)


def _attention_forward_fake(q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, causal, window, scale, precision):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B, H, T, dtype=torch.float32)


@opaque(_attention_forward_fake)
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, Pv] in q's dtype and lse [B, H, T] float32, natural log.

    q [B, T, H, P], k [B, S, Hkv, P], v [B, S, Hkv, Pv]; q_pos [B, T, H, F] and k_pos [S, F] or None; key_padding_mask
    [B, S], True = removed; cu_seqlens [n + 1]; window 0 = none; precision from `common.input_precision`.
    """
    o, lse = _attention_forward_fake(q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, causal, window, scale, precision)
    B, T, H, P = q.shape
    S, Hkv, PV = k.shape[1], k.shape[2], v.shape[3]
    if scale <= 0:  # the kernel takes the maximum before it multiplies
        sign = -1.0 if scale < 0 else 0.0
        q, q_pos, scale = q * sign, None if q_pos is None else q_pos * sign, abs(scale) or 1.0
    q, k, v = _rows(q), _rows(k), _rows(v)
    config = _config("attention_forward", q, k, v, q_pos)
    config = _tuned(_attention_fwd_kernel, config, q, k, v, q_pos, key_padding_mask, cu_seqlens, causal, window, precision)
    masks, number = (padding_bytes(key_padding_mask), sequence_bounds(cu_seqlens, T)), cdiv(T, config["BLOCK_M"])
    launch(
        _attention_fwd_kernel, (number * B * H,),
        q, k, v, *_contiguous(q_pos, k_pos), *masks, o, lse,
        T, S, H, min(window, T + S), _sections(k, v, B * H), number,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], scale,
        LOAD_P=min(q.shape[-1], k.shape[-1]), LOAD_PV=v.shape[-1], PV=PV, GROUP=H // Hkv, IS_CAUSAL=causal,
        HAS_WINDOW=window > 0, PRECISION=precision, EXACT=_exact(q.dtype, precision),
        CHUNKS_P=_chunks(P, q.dtype), CHUNKS_PV=_chunks(PV, q.dtype), **_positions(q_pos), **config,
    )  # fmt: skip
    return o, lse


def _attention_backward_fake(
    do, dlse, q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, o, lse, causal, window, scale, precision, joint=False
):
    dq_pos = q.new_empty(0) if q_pos is None else q_pos.new_empty(q_pos.shape)
    dq = q.new_empty(*q.shape[:2], q.shape[2] + k.shape[2], q.shape[3]) if joint else q.new_empty(q.shape)
    return dq, k.new_empty(0 if joint else k.shape), v.new_empty(v.shape), dq_pos


@opaque(_attention_backward_fake)
def attention_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    scale: float,
    precision: str,
    joint: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dq_pos (empty without q_pos), contiguous, from the gradients of o and lse (None: zero). With `joint`, where
    T = S, dq and dk come as one tensor [B, T, H + Hkv, P], and dk is empty."""
    first, second, dv, dq_pos = _attention_backward_fake(
        do, dlse, q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, o, lse, causal, window, scale, precision, joint
    )
    dq, dk = first.split([q.shape[2], k.shape[2]], 2) if joint else (first, second)
    B, T, H, P = q.shape
    S, Hkv, PV = k.shape[1], k.shape[2], v.shape[3]
    do, q, k, v, o, lse = _rows(do), _rows(q), _rows(k), _rows(v), rows(o), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    exact = _exact(q.dtype, precision)
    # B * H rows each of lse and delta, and for EXACT of norm and dlse
    stats = lse.new_empty((4 if exact else 2) * B * H, T)

    positions = _contiguous(q_pos, k_pos)
    masks = (padding_bytes(key_padding_mask), sequence_bounds(cu_seqlens, T))
    inputs = (*do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (T, S, H, min(window, T + S))
    flags = dict(
        P=P, PV=PV, LOAD_P=min(q.shape[-1], k.shape[-1]), LOAD_PV=min(do.shape[-1], v.shape[-1]), GROUP=H // Hkv,
        IS_CAUSAL=causal, HAS_WINDOW=window > 0, PRECISION=precision, EXACT=exact,
        CHUNKS_P=_chunks(P, q.dtype), CHUNKS_PV=_chunks(PV, q.dtype), **_positions(q_pos),
    )  # fmt: skip

    config = _config("attention_dq", q, k, v, q_pos)
    config = _tuned(_attention_bwd_dq_kernel, config, q, k, v, q_pos, key_padding_mask, cu_seqlens, causal, window, precision)
    number, strides = cdiv(T, config["BLOCK_M"]), (*inputs, *o.stride()[:3], *dq.stride()[:3])
    arguments = (do, q, k, v, *positions, *masks, o, lse, dlse, stats, None if q_pos is None else dq_pos, dq)
    scalars = (*sizes, _sections(k, v, B * H), number)
    parts = cdiv(flags["F"], flags["BLOCK_F"]) if flags["BLOCK_F"] else 0
    for out in ("delta",) * exact + ("dq",) + ("dq_pos",) * (parts > 0):
        grid = (number * B * H, parts if out == "dq_pos" else 1)
        launch(_attention_bwd_dq_kernel, grid, *arguments, *scalars, *strides, scale, **flags, **config, OUT=out)

    spare = key_padding_mask is not None or Hkv < H
    config = _config("attention_dkdv", q, k, v, q_pos, "hopper_spare" if spare else "hopper")
    config = _tuned(_attention_bwd_dkdv_kernel, config, q, k, v, q_pos, key_padding_mask, cu_seqlens, causal, window, precision)
    number, strides = cdiv(S, config["BLOCK_N"]), (*inputs, *dk.stride()[:3], *dv.stride()[:3])
    arguments = (do, q, k, v, *positions, *masks, stats, dk, dv)
    scalars = (*sizes, _sections(q, do, B * Hkv), number)
    launch(_attention_bwd_dkdv_kernel, (number * B * Hkv,), *arguments, *scalars, *strides, scale, **flags, **config)
    return first, second, dv, dq_pos
