"""The Transformer-XL term, apart from attention: values, gradients, and the channels it needs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triton_moe import testing
from triton_moe.kernels import xl
from triton_moe.kernels.xl import xl_query, xl_query_backward_


def sinusoids(T, S, D, device):
    """R_{j-i} of the last T positions and all S, [T, S, D] float64."""
    channel = torch.arange(D, device=device)
    m = torch.arange(S, device=device) - (S - T + torch.arange(T, device=device)[:, None])
    angle = m[..., None] * 10000.0 ** (-2.0 * (channel // 2).double() / D)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


def scores(x, weight, R):
    H, P = x.shape[2:]
    return torch.einsum("bthp,hpd,tsd->bths", x, weight.view(H, P, -1), R.to(x.dtype))


def check(actual, truth, twin):
    """As `testing.assert_close`, but the largest of a few hundred errors is a matter of luck: it may be four times the twin's."""
    ours, theirs = (x.detach().double() - truth.detach() for x in (actual, twin))
    ulps = 16 * torch.finfo(torch.float32).eps * truth.detach().square().mean().sqrt()
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + ulps
    assert ours.abs().max() <= 4 * theirs.abs().max() + ulps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "T, S, D, P, causal, window",
    [
        (5, 5, 1, 8, True, 0),
        (5, 11, 11, 19, True, 0),
        (70, 70, 300, 8, True, 0),  # fewer channels than 300 in float16
        (40, 70, 300, 20, False, 0),
        (9, 90, 256, 8, True, 20),
        (9, 9, 1030, 8, False, 3),
    ],
)
def test_values_and_gradients(T, S, D, P, causal, window, dtype, device):
    H = 3
    R = sinusoids(T, S, D, device)
    x = torch.randn(2, T, H, P, device=device).to(dtype)
    weight = (torch.randn(H * P, D, device=device) * D**-0.5).to(dtype)
    distance = torch.arange(S, device=device) - (S - T + torch.arange(T, device=device)[:, None])
    seen = distance <= 0 if causal else distance.abs() < S
    seen &= distance.abs() < (window or S + T)
    q_pos, k_pos, narrow = xl_query(x, weight, S, window, causal, "ieee")
    assert q_pos.dtype == k_pos.dtype == dtype and q_pos.shape[-1] == k_pos.shape[-1]
    actual = torch.einsum("bthf,sf->bths", q_pos.double(), k_pos.double()) * seen[:, None]
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    truth = scores(*leaves, R) * seen[:, None]
    twins = [t.clone().requires_grad_() for t in (x, weight)]
    # in the order of PyTorch's own models: the positions are projected first
    places = torch.einsum("hpd,tsd->tshp", twins[1].view(H, P, D), R.to(dtype))
    twin = torch.einsum("bthp,tshp->bths", twins[0], places) * seen[:, None]
    check(actual, truth, twin)

    g = torch.randn(truth.shape, device=device).to(dtype) * seen[:, None]
    dq_pos = torch.einsum("bths,sf->bthf", g.double(), k_pos.double()).to(dtype)
    dx = torch.zeros_like(x)
    dweight = xl_query_backward_(dq_pos, dx, x, narrow, D, S, window, causal, "ieee")
    expected, rounded = torch.autograd.grad(truth, leaves, g.double()), torch.autograd.grad(twin, twins, g)
    for d, e, r in zip((dx, dweight), expected, rounded, strict=True):
        assert d.dtype == dtype
        check(d, e, r)


def test_the_gradient_is_added(device):
    """To a view of some heads, and to nothing else."""
    x, weight = torch.randn(2, 6, 2, 8, device=device), torch.randn(16, 12, device=device)
    q_pos, _, narrow = xl_query(x, weight, 9, 0, True, "ieee")
    g = torch.randn_like(q_pos)
    alone, whole = torch.zeros_like(x), torch.ones(2, 6, 5, 8, device=device)
    for dx in (alone, whole[:, :, 1:3]):
        xl_query_backward_(g, dx, x, narrow, 12, 9, 0, True, "ieee")
    torch.testing.assert_close(whole[:, :, 1:3], alone + 1)
    assert (whole[:, :, :1] == 1).all() and (whole[:, :, 3:] == 1).all()


@given(data=st.data(), D=st.integers(1, 20), shift=st.integers(0, 5))
def test_scores_depend_on_distance_alone(data, D, shift, device):
    x = data.draw(testing.tensors((1, 1, 1, 4), device=device)).expand(1, 3, 1, 4).contiguous()
    weight = data.draw(testing.tensors((4, D), device=device))
    near, far = (torch.einsum("bthf,sf->ts", *xl_query(x, weight, S, 0, True, "ieee")[:2]) for S in (8, 8 + shift))
    torch.testing.assert_close(near, far[:, shift:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "D, span, half, single",
    [
        *[
            (11, 64, 16, 16),
            (64, 1024, 64, 64),
            (128, 2048, 96, 112),
            (256, 64, 48, 64),
            (412, 512, 128, 160),
            (512, 1024, 192, 208),
        ],
        *[(1024, 64, 48, 64), (1024, 512, 192, 240), (1024, 1024, 256, 320), (2048, 1024, 384, 432), (1024, 1 << 20, 1024, 1024)],
    ],
)
def test_few_channels_are_enough(D, span, half, single, causal):
    """NOTE [Few channels]: at every distance of the span, half way between two as well; and M makes no number larger."""
    shift = span // 2 if causal else 0
    m = np.linspace(-span / 2, span / 2, 2 * D + 1)[:, None] - shift
    w = 10000.0 ** (-2 * np.arange((D + 1) // 2) / D)
    R = np.stack([np.sin(m * w), np.cos(m * w)], -1).reshape(len(m), -1)[:, :D]
    for exact, F, bound in ((False, half, 2e-4), (True, single, 2e-8)):
        frequencies, M = xl._basis(D, span, shift, exact)
        assert M.shape == (D, F) and frequencies.shape == (F // 2,)
        features = np.concatenate([np.sin((m + shift) * frequencies), np.cos((m + shift) * frequencies)], 1)
        error = features @ M.T - R
        assert abs(error).max() < 5 * bound and np.sqrt((error**2).mean(0)).max() < bound
        assert np.square(M).sum() < 1.03 * D
