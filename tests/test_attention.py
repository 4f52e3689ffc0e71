import pytest
import torch
from cases import ALL_DTYPES, CPU_DTYPES, check, randn, refused, run
from hypothesis import given
from hypothesis import strategies as st

import reference
from triton_moe import functional as F
from triton_moe import testing
from triton_moe.functional import _attention
from triton_moe.kernels.position import rope_rotate, rope_rotate_


def padding(B, S, device, kind):
    mask = torch.zeros(B, S, dtype=torch.bool, device=device)
    if kind == "left":
        mask[-1, : S // 3 + 1] = True
    elif kind == "right":
        mask[-1, S - S // 3 - 1 :] = True
    elif kind == "all of one":
        mask[-1] = True
    else:
        mask = torch.rand(B, S, generator=torch.Generator().manual_seed(3)).to(device) < 0.4
    return mask


def inputs(B, T, S, H, Hkv, P, Pv, dtype, device):
    return {
        "q": randn(B, T, H, P, device=device, dtype=dtype),
        "k": randn(B, S, Hkv, P, device=device, dtype=dtype, seed=1),
        "v": randn(B, S, Hkv, Pv, device=device, dtype=dtype, seed=2),
    }


def check_attention(B, T, S, H, Hkv, P, Pv, dtype, device, repeats=1, at_size=False, own=None, **options):
    """own: options that the reference does not have."""
    own = own or {}
    tensors = inputs(B, T, S, H, Hkv, P, Pv, dtype, device)
    # d q vanishes where a query sees a single key: it is judged by the scale of d k
    scales = {"dq": 1.0, "dk": 1.0} if T * S < 9 else {}
    check(
        lambda **x: F.attention(**x, **options, **own, return_lse=True),
        lambda **x: reference.attention(**x, **options, return_lse=True),
        tensors,
        outputs=("o", "lse"),
        repeats=repeats,
        at_size=at_size,
        scales=scales,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, S, H, Hkv, P, Pv, options",
    [
        (1, 1, 1, 1, 1, 19, 19, {}),
        (2, 17, 17, 2, 2, 41, 41, {}),
        (1, 13, 13, 4, 2, 19, 7, {"causal": False}),
        (2, 9, 21, 3, 1, 16, 16, {"window": 5}),
        (1, 21, 21, 1, 1, 8, 33, {"window": 4, "causal": False}),
        (1, 7, 5, 2, 1, 8, 8, {"causal": False, "scale": 0.3}),
        (1, 12, 12, 2, 2, 19, 19, {"position": F.RoPE(1.0, 100.0)}),
        (1, 5, 12, 2, 2, 12, 12, {"position": F.RoPE()}),
    ],
)
def test_values_and_gradients(B, T, S, H, Hkv, P, Pv, options, dtype, device):
    check_attention(B, T, S, H, Hkv, P, Pv, dtype, device, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, S, H, Hkv, P, Pv, options",
    [
        (1, 1, 1, 1, 1, 2, 19, {"position": F.RoPE(1.0)}),
        (2, 1, 9, 4, 2, 16, 16, {}),
        (2, 9, 21, 3, 1, 19, 7, {"window": 5, "position": F.RoPE(1.0, 100.0)}),
        (1, 17, 17, 2, 2, 100, 100, {}),
        (1, 8, 8, 2, 2, 12, 12, {"causal": False, "scale": -0.3, "position": F.RoPE(0.8)}),
        (1, 5, 6, 1, 1, 41, 12, {"position": F.RoPE(0.0)}),
    ],
    ids=str,
)
def test_rotated_on_load(B, T, S, H, Hkv, P, Pv, options, dtype, device):
    check_attention(B, T, S, H, Hkv, P, Pv, dtype, device, own={"recompute": True}, **{"position": F.RoPE()} | options)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["left", "scattered", "packed"])
def test_rotated_on_load_with_masks(kind, device):
    mask = {"cu_seqlens": torch.tensor([0, 1, 8, 8, 19], dtype=torch.int32, device=device)}
    if kind != "packed":
        mask = {"key_padding_mask": padding(1, 19, device, kind)}
    for options in ({}, {"causal": False, "window": 7}):
        options |= {"position": F.RoPE(), "own": {"recompute": True}}
        check_attention(1, 19, 19, 4, 2, 20, 8, torch.float32, device, **mask, **options)


@pytest.mark.parametrize("recompute", [True, False])
def test_what_a_rotation_keeps_for_the_backward_pass(recompute, device):
    """On load, of queries and keys the caller's own memory; else a copy of each."""
    q, k, v = x = inputs(2, 9, 12, 4, 2, 16, 16, torch.float32, device).values()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        o, lse = F.attention(*x, position=F.RoPE(), recompute=recompute, return_lse=True)
    known = {t.data_ptr() for t in (q, k, v, o, lse)}
    assert (known <= set(kept)) == recompute and {v.data_ptr(), o.data_ptr(), lse.data_ptr()} <= set(kept)
    assert sum(t.numel() for p, t in kept.items() if p not in known) == (0 if recompute else q.numel() + k.numel())


def test_few_queries_without_a_gradient_are_rotated_on_load(device, monkeypatch):
    q, k, v = (t.detach() for t in inputs(1, 7, 12, 2, 2, 16, 16, torch.float32, device).values())
    copies, widths = [], iter(range(1, 17))
    monkeypatch.setattr(_attention, "rope_rotate", lambda *a: copies.append(a) or rope_rotate(*a))

    def rotated_copies(q, k, v, few_keys, few_queries, many_heads, **options):
        copies.clear()
        v = v[..., : next(widths)]  # of another shape at each call: none is replayed
        for name, value in (("FEW_KEYS", few_keys), ("FEW_QUERIES", few_queries), ("MANY_HEADS", many_heads)):
            monkeypatch.setattr(_attention, name, value)
        o = F.attention(q, k, v, position=F.RoPE(), **options)
        torch.testing.assert_close(o, F.attention(q, k, v, position=F.RoPE(), recompute=True))
        return len(copies)

    assert rotated_copies(q, k, v, 12, 0, 9) == rotated_copies(q, k, v, 0, 7, 2) == 0
    assert rotated_copies(q, k, v, 11, 6, 2) == rotated_copies(q, k, v, 11, 7, 3) == 2
    assert rotated_copies(q, k, v, 11, 6, 3, recompute=True) == 0
    assert rotated_copies(q, k[:, :, :1], v[:, :, :1], 12, 7, 1) == 2  # grouped heads would rotate a key twice
    q.requires_grad_()
    assert rotated_copies(q, k, v, 12, 7, 1) == 2
    with torch.no_grad():
        assert rotated_copies(q, k, v, 12, 7, 1) == 0


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["left", "right", "scattered", "all of one"])
@pytest.mark.parametrize("causal", [True, False])
def test_key_padding(kind, causal, device):
    check_attention(2, 11, 11, 2, 2, 8, 8, torch.float32, device, causal=causal, key_padding_mask=padding(2, 11, device, kind))


