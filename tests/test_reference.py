"""The oracle held to the public modules' golden values, to itself (NumPy against twin), and to finite differences."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import reference
from reference import XL, RoPE
from triton_moe.kernels import common

GOLDEN = Path(__file__).parent / "golden"


class SigmaMoEWeights(NamedTuple):
    keys: Any
    values: Any
    expert_sel: Any
    bias: Any = None
    o_bias: Any = None


class SwitchHeadWeights(NamedTuple):
    q: Any
    k: Any
    v: Any
    o: Any
    sel_v: Any = None
    sel_o: Any = None
    pos_to_pk: Any = None


class SwitchAllWeights(NamedTuple):
    norm1: tuple
    attention: SwitchHeadWeights
    norm2: tuple
    moe: SigmaMoEWeights


def tensors(tree, leaf=torch.tensor):
    """The same nest of tuples with float64 tensors for its arrays."""
    if isinstance(tree, np.ndarray):
        return leaf(tree)
    if isinstance(tree, tuple):
        parts = [tensors(part, leaf) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def leaves(tree) -> list:
    if isinstance(tree, tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    return [] if tree is None else [tree]


def check(op: str, *args, gradients: bool = True, **kwargs):
    """NumPy forward == twin in float64; the twin's gradients == finite differences; returns the NumPy result."""
    expected = getattr(reference, f"{op}_numpy")(*args, **kwargs)
    twin = getattr(reference, op)
    args, kwargs = tensors(args), {name: tensors(value) for name, value in kwargs.items()}
    actual = twin(*args, **kwargs)
    assert len(leaves(actual)) == len(leaves(expected))
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-10, atol=1e-12)
    if gradients:
        inputs = [
            a.requires_grad_() for a in leaves((args, tuple(kwargs.values()))) if torch.is_tensor(a) and a.is_floating_point()
        ]

        def outputs(*_):
            return tuple(a for a in leaves(twin(*args, **kwargs)) if a.requires_grad)

        torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    return expected


def normal(rng, *shape, scale=1.0):
    return rng.normal(size=shape) * scale


def moe_weights(rng, D=5, E=4, G=3, D_out=6, wide=1, bias=True):
    return SigmaMoEWeights(
        keys=normal(rng, E, D, wide * G),
        values=normal(rng, E, G, D_out),
        expert_sel=normal(rng, E, D),
        bias=normal(rng, E, wide * G) if bias else None,
        o_bias=normal(rng, D_out) if bias else None,
    )


