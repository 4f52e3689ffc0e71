import pytest
import torch
from cases import ALL_DTYPES, CPU_DTYPES, check, choices, moe_weights, on_a_grid, randn, refused, relaid, run
from hypothesis import given
from hypothesis import strategies as st

import reference
from triton_moe import functional as F
from triton_moe.functional import _moe
from triton_moe.kernels import mlp, projection
from triton_moe.kernels.gating import routing_plan

ACTIVATIONS = pytest.mark.parametrize("activation", F.ACTIVATIONS)


def check_moe(N, D, E, K, G, activation, dtype, device, *, bias=True, mode="sigmoid", d_out=None, gate_input=False, **options):
    gated = activation in ("swiglu", "geglu")
    weights = moe_weights(D, E, G, device=device, dtype=dtype, gated=gated, bias=bias, d_out=d_out)
    x = randn(N, D, device=device, dtype=dtype)
    if activation == "relu":
        x, keys = on_a_grid(x, 1 / 4), on_a_grid(weights.keys, 1 / 128)
        weights = weights._replace(keys=keys, bias=None if weights.bias is None else on_a_grid(weights.bias, 1 / 4))
    inputs = {"x": x, "weights": weights}
    if gate_input:
        inputs["gate_input"] = randn(N, D, device=device, dtype=dtype, seed=5)
    experts = F.gating(inputs.get("gate_input", x).detach(), weights.expert_sel.detach(), top_k=K).experts

    def kernel(**inputs):
        return F.sigma_moe(**inputs, top_k=K, activation=activation, mode=mode)

    def twin(**inputs):
        return reference.sigma_moe(**inputs, top_k=K, activation=activation, mode=mode, experts=experts)

    check(kernel, twin, inputs, **options)


@pytest.mark.smoke
@ACTIVATIONS
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_mlp_values_and_gradients(activation, dtype, device):
    check_moe(23, 19, 7, 3, 12, activation, dtype, device, repeats=1)


@pytest.mark.parametrize(
    "N, E, K, bias, mode", [(1, 16, 4, False, "softmax"), (11, 5, 5, True, "softmax_topk"), (6, 40, 1, False, "sigmoid")]
)
def test_mlp_other_sizes(N, E, K, bias, mode, device):
    check_moe(N, 13, E, K, 9, "relu", torch.float32, device, bias=bias, mode=mode, d_out=11)


