import itertools
import math

import pytest
import torch
from cases import ALL_DTYPES, CPU_DTYPES, check, choices, randn, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

import reference
from triton_moe import functional as F
from triton_moe import testing
from triton_moe.kernels import gating as kernels
from triton_moe.kernels import sets as set_kernels

MODES = F.MODES


def choice(x, sel, **kwargs):
    return F.gating(x.detach(), sel.detach(), **kwargs).experts


def check_gating(N, D, H, E, K, mode, dtype, device, **options):
    x, sel = randn(N, D, device=device, dtype=dtype), randn(H * E, D, device=device, dtype=dtype, scale=D**-0.5)
    experts = choice(x, sel, n_heads=H, top_k=K, mode=mode)

    def kernel(x, sel):
        r = F.gating(x, sel, n_heads=H, top_k=K, mode=mode)
        return r.weights, r.logits

    def twin(x, sel):
        r = reference.gating(x, sel, n_heads=H, top_k=K, mode=mode, experts=experts)
        return r.weights, r.logits

    check(kernel, twin, {"x": x, "sel": sel}, **options)
    logits = F.gating(x, sel, n_heads=H, top_k=K).logits
    assert torch.equal(experts.long(), reference.select(logits, K))


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, D, H, E, K", [(1, 41, 1, 5, 2), (37, 19, 2, 5, 3), (20, 24, 3, 13, 4), (9, 7, 2, 1, 1), (5, 8, 1, 33, 33)]
)
def test_values_and_gradients(N, D, H, E, K, mode, dtype, device):
    check_gating(N, D, H, E, K, mode, dtype, device, repeats=1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, D, H, E, K",
    [(8192, 1024, 4, 4, 2), (5000, 412, 2, 5, 3), (4097, 1024, 1, 387, 16), (2048, 512, 32, 8, 4), (777, 1024, 1, 1024, 32)],
)
def test_values_and_gradients_at_size(N, D, H, E, K, mode, dtype, device):
    check_gating(N, D, H, E, K, mode, dtype, device, repeats=3, at_size=True)


def of_logits(logits, **kwargs):
    """Gate logits [H, E] as they are: one token x = 1 of width 1, a head a row."""
    H, E = logits.shape
    x = torch.ones(1, 1, device=logits.device)
    return F.gating(x, logits.reshape(H * E, 1), n_heads=H, **kwargs)


@given(data=st.data(), E=st.integers(1, 9), mode=st.sampled_from(MODES))
def test_selection_survives_ties_nan_and_infinities(data, E, mode, device):
    logits = data.draw(testing.logits((6, E), device=device))
    K = data.draw(st.integers(1, E))
    r = of_logits(logits, top_k=K, mode=mode)
    assert torch.equal(r.logits[0].nan_to_num(7.0), logits.nan_to_num(7.0))
    assert torch.equal(r.experts.long(), reference.select(logits[None], K))
    assert all(len(set(row)) == K for row in r.experts[0].tolist())
    if mode == "sigmoid":
        torch.testing.assert_close(r.weights[0], logits.gather(1, r.experts[0].long()).sigmoid(), equal_nan=True)


@pytest.mark.smoke
@given(seed=st.integers(0, 2**63 - 1), delta=st.sampled_from([0.1, 0.5, 0.97]))
def test_expert_dropout_is_the_documented_function_of_the_seed(seed, delta, device):
    x, sel = randn(17, 11, device=device), randn(10, 11, device=device)
    options = {"n_heads": 2, "top_k": 3, "expert_dropout": delta, "seed": seed}
    ours = F.gating(x, sel, training=True, **options)
    twin = reference.gating(x.double(), sel.double(), **options)
    assert torch.equal(ours.experts.long(), twin.experts)
    torch.testing.assert_close(ours.weights.double(), twin.weights, rtol=1e-5, atol=1e-6)
    evaluated = F.gating(x, sel, n_heads=2, top_k=3, expert_dropout=delta, seed=seed)
    assert torch.equal(evaluated.experts, F.gating(x, sel, n_heads=2, top_k=3).experts)