def head_weights(rng, D=5, H=2, E=3, P=6, sel_v=True, pos_to_pk=False):
    return SwitchHeadWeights(
        q=normal(rng, H * P, D),
        k=normal(rng, H * P, D),
        v=normal(rng, H * E, D, P) if E > 1 else normal(rng, H * P, D),
        o=normal(rng, H * E, P, D) if E > 1 else normal(rng, D, H * P),
        sel_v=normal(rng, H * E, D) if E > 1 and sel_v else None,
        sel_o=normal(rng, H * E, D),
        pos_to_pk=normal(rng, H * P, D) if pos_to_pk else None,
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# The public modules


def golden(name: str):
    with np.load(GOLDEN / f"{name}.npz") as file:
        data = {key: file[key] for key in file}
    names = {
        key.removeprefix("param."): key.removeprefix("param.").removesuffix(".weight") for key in data if key.startswith("param.")
    }
    return data, names


@pytest.mark.parametrize("name", ["switchhead_rope", "switchhead_rope_full", "switchhead_xl", "switchhead_one_expert"])
def test_switchhead_golden(name):
    data, names = golden(name)
    weights = SwitchHeadWeights(**{short: data[f"param.{long}"] for long, short in names.items()})
    position = XL() if weights.pos_to_pk is not None else RoPE(float(data["rotate_fraction"]))
    options = {"top_k": int(data["top_k"]), "position": position}
    y = reference.switchhead_numpy(data["x"], weights, **options)
    np.testing.assert_allclose(y, data["y"], rtol=1e-9, atol=1e-11)

    x, weights = tensors((data["x"], weights), lambda a: torch.tensor(a, requires_grad=True))
    y = reference.switchhead(x, weights, **options)
    np.testing.assert_allclose(y.detach(), data["y"], rtol=1e-9, atol=1e-11)
    (y * torch.tensor(data["grad_y"])).sum().backward()
    np.testing.assert_allclose(x.grad, data["grad_x"], rtol=1e-9, atol=1e-11)
    for long, short in names.items():
        np.testing.assert_allclose(getattr(weights, short).grad, data[f"grad.{long}"], rtol=1e-9, atol=1e-11, err_msg=long)


@pytest.mark.parametrize("name", ["sigma_moe", "sigma_moe_bias"])
def test_sigma_moe_golden(name):
    data, names = golden(name)
    weights = SigmaMoEWeights(**{short: data[f"param.{long}"] for long, short in names.items()})
    top_k = int(data["top_k"])
    y, logits = reference.sigma_moe_numpy(data["x"], weights, top_k=top_k)
    np.testing.assert_allclose(y, data["y"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(reference.entropy_regularizer_numpy(logits), data["entropy"], rtol=1e-9)

    x, weights = tensors((data["x"], weights), lambda a: torch.tensor(a, requires_grad=True))
    y, logits = reference.sigma_moe(x, weights, top_k=top_k)
    entropy = reference.entropy_regularizer(logits)
    np.testing.assert_allclose(y.detach(), data["y"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(entropy.item(), data["entropy"], rtol=1e-9)
    ((y * torch.tensor(data["grad_y"])).sum() + 0.37 * entropy).backward()
    np.testing.assert_allclose(x.grad, data["grad_x"], rtol=1e-9, atol=1e-11)
    for long, short in names.items():
        np.testing.assert_allclose(getattr(weights, short).grad, data[f"grad.{long}"], rtol=1e-9, atol=1e-11, err_msg=long)


# Random bits


@triton.jit
def _uniform_kernel(out_ptr, seed_ptr, rows_ptr, cols_ptr, stream, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    row, col = tl.load(rows_ptr + offs), tl.load(cols_ptr + offs)
    tl.store(out_ptr + offs, common.uniform(tl.load(seed_ptr), row, col, stream))


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 + 7, 2**63 - 1, -1, -(2**40)])
@pytest.mark.parametrize("stream", [0, 3, 6])
def test_philox_is_the_kernels_generator(seed, stream):
    rows, cols = np.divmod(np.arange(64), 8)
    rows[-8:], cols[-4:] = 2**31 - 1, 2**30
    device = "cpu" if common.INTERPRET else "cuda"
    out = torch.full((64,), torch.nan, device=device)
    counters = [torch.tensor(a, dtype=torch.int32, device=device) for a in (rows, cols)]
    common.launch(_uniform_kernel, (1,), out, torch.tensor([seed], device=device), *counters, stream, BLOCK=64)
    expected = reference.philox_uniform(seed, rows, cols, stream)
    assert np.array_equal(out.cpu().double().numpy(), expected)
    assert expected.min() >= 0.0 and expected.max() < 1.0


def test_philox_known_answers():
    """The test vectors published with the generator: counter and key of zeros; the first word is 6627e8d5."""
    assert reference.philox_uniform(0, 0, 0, 0) == (0x6627E8D5 >> 8) * 2.0**-24


# Selection and gating


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1.0, 3.0, 2.0, 3.0], [1, 3, 2, 0]),
        ([-0.0, 0.0, 0.0, -0.0], [0, 1, 2, 3]),
        ([0.0, -0.0, 1e-300, -1e-300], [2, 0, 1, 3]),
        ([np.nan, -np.inf, np.nan, 0.0], [3, 1, 0, 2]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 1, 2, 3]),
        ([-np.inf, np.inf, -np.inf, np.inf], [1, 3, 0, 2]),
        ([40.0, 41.0, 39.0, 42.0], [3, 1, 0, 2]),
    ],
)
def test_selection_order(logits, expected):
    logits = np.array(logits)[None, None]
    for top_k in range(1, 5):
        assert reference.select_numpy(logits, top_k).tolist() == [[expected[:top_k]]]
        assert reference.select(torch.tensor(logits), top_k).tolist() == [[expected[:top_k]]]


