"""The oracle: every operation written out plainly, slow on purpose.

Each file gives, per operation, a NumPy float64 forward (`<op>_numpy`, loops in plain sight) and a PyTorch twin (`<op>`)
whose autograd gives the gradients. The two are separate formulations of one contract. A float64 twin is the truth; the
same twin on float32, float16 or bfloat16 tensors shows what error the number format itself costs.
"""

from .attention import attention, attention_numpy
from .gating import Routing, gating, gating_numpy, philox_uniform, select, select_numpy, wide
from .layers import (
    entropy_regularizer,
    entropy_regularizer_numpy,
    sigma_moe,
    sigma_moe_numpy,
    switchall,
    switchall_numpy,
    switchhead,
    switchhead_numpy,
)
from .position import XL, RoPE, rope, rope_numpy, sinusoids, sinusoids_numpy
from .projection import output_projection, output_projection_numpy, value_projection, value_projection_numpy

__all__ = [
    "XL",
    "RoPE",
    "Routing",
    "attention",
    "attention_numpy",
    "entropy_regularizer",
    "entropy_regularizer_numpy",
    "gating",
    "gating_numpy",
    "output_projection",
    "output_projection_numpy",
    "philox_uniform",
    "rope",
    "rope_numpy",
    "select",
    "select_numpy",
    "sigma_moe",
    "sigma_moe_numpy",
    "sinusoids",
    "sinusoids_numpy",
    "switchall",
    "switchall_numpy",
    "switchhead",
    "switchhead_numpy",
    "value_projection",
    "value_projection_numpy",
    "wide",
]
