"""One forward and backward pass of each op through its launchers: what `compile` compiles and `autotune` measures.

A workload takes an `Inputs`, which makes its tensors, and a shape in the letters of the kernels; it returns its results by name.
On meta tensors nothing runs. In float64, what the tuner takes for the truth, plain PyTorch runs instead of the kernels.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .kernels import attention, cast, common, gating, mlp, norm, position, projection, sets
from .kernels import xl as transformer_xl


class Inputs:
    """Makes the tensors of a workload: empty ones on `meta`, elsewhere random ones.

    They hold values of `stored` and have the dtype that is computed in. Two Inputs that differ in the latter only give the same
    values, and the same experts, so results in float64 are the truth for all others.
    """

    def __init__(self, device: str, dtype: torch.dtype, stored: torch.dtype | None = None):
        self.device, self.dtype, self.stored = device, dtype, stored or dtype
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, fan: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """[shape] of standard deviation fan**-0.5"""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        x = torch.randn(shape, device=self.device, generator=self.generator) * fan**-0.5
        return x.to(self.stored).to(dtype or self.dtype)

    def seed(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self.device)

    def routing(self, N: int, H: int, E: int, TOP_K: int, D: int) -> tuple[Tensor, ...]:
        """weights, experts and the fields of a plan"""
        x, sel = self(N, D, dtype=self.stored), self(H * E, D, fan=D, dtype=self.stored)
        weights, experts, _ = gating.gating_forward(x, sel, None, 1, H, TOP_K, "sigmoid", 0.0, 0)
        plan = gating.routing_plan(experts, E, sets.fits(N, H, E, TOP_K, self.dtype))
        return weights[0].to(torch.promote_types(self.dtype, torch.float32)), experts[0], *(t[0] for t in plan)


def _gating(make, sides, H, E, TOP_K, D, mode="sigmoid", dropout=0.0, N=4096):
    """In 16 bits also of a float32 x, as under autocast."""
    x, sel, seed = make(N, D), make(sides * H * E, D, fan=D), make.seed() if dropout else None
    if make.dtype == torch.float64:
        return _exact_gating(make, x, sel, sides, H, TOP_K, mode)
    options = sel, seed, sides, H, TOP_K, mode, dropout, 0
    weights, experts, logits = gating.gating_forward(x, *options)
    results = {"weights": weights, "logits": logits}
    if make.dtype != torch.float32:
        of_float, _, logits_of_float, x = gating.cast_and_gate(x.float(), *options)
        results |= {"weights_of_float": of_float, "logits_of_float": logits_of_float}
    gating.routing_plan(experts, E, sets.fits(N, H, E, TOP_K, make.dtype))
    dweights, dlogits = make(*weights.shape, dtype=torch.float32), make(*logits.shape, dtype=torch.float32)
    gating.gating_backward(dweights, dlogits, x, sel, weights, experts, logits, mode)
    return results


def _projection(make, H, E, TOP_K, P, D, N=4096, width=0):
    """`width`: of a head without the padding of a layer."""
    wanted = width or P
    precision = common.input_precision(make.dtype)
    x, w_v, w_o = make(N, D), make(H * E, D, P, fan=D), make(H * E, P, D, fan=H * TOP_K * P)
    dv, dy = make(N, H, P), make(N, D)
    routing = make.routing(N, H, E, TOP_K, D)
    if make.dtype == torch.float64:
        return _exact_projection(x, w_v, w_o, dv, dy, routing[0], routing[1], wanted)
    v, u = projection.value_forward(x, w_v, *routing, w_v.shape[2], precision)
    gated, order_b, gates = projection.value_backward_rows(dv, u, *routing)
    results = {"v": v, "value dgates": gates}
    value = projection.value_backward(dv, gated, order_b, x, w_v, *routing, precision, None, wanted)
    results |= dict(zip(("value dx", "value dw"), value, strict=True))
    results["y"] = projection.output_forward(v, w_o, *routing, precision)
    output = projection.output_backward(dy, v, w_o, *routing, precision, None, wanted)
    results |= dict(zip(("output da", "output dw", "output dgates"), output, strict=True))
    projection.dropout_rows(dy, make.seed(), 0.1, 0)
    return results


def _mlp(make, E, G, TOP_K, D, activation="relu", bias=False, dropout=0.0, N=4096):
    x, keys = make(N, D), make(E, D, 2 * G if activation in ("swiglu", "geglu") else G, fan=D)
    values, dy = make(E, G, D, fan=G * TOP_K), make(N, D)
    b, below = (make(*keys.shape[::2]), (make(D), make(N, D), make(N, D))) if bias else (None, ())
    o_bias, base, added = below or (None, None, None)
    weights, experts, *plan = make.routing(N, 1, E, TOP_K, D)[:4]
    args = keys, values, b, o_bias, make.seed() if dropout else None, weights, experts, *plan
    options = activation, dropout, 0, common.input_precision(make.dtype)
    dlogits, sel = make(N, E), make(E, D, fan=D)
    if make.dtype == torch.float64:
        return _exact_mlp(x, dy, keys, values, b, sum(below), weights, experts, activation, dlogits @ sel)
    y, z = mlp.mlp_forward(x, *args, *options, base, added)
    dz, *gradients = mlp.mlp_backward(dy, x, *args, z, *options)
    results = {"y": y, **dict(zip(("dkeys", "dvalues", "dbias", "dweights"), gradients, strict=True))}
    for name, gate, columns in (("dx alone", (None, None), mlp.COLUMNS), ("dx", (dlogits, sel), mlp.COLUMNS // 2)):
        results[name] = mlp.mlp_backward_input(dz, keys, *plan, TOP_K, *gate, options[-1], make.dtype, columns)
    return results


def _attention(make, P, H=4, Hkv=None, causal=True, window=0, padding=False, packed=False, xl=0, rope="", B=8, T=1024):
    """`xl` is the model width of a Transformer-XL layer, with as many tokens of memory as queries; `packed` cuts B = 1 row into
    16 sequences; `rope` "pairs" rotates dq and dk back, "halves" also q and k on load."""
    S, Hkv = 2 * T if xl else T, Hkv or H
    if packed:
        B = 1
    q, k, v, do = (make(B, n, h, P) for n, h in ((T, H), (S, Hkv), (S, Hkv), (T, H)))
    mask = torch.zeros(B, S, dtype=torch.bool, device=make.device) if padding else None
    cu_seqlens = torch.arange(17, dtype=torch.int32, device=make.device) * (T // 16) if packed else None
    q_pos = k_pos = None
    if xl:
        F = transformer_xl.channels(xl, S, window, causal, make.stored == torch.float32)
        q_pos, k_pos = make(B, T, H, F), make(S, F, fan=F)
    if make.dtype == torch.float64:
        dlse = make(B, H, T) if padding else None
        return _exact_attention(q, k, v, q_pos, k_pos, do, dlse, causal, window, mask, cu_seqlens)
    args = q, k, v, q_pos, k_pos, mask, cu_seqlens
    options = causal, window, P**-0.5, common.input_precision(make.dtype)
    n, on_load = P // 2 * 2 if rope else 0, rope == "halves"
    o, lse = attention.attention_forward(*args, *options, n if on_load else 0, 10000.0)
    dlse = make(*lse.shape, dtype=torch.float32) if padding else None
    gradients = attention.attention_backward(do, dlse, *args, o, lse, *options, False, n, 10000.0, on_load)
    return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv", "dq_pos"), gradients, strict=True))}


def _position(make, P, D, H=4, T=1024):
    q, weight = make(8, T, H, P), make(H * P, D, fan=D)
    for conjugate in (False, True):
        position.rope_rotate_(q, P // 4 * 2, 10000.0, 0, conjugate)
    position.rope_pairs_(q, P // 4 * 2, 10000.0, 0)
    position.rope_pairs(q, P // 4 * 2, 10000.0, 0, common.cdiv(P, 32) * 32)
    span = 2 * T, 0, True, common.input_precision(make.dtype)
    q_pos, k_pos, narrow = transformer_xl.xl_query(q, weight, *span)
    transformer_xl.xl_query_backward_(q_pos, torch.zeros_like(q), q, narrow, D, *span)
    return {"keys": k_pos}


def _cast(make, H, E, P, D, N=4096):
    """From float32, as under autocast, with heads of P channels filled up to a multiple of 32."""
    wide = common.cdiv(P, 32) * 32
    q, v, sel, x = (make(*shape, dtype=torch.float32) for shape in ((H, P, D), (H * E, D, P), (1, H * E, D), (N, D)))
    joined = (q, q, sel, sel), ((P, P, H * E, H * E), D), (P // 2 * 2, P // 2 * 2, 0, 0)
    groups = joined, ((v,), (D, wide), 0)
    other = torch.float16 if make.dtype == torch.float32 else make.dtype  # there is nothing to cast to float32
    return dict(zip(("joined", "v", "x"), (*cast.assemble(make.dtype, *groups), cast.cast(x, other)), strict=True))


def _norm(make, D, N=4096):
    """Of a float32 stream, as under autocast."""
    x, dsum, weight, bias = (make(*shape, dtype=torch.float32) for shape in ((N, D), (N, D), (D,), (D,)))
    added, dh = make(N, D), make(N, D)
    h, *statistics = norm.norm_forward(x, added, weight, bias, 1e-5, make.dtype)
    gradients = norm.norm_backward(dh, dsum, x, added, *statistics, weight, True, weight.dtype, bias.dtype)
    return dict(zip(("h", "dx", "copy", "dweight", "dbias"), (h, *gradients), strict=True))


# ---- the same in float64, by plain PyTorch


def has_twin(op: str, shape: dict) -> bool:
    """Whether a workload can run in float64: not with random bits, and rotations are only the kernels'."""
    return op in ("gating", "projection", "mlp", "attention") and not (shape.get("dropout") or shape.get("rope"))


