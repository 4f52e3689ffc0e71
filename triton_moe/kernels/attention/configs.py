"""The launch configurations of attention, and its inputs as the kernels take them."""

import torch
import triton
from torch import Tensor

from ... import tuning
from ..common import INTERPRET, cdiv, default_config, next_power_of_2, rows


def _tile(BLOCK_M: int, BLOCK_N: int, num_warps: int, num_stages: int, **others: int) -> dict[str, int]:
    """BLOCK_M queries by BLOCK_N keys."""
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=num_warps, num_stages=num_stages, **others)


# "hopper" lists the widest head and its tiles; elsewhere heads of more than 128 channels are "half_wide". "hopper_xl" lists the
# largest 2 (P + F) + Pv, as shared memory limits it; elsewhere position channels, and anywhere too many of them, are "half_xl".
CONFIGS = {
    "attention_forward": {
        "hopper": (
            (64, _tile(64, 64, 4, 3)),
            (96, _tile(128, 64, 4, 3)),
            (112, _tile(128, 64, 8, 3)),
            (128, _tile(64, 64, 4, 3)),
            (160, _tile(64, 32, 4, 3)),
            (256, _tile(128, 64, 8, 2)),
        ),
        "hopper_spare": (  # masks other than causal, and grouped heads, take registers
            (64, _tile(64, 64, 4, 3)),
            (96, _tile(64, 32, 4, 3)),
            (112, _tile(128, 64, 8, 3)),
            (128, _tile(64, 64, 4, 3)),
            (160, _tile(64, 32, 4, 3)),
            (256, _tile(128, 64, 8, 2)),
        ),
        "hopper_xl": (
            (640, _tile(64, 64, 4, 2)),
            (900, _tile(128, 64, 8, 2)),
            (1160, _tile(128, 32, 8, 2)),
            (1792, _tile(64, 32, 8, 2)),
        ),
        "hopper_rope": (
            (128, _tile(64, 64, 4, 1)),
            (512, _tile(128, 32, 8, 2)),
        ),
        "hopper_few": (  # queries in one tile, rotated on load
            (128, _tile(64, 64, 4, 3)),
            (512, _tile(64, 32, 8, 2)),
        ),
        "half": _tile(64, 32, 4, 2),
        "half_rope": _tile(64, 32, 8, 2),
        "half_wide": _tile(64, 32, 8, 1),
        "half_xl": _tile(64, 32, 4, 1),
        "float32": _tile(32, 32, 8, 1),
        "interpret": _tile(256, 256, 1, 1),
    },
    "attention_dkdv": {
        "hopper": (
            (64, _tile(128, 64, 4, 2)),
            (96, _tile(64, 64, 4, 3)),
            (128, _tile(64, 64, 4, 2)),
            (160, _tile(32, 64, 4, 3)),
            (256, _tile(32, 32, 4, 2)),
        ),
        "hopper_xl": (
            (640, _tile(64, 128, 8, 2)),
            (900, _tile(32, 128, 8, 3)),
            (1000, _tile(32, 128, 8, 2)),
            (1420, _tile(32, 64, 4, 2)),
            (1792, _tile(32, 32, 4, 2)),
        ),
        "hopper_spare": (  # grouped heads and key padding take registers
            (64, _tile(128, 64, 4, 2)),
            (96, _tile(64, 64, 4, 2)),
            (128, _tile(64, 64, 4, 2)),
            (256, _tile(32, 32, 4, 2)),
        ),
        "hopper_rope": (
            (128, _tile(32, 64, 4, 1)),
            (512, _tile(32, 64, 8, 2)),
        ),
        "half": _tile(32, 32, 4, 2),
        "half_rope": _tile(16, 32, 8, 1),
        "half_wide": _tile(16, 32, 4, 1),
        "half_xl": _tile(16, 32, 4, 1),
        "float32": _tile(16, 32, 8, 1),
        "interpret": _tile(256, 256, 1, 1),
    },
    "attention_dq": {
        "hopper": (
            (64, _tile(64, 64, 4, 3)),
            (96, _tile(64, 32, 4, 3)),
            (112, _tile(128, 64, 8, 3)),
            (128, _tile(64, 64, 4, 2)),
            (160, _tile(128, 64, 8, 3)),
            (256, _tile(128, 32, 8, 3)),
        ),
        "hopper_xl": (
            (640, _tile(64, 32, 4, 3)),
            (900, _tile(128, 32, 8, 3)),
            (1160, _tile(64, 32, 8, 2)),
            (1792, _tile(32, 32, 8, 3)),
        ),
        "hopper_rope": (
            (64, _tile(64, 64, 4, 1)),
            (128, _tile(128, 64, 8, 3)),
            (256, _tile(128, 32, 8, 2)),
            (512, _tile(64, 32, 8, 1)),
        ),
        "half": _tile(64, 32, 4, 2),
        "half_rope": _tile(32, 32, 4, 2),
        "half_wide": _tile(32, 32, 4, 1),
        "half_xl": _tile(32, 16, 4, 1),
        "float32": _tile(16, 16, 8, 1),
        "interpret": _tile(256, 256, 1, 1),
    },
}
SPACE = {  # what may be tuned; see tuning.py
    "attention_fwd": {"BLOCK_M": [64, 128], "BLOCK_N": [32, 64], "num_warps": [4, 8], "num_stages": [1, 2, 3]},
    "attention_bwd_dkdv": {"BLOCK_M": [32, 64, 128], "BLOCK_N": [32, 64, 128], "num_warps": [4, 8], "num_stages": [2, 3]},
    "attention_bwd_dq": {"BLOCK_M": [64, 128], "BLOCK_N": [16, 32, 64], "num_warps": [4, 8], "num_stages": [2, 3]},
}


