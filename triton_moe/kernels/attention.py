"""Fused attention: softmax over the keys without a [T, S] tensor.

    s_ij = scale * (q_i . k_j + q_pos_i . k_pos_j)   where query i sees key j, else -inf
    o_i  = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)

    delta_i = do_i . o_i                   ds_ij = p_ij (do_i . v_j - delta_i + dlse_i)
    dv_j = sum_i p_ij do_i                 dk_j = scale * sum_i ds_ij q_i
    dq_i = scale * sum_j ds_ij k_j         dq_pos_i = scale * sum_j ds_ij k_pos_j

Query head h reads key head h // GROUP, GROUP = H // Hkv. q_pos and k_pos carry the Transformer-XL term (position.py): F
channels, k_pos [S, F] a constant table. A query that sees no key has o = 0, lse = -inf and zero gradients.

NOTE [Intervals]
    The query with index t has position S - T + t, and every mask but key padding is an interval of keys for each query
    (causal, window, packed sequence) and, from the other side, an interval of queries for each key. A tile loops from
    the least lower end of its rows to the greatest upper end, so windows and packed sequences cost what they cover.

NOTE [Float32]
    What rounds float32 most is not the products but the differences. So scores and lse stay in natural units and exp is left
    to the compiler: folding log2(e) into the scale would round scores before lse is subtracted. And the backward pass first
    loops over the keys once more, for two numbers of each query: norm = 1 / sum_j p_ij, which takes the rounding of lse out
    of p again, and delta as the average of the very do.v that it is subtracted from, against which it cancels where a query
    sees few keys. 16-bit inputs and tf32 need no norm and take delta from do.o.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from .common import INTERPRET, cdiv, launch, next_power_of_2, opaque, rows

# BLOCK_M queries by BLOCK_N keys; BLOCK_F position channels at a time (attention_dq_pos accumulates BLOCK_FO of them).
CONFIGS = {
    "attention_forward": {
        "half": dict(BLOCK_M=128, BLOCK_N=64, BLOCK_F=32, num_warps=8, num_stages=2),
        "float32": dict(BLOCK_M=32, BLOCK_N=32, BLOCK_F=32, num_warps=8, num_stages=1),
        "interpret": dict(BLOCK_M=256, BLOCK_N=256, BLOCK_F=256, num_warps=1, num_stages=1),
    },
    "attention_dkdv": {
        "half": dict(BLOCK_M=32, BLOCK_N=64, BLOCK_F=32, num_warps=4, num_stages=2),
        "float32": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_F=32, num_warps=8, num_stages=1),
        "interpret": dict(BLOCK_M=256, BLOCK_N=256, BLOCK_F=256, num_warps=1, num_stages=1),
    },
    "attention_dq": {
        "half": dict(BLOCK_M=64, BLOCK_N=64, BLOCK_F=32, num_warps=4, num_stages=2),
        "float32": dict(BLOCK_M=16, BLOCK_N=16, BLOCK_F=32, num_warps=8, num_stages=1),
        "interpret": dict(BLOCK_M=256, BLOCK_N=256, BLOCK_F=256, num_warps=1, num_stages=1),
    },
    "attention_dq_pos": {
        "half": dict(BLOCK_M=64, BLOCK_N=32, BLOCK_F=32, BLOCK_FO=256, num_warps=8, num_stages=1),
        "float32": dict(BLOCK_M=16, BLOCK_N=16, BLOCK_F=32, BLOCK_FO=128, num_warps=8, num_stages=1),
        "interpret": dict(BLOCK_M=256, BLOCK_N=256, BLOCK_F=256, BLOCK_FO=512, num_warps=1, num_stages=1),
    },
    "attention_delta": {
        "half": dict(BLOCK_M=16, num_warps=4),
        "float32": dict(BLOCK_M=16, num_warps=4),
        "interpret": dict(BLOCK_M=512, num_warps=1),
    },
}


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """exp(x) for x <= 0. `tl.exp` rounds x * log2(e) and is four ulp wrong at best; EXACT is within about one: exp(x) =
    2^n exp(r), r = x - n ln 2 in two steps, |r| < 0.35, by Taylor."""
    if EXACT:
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = tl.fma(n, n * 0.0 - 0.693359375, x)  # ln 2 = 0.693359375 - 2.12194440e-4, the first exact times any n
        r = tl.fma(n, n * 0.0 + 2.12194440e-4, r)
        p = r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0))))))
        return tl.where(n <= -150.0, 0.0, tl.exp2(n) * (1.0 + (r + r * p)))  # NaN stays
    else:
        return tl.exp(x)


@triton.jit
def _key_range(offs_t, T, S, bounds_ptr, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The keys [low, high) that the queries offs_t see; (S, 0) where there are none."""
    position = offs_t + (S - T)
    low = offs_t * 0
    high = low + S
    if IS_CAUSAL:
        high = tl.minimum(high, position + 1)
    if HAS_WINDOW:
        low = tl.maximum(low, position - window + 1)
        if not IS_CAUSAL:
            high = tl.minimum(high, position + window)
    if bounds_ptr is not None:
        low = tl.maximum(low, tl.load(bounds_ptr + offs_t, mask=offs_t < T, other=0))
        high = tl.minimum(high, tl.load(bounds_ptr + T + offs_t, mask=offs_t < T, other=0))
    empty = (offs_t >= T) | (low >= high)
    return tl.where(empty, S, low), tl.where(empty, 0, high)


