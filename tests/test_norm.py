"""LayerNorm of a residual stream, against PyTorch's own."""

import pytest
import torch
from cases import ALL_DTYPES, CPU_DTYPES, randn, relaid
from torch.nn.functional import layer_norm

from triton_moe import testing
from triton_moe.kernels.norm import norm_backward, norm_forward

EPS = 1e-5


def inputs(N, D, stream, dtype, device, *, mean=0.0, scale=1.0):
    """x, added, weight, bias, dh, dsum: the stream's, and the branch's, in their dtypes."""
    x = (randn(N, D, device=device) * scale + mean).to(stream)
    added, dh = (randn(N, D, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = (1 + randn(D, device=device, scale=0.3, seed=3)).to(stream), randn(D, device=device, dtype=stream, seed=4)
    return [t.detach() for t in (x, added, weight, bias, dh, randn(N, D, device=device, dtype=stream, seed=5))]


def kernel(x, added, weight, bias, dh, dsum):
    """-> h, dx, its copy, dweight, dbias"""
    h, mean, rstd = norm_forward(x, added, weight, bias, EPS, dh.dtype)
    gradients = norm_backward(dh, dsum, x, added, mean, rstd, weight, True, weight.dtype, bias.dtype)
    return dict(zip(("h", "dx", "copy", "dweight", "dbias"), (h, *gradients), strict=True))


def twin(x, added, weight, bias, dh, dsum, dtype=None):
    """By PyTorch, in the stream's dtype or another one, of the sum as the stream stores it."""
    total = x if added is None else (x + added).to(x.dtype)
    total, weight, bias = (t.to(dtype or t.dtype).requires_grad_() for t in (total, weight, bias))
    with torch.enable_grad():
        h = layer_norm(total, x.shape[1:], weight, bias, EPS)
        dx, dweight, dbias = torch.autograd.grad(h, (total, weight, bias), dh.to(h.dtype))
    dx = dx + dsum.to(dx.dtype)
    h, copy = (t.detach() if dtype else t.detach().to(dh.dtype) for t in (h, dx))
    return dict(zip(("h", "dx", "copy", "dweight", "dbias"), (h, dx, copy, dweight, dbias), strict=True))


def check(*given):
    ours, theirs, right = kernel(*given), twin(*given), twin(*given, dtype=torch.float64)
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype
        testing.assert_close(t, right[name], theirs[name], name=name)
    return ours


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("N", "D"), [(1, 1), (1, 37), (5, 412), (33, 64), (19, 1)])
def test_values_and_gradients(N, D, joined, dtype, device):
    x, added, *rest = inputs(N, D, torch.float32, dtype, device)
    check(x, added if joined else None, *rest)


@pytest.mark.smoke
def test_all_in_half_precision(device):
    check(*inputs(9, 50, torch.float16, torch.float16, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("stream", ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D"), [(3001, 1024), (2048, 412), (1, 1024), (700, 2048), (99, 8192), (130, 1001), (9, 20000), (5000, 3)]
)
def test_at_size(N, D, stream, dtype, device):
    x, added, *rest = inputs(N, D, stream, dtype, device)
    for given in (None, added):
        first = check(x, given, *rest)
        again = kernel(x, given, *rest)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("mean", "scale"), [(100.0, 1.0), (0.0, 1e-6), (3.0, 1e4)])
def test_rows_far_from_zero_and_small_ones(mean, scale, device):
    check(*inputs(17, 130, torch.float32, torch.float16, device, mean=mean, scale=scale))


def test_strides_do_not_matter(device):
    given = inputs(7, 24, torch.float32, torch.float16, device)
    expected = kernel(*given)
    for layout in (relaid, lambda t: t.repeat(*[1] * (t.ndim - 1), 2)[..., : t.shape[-1]]):
        for name, t in kernel(*map(layout, given)).items():
            assert torch.equal(t, expected[name]), name
    constant = given[-1][:1, :1].expand(7, 24)
    ours, expected = kernel(*given[:-1], constant), kernel(*given[:-1], constant.contiguous())
    assert torch.equal(ours["dx"], expected["dx"])


def test_a_row_depends_on_no_other_row(device):
    x, added, weight, bias, dh, dsum = inputs(40, 70, torch.float32, torch.float16, device)
    expected = kernel(x, added, weight, bias, dh, dsum)
    x[5], dh[7] = torch.nan, torch.inf
    for given, rows in ((slice(None), [n for n in range(40) if n not in (5, 7)]), (slice(20, 29), range(20, 29))):
        ours = kernel(*(t[given] for t in (x, added)), weight, bias, *(t[given] for t in (dh, dsum)))
        for name in ("h", "dx", "copy"):
            for n in rows:
                assert torch.equal(ours[name][n - (given.start or 0)], expected[name][n])
    ours = kernel(x, added, weight, bias, dh, dsum)
    assert ours["h"][5].isnan().all() and ours["dx"][5].isnan().all() and ours["dx"][7].isnan().all()


def test_without_rows(device):
    ours = kernel(*inputs(0, 12, torch.float32, torch.float16, device))
    assert ours["h"].shape == ours["dx"].shape == (0, 12)
    assert not ours["dweight"].any() and not ours["dbias"].any()
