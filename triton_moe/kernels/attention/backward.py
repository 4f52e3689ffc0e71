"""The backward pass of attention: a kernel for dk and dv, and one for dq."""

import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, launch, opaque, rows
from ..position import rope_table, turn, turn_back
from .configs import _chunks, _config, _contiguous, _exact, _hopper, _positions, _rows, _sections, _tuned, _two_stages
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
from .tiles import (
    _add_dots,
    _add_positions,
    _dot_rows,
    _exp,
    _load_chunk,
    _load_rows,
    _place,
    _store_rows,
    _times,
    _zero_chunks,
    _zeros,
)


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
    do_ptr, q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, stats_ptr, table_ptr, dk_ptr, dv_ptr,
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
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr,
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
    k = _load_rows(k_ptr, b, hk, first, stride_kb, stride_kt, stride_kh, keep, LOAD_P, CHUNKS_P, BLOCK_N, HALF)
    if HALF > 0:
        k = turn(k, table_ptr, first, keep, CHUNKS_P[0], BLOCK_N, False)
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
    for g in tl.range(0, GROUP, disable_licm=not HOIST):
        h = hk * GROUP + g
        row = b * H + h
        for MASKED in tl.static_range(1, -1, -1):
            for i in tl.range(0, count - (end - begin) if MASKED else end - begin, disable_licm=not HOIST):  # NOTE [Registers]
                t = start + nth_tile(i, begin, end, MASKED) * BLOCK_M
                offs_t = t + tl.arange(0, BLOCK_M)
                mask_t = offs_t < T if MASKED else None
                q = _load_rows(q_ptr, b, h, t, stride_qb, stride_qt, stride_qh, mask_t, LOAD_P, CHUNKS_P, BLOCK_M, HALF)
                if HALF > 0:
                    q = turn(q, table_ptr, t + (S - T), mask_t, CHUNKS_P[0], BLOCK_M, False)
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

    _store_rows(dv_ptr, dv, b, hk, first, stride_dvb, stride_dvt, stride_dvh, mask_n, PV, CHUNKS_PV, BLOCK_N)
    dk = _times(dk, scale)
    if HALF > 0:
        dk = turn(dk, table_ptr, first, mask_n, CHUNKS_P[0], BLOCK_N, True)
    elif table_ptr is not None:
        dk = turn_back(dk, table_ptr, offs_n, mask_n, CHUNKS_P, BLOCK_N)
    _store_rows(dk_ptr, dk, b, hk, first, stride_dkb, stride_dkt, stride_dkh, mask_n, P, CHUNKS_P, BLOCK_N, HALF)


@triton.jit(do_not_specialize=["sections", "tiles"])
def _attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr,
    o_ptr, lse_ptr, dlse_ptr, stats_ptr, table_ptr, dq_pos_ptr, out_ptr,
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
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OUT: tl.constexpr,
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
    q = _load_rows(q_ptr, b, h, first, stride_qb, stride_qt, stride_qh, mask_t, LOAD_P, CHUNKS_P, BLOCK_M, HALF)
    if HALF > 0:
        q = turn(q, table_ptr, first + (S - T), mask_t, CHUNKS_P[0], BLOCK_M, False)
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

    if OUT == "delta":  # p and p * dp, summed over the tiles; NOTE [Sums of products] in common.py
        acc = (_zeros(BLOCK_M, BLOCK_N), _zeros(BLOCK_M, BLOCK_N))
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
            k = _load_rows(k_ptr, b, hk, n, stride_kb, stride_kt, stride_kh, keep, LOAD_P, CHUNKS_P, BLOCK_N, HALF)
            if HALF > 0:
                k = turn(k, table_ptr, n, keep, CHUNKS_P[0], BLOCK_N, False)
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
                acc = (acc[0] + p, acc[1] + p * dp)
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
        total = tl.sum(acc[0], 1)
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(stats_ptr + plane, tl.sum(acc[1], 1) / total, mask=mask_t)
        tl.store(stats_ptr + 2 * plane, 1.0 / total, mask=mask_t)
        tl.store(stats_ptr + 3 * plane, dlse, mask=mask_t)
    elif OUT == "dq":
        acc = _times(acc, scale)
        if HALF > 0:
            acc = turn(acc, table_ptr, first + (S - T), mask_t, CHUNKS_P[0], BLOCK_M, True)
        elif table_ptr is not None:
            acc = turn_back(acc, table_ptr, offs_t + (S - T), mask_t, CHUNKS_P, BLOCK_M)
        _store_rows(out_ptr, acc, b, h, first, stride_outb, stride_outt, stride_outh, mask_t, P, CHUNKS_P, BLOCK_M, HALF)
        if len(CHUNKS_F) > 0:
            _store_rows(dq_pos_ptr, acc[len(CHUNKS_P) :], b, h, first, 0, H * F, F, mask_t, F, CHUNKS_F, BLOCK_M)
    else:
        ptrs = dq_pos_ptr + (first.to(tl.int64) * H + h) * F + (tl.arange(0, BLOCK_M) * (H * F))[:, None] + cols[None, :]
        tl.store(ptrs, (acc[0] * scale).to(dq_pos_ptr.dtype.element_ty), mask=mask_t[:, None] & (cols < F)[None, :])


