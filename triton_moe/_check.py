"""Argument checks of the public functions: each error names the argument, what came and what was expected."""

import math

import torch

from .kernels.common import INTERPRET, interpreter_hint

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(name: str, value, *shape: int | None, ndim: int | None = None) -> torch.Tensor:
    """`value` is a tensor; None in `shape` leaves an axis open, and `ndim` asks for at least so many axes."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if ndim is not None and value.ndim < ndim:
        raise ValueError(f"{name} must have at least {ndim} axes, got shape {tuple(value.shape)}")
    if shape and (value.ndim != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape, strict=True))):
        expected = ", ".join("*" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(value.shape)}")
    return value


def same(reference: torch.Tensor, tensors: dict, *, autocast: bool) -> None:
    """All tensors are on a device that can run the kernels, and share the dtype of the first unless autocast will cast."""
    device = reference.device
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRET):
        first = next(iter(tensors))
        raise ValueError(f"{first} is on {device}: {interpreter_hint()}")
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{name} is on {t.device}, expected {device} like the other arguments")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {t.dtype}, expected one of float32, float16, bfloat16")
        if t.dtype != reference.dtype and not autocast:
            raise TypeError(
                f"{name} has dtype {t.dtype}, expected {reference.dtype} like the other arguments (or use torch.autocast)"
            )


def integer(name: str, value, low: int, high: int | None = None, why: str = ""):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}{why}, got {value}")
    return value


def probability(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
    return float(value)


def choice(name: str, value, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def gradient(name: str, value, like: torch.Tensor | None) -> None:
    """A gradient given to a `*_backward`: None, or a floating tensor of the output's shape and device."""
    if value is None:
        return
    if like is None:
        raise ValueError(f"{name} must be None: the forward returned no such output")
    tensor(name, value, *like.shape)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, expected {like.device} like the output")


def keywords(function: str, given: dict, allowed: frozenset[str]) -> None:
    for name in given:
        if name not in allowed:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def instance(name: str, value, kind: type):
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    return value


def mask(name: str, value, shape: tuple[int, ...], device: torch.device) -> None:
    if value is None:
        return
    tensor(name, value, *shape)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool (True = removed), got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, expected {device} like the other arguments")


def seed(value, device: torch.device) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        integer("seed", value, -(2**63), 2**63 - 1)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"seed must be an int, an int64 scalar tensor or None, got {type(value).__name__}")
    if value.dtype != torch.int64 or value.ndim != 0:
        raise TypeError(f"seed must be an int64 scalar tensor, got {value.dtype} of shape {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"seed is on {value.device}, expected {device} like the other arguments")