@pytest.mark.smoke
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 3}, {"position": F.RoPE()}], ids=str)
def test_packed_sequences(options, device):
    cu_seqlens = torch.tensor([0, 1, 8, 8, 19], dtype=torch.int32, device=device)
    check_attention(1, 19, 19, 2, 2, 8, 8, torch.float32, device, cu_seqlens=cu_seqlens, **options)


def test_packed_equals_apart(device):
    x = inputs(1, 19, 19, 2, 2, 8, 8, torch.float32, device)
    packed = F.attention(**x, cu_seqlens=torch.tensor([0, 8, 19], dtype=torch.int32, device=device))
    apart = [F.attention(**{n: t[:, part] for n, t in x.items()}) for part in (slice(0, 8), slice(8, 19))]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


@pytest.mark.parametrize("values", [[-5, 100], [7, 3, 900], [0, 0], [2**31 - 1, -(2**31)]], ids=str)
def test_malformed_packing_stays_inside_the_tensors(values, device):
    x = inputs(1, 9, 9, 1, 1, 8, 8, torch.float32, device)
    o = F.attention(**x, cu_seqlens=torch.tensor(values, dtype=torch.int32, device=device))
    o.sum().backward()
    assert o.isfinite().all() and all(t.grad.isfinite().all() for t in x.values())


