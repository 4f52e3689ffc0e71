"""The groups of rows, by name: called with the device and --full."""

from collections.abc import Callable

from .attention import attention_rows
from .gating import gating_rows
from .layers import layer_rows
from .mlp import mlp_rows
from .models import model_rows
from .projection import projection_rows
from .row import Row

GROUPS: dict[str, Callable[[str, bool], list[Row]]] = {
    "gating": gating_rows,
    "projection": projection_rows,
    "mlp": mlp_rows,
    "attention": attention_rows,
    "layers": layer_rows,
    "model": model_rows,
}