@triton.jit
def _query_range(offs_n, T, S, bounds_ptr, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The queries [low, high) that see the keys offs_n; (T, 0) where there are none."""
    index = offs_n - (S - T)  # of the query at the key's position
    low = offs_n * 0
    high = low + T
    if IS_CAUSAL:
        low = tl.maximum(low, index)
    if HAS_WINDOW:
        high = tl.minimum(high, index + window)
        if not IS_CAUSAL:
            low = tl.maximum(low, index - window + 1)
    if bounds_ptr is not None:  # S == T
        low = tl.maximum(low, tl.load(bounds_ptr + offs_n, mask=offs_n < T, other=0))
        high = tl.minimum(high, tl.load(bounds_ptr + T + offs_n, mask=offs_n < T, other=0))
    empty = (offs_n >= S) | (low >= high)
    return tl.where(empty, T, low), tl.where(empty, 0, high)


@triton.jit
def _kept_keys(padding_ptr, b, offs_n, S):
    """Which keys exist and are not padding: only these are ever read."""
    keep = offs_n < S
    if padding_ptr is not None:
        keep = keep & (tl.load(padding_ptr + b * S + offs_n, mask=keep, other=1) == 0)
    return keep


@triton.jit
def _load_rows(ptr, index, stride, mask_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK]: the first WIDTH channels of each row, zero in the rest and in masked rows."""
    cols = tl.arange(0, BLOCK)
    offs = index.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(ptr + offs, mask=mask_rows[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.jit
def _add_position(
    s, a_ptr, stride_a, rows_a, mask_a, b_ptr, stride_b, rows_b, mask_b, F,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s + A B^T over the F position channels of the given rows. Each chunk of channels is summed on its own first: one long
    sum in the accumulator would lose float32 digits."""
    a_ptrs = a_ptr + rows_a.to(tl.int64)[:, None] * stride_a
    b_ptrs = b_ptr + rows_b.to(tl.int64)[None, :] * stride_b
    for f in range(0, F, 2 * BLOCK_F):
        part = tl.zeros_like(s)
        for i in tl.static_range(2):
            offs_f = f + i * BLOCK_F + tl.arange(0, BLOCK_F)
            mask_f = offs_f < F
            a = tl.load(a_ptrs + offs_f[None, :], mask=mask_a[:, None] & mask_f[None, :], other=0.0)
            b = tl.load(b_ptrs + offs_f[:, None], mask=mask_f[:, None] & mask_b[None, :], other=0.0)
            part = tl.dot(a, b, part, input_precision=PRECISION)
        s += part
    return s


@triton.jit
def _load_lse(ptr, rows, mask_t):
    """lse, +inf where there is no key or no query: exp(s - lse) is then 0 for every s."""
    lse = tl.load(ptr + rows, mask=mask_t, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _load_dlse(ptr, rows, mask_t, lse):
    """The gradient of lse, 0 where there is no key: merging two empty rows makes it NaN."""
    return tl.where(lse == float("inf"), 0.0, tl.load(ptr + rows, mask=mask_t, other=0.0))


@triton.jit
def _sequence_bounds_kernel(cu_seqlens_ptr, bounds_ptr, n, T, steps, BLOCK: tl.constexpr):
    """bounds [2, T]: first token and end of each token's sequence, (T, 0) for a token outside all of them."""
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_t = offs_t < T
    low = offs_t * 0
    high = low + n + 1
    for _ in range(steps):  # bisection: low becomes the number of entries <= t
        middle = (low + high) // 2
        inside = low < high
        below = tl.load(cu_seqlens_ptr + middle, mask=inside & mask_t, other=0) <= offs_t
        low = tl.where(inside & below, middle + 1, low)
        high = tl.where(inside & (below == 0), middle, high)
    found = mask_t & (low > 0) & (low <= n)
    start = tl.load(cu_seqlens_ptr + low - 1, mask=found, other=0)
    end = tl.load(cu_seqlens_ptr + low, mask=found, other=0)
    start = tl.minimum(tl.maximum(start, 0), T)
    end = tl.minimum(tl.maximum(end, 0), T)
    tl.store(bounds_ptr + offs_t, tl.where(found, start, T).to(tl.int32), mask=mask_t)
    tl.store(bounds_ptr + T + offs_t, tl.where(found, end, 0).to(tl.int32), mask=mask_t)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, o_ptr, lse_ptr,
    T, S, H: tl.constexpr, F: tl.constexpr, window,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr, scale,
    P: tl.constexpr, PV: tl.constexpr, GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    offs_t = (tiles - 1 - pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)  # the longest rows of a causal mask first
    mask_t = offs_t < T
    low, high = _key_range(offs_t, T, S, bounds_ptr, window, IS_CAUSAL, HAS_WINDOW)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_t, stride_qt, mask_t, P, BLOCK_P)
    if q_pos_ptr is not None:
        q_pos_ptr += (b * T * H + h) * F

    EXACT: tl.constexpr = (q.dtype == tl.float32) & (PRECISION == "ieee")
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # running maximum
    total = tl.zeros((BLOCK_M,), tl.float32)  # running sum of exp(s - m)
    acc = tl.zeros((BLOCK_M, BLOCK_PV), tl.float32)
    for n in range(tl.min(low, 0), tl.max(high, 0), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        keep = _kept_keys(padding_ptr, b, offs_n, S)
        k = _load_rows(k_ptr, offs_n, stride_kt, keep, P, BLOCK_P)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if q_pos_ptr is not None:
            s = _add_position(s, q_pos_ptr, H * F, offs_t, mask_t, k_pos_ptr, F, offs_n, keep, F, BLOCK_F, PRECISION)
        visible = (offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None]) & keep[None, :]
        s = tl.where(visible, s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # finite also while no key was visible
        p = _exp(s - pivot[:, None], EXACT)
        alpha = _exp(m - pivot, EXACT)
        total = total * alpha + tl.sum(p, 1)
        m = m_new
        v = _load_rows(v_ptr, offs_n, stride_vt, keep, PV, BLOCK_PV)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    empty = total == 0.0  # not where a score was NaN
    total = tl.where(empty, 1.0, total)
    if EXACT:
        o = tl.div_rn(acc, tl.broadcast_to(total[:, None], (BLOCK_M, BLOCK_PV)))
    else:
        o = acc / total[:, None]
    lse = tl.where(empty, float("-inf"), m + tl.log(total))
    offs_v = tl.arange(0, BLOCK_PV)
    o_ptrs = o_ptr + ((b * T + offs_t) * H + h)[:, None] * PV + offs_v[None, :]
    tl.store(o_ptrs, o, mask=mask_t[:, None] & (offs_v < PV)[None, :])
    tl.store(lse_ptr + (b * H + h) * T + offs_t, lse, mask=mask_t)


@triton.jit
def _attention_bwd_delta_kernel(
    do_ptr, o_ptr, delta_ptr, T, H: tl.constexpr, stride_dob, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    PV: tl.constexpr, BLOCK_PV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    offs_t = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_t = offs_t < T
    do = _load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_t, stride_dot, mask_t, PV, BLOCK_PV).to(tl.float32)
    o = _load_rows(o_ptr + (b * T * H + h) * PV, offs_t, H * PV, mask_t, PV, BLOCK_PV).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + offs_t, tl.sum(do * o, 1), mask=mask_t)


@triton.jit
def _attention_bwd_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, lse_ptr, dlse_ptr, delta_ptr,
    norm_ptr, dk_ptr, dv_ptr,
    T, S, H: tl.constexpr, F: tl.constexpr, window,
    stride_dob, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr, scale,
    P: tl.constexpr, PV: tl.constexpr, GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, BLOCK_N)
    pid = tl.program_id(0)
    h_kv = H // GROUP
    b = (pid // tiles // h_kv).to(tl.int64)
    hk = (pid // tiles % h_kv).to(tl.int64)
    offs_n = pid % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < S
    keep = _kept_keys(padding_ptr, b, offs_n, S)
    low, high = _query_range(offs_n, T, S, bounds_ptr, window, IS_CAUSAL, HAS_WINDOW)
    k = _load_rows(k_ptr + b * stride_kb + hk * stride_kh, offs_n, stride_kt, keep, P, BLOCK_P)
    v = _load_rows(v_ptr + b * stride_vb + hk * stride_vh, offs_n, stride_vt, keep, PV, BLOCK_PV)

    dk = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_PV), tl.float32)
    for g in range(GROUP):
        h = hk * GROUP + g
        for t in range(tl.min(low, 0), tl.max(high, 0), BLOCK_M):
            offs_t = t + tl.arange(0, BLOCK_M)
            mask_t = offs_t < T
            rows = (b * H + h) * T + offs_t
            q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_t, stride_qt, mask_t, P, BLOCK_P)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            if q_pos_ptr is not None:
                q_pos_rows = q_pos_ptr + (b * T * H + h) * F
                s = _add_position(s, k_pos_ptr, F, offs_n, keep, q_pos_rows, H * F, offs_t, mask_t, F, BLOCK_F, PRECISION)
            visible = (offs_t[None, :] >= low[:, None]) & (offs_t[None, :] < high[:, None]) & keep[:, None]
            s = tl.where(visible, s * scale, float("-inf"))
            lse = _load_lse(lse_ptr, rows, mask_t)
            p = _exp(s - lse[None, :], norm_ptr is not None)
            if norm_ptr is not None:
                p *= tl.load(norm_ptr + rows, mask=mask_t, other=0.0)[None, :]
            do = _load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_t, stride_dot, mask_t, PV, BLOCK_PV)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            delta = tl.load(delta_ptr + rows, mask=mask_t, other=0.0)
            ds = dp - delta[None, :]
            if dlse_ptr is not None:
                ds += _load_dlse(dlse_ptr, rows, mask_t, lse)[None, :]
            ds *= p
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    offs_p = tl.arange(0, BLOCK_P)
    offs_v = tl.arange(0, BLOCK_PV)
    rows_kv = ((b * S + offs_n) * h_kv + hk)[:, None]
    dk_ptrs = dk_ptr + rows_kv * P + offs_p[None, :]
    dv_ptrs = dv_ptr + rows_kv * PV + offs_v[None, :]
    tl.store(dk_ptrs, dk * scale, mask=mask_n[:, None] & (offs_p < P)[None, :])
    tl.store(dv_ptrs, dv, mask=mask_n[:, None] & (offs_v < PV)[None, :])


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, lse_ptr, dlse_ptr, delta_ptr,
    norm_ptr, out_ptr,
    T, S, H: tl.constexpr, F: tl.constexpr, window,
    stride_dob, stride_dot: tl.constexpr, stride_doh: tl.constexpr,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr, scale,
    P: tl.constexpr, PV: tl.constexpr, GROUP: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_FO: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """OUT "dq"; "dq_pos", BLOCK_FO channels of it a program; or "delta", with norm, which the others then load."""
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    offs_t = (tiles - 1 - pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_t = offs_t < T
    low, high = _key_range(offs_t, T, S, bounds_ptr, window, IS_CAUSAL, HAS_WINDOW)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    q = _load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_t, stride_qt, mask_t, P, BLOCK_P)
    do = _load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_t, stride_dot, mask_t, PV, BLOCK_PV)
    rows = (b * H + h) * T + offs_t
    if q_pos_ptr is not None:
        q_pos_ptr += (b * T * H + h) * F
    lse = _load_lse(lse_ptr, rows, mask_t)

    if OUT == "delta":
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M,), tl.float32)
    else:
        delta = tl.load(delta_ptr + rows, mask=mask_t, other=0.0)
        if dlse_ptr is not None:
            dlse = _load_dlse(dlse_ptr, rows, mask_t, lse)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + rows, mask=mask_t, other=0.0)
        if OUT == "dq":
            offs_o = tl.arange(0, BLOCK_P)
            mask_o = offs_o < P
            out_ptrs = out_ptr + ((b * T + offs_t) * H + h)[:, None] * P + offs_o[None, :]
            acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        else:
            offs_o = tl.program_id(1) * BLOCK_FO + tl.arange(0, BLOCK_FO)
            mask_o = offs_o < F
            out_ptrs = out_ptr + ((b * T + offs_t) * H + h)[:, None] * F + offs_o[None, :]
            acc = tl.zeros((BLOCK_M, BLOCK_FO), tl.float32)
    for n in range(tl.min(low, 0), tl.max(high, 0), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        keep = _kept_keys(padding_ptr, b, offs_n, S)
        k = _load_rows(k_ptr, offs_n, stride_kt, keep, P, BLOCK_P)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if q_pos_ptr is not None:
            s = _add_position(s, q_pos_ptr, H * F, offs_t, mask_t, k_pos_ptr, F, offs_n, keep, F, BLOCK_F, PRECISION)
        visible = (offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None]) & keep[None, :]
        p = _exp(tl.where(visible, s * scale, float("-inf")) - lse[:, None], norm_ptr is not None)
        v = _load_rows(v_ptr, offs_n, stride_vt, keep, PV, BLOCK_PV)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if OUT == "delta":
            total += tl.sum(p, 1)
            acc += tl.sum(p * dp, 1)
        else:
            ds = dp - delta[:, None]
            if dlse_ptr is not None:
                ds += dlse[:, None]
            if norm_ptr is not None:
                p *= norm[:, None]
            ds *= p
            if OUT == "dq":
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
            else:
                k_pos_ptrs = k_pos_ptr + offs_n.to(tl.int64)[:, None] * F + offs_o[None, :]
                k_pos = tl.load(k_pos_ptrs, mask=keep[:, None] & mask_o[None, :], other=0.0)
                acc = tl.dot(ds.to(k_pos.dtype), k_pos, acc, input_precision=PRECISION)

    if OUT == "delta":
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(norm_ptr + rows, 1.0 / total, mask=mask_t)
        tl.store(out_ptr + rows, acc / total, mask=mask_t)
    else:
        tl.store(out_ptrs, acc * scale, mask=mask_t[:, None] & mask_o[None, :])


