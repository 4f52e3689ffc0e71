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
    groups = [((q, k), (8, 7)), ((v,), (7, 8)), ((o.transpose(1, 2).contiguous().transpose(1, 2),), (8, 7)), ((sel,), (6, 7))]
    groups += [((w,), tuple(w.shape[1:])) for w in more]
    with torch.no_grad():
        results = cast.assemble(dtype, *groups)
    assert results[3] is sel, "there was nothing to do"
    for result, (weights, (rows, columns)) in zip(results, groups, strict=True):
        joined = torch.cat([torch.nn.functional.pad(w, (0, columns - w.shape[2], 0, rows - w.shape[1])) for w in weights])
        assert torch.equal(result, joined.to(dtype))
        assert result.data_ptr() % 16 == 0 or result.is_cpu  # for descriptors


@pytest.mark.parametrize("compiling", [False, True])
def test_gradients_without_their_padding(compiling, device, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    half, whole = torch.bfloat16, torch.float32
    both, sel = randn(2 * 4 * 6, 7, device=device, dtype=half), randn(9, 7, device=device, dtype=half)
    q, k = both.chunk(2)
    parts = [(q, 6, 5, whole), (None, 6, 5, whole), (k, 6, 5, half), (sel, 1, 1, whole), (sel, 1, 1, half), (sel, 1, 1, None)]
    parts += [(t, 6, r, whole) for t in (q, k) for r in (1, 6)]  # more than one launch
    results = cast.trimmed(*parts)
    assert results[4] is sel and results[1] is None and results[5] is None
    for result, (t, full, r, dtype) in zip(results, parts, strict=True):
        if result is not None:
            assert result.dtype == dtype and torch.equal(result, t.view(-1, full, 7)[:, :r].reshape(-1, 7).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_a_large_tensor(dtypes):
    x = randn(1031, 1031, device="cuda", dtype=dtypes[0])
    assert torch.equal(cast.cast(x, dtypes[1]), x.to(dtypes[1]))
