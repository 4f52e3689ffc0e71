import pytest
import torch
from cases import ALL_DTYPES, CPU_DTYPES, check, moe_weights, on_a_grid, randn, refused
from hypothesis import given
from hypothesis import strategies as st

import reference
from triton_moe import functional as F

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
