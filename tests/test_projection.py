import pytest
import torch
from cases import ALL_DTYPES, CPU_DTYPES, check, choices, randn, refused, relaid, run
from hypothesis import given
from hypothesis import strategies as st

import reference
from triton_moe import functional as F
from triton_moe import testing
from triton_moe.kernels import sets
from triton_moe.kernels.gating import Plan, routing_plan

SHAPES = [  # N, D, H, E, TOP_K, P
    (1, 41, 1, 5, 2, 19),
    (37, 24, 2, 5, 3, 19),
    (20, 19, 2, 13, 4, 41),
    (9, 16, 3, 1, 1, 8),
]
LARGE = [
    (8192, 1024, 4, 4, 2, 128),
    (5001, 1024, 4, 4, 2, 100),
    (4096, 412, 2, 5, 3, 76),
    (9001, 1024, 2, 8, 4, 132),
    (6001, 1024, 4, 10, 2, 128),
    (3000, 512, 6, 13, 2, 82),
]


def routing_of(weights, experts, w):
    """As `gating` would have made it: sorted by sets where those pay."""
    N, H, TOP_K = weights.shape
    E = w.shape[0] // H
    plan = routing_plan(experts[None], E, sets.fits(N, H, E, TOP_K, w.dtype))
    return F.Routing(weights, experts, plan=Plan(*(t[0] for t in plan)))


def value(x, w, weights, experts):
    return F.value_projection(x, w, routing_of(weights, experts, w))


def output(a, w, weights, experts):
    return F.output_projection(a, w, routing_of(weights, experts, w))


def check_value(N, D, H, E, K, P, dtype, device, used=None, **options):
    inputs = {
        "x": randn(N, D, device=device, dtype=dtype),
        "w": randn(H * E, D, P, device=device, dtype=dtype, scale=D**-0.5),
        "weights": randn(N, H, K, device=device).detach().sigmoid().requires_grad_(),
        "experts": choices(N, H, E, K, device=device, used=used),
    }
    check(value, reference.value_projection, inputs, **options)


def check_output(N, D, H, E, K, P, dtype, device, used=None, **options):
    inputs = {
        "a": randn(N, H, P, device=device, dtype=dtype),
        "w": randn(H * E, P, D, device=device, dtype=dtype, scale=P**-0.5),
        "weights": randn(N, H, K, device=device).detach().sigmoid().requires_grad_(),
        "experts": choices(N, H, E, K, device=device, used=used),
    }
    check(output, reference.output_projection, inputs, **options)


CHECKS = pytest.mark.parametrize("side", [check_value, check_output])


@pytest.mark.smoke
@CHECKS
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(side, shape, dtype, device):
    side(*shape, dtype, device, repeats=1)


@CHECKS
def test_one_expert_takes_all_and_the_others_are_empty(side, device):
    side(30, 12, 2, 5, 2, 8, torch.float32, device, used=2)
    side(30, 12, 2, 5, 1, 8, torch.float32, device, used=1)


@CHECKS
def test_bfloat16_through_the_interpreter(side, device):
    side(12, 12, 2, 3, 2, 8, torch.bfloat16, device)


@pytest.mark.gpu
@CHECKS
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_values_and_gradients_at_size(side, shape, dtype, device):
    side(*shape, dtype, device, repeats=3, at_size=True)
    side(*shape, dtype, device, used=shape[4], at_size=True)


@given(data=st.data(), shape=testing.layer_shapes(max_tokens=20, max_width=20))
def test_any_shape_and_choice(data, shape, device):
    N, D, H, E, K, P = shape
    experts = data.draw(testing.expert_choices(n_tokens=N, n_heads=H, n_experts=E, top_k=K, device=device))
    x, w = data.draw(testing.tensors((N, D), device=device)), data.draw(testing.tensors((H * E, D, P), device=device))
    weights = data.draw(testing.tensors((N, H, K), device=device))
    v = value(x, w, weights, experts)
    twin = reference.value_projection(x.double(), w.double(), weights.double(), experts)
    torch.testing.assert_close(v.double(), twin, rtol=1e-4, atol=1e-4)
    o = output(v, w.transpose(1, 2), weights, experts)
    twin = reference.output_projection(v.double(), w.double().transpose(1, 2), weights.double(), experts)
    torch.testing.assert_close(o.double(), twin, rtol=1e-4, atol=1e-3)