def test_selection_of_struck_experts():
    logits = np.array([[[5.0, np.nan, 4.0, 3.0, np.nan, 3.0]]])
    struck = np.array([[[True, False, False, True, True, True]]])
    expected = [[[2, 1, 0, 3, 5, 4]]]
    assert reference.select_numpy(logits, 6, struck).tolist() == expected
    assert reference.select(torch.tensor(logits), 6, torch.tensor(struck)).tolist() == expected


def test_selections_agree_on_ties(rng):
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan])
    logits, struck = rng.choice(values, (50, 3, 7)), rng.random((50, 3, 7)) < 0.4
    expected = reference.select_numpy(logits, 4, struck)
    assert np.array_equal(reference.select(torch.tensor(logits), 4, torch.tensor(struck)), expected)


@pytest.mark.parametrize("mode", ["sigmoid", "softmax", "softmax_topk"])
@pytest.mark.parametrize("expert_dropout", [0.0, 0.6])
def test_gating(rng, mode, expert_dropout):
    x, sel = normal(rng, 2, 3, 5), normal(rng, 8, 5)
    routing = check("gating", x, sel, n_heads=2, top_k=3, mode=mode, expert_dropout=expert_dropout, seed=7)
    again = check("gating", x, sel, n_heads=2, top_k=3, mode=mode, experts=routing.experts)
    assert np.array_equal(again.weights, routing.weights)


def test_expert_dropout_strikes_by_the_philox_counters(rng):
    x, sel = normal(rng, 200, 5), normal(rng, 8, 5)
    routing = reference.gating_numpy(x, sel, n_heads=2, top_k=2, expert_dropout=0.5, seed=3, stream=2)
    struck = reference.philox_uniform(3, np.arange(200)[:, None], np.arange(8)[None], 2).reshape(200, 2, 4) < 0.5
    chosen_struck = np.take_along_axis(struck, routing.experts, axis=-1).sum(-1)
    survivors = 4 - struck.sum(-1)
    assert np.array_equal(chosen_struck, np.maximum(2 - survivors, 0))
    assert 0.45 < struck.mean() < 0.55


def test_nan_logits_reach_only_their_own_token_and_weight(rng):
    x, sel = normal(rng, 4, 5), normal(rng, 6, 5)
    clean = reference.gating(torch.tensor(x), torch.tensor(sel), n_heads=2, top_k=3)
    x[1] = np.nan
    routing = reference.gating(torch.tensor(x), torch.tensor(sel), n_heads=2, top_k=3)
    assert routing.experts[1].tolist() == [[0, 1, 2]] * 2
    assert routing.weights[1].isnan().all()
    for a, b in zip(clean, routing, strict=True):
        assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])


def test_gate_gradient_is_zero_for_experts_not_chosen():
    logits = torch.tensor([[1.0, torch.nan, 2.0, -torch.inf]], dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    sel = logits.T.clone().requires_grad_()
    reference.gating(x, sel, top_k=2).weights.sum().backward()
    gate = logits[0, [2, 0]].sigmoid()
    expected = torch.zeros(4, 1, dtype=torch.float64)
    expected[[2, 0], 0] = gate * (1 - gate)
    torch.testing.assert_close(sel.grad, expected)


def test_sigmoid_does_not_overflow():
    sel = np.array([[1000.0], [-1000.0], [np.inf], [-np.inf]])
    routing = reference.gating_numpy(np.ones((1, 1)), sel, top_k=4)
    assert routing.experts.tolist() == [[[2, 0, 1, 3]]]
    assert routing.weights.tolist() == [[[1.0, 1.0, 0.0, 0.0]]]


# Projections


def routing(rng, N, H, E, top_k):
    experts = rng.permuted(np.tile(np.arange(E), (N, H, 1)), axis=-1)[..., :top_k]
    return rng.random((N, H, top_k)), experts


@pytest.mark.parametrize(("H", "E", "top_k"), [(1, 1, 1), (2, 3, 2), (3, 2, 2)])
def test_projections(rng, H, E, top_k):
    weights, experts = routing(rng, 6, H, E, top_k)
    v = check("value_projection", normal(rng, 2, 3, 5), normal(rng, H * E, 5, 4), weights, experts)
    assert v.shape == (2, 3, H, 4)
    y = check("output_projection", v, normal(rng, H * E, 4, 5), weights, experts)
    assert y.shape == (2, 3, 5)


def test_projections_do_not_see_experts_not_chosen(rng):
    weights, experts = rng.random((3, 1, 1)), np.array([0, 2, 0])[:, None, None]
    w = normal(rng, 3, 5, 5)
    w[1] = np.nan
    x, w, weights = (torch.tensor(a, requires_grad=True) for a in (normal(rng, 3, 1, 5), w, weights))
    y = reference.output_projection(x, w, weights, torch.tensor(experts))
    y = y + reference.value_projection(x[:, 0], w, weights, torch.tensor(experts))[:, 0]
    y.sum().backward()
    assert all(a.isfinite().all() for a in (y, x.grad, w.grad, weights.grad))
    assert (w.grad[1] == 0).all()


# Positions


@pytest.mark.parametrize(("P", "fraction"), [(8, 0.5), (7, 1.0), (9, 0.4), (3, 0.5)])
def test_rope(rng, P, fraction):
    x = normal(rng, 1, 3, 2, P)
    y = check("rope", x, fraction=fraction, base=100.0, offset=5)
    n = int(fraction * P) // 2 * 2
    assert np.array_equal(y[..., n:], x[..., n:])
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1))


