"""Attention: a[t, h] = sum_j softmax_j(scale * score(t, h, j)) v[j, h] over the keys j that the masks leave.

    score(t, h, j) = q . k                                 q and k turned first, with RoPE
    score(t, h, j) = (q + u) . k + (q + v) . (W R_{j-i})   with Transformer-XL: u, v, W of head h

The queries are the last T of S positions: query t is at i = S - T + t. Query head h reads key head h // (H // Hkv).
A row without a key gives 0, log-sum-exp -inf and zero gradients.
"""

import numpy as np
import torch

from .gating import no_autocast, wide
from .position import rope, rope_numpy, sinusoids, sinusoids_numpy

__all__ = ["attention", "attention_numpy"]


def _sees(i, j, b, causal, window, key_padding_mask, cu_seqlens) -> bool:
    """Whether the query at position i sees the key at position j."""
    if causal and j > i:
        return False
    if window is not None and abs(i - j) >= window:
        return False
    if key_padding_mask is not None and key_padding_mask[b, j]:
        return False
    if cu_seqlens is not None:  # positions outside of every sequence see nothing
        return any(start <= i < end and start <= j < end for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
    return True


def attention_numpy(
    q,
    k,
    v,
    *,
    position=None,
    causal=True,
    window=None,
    key_padding_mask=None,
    cu_seqlens=None,
    scale=None,
    return_lse=False,
):
    """q [B, T, H, P], k [B, S, Hkv, P], v [B, S, Hkv, Pv] -> [B, T, H, Pv], and lse [B, H, T] if asked for."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (B, T, H, P), (S, Hkv), Pv = q.shape, k.shape[1:3], v.shape[3]
    scale = P**-0.5 if scale is None else scale
    if hasattr(position, "fraction"):
        q = rope_numpy(q, fraction=position.fraction, base=position.base, offset=S - T)
        k = rope_numpy(k, fraction=position.fraction, base=position.base)
    out, lse = np.zeros((B, T, H, Pv)), np.full((B, H, T), -np.inf)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, :, h // (H // Hkv)], v[b, :, h // (H // Hkv)]
            for t in range(T):
                i = S - T + t
                sees = [j for j in range(S) if _sees(i, j, b, causal, window, key_padding_mask, cu_seqlens)]
                if not sees:
                    continue
                if hasattr(position, "weight"):
                    content = position.content_bias[h] if position.content_bias is not None else 0.0
                    place = position.position_bias[h] if position.position_bias is not None else 0.0
                    W = position.weight[h * P : (h + 1) * P]
                    R = sinusoids_numpy([j - i for j in sees], W.shape[1])
                    scores = keys[sees] @ (q[b, t, h] + content) + R @ (W.T @ (q[b, t, h] + place))
                else:
                    scores = keys[sees] @ q[b, t, h]
                scores = scores * scale
                top = scores.max()
                p = np.exp(scores - top)
                out[b, t, h] = p @ values[sees] / p.sum()
                lse[b, h, t] = top + np.log(p.sum())
    return (out, lse) if return_lse else out


@no_autocast
def attention(
    q,
    k,
    v,
    *,
    position=None,
    causal=True,
    window=None,
    key_padding_mask=None,
    cu_seqlens=None,
    scale=None,
    return_lse=False,
):
    """All scores at once. The operands of each product are rounded to q's dtype: turned q and k, W R, probabilities."""
    (T, H, P), (S, Hkv) = q.shape[1:], k.shape[1:3]
    scale, dtype = P**-0.5 if scale is None else scale, wide(q.dtype)
    if hasattr(position, "fraction"):
        q = rope(q, fraction=position.fraction, base=position.base, offset=S - T)
        k = rope(k, fraction=position.fraction, base=position.base)
    k, v = (a.to(dtype).repeat_interleave(H // Hkv, dim=2) for a in (k, v))

    def biased(bias):
        return (q if bias is None else (q.to(dtype) + bias.to(dtype)).to(q.dtype)).to(dtype)

    i = torch.arange(S - T, S, device=q.device)[:, None]
    j = torch.arange(S, device=q.device)[None, :]
    if hasattr(position, "weight"):
        weight = position.weight.to(dtype)
        R = sinusoids(torch.arange(1 - S, T, dtype=dtype, device=q.device), weight.shape[1]).to(q.dtype)
        places = (R.to(dtype) @ weight.T).to(q.dtype).to(dtype).view(-1, H, P)  # [S + T - 1, H, P]
        scores = torch.einsum("bthp,bshp->bhts", biased(position.content_bias), k)
        by_distance = torch.einsum("bthp,mhp->bhtm", biased(position.position_bias), places)
        scores = scores + by_distance.gather(-1, (j - i + S - 1).expand_as(scores))
    else:
        scores = torch.einsum("bthp,bshp->bhts", q.to(dtype), k)

    sees = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        sees = sees & (j <= i)
    if window is not None:
        sees = sees & ((i - j).abs() < window)
    if cu_seqlens is not None:
        # The number of sequences that begin at or before a position names its own; 0 and n + 1 are no sequence.
        sequence = torch.searchsorted(cu_seqlens.to(j.dtype), j[0], right=True)
        sees = sees & (sequence == sequence[-T:, None]) & (sequence > 0) & (sequence < len(cu_seqlens))
    sees = sees.expand(scores.shape)
    if key_padding_mask is not None:
        sees = sees & ~key_padding_mask.bool()[:, None, None, :]

    # A row without a key goes through the softmax as zeros, so that no NaN arises in either direction.
    empty = ~sees.any(dim=-1, keepdim=True)
    scores = (scores * scale).masked_fill(~sees, -torch.inf).masked_fill(empty, 0.0)
    p = scores.softmax(dim=-1).masked_fill(empty, 0.0).to(q.dtype).to(dtype)
    out = torch.einsum("bhts,bshp->bthp", p, v).to(q.dtype)
    lse = scores.logsumexp(dim=-1).masked_fill(empty[..., 0], -torch.inf)
    return (out, lse) if return_lse else out
