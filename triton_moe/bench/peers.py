"""The peers of the projections, each with the routing and the layout of weights that it likes best.

Ids of experts are flat here: h E + e, [N, H, TOP_K]. Where the gates are not part of the row everything that depends on the
choice alone is made beforehand.
"""

import functools
import importlib
from collections.abc import Callable

import torch

from .row import Inputs, Task, compiled
from .shared import ALL, CVMM, GROUPED, SCATTER, Shape


def flat_experts(experts: torch.Tensor, E: int) -> torch.Tensor:
    return experts.long() + E * torch.arange(experts.shape[1], device=experts.device)[:, None]


def choose(x: torch.Tensor, sel: torch.Tensor, s: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates [N, H, TOP_K] and experts, as one writes it in torch."""
    weights, experts = (x @ sel.t()).float().sigmoid().view(-1, s.H, s.E).topk(s.TOP_K, dim=-1)
    return weights, experts


def given(s: Shape, p: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [N, D] or a [N, H, P], the weights, gates [N, H, TOP_K] and flat experts of a row without gradients."""
    tokens = (p["x"] if "x" in p else p["a"]).detach().flatten(0, 1)
    return tokens, p["w"].detach(), p["gates"].detach().flatten(0, 1), flat_experts(p["routing"].experts, s.E)


def leaves_of(p: Inputs, turned: bool = False) -> list[torch.Tensor]:
    """x [N, D], v [H*E, D, P], o [H*E, P, D] (both [.., out, in] if turned), sel_v, sel_o as leaves of their own."""
    x, v, o, sel_v, sel_o = (p[name].detach() for name in ("x", "v", "o", "sel_v", "sel_o"))
    if turned:
        v, o = v.transpose(1, 2).contiguous(), o.transpose(1, 2).contiguous()
    return [t.clone().requires_grad_() for t in (x.flatten(0, 1), v, o, sel_v, sel_o)]


# Every expert by cuBLAS, then the gates.


def gates_of_all(weights: torch.Tensor, experts: torch.Tensor, E: int) -> torch.Tensor:
    """[N, H, E], 0 for an expert that was not chosen."""
    return weights.new_zeros(*weights.shape[:2], E).scatter(2, experts.long(), weights)


def weigh(u: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return (u.view(*gates.shape, -1) * gates[..., None]).sum(2).to(u.dtype)


def spread(a: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return (a[:, :, None] * gates[..., None]).to(a.dtype).flatten(1)


def value_by_all(s: Shape, p: Inputs) -> Task:
    x, w, weights, _ = given(s, p)
    w, gates = w.transpose(0, 1).reshape(s.D, -1), gates_of_all(weights, p["routing"].experts, s.E)
    combine = compiled(weigh)
    return Task(lambda: combine(x @ w, gates), [])


def output_by_all(s: Shape, p: Inputs) -> Task:
    a, w, weights, _ = given(s, p)
    w, gates = w.reshape(-1, s.D), gates_of_all(weights, p["routing"].experts, s.E)
    expand = compiled(spread)
    return Task(lambda: expand(a, gates) @ w, [])


def both_by_all(s: Shape, p: Inputs) -> Task:
    x, v, o, sel_v, sel_o = leaves_of(p)
    v = v.detach().transpose(0, 1).reshape(s.D, -1).requires_grad_()
    o = o.detach().reshape(-1, s.D).requires_grad_()

    def forward(x, v, o, sel_v, sel_o):
        value, output = (gates_of_all(*choose(x, sel, s), s.E) for sel in (sel_v, sel_o))
        return spread(weigh(x @ v, value), output) @ o

    function = compiled(forward)
    return Task(lambda: function(x, v, o, sel_v, sel_o), [x, v, o, sel_v, sel_o])


# torch's grouped GEMM, with a gather before and a reduction after it.


class Permute(torch.autograd.Function):
    """rows[order], whose gradient is a gather too."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(order, inverse)
        return rows[order]

    @staticmethod
    def backward(ctx, d):
        order, inverse = ctx.saved_tensors
        return d[inverse], None, None


def sort_routes(experts: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order of the routes by expert, its inverse, and where each expert's rows end."""
    ids, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(ids, torch.arange(groups, device=ids.device), right=True)
    return order, inverse, ends.to(torch.int32)


def grouped_value(x, w, weights, order, inverse, ends):
    """w [H*E, P, D]"""
    N, H, TOP_K = weights.shape
    rows = x[:, None].expand(N, H * TOP_K, x.shape[1]).reshape(-1, x.shape[1])
    u = torch.nn.functional.grouped_mm(Permute.apply(rows, order, inverse), w.transpose(1, 2), offs=ends)
    return weigh(Permute.apply(u, inverse, order), weights)


def grouped_output(a, w, weights, order, inverse, ends):
    """w [H*E, D, P]"""
    rows = spread(a, weights).view(-1, a.shape[2])
    u = torch.nn.functional.grouped_mm(Permute.apply(rows, order, inverse), w.transpose(1, 2), offs=ends)
    return Permute.apply(u, inverse, order).view(len(a), -1, w.shape[1]).sum(1)


def one_side_grouped(function: Callable, s: Shape, p: Inputs) -> Task:
    tokens, w, weights, experts = given(s, p)
    w, routes, function = w.transpose(1, 2).contiguous(), sort_routes(experts, s.H * s.E), compiled(function)
    return Task(lambda: function(tokens, w, weights, *routes), [])


def both_grouped(s: Shape, p: Inputs) -> Task:
    parameters = leaves_of(p, turned=True)

    def forward(x, v, o, sel_v, sel_o):
        (value, chosen_v), (output, chosen_o) = choose(x, sel_v, s), choose(x, sel_o, s)
        a = grouped_value(x, v, value, *sort_routes(flat_experts(chosen_v, s.E), s.H * s.E))
        return grouped_output(a, o, output, *sort_routes(flat_experts(chosen_o, s.E), s.H * s.E))

    function = compiled(forward)
    return Task(lambda: function(*parameters), parameters)


# The authors' own kernel, cvmm of github.com/RobertCsordas/switchhead.


def cvmm_value(package, x, w, weights, experts):
    return package.cvmm(x, package.cvmm_prepare_sel2(experts.flatten(1).int(), weights), w)


def cvmm_output(package, a, w, weights, experts):
    selection = package.cvmm_prepare_sel2(experts.flatten(1).int(), weights)
    selection.sel_index = selection.out_index // weights.shape[2]
    selection.reduction_weight = weights.flatten(1)
    return package.cvmm(a, selection, w)


def one_side_cvmm(function: Callable, s: Shape, p: Inputs) -> Task:
    package, arguments = importlib.import_module("switchhead.cvmm"), given(s, p)

    def call():
        with torch.autocast("cuda", torch.bfloat16):  # without it cvmm computes in float32
            return function(package, *arguments)

    return Task(call, [])


def both_cvmm(s: Shape, p: Inputs) -> Task:
    package = importlib.import_module("switchhead.cvmm")
    x, v, o, sel_v, sel_o = parameters = leaves_of(p)

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            (value, chosen_v), (output, chosen_o) = choose(x, sel_v, s), choose(x, sel_o, s)
            a = cvmm_value(package, x, v, value, flat_experts(chosen_v, s.E))
            return cvmm_output(package, a, o, output, flat_experts(chosen_o, s.E))

    return Task(call, parameters)


# github.com/shawntan/scattermoe: weights [.., out, in].


def scatter_value(package, x, w, weights, routes):
    gates = weights.flatten(0, 1).to(x.dtype)  # a row for each head
    v = package.parallel_linear(x, w.transpose(1, 2), weights.shape[1] * weights.shape[2], *routes, gates=gates)
    return v.view(*weights.shape[:2], -1)


def scatter_output(package, a, w, weights, routes):
    gates = weights.flatten(1).to(a.dtype)
    return package.parallel_linear(a.flatten(0, 1), w.transpose(1, 2), weights.shape[2], *routes, gates=gates)


def one_side_scattermoe(function: Callable, s: Shape, p: Inputs) -> Task:
    package = importlib.import_module("scattermoe.parallel_experts")
    tokens, w, weights, experts = given(s, p)
    w, routes = w.transpose(1, 2).contiguous(), package.flatten_sort_count(experts, s.H * s.E)
    return Task(lambda: function(package, tokens, w, weights, routes), [])


def both_scattermoe(s: Shape, p: Inputs) -> Task:
    package = importlib.import_module("scattermoe.parallel_experts")
    x, v, o, sel_v, sel_o = parameters = leaves_of(p, turned=True)

    def call():
        (value, chosen_v), (output, chosen_o) = choose(x, sel_v, s), choose(x, sel_o, s)
        routes_v, routes_o = (package.flatten_sort_count(flat_experts(chosen, s.E), s.H * s.E) for chosen in (chosen_v, chosen_o))
        return scatter_output(package, scatter_value(package, x, v, value, routes_v), o, output, routes_o)

    return Task(call, parameters)


VALUE_PEERS = {
    ALL: value_by_all,
    GROUPED: functools.partial(one_side_grouped, grouped_value),
    CVMM: functools.partial(one_side_cvmm, cvmm_value),
    SCATTER: functools.partial(one_side_scattermoe, scatter_value),
}
OUTPUT_PEERS = {
    ALL: output_by_all,
    GROUPED: functools.partial(one_side_grouped, grouped_output),
    CVMM: functools.partial(one_side_cvmm, cvmm_output),
    SCATTER: functools.partial(one_side_scattermoe, scatter_output),
}
BOTH_PEERS = {ALL: both_by_all, GROUPED: both_grouped, CVMM: both_cvmm, SCATTER: both_scattermoe}
