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


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
)
def test_a_large_tensor(dtypes):
    x = randn(1031, 1031, device="cuda", dtype=dtypes[0])
    assert torch.equal(cast.cast(x, dtypes[1]), x.to(dtypes[1]))