def _exact_gating(make, x, sel, sides, H, TOP_K, mode):
    from . import reference

    # The experts are those that the kernel chooses in the dtype at hand: where two logits are equal, there is no right choice.
    experts = gating.gating_forward(x.to(make.stored), sel.to(make.stored), None, sides, H, TOP_K, mode, 0.0, 0)[1]
    found = [
        reference.gating(x, sel_of_side, n_heads=H, top_k=TOP_K, mode=mode, experts=experts_of_side)
        for sel_of_side, experts_of_side in zip(sel.chunk(sides), experts, strict=True)
    ]
    weights, logits = torch.stack([f.weights for f in found]), torch.stack([f.logits for f in found])
    return {"weights": weights, "logits": logits, "weights_of_float": weights, "logits_of_float": logits}


def _routed(weights, experts, h, products, D):
    """[N, D]: for each token the sum over its routes of head h, weights times `products[e](tokens)`, expert by expert."""
    N, H, TOP_K = weights.shape
    flat, y = weights.reshape(-1), weights.new_zeros(N, D)
    for e, product in enumerate(products):
        n, k = (experts[:, h] == e).nonzero(as_tuple=True)
        y = y.index_add(0, n, flat.index_select(0, (n * H + h) * TOP_K + k)[:, None] * product(n))
    return y


