"""Positions: rotary (RoPE, arXiv 2104.09864) and Transformer-XL (arXiv 1901.02860).

RoPE  the first n = int(fraction * P) channels, rounded down to even, are n/2 pairs (x[i], x[i + n/2]); at position t
      pair i turns by the angle t base^(-2i/n); the other channels pass
XL    R_m[2c] = sin(m w_c), R_m[2c + 1] = cos(m w_c), w_c = 10000^(-2c/D), m = key position - query position
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from .gating import wide

__all__ = ["RoPE", "XL", "rope", "rope_numpy", "sinusoids", "sinusoids_numpy"]


class RoPE(NamedTuple):
    fraction: float = 0.5
    base: float = 10000.0


class XL(NamedTuple):
    weight: Any = None  # [H*P, D]
    content_bias: Any = None  # [H, P], added to the query that meets the keys
    position_bias: Any = None  # [H, P], added to the query that meets the positions


def rope_numpy(x, *, fraction=0.5, base=10000.0, offset=0) -> np.ndarray:
    """x [B, T, H, P]; row t has the position offset + t. Each pair is one complex number."""
    y = np.array(x, np.float64)
    n = int(fraction * y.shape[-1]) // 2 * 2
    for t in range(y.shape[1]):
        for i in range(n // 2):
            turned = (y[:, t, :, i] + 1j * y[:, t, :, i + n // 2]) * np.exp(1j * (offset + t) * base ** (-2 * i / n))
            y[:, t, :, i], y[:, t, :, i + n // 2] = turned.real, turned.imag
    return y


def rope(x: torch.Tensor, *, fraction: float = 0.5, base: float = 10000.0, offset: int = 0) -> torch.Tensor:
    dtype = wide(x.dtype)
    n = int(fraction * x.shape[-1]) // 2 * 2
    if n == 0:
        return x
    frequency = base ** (-torch.arange(0, n, 2, dtype=dtype, device=x.device) / n)
    position = torch.arange(offset, offset + x.shape[1], dtype=dtype, device=x.device)
    angle = (position[:, None] * frequency)[:, None, :]  # [T, 1, n/2]
    x1, x2 = x[..., :n].to(dtype).chunk(2, dim=-1)
    turned = torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., n:]], dim=-1)


def sinusoids_numpy(positions, D: int) -> np.ndarray:
    """R [len(positions), D]."""
    R = np.empty((len(positions), D))
    for row, m in enumerate(positions):
        for d in range(D):
            angle = m * 10000.0 ** (-(d // 2 * 2) / D)
            R[row, d] = np.sin(angle) if d % 2 == 0 else np.cos(angle)
    return R


def sinusoids(positions: torch.Tensor, D: int) -> torch.Tensor:
    """`positions` [M] is floating, and R has its dtype."""
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=positions.dtype, device=positions.device) / D)
    angle = positions[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :D]
