"""Attention, against cuDNN, FlashAttention-2 and FlexAttention."""

import contextlib
from collections.abc import Callable, Sequence

import torch

from .row import BACKWARD, BOTH, FORWARD, Inputs, Rival, Row, Target, Task, compiled
from .shared import attention_flops, op_dtype, randn


def attention_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        rows = [attention_row(2, 20, 24, device, B=2)]
        if full:
            rows += [attention_row(2, 20, 24, device, B=2, window=7), packed_row(2, 20, [5, 24], device)]
            rows.append(xl_row(2, 20, 48, 24, device, B=2))
        return rows
    rows = [attention_row(H, P, 4096, device) for H, P in ((4, 64), (16, 64), (4, 128))]
    rows += [attention_row(4, P, T, device) for P in (76, 100, 132) for T in (1024, 4096)]
    rows += [xl_row(H, P, D, 1024, device) for H, P, D in ((8, 64, 512), (4, 112, 1024))]
    if full:
        rows += [
            attention_row(H, P, T, device)
            for H, P in ((16, 64), (4, 128), (4, 100))
            for T in (512, 1024, 16384)
            if P != 100 or T != 1024
        ]
        rows += [attention_row(4, P, T, device) for P in (41, 82, 96, 112, 256) for T in (1024, 4096)]
        rows += [attention_row(2, P, T, device) for P in (76, 132) for T in (512, 1024, 4096, 16384)]
        rows += [attention_row(4, P, 4096, device, window=512) for P in (64, 128, 100)]
        rows += [packed_row(4, P, PACKED, device) for P in (64, 128)]
    return rows


PACKED = [1024, 4608, 1536, 5120, 8192, 5632, 4608, 2048]  # lengths of sequences packed into one row, 32768 in all


def stored_width(P: int, device: str) -> int:
    """The channels of a head as a layer stores it: NOTE [Head widths] in functional."""
    from ..kernels.attention import tile_width

    return tile_width(P, op_dtype(device))


def stored(B: int, T: int, H: int, P: int, device: str) -> torch.Tensor:
    x = torch.randn(B, T, H, P, device=device).to(op_dtype(device))
    return torch.nn.functional.pad(x, (0, stored_width(P, device) - P)).requires_grad_()


def attention_case(
    name: str,
    shape: tuple[int, int, int, int],
    device: str,
    flops: float,
    rivals: Sequence[Rival],
    *,
    options: Callable = lambda package, p: {},
    reference_options: Callable | None = None,
    extra: Callable[[], Inputs] = dict,
    **more,
) -> Row:
    """shape: B, T, H, P; options: the keywords of `attention` in this package (functional or reference) for these inputs."""
    scale = shape[3] ** -0.5

    def ours(p):
        from .. import functional

        return functional.attention(p["q"], p["k"], p["v"], scale=scale, **options(functional, p))

    def truth(p, _):
        from .. import reference

        return reference.attention(p["q"], p["k"], p["v"], scale=scale, **(reference_options or options)(reference, p))

    return Row(
        f"attention, causal, {name}H {shape[2]} P {shape[3]}, T {shape[1]}",
        lambda: {**{leaf: stored(*shape, device) for leaf in ("q", "k", "v")}, **extra()},
        ours,
        truth,
        batched=("q", "k", "v"),
        flops={FORWARD: flops, BOTH: 3.5 * flops, BACKWARD: 2.5 * flops},
        rivals=tuple(rivals),
        kernels=f"{name}P {shape[3]}",
        **more,
    )


def attention_row(H: int, P: int, T: int, device: str, *, B: int | None = None, window: int | None = None) -> Row:
    B = B or 32768 // T
    cudnn, flash, flex = sdpa(CUDNN, P), sdpa(FLASH, P), flex_attention(T, P, window)
    flops = attention_flops(B * T, T, H, P, window)
    if window:
        rivals = [Rival(f"{FLEX}, padded" if P % 8 else FLEX, flex, compiles=True)]
        return attention_case(
            f"window {window}, ", (B, T, H, P), device, flops, rivals, options=lambda package, p: {"window": window}
        )
    if P % 8:
        rivals = [
            Rival(f"{CUDNN}, padded", cudnn),
            Rival(f"{FLASH}, padded", flash),
            Rival(f"{FLEX}, padded", flex, compiles=True),
        ]
        best = dict.fromkeys((FORWARD, BACKWARD), Target(1.0, 1 / 1.3))
        return attention_case("", (B, T, H, P), device, flops, rivals, best=best)
    bounds = {FORWARD: Target(1 / 0.85, 1.0), BACKWARD: Target(1 / 0.7, 1 / 0.85)}
    rivals = [Rival(CUDNN, cudnn, bounds if P in (64, 128) and T == 4096 else {})]
    if T == 4096:
        rivals.append(Rival(f"{CUDNN}, deterministic", sdpa(CUDNN, P, deterministic_algorithms)))
    if P > 128:
        rivals += [Rival(FLASH, flash), Rival(FLEX, flex, compiles=True)]
    return attention_case("", (B, T, H, P), device, flops, rivals)