def _exact_projection(x, w_v, w_o, dv, dy, weights, experts, wanted):
    def project(rows, w):  # of each head, through its experts
        E = len(w) // len(rows)
        experts_of = [w[h * E : (h + 1) * E].unbind() for h in range(len(rows))]
        products = [[lambda n, a=a, u=u: a.index_select(0, n) @ u for u in us] for a, us in zip(rows, experts_of, strict=True)]
        return [_routed(weights, experts, h, each, w.shape[2]) for h, each in enumerate(products)]

    H = weights.shape[1]
    with torch.enable_grad():
        x, w_v, w_o, weights = (a.detach().requires_grad_() for a in (x, w_v, w_o, weights))
        v = torch.stack(project([x] * H, w_v), 1)
        dx, dw_v, dgates_v = torch.autograd.grad(v, (x, w_v, weights), dv)
        a = v.detach().requires_grad_()
        y = sum(project(a.unbind(1), w_o))
        da, dw_o, dgates_o = torch.autograd.grad(y, (a, w_o, weights), dy)
    results = {"v": a.detach(), "value dgates": dgates_v, "value dx": dx, "value dw": dw_v[..., :wanted], "y": y.detach()}
    return results | {"output da": da, "output dw": dw_o[:, :wanted], "output dgates": dgates_o}


