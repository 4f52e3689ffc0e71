"""The launchers of attention/ and position.py against plain PyTorch formulas in float64."""

import math

import pytest
import torch
import triton
import triton.language as tl
from cases import randn, run

from triton_moe import functional as F
from triton_moe.kernels.attention import CONFIGS, attention_backward, attention_forward, configs, tile_width, tiles
from triton_moe.kernels.common import input_precision, launch
from triton_moe.kernels.position import rope_rotate, rope_table, turn
from triton_moe.kernels.xl import xl_query, xl_query_backward_
from triton_moe.testing import assert_close

DTYPES = [torch.float32, torch.float16]


def visible_keys(T, S, causal, window, key_padding_mask, cu_seqlens, device):
    """[1 or B, 1, T, S], True where the query sees the key."""
    i = torch.arange(T, device=device)[:, None] + S - T
    j = torch.arange(S, device=device)[None, :]
    visible = torch.ones(T, S, dtype=torch.bool, device=device)
    if causal:
        visible &= j <= i
    if window:
        visible &= (i - j).abs() < window
    if cu_seqlens is not None:
        sequence = (j >= cu_seqlens[:, None]).sum(0)  # 0 before the first sequence, n + 1 after the last
        visible &= (sequence == sequence[:, None]) & (sequence > 0) & (sequence < len(cu_seqlens))
    visible = visible[None, None]
    return visible if key_padding_mask is None else visible & ~key_padding_mask[:, None, None, :]