@given(data=st.data())
def test_relabelled_experts_and_permuted_tokens_change_nothing(data, device):
    N, D, H, E, K, P = 14, 12, 2, 5, 2, 8
    experts = data.draw(testing.expert_choices(n_tokens=N, n_heads=H, n_experts=E, top_k=K, device=device))
    x, w, weights = randn(N, D, device=device), randn(H * E, D, P, device=device), randn(N, H, K, device=device)
    v = value(x, w, weights, experts)
    new = torch.tensor(data.draw(st.permutations(range(E))), device=device)
    relabelled = torch.empty_like(w.view(H, E, D, P)).index_copy(1, new, w.view(H, E, D, P)).view(H * E, D, P)
    assert torch.equal(v, value(x, relabelled, weights, new[experts.long()].int()))
    order = torch.tensor(data.draw(st.permutations(range(N))), device=device)
    assert torch.equal(v[order], value(x[order], w, weights[order], experts[order]))


@given(data=st.data())
def test_strides_do_not_matter(data, device):
    N, D, H, E, K, P = 6, 10, 2, 3, 2, 7
    experts = choices(N, H, E, K, device=device)
    weights = randn(N, H, K, device=device)
    x, w = randn(2, 3, D, device=device), randn(H * E, D, P, device=device)
    v = value(x, w, weights, experts)
    assert torch.equal(v, value(data.draw(testing.strided(x)), data.draw(testing.strided(w)), weights, experts))
    o = output(v, w.transpose(1, 2), weights, experts)
    again = output(data.draw(testing.strided(v)), data.draw(testing.strided(w.transpose(1, 2))), weights, experts)
    assert torch.equal(o, again)


ROUTINGS = {  # the same weights [N, 2, 2] in other layouts
    "part": lambda weights: torch.cat([weights, torch.full_like(weights, torch.nan)], -1)[:, :, :2],
    "expanded": lambda weights: weights[:1, :1, :1].expand(weights.shape),
    "relaid": lambda weights: relaid(weights),
}


@pytest.mark.parametrize("layout", ROUTINGS)
@pytest.mark.parametrize("call", [value, output])
def test_strides_of_the_routing_do_not_matter(call, layout, device):
    x, w = randn(*((9, 10) if call is value else (9, 2, 10)), device=device), randn(6, 10, 7, device=device)
    weights = ROUTINGS[layout](randn(9, 2, 2, device=device).detach()).requires_grad_()
    experts = choices(9, 2, 3, 2, device=device)
    expected = run(lambda *t: call(*t, experts), (x, w, weights.detach().contiguous().requires_grad_()))
    again = run(lambda *t: call(*t, relaid(experts)), (relaid(x), relaid(w), weights))
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a, b)


def test_unused_experts_may_hold_nan_and_get_zero_gradients(device):
    N, D, H, E, K, P = 9, 10, 1, 4, 2, 7
    experts = choices(N, H, E, K, device=device, used=2)
    used = experts.unique().tolist()
    empty = [e for e in range(E) if e not in used]
    x, weights, w = randn(N, D, device=device), randn(N, H, K, device=device), randn(E, D, P, device=device)
    spoiled = w.detach().clone()
    spoiled[empty] = torch.nan
    spoiled.requires_grad_()
    v = value(x, spoiled, weights, experts)
    v.sum().backward()
    assert torch.equal(v, value(x, w, weights, experts))
    assert spoiled.grad.isfinite().all() and not spoiled.grad[empty].any()
    assert x.grad.isfinite().all()