def _exact_mlp(x, dy, keys, values, bias, to_y, weights, experts, activation, to_dx):
    from .reference.layers import _activation

    with torch.enable_grad():
        x, keys, values, weights = (a.detach().requires_grad_() for a in (x, keys, values, weights))
        given = bias is not None
        bias = (bias if given else torch.zeros_like(keys[:, 0])).detach().requires_grad_()
        parts = zip(keys.unbind(), bias.unbind(), values.unbind(), strict=True)
        products = [lambda n, k=k, b=b, v=v: _activation(activation, x.index_select(0, n) @ k + b) @ v for k, b, v in parts]
        y = _routed(weights, experts, 0, products, values.shape[2])
        dx, dkeys, dvalues, dbias, dweights = torch.autograd.grad(y, (x, keys, values, bias, weights), dy)
    results = {"y": y.detach() + to_y, "dx alone": dx, "dx": dx + to_dx, "dkeys": dkeys, "dvalues": dvalues, "dweights": dweights}
    return results | {"dbias": dbias[: len(keys) * given]}


def _exact_attention(q, k, v, q_pos, k_pos, do, dlse, causal, window, mask, cu_seqlens):
    """One sequence at a time, for the memory of its scores. Position channels are more channels of queries and keys."""
    from . import reference

    P, found = q.shape[3], []
    if q_pos is not None:
        q, k = torch.cat([q, q_pos], 3), torch.cat([k, k_pos[:, None].expand(*k.shape[:3], -1)], 3)
    for b in range(len(q)):
        with torch.enable_grad():
            inputs = [a[b : b + 1].detach().requires_grad_() for a in (q, k, v)]
            padding = None if mask is None else mask[b : b + 1]
            options = {"causal": causal, "window": window or None, "key_padding_mask": padding, "cu_seqlens": cu_seqlens}
            o, lse = reference.attention(*inputs, **options, scale=P**-0.5, return_lse=True)
            both = [(o, do), (lse, dlse)][: 1 if dlse is None else 2]
            gradients = torch.autograd.grad([a for a, _ in both], inputs, [d[b : b + 1] for _, d in both])
        found.append((o.detach(), lse.detach(), *gradients))
    o, lse, dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    results = {"o": o, "lse": lse, "dq": dq[..., :P], "dk": dk[..., :P], "dv": dv}
    return results if q_pos is None else results | {"dq_pos": dq[..., P:]}


WORKLOADS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "gating": _gating,
    "projection": _projection,
    "mlp": _mlp,
    "attention": _attention,
    "position": _position,
    "cast": _cast,
    "norm": _norm,
}