@pytest.mark.gpu
@ACTIVATIONS
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 1024, 32, 4, 128), (3001, 412, 16, 4, 128), (2048, 1024, 387, 16, 64)], ids=str)
def test_mlp_at_size(shape, activation, dtype, device):
    check_moe(*shape, activation, dtype, device, repeats=2, at_size=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["softmax", "softmax_topk"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_mlp_softmax_and_gate_input_at_size(dtype, mode, device):
    check_moe(2049, 412, 16, 4, 128, "gelu", dtype, device, mode=mode, gate_input=True, d_out=500, repeats=1, at_size=True)


@pytest.mark.smoke
def test_mlp_gate_input_and_dropouts_follow_the_reference(device):
    weights = moe_weights(12, 6, 8, device=device, dtype=torch.float32, gated=True, bias=True)
    options = {"activation": "swiglu", "top_k": 3, "dropout": 0.3, "expert_dropout": 0.4, "training": True, "seed": 11}
    x, gate_input = randn(2, 9, 12, device=device), randn(2, 9, 12, device=device, seed=5)

    def kernel(x, gate_input, weights):
        return F.sigma_moe(x, weights, gate_input=gate_input, **options)

    def twin(x, gate_input, weights):
        return reference.sigma_moe(x, weights, gate_input=gate_input, **options)

    check(kernel, twin, {"x": x, "gate_input": gate_input, "weights": weights}, repeats=1)


def test_dropout_keeps_the_mean(device):
    weights = moe_weights(12, 6, 8, device=device, dtype=torch.float32)
    x = randn(4, 12, device=device).expand(200, 4, 12)
    mean = F.sigma_moe(x, weights, top_k=2, dropout=0.5, training=True, seed=1)[0].mean(0)
    clean = F.sigma_moe(x[0], weights, top_k=2)[0]
    assert (mean - clean).abs().mean() < 0.25 * clean.abs().mean()


@pytest.fixture
def in_pieces(monkeypatch):
    """Few columns of [N*TOP_K, D] at a time, and weight gradients in chunks of a few routes."""
    monkeypatch.setattr(mlp, "FEW_ELEMENTS", 0)
    monkeypatch.setattr(_moe, "COLUMNS", 64)
    monkeypatch.setattr(mlp, "COLUMNS", 64)
    monkeypatch.setattr(projection, "LEAST_CHUNK", 1)
    monkeypatch.setattr(projection, "PROGRAMS", 1000)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("D, d_out", [(19, 150), (136, 48)])
def test_mlp_in_pieces(D, d_out, dtype, device, in_pieces):
    check_moe(40, D, 4, 2, 12, "gelu", dtype, device, d_out=d_out, repeats=1)


def test_one_expert_takes_all_routes_in_pieces(device, in_pieces):
    weights = moe_weights(12, 5, 8, device=device, dtype=torch.float32, bias=True)
    x, gates = randn(50, 12, device=device), randn(50, 1, 1, device=device).detach().sigmoid().requires_grad_()
    experts = torch.full((50, 1, 1), 3, dtype=torch.int32, device=device)

    def kernel(x, gates, keys, values, bias, o_bias):
        return Mlp.apply(x, gates, keys, values, bias, o_bias, experts, "relu")

    def twin(x, gates, keys, values, bias, o_bias):
        return gates[:, 0] * ((x @ keys[3] + bias[3]).relu() @ values[3]) + o_bias

    x, keys = on_a_grid(x, 1 / 4), on_a_grid(weights.keys, 1 / 128)
    bias = on_a_grid(weights.bias, 1 / 4)
    inputs = {"x": x, "gates": gates, "keys": keys, "values": weights.values, "bias": bias, "o_bias": weights.o_bias}
    check(kernel, twin, inputs, repeats=1)


class Mlp(torch.autograd.Function):
    """The MLP for experts chosen by hand."""

    @staticmethod
    def forward(ctx, x, gates, keys, values, bias, o_bias, experts, activation):
        ctx.options = activation, 0.0, 0, "ieee"
        order, offsets = (t[0] for t in routing_plan(experts[None], keys.shape[0], False)[:2])
        routing = gates, experts, order, offsets
        y, z = mlp.mlp_forward(x, keys, values, bias, o_bias, None, *routing, *ctx.options)
        ctx.save_for_backward(x, keys, values, bias, o_bias, *routing, z)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, keys, values, bias, o_bias, *routing = ctx.saved_tensors
        dz, dkeys, dvalues, dbias, dgates = mlp.mlp_backward(dy, x, keys, values, bias, o_bias, None, *routing, *ctx.options)
        gates, _, order, offsets, _ = routing
        dx = mlp.mlp_backward_input(dz, keys, order, offsets, gates.shape[-1], None, None, "ieee", x.dtype, mlp.COLUMNS)
        no_bias = bias is None
        return dx, dgates, dkeys, dvalues, None if no_bias else dbias, None if o_bias is None else dy.sum(0), None, None


def mlp_inputs(N, D, E, K, G, dtype, device, seed=0):
    weights = moe_weights(D, E, G, device=device, dtype=dtype, bias=True)
    gates = randn(N, 1, K, device=device, seed=seed).detach().sigmoid().requires_grad_()
    return randn(N, D, device=device, dtype=dtype, seed=seed), gates, *weights[:2], *weights[3:]


def check_batch_invariance(N, D, E, K, G, dtype, device):
    """The first tokens' y, dx and d gates with other tokens beside them, and in another order."""
    x, gates, *weights = mlp_inputs(N, D, E, K, G, dtype, device)
    x2, gates2, *_ = mlp_inputs(N, D, E, K, G, dtype, device, seed=3)
    experts, experts2 = choices(N, 1, E, K, device=device), choices(N, 1, E, K, device=device, seed=3)
    same = N // 3
    dy, dy2 = (randn(N, D, device=device, dtype=dtype, seed=s, requires_grad=False) for s in (7, 8))

    def mixed(a, b):
        return torch.cat([a[:same], b[same:]]).flip(0).detach().requires_grad_(a.requires_grad)

    results = []
    for tensors in (
        (x, gates, experts, dy),
        [mixed(*pair) for pair in ((x, x2), (gates, gates2), (experts, experts2), (dy, dy2))],
    ):
        xs, gs, es, dys = tensors
        y = Mlp.apply(xs, gs, *weights, es, "silu")
        results.append((y, *torch.autograd.grad(y, (xs, gs), dys)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:same], b.flip(0)[:same])


def test_a_token_does_not_depend_on_its_batch(device):
    check_batch_invariance(30, 20, 5, 3, 9, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9001, 1024, 32, 4, 128), (3001, 412, 16, 4, 128), (2048, 1024, 387, 16, 128)], ids=str)