def test_seed_as_tensor_and_from_the_generator(device):
    x, sel = randn(17, 11, device=device), randn(10, 11, device=device)
    options = {"n_heads": 2, "top_k": 2, "expert_dropout": 0.5, "training": True}
    by_int = F.gating(x, sel, seed=5, **options).experts
    assert torch.equal(by_int, F.gating(x, sel, seed=torch.tensor(5, device=device), **options).experts)
    torch.manual_seed(1)
    first = F.gating(x, sel, **options).experts
    second = F.gating(x, sel, **options).experts
    torch.manual_seed(1)
    assert torch.equal(first, F.gating(x, sel, **options).experts)
    assert not torch.equal(first, second)


@given(start=st.integers(0, 29), count=st.integers(1, 30))
def test_a_token_does_not_depend_on_its_batch(start, count, device):
    x, sel = randn(30, 19, device=device), randn(10, 19, device=device)
    whole = F.gating(x, sel, n_heads=2, top_k=3)
    part = F.gating(x[start : start + count], sel, n_heads=2, top_k=3)
    for a, b in zip(whole[:3], part[:3], strict=True):
        assert torch.equal(a[start : start + count], b)


def test_a_nan_token_leaves_the_others_bitwise_alone(device):
    x, sel = randn(30, 19, device=device, requires_grad=False), randn(10, 19, device=device)
    clean = F.gating(x, sel, n_heads=2, top_k=3)
    x[7] = torch.nan
    r = F.gating(x, sel, n_heads=2, top_k=3)
    others = torch.arange(30, device=device) != 7
    for a, b in zip(clean[:3], r[:3], strict=True):
        assert torch.equal(a[others], b[others])
    assert r.weights[7].isnan().all()
    assert r.experts[7].tolist() == [[0, 1, 2], [0, 1, 2]]


