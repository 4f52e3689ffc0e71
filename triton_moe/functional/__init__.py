"""The public functions. Each checks its arguments, composes the kernels, and is differentiable once.

Letters: B sequences, T queries, S keys, N = B*T tokens, D model width, H heads, E experts per head, TOP_K chosen experts, P head
width, G width of one MLP expert. Formulas: kernels/gating/, projection.py, attention/, position.py.

NOTE [Composition]
    Every layer is two plain functions, `*_forward` -> (outputs, saved) and `*_backward`(gradients, saved), which call launchers
    and torch's GEMMs and know nothing of autograd. The differentiable function wraps that pair in one autograd.Function, so both
    are the same computation. Tensors a backward needs are in `Saved.tensors`, everything else in `Saved.config`.

NOTE [Compute dtype]
    Under torch.autocast every floating input is cast to the autocast dtype first; otherwise all share one dtype. Gradients come
    back in each input's own dtype. Gates, logits and log-sum-exps are float32 always.

NOTE [Head widths]
    Odd head widths cost more than they save: rows that split a sector of memory load slowly, and tiles are powers of two. So
    16-bit heads of a layer are padded with channels of zeros to what the attention kernels' tiles span, one power of two or two:
    100 to 128, 76 to 64 + 16, 132 to 128 + 16. That changes neither scores nor outputs; the scale and the rotated channels are
    those of the width itself. On an H200 (bfloat16, N = 32768, forward and backward) a layer of P 76 takes 1106 us at T 1024 and
    1435 at T 4096 with 80 channels, 1137 and 1482 with 96; P 132 2406 and 3058 with 144 channels, 2469 and 3165 with 160; but P
    100 2014 and 2942 with 112 channels, and 1938 and 2709 with 128: what the projections win there (35 us) attention loses twice,
    as a tile of 128 channels over rows of 112, and more so in parts of 64, 32 and 16. The products of queries and keys alone
    have the width itself where that is much less (`_product_width` in _switchhead.py).

NOTE [Streams]
    Random masks are a function of (seed, token, column, stream); the stream tells the masks of one layer apart.
"""

from ._attention import _check_rope as _check_rope  # the names with "as" are for nn, tests and benchmark
from ._attention import attention
from ._gating import gating
from ._moe import entropy_regularizer, sigma_moe
from ._projection import output_projection, value_projection
from ._switchall import _chosen_experts as _chosen_experts
from ._switchall import switchall, switchall_backward, switchall_forward
from ._switchhead import switchhead, switchhead_backward, switchhead_forward
from ._types import ACTIVATIONS as ACTIVATIONS
from ._types import MAX_HEAD_WIDTH as MAX_HEAD_WIDTH
from ._types import MODES as MODES
from ._types import (
    XL,
    RoPE,
    Routing,
    Saved,
    SigmaMoEWeights,
    SwitchAllGradients,
    SwitchAllWeights,
    SwitchHeadGradients,
    SwitchHeadWeights,
)

__all__ = [
    "XL",
    "RoPE",
    "Routing",
    "Saved",
    "SigmaMoEWeights",
    "SwitchAllGradients",
    "SwitchAllWeights",
    "SwitchHeadGradients",
    "SwitchHeadWeights",
    "attention",
    "entropy_regularizer",
    "gating",
    "output_projection",
    "sigma_moe",
    "switchall",
    "switchall_backward",
    "switchall_forward",
    "switchhead",
    "switchhead_backward",
    "switchhead_forward",
    "value_projection",
]

for _name in __all__:  # where users find them, and pickles
    globals()[_name].__module__ = __name__