def _sequence_bounds(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """[2, T] int32: where each token's packed sequence starts and ends. Safe whatever cu_seqlens holds."""
    if cu_seqlens is None:
        return None
    bounds = torch.empty(2, T, dtype=torch.int32, device=cu_seqlens.device)
    n = cu_seqlens.numel() - 1
    block = 1024 if INTERPRET else 128
    arguments = (cu_seqlens.contiguous(), bounds, n, T, (n + 1).bit_length())
    launch(_sequence_bounds_kernel, (cdiv(T, block),), *arguments, BLOCK=block, num_warps=4)
    return bounds


def _padding(key_padding_mask: Tensor | None) -> Tensor | None:
    return None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)


def _config(kernel: str, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None) -> dict[str, int]:
    """The kernel's tiles, no larger than the problem; wide heads take half the rows and no prefetch, and where position
    channels need registers too, the threads of 8 warps share them."""
    config = dict(tuning.lookup(CONFIGS[kernel], q.dtype, INTERPRET))
    width = max(next_power_of_2(q.shape[-1]), next_power_of_2(v.shape[-1]))
    if q_pos is not None:
        config["num_warps"] = 8
    if width > 128 and not INTERPRET:
        config["BLOCK_M"] = max(16, config["BLOCK_M"] // 2)
        config["BLOCK_N"] = max(16, config["BLOCK_N"] // 2)
        config["num_stages"] = 1
    config["BLOCK_M"] = min(config["BLOCK_M"], next_power_of_2(q.shape[1]))
    config["BLOCK_N"] = min(config["BLOCK_N"], next_power_of_2(k.shape[1]))
    F = 0 if q_pos is None else q_pos.shape[-1]
    for name in ("BLOCK_F", "BLOCK_FO"):
        if name in config:
            config[name] = min(config[name], next_power_of_2(F))
    return config


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
    q, k, v = rows(q), rows(k), rows(v)
    q_pos = None if q_pos is None else q_pos.contiguous()
    k_pos = None if k_pos is None else k_pos.contiguous()
    config = _config("attention_forward", q, k, v, q_pos)
    launch(
        _attention_fwd_kernel, (cdiv(T, config["BLOCK_M"]) * B * H,),
        q, k, v, q_pos, k_pos, _padding(key_padding_mask), _sequence_bounds(cu_seqlens, T), o, lse,
        T, S, H, 0 if q_pos is None else q_pos.shape[-1], min(window, T + S),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale,
        P=P, PV=PV, GROUP=H // Hkv, IS_CAUSAL=causal, HAS_WINDOW=window > 0, PRECISION=precision,
        BLOCK_P=next_power_of_2(P), BLOCK_PV=next_power_of_2(PV), **config,
    )  # fmt: skip
    return o, lse


def _attention_backward_fake(
    do, dlse, q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, o, lse, causal, window, scale, precision
):
    dq_pos = q.new_empty(0) if q_pos is None else q_pos.new_empty(q_pos.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dq_pos


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dq_pos (empty without q_pos), contiguous, from the gradients of o and lse (None: zero)."""
    dq, dk, dv, dq_pos = _attention_backward_fake(
        do, dlse, q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, o, lse, causal, window, scale, precision
    )
    B, T, H, P = q.shape
    S, Hkv, PV = k.shape[1], k.shape[2], v.shape[3]
    do, q, k, v = rows(do), rows(q), rows(k), rows(v)
    o, lse = o.contiguous(), lse.contiguous()
    q_pos = None if q_pos is None else q_pos.contiguous()
    k_pos = None if k_pos is None else k_pos.contiguous()

    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if q.dtype == torch.float32 and precision == "ieee" else None  # see NOTE [Float32]

    masks = (_padding(key_padding_mask), _sequence_bounds(cu_seqlens, T))
    inputs = (do, q, k, v, q_pos, k_pos, *masks, lse, dlse, delta, norm)
    F = 0 if q_pos is None else q_pos.shape[-1]
    strides = (*do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    scalars = (T, S, H, F, min(window, T + S), *strides, scale)
    flags = dict(
        P=P, PV=PV, GROUP=H // Hkv, IS_CAUSAL=causal, HAS_WINDOW=window > 0, PRECISION=precision,
        BLOCK_P=next_power_of_2(P), BLOCK_PV=next_power_of_2(PV),
    )  # fmt: skip
    config_dq = _config("attention_dq", q, k, v, q_pos)
    grid_dq = (cdiv(T, config_dq["BLOCK_M"]) * B * H,)

    if norm is not None:
        launch(_attention_bwd_dq_kernel, grid_dq, *inputs, delta, *scalars, **flags, **config_dq, BLOCK_FO=0, OUT="delta")
    else:
        config = tuning.lookup(CONFIGS["attention_delta"], q.dtype, INTERPRET)
        grid = (cdiv(T, config["BLOCK_M"]) * B * H,)
        arguments = (do, o, delta, T, H, *do.stride()[:3])
        launch(_attention_bwd_delta_kernel, grid, *arguments, PV=PV, BLOCK_PV=next_power_of_2(PV), **config)

    config = _config("attention_dkdv", q, k, v, q_pos)
    grid = (cdiv(S, config["BLOCK_N"]) * B * Hkv,)
    launch(_attention_bwd_dkdv_kernel, grid, *inputs, dk, dv, *scalars, **flags, **config)

    launch(_attention_bwd_dq_kernel, grid_dq, *inputs, dq, *scalars, **flags, **config_dq, BLOCK_FO=0, OUT="dq")
    if q_pos is not None:
        config = _config("attention_dq_pos", q, k, v, q_pos)
        grid = (cdiv(T, config["BLOCK_M"]) * B * H, cdiv(F, config["BLOCK_FO"]))
        launch(_attention_bwd_dq_kernel, grid, *inputs, dq_pos, *scalars, **flags, **config, OUT="dq_pos")
    return dq, dk, dv, dq_pos