def packed_row(H: int, P: int, lengths: list[int], device: str) -> Row:
    """Sequences packed into one row of the batch."""
    N, ends = sum(lengths), torch.tensor(lengths).cumsum(0).tolist()
    return attention_case(
        f"{len(lengths)} sequences packed, ",
        (1, N, H, P),
        device,
        sum(attention_flops(n, n, H, P) for n in lengths),
        [Rival(FLEX, flex_attention(N, P, ends=ends), compiles=True)],
        options=lambda package, p: {"cu_seqlens": p["cu_seqlens"]},
        reference_options=lambda package, p: {},  # it is given the last sequence alone
        extra=lambda: {"cu_seqlens": torch.tensor([0, *ends], dtype=torch.int32, device=device)},
        packed=lengths[-1],
    )


def xl_row(H: int, P: int, D: int, T: int, device: str, *, B: int = 32) -> Row:
    """Transformer-XL positions, against none."""
    without, wide = attention_row(H, P, T, device, B=B), stored_width(P, device)
    plain = Rival(
        "our plain attention", lambda p: Task(lambda: without.ours(p), [p["q"], p["k"], p["v"]]), {FORWARD: Target(3.0, 2.0)}
    )
    return attention_case(
        f"Transformer-XL of width {D}, ",
        (B, T, H, P),
        device,
        attention_flops(B * T, T, H, P),
        [plain],
        options=lambda package, p: {"position": package.XL(p["weight"])},
        extra=lambda: {"weight": randn(H * wide, D, std=D**-0.5, device=device, dtype=op_dtype(device))},
    )


CUDNN, FLASH, FLEX = "cuDNN", "FlashAttention-2", "FlexAttention"


class Widen(torch.autograd.Function):
    """x copied to the front channels of `wide`, whose others are 0: one pass over memory, and none for the gradient."""

    @staticmethod
    def forward(ctx, x, wide):
        ctx.width = x.shape[-1]
        ctx.mark_dirty(wide)
        wide[..., : ctx.width].copy_(x)
        return wide

    @staticmethod
    def backward(ctx, d):
        return d[..., : ctx.width], None


def rival_attention(p: Inputs, P: int, attend: Callable, context=contextlib.nullcontext) -> Task:
    """attend(q, k, v, scale) on [B, H, T, P], the width padded to a multiple of 8 where it is none; the padding is timed."""
    inputs = [p[name].detach()[..., :P].transpose(1, 2).contiguous().requires_grad_() for name in ("q", "k", "v")]
    q, k, v = inputs
    if P % 8 == 0:
        return Task(lambda: attend(q, k, v, P**-0.5), inputs, context)
    wide = [torch.zeros(*t.shape[:-1], P + -P % 8, device=t.device, dtype=t.dtype) for t in inputs]

    def padded():
        q, k, v = (Widen.apply(t, buffer.detach()) for t, buffer in zip(inputs, wide, strict=True))
        return attend(q, k, v, P**-0.5)[..., :P]

    return Task(padded, inputs, context)


def sdpa(name: str, P: int, also: Callable = contextlib.nullcontext) -> Callable[[Inputs], Task]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}[name]

    def attend(q, k, v, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    @contextlib.contextmanager
    def context():
        with sdpa_kernel(backend), also():
            yield

    return lambda p: rival_attention(p, P, attend, context)


@contextlib.contextmanager
def deterministic_algorithms():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def flex_attention(T: int, P: int, window: int | None = None, ends: list[int] | None = None) -> Callable[[Inputs], Task]:
    """ends: where packed sequences end."""

    def build(p):
        from torch.nn.attention import flex_attention as flex

        device = p["q"].device
        sequence = None if ends is None else torch.searchsorted(
            torch.tensor(ends, device=device), torch.arange(T, device=device), right=True
        )  # fmt: skip

        def sees(b, h, i, j):
            seen = i >= j
            if window is not None:
                seen = seen & (i - j < window)
            if sequence is not None:
                seen = seen & (sequence[i] == sequence[j])
            return seen

        mask = flex.create_block_mask(sees, None, None, T, T, device=device)

        function = compiled(flex.flex_attention)  # uncompiled it writes all scores
        return rival_attention(p, P, lambda q, k, v, scale: function(q, k, v, block_mask=mask, scale=scale))

    return build
