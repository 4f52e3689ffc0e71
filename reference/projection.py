"""Sparse projections: every token and head multiplies by the experts it chose, and by nothing else.

    value   y[n, h] = sum_k     weights[n, h, k] * (x[n]    w[h E + experts[n, h, k]])      w [H*E, D, P]
    output  y[n]    = sum_{h,k} weights[n, h, k] * (a[n, h] w[h E + experts[n, h, k]])      w [H*E, P, D]

The NumPy forwards go token by token; the twins go expert by expert, over the tokens that chose it,
and each product is rounded to the inputs' dtype, as torch's own matrix product would return it.
"""

import numpy as np
import torch

from .gating import no_autocast, wide

__all__ = ["output_projection", "output_projection_numpy", "value_projection", "value_projection_numpy"]


def value_projection_numpy(x, w, weights, experts) -> np.ndarray:
    """x [..., D], w [H*E, D, P], weights and experts [N, H, TOP_K] -> [..., H, P]."""
    rows, w = np.asarray(x, np.float64).reshape(-1, x.shape[-1]), np.asarray(w, np.float64)
    N, H, top_k = experts.shape
    E = w.shape[0] // H
    y = np.zeros((N, H, w.shape[2]))
    for n in range(N):
        for h in range(H):
            for k in range(top_k):
                y[n, h] += weights[n, h, k] * (rows[n] @ w[h * E + experts[n, h, k]])
    return y.reshape(*x.shape[:-1], H, w.shape[2])


@no_autocast
def value_projection(x, w, weights, experts) -> torch.Tensor:
    rows, w = x.reshape(-1, x.shape[-1]).to(wide(x.dtype)), w.to(wide(x.dtype))
    N, H, _ = experts.shape
    E = w.shape[0] // H
    heads = []
    for h in range(H):
        y = rows.new_zeros(N, w.shape[2])
        for e, expert in enumerate(w[h * E : (h + 1) * E].unbind()):
            n, k = (experts[:, h] == e).nonzero(as_tuple=True)
            y = y.index_add(0, n, weights[n, h, k, None] * (rows[n] @ expert).to(x.dtype))
        heads.append(y)
    return torch.stack(heads, dim=1).to(x.dtype).view(*x.shape[:-1], H, w.shape[2])


def output_projection_numpy(a, w, weights, experts) -> np.ndarray:
    """a [..., H, P], w [H*E, P, D], weights and experts [N, H, TOP_K] -> [..., D]."""
    rows, w = np.asarray(a, np.float64).reshape(-1, *a.shape[-2:]), np.asarray(w, np.float64)
    N, H, top_k = experts.shape
    E = w.shape[0] // H
    y = np.zeros((N, w.shape[2]))
    for n in range(N):
        for h in range(H):
            for k in range(top_k):
                y[n] += weights[n, h, k] * (rows[n, h] @ w[h * E + experts[n, h, k]])
    return y.reshape(*a.shape[:-2], w.shape[2])


@no_autocast
def output_projection(a, w, weights, experts) -> torch.Tensor:
    rows, w = a.reshape(-1, *a.shape[-2:]).to(wide(a.dtype)), w.to(wide(a.dtype))
    N, H, _ = experts.shape
    E = w.shape[0] // H
    y = rows.new_zeros(N, w.shape[2])
    for h in range(H):
        for e, expert in enumerate(w[h * E : (h + 1) * E].unbind()):
            n, k = (experts[:, h] == e).nonzero(as_tuple=True)
            y = y.index_add(0, n, weights[n, h, k, None] * (rows[n, h] @ expert).to(a.dtype))
    return y.to(a.dtype).view(*a.shape[:-2], w.shape[2])
