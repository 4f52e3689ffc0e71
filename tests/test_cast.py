"""Casts of one tensor and of a layer's weights, against torch."""

import pytest
import torch
from cases import randn

from triton_moe.kernels import cast


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_side_by_side(dtype, device):
    q, k = randn(2, 5, 7, device=device), randn(2, 5, 7, device=device, seed=1)
    v, o = randn(6, 7, 5, device=device), randn(6, 5, 7, device=device)
    sel, more = randn(1, 6, 7, device=device, dtype=dtype), [randn(1, 3, n, device=device) for n in range(1, 6)]
    o = o.transpose(1, 2).contiguous().transpose(1, 2)
    groups = [((q, k), (8, 7), 0), ((v,), (7, 8), 0), ((o,), (8, 7), 0), ((sel,), (6, 7), 0)]
    groups += [((w,), tuple(w.shape[1:]), 0) for w in more]
    with torch.no_grad():
        results = cast.assemble(dtype, *groups)
    assert results[3] is sel, "there was nothing to do"
    for result, (weights, (rows, columns), _) in zip(results, groups, strict=True):
        joined = torch.cat([torch.nn.functional.pad(w, (0, columns - w.shape[2], 0, rows - w.shape[1])) for w in weights])
        assert torch.equal(result, joined.to(dtype))
        assert result.data_ptr() % 16 == 0 or result.is_cpu  # for descriptors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_different_rows_side_by_side(dtype, device):
    """As those of queries, keys and gates: some in pairs, some filled up, all rows of one matrix."""
    q, sel = randn(2, 5, 7, device=device), randn(1, 3, 7, device=device, seed=1)
    with torch.no_grad():
        joined, other = cast.assemble(dtype, ((q, q, sel), ((6, 5, 3), 7), (4, 0, 0)), ((sel,), (4, 8), 0))
    pairs = torch.nn.functional.pad(q[:, [0, 2, 1, 3, 4]], (0, 0, 0, 1))
    assert torch.equal(joined, torch.cat([pairs.flatten(0, 1), q.flatten(0, 1), sel[0]]).to(dtype))
    assert torch.equal(other, torch.nn.functional.pad(sel, (0, 1, 0, 1)).to(dtype))


@pytest.mark.parametrize("P, n", [(7, 6), (8, 8), (9, 2), (5, 0)])
def test_rows_in_pairs_and_back(P, n, device):
    x = randn(3, P, 4, device=device)
    order = [r for pair in zip(range(n // 2), range(n // 2, n), strict=True) for r in pair] + list(range(n, P))
    with torch.no_grad():
        (pairs,) = cast.assemble(torch.float32, ((x,), (P + 1, 4), n))
        assert torch.equal(pairs[:, :P], x[:, order])
        assert not pairs[:, P:].any()
        (back,) = cast.assemble(torch.float32, ((pairs,), (P, 4), -n))
    assert torch.equal(back, x)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_a_large_tensor(dtypes):
    x = randn(1031, 1031, device="cuda", dtype=dtypes[0])
    assert torch.equal(cast.cast(x, dtypes[1]), x.to(dtypes[1]))
