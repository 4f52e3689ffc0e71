"""sigma-MoE gating: which experts each (token, head) uses, how much, and the orders in which their work is done.

    logits[n,h,e] = sum_d x[n,d] sel[h*E+e,d]                               float32
    experts[n,h,:] = the TOP_K largest logits, in descending order
    weights[n,h,j] = gate(logits[n,h,:])[experts[n,h,j]]                    sigmoid, softmax, or softmax over the chosen

    d logit = d weight * gate * (1 - gate) for a chosen expert, 0 elsewhere (sigmoid);  selection is not differentiated

Csordas, Irie, Schmidhuber 2023 (arXiv 2310.10837), equation 10 and section 5; SwitchHead (arXiv 2312.07987), equations 7 to 9.
A layer may have several gates on the same x, its sides: they are computed in one pass over x.

gate.py makes logits, experts and weights; plan.py sorts the routes, rows and tokens by what was chosen.
"""

from .gate import (
    CONFIGS,
    MAX_EXPERTS,
    SPACE,
    _gating_bwd_kernel,
    _gating_fwd_kernel,
    cast_and_gate,
    gating_backward,
    gating_backward_,
    gating_forward,
)
from .plan import MAX_SIGNATURES, Plan, plan_shapes, routing_plan

__all__ = [
    "CONFIGS",
    "MAX_EXPERTS",
    "MAX_SIGNATURES",
    "SPACE",
    "Plan",
    "_gating_bwd_kernel",
    "_gating_fwd_kernel",
    "cast_and_gate",
    "gating_backward",
    "gating_backward_",
    "gating_forward",
    "plan_shapes",
    "routing_plan",
]