def formula(q, k, v, q_pos, k_pos, visible, scale):
    """The attention formula, one operation after the other in the dtype of its inputs."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bthp,bshp->bhts", q, k)
    if q_pos is not None:
        scores = scores + torch.einsum("bthf,sf->bhts", q_pos, k_pos)
    some = visible.any(-1, keepdim=True)
    scores = (scores * scale).masked_fill(~visible, -math.inf).masked_fill(~some, 0.0)
    p = scores.softmax(-1).masked_fill(~some, 0.0)
    lse = scores.float().logsumexp(-1) if q.dtype != torch.float64 else scores.logsumexp(-1)
    return torch.einsum("bhts,bshp->bthp", p, v), lse.masked_fill(~some[..., 0], -math.inf)


def check(
    device,
    dtype,
    *,
    B=2,
    T=21,
    S=None,
    H=2,
    Hkv=None,
    P=16,
    Pv=None,
    F=0,
    causal=True,
    window=0,
    padding=None,
    cu_seqlens=None,
    strided=False,
    with_dlse=True,
    scale=0.3,
):
    """Compare outputs and gradients with the formula; return the launchers' results."""
    S, Hkv, Pv = S or T, Hkv or H, Pv or P
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        if strided:  # other axis orders, and a last axis that is not contiguous
            x = torch.randn(shape[2], shape[0], shape[3] * 2, shape[1], generator=generator)
            return x[:, :, ::2].permute(1, 3, 0, 2).to(device, dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = draw(B, T, H, P), draw(B, S, Hkv, P), draw(B, S, Hkv, Pv)
    do, dlse = draw(B, T, H, Pv), torch.randn(B, H, T, generator=generator).to(device) if with_dlse else None
    q_pos, k_pos = (None, None)
    if F:
        q_pos = draw(B, T, H, F)
        k_pos = torch.randn(S, F, generator=generator).to(device, dtype)
    visible = visible_keys(T, S, causal, window, padding, cu_seqlens, device)

    def run(dtype):
        leaves = [None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in (q, k, v, q_pos)]
        o, lse = formula(*leaves, None if k_pos is None else k_pos.to(dtype), visible, scale)
        loss = (o * do.to(dtype)).sum().double()
        if dlse is not None:
            loss = loss + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
        return o, lse, *torch.autograd.grad(loss, [x for x in leaves if x is not None])

    truth, twin = run(torch.float64), run(dtype)
    precision = input_precision(dtype)
    arguments = (causal, window, scale, precision)
    o, lse = attention_forward(q, k, v, q_pos, k_pos, padding, cu_seqlens, *arguments)
    gradients = attention_backward(do, dlse, q, k, v, q_pos, k_pos, padding, cu_seqlens, o, lse, *arguments)
    assert o.dtype == dtype and lse.dtype == torch.float32
    if q_pos is None:
        assert gradients[3].numel() == 0
    names = ("o", "lse", "dq", "dk", "dv", "dq_pos")
    for name, actual, t, w in zip(names, (o, lse, *gradients), truth, twin, strict=False):
        assert actual.is_contiguous()
        # The gradient of the scores is a difference; where it vanishes (a single key) its terms set the scale.
        terms = None if t.abs().max() > 1e-6 else scale * math.sqrt(Pv)
        # Tiny float32 tensors of long sums; at realistic size test_attention.py grants nothing.
        assert_close(actual, t.double(), w, name=name, scale=terms, ulps=128.0)
    return o, lse, *gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(causal=False),
        dict(with_dlse=False),
        dict(S=33),
        dict(S=33, causal=False),
        dict(T=33, S=21, causal=False),
        dict(T=1),
        dict(T=1, S=9),
        dict(B=1, T=300, P=8, H=1),
        dict(window=5),
        dict(window=1),
        dict(window=5, causal=False),
        dict(window=5, S=30),
        dict(window=100),
        dict(H=6, Hkv=2),
        dict(H=4, Hkv=1, S=30, window=7),
        dict(P=19, Pv=41),
        dict(P=41, Pv=19, causal=False),
        dict(P=1, Pv=1),
        dict(P=256, Pv=132, T=9),
        dict(strided=True),
        dict(strided=True, H=4, Hkv=2, P=19, Pv=7),
        dict(F=12),
        dict(F=300, S=30, T=5, scale=0.04),
        dict(F=600, S=30, T=5, scale=0.03),
        dict(F=20, H=4, Hkv=2, window=6, strided=True),
    ],
    ids=lambda case: "-".join(f"{k}{v}" for k, v in case.items()) or "plain",
)
def test_attention(device, dtype, case):
    check(device, dtype, **case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_position_channels_some_at_a_time(dtype, device, monkeypatch):
    """Too many of them to be held whole: also in half precision, and not a multiple of what is taken at a time."""
    monkeypatch.setattr(configs, "WIDEST_POSITIONS", 8)
    monkeypatch.setattr(configs, "POSITION_CHUNK", 16)
    check(device, dtype, T=40, S=50, H=4, Hkv=2, P=8, F=42, window=30)


@pytest.mark.smoke
def test_attention_bfloat16(device):
    check(device, torch.bfloat16, T=19, S=25, H=4, Hkv=2, P=41, F=14, window=9)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "P", sorted({20, 41, 100} | {widest for table in CONFIGS.values() for widest, _ in table.get("hopper", ())})
)
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(causal=False, S=391, with_dlse=False),
        dict(window=70, H=4),
        dict(B=1, cu_seqlens=[0, 5, 200, 333]),
        dict(padding=True),
        dict(Pv=72, S=700),
    ],
    ids=str,
)
def test_every_configuration(device, P, case):
    """Each width class, with and without what takes registers."""
    case = {"T": 333, "H": 2, "Hkv": 2, "B": 2} | case
    if "padding" in case:
        case["padding"] = torch.arange(333, device=device)[None, :] >= torch.tensor([333, 150], device=device)[:, None]
    if "cu_seqlens" in case:
        case["cu_seqlens"] = torch.tensor(case["cu_seqlens"], dtype=torch.int32, device=device)
    once, again = (check(device, torch.bfloat16, P=P, scale=P**-0.5, **case) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("wide", sorted({widest for table in CONFIGS.values() for widest, _ in table.get("hopper_xl", ())}))
def test_every_configuration_with_positions(device, wide):
    """The widest heads and position channels that each tile serves."""
    P, F = next((P, F) for P in (64, 128, 256) if (F := (wide - 3 * P) // 32 * 16) <= configs.WIDEST_POSITIONS)
    case = dict(T=333, S=400, H=2, Hkv=2, B=2, P=P, F=F, scale=(P + F) ** -0.5)
    once, again = (check(device, torch.bfloat16, **case) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scale_of_any_sign(device, scale):
    for dtype in DTYPES:
        check(device, dtype, scale=scale, window=5, with_dlse=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_key_padding(device, dtype, causal):
    padding = torch.zeros(3, 20, dtype=torch.bool, device=device)
    padding[0, 13:] = True
    padding[1, :4] = True  # causal: the first queries see nothing
    padding[2] = True
    o, lse, dq, dk, dv, _ = check(device, dtype, B=3, T=17, S=20, padding=padding, causal=causal)
    for x in (o[2], dq[2], dk[2], dv[2], dk[0, 13:], dv[0, 13:]):
        assert (x == 0).all()
    assert (lse[2] == -math.inf).all()
    assert bool((lse[1, :, 0] == -math.inf).all()) == causal


def test_padding_is_not_read(device):
    """NaN in removed keys and values, and in the gradient of lse = -inf, goes nowhere."""
    q, k, v = (torch.randn(2, 6, 1, 8, device=device) for _ in range(3))
    padding = torch.zeros(2, 6, dtype=torch.bool, device=device)
    padding[:, :3] = True
    k[:, :3] = v[:, :3] = math.nan
    arguments = (None, None, padding, None)
    o, lse = attention_forward(q, k, v, *arguments, True, 0, 1.0, "ieee")
    dlse = torch.where(lse == -math.inf, math.nan, 1.0)
    gradients = attention_backward(torch.ones_like(o), dlse, q, k, v, *arguments, o, lse, True, 0, 1.0, "ieee")
    assert (lse[..., :3] == -math.inf).all() and lse[..., 3:].isfinite().all()
    for x in (o, *gradients):
        assert x.isfinite().all()
    assert (o[:, :3] == 0).all() and (gradients[0][:, :3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 3])
def test_packed(device, dtype, causal, window):
    for entries in ([0, 7, 7, 8, 21], [0, 21], [3, 10, 18]):  # an empty sequence; one; tokens outside all of them
        cu_seqlens = torch.tensor(entries, dtype=torch.int32, device=device)
        check(device, dtype, B=1, H=4, Hkv=2, causal=causal, window=window, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("entries", [[0, 500], [9, 3, 40, -7], [-5, 12], [2**31 - 1, -(2**31)], [30, 20, 10, 0], [4]])
def test_packed_malformed(device, entries):
    """No access leaves the tensors: what surrounds them is poison, and comes neither in nor to harm."""
    T = 21
    surroundings = [torch.full((3 * T, 2, 8), math.nan, device=device) for _ in range(3)]
    q, k, v = (x[None, T : 2 * T].copy_(torch.randn(1, T, 2, 8)) for x in surroundings)
    cu_seqlens = torch.tensor(entries, dtype=torch.int32, device=device)
    for causal in (True, False):
        o, lse = attention_forward(q, k, v, None, None, None, cu_seqlens, causal, 0, 1.0, "ieee")
        assert o.isfinite().all()
        arguments = (None, None, None, cu_seqlens, o, lse, causal, 0, 1.0, "ieee")
        gradients = attention_backward(o, lse.nan_to_num(), q, k, v, *arguments)
        for g in gradients:
            assert g.isfinite().all()


def test_empty(device):
    for B, T, S in ((0, 4, 4), (2, 0, 4), (2, 0, 0), (2, 3, 0)):
        q, k = torch.randn(B, T, 2, 8, device=device), torch.randn(B, S, 2, 8, device=device)
        o, lse = attention_forward(q, k, k, None, None, None, None, False, 0, 1.0, "ieee")
        gradients = attention_backward(o, None, q, k, k, None, None, None, None, o, lse, False, 0, 1.0, "ieee")
        assert o.shape == q.shape and (o == 0).all() and (lse == -math.inf).all()
        assert [g.shape for g in gradients[:3]] == [q.shape, k.shape, k.shape]
        assert all((g == 0).all() for g in gradients[:3])


def test_large_scores(device):
    """Scores far beyond exp's range: the pivot keeps every power at most 1."""
    q = torch.randn(1, 9, 1, 16, device=device) * 100
    o, lse = attention_forward(q, q, q, None, None, None, None, True, 0, 1.0, "ieee")
    truth, _ = formula(*[q.double()] * 3, None, None, visible_keys(9, 9, True, 0, None, None, device), 1.0)
    torch.testing.assert_close(o.double(), truth, rtol=1e-4, atol=1e-3)
    assert lse.isfinite().all()


def test_compiled_by_dynamo(device):
    """The launchers are opaque operators: their fakes agree with them, and they trace without a graph break."""
    q, k = torch.randn(2, 5, 4, 8, device=device), torch.randn(2, 7, 2, 8, device=device)
    v, weight = torch.randn(2, 7, 2, 3, device=device), torch.randn(32, 6, device=device)

    def both(q, k, v):
        q = rope_rotate(q, 4, 1e4, 2, False)
        q_pos, k_pos, narrow = xl_query(q, weight, 7, 0, True, "ieee")
        o, lse = attention_forward(q, k, v, q_pos, k_pos, None, None, True, 0, 1.0, "ieee")
        grads = attention_backward(o, lse, q, k, v, q_pos, k_pos, None, None, o, lse, True, 0, 1.0, "ieee")
        dq = grads[0].clone()
        return o, lse, *grads, xl_query_backward_(grads[3], dq, q, narrow, 6, 7, 0, True, "ieee"), dq

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
    for a, b in zip(compiled, both(q, k, v), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def rope_formula(x, n, base, offset):
    i = offset + torch.arange(x.shape[1], device=x.device, dtype=torch.float64)[:, None, None]
    angle = i * base ** (-2.0 * torch.arange(n // 2, device=x.device, dtype=torch.float64) / max(n, 1))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2, rest = x.split([n // 2, n // 2, x.shape[-1] - n], -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], -1)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("n, P, offset", [(8, 16, 0), (40, 82, 3), (20, 41, 100_000), (16, 16, 7), (0, 5, 1)])
def test_rope(device, dtype, n, P, offset):
    x = torch.randn(3, P, 2, 9, device=device).to(dtype).permute(2, 3, 0, 1)  # [B, T, H, P]
    leaf = x.double().requires_grad_()
    truth = rope_formula(leaf, n, 500.0, offset)
    twin = rope_formula(x, n, 500.0, offset)
    assert_close(rope_rotate(x, n, 500.0, offset, False), truth, twin)
    dy = torch.randn(2, 9, 3, P, device=device).to(dtype)
    (dx,) = torch.autograd.grad(truth, leaf, dy.double())
    leaf = x.detach().requires_grad_()
    (dx_twin,) = torch.autograd.grad(rope_formula(leaf, n, 500.0, offset), leaf, dy)
    assert_close(rope_rotate(dy, n, 500.0, offset, True), dx, dx_twin)


@triton.jit
def _rotated_rows_kernel(
    x_ptr, table_ptr, y_ptr, T, position, stride_t: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, CHUNKS: tl.constexpr,
    BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As the kernels of attention load, rotate and store rows of a single head."""
    first = tl.program_id(0) * BLOCK
    mask = first + tl.arange(0, BLOCK) < T
    x = tiles._load_rows(x_ptr, 0 * first, 0 * first, first, 0, stride_t, 0, mask, P, CHUNKS, BLOCK, HALF)
    x = turn(x, table_ptr, first + position, mask, CHUNKS[0], BLOCK, BACK)
    tiles._store_rows(y_ptr, x, 0 * first, 0 * first, first, 0, P, 0, mask, P, CHUNKS, BLOCK, HALF)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, P, offset", [(16, 16, 0), (8, 16, 3), (50, 100, 2), (38, 76, 9), (2, 5, 7), (64, 128, 1)])
def test_a_tile_is_rotated_as_a_copy_is(device, dtype, n, P, offset):
    """Bit by bit in the interpreter; compilers may round the angles differently. And back."""
    T, chunks = 21, configs._chunks(P, dtype, n)
    x = torch.randn(T, 2 * P, device=device).to(dtype)[:, :P]
    table = rope_table(n, 500.0, T + offset, chunks[0], x, False)
    for back in (False, True):
        y = torch.full((T, P), math.nan, dtype=dtype, device=device)
        meta = dict(P=P, HALF=n // 2, CHUNKS=chunks, BACK=back, BLOCK=16)
        launch(_rotated_rows_kernel, (2,), x, table, y, T, offset, 2 * P, **meta)
        copy, eps = rope_rotate(x[None, :, None], n, 500.0, offset, back)[0, :, 0], torch.finfo(dtype).eps
        torch.testing.assert_close(y, copy, rtol=eps, atol=8 * torch.finfo(torch.float32).eps)
        assert torch.equal(y, copy) or device == "cuda"


@pytest.mark.parametrize("P, wide", [(8, 16), (41, 48), (64, 64), (76, 80), (100, 128), (112, 128), (132, 144), (200, 256)])
def test_heads_are_stored_as_wide_as_their_tiles(P, wide):
    assert tile_width(P, torch.bfloat16) == wide and tile_width(P, torch.float32) == P
    assert tile_width(wide, torch.float16) == wide


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2)])
def test_sections_of_heads_change_no_bit(heads, kv_heads, device, monkeypatch):
    """NOTE [Order]: some heads at a time, also where their number does not divide that of all."""
    for name, rungs in CONFIGS.items():  # several tiles a head, in the interpreter too
        small = {key: min(value, 32) if key in ("BLOCK_M", "BLOCK_N") else value for key, value in rungs["interpret"].items()}
        monkeypatch.setitem(CONFIGS, name, rungs | {"interpret": small})
    q, k, v = (randn(3, 70, n, 16, device=device, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    monkeypatch.setattr(configs, "SECTION_BYTES", 1 << 30)
    whole = run(lambda *t: F.attention(*t), (q, k, v))
    monkeypatch.setattr(configs, "SECTION_BYTES", 2 * 2 * 70 * 16 * 4)
    for a, b in zip(whole, run(lambda *t: F.attention(*t), (q, k, v)), strict=True):
        assert torch.equal(a, b)