@pytest.mark.parametrize("D", [6, 7])
def test_sinusoids(D):
    R = check("sinusoids", np.arange(-4.0, 3.0), D, gradients=False)
    assert np.array_equal(R[4], np.arange(D) % 2)


# Attention

PADDING = np.array([[False, True, False, False, True], [True] * 5])
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "causal window": {"window": 2},
    "full window": {"causal": False, "window": 2},
    "padding": {"key_padding_mask": PADDING},
    "padding, full": {"key_padding_mask": PADDING, "causal": False},
    "packed": {"cu_seqlens": np.array([0, 2, 2, 5])},
    "packed, not covering": {"cu_seqlens": np.array([1, 3]), "causal": False, "window": 2},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("position", ["none", "rope", "xl", "xl with biases"])
def test_attention(rng, mask, position):
    B, S, H, P = 2, 5, 4, 4
    T = S if "cu_seqlens" in MASKS[mask] else 3
    content, place = (normal(rng, H, P), normal(rng, H, P)) if position == "xl with biases" else (None, None)
    position = {"none": None, "rope": RoPE(0.5, 100.0)}.get(position, XL(normal(rng, H * P, 5), content, place))
    q, k, v = normal(rng, B, T, H, P), normal(rng, B, S, 2, P), normal(rng, B, S, 2, 3)
    out, lse = check("attention", q, k, v, position=position, return_lse=True, gradients=False, **MASKS[mask])
    assert np.array_equal(np.isneginf(lse).transpose(0, 2, 1), (out == 0.0).all(-1))
    assert np.array_equal(check("attention", q, k, v, position=position, scale=0.3, **MASKS[mask]).shape, (B, T, H, 3))


def test_attention_of_more_queries_than_keys(rng):
    check("attention", normal(rng, 1, 5, 2, 4), normal(rng, 1, 3, 2, 4), normal(rng, 1, 3, 2, 4), causal=False)


def test_attention_without_a_key(rng):
    """Zeros out, -inf log-sum-exp, and gradients that are zero rather than NaN."""
    q, k, v = (torch.tensor(normal(rng, 2, 5, 1, 4), requires_grad=True) for _ in range(3))
    out, lse = reference.attention(q, k, v, key_padding_mask=torch.tensor(PADDING), return_lse=True)
    assert (out[1] == 0).all() and lse[1].isneginf().all() and lse[0].isfinite().all()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        (out.sum() + lse.exp().sum()).backward()
    for grad in (q.grad, k.grad, v.grad):
        assert (grad[1] == 0).all() and grad[0].isfinite().all() and (grad[0] != 0).any()


def test_attention_is_torchs(rng):
    q, k, v = (torch.tensor(normal(rng, 2, 7, 3, 4)) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True)
    torch.testing.assert_close(reference.attention(q, k, v), expected.transpose(1, 2))


