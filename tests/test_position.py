"""Properties of the rotations; their values and gradients are held in test_kernels_attention.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_moe import functional as F
from triton_moe import testing
from triton_moe.kernels.position import rope_rotate, rope_rotate_


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
