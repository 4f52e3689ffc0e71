"""Every kernel once, forward and backward, at a small and odd size: a program to run under NVIDIA's compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py

Without the caching allocator each tensor is an allocation of its own, so an access one element past it is seen.
"""

import torch
from cases import block_weights, head_weights, moe_weights, randn

from triton_moe import functional as F


def backward(outputs) -> None:
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None and t.requires_grad]
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])


def run(name: str, function, *args, **options) -> None:
    backward(function(*args, **options))
    torch.cuda.synchronize()
    print(name, flush=True)


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        like = {"device": "cuda", "dtype": dtype}
        # By sets of experts, head by head, and by routes; one token; widths that no tile divides.
        for T, D, H, E, TOP_K, P in (
            (391, 72, 2, 4, 2, 20),
            (1667, 40, 2, 7, 2, 40),
            (131, 44, 2, 11, 5, 41),
            (1, 24, 2, 3, 2, 8),
        ):
            weights = head_weights(D, H, E, P, **like)
            x = randn(2, T, D, **like)
            options = {"top_k": TOP_K, "training": True, "expert_dropout": 0.1, "dropout": 0.1, "seed": 3}
            run(f"switchhead {dtype} T {T} P {P}", F.switchhead, x, weights, **options)
            run(f"the same without dropout {dtype}", F.switchhead, x, weights, top_k=TOP_K)
        xl = head_weights(44, 2, 3, 20, **like, xl=True)
        x, memory = randn(2, 77, 44, **like), randn(2, 131, 44, **like)
        run(f"Transformer-XL {dtype}", F.switchhead, x, xl, top_k=2, position=F.XL(), k_src=memory)
        for P in (20, 64, 100, 132, 256):
            q, k, v = randn(1, 333, 4, P, **like), randn(1, 333, 2, P, **like), randn(1, 333, 2, P, **like)
            ends = torch.tensor([0, 5, 130, 333], dtype=torch.int32, device="cuda")
            mask = torch.arange(333, device="cuda")[None] > 300
            run(f"attention {dtype} P {P}", F.attention, q, k, v, position=F.RoPE())
            run(f"attention, packed {dtype} P {P}", F.attention, q, k, v, cu_seqlens=ends)
            run(f"attention, window {dtype} P {P}", F.attention, q, k, v, window=37, key_padding_mask=mask)
        for E, G, TOP_K, activation in ((5, 24, 2, "swiglu"), (33, 40, 4, "relu"), (70, 16, 9, "gelu")):
            moe = moe_weights(36, E, G, **like, gated=activation == "swiglu", bias=True)
            x = randn(211, 36, **like)
            options = {"top_k": TOP_K, "activation": activation, "dropout": 0.1, "training": True, "seed": 5}
            run(f"sigma-MoE {dtype} E {E}", F.sigma_moe, x, moe, **options)
        block = block_weights(40, 2, 4, 20, 6, 16, **like)
        x = randn(2, 391, 40, **like)
        run(f"SwitchAll {dtype}", F.switchall, x, block, top_k=2, moe_top_k=2, dropout=0.1, training=True, seed=7)


if __name__ == "__main__":
    main()