@pytest.mark.parametrize("position", [None, RoPE(), "xl"])
def test_packed_sequences_are_separate(rng, position):
    if position == "xl":
        position = XL(normal(rng, 8, 6))
    q, k, v = (normal(rng, 1, 7, 2, 4) for _ in range(3))
    packed = reference.attention_numpy(q, k, v, position=position, cu_seqlens=[0, 3, 7])
    for part in (slice(0, 3), slice(3, 7)):
        alone = reference.attention_numpy(q[:, part], k[:, part], v[:, part], position=position)
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-12, atol=1e-14)


# Layers


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "swiglu", "geglu"])
@pytest.mark.parametrize("training", [False, True])
def test_sigma_moe(rng, activation, training):
    weights = moe_weights(rng, wide=2 if "glu" in activation else 1, bias=training)
    x = normal(rng, 2, 3, 5)
    options = {
        "top_k": 2,
        "activation": activation,
        "dropout": 0.3,
        "expert_dropout": 0.5,
        "training": training,
        "seed": 11,
    }
    y, logits = check("sigma_moe", x, weights, **options)
    assert y.shape == (2, 3, 6) and logits.shape == (2, 3, 4)


def test_sigma_moe_gates_from_another_input(rng):
    weights, x = moe_weights(rng), normal(rng, 4, 5)
    gate_input = normal(rng, 4, 5)
    y, logits = check("sigma_moe", x, weights, top_k=2, mode="softmax_topk", gate_input=gate_input)
    np.testing.assert_allclose(logits, gate_input @ weights.expert_sel.T)
    experts = np.argsort(-logits, axis=-1)[:, None, :2]
    again, _ = check("sigma_moe", x, weights, top_k=2, mode="softmax_topk", gate_input=gate_input, experts=experts)
    np.testing.assert_allclose(again, y)


def test_entropy_regularizer(rng):
    logits = normal(rng, 2, 3, 4, scale=3.0)
    check("entropy_regularizer", logits)
    uniform = reference.entropy_regularizer(torch.zeros(3, 4))
    torch.testing.assert_close(uniform, -torch.log(torch.tensor(4.0)))
    extreme = torch.tensor([[0.0, -2000.0, -torch.inf], [0.0, -2000.0, -torch.inf]])
    assert reference.entropy_regularizer(extreme) == 0.0


@pytest.mark.parametrize("position", [None, RoPE(), XL()], ids=["none", "rope", "xl"])
@pytest.mark.parametrize("kind", ["plain", "shared", "one expert"])
@pytest.mark.parametrize("source", ["self", "memory", "separate values"])
def test_switchhead(rng, position, kind, source):
    B, T, D, M = 2, 3, 5, 2
    weights = head_weights(rng, D, E=1 if kind == "one expert" else 3, sel_v=kind == "plain", pos_to_pk=isinstance(position, XL))
    x = normal(rng, B, T, D)
    k_src = None if source == "self" else np.concatenate([normal(rng, B, M, D), x], axis=1)
    v_src = normal(rng, B, M + T, D) if source == "separate values" else None
    options = {"top_k": 1 if kind == "one expert" else 2, "position": position, "k_src": k_src, "v_src": v_src}
    options |= {"dropout": 0.3, "expert_dropout": 0.5, "seed": 5, "return_logits": True}
    y, _ = check("switchhead", x, weights, training=False, gradients=False, **options)
    dropped, (logits_v, logits_o) = check("switchhead", x, weights, training=True, **options)
    assert not np.allclose(dropped, y)
    assert (logits_v is None) == (kind == "one expert") and logits_o.shape[0] == B * T
    assert kind == "one expert" or len(logits_v) == B * (T if source == "self" else M + T)


def test_switchhead_with_given_experts(rng):
    weights, x = head_weights(rng), normal(rng, 1, 4, 5)
    (_, experts_v), (_, experts_o) = routing(rng, 4, 2, 3, 2), routing(rng, 4, 2, 3, 2)
    masks = {"causal": False, "window": 3, "key_padding_mask": np.array([[False, True, False, False]])}
    given = check("switchhead", x, weights, top_k=2, position=RoPE(), experts=(experts_v, experts_o), **masks)
    chosen = reference.switchhead_numpy(x, weights, top_k=2, position=RoPE(), **masks)
    assert not np.allclose(given, chosen)