# Shapes of published models and of what users train, 32768 tokens of bfloat16, the most used first. Heads are as wide as the
# layers pad them, 100 channels to 128 and 76 to 80; `width` is what gradients of weights keep.
_PAPER: list[tuple[str, dict]] = [
    ("projection", {"H": 4, "E": 4, "TOP_K": 2, "P": 128, "D": 1024, "N": 32768, "width": 100}),
    ("mlp", {"E": 32, "G": 128, "TOP_K": 4, "D": 1024, "N": 32768}),
    ("attention", {"P": 128, "H": 4, "B": 32, "T": 1024}),
    ("gating", {"sides": 2, "H": 4, "E": 4, "TOP_K": 2, "D": 1024, "N": 32768}),
    ("gating", {"sides": 1, "H": 1, "E": 32, "TOP_K": 4, "D": 1024, "N": 32768}),
    ("projection", {"H": 2, "E": 5, "TOP_K": 3, "P": 80, "D": 412, "N": 32768, "width": 76}),
    ("mlp", {"E": 16, "G": 128, "TOP_K": 4, "D": 412, "N": 32768}),
    ("attention", {"P": 80, "H": 2, "B": 128, "T": 256}),
    ("gating", {"sides": 2, "H": 2, "E": 5, "TOP_K": 3, "D": 412, "N": 32768}),
    ("attention", {"P": 64, "H": 2, "B": 64, "T": 512}),
    ("projection", {"H": 2, "E": 8, "TOP_K": 4, "P": 144, "D": 1024, "N": 32768, "width": 132}),
    ("projection", {"H": 2, "E": 8, "TOP_K": 4, "P": 132, "D": 1024, "N": 32768}),  # apart from a layer
]
_MOEUT: list[tuple[str, dict]] = [
    ("projection", {"H": 4, "E": 10, "TOP_K": 2, "P": 96, "D": 412, "N": 32768, "width": 82}),
    ("mlp", {"E": 155, "G": 128, "TOP_K": 12, "D": 412, "N": 32768}),
    ("attention", {"P": 96, "H": 4, "B": 32, "T": 1024}),
    ("mlp", {"E": 387, "G": 128, "TOP_K": 16, "D": 1024, "N": 16384}),
    ("gating", {"sides": 1, "H": 1, "E": 155, "TOP_K": 12, "D": 412, "N": 32768}),
    ("projection", {"H": 4, "E": 10, "TOP_K": 2, "P": 128, "D": 1024, "N": 32768}),
]
_LLM: list[tuple[str, dict]] = [
    ("projection", {"H": 4, "E": 4, "TOP_K": 2, "P": 128, "D": 1024, "N": 32768}),
    ("projection", {"H": 8, "E": 4, "TOP_K": 2, "P": 128, "D": 2048, "N": 16384}),
    ("mlp", {"E": 128, "G": 128, "TOP_K": 8, "D": 1024, "N": 32768}),
    ("attention", {"P": 128, "H": 4, "B": 8, "T": 4096}),
    ("mlp", {"E": 64, "G": 256, "TOP_K": 8, "D": 2048, "N": 16384, "activation": "swiglu"}),
    ("gating", {"sides": 1, "H": 1, "E": 128, "TOP_K": 8, "D": 1024, "N": 32768}),
]
PRESETS: dict[str, list[tuple[str, str, dict]]] = {
    name: [(op, "bfloat16", s) for op, s in shapes] for name, shapes in (("paper", _PAPER), ("moeut", _MOEUT), ("llm", _LLM))
}


def read_shapes(path: Path, ops: list[str]) -> list[tuple[str, str, dict]]:
    """(op, dtype, shape) of those of `ops`; the file holds [{"op": "mlp", "dtype": "bfloat16", "shape": {"E": 32, ...}}, ...]."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list")
    found = []
    for i, row in enumerate(rows):
        try:
            if not isinstance(row, dict) or set(row) != {"op", "dtype", "shape"} or not isinstance(row["shape"], dict):
                raise ValueError('must be {"op": ..., "dtype": ..., "shape": {...}}')
            if row["dtype"] not in ("float16", "bfloat16", "float32"):
                raise ValueError(f"dtype must be float16, bfloat16 or float32, got {row['dtype']!r}")
            check_shape(row["op"], row["shape"])
        except ValueError as error:
            raise ValueError(f"{path}: shape {i}: {error}") from None
        if row["op"] in ops:
            found.append((row["op"], row["dtype"], row["shape"]))
    return found


def check_shape(op: str, shape: dict) -> dict:
    """ValueError unless `shape` is one of the op's."""
    if not isinstance(op, str) or op not in WORKLOADS:
        raise ValueError(f"op must be one of {', '.join(WORKLOADS)}, got {op!r}")
    parameters = dict(list(inspect.signature(WORKLOADS[op]).parameters.items())[1:])
    for name, value in shape.items():
        if name not in parameters:
            raise ValueError(f"{op} has no {name!r}, only {', '.join(parameters)}")
        default = parameters[name].default
        kind = int if default in (None, inspect.Parameter.empty) else type(default)
        if type(value) is not kind or (kind is int and not 0 <= value < 1 << 31):
            raise ValueError(f"{op}: {name} must be {kind.__name__}, got {value!r}")
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in shape]
    if missing:
        raise ValueError(f"{op} also needs {', '.join(missing)}")
    return shape
