"""Which tile sizes a kernel is launched with."""

import torch


def lookup(defaults: dict[str, dict[str, int]], dtype: torch.dtype, interpret: bool) -> dict[str, int]:
    """The launch configuration of one kernel: its own default for this dtype, or its rung for the interpreter.

    `defaults` has the keys "half" (float16 and bfloat16), "float32" and "interpret": the interpreter pays per launch
    and per tile iteration whatever the tile, so it wants few and large ones.
    """
    if interpret:
        return defaults["interpret"]
    return defaults["float32" if dtype == torch.float32 else "half"]