@pytest.mark.parametrize("training", [False, True])
def test_switchall(rng, training):
    D = 5
    weights = SwitchAllWeights(
        norm1=(normal(rng, D), normal(rng, D)),
        attention=head_weights(rng, D),
        norm2=(normal(rng, D), normal(rng, D)),
        moe=moe_weights(rng, D, D_out=D),
    )
    options = {"top_k": 2, "moe_top_k": 2, "position": RoPE(), "activation": "gelu", "training": training, "seed": 9}
    options |= {f"{name}dropout": 0.3 for name in ("", "attention_", "moe_", "expert_", "moe_expert_")}
    y, logits = check("switchall", normal(rng, 2, 3, D), weights, **options)
    assert y.shape == (2, 3, D) and logits.shape == (2, 3, 4)


# Number formats


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [RoPE(), XL()], ids=["rope", "xl"])
def test_twins_keep_their_dtype(rng, dtype, position):
    """A twin rounds, stays near the truth, and keeps its logits in float32; autocast changes nothing."""
    D = 8
    weights = SwitchAllWeights(
        norm1=(np.ones(D), np.zeros(D)),
        attention=head_weights(rng, D, pos_to_pk=True),
        norm2=(np.ones(D), np.zeros(D)),
        moe=moe_weights(rng, D, D_out=D),
    )
    x, weights = tensors((normal(rng, 2, 5, D), weights), lambda a: torch.tensor(a * 0.5, dtype=dtype))
    logits_v, logits_o = reference.switchhead(x, weights.attention, top_k=2, position=position, return_logits=True)[1]
    assert logits_v.dtype == logits_o.dtype == torch.float32
    experts = [reference.select(logits, 2) for logits in (logits_v, logits_o)]
    y = reference.switchhead(x, weights.attention, top_k=2, position=position, experts=experts)
    assert y.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        again = reference.switchhead(x, weights.attention, top_k=2, position=position, experts=experts)
    assert torch.equal(again, y)
    truth = reference.switchhead(
        x.double(), tensors(weights.attention, torch.Tensor.double), top_k=2, position=position, experts=experts
    )
    error = (y.double() - truth).abs().max() / truth.abs().max()
    assert 0 < error < 8 * torch.finfo(dtype).eps

    y, logits = reference.sigma_moe(x, weights.moe, top_k=2)
    assert y.dtype == dtype and logits.dtype == torch.float32
    y, logits = reference.switchall(x, weights, top_k=2, moe_top_k=2, position=position)
    assert y.dtype == dtype and logits.dtype == torch.float32


def test_public_names():
    assert all(hasattr(reference, name) for name in reference.__all__)
    for name in reference.__all__:
        assert not name.endswith("_numpy") or hasattr(reference, name.removesuffix("_numpy"))


@pytest.mark.gpu
@pytest.mark.parametrize("position", [RoPE(), XL()], ids=["rope", "xl"])
def test_twins_run_on_the_device_of_their_inputs(rng, position):
    D = 8
    weights = SwitchAllWeights(
        norm1=(np.ones(D), np.zeros(D)),
        attention=head_weights(rng, D, pos_to_pk=True),
        norm2=(np.ones(D), np.zeros(D)),
        moe=moe_weights(rng, D, D_out=D),
    )
    options = {"top_k": 2, "moe_top_k": 2, "position": position, "training": True, "seed": 3, "window": 4}
    options |= {f"{name}dropout": 0.3 for name in ("", "attention_", "moe_", "expert_", "moe_expert_")}
    results = []
    for where in ("cpu", "cuda"):
        options |= {"cu_seqlens": torch.tensor([0, 4, 9], device=where)}
        x, on = tensors((normal(np.random.default_rng(1), 1, 9, D), weights), lambda a, to=where: torch.tensor(a, device=to))
        y, logits = reference.switchall(x.requires_grad_(), on, **options)
        y.sum().backward()
        assert y.device.type == logits.device.type == where
        results.append([a.detach().cpu() for a in (y, logits, x.grad, reference.entropy_regularizer(logits))])
    torch.testing.assert_close(*results)
