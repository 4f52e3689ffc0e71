import pytest
import torch
from cases import check, choices, head_weights, randn

import reference
from triton_moe import functional as F
from triton_moe.kernels import projection, sets
from triton_moe.kernels.common import input_precision
from triton_moe.kernels.gating import Plan, routing_plan


def plan_of(experts, E):
    return [t[0] for t in routing_plan(experts[None], E, True)]


class Value(torch.autograd.Function):
    """The value projection as the launchers compute it, whatever the size."""

    @staticmethod
    def forward(ctx, x, w, weights, experts):
        plan = plan_of(experts, w.shape[0] // experts.shape[1])
        v, u = projection.value_forward(x, w, weights, experts, *plan, w.shape[2], input_precision(x.dtype))
        ctx.save_for_backward(x, w, weights, experts, *plan, u)
        return v

    @staticmethod
    def backward(ctx, dv):
        x, w, weights, experts, *plan, u = ctx.saved_tensors
        gated, order_b, gates = projection.value_backward_rows(dv, u, weights, experts, *plan)
        return *projection.value_backward(dv, gated, order_b, x, w, weights, experts, *plan, "ieee"), gates, None


class Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, w, weights, experts):
        plan = plan_of(experts, w.shape[0] // experts.shape[1])
        ctx.save_for_backward(a, w, weights, experts, *plan)
        return projection.output_forward(a, w, weights, experts, *plan, input_precision(a.dtype))

    @staticmethod
    def backward(ctx, dy):
        return *projection.output_backward(dy, *ctx.saved_tensors, "ieee"), None


@pytest.fixture
def always(monkeypatch):
    """These kernels at any size, three programs for all tiles of y, and chunks of weight gradients that a small problem fills."""
    monkeypatch.setattr(sets, "fits", lambda *_: True)
    monkeypatch.setattr(sets, "_programs", lambda *_: 3)
    monkeypatch.setattr(projection, "LEAST_CHUNK", 16)
    monkeypatch.setattr(projection, "PROGRAMS", 1000)


SHAPES = [
    (1, 41, 1, 5, 2, 19),
    (70, 24, 2, 4, 2, 20),
    (150, 19, 3, 3, 1, 8),
    (90, 32, 2, 5, 3, 33),
    (80, 16, 1, 7, 4, 16),
    (290, 264, 2, 3, 2, 12),  # six tiles of y
    (70, 40, 2, 4, 2, 67),  # 64 columns and 3 in a dense product
]


@pytest.mark.smoke
@pytest.mark.parametrize("joint", [True, False], ids=["heads together", "one by one"])
@pytest.mark.parametrize("used", [None, "few"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, used, joint, always, device, monkeypatch):
    N, D, H, E, K, P = shape
    monkeypatch.setattr(sets, "joint", lambda *_: joint)
    gates = {
        "weights": randn(N, H, K, device=device).detach().sigmoid().requires_grad_(),
        "experts": choices(N, H, E, K, device=device, used=K if used else None),
    }
    half = torch.float16
    inputs = {"x": randn(N, D, device=device, dtype=half), "w": randn(H * E, D, P, device=device, dtype=half, scale=D**-0.5)}
    check(lambda **t: Value.apply(*t.values()), reference.value_projection, inputs | gates, repeats=1)
    inputs = {"a": randn(N, H, P, device=device, dtype=half), "w": randn(H * E, P, D, device=device, dtype=half, scale=P**-0.5)}
    check(lambda **t: Output.apply(*t.values()), reference.output_projection, inputs | gates, repeats=1)


@pytest.mark.parametrize("served", [True, False])
def test_padding_of_heads_is_not_kept(served, always, device, monkeypatch):
    """u is kept without columns of zeros, but for those that make rows of 16 bytes, and gives the same gradients of the gates."""
    monkeypatch.setattr(sets, "fits", lambda *_: served)
    N, D, H, E, K, P = 90, 16, 2, 4, 2, 18
    half = {"device": device, "dtype": torch.float16}
    x, w, dv = randn(N, D, **half).detach(), randn(H * E, D, P, **half).detach(), randn(N, H, 32, **half).detach()
    w, experts = torch.nn.functional.pad(w, (0, 32 - P)), choices(N, H, E, K, device=device)
    args = x, w, randn(N, H, K, device=device).detach(), experts, *plan_of(experts, E)
    v, u = projection.value_forward(*args, 32, "ieee")
    v_again, kept = projection.value_forward(*args, P, "ieee")
    assert kept.shape == (N * H * K, 24) and torch.equal(kept, u[:, :24]) and torch.equal(v_again, v)
    gates, expected = (projection.value_backward_rows(dv, t, *args[2:])[2] for t in (kept, u))
    torch.testing.assert_close(gates, expected, rtol=1e-5, atol=1e-5)


def test_fits_where_sets_are_few_and_full():
    assert sets.fits(32768, 4, 4, 2, torch.bfloat16) and sets.joint(4, 2)
    assert not sets.fits(32768, 4, 4, 2, torch.float32)
    assert not sets.fits(500, 4, 4, 2, torch.bfloat16)
    assert sets.fits(32768, 4, 16, 2, torch.bfloat16) and not sets.joint(16, 2)
    assert not sets.fits(1 << 20, 1, 32, 4, torch.bfloat16)


def test_layouts_of_sel_do_not_change_the_gradient(device):
    """Where both sides share a selection, `spread` reads the caller's own."""
    D, P, E, half = 16, 32, 2, {"device": device, "dtype": torch.float16}
    x, w = randn(1, 256, D, **half), head_weights(D, 1, E, P, device=device, dtype=torch.float16, shared=True)
    assert sets.fits(256, 1, E, 1, torch.float16) and w.sel_v is None
    (expected,) = torch.autograd.grad(F.switchhead(x, w, top_k=1).float().square().sum(), x)
    turned = w._replace(sel_o=w.sel_o.detach().t().contiguous().t())
    (dx,) = torch.autograd.grad(F.switchhead(x, turned, top_k=1).float().square().sum(), x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("P", [40, 320])
def test_a_plan_serves_other_dtypes_and_wide_heads(P, device):
    """A plan sorted by sets for a 16-bit gate, given to a float32 projection or to one that has no room for its tiles."""
    x, sel = randn(256, 16, device=device).detach(), randn(2, 16, device=device).detach()
    routing = F.gating(x.half(), sel.half(), top_k=1)
    assert routing.plan.set_order.numel()
    dtype = torch.float32 if P == 40 else torch.float16
    w, by_hand = randn(2, 16, P, device=device, dtype=dtype).detach(), routing._replace(plan=None)
    assert torch.equal(F.value_projection(x.to(dtype), w, routing), F.value_projection(x.to(dtype), w, by_hand))
    a, w = randn(256, 1, P, device=device, dtype=dtype).detach(), w.transpose(1, 2)
    assert torch.equal(F.output_projection(a, w, routing), F.output_projection(a, w, by_hand))


def test_weights_may_start_anywhere(device):
    half = {"device": device, "dtype": torch.float16}
    x, sel, w = randn(256, 16, **half).detach(), randn(2, 16, **half).detach(), randn(2, 16, 32, **half).detach()
    routing = F.gating(x, sel, top_k=1)
    odd = torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)
    assert odd.is_contiguous() and odd.data_ptr() % 16
    assert torch.equal(F.value_projection(x, odd, routing), F.value_projection(x, w, routing))


@pytest.mark.gpu
@pytest.mark.parametrize("P", [100, 132])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_token_does_not_depend_on_its_batch(dtype, P, device):
    """Bitwise, although its tile visits other experts in another company: a row of zeros adds nothing."""
    N, D, H, E, K = 16384, 512, 4, 4, 2  # more tiles of y than an H200 has multiprocessors
    experts, weights = choices(N, H, E, K, device=device), randn(N, H, K, device=device).detach().sigmoid()
    x, a = randn(N, D, device=device, dtype=dtype).detach(), randn(N, H, P, device=device, dtype=dtype).detach()
    w_v = randn(H * E, D, P, device=device, dtype=dtype, scale=D**-0.5).detach()
    w_o = randn(H * E, P, D, device=device, dtype=dtype, scale=P**-0.5).detach()

    def run(rows):
        routing = F.Routing(weights[rows], experts[rows], plan=Plan(*plan_of(experts[rows], E)))
        return F.value_projection(x[rows], w_v, routing), F.output_projection(a[rows], w_o, routing)

    half = torch.arange(0, N, 2, device=device)
    assert sets.fits(len(half), H, E, K, dtype)
    for whole, part in zip(run(slice(None)), run(half), strict=True):
        assert torch.equal(whole[half], part)


@pytest.mark.gpu
@pytest.mark.parametrize("skew", [0.0, 0.7])
def test_two_hundred_runs_give_the_same_bits(skew, device):
    """Both projections with their gates, and the MLP, forward and every gradient."""
    N, D, H, E, K, P = 16384, 512, 4, 4, 2, 100
    half = {"device": device, "dtype": torch.bfloat16}
    x, a, w_v = randn(N, D, **half), randn(N, H, P, **half), randn(H * E, D, P, scale=D**-0.5, **half)
    w_o, sel = randn(H * E, P, D, scale=P**-0.5, **half), randn(H * E, D, scale=D**-0.5, **half)
    keys, values = randn(16, D, 128, scale=D**-0.5, **half), randn(16, 128, D, scale=0.1, **half)
    bias = randn(H * E, device=device, seed=1).detach() * skew  # popular experts

    def run():
        gated = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        routing = F.gating(gated, torch.cat([sel, bias[:, None].to(sel)], 1), n_heads=H, top_k=K)
        v, y = F.value_projection(x, w_v, routing), F.output_projection(a, w_o, routing)
        z, _ = F.sigma_moe(x, F.SigmaMoEWeights(keys, values, sel), top_k=4)
        outputs = (v, y, z)
        return *outputs, *torch.autograd.grad(outputs, [x, a, w_v, w_o, sel, keys, values], [torch.ones_like(o) for o in outputs])

    first = run()
    different = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(200):
        for once, again in zip(first, run(), strict=True):
            different |= (once != again).any()
    assert not different
