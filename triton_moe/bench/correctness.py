"""A row's output and gradients against `reference/`: what is wrong is not timed."""

import math

import torch

from .row import Inputs, Row, leaves


def last(row: Row, t: torch.Tensor) -> torch.Tensor:
    """The last sequence of a batched tensor."""
    return t[-1:] if row.packed is None else t[:, -row.packed :]


def before_last(row: Row, t: torch.Tensor) -> torch.Tensor:
    return t[:-1] if row.packed is None else t[:, : -row.packed]


def check(row: Row, inputs: Inputs) -> float:
    """The largest relative error of our output and gradients; AssertionError when one is out of bounds."""
    from ..testing import assert_close

    ours = leaves(inputs)
    cut = {name: last(row, t).detach() if name in row.batched else t for name, t in inputs.items()}
    device = ours[row.batched[0]].device.type
    dtype = torch.bfloat16 if row.autocast else ours[row.batched[0]].dtype
    with autocast(row, device):
        with torch.no_grad():
            experts = row.experts(inputs)
        actual = row.ours(inputs)
    tokens = math.prod(cut[row.batched[0]].shape[:2])
    if isinstance(experts, torch.Tensor):
        experts = experts[-tokens:]
    elif experts is not None:
        experts = [chosen[-tokens:] for chosen in experts]

    cotangent = torch.zeros_like(actual)
    last(row, cotangent).copy_(torch.randn_like(last(row, actual)))
    gradients = dict(zip(ours, torch.autograd.grad(actual, list(ours.values()), cotangent), strict=True))
    results = {"output": last(row, actual)}
    for name, gradient in gradients.items():
        if name in row.batched:
            if before_last(row, gradient).any():
                raise AssertionError(f"d{name}: sequences influence each other")
            gradient = last(row, gradient)
        results[f"d{name}"] = gradient

    def run_reference(lower: torch.dtype, gates: torch.dtype) -> dict[str, torch.Tensor]:
        # Gates are float32 inputs where the others are bfloat16; under autocast all inputs are cast down.
        dtypes = {name: lower if row.autocast or t.dtype == dtype else gates for name, t in ours.items()}
        again = {name: cut[name].detach().to(dtypes[name]).requires_grad_() for name in ours}
        output = row.reference({**cut, **again}, experts)
        parts = torch.autograd.grad(output, list(again.values()), last(row, cotangent).to(output.dtype))
        return {"output": output, **{f"d{name}": part for name, part in zip(again, parts, strict=True)}}

    truth, twin = run_reference(torch.float64, torch.float64), run_reference(dtype, torch.float32)
    for name, result in results.items():
        assert_close(result, truth[name], twin[name], name=f"{row.name}: {name}")
    with torch.no_grad():
        return max(float((r - truth[name]).norm() / truth[name].norm()) for name, r in results.items())


def autocast(row: Row, device: str):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=row.autocast)
