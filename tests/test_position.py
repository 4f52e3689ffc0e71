"""Properties of the rotations; their values and gradients are held in test_kernels_attention.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_moe import functional as F
from triton_moe import testing
from triton_moe.kernels.attention import attention_backward, attention_forward, heads_side_by_side
from triton_moe.kernels.position import rope_pairs, rope_pairs_, rope_rotate, rope_rotate_


@given(data=st.data(), P=st.integers(1, 24), offset=st.integers(0, 10**6))
def test_a_rotation_keeps_lengths_and_turns_back(data, P, offset, device):
    n = data.draw(st.integers(0, P // 2)) * 2
    x = data.draw(testing.tensors((1, 5, 2, P), device=device))
    y = rope_rotate(x, n, 10000.0, offset, False)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., n:], x[..., n:])
    torch.testing.assert_close(rope_rotate(y, n, 10000.0, offset, True), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_leaves_all_else_alone(dtype, device):
    """A view of some of the heads: the others, and the channels that do not rotate, keep their bits."""
    whole = torch.randn(2, 7, 5, 12, device=device).to(dtype)
    before, part = whole.clone(), whole[:, :, 1:4]
    rope_rotate_(part, 6, 100.0, 3, True)
    assert torch.equal(part, rope_rotate(before[:, :, 1:4], 6, 100.0, 3, True))
    assert not torch.equal(part[..., :6], before[:, :, 1:4][..., :6])
    part.copy_(before[:, :, 1:4])
    assert torch.equal(whole, before)


def test_in_place_under_dynamo(device):
    def rotated(x):
        y = x * 2
        rope_rotate_(y[:, :, :2], 4, 100.0, 1, False)
        return y + 1

    x = torch.randn(1, 5, 3, 8, device=device)
    assert torch.equal(torch.compile(rotated, fullgraph=True, backend="aot_eager")(x), rotated(x))


def in_pairs(x, n):
    """x with its first n channels as 0, n/2, 1, n/2 + 1, ..."""
    return torch.cat([x[..., :n].unflatten(-1, (2, n // 2)).transpose(-1, -2).flatten(-2), x[..., n:]], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("P, n", [(13, 10), (16, 16), (40, 34), (5, 0)])
def test_pairs_side_by_side(P, n, dtype, device):
    """As halves; of a view of some heads, the others stay."""
    x = torch.randn(3, 5, 4, P, device=device).to(dtype)
    whole = in_pairs(x, n).contiguous()
    rope_pairs_(whole[:, :, 1:3], n, 100.0, 3)
    x[:, :, 1:3] = rope_rotate(x[:, :, 1:3], n, 100.0, 3, False)
    torch.testing.assert_close(whole, in_pairs(x, n), rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("P, n, width", [(12, 12, 16), (13, 6, 13), (100, 50, 128), (10, 0, 16)])
def test_pairs_into_padded_heads(P, n, width, dtype, device):
    """As in place, and zeros in the rest. Another kernel may round a sum of products otherwise."""
    x = torch.randn(3, 5, 4, P, device=device).to(dtype)[:, :, 1:]
    padded = torch.nn.functional.pad(x, (0, width - P))
    rope_pairs_(padded, n, 100.0, 3)
    y = rope_pairs(x, n, 100.0, 3, width)
    torch.testing.assert_close(y, padded, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert not y[..., P:].any() and torch.equal(y[..., n:], padded[..., n:])


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("P, n, T, S, joint", [(13, 10, 7, 7, True), (80, 50, 5, 9, False), (16, 16, 1, 6, False)])
def test_gradients_turn_back_where_they_are_stored(P, n, T, S, joint, dtype, device):
    """dq and dk of attention in pairs are those of rotated copies, rotated back in a launch of its own."""
    q, k, v, do = (torch.randn(2, m, h, P, device=device).to(dtype) for m, h in ((T, 4), (S, 4), (S, 4), (T, 4)))
    arguments = v, None, None, None, None
    options = True, 0, P**-0.5, "ieee"
    o, lse = attention_forward(q, k, *arguments, *options)
    dq, dk, dv, _ = attention_backward(do, None, q, k, *arguments, o, lse, *options)
    rope_rotate_(dq, n, 100.0, S - T, True)
    rope_rotate_(dk, n, 100.0, 0, True)
    q, k = in_pairs(q, n), in_pairs(k, n)
    first, second, dv2, _ = attention_backward(do, None, q, k, *arguments, o, lse, *options, joint, n, 100.0)
    dq2, dk2 = heads_side_by_side(first, 4, 4, P) if joint else (first, second)
    bounds = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(dq2, in_pairs(dq, n), **bounds)
    torch.testing.assert_close(dk2, in_pairs(dk, n), **bounds)
    torch.testing.assert_close(dv2, dv, **bounds)


@given(data=st.data(), offset=st.integers(1, 10**5))
def test_scores_depend_on_distance_alone(data, offset, device):
    q, k = (data.draw(testing.tensors((1, 4, 1, 8), device=device)) for _ in range(2))

    def scores(start):
        return torch.einsum("bthp,bshp->ts", *(rope_rotate(x, 8, 10000.0, start, False) for x in (q, k)))

    torch.testing.assert_close(scores(0), scores(offset), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [None, F.RoPE(0.0)])
def test_no_rotation_is_no_position(position, device):
    q = torch.randn(1, 6, 2, 8, device=device)
    assert torch.equal(F.attention(q, q, q, position=position), F.attention(q, q, q))
