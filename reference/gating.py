"""Gating: which experts a token uses in each head, and with what weight.

    logits[n, h, e] = sum_d x[n, d] sel[h E + e, d]
    experts[n, h]   = the TOP_K largest of logits[n, h, :], in that order
    weights[n, h]   = sigmoid of the chosen logits, or a softmax

Equal logits (-0 = +0): the lower id wins. NaN ranks below -inf. Experts struck by expert dropout rank below all others.
Also here, for all files: the random bits of every dropout, and the precision the twins compute in.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Routing", "gating", "gating_numpy", "philox_uniform", "select", "select_numpy", "wide"]


class Routing(NamedTuple):
    """What a token computes with: arrays of `gating_numpy`, tensors of `gating`."""

    weights: Any  # [N, H, TOP_K], wide
    experts: Any  # [N, H, TOP_K] int64 in [0, E), in order of selection
    logits: Any  # [N, H, E], wide


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a twin of `dtype` tensors accumulates in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(twin):
    """Run a twin, whose first argument is a tensor, with autocast off: each twin says itself where it rounds."""

    @functools.wraps(twin)
    def call(*args, **kwargs):
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.autocast(first.device.type, enabled=False):
            return twin(*args, **kwargs)

    return call


# Random bits


def philox_uniform(seed, row, col, stream) -> np.ndarray:
    """Uniform in [0, 1), float64, from Philox4x32-10: key `seed` (64 bits), counter (row, col, stream, 0).

    The top 24 bits of the first output word, so every value is exact in float32 too. `row` and `col` are integers or
    integer arrays and broadcast together.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)  # words are kept in uint64, so that a product of two has room
    seed = int(seed) & 0xFFFFFFFFFFFFFFFF
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    row, col = np.broadcast_arrays(np.asarray(row, np.int64), np.asarray(col, np.int64))
    word0, word1 = row.astype(np.uint64) & low, col.astype(np.uint64) & low
    word2, word3 = np.full_like(word0, int(stream)), np.zeros_like(word0)
    for _ in range(10):
        product0, product2 = word0 * np.uint64(0xD2511F53), word2 * np.uint64(0xCD9E8D57)
        word0, word1, word2, word3 = (
            (product2 >> half) ^ word1 ^ np.uint64(key0),
            product2 & low,
            (product0 >> half) ^ word3 ^ np.uint64(key1),
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return (word0 >> np.uint64(8)).astype(np.float64) * 2.0**-24


def _hit(probability: float, seed, row, col, stream: int) -> np.ndarray:
    # The probability is rounded to float32 as a kernel's argument is.
    return philox_uniform(seed, row, col, stream) < np.float32(probability)


def drop_numpy(x: np.ndarray, probability: float, seed, row: int, stream: int, *, offset: int = 0) -> np.ndarray:
    """Dropout of one token's x [C], with the counters (row, offset + c); what stays is scaled by 1 / (1 - p)."""
    if probability == 0.0:
        return x
    hit = _hit(probability, seed, row, offset + np.arange(len(x)), stream)
    return np.where(hit, 0.0, x / (1.0 - probability))


def drop(x: torch.Tensor, probability: float, seed, stream: int, *, rows=None, offset: int = 0) -> torch.Tensor:
    """The same for the tokens `rows` (all of them if None) of x [N, C]."""
    if probability == 0.0:
        return x
    rows = np.arange(x.shape[0]) if rows is None else rows.cpu().numpy()
    hit = _hit(probability, seed, rows[:, None], offset + np.arange(x.shape[1]), stream)
    kept = x.to(wide(x.dtype)) * (1.0 / (1.0 - probability))
    return kept.masked_fill(torch.from_numpy(hit).to(x.device), 0.0).to(x.dtype)


# Selection


def select_numpy(logits: np.ndarray, top_k: int, struck: np.ndarray | None = None) -> np.ndarray:
    """Ids [N, H, TOP_K] of the largest of logits [N, H, E]; `struck` [N, H, E] ranks last."""
    N, H, E = logits.shape
    experts = np.empty((N, H, top_k), np.int64)
    for n in range(N):
        for h in range(H):

            def rank(e, n=n, h=h):
                logit, last = logits[n, h, e], struck is not None and bool(struck[n, h, e])
                return (last, True, 0.0, e) if np.isnan(logit) else (last, False, -logit, e)

            experts[n, h] = sorted(range(E), key=rank)[:top_k]
    return experts


def select(logits: torch.Tensor, top_k: int, struck: torch.Tensor | None = None) -> torch.Tensor:
    """Two stable sorts: by logit, then by class (number, NaN, struck number, struck NaN). Not differentiated."""
    logits = logits.detach()
    missing = logits.isnan()
    rank = missing.int() if struck is None else missing.int() + 2 * struck.int()
    order = logits.masked_fill(missing, -torch.inf) + 0.0  # -0 becomes +0
    order = order.sort(dim=-1, descending=True, stable=True).indices
    last = rank.gather(-1, order).sort(dim=-1, stable=True).indices
    return order.gather(-1, last)[..., :top_k]


# Gating


def gating_numpy(x, sel, *, n_heads=1, top_k, mode="sigmoid", expert_dropout=0.0, seed=None, stream=0, experts=None) -> Routing:
    """x [..., D], sel [H*E, D]; `experts` [N, H, TOP_K], if given, replaces the selection."""
    x, sel = np.asarray(x, np.float64).reshape(-1, x.shape[-1]), np.asarray(sel, np.float64)
    N, H, E = x.shape[0], n_heads, sel.shape[0] // n_heads
    logits = np.empty((N, H, E))
    struck = np.zeros((N, H, E), bool)
    for h in range(H):
        for e in range(E):
            logits[:, h, e] = x @ sel[h * E + e]
            if expert_dropout > 0.0:
                struck[:, h, e] = [_hit(expert_dropout, seed, n, h * E + e, stream) for n in range(N)]
    experts = select_numpy(logits, top_k, struck) if experts is None else np.asarray(experts, np.int64)
    experts = experts.reshape(N, H, top_k)
    weights = np.empty((N, H, top_k))
    for n in range(N):
        for h in range(H):
            chosen = logits[n, h, experts[n, h]]
            if mode == "sigmoid":
                weights[n, h] = np.exp(-np.logaddexp(0.0, -chosen))  # 1 / (1 + exp(-chosen)) without overflow
            elif mode == "softmax":
                weights[n, h] = np.exp(chosen - np.logaddexp.reduce(logits[n, h]))
            elif mode == "softmax_topk":
                weights[n, h] = np.exp(chosen - np.logaddexp.reduce(chosen))
            else:
                raise ValueError(f"mode must be 'sigmoid', 'softmax' or 'softmax_topk', got {mode!r}")
    return Routing(weights, experts, logits)


@no_autocast
def gating(x, sel, *, n_heads=1, top_k, mode="sigmoid", expert_dropout=0.0, seed=None, stream=0, experts=None) -> Routing:
    x = x.reshape(-1, x.shape[-1])
    N, H, E = x.shape[0], n_heads, sel.shape[0] // n_heads
    dtype = wide(x.dtype)
    logits = (x.to(dtype) @ sel.to(dtype).T).view(N, H, E)
    if experts is None:
        struck = None
        if expert_dropout > 0.0:
            hit = _hit(expert_dropout, seed, np.arange(N)[:, None], np.arange(H * E)[None, :], stream)
            struck = torch.from_numpy(hit).to(x.device).view(N, H, E)
        experts = select(logits, top_k, struck)
    experts = experts.to(torch.int64).reshape(N, H, top_k)
    # Sigmoid after the gather: the gradient of a logit that was not chosen is an exact zero, even if it is NaN.
    if mode == "sigmoid":
        weights = logits.gather(-1, experts).sigmoid()
    elif mode == "softmax":
        weights = logits.softmax(dim=-1).gather(-1, experts)
    elif mode == "softmax_topk":
        weights = logits.gather(-1, experts).softmax(dim=-1)
    else:
        raise ValueError(f"mode must be 'sigmoid', 'softmax' or 'softmax_topk', got {mode!r}")
    return Routing(weights, experts, logits)
