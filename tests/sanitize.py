"""Every kernel, forward and backward, at small and odd sizes: a program to run under NVIDIA's compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py

Without the caching allocator each tensor is an allocation of its own, so an access one element past it is seen.

The tools slow all down by a factor of ten to a hundred. `--part 2/8` runs every eighth case from the second on, so that eight
processes share the work; a run without a tool before it fills Triton's cache. It ends with the names of the kernels that ran.
Run few of them at a time: of sixteen started within a minute six never attached to theirs ("No attachable process found");
four at a time, with `--launch-timeout 100`, all did. On an H200 memcheck found nothing in the 48 cases, and racecheck nothing but
cuBLAS's own split-K kernels (nvjet_..._splitK_...); since `spread` goes through several tiles, racecheck ran in 18 cases,
and since its last edit either in two.
"""

import argparse
import ast
from functools import partial
from pathlib import Path

import torch
from cases import block_weights, head_weights, moe_weights, randn

from triton_moe import functional as F
from triton_moe.kernels import common, sets


def backward(outputs) -> None:
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None and t.requires_grad]
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])


def layer(T, D, H, E, TOP_K, P, dtype, **options):
    weights = head_weights(D, H, E, P, device="cuda", dtype=dtype)
    return F.switchhead(randn(2, T, D, device="cuda", dtype=dtype), weights, top_k=TOP_K, **options)


def transformer_xl(dtype):
    weights = head_weights(44, 2, 3, 20, device="cuda", dtype=dtype, xl=True)
    x, memory = (randn(2, T, 44, device="cuda", dtype=dtype) for T in (77, 131))
    return F.switchhead(x, weights, top_k=2, position=F.XL(), k_src=memory)


def attention(P, dtype, **options):
    q, k, v = (randn(1, 203, h, P, device="cuda", dtype=dtype) for h in (4, 2, 2))
    return F.attention(q, k, v, **options)


def packed(P, dtype):
    return attention(P, dtype, cu_seqlens=torch.tensor([0, 5, 130, 203], dtype=torch.int32, device="cuda"))


def padded(P, dtype):
    return attention(P, dtype, window=37, key_padding_mask=torch.arange(203, device="cuda")[None] > 180)


def sigma_moe(E, G, TOP_K, activation, dtype):
    weights = moe_weights(36, E, G, device="cuda", dtype=dtype, gated=activation == "swiglu", bias=True)
    x = randn(211, 36, device="cuda", dtype=dtype)
    return F.sigma_moe(x, weights, top_k=TOP_K, activation=activation, dropout=0.1, training=True, seed=5)


def switchall(dtype):
    weights = block_weights(40, 2, 4, 20, 6, 16, device="cuda", dtype=dtype)
    x = randn(2, 403, 40, device="cuda", dtype=dtype)
    return F.switchall(x, weights, top_k=2, moe_top_k=2, dropout=0.1, training=True, seed=7)


def autocast():
    """Float32 weights are cast, and the heads padded."""
    with torch.autocast("cuda", torch.bfloat16):
        return layer(65, 48, 2, 4, 2, 20, torch.float32)


def cases():
    """(name, function)"""
    dropping = {"training": True, "expert_dropout": 0.1, "dropout": 0.1, "seed": 3}
    for dtype in (torch.bfloat16, torch.float32):
        # By sets of experts, head by head, and by routes; one token; widths that no tile divides.
        for sizes in ((403, 72, 2, 4, 2, 41), (1667, 40, 2, 7, 2, 40), (131, 44, 2, 11, 5, 41), (1, 24, 2, 3, 2, 8)):
            yield f"switchhead {dtype} {sizes}, dropout", partial(layer, *sizes, dtype, **dropping)
            yield f"switchhead {dtype} {sizes}", partial(layer, *sizes, dtype)
        yield f"Transformer-XL {dtype}", partial(transformer_xl, dtype)
        for P in (20, 64, 100, 132, 256) if dtype == torch.bfloat16 else (20, 100):
            yield f"attention {dtype} P {P}", partial(attention, P, dtype, position=F.RoPE())
            yield f"attention, packed {dtype} P {P}", partial(packed, P, dtype)
            yield f"attention, window and padding {dtype} P {P}", partial(padded, P, dtype)
        for sizes in ((5, 24, 2, "swiglu"), (33, 40, 4, "relu"), (70, 16, 9, "gelu")):
            yield f"sigma-MoE {dtype} {sizes}", partial(sigma_moe, *sizes, dtype)
        yield f"SwitchAll {dtype}", partial(switchall, dtype)
    yield "autocast", autocast


def all_kernels() -> set[str]:
    """By the sources of the package."""
    files = Path(common.__file__).parent.rglob("*.py")
    return {
        node.name.strip("_").removesuffix("_kernel")
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the cases")
    first, parts = map(int, parser.parse_args().part.split("/"))
    seen = set()
    sets._programs = lambda *_: 3  # each takes several tiles
    common.on_launch = lambda kernel, *_: seen.add(kernel.__name__.strip("_").removesuffix("_kernel"))
    for i, (name, function) in enumerate(cases()):
        if i % parts == first - 1:
            backward(function())
            torch.cuda.synchronize()
            print(name, flush=True)
    print(f"ran: {' '.join(sorted(seen))}; not: {' '.join(sorted(all_kernels() - seen))}")


if __name__ == "__main__":
    main()
