"""What several of the functions do: casts, seeds, sums, plans."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..kernels.cast import cast
from ..kernels.gating import Plan, routing_plan
from ..kernels.sets import fits
from ._types import Saved


def _autocast(x: Tensor) -> bool:
    """Whether torch.autocast applies to x; on a device that has none `_check.same` then says what is wrong."""
    return x.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(x.device.type)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """For tensors that autograd follows; the functions it does not look into use `cast`."""
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def _tokens(x: Tensor) -> int:
    """How many tokens x [..., D] holds."""
    return math.prod(x.shape[:-1])


def _dtypes(tensors) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)


def _to(tensors, dtypes) -> tuple[Any, ...]:
    """Each tensor in its dtype; None where either is."""
    return tuple(None if t is None or d is None else cast(t, d) for t, d in zip(tensors, dtypes, strict=True))


def _distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """For an autograd.Function under torch.compile, which loses gradients of a tensor that comes twice (2.11) or refuses it."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(t if t is None or all(t is not u for u in tensors[:i]) else t.view_as(t) for i, t in enumerate(tensors))


def _as_they_are(x: Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtype of their operands, which the forward pass chose, also where a backward is called under autocast."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.autocast(x.device.type, enabled=False)


def _saved_config(saved: Saved, layer: str):
    """-> config, input dtypes, y and logits, from what this layer's forward saved."""
    kind, config, dtypes, y, *logits = _check.instance("saved", saved, Saved).config
    if kind != layer:
        raise ValueError(f"saved must come from {layer}_forward, got what {kind}_forward saved")
    return config, dtypes, y, logits


def _seed(seed, device: torch.device, needed: bool) -> Tensor | None:
    _check.seed(seed, device)
    if not needed:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.detach()
    return torch.full((), seed, dtype=torch.int64, device=device)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


ROUTE = 2 + len(Plan._fields)  # tensors that a gate and its plan make for a backward pass


def _routing_plan(experts: Tensor, E: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The plans of experts [sides, N, H, TOP_K], stacked, for projections in this dtype."""
    _, N, H, TOP_K = experts.shape
    return routing_plan(experts, E, fits(N, H, E, TOP_K, dtype))


def _sum_leading(x: Tensor, keep: int) -> Tensor:
    """Sum over all but the last `keep` axes, in float32."""
    return x.sum(dim=tuple(range(x.ndim - keep)), dtype=torch.float32).to(x.dtype)