@given(data=st.data())
def test_strides_do_not_matter(data, device):
    x, sel = randn(6, 5, 12, device=device), randn(10, 12, device=device)
    expected = F.gating(x, sel, n_heads=2, top_k=2)
    r = F.gating(data.draw(testing.strided(x)), data.draw(testing.strided(sel)), n_heads=2, top_k=2)
    for a, b in zip((*expected[:3], *expected.plan), (*r[:3], *r.plan), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_expanded_tokens(dtype, device):
    row, sel = randn(12, device=device, dtype=dtype), randn(10, 12, device=device, dtype=dtype)
    expanded, contiguous = (F.gating(x, sel, n_heads=2, top_k=2) for x in (row.expand(9, 12), row.repeat(9, 1)))
    for a, b in zip(expanded[:3], contiguous[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("N, D, H, E, K", [(37, 41, 2, 5, 3), (20, 24, 3, 13, 4), (9, 30, 1, 40, 3)])
def test_two_sides_are_two_gates(N, D, H, E, K, dtype, device):
    """The choices bitwise, masks included: each side draws from its own stream."""
    x, sel = randn(N, D, device=device, dtype=dtype).detach(), randn(2 * H * E, D, device=device, dtype=dtype).detach()
    seed = torch.tensor(3, device=device)
    both = kernels.gating_forward(x, sel, seed, 2, H, K, "sigmoid", 0.3, 2)
    grads = [randn(2, N, H, n, device=device).detach() for n in (K, E)]
    dlogits, dsel = kernels.gating_backward(*grads, x, sel, *both, "sigmoid")
    for side, sel_side in enumerate(sel.split(H * E)):
        one = kernels.gating_forward(x, sel_side, seed, 1, H, K, "sigmoid", 0.3, 2 + side)
        assert all(torch.equal(b[side], o[0]) for b, o in zip(both, one, strict=True))
        dlogits_side, _ = kernels.gating_backward(*(g[side : side + 1] for g in grads), x, sel_side, *one, "sigmoid")
        part = dlogits[:, side * H * E : (side + 1) * H * E]  # compiled apart: one may fuse what the other rounds
        torch.testing.assert_close(part, dlogits_side, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert dlogits.dtype == dsel.dtype == dtype


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("sides, N, D, H, E, K", [(2, 37, 41, 2, 5, 3), (1, 1, 24, 1, 33, 4), (2, 20, 19, 3, 20, 2)])
@pytest.mark.parametrize("layout", ["dense", "rows apart", "columns apart", "one row"])
def test_cast_in_the_same_launch(layout, sides, N, D, H, E, K, dtype, device):
    """Of a float32 x: bitwise what a cast and then a gate of the copy make, also where several programs read the same rows."""
    x = randn(N, 2 * D, device=device, requires_grad=False)
    x = {"dense": x[:, :D].contiguous(), "rows apart": x[:, 2 : D + 2], "columns apart": x[:, ::2], "one row": x[:1, :D]}[layout]
    x = x.expand(N, D)
    sel = randn(sides * H * E, D, device=device, dtype=dtype, requires_grad=False)
    options = torch.tensor(3, device=device), sides, H, K, "sigmoid", 0.3, 2
    *ours, copy = kernels.cast_and_gate(x, sel, *options)
    assert copy.dtype == dtype and torch.equal(copy, x.to(dtype))
    apart = kernels.gating_forward(x.to(dtype), sel, *options)
    assert all(torch.equal(a, b) for a, b in zip(ours, apart, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sides, N, D, H, E, K",
    [
        (2, 8192, 1024, 4, 4, 2),
        (2, 5000, 413, 2, 5, 3),
        (1, 4096, 1024, 1, 128, 8),
        (2, 4097, 412, 4, 10, 2),
        (1, 999, 412, 1, 155, 12),
    ],
)
def test_cast_in_the_same_launch_at_size(sides, N, D, H, E, K, dtype, device):
    x = randn(N, D, device=device, requires_grad=False)
    sel = randn(sides * H * E, D, device=device, dtype=dtype, scale=D**-0.5, requires_grad=False)
    options = None, sides, H, K, "softmax", 0.0, 0
    weights, experts, logits, copy = kernels.cast_and_gate(x, sel, *options)
    assert torch.equal(copy, x.to(dtype))
    *_, apart = kernels.gating_forward(copy, sel, *options)
    assert torch.equal(logits, apart)
    for side in range(sides):
        assert torch.equal(experts[side].long(), reference.select(logits[side], K))
    torch.testing.assert_close(weights, logits.softmax(-1).gather(-1, experts.long()), rtol=1e-5, atol=1e-6)
    for _ in range(3):
        again = kernels.cast_and_gate(x, sel, *options)
        assert all(torch.equal(a, b) for a, b in zip((weights, experts, logits, copy), again, strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("N, D, H, E, K, several", [(37, 19, 2, 5, 3, 2), (21, 24, 1, 4, 2, 3), (5, 8, 2, 4, 2, 1)])
def test_several_gates_in_one_call(N, D, H, E, K, several, mode, dtype, device):
    """Values and gradients of each, which are bitwise those of a call of its own."""
    names = [f"sel{i}" for i in range(several)]
    tensors = {name: randn(H * E, D, device=device, dtype=dtype, scale=D**-0.5, seed=i) for i, name in enumerate(names)}
    x = randn(N, D, device=device, dtype=dtype)
    options = {"n_heads": H, "top_k": K, "mode": mode}
    together = F.gating(x, tuple(tensors.values()), **options)
    assert isinstance(together, tuple) and len(together) == several
    for sel, routing in zip(tensors.values(), together, strict=True):
        alone = F.gating(x, sel, **options)
        for a, b in zip((*routing[:3], *routing.plan), (*alone[:3], *alone.plan), strict=True):
            assert torch.equal(a, b)

    def kernel(x, **sel):
        return [t for r in F.gating(x, tuple(sel.values()), **options) for t in (r.weights, r.logits)]

    def twin(x, **sel):
        found = [reference.gating(x, s, **options, experts=r.experts) for s, r in zip(sel.values(), together, strict=True)]
        return [t for r in found for t in (r.weights, r.logits)]

    check(kernel, twin, {"x": x} | tensors, repeats=1)


@pytest.mark.parametrize("used", ["weights", "logits"])
def test_of_several_gates_one_may_be_used(used, device):
    x, *sel = (randn(n, 11, device=device, seed=n) for n in (17, 10, 10))
    one, _ = F.gating(x, tuple(sel), n_heads=2, top_k=3)
    dx, d0, d1 = torch.autograd.grad(getattr(one, used).square().sum(), (x, *sel))
    alone = torch.autograd.grad(getattr(F.gating(x, sel[0], n_heads=2, top_k=3), used).square().sum(), (x, sel[0]))
    torch.testing.assert_close((dx, d0), alone)
    assert not d1.any()


@given(seed=st.integers(0, 2**63 - 1))
def test_of_several_gates_each_has_its_own_dropout(seed, device):
    x, *sel = (randn(n, 11, device=device, seed=n) for n in (17, 10, 10))
    options = {"n_heads": 2, "top_k": 3, "expert_dropout": 0.5, "seed": seed}
    ours = F.gating(x, tuple(sel), training=True, **options)
    for i, routing in enumerate(ours):
        twin = reference.gating(x.double(), sel[i].double(), stream=7 + i, **options)
        assert torch.equal(routing.experts.long(), twin.experts)


def revolving_door(E, K):
    """The sets in an order in which neighbours differ in one expert: those without the last expert, then the rest reversed."""
    if K in (0, E):
        return [frozenset(range(K))]
    return revolving_door(E - 1, K) + [s | {E - 1} for s in reversed(revolving_door(E - 1, K - 1))]


def set_ranks(experts, E):
    """[N, H], the rank of each chosen set."""
    ranks = {chosen: rank for rank, chosen in enumerate(revolving_door(E, experts.shape[-1]))}
    assert len(ranks) == math.comb(E, experts.shape[-1])
    flat = [ranks[frozenset(row)] for row in experts.flatten(0, 1).tolist()]
    return torch.tensor(flat, dtype=torch.int64, device=experts.device).view(experts.shape[:2])


def check_plan(experts, E, sets):
    """routing_plan of experts [sides, N, H, K] against stable sorts by torch."""
    stacked = kernels.routing_plan(experts, E, sets)
    N, H, K = experts.shape[1:]
    assert all(t.dtype == torch.int32 for t in stacked[:-1]) and stacked[-1].dtype == torch.int64
    for side, e in enumerate(experts):
        plan = kernels.Plan(*(t[side] for t in stacked))
        heads = torch.arange(H, device=e.device)[:, None]
        keys = {"order": (e + heads * E).flatten()}
        if sets:
            S, ranks = math.comb(E, K), set_ranks(e, E)
            keys["set_order"] = (ranks + heads[:, 0] * S).flatten()
            signature, sorted_heads = torch.zeros_like(ranks[:, 0]), next(h for h in range(H, 0, -1) if S**h < 2**31 or h == 1)
            for rank in ranks.T[:sorted_heads]:
                signature = signature * S + torch.where(signature % 2 == 1, S - 1 - rank, rank)
            if set_kernels.joint(E, K):
                keys["token_order"] = signature // -(-(S**sorted_heads) // kernels.MAX_SIGNATURES)
            check_tiles(plan, keys, e, H * S)
            if plan.rank.numel():
                assert torch.equal(plan.rank[plan.order.long()].long(), torch.arange(N * H * K, device=e.device))
        assert [list(t.shape) for t in plan] == [list(shape) for shape in kernels.plan_shapes(N, H, E, K, sets)]
        for name, key in keys.items():
            assert torch.equal(getattr(plan, name).long(), key.sort(stable=True).indices), name
        counts = torch.bincount(keys["order"], minlength=H * E)
        assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]


def check_tiles(plan, keys, e, groups):
    """What `gather` and `spread` are told of their tiles."""
    (N, H, K), TILE = e.shape, set_kernels.TILE
    S = groups // H
    counts = torch.bincount(keys["set_order"], minlength=groups)
    ends = counts.cumsum(0)
    expected = {
        (first, end, group // S): group
        for group, (begin, end) in enumerate(zip((ends - counts).tolist(), ends.tolist(), strict=True))
        for first in range(begin, end, TILE)
    }
    used = plan.set_tiles[: len(expected)].tolist()
    assert sorted(tuple(entry[:3]) for entry in used) == sorted(expected)
    rows = e.flatten(0, 1).tolist()
    assert all(entry[3:] == sorted(rows[plan.set_order[entry[0]]]) for entry in used)
    assert not plan.set_tiles[len(expected) :, :2].any()

    together = "token_order" in keys
    first, passes = 0, [plan.token_order] if together else plan.set_order.view(H, N)
    chosen, E = e.tolist(), plan.offsets.shape[0] // H
    for h, (order, visited) in enumerate(zip(passes, plan.visited.view(len(passes), -1, 2).tolist(), strict=True)):
        for tile, (bits, block) in zip(order.split(TILE) if N else (), visited, strict=True):
            experts = {i * E + x for n in tile.tolist() for i in range(H) for x in chosen[n][i]} if together else None
            if experts is None:
                experts = {x for item in tile.tolist() for x in chosen[item // H][h]}
            assert {i for i in range(64) if bits >> i & 1} == experts
            assert first <= block  # blocks of packed rows do not overlap
            first = block + len(experts)
    assert first * TILE <= set_kernels.packed_shape(N, H, E, K, 8)[0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks and tiles that a small problem has several of."""
    monkeypatch.setattr(kernels.plan, "CHUNK", 32)
    monkeypatch.setattr(kernels.plan, "ROUTES", 32)
    monkeypatch.setattr(set_kernels, "TILE", 16)


@pytest.mark.smoke
@pytest.mark.parametrize("used", [None, "few"])
@pytest.mark.parametrize(
    "N, H, E, K, sets",
    [
        (1, 1, 1, 1, True), (0, 2, 4, 2, True), (137, 4, 4, 2, True), (100, 2, 5, 3, True), (80, 1, 8, 4, True),
        (33, 12, 4, 2, True), (70, 1, 40, 3, False), (50, 3, 13, 13, False), (30, 1, 387, 2, False),
        (45, 3, 33, 4, False), (37, 1, 128, 8, False),
    ],
)  # fmt: skip
def test_plan_sorts_stably(N, H, E, K, sets, used, small_tiles, device):
    experts = [choices(N, H, E, K, device=device, seed=seed, used=K if used else None) for seed in (0, 1)]
    check_plan(torch.stack(experts), E, sets)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "N, H, E, K, sets",
    [
        (32768, 4, 4, 2, True), (16384, 2, 5, 3, True), (32768, 2, 8, 4, True), (5000, 10, 6, 2, True),
        (131072, 1, 128, 8, False), (32768, 1, 128, 8, False), (32768, 1, 1024, 32, False), (1 << 20, 4, 4, 2, False),
        (32767, 32, 8, 4, False),
    ],
)  # fmt: skip
def test_plan_sorts_stably_at_size(N, H, E, K, sets, device):
    experts = torch.rand(2, N, H, E, device=device).argsort(-1)[..., :K].int()
    check_plan(experts, E, sets)
    check_plan(torch.arange(K, device=device, dtype=torch.int32).expand(2, N, H, K), E, sets)


def test_neighbouring_sets_differ_in_one_expert(device):
    for E, K in ((4, 2), (5, 3), (8, 4), (6, 1), (4, 4)):
        sets = revolving_door(E, K)
        assert all(len(a - b) == 1 for a, b in itertools.pairwise(sets))
        experts = torch.tensor([sorted(s, reverse=True) for s in sets], dtype=torch.int32, device=device)[None, :, None]
        plan = kernels.routing_plan(experts, E, True)
        assert plan[3].tolist() == [list(range(len(sets)))]
        assert plan[4][0, :, 3:].tolist() == [sorted(s) for s in sets] + [[0] * K]


def test_experts_by_hand_may_repeat(device):
    """Then what the sets mean is nobody's concern, but every item keeps one place."""
    experts = torch.full((1, 70, 2, 3), 4, dtype=torch.int32, device=device)
    experts[:, ::2] = torch.tensor([0, 0, 2], dtype=torch.int32, device=device)
    order, _, rank, set_order, _, token_order, _ = kernels.routing_plan(experts, 5, True)
    for t in (order, rank, set_order, token_order):
        assert torch.equal(t[0].sort().values.long(), torch.arange(t.numel(), device=device))


def test_double_backward_is_refused(device):
    x, sel = randn(3, 8, device=device), randn(4, 8, device=device)
    (dx,) = torch.autograd.grad(F.gating(x, sel, top_k=2).weights.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"top_k": 6}, ValueError, r"top_k must be between 1 and 5 .* got 6"),
        ({"top_k": 0}, ValueError, "top_k must be between 1 and 5"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
        ({"n_heads": 3}, ValueError, r"sel must have n_heads \* E rows with n_heads = 3, got 10"),
        ({"mode": "relu"}, ValueError, "mode must be one of 'sigmoid'"),
        ({"expert_dropout": 1.0}, ValueError, "expert_dropout must be at least 0 and below 1, got 1.0"),
        ({"sel": torch.zeros(10, 7)}, ValueError, r"sel must have shape \[\*, 12\], got \[10, 7\]"),
        ({"sel": torch.zeros(10, 12, dtype=torch.float16)}, TypeError, "sel has dtype torch.float16, expected torch.float32"),
        ({"sel": ()}, ValueError, "sel must be a tensor or a tuple of one or more, got an empty tuple"),
        ({"sel": (torch.zeros(10, 12), None)}, TypeError, r"sel\[1\] must be a torch.Tensor, got NoneType"),
        ({"sel": (torch.zeros(10, 12), torch.zeros(8, 12))}, ValueError, r"sel\[1\] must have shape \[10, 12\], got \[8, 12\]"),
        ({"sel": (torch.zeros(9, 12),)}, ValueError, r"sel\[0\] must have n_heads \* E rows with n_heads = 2, got 9"),
        ({"sel": [torch.zeros(10, 12)]}, TypeError, "sel must be a torch.Tensor, got list"),
        ({"x": torch.zeros(3, 12, dtype=torch.float64)}, TypeError, "x has dtype torch.float64"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"sel": torch.zeros(10, 12, device="meta")}, ValueError, "sel is on meta, expected"),
        ({"x": torch.zeros(3, 12, device="meta")}, ValueError, "x is on meta"),
        ({"x": torch.zeros(3, 0), "sel": torch.zeros(10, 0)}, ValueError, "x must be .*1"),
        ({"sel": torch.zeros(0, 12)}, ValueError, "sel must have"),
        ({"training": "no"}, TypeError, "training must be a bool, got str"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": 2**63}, ValueError, "seed must be"),
        ({"seed": torch.tensor([[3]])}, TypeError, r"seed must be an int64 scalar tensor, got .* \[1, 1\]"),
        ({"seed": torch.tensor(3, dtype=torch.int32)}, TypeError, "seed must be an int64 scalar tensor, got torch.int32"),
        ({"seed": torch.tensor(3, device="meta")}, ValueError, "seed is on meta"),
    ],
)
def test_bad_input(change, error, message, device):
    arguments = {"x": torch.zeros(3, 12), "sel": torch.zeros(10, 12), "n_heads": 2, "top_k": 2} | change
    arguments = tree_map_only(torch.Tensor, lambda t: t if t.device.type == "meta" else t.to(device), arguments)
    with refused(error, message):
        F.gating(arguments.pop("x"), arguments.pop("sel"), **arguments)
