import pathlib

import numpy as np
import pytest
import torch
from cases import (
    ALL_DTYPES,
    CPU_DTYPES,
    block_weights,
    check,
    detached,
    head_weights,
    moe_weights,
    randn,
    refused,
    relaid,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import reference
from triton_moe import functional as F
from triton_moe import testing

GOLDEN = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.smoke
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden_values_of_the_public_modules(path, device):
    """float32 against the public code's float64: relative to each tensor's largest element."""
    with np.load(path) as file:
        golden = {name: torch.tensor(value) for name, value in file.items()}
    x = golden["x"].to(device, torch.float32).requires_grad_()
    p = {n[6:]: v.to(device, torch.float32).requires_grad_() for n, v in golden.items() if n.startswith("param.")}
    top_k = int(golden["top_k"])
    if "moe" in path.stem:
        y, logits = F.sigma_moe(x, F.SigmaMoEWeights(**p), top_k=top_k)
        entropy = F.entropy_regularizer(logits)
        loss = 0.37 * entropy
        assert abs(float(entropy.detach()) - float(golden["entropy"])) < 1e-5
    else:
        fraction = float(golden["rotate_fraction"])
        weights = [p.get(n) for n in ("q.weight", "k.weight", "v", "o", "sel_v", "sel_o", "pos_to_pk")]
        position = F.XL() if fraction < 0 else F.RoPE(fraction)
        y, loss = F.switchhead(x, F.SwitchHeadWeights(*weights), top_k=top_k, position=position), 0.0
    loss = loss + (y * golden["grad_y"].to(device, torch.float32)).sum()
    loss.backward()
    pairs = {"y": (y, golden["y"]), "x": (x.grad, golden["grad_x"])} | {n: (v.grad, golden[f"grad.{n}"]) for n, v in p.items()}
    for name, (ours, right) in pairs.items():
        error = (ours.detach().double().cpu() - right).abs().max() / right.abs().max()
        assert error < 3e-6, (name, float(error))


def check_switchhead(
    B, T, D, H, E, K, P, dtype, device, *, S=None, shared=False, xl=False, repeats=1, at_size=False, v_src=False, **options
):
    """Outputs, returned logits and every gradient; the reference follows the kernel's own choice of experts."""
    weights = head_weights(D, H, E, P, device=device, dtype=dtype, shared=shared, xl=xl)
    tensors = {"x": randn(B, T, D, device=device, dtype=dtype)}
    if S is not None:
        tensors["k_src"] = randn(B, S, D, device=device, dtype=dtype, seed=1)
        if v_src:
            tensors["v_src"] = randn(B, S, D, device=device, dtype=dtype, seed=2)
    options = {"top_k": K, "position": F.XL() if xl else F.RoPE(), "return_logits": E > 1} | options
    _, saved = F.switchhead_forward(**detached_inputs(tensors), weights=detached(weights), **options)
    experts = F._chosen_experts(saved)
    check(
        lambda **t: F.switchhead(**t, **options),
        lambda **t: reference.switchhead(**t, **options, experts=experts),
        tensors | {"weights": weights},
        repeats=repeats,
        at_size=at_size,
    )


def detached_inputs(tensors):
    return {name: t.detach() for name, t in tensors.items()}


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (2, 9, 24, 2, 5, 3, 19)},
        {"shape": (1, 7, 19, 3, 4, 2, 8), "shared": True},
        {"shape": (2, 6, 16, 2, 1, 1, 12)},
        {"shape": (1, 5, 20, 2, 3, 2, 10), "xl": True, "S": 11},
        {"shape": (1, 5, 20, 2, 3, 2, 10), "S": 8, "v_src": True, "shared": True, "window": 4},
        {"shape": (1, 6, 12, 1, 13, 4, 41), "position": None, "causal": False, "S": 4},
        {"shape": (1, 256, 16, 1, 2, 1, 41)},  # grouped by sets, whose weights are padded further than the heads
        {"shape": (1, 256, 12, 1, 2, 1, 68)},  # whose last 4 channels the projections take apart
        {"shape": (2, 9, 16, 4, 6, 2, 10)},  # 16-bit heads are padded as they are rotated; 128 columns of gradients, and 8 spare
        {"shape": (1, 6, 12, 2, 3, 2, 12), "position": None, "S": 9},
    ],
    ids=str,
)
def test_switchhead(case, dtype, device):
    case = dict(case)
    check_switchhead(*case.pop("shape"), dtype, device, **case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (2, 1024, 1024, 4, 4, 2, 100)},
        {"shape": (4, 500, 1024, 2, 8, 4, 132)},
        {"shape": (18, 500, 256, 2, 8, 4, 132)},
        {"shape": (3, 400, 256, 2, 4, 2, 68), "shared": True},
        {"shape": (2, 777, 512, 2, 5, 3, 64), "shared": True},
        {"shape": (2, 512, 512, 4, 1, 1, 64)},
        {"shape": (2, 256, 412, 2, 5, 3, 76), "xl": True, "S": 512},
    ],
    ids=str,
)
def test_switchhead_at_size(case, dtype, device):
    case = dict(case)
    check_switchhead(*case.pop("shape"), dtype, device, repeats=3, at_size=True, **case)