SECTION_BYTES = 8 << 20  # NOTE [Order]
WIDEST_POSITIONS, POSITION_PART, POSITION_CHUNK = 512, 128, 512 if INTERPRET else 64  # NOTE [Position channels]


def _exact(dtype: torch.dtype, precision: str) -> bool:
    """See NOTE [Float32]."""
    return dtype == torch.float32 and precision == "ieee"


def _sections(x: Tensor, y: Tensor, heads: int) -> int:
    """See NOTE [Order]: into how many the `heads` go, whose programs read the rows of x and y, [B, S, H, P]."""
    return max(1, min(heads, cdiv((x.numel() + y.numel()) * x.element_size(), SECTION_BYTES)))


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def _rows(x: Tensor) -> Tensor:
    """As `common.rows`. 16-bit rows that do not consist of whole 16 bytes, like those of width 100, get a copy with zeros up to
    what a tile spans: to load them in pieces costs more."""
    x = rows(x)
    if x.element_size() == 4 or (x.shape[-1] % 8 == 0 and _aligned(x)):
        return x
    channels = tile_width(x.shape[-1], x.dtype) - x.shape[-1] if x.shape[-1] % 8 else 0
    return torch.nn.functional.pad(x, (0, channels)) if channels else x.clone(memory_format=torch.contiguous_format)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def tile_width(width: int, dtype: torch.dtype) -> int:
    """What a tile spans of a head, in 16 bits: heads of a layer are stored as wide. NOTE [Head widths]"""
    return width if dtype == torch.float32 else sum(_chunks(width, dtype))


def _chunks(width: int, dtype: torch.dtype, rotated: int = 0) -> tuple[int, ...]:
    """The head width as one or two powers of two, 80 = 64 + 16: what a tile spans. With channels to be rotated on load, the
    halves of these and then the others, each filled up to a power of two."""
    if rotated:
        half = next_power_of_2(rotated // 2)
        return (half, half, *([next_power_of_2(width - rotated)] if width > rotated else []))
    chunk = next_power_of_2(width)
    if dtype != torch.float32 and chunk >= 64 and width <= chunk // 2 + chunk // 4:
        return chunk // 2, next_power_of_2(width - chunk // 2)
    return (chunk,)


def _positions(q_pos: Tensor | None) -> dict:
    """How the kernels take the F position channels: whole, beside those of a head, or BLOCK_F at a time."""
    F = 0 if q_pos is None else q_pos.shape[-1]
    if F == 0 or (q_pos.element_size() == 2 and F <= WIDEST_POSITIONS):
        rest = F % POSITION_PART
        parts = (POSITION_PART,) * (F // POSITION_PART) + (_chunks(rest, q_pos.dtype) if rest else ())
        return dict(F=F, CHUNKS_F=parts, BLOCK_F=0)
    return dict(F=F, CHUNKS_F=(), BLOCK_F=POSITION_CHUNK)


def _hopper(x: Tensor) -> bool:
    if x.is_meta:
        target = triton.runtime.driver.active.get_current_target()
        return target.backend == "cuda" and target.arch // 10 == 9
    return not INTERPRET and not torch.version.hip and torch.cuda.get_device_capability(x.device)[0] == 9


def _config(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor | None, rung: str = "hopper", span: int = 0
) -> dict[str, int]:
    """The kernel's tiles, no larger than the problem; span: of a tile with channels to be rotated on load."""
    configs, width = CONFIGS[kernel], max(span or q.shape[-1], v.shape[-1])
    if INTERPRET or q.dtype == torch.float32:
        config = default_config(configs, q.dtype)
        if (width > 128 or span) and not INTERPRET:
            config["BLOCK_M"] = max(16, config["BLOCK_M"] // 2)
        if width > 128 and not INTERPRET:
            config["BLOCK_N"] = max(16, config["BLOCK_N"] // 2)
    elif q_pos is not None:
        F = q_pos.shape[-1]
        wide = 2 * (q.shape[-1] + F) + v.shape[-1] if _hopper(q) and F <= WIDEST_POSITIONS else 1 << 30
        config = next((tile for widest, tile in configs["hopper_xl"] if wide <= widest), configs["half_xl"])
    elif _hopper(q):
        config = next(tile for widest, tile in configs[rung] if width <= widest)
    else:
        config = configs["half_wide" if width > 128 else "half_rope" if span else "half"]
    limits = {"BLOCK_M": q.shape[1], "BLOCK_N": k.shape[1]}
    return {name: min(value, next_power_of_2(limits[name])) if name in limits else value for name, value in config.items()}


def _two_stages(config: dict[str, int], q: Tensor, PV: int) -> dict[str, int]:
    """At least, where NOTE [One stage] says so."""
    if _hopper(q) and len(_chunks(PV, q.dtype)) > 1:
        return config | {"num_stages": max(2, config["num_stages"])}
    return config


def _tuned(kernel, config, q, k, v, q_pos, key_padding_mask, cu_seqlens, causal, window, precision, rotated) -> dict[str, int]:
    sizes, F = (q.shape[0] * q.shape[2], q.shape[1], k.shape[1]), 0 if q_pos is None else q_pos.shape[-1]
    widths = {"P": q.shape[-1], "PV": v.shape[-1], "F": F, "GROUP": q.shape[2] // k.shape[2], "tf32": precision == "tf32"}
    flags = {"padding": key_padding_mask is not None, "packed": cu_seqlens is not None, "window": window > 0, "causal": causal}
    return tuning.lookup(kernel, config, q, sizes, **widths, **flags, **({"rotated": rotated} if rotated else {}))