@pytest.mark.smoke
@pytest.mark.parametrize(
    "T, S, D, biases, options",
    [(9, 9, 12, "", {}), (5, 11, 7, "uv", {}), (6, 6, 8, "v", {"causal": False}), (9, 9, 6, "u", {"window": 4})],
)
def test_transformer_xl(T, S, D, biases, options, device):
    H, P = 2, 10
    x = inputs(1, T, S, H, H, P, P, torch.float32, device)
    x["position"] = F.XL(
        randn(H * P, D, device=device, scale=D**-0.5),
        randn(H, P, device=device, seed=5) if "u" in biases else None,
        randn(H, P, device=device, seed=6) if "v" in biases else None,
    )
    check(lambda **x: F.attention(**x, **options), lambda **x: reference.attention(**x, **options), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, S, H, Hkv, P, Pv, options",
    [
        (2, 1024, 1024, 4, 4, 128, 128, {}),
        (2, 1000, 1000, 2, 2, 64, 64, {"position": F.RoPE()}),
        (1, 777, 1500, 4, 2, 100, 100, {}),
        (2, 513, 513, 2, 1, 76, 76, {"window": 100}),
        (1, 600, 600, 2, 2, 132, 41, {"causal": False}),
        (1, 700, 700, 2, 2, 256, 256, {"window": 65, "causal": False}),
        (1, 511, 511, 3, 3, 41, 112, {"position": F.RoPE(1.0)}),
        (64, 1, 333, 2, 2, 82, 82, {}),
    ],
)
def test_values_and_gradients_at_size(B, T, S, H, Hkv, P, Pv, options, dtype, device):
    check_attention(B, T, S, H, Hkv, P, Pv, dtype, device, repeats=3, at_size=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "B, T, S, H, Hkv, P, fraction, options",
    [
        (2, 1024, 1024, 4, 4, 128, 1.0, {}),
        (1, 513, 777, 4, 2, 100, 0.5, {"window": 100}),
        (2, 500, 500, 2, 2, 76, 1.0, {"causal": False}),
        (1, 600, 600, 2, 2, 132, 0.5, {}),
        (1, 300, 300, 2, 2, 256, 0.55, {}),  # of parts of 128 channels each
        (64, 1, 333, 2, 2, 82, 0.5, {}),
    ],
)
def test_rotated_on_load_at_size(B, T, S, H, Hkv, P, fraction, options, dtype, device):
    options = {"position": F.RoPE(fraction), "own": {"recompute": True}} | options
    check_attention(B, T, S, H, Hkv, P, P, dtype, device, repeats=3, at_size=True, **options)
    mask = padding(2, 300, device, "scattered")
    check_attention(2, 300, 300, H, Hkv, P, 64, dtype, device, at_size=True, **options | {"key_padding_mask": mask})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["left", "right", "scattered", "all of one"])
