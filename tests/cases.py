"""Inputs and checks that several test files share."""

from contextlib import contextmanager

import pytest
import torch

from triton_moe import functional as F
from triton_moe import testing
from triton_moe.kernels import mlp, norm, position, projection, sets, xl
from triton_moe.kernels.attention import backward, forward, masks
from triton_moe.kernels.gating import gate, plan

HALF = (torch.float16, torch.bfloat16)
CPU_DTYPES = [torch.float32, torch.float16]  # the interpreter computes bfloat16 in float32: proven on the GPU
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(kernel, twin, inputs, *, at_size=False, **options):
    """`testing.check`, exactly as it is for tensors of realistic size.

    In a small float32 tensor the twin's largest error is a matter of luck, and in the interpreter the matrix products are
    NumPy's, which are not fused: up to three times as wrong as torch's. There float32 is granted a few units in the last place.
    """
    ulps = 1.0 if at_size else 16.0
    testing.check(kernel, twin, inputs, ulps=ulps, **options)


@contextmanager
def refused(error, message):
    """As pytest.raises; and no kernel may start before the error."""

    def launch(kernel, *_, **__):
        pytest.fail(f"{kernel} was launched before its arguments were checked")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match=message):
        for module in (forward, backward, masks, gate, plan, mlp, norm, position, projection, sets, xl):
            patch.setattr(module, "launch", launch)
        yield


def run(function, tensors):
    """-> the outputs of function(*tensors), then the gradients of the tensors."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(o.float().square().sum() for o in outputs if o.is_floating_point())
    return *outputs, *torch.autograd.grad(loss, tensors)


def relaid(x):
    """x with its axes in reverse order in memory, every other element of each, and NaN in between."""
    filler = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    storage = torch.full([2 * n for n in reversed(x.shape)], filler, dtype=x.dtype, device=x.device)
    view = storage.permute(*reversed(range(x.ndim)))[(slice(None, None, 2),) * x.ndim]
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


def randn(*shape, device, dtype=torch.float32, scale=1.0, seed=0, requires_grad=True):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float32) * scale
    return values.to(device, dtype).requires_grad_(requires_grad)


def on_a_grid(x, step):
    """x rounded to multiples of `step`: sums of products are then exact, and so is the side of a ReLU they fall on."""
    return ((x.detach().float() / step).round() * step).to(x.dtype).requires_grad_()


def choices(N, H, E, K, *, device, seed=0, used=None):
    """Random distinct experts [N, H, K] among the first `used` (default all)."""
    order = torch.rand(N, H, used or E, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return order[..., :K].to(device, torch.int32)


def head_weights(D, H, E, P, *, device, dtype, shared=False, xl=False, seed=0):
    def w(i, *shape, fan):
        return randn(*shape, device=device, dtype=dtype, scale=fan**-0.5, seed=seed + 100 * i)

    if E == 1:
        v, o = w(3, H * P, D, fan=D), w(4, D, H * P, fan=H * P)
    else:
        v, o = w(3, H * E, D, P, fan=D), w(4, H * E, P, D, fan=H * P)
    return F.SwitchHeadWeights(
        w(1, H * P, D, fan=D),
        w(2, H * P, D, fan=D),
        v,
        o,
        None if shared or E == 1 else w(5, H * E, D, fan=D),
        w(6, H * E, D, fan=D),
        w(7, H * P, D, fan=D) if xl else None,
    )


def moe_weights(D, E, G, *, device, dtype, gated=False, bias=False, d_out=None, seed=0):
    def w(i, *shape, fan):
        return randn(*shape, device=device, dtype=dtype, scale=fan**-0.5, seed=seed + 100 * i)

    d_out, width = d_out or D, 2 * G if gated else G
    return F.SigmaMoEWeights(
        w(1, E, D, width, fan=D),
        w(2, E, G, d_out, fan=G),
        w(3, E, D, fan=D),
        w(4, E, width, fan=4) if bias else None,
        w(5, d_out, fan=4) if bias else None,
    )


def block_weights(D, H, E, P, moe_E, G, *, device, dtype, seed=0, **moe):
    def norm(i):
        weight, bias = (randn(D, device=device, dtype=dtype, scale=0.2, seed=seed + i + j) for j in (0, 50))
        return (weight.detach() + 1).requires_grad_(), bias

    attention = head_weights(D, H, E, P, device=device, dtype=dtype, seed=seed)
    return F.SwitchAllWeights(
        norm(1), attention, norm(2), moe_weights(D, moe_E, G, device=device, dtype=dtype, seed=seed + 7, **moe)
    )


def detached(value):
    """The same (named) tuple of tensors without gradients."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, tuple):
        items = [detached(v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