def test_a_token_does_not_depend_on_its_batch_at_size(shape, dtype, device):
    check_batch_invariance(*shape, dtype, device)


def test_strides_of_the_mlp_do_not_matter(device):
    inputs = mlp_inputs(9, 10, 4, 2, 7, torch.float32, device)
    experts = choices(9, 1, 4, 2, device=device)
    expected = run(lambda *t: Mlp.apply(*t, experts, "silu"), inputs)
    again = run(lambda *t: Mlp.apply(*t, relaid(experts), "silu"), [relaid(t) for t in inputs])
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a, b)


def test_unused_experts_may_hold_nan_and_get_zero_gradients_of_the_mlp(device):
    x, gates, *weights = mlp_inputs(9, 10, 6, 2, 7, torch.float32, device)
    experts = choices(9, 1, 6, 2, device=device, used=3)
    unused = [e for e in range(6) if e not in experts.unique().tolist()]
    spoiled = [w.detach().clone() for w in weights]
    for w in spoiled[:3]:
        w[unused] = torch.nan
        w.requires_grad_()
    y = Mlp.apply(x, gates, *spoiled, experts, "relu")
    y.sum().backward()
    assert torch.equal(y, Mlp.apply(x, gates, *weights, experts, "relu"))
    assert x.grad.isfinite().all() and gates.grad.isfinite().all()
    for w in spoiled[:3]:
        assert w.grad.isfinite().all() and not w.grad[unused].any()


@given(N=st.integers(1, 40), E=st.integers(1, 20), spread=st.floats(0.0, 50.0))
def test_entropy_regularizer(N, E, spread, device):
    logits = randn(N, E, device=device, scale=spread)
    loss = F.entropy_regularizer(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = logits.detach().double().requires_grad_()
    truth = reference.entropy_regularizer(exact)
    (truth_gradient,) = torch.autograd.grad(truth, exact)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=1e-3, atol=1e-5)
    assert loss <= 1e-6


def test_entropy_regularizer_of_an_impossible_expert_is_that_of_the_others(device):
    logits = randn(6, 5, device=device, requires_grad=False)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    others = logits.detach()[:, [0, 1, 3, 4]].requires_grad_()
    loss, expected = F.entropy_regularizer(logits), F.entropy_regularizer(others)
    torch.testing.assert_close(loss, expected)
    (loss + expected).backward()
    torch.testing.assert_close(logits.grad[:, [0, 1, 3, 4]], others.grad)
    assert not logits.grad[:, 2].any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"top_k": 7}, ValueError, "top_k must be between 1 and 6"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"dropout": -0.1}, ValueError, "dropout must be at least 0"),
        ({"weights": (1, 2, 3)}, TypeError, "weights must be a SigmaMoEWeights, got tuple"),
        ({"gate_input": torch.zeros(4, 11)}, ValueError, r"gate_input must have shape \[4, 12\]"),
        ({"activation": "swiglu"}, ValueError, r"weights.values must have shape \[6, 4, \*\], got \[6, 8, 12\]"),
        ({"training": 1}, TypeError, "training must be a bool"),
        ({"x": torch.zeros(4, 12, device="meta")}, ValueError, "x is on meta"),
        ({"x": torch.zeros(4, 0)}, ValueError, "x must be .*1"),
        ({"seed": 2**63}, ValueError, "seed must be"),
    ],
)
def test_bad_mlp(change, error, message, device):
    weights = moe_weights(12, 6, 8, device=device, dtype=torch.float32)
    arguments = {"x": torch.zeros(4, 12, device=device), "weights": weights, "top_k": 2} | change
    with refused(error, message):
        F.sigma_moe(**arguments)