def test_autocast_casts_and_returns_gradients_in_the_parameters_dtype(device):
    x, w = randn(9, 12, device=device), randn(4, 12, 8, device=device)
    routing = F.Routing(randn(9, 2, 1, device=device), choices(9, 2, 2, 1, device=device))
    with torch.autocast(device, torch.bfloat16):
        v = F.value_projection(x, w, routing)
    v.float().sum().backward()
    assert v.dtype == torch.bfloat16 and x.grad.dtype == w.grad.dtype == torch.float32
    cast = F.value_projection(x.bfloat16(), w.bfloat16(), routing)
    assert torch.equal(v, cast)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_strides_at_size(dtype, device):
    N, D, H, E, K, P = 3001, 412, 2, 5, 3, 76
    x, a = randn(D, N, device=device, dtype=dtype), randn(H, N, P, device=device, dtype=dtype)
    w = randn(H * E, P, D, device=device, dtype=dtype, scale=D**-0.5)
    gates = {
        "weights": randn(K, H, N, device=device).detach().sigmoid().permute(2, 1, 0).requires_grad_(),
        "experts": choices(N, H, E, K, device=device),
    }
    x, a, wide = (t.detach().transpose(*axes).requires_grad_() for t, axes in ((x, (0, 1)), (a, (0, 1)), (w, (1, 2))))
    check(value, reference.value_projection, {"x": x, "w": wide} | gates, at_size=True)
    check(output, reference.output_projection, {"a": a, "w": w} | gates, at_size=True)


def routing(N=3, H=2, K=2, E=3, device="cpu"):
    return F.Routing(torch.ones(N, H, K, device=device), choices(N, H, E, K, device=device) if H else torch.ones(N, H, K).int())


X, W, A, WO = torch.zeros(3, 5), torch.zeros(6, 5, 8), torch.zeros(3, 2, 8), torch.zeros(6, 8, 5)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: F.value_projection(X, W[:, :4], routing()), ValueError, r"w must have shape \[\*, 5, \*\]"),
        (lambda: F.value_projection(X[:2], W, routing()), ValueError, r"routing.weights must have shape \[2"),
        (lambda: F.value_projection(X, W[:5], routing()), ValueError, r"w must have H \* E experts"),
        (lambda: F.value_projection(X, W, (1, 2)), TypeError, "routing must be a Routing, got tuple"),
        (lambda: F.output_projection(A[:, [0, 1, 1]], WO, routing()), ValueError, r"a must have shape \[\.\.\., 2, 8\]"),
        (lambda: F.output_projection(A, WO.half(), routing()), TypeError, "w has dtype torch.float16"),
        (lambda: F.value_projection(X[:, :0], W[:, :0], routing()), ValueError, "x must be .*1"),
        (lambda: F.value_projection(X, W[..., :0], routing()), ValueError, "w must be .*1"),
        (lambda: F.output_projection(A[..., :0], WO[:, :0], routing()), ValueError, "(a|w) must be .*1"),
        (lambda: F.output_projection(A, WO[..., :0], routing()), ValueError, "w must be .*1"),
        (lambda: F.value_projection(X, W, routing(H=0)), ValueError, "routing"),
        (lambda: F.output_projection(A, WO, routing(H=0)), ValueError, "routing"),
        (lambda: F.value_projection(X, W, routing(K=0)), ValueError, "routing"),
        (lambda: F.value_projection(X.to("meta"), W, routing()), ValueError, "x is on meta"),
        (lambda: F.output_projection(A.to("meta"), WO, routing()), ValueError, "a is on meta"),
        (lambda: F.value_projection(X, W, routing(device="meta")), ValueError, "routing.weights is on meta"),
    ],
)
def test_bad_projections(call, error, message, device):
    if device == "cuda":
        pytest.skip("the arguments are on the CPU")
    with refused(error, message):
        call()