def _attention_backward_fake(
    do, dlse, q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, o, lse, causal, window, scale, precision, joint=False,
    rotated=0, base=1.0, on_load=False, width=0, spare=0,
):  # fmt: skip
    dq_pos = q.new_empty(0) if q_pos is None else q_pos.new_empty(q_pos.shape)
    width = width or q.shape[3]
    if joint:
        dq, dk = q.new_empty(*q.shape[:2], (q.shape[2] + k.shape[2]) * width + spare), k.new_empty(0)
    else:
        dq, dk = q.new_empty(*q.shape[:3], width), k.new_empty(*k.shape[:3], width)
    return dq, dk, v.new_empty(v.shape), dq_pos


def heads_side_by_side(both: Tensor, H: int, Hkv: int, P: int) -> tuple[Tensor, Tensor]:
    """dq [B, T, H, P] and dk [B, T, Hkv, P] of what `attention_backward` returns with `joint`."""
    dq, dk = both.narrow(2, 0, H * P), both.narrow(2, H * P, Hkv * P)
    return dq.unflatten(2, (H, P)), dk.unflatten(2, (Hkv, P))


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
    rotated: int = 0,
    base: float = 1.0,
    on_load: bool = False,
    width: int = 0,
    spare: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dq_pos (empty without q_pos), contiguous, from the gradients of o and lse (None: zero). With `joint`, where
    T = S, the rows of dq and dk come as one tensor [B, T, (H + Hkv) * P + spare], the last `spare` columns not filled in, and dk
    is empty. `rotated` channels of dq and dk are rotated back, queries at the last T of S positions: as pairs side by side
    (position.py), where q and k come rotated, or as halves with `on_load`, as `attention_forward` takes them. `width`: of dq and
    dk only so many channels."""
    first, second, dv, dq_pos = _attention_backward_fake(
        do, dlse, q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, o, lse, causal, window, scale, precision, joint,
        width=width, spare=spare,
    )  # fmt: skip
    dq, dk = heads_side_by_side(first, q.shape[2], k.shape[2], width or q.shape[3]) if joint else (first, second)
    B, T, H, P = q.shape
    S, Hkv, PV = k.shape[1], k.shape[2], v.shape[3]
    do, q, k, v, o, lse = _rows(do), _rows(q), _rows(k), _rows(v), rows(o), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    exact = _exact(q.dtype, precision)
    # B * H rows each of lse and delta, and for EXACT of norm and dlse
    stats = lse.new_empty((4 if exact else 2) * B * H, T)

    halves = rotated if on_load else 0
    chunks = _chunks(P, q.dtype, halves)
    span = sum(chunks) if halves else 0
    table = rope_table(rotated, base, S, chunks[0] if on_load else sum(chunks), q, not on_load) if rotated else None
    positions = _contiguous(q_pos, k_pos)
    masks = (padding_bytes(key_padding_mask), sequence_bounds(cu_seqlens, T))
    inputs = (*do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (T, S, H, min(window, T + S))
    flags = dict(
        P=width or P, PV=PV, LOAD_P=min(q.shape[-1], k.shape[-1]), LOAD_PV=min(do.shape[-1], v.shape[-1]), GROUP=H // Hkv,
        IS_CAUSAL=causal, HAS_WINDOW=window > 0, PRECISION=precision, EXACT=exact,
        CHUNKS_P=chunks, CHUNKS_PV=_chunks(PV, q.dtype), **_positions(q_pos), HALF=halves // 2,
    )  # fmt: skip

    key = q_pos, key_padding_mask, cu_seqlens, causal, window, precision, halves
    config = _config("attention_dq", q, k, v, q_pos, "hopper_rope" if halves else "hopper", span)
    config = _tuned(_attention_bwd_dq_kernel, config, q, k, v, *key)
    if halves:
        config = _two_stages(config, q, PV)
    number, strides = cdiv(T, config["BLOCK_M"]), (*inputs, *o.stride()[:3], *dq.stride()[:3])
    arguments = (do, q, k, v, *positions, *masks, o, lse, dlse, stats, table, None if q_pos is None else dq_pos, dq)
    scalars = (*sizes, _sections(k, v, B * H), number)
    parts = cdiv(flags["F"], flags["BLOCK_F"]) if flags["BLOCK_F"] else 0
    for out in ("delta",) * exact + ("dq",) + ("dq_pos",) * (parts > 0):
        grid = (number * B * H, parts if out == "dq_pos" else 1)
        launch(_attention_bwd_dq_kernel, grid, *arguments, *scalars, *strides, scale, **flags, **config, OUT=out)

    crowded = key_padding_mask is not None or Hkv < H  # more in registers
    rung = "hopper_rope" if halves else "hopper_spare" if crowded else "hopper"
    config = _config("attention_dkdv", q, k, v, q_pos, rung, span)
    config = _tuned(_attention_bwd_dkdv_kernel, config, q, k, v, *key)
    if halves:
        config = _two_stages(config, q, PV)
    number, strides = cdiv(S, config["BLOCK_N"]), (*inputs, *dk.stride()[:3], *dv.stride()[:3])
    arguments = (do, q, k, v, *positions, *masks, stats, table, dk, dv)
    scalars = (*sizes, _sections(q, do, B * Hkv), number)
    hoist = q.element_size() == 2 and not (halves or _hopper(q))
    launch(_attention_bwd_dkdv_kernel, (number * B * Hkv,), *arguments, *scalars, *strides, scale, **flags, **config, HOIST=hoist)
    return first, second, dv, dq_pos
