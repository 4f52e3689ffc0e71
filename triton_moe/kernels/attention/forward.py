"""The forward pass of attention."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import cdiv, launch, opaque
from ..position import rope_table, turn
from .configs import _chunks, _config, _contiguous, _exact, _positions, _rows, _sections, _tuned, _two_stages
from .masks import covering_tiles, kept_keys, key_range, nth_tile, padding_bytes, sequence_bounds, visible_keys
from .tiles import _add_dots, _add_positions, _dot_rows, _exp, _load_rows, _place, _store_rows, _times, _zero_chunks


@triton.jit(do_not_specialize=["sections", "tiles"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, q_pos_ptr, k_pos_ptr, padding_ptr, bounds_ptr, table_ptr, o_ptr, lse_ptr,
    T, S, H: tl.constexpr, window, sections, tiles,
    stride_qb, stride_qt: tl.constexpr, stride_qh: tl.constexpr,
    stride_kb, stride_kt: tl.constexpr, stride_kh: tl.constexpr,
    stride_vb, stride_vt: tl.constexpr, stride_vh: tl.constexpr,
    stride_ob, stride_ot: tl.constexpr, stride_oh: tl.constexpr, scale,
    PV: tl.constexpr, F: tl.constexpr, LOAD_P: tl.constexpr, LOAD_PV: tl.constexpr, GROUP: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    CHUNKS_P: tl.constexpr, CHUNKS_PV: tl.constexpr, CHUNKS_F: tl.constexpr, BLOCK_F: tl.constexpr,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    q = _load_rows(q_ptr, b, h, first, stride_qb, stride_qt, stride_qh, mask_t, LOAD_P, CHUNKS_P, BLOCK_M, HALF)
    if table_ptr is not None:
        q = turn(q, table_ptr, first + (S - T), mask_t, CHUNKS_P[0], BLOCK_M, False)
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
            k = _load_rows(k_ptr, b, hk, n, stride_kb, stride_kt, stride_kh, keep, LOAD_P, CHUNKS_P, BLOCK_N, HALF)
            if table_ptr is not None:
                k = turn(k, table_ptr, n, keep, CHUNKS_P[0], BLOCK_N, False)
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
    tl.store(lse_ptr + row + offs_t, tl.where(empty, float("-inf"), lse), mask=mask_t)
    _store_rows(o_ptr, o, b, h, first, stride_ob, stride_ot, stride_oh, mask_t, PV, CHUNKS_PV, BLOCK_M)


def _attention_forward_fake(
    q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, causal, window, scale, precision, rotated=0, base=1.0
):
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
    rotated: int = 0,
    base: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, Pv] in q's dtype and lse [B, H, T] float32, natural log.

    q [B, T, H, P], k [B, S, Hkv, P], v [B, S, Hkv, Pv]; q_pos [B, T, H, F] and k_pos [S, F] or None; key_padding_mask
    [B, S], True = removed; cu_seqlens [n + 1]; window 0 = none; precision from `common.input_precision`. `rotated` channels of q
    and k are rotated on load (position.py), queries at the last T of S positions.
    """
    o, lse = _attention_forward_fake(q, k, v, q_pos, k_pos, key_padding_mask, cu_seqlens, causal, window, scale, precision)
    B, T, H, P = q.shape
    S, Hkv, PV = k.shape[1], k.shape[2], v.shape[3]
    if scale <= 0:  # the kernel takes the maximum before it multiplies
        sign = -1.0 if scale < 0 else 0.0
        q, q_pos, scale = q * sign, None if q_pos is None else q_pos * sign, abs(scale) or 1.0
    q, k, v = _rows(q), _rows(k), _rows(v)
    chunks = _chunks(P, q.dtype, rotated)
    if rotated:
        config = _config("attention_forward", q, k, v, q_pos, "hopper_few" if T <= 64 else "hopper_rope", sum(chunks))
    else:
        spare = key_padding_mask is not None or cu_seqlens is not None or window > 0 or Hkv < H
        config = _config("attention_forward", q, k, v, q_pos, "hopper_spare" if spare else "hopper")
    key = q_pos, key_padding_mask, cu_seqlens, causal, window, precision, rotated
    config = _tuned(_attention_fwd_kernel, config, q, k, v, *key)
    if rotated:
        config = _two_stages(config, q, PV)
    table = rope_table(rotated, base, S, chunks[0], q, False) if rotated else None
    masks, number = (padding_bytes(key_padding_mask), sequence_bounds(cu_seqlens, T)), cdiv(T, config["BLOCK_M"])
    launch(
        _attention_fwd_kernel, (number * B * H,),
        q, k, v, *_contiguous(q_pos, k_pos), *masks, table, o, lse,
        T, S, H, min(window, T + S), _sections(k, v, B * H), number,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], scale,
        LOAD_P=min(q.shape[-1], k.shape[-1]), LOAD_PV=v.shape[-1], PV=PV, GROUP=H // Hkv, IS_CAUSAL=causal,
        HAS_WINDOW=window > 0, PRECISION=precision, EXACT=_exact(q.dtype, precision),
        CHUNKS_P=chunks, CHUNKS_PV=_chunks(PV, q.dtype), **_positions(q_pos), HALF=rotated // 2, **config,
    )  # fmt: skip
    return o, lse