def test_masks_at_size(kind, dtype, device):
    mask = padding(2, 500, device, kind)
    check_attention(2, 500, 500, 2, 2, 100, 100, dtype, device, at_size=True, key_padding_mask=mask)
    cu_seqlens = torch.tensor([0, 1, 300, 300, 500], dtype=torch.int32, device=device)
    check_attention(1, 500, 500, 2, 2, 100, 100, dtype, device, at_size=True, cu_seqlens=cu_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("T, S, H, P, D", [(256, 512, 2, 76, 412), (512, 512, 4, 112, 1024)])
def test_transformer_xl_at_size(T, S, H, P, D, dtype, device):
    x = inputs(1, T, S, H, H, P, P, dtype, device)
    x["position"] = F.XL(
        randn(H * P, D, device=device, dtype=dtype, scale=D**-0.5),
        randn(H, P, device=device, dtype=dtype, seed=5),
        randn(H, P, device=device, dtype=dtype, seed=6),
    )
    check(F.attention, reference.attention, x, repeats=2, at_size=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_heads_before_tokens_in_memory_at_size(dtype, device):
    x = {n: t.detach().transpose(1, 2).requires_grad_() for n, t in inputs(2, 4, 4, 700, 700, 100, 100, dtype, device).items()}
    check(F.attention, reference.attention, x, at_size=True)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(device):
    """The end of the last head, 2**31 elements on, is the attention of those tokens alone: random numbers from elsewhere would
    differ by more than a unit in the last place, which another compilation (for one head) may."""
    T, H, P, window, end = 131072, 130, 128, 96, 1024
    if torch.cuda.get_device_properties(device).total_memory < 60 << 30:
        pytest.skip("needs 60 GiB")
    q, k, v = (torch.randn(1, T, H, P, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    do = torch.randn_like(q)
    last = [x.detach()[:, -end:, -1:].contiguous().requires_grad_() for x in (q, k, v)]
    o, o_last = F.attention(q, k, v, window=window), F.attention(*last, window=window)
    bounds = {"rtol": 2**-7, "atol": 2**-9}
    torch.testing.assert_close(o[:, window - end :, -1:], o_last[:, window:], **bounds)
    gradients, expected = torch.autograd.grad(o, [q, k, v], do), torch.autograd.grad(o_last, last, do[:, -end:, -1:])
    for d, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(d[:, window - end : -window, -1:], e[:, window:-window], **bounds)

    rotated = q.detach()
    rope_rotate_(rotated, 64, 10000.0, 0, False)
    torch.testing.assert_close(rotated[:, -end:, -1:], rope_rotate(last[0].detach(), 64, 10000.0, T - end, False), **bounds)


@given(data=st.data(), T=st.integers(1, 24), P=st.integers(1, 20), causal=st.booleans())
def test_causality_and_linearity(data, T, P, causal, device):
    x = {n: data.draw(testing.tensors((1, T, 2, P), device=device)) for n in ("q", "k", "v")}
    o, lse = F.attention(**x, causal=causal, return_lse=True)
    ones = F.attention(x["q"], x["k"], torch.ones_like(x["v"]), causal=causal)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    doubled = F.attention(x["q"], x["k"], 2 * x["v"], causal=causal)
    assert torch.equal(doubled, 2 * o)
    if causal:
        t = data.draw(st.integers(0, T - 1))
        later = {n: torch.cat([z[:, : t + 1], torch.full_like(z[:, t + 1 :], 9.0)], 1) for n, z in x.items()}
        o2, lse2 = F.attention(**later, return_lse=True)
        assert torch.equal(o[:, : t + 1], o2[:, : t + 1]) and torch.equal(lse[..., : t + 1], lse2[..., : t + 1])


@given(data=st.data(), cut=st.integers(1, 10))
def test_parts_merge_by_log_sum_exp(data, cut, device):
    x = {n: data.draw(testing.tensors((1, 11, 1, 8), device=device)) for n in ("q", "k", "v")}
    whole = F.attention(**x, causal=False)
    parts = [
        F.attention(x["q"], x["k"][:, s], x["v"][:, s], causal=False, return_lse=True) for s in (slice(0, cut), slice(cut, 11))
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)  # [2, B, H, T]
    merged = sum(o * w.transpose(1, 2)[..., None] for (o, _), w in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)


@given(data=st.data())
def test_strides_do_not_matter(data, device):
    x = inputs(2, 6, 6, 2, 2, 8, 8, torch.float32, device)
    o = F.attention(**x)
    assert torch.equal(o, F.attention(**{n: data.draw(testing.strided(t)) for n, t in x.items()}))


@pytest.mark.parametrize("position", [None, F.RoPE()], ids=str)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_expanded_keys_and_values(dtype, position, device):
    q, k, v = inputs(1, 6, 1, 2, 1, 8, 8, dtype, device).values()
    expanded, contiguous = (
        run(lambda q, k, v: F.attention(q, k, v, position=position, return_lse=True), (q, *keys))
        for keys in ([t.detach().expand(1, 6, 2, 8).requires_grad_() for t in (k, v)], [t.repeat(1, 6, 2, 1) for t in (k, v)])
    )
    for a, b in zip(expanded, contiguous, strict=True):
        assert torch.equal(a, b)


def test_nan_reaches_those_who_see_it_and_nobody_else(device):
    x = {n: t.detach() for n, t in inputs(1, 9, 9, 2, 1, 8, 8, torch.float32, device).items()}
    o, lse = F.attention(**x, return_lse=True)
    tokens = torch.arange(9, device=device)
    for name, hit in (("q", tokens == 4), ("k", tokens >= 4)):
        spoiled = x[name].clone()
        spoiled[0, 4] = torch.nan
        o2, lse2 = F.attention(**x | {name: spoiled}, return_lse=True)
        assert o2[:, hit].isnan().all() and lse2[..., hit].isnan().all()
        assert torch.equal(o2[:, ~hit], o[:, ~hit]) and torch.equal(lse2[..., ~hit], lse[..., ~hit])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_large_scores_give_no_nan(dtype, device):
    x = inputs(1, 20, 20, 1, 1, 16, 16, dtype, device)
    o, lse = F.attention(1e4 * x["q"], x["k"], x["v"], return_lse=True)
    o.sum().backward()
    assert o.isfinite().all() and lse.isfinite().all() and x["v"].grad.isfinite().all() and x["q"].grad.isfinite().all()


def test_empty(device):
    x = inputs(1, 0, 5, 1, 1, 8, 8, torch.float32, device)
    o = F.attention(**x)
    o.sum().backward()
    assert o.shape == (1, 0, 1, 8) and not x["k"].grad.any()


ZEROS = torch.zeros(2, 6, 4, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(2, 6, 32)}, ValueError, r"q must have shape \[\*, \*, \*, \*\], got \[2, 6, 32\]"),
        ({"k": torch.zeros(2, 6, 4, 9)}, ValueError, r"k must have shape \[2, \*, \*, 8\]"),
        ({"k": torch.zeros(2, 5, 4, 8), "v": torch.zeros(2, 5, 4, 8)}, ValueError, "the 5 keys must be at least the 6 queries"),
        (
            {"k": torch.zeros(2, 6, 3, 8), "v": torch.zeros(2, 6, 3, 8)},
            ValueError,
            "the 4 heads of q must be a multiple of the 3",
        ),
        ({"v": torch.zeros(2, 6, 4, 0)}, ValueError, "the head width of v must be between 1 and 256, got 0"),
        ({"window": 0}, ValueError, "window must be >= 1, got 0"),
        ({"position": "rope"}, TypeError, "position must be RoPE, XL or None, got str"),
        ({"position": F.XL()}, ValueError, "position.weight must be"),
        ({"position": F.RoPE(1.5)}, ValueError, "position.fraction must be between 0 and 1, got 1.5"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, r"key_padding_mask must have shape \[2, 6\]"),
        ({"key_padding_mask": torch.zeros(2, 6)}, TypeError, "key_padding_mask must have dtype torch.bool"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "cu_seqlens needs one packed row"),
        ({"causal": 1}, TypeError, "causal must be a bool"),
        ({"recompute": 1}, TypeError, "recompute must be a bool"),
        ({"v": ZEROS.half()}, TypeError, "v has dtype torch.float16"),
        ({"q": ZEROS[..., :0], "k": ZEROS[..., :0]}, ValueError, "the head width of q must be between 1 and 256, got 0"),
        ({"q": ZEROS.to("meta")}, ValueError, "q is on meta"),
        ({"scale": float("nan")}, ValueError, "scale must be"),
        ({"scale": float("inf")}, ValueError, "scale must be"),
        ({"scale": "1"}, TypeError, "scale must be a float"),
    ],
)
def test_bad_input(change, error, message, device):
    arguments = {"q": ZEROS, "k": ZEROS, "v": ZEROS} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in arguments.items()}
    with refused(error, message):
        F.attention(**arguments)