def check_switchhead_masks(T, D, H, E, K, P, dtype, device, **options):
    mask = torch.zeros(2, T, dtype=torch.bool, device=device)
    mask[0, : T // 3], mask[1, -T // 4 :] = True, True
    check_switchhead(2, T, D, H, E, K, P, dtype, device, key_padding_mask=mask, **options)
    cu_seqlens = torch.tensor([0, 1, T // 2, T // 2, T], dtype=torch.int32, device=device)
    check_switchhead(1, T, D, H, E, K, P, dtype, device, cu_seqlens=cu_seqlens, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_switchhead_masks(dtype, device):
    check_switchhead_masks(9, 16, 2, 3, 2, 8, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_switchhead_masks_at_size(dtype, device):
    check_switchhead_masks(777, 512, 2, 5, 3, 76, dtype, device, at_size=True)


@pytest.mark.parametrize("E", [1, 3])
def test_switchhead_to_another_width(E, device):
    weights = head_weights(12, 2, E, 8, device=device, dtype=torch.float32)
    o = randn(*(20, 16) if E == 1 else (6, 8, 20), device=device)
    weights, x = weights._replace(o=o), randn(2, 5, 12, device=device)

    def head(*tensors):
        weights = F.SwitchHeadWeights(*tensors[1:5], None if E == 1 else tensors[5], tensors[-1])
        return F.switchhead(tensors[0], weights, top_k=min(E, 2), return_logits=True)

    tensors = (x, *(w for w in weights if w is not None))
    y, (_, logits) = head(*tensors)
    assert y.shape == (2, 5, 20)
    # the width of o is only a size: columns of zeros more, or fewer, change nothing
    zeros = torch.zeros(8, 16, device=device) if E == 1 else torch.zeros(6, 8, 8, device=device)
    narrow = o.detach()[:12] if E == 1 else o.detach()[..., :12]
    wide = (*tensors[:4], torch.cat([narrow, zeros], 0 if E == 1 else 2).requires_grad_(), *tensors[5:])
    narrow = (*tensors[:4], narrow.clone().requires_grad_(), *tensors[5:])
    for i, (a, b) in enumerate(zip(*(run(lambda *t: head(*t)[0], t) for t in (wide, narrow)), strict=True)):
        a = a[..., :12] if i == 0 or (i == 5 and E > 1) else a[:12] if i == 5 else a
        torch.testing.assert_close(a, b)
    gradients = torch.autograd.grad(logits.sum(), (x, weights.sel_o, o), allow_unused=True)
    expected = torch.autograd.grad(F.gating(x, weights.sel_o, n_heads=2, top_k=1).logits.sum(), (x, weights.sel_o))
    for a, b in zip(gradients, expected, strict=False):
        torch.testing.assert_close(a, b)
    assert gradients[2] is None or not gradients[2].any()


@pytest.mark.smoke
@pytest.mark.gpu
def test_tf32_where_torch_allows_it(device):
    """Products are tf32 then, about 2**-11 wrong; gates stay float32."""
    matmul = torch.backends.cuda.matmul
    weights = detached(head_weights(512, 2, 5, 64, device=device, dtype=torch.float32))
    x = randn(2, 500, 512, device=device).detach()
    _, saved = F.switchhead_forward(x, weights, top_k=2)
    exact = [t.double() for t in weights if t is not None]
    truth = reference.switchhead(
        x.double(), F.SwitchHeadWeights(*exact), top_k=2, position=F.RoPE(), experts=F._chosen_experts(saved)
    )
    before, errors = matmul.fp32_precision, {}
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            y, logits = F.switchhead(x, weights, top_k=2, return_logits=True)
            errors[precision] = float((y - truth).norm() / truth.norm()), logits
    finally:
        matmul.fp32_precision = before
    assert errors["ieee"][0] < 2e-6 and 2e-5 < errors["tf32"][0] < 3e-3
    assert all(torch.equal(a, b) for a, b in zip(errors["ieee"][1], errors["tf32"][1], strict=True))


def test_switchhead_dropouts_follow_the_reference(device):
    weights = head_weights(16, 2, 5, 8, device=device, dtype=torch.float32)
    options = {"top_k": 2, "position": F.RoPE(), "dropout": 0.3, "expert_dropout": 0.4, "training": True, "seed": 9}
    check(
        lambda **t: F.switchhead(**t, **options),
        lambda **t: reference.switchhead(**t, **options),
        {"x": randn(2, 7, 16, device=device), "weights": weights},
    )


def test_dropout_of_queries_does_not_depend_on_the_dtype(device):
    """16-bit heads are padded, and their masks are still those of the heads themselves."""
    x, options = randn(1, 9, 16, device=device).detach(), {"top_k": 1, "dropout": 0.5, "training": True, "seed": 3}
    weights = head_weights(16, 2, 3, 24, device=device, dtype=torch.float32)
    single = F.switchhead(x, weights, **options).detach()
    half = F.switchhead(x.half(), F.SwitchHeadWeights(*(None if w is None else w.half() for w in weights)), **options).detach()
    assert float((single - half).abs().max()) < 0.01 * float(single.abs().max())


@pytest.mark.parametrize("source", ["self", "memory"])
def test_forward_and_backward_pair_equals_autograd(source, device):
    weights = head_weights(16, 2, 4, 8, device=device, dtype=torch.float32, shared=source == "memory")
    x, k_src = randn(2, 5, 16, device=device), None if source == "self" else randn(2, 9, 16, device=device)
    options = {"top_k": 2, "k_src": k_src, "return_logits": True}
    y, logits = F.switchhead(x, weights, **options)
    cotangents = [torch.randn_like(t) for t in (y, *logits)]
    inputs = [t for t in (x, k_src, *weights) if t is not None]
    expected = torch.autograd.grad([y, *logits], inputs, cotangents)
    (y2, logits2), saved = F.switchhead_forward(x, weights, **options)
    assert torch.equal(y, y2) and all(torch.equal(a, b) for a, b in zip(logits, logits2, strict=True))
    assert not y2.requires_grad
    g = F.switchhead_backward(cotangents[0], saved, tuple(cotangents[1:]))
    assert isinstance(g.weights, F.SwitchHeadWeights) and g.v_src is None
    ours = [t for t in (g.x, g.k_src, *g.weights) if t is not None]
    assert len(ours) == len(expected) and all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    inputs = {"x": x, "weights": weights} | ({} if k_src is None else {"k_src": k_src})
    close_to_the_reference(
        (y2, logits2, g.x, g.weights, g.k_src),
        lambda **t: reference.switchhead(**t, top_k=2, position=F.RoPE(), return_logits=True, experts=F._chosen_experts(saved)),
        inputs,
        cotangents,
    )


def close_to_the_reference(ours, twin, inputs, cotangents):
    """(outputs, gradients of inputs), any nesting, against a twin in float64 and its gradients."""
    exact = testing._prepare(inputs, torch.float64)
    outputs = [t for _, t in testing._leaves(twin(**exact), "")]
    leaves = [t for _, t in testing._leaves(exact, "")]
    right = [*outputs, *torch.autograd.grad(outputs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])]
    for (name, a), b in zip(testing._leaves(ours, ""), right, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def check_switchall(B, T, D, H, E, K, P, moe_E, moe_K, G, dtype, device, repeats=1, at_size=False, bias=False, **options):
    weights = block_weights(
        D, H, E, P, moe_E, G, device=device, dtype=dtype, bias=bias, gated=options.get("activation") == "swiglu"
    )
    x = randn(B, T, D, device=device, dtype=dtype)
    options = {"top_k": K, "moe_top_k": moe_K, "position": F.RoPE()} | options
    _, saved = F.switchall_forward(x.detach(), detached(weights), **options)
    experts = F._chosen_experts(saved)
    check(
        lambda **t: F.switchall(**t, **options),
        lambda **t: reference.switchall(**t, **options, experts=experts),
        {"x": x, "weights": weights},
        repeats=repeats,
        at_size=at_size,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_switchall(dtype, device):
    check_switchall(2, 7, 19, 2, 3, 2, 9, 5, 3, 11, dtype, device, bias=True, activation="swiglu")


DROPOUTS = {"attention_dropout": 0.2, "expert_dropout": 0.2, "moe_dropout": 0.2, "moe_expert_dropout": 0.2, "dropout": 0.3}


@pytest.mark.smoke
def test_switchall_dropouts_follow_the_reference(device):
    check_switchall(2, 6, 16, 2, 3, 2, 8, 5, 2, 8, torch.float32, device, training=True, seed=4, **DROPOUTS)


@pytest.mark.gpu
def test_switchall_dropouts_follow_the_reference_in_bfloat16(device):
    check_switchall(
        2, 130, 128, 2, 5, 3, 41, 16, 4, 64, torch.bfloat16, device, training=True, seed=4, activation="silu", **DROPOUTS
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_switchall_at_size(dtype, device):
    check_switchall(2, 512, 1024, 4, 4, 2, 100, 32, 4, 128, dtype, device, repeats=3, at_size=True)


def test_switchall_pair_equals_autograd(device):
    weights = block_weights(16, 2, 3, 8, 5, 8, device=device, dtype=torch.float32, bias=True)
    x = randn(2, 5, 16, device=device)
    y, logits = F.switchall(x, weights, top_k=2, moe_top_k=2)
    cotangents = [torch.randn_like(y), torch.randn_like(logits)]
    leaves = [t for _, t in testing._leaves((x, weights), "")]
    expected = torch.autograd.grad([y, logits], leaves, cotangents)
    (y2, logits2), saved = F.switchall_forward(x, weights, top_k=2, moe_top_k=2)
    g = F.switchall_backward(cotangents[0], saved, cotangents[1])
    assert torch.equal(y, y2) and torch.equal(logits, logits2)
    ours = [t for _, t in testing._leaves((g.x, g.weights), "")]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    close_to_the_reference(
        (y2, logits2, g.x, g.weights),
        lambda **t: reference.switchall(**t, top_k=2, moe_top_k=2, position=F.RoPE(), experts=F._chosen_experts(saved)),
        {"x": x, "weights": weights},
        cotangents,
    )


def test_bad_backward(device):
    x, moe = randn(1, 5, 12, device=device), {"top_k": 2, "moe_top_k": 2}
    weights = block_weights(12, 2, 3, 8, 4, 8, device=device, dtype=torch.float32)
    (h, (logits_v, logits_o)), head = F.switchhead_forward(x, weights.attention, top_k=2, return_logits=True)
    (y, logits), block = F.switchall_forward(x, weights, **moe)
    for backward, saved, other, grads in (
        (F.switchhead_backward, head, block, ((logits_v[:4], None), (None, logits_o[..., :2]))),
        (F.switchall_backward, block, head, (logits[:, :4], logits[..., :2])),
    ):
        for wrong in (h[:, :4], h[..., :11], h[0]):
            with refused(ValueError, "grad_y must have shape"):
                backward(wrong, saved)
        for wrong in grads:
            with refused(ValueError, "grad_logits.* must have shape"):
                backward(y, saved, wrong)
        with refused(TypeError, "saved must be a Saved, got tuple"):
            backward(y, tuple(saved))
        with refused(ValueError, "saved must come from"):
            backward(y, other)
    with refused(TypeError, "bogus"):
        F.switchhead_forward(x, weights.attention, top_k=2, bogus=1)
    for extra in ("bogus", "k_src", "return_logits"):
        with refused(TypeError, extra):
            F.switchall_forward(x, weights, **moe, **{extra: x})


def test_bfloat16_composed(device):
    """Several launches share a tensor, or its float32 copy under the interpreter: none may write to another's."""
    x, sel = (randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((9, 16), (6, 16)))
    w = randn(6, 16, 8, device=device, dtype=torch.bfloat16, scale=0.25)
    experts = F.gating(x.detach(), sel.detach(), n_heads=2, top_k=2).experts

    def kernel(x, sel, w):
        return F.value_projection(x, w, F.gating(x, sel, n_heads=2, top_k=2))

    def twin(x, sel, w):
        gate = reference.gating(x, sel, n_heads=2, top_k=2, experts=experts)
        return reference.value_projection(x, w, gate.weights, experts)

    check(kernel, twin, {"x": x, "sel": sel, "w": w})

    weights = block_weights(16, 2, 3, 8, 5, 8, device=device, dtype=torch.bfloat16)
    x, options = randn(1, 5, 16, device=device, dtype=torch.bfloat16), {"top_k": 2, "moe_top_k": 2}
    leaves = [t for _, t in testing._leaves((x, weights), "")]
    y = F.switchall(F.switchall(x, weights, **options)[0], weights, **options)[0]
    first = torch.autograd.grad(y.float().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(y.float().sum(), leaves, retain_graph=True)
    (h, _), saved_1 = F.switchall_forward(x, weights, **options)
    (y2, _), saved_2 = F.switchall_forward(h, weights, **options)
    g2 = F.switchall_backward(torch.ones_like(y2), saved_2)
    g1 = F.switchall_backward(g2.x, saved_1)
    by_hand = [g1.x, *(a + b for (_, a), (_, b) in zip(*(testing._leaves(g.weights, "") for g in (g1, g2)), strict=True))]
    assert torch.equal(y, y2)
    for a, b, c in zip(first, again, by_hand, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def no_tokens(device):
    """name: (call, the shapes it returns, weights that must get zero gradients)"""

    def plain(*shape):
        return randn(*shape, device=device)

    head = head_weights(12, 2, 3, 8, device=device, dtype=torch.float32)
    dense = head_weights(12, 2, 1, 8, device=device, dtype=torch.float32)
    xl = head_weights(12, 2, 3, 8, device=device, dtype=torch.float32, xl=True)
    block = block_weights(12, 2, 3, 8, 4, 8, device=device, dtype=torch.float32, bias=True)
    w, sel = plain(6, 12, 8), plain(6, 12)
    no_routes = F.gating(plain(0, 12), plain(6, 12), n_heads=2, top_k=2)
    one, none = plain(2, 0, 12), plain(0, 4, 12)
    return {
        "gating": (lambda: F.gating(one, sel, n_heads=2, top_k=2)[:3], [(0, 2, 2), (0, 2, 2), (0, 2, 3)], sel),
        "value": (lambda: F.value_projection(one, w, no_routes), [(2, 0, 2, 8)], w),
        "output": (lambda: F.output_projection(plain(2, 0, 2, 12), w, no_routes), [(2, 0, 8)], w),
        "sigma_moe": (lambda: F.sigma_moe(one, block.moe, top_k=2), [(2, 0, 12), (2, 0, 4)], block.moe),
        "switchhead T": (lambda: F.switchhead(one, head, top_k=2), [(2, 0, 12)], head),
        "switchhead B": (lambda: F.switchhead(none, head, top_k=2), [(0, 4, 12)], head),
        "switchhead dense": (lambda: F.switchhead(one, dense, top_k=1), [(2, 0, 12)], dense),
        "switchhead xl": (lambda: F.switchhead(none, xl, top_k=2, position=F.XL()), [(0, 4, 12)], xl),
        "switchhead memory": (lambda: F.switchhead(one, head, top_k=2, k_src=plain(2, 3, 12)), [(2, 0, 12)], head),
        "switchall T": (lambda: F.switchall(one, block, top_k=2, moe_top_k=2), [(2, 0, 12), (2, 0, 4)], block),
        "switchall B": (lambda: F.switchall(none, block, top_k=2, moe_top_k=2), [(0, 4, 12), (0, 4, 4)], block),
    }


NO_TOKENS = ["gating", "value", "output", "sigma_moe", "switchall T", "switchall B"]
NO_TOKENS += [f"switchhead {kind}" for kind in ("T", "B", "dense", "xl", "memory")]


@pytest.mark.parametrize("name", NO_TOKENS)
def test_no_tokens(name, device):
    cases = no_tokens(device)
    assert set(cases) == set(NO_TOKENS)
    call, shapes, weights = cases[name]
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [tuple(o.shape) for o in outputs] == shapes
    sum(o.sum() for o in outputs if o.requires_grad).backward()
    for label, w in testing._leaves(weights, "weights"):
        assert w.grad is not None and torch.equal(w.grad, torch.zeros_like(w)), label


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast, device):
    """Equal to casting by hand, residual stream and gradients in float32."""
    weights = block_weights(16, 2, 3, 8, 5, 8, device=device, dtype=torch.float32)
    x = randn(1, 5, 16, device=device)
    with torch.autocast(device, autocast):
        y, _ = F.switchall(x, weights, top_k=2, moe_top_k=2)
        h = F.switchhead(x, weights.attention, top_k=2)
    assert y.dtype == torch.float32 and h.dtype == autocast
    y.sum().backward()
    assert x.grad.dtype == weights.attention.v.grad.dtype == weights.moe.keys.grad.dtype == torch.float32
    cast = F.SwitchHeadWeights(*(None if w is None else w.to(autocast) for w in weights.attention))
    assert torch.equal(h, F.switchhead(x.to(autocast), cast, top_k=2))


def layers(device):
    def plain(*shape, seed=0):
        return randn(*shape, device=device, seed=seed)

    head = head_weights(12, 2, 3, 8, device=device, dtype=torch.float32)
    xl = head_weights(12, 2, 3, 8, device=device, dtype=torch.float32, xl=True)
    shared = head_weights(12, 2, 3, 8, device=device, dtype=torch.float32, shared=True)
    single = head_weights(12, 2, 1, 8, device=device, dtype=torch.float32)
    padded = head_weights(12, 2, 3, 12, device=device, dtype=torch.float16)  # to 16 channels
    block = block_weights(12, 2, 3, 8, 4, 8, device=device, dtype=torch.float32)
    moe = moe_weights(12, 4, 8, device=device, dtype=torch.float32)
    routing = F.gating(plain(5, 12).detach(), plain(6, 12).detach(), n_heads=2, top_k=2)
    return {
        "gating": (lambda x, s: F.gating(x, s, n_heads=2, top_k=2)[:3], plain(5, 12), plain(6, 12)),
        "gating, both sides": (
            lambda x, s, t: tuple(o for r in F.gating(x, (s, t), n_heads=2, top_k=2) for o in r[:3]),
            *(plain(5, 12), plain(6, 12), plain(6, 12, seed=1)),
        ),
        "value_projection": (lambda x, w: F.value_projection(x, w, routing), plain(5, 12), plain(6, 12, 8)),
        "output_projection": (lambda a, w: F.output_projection(a, w, routing), plain(5, 2, 8), plain(6, 8, 12)),
        "attention": (lambda q, k, v: F.attention(q, k, v, position=F.RoPE()), *(plain(1, 5, 2, 8, seed=s) for s in range(3))),
        "attention, recompute": (
            lambda q, k, v: F.attention(q, k, v, position=F.RoPE(), recompute=True),
            *(plain(1, 5, 2, 8, seed=s) for s in range(3)),
        ),
        "attention, k as v": (lambda q, k: F.attention(q, k, k), plain(1, 5, 2, 8), plain(1, 5, 2, 8, seed=1)),
        "sigma_moe": (lambda x: F.sigma_moe(x, moe, top_k=2), plain(5, 12)),
        "switchhead": (lambda x: F.switchhead(x, head, top_k=2), plain(1, 5, 12)),
        "switchhead logits": (lambda x: join(F.switchhead(x, head, top_k=2, return_logits=True)), plain(1, 5, 12)),
        "switchhead shared": (lambda x: join(F.switchhead(x, shared, top_k=2, return_logits=True)), plain(1, 5, 12)),
        "switchhead one expert": (lambda x: join(F.switchhead(x, single, top_k=1, return_logits=True)), plain(1, 5, 12)),
        "switchhead memory": (lambda x, m: F.switchhead(x, head, top_k=2, k_src=m), plain(1, 5, 12), plain(1, 7, 12)),
        "switchhead padded": (lambda x: F.switchhead(x, padded, top_k=2), randn(1, 5, 12, device=device, dtype=torch.float16)),
        "switchhead xl": (lambda x: F.switchhead(x, xl, top_k=2, position=F.XL()), plain(1, 5, 12)),
        "switchall": (lambda x: F.switchall(x, block, top_k=2, moe_top_k=2), plain(1, 5, 12)),
        "switchall tied": (
            lambda x, w: F.switchall(
                x, block._replace(norm1=(w, block.norm1[1]), norm2=(w, block.norm2[1])), top_k=2, moe_top_k=2
            ),
            *(plain(1, 5, 12), plain(12)),
        ),
        "switchall recompute": (lambda x: F.switchall(x, block, top_k=2, moe_top_k=2, recompute=True), plain(1, 5, 12)),
    }


def join(result):
    y, logits = result
    return y, *(t for t in logits if t is not None)


LAYERS = ["gating", "value_projection", "output_projection", "attention", "sigma_moe", "switchhead", "switchhead xl", "switchall"]
COMPILED = [
    *LAYERS,
    "gating, both sides",
    "attention, recompute",
    "attention, k as v",
    "switchhead logits",
    "switchhead shared",
    "switchhead one expert",
    "switchhead memory",
    "switchhead padded",
    "switchall tied",
    "switchall recompute",
]


@pytest.mark.parametrize("name", LAYERS)
def test_strides_do_not_matter(name, device):
    """Outputs and gradients, of the weights too."""
    function, *tensors = layers(device)[name]
    if name == "sigma_moe":
        tensors += moe_weights(12, 4, 8, device=device, dtype=torch.float32, bias=True)
        function = lambda x, *w: F.sigma_moe(x, F.SigmaMoEWeights(*w), top_k=2)  # noqa: E731
    elif name == "switchhead":
        tensors += head_weights(12, 2, 3, 8, device=device, dtype=torch.float32)[:6]
        function = lambda x, *w: F.switchhead(x, F.SwitchHeadWeights(*w), top_k=2)  # noqa: E731
    for a, b in zip(run(function, tensors), run(function, [relaid(t) for t in tensors]), strict=True):
        if device == "cuda" and name.startswith("switch"):  # for q and k, cuBLAS takes another kernel in another layout
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


# torch's own: Dynamo instantiates torch.autograd.Function while tracing one; Inductor imports torch.jit, deprecated under
# Python 3.12, and advises TF32 on a GPU.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_as_one_graph(name, device):
    function, *tensors = layers(device)[name]
    torch._dynamo.reset()
    eager = run(function, tensors)
    compiled = run(torch.compile(function, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"), tensors)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)


def operator_calls(device):
    """-> {operator: [arguments]}, as the layers call them under torch.compile, forward and backward, with and without dropout."""
    calls = {}

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "triton_moe":
                calls.setdefault(operator, []).append(tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args))
            return operator(*args, **(kwargs or {}))

    block = block_weights(12, 2, 3, 8, 4, 8, device=device, dtype=torch.float32)
    dropouts = {"top_k": 2, "moe_top_k": 2, "dropout": 0.3, "moe_dropout": 0.3, "training": True, "seed": 1}
    used = {
        name: layers(device)[name]
        for name in (
            "gating",
            "attention",
            "attention, recompute",
            "value_projection",
            "output_projection",
            "switchhead padded",
            "switchhead xl",
            "switchall",
        )
    }
    used["dropouts"] = lambda x: F.switchall(x, block, recompute=True, **dropouts), randn(1, 5, 12, device=device)
    for function, *tensors in used.values():
        with pytest.MonkeyPatch.context() as patch, Recording():
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            run(function, tensors)
    return calls


def test_operators_pass_opcheck(device):
    """Every one of ours: its schema, that it returns no input and writes to none but those it names, its fake, its tracing."""
    calls = operator_calls(device)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("triton_moe::")}
    assert {operator.name() for operator in calls} == registered and registered
    for operator, arguments in calls.items():
        names = [a.name for a in operator._schema.arguments]
        # one call for each set of tensors that are given, and of flags and widths
        kinds = {tuple(a if isinstance(a, int) else a is None for a in args): args for args in arguments}
        for args in kinds.values():
            if "spare" in names[: len(args)]:  # columns that it does not fill in hold anything
                args = tuple(0 if name == "spare" else a for name, a in zip(names, args, strict=False))
            torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("name", COMPILED)
def test_a_double_backward_is_refused(name, device):
    function, *tensors = layers(device)[name]
    outputs = function(*tensors)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.is_floating_point()]
    gradients = torch.autograd.grad(sum(o.square().sum() for o in outputs), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_under_autocast_changes_no_bit(name, device):
    function, *tensors = layers(device)[name]
    gradients = []
    for enabled in (False, True):
        outputs = function(*tensors)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.is_floating_point()]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("name", LAYERS)
def test_replays_from_a_cuda_graph(name, device):
    function, *tensors = layers(device)[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(function, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, tensors)
    with torch.no_grad():
        for t in tensors:
            t.copy_(torch.randn_like(t))
    graph.replay()
    for a, b in zip(captured, run(function, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", LAYERS)
def test_runs_on_the_device_of_its_inputs(name):
    first = run(*(lambda f, *t: (f, t))(*layers("cuda:0")[name]))
    assert torch.cuda.current_device() == 0
    second = run(*(lambda f, *t: (f, t))(*layers("cuda:1")[name]))
    for a, b in zip(first, second, strict=True):
        assert b.device.index == 1 and torch.equal(a, b.to(a.device))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weights": None}, TypeError, "weights must be a SwitchHeadWeights, got NoneType"),
        ({"top_k": 4}, ValueError, "top_k must be between 1 and 3"),
        ({"x": torch.zeros(5, 12)}, ValueError, r"x must have shape \[\*, \*, \*\], got \[5, 12\]"),
        ({"k_src": torch.zeros(1, 3, 12)}, ValueError, "the 3 keys must be at least the 5 queries"),
        ({"v_src": torch.zeros(1, 4, 12)}, ValueError, r"v_src must have shape \[1, 5, 12\]"),
        ({"position": F.XL()}, ValueError, "position.weight must be"),
        ({"position": F.XL(content_bias=torch.zeros(2, 8))}, ValueError, "content_bias and position.position_bias must be None"),
        ({"window": 0}, ValueError, "window must be >= 1"),
        ({"seed": "1"}, TypeError, "seed must be an int"),
        ({"o": torch.zeros(6, 7, 12)}, ValueError, r"weights.o must have shape \[6, 8, \*\], got \[6, 7, 12\]"),
        ({"sel_o": None}, ValueError, "weights.sel_o must be a tensor"),
        ({"x": torch.zeros(1, 5, 12, device="meta")}, ValueError, "x is on meta"),
        ({"x": torch.zeros(1, 5, 0)}, ValueError, "x must be .*1"),
        ({"k_src": torch.zeros(1, 5, 12, device="meta")}, ValueError, "k_src is on meta"),
        ({"seed": torch.tensor([[3]])}, TypeError, "seed must be an int64 scalar tensor"),
        ({"v": torch.zeros(6, 12, 0)}, ValueError, "weights.q must have shape"),
        ({"q": torch.zeros(15, 12)}, ValueError, r"weights.q must have shape \[H\*P, D\]"),
        ({"pos_to_pk": torch.zeros(16, 12)}, ValueError, r"weights.pos_to_pk is given but position is not XL\(\)"),
        ({"pos_to_pk": torch.zeros(16, 12), "position": F.XL(torch.zeros(16, 12))}, ValueError, "both given"),
    ],
)
def test_bad_switchhead(change, error, message, device):
    weights = head_weights(12, 2, 3, 8, device=device, dtype=torch.float32)
    change = {k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()}
    weights = weights._replace(**{k: change.pop(k) for k in list(change) if k in weights._fields})
    if isinstance(change.get("position"), F.XL):
        change["position"] = F.XL(*(None if t is None else t.to(device) for t in change["position"]))
    arguments = {"x": torch.zeros(1, 5, 12, device=device), "weights": weights, "top_k": 2} | change
    with refused(error, message):
        F.switchhead(arguments.pop("x"), arguments.pop("weights"), **arguments)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"moe_top_k": 9}, ValueError, "moe_top_k must be between 1 and 4"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"norm1": torch.ones(12)}, TypeError, "weights.norm1 must be a pair"),
        ({"moe_dropout": 1}, ValueError, "moe_dropout must be at least 0 and below 1"),
        ({"attention_dropout": -1}, ValueError, "attention_dropout must be"),
        ({"x": torch.zeros(1, 5, 12, device="meta")}, ValueError, "x is on meta"),
        ({"seed": 2**63}, ValueError, "seed must be"),
    ],
)
def test_bad_switchall(change, error, message, device):
    weights = block_weights(12, 2, 3, 8, 4, 8, device=device, dtype=torch.float32)
    weights = weights._replace(**{k: change[k] for k in change if k in weights._fields})
    arguments = {"x": torch.zeros(1, 5, 12, device=device), "weights": weights, "top_k": 2, "moe_top_k": 2}
    arguments |= {k: v for k, v in change.items() if k not in weights._fields}
    with refused(error, message):
        F.switchall(**arguments)
