"""What the benchmark compares: a row, its rivals, their targets."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# What is timed. The backward is the difference of the two before it; the host's time is that of starting a forward pass.
FORWARD, BOTH, BACKWARD, HOST, TRAINING = "forward", "forward+backward", "backward", "host time", "training step"

Inputs = dict[str, Any]


@dataclass
class Task:
    """A differentiable computation to time: its output, and the tensors that its gradient goes to."""

    call: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # around both directions
    held: Callable[[], list[torch.Tensor]] = list  # of a training step: what stays in memory between two


Mix = list[tuple[float, Task]]  # a rival's time may be put together from several, each with its share


@dataclass(frozen=True)
class Target:
    """Bounds on our time (or memory) over the rival's: what must be reached, and what is aimed for."""

    must: float
    aim: float

    def verdict(self, ratio: float) -> str:
        reached = "aim reached" if ratio <= self.aim else "must reached" if ratio <= self.must else "must MISSED"
        return f"{reached} (must {self.must:.3g}, aim {self.aim:.3g})"


@dataclass(frozen=True)
class Rival:
    name: str
    build: Callable[[Inputs], Task | Mix]  # ImportError where it is not installed
    targets: dict[str, Target] = field(default_factory=dict)  # by what is timed
    memory: Target | None = None
    compiled: bool = False  # by torch.compile; then ours is too
    graph: bool = True  # False: it synchronises with the host, so nothing captures it
    compiles: bool = False  # other things than ours, when first run


@dataclass(frozen=True)
class Row:
    """One computation. Tensors in `inputs` that require gradients are its leaves; those in `batched` have the batch in front."""

    name: str
    inputs: Callable[[], Inputs]
    ours: Callable[[Inputs], torch.Tensor]  # [B, ...]
    reference: Callable[[Inputs, Any], torch.Tensor]  # [1, ...], following that choice
    batched: tuple[str, ...]
    flops: dict[str, float]  # useful ones, by what is timed; BACKWARD after FORWARD and BOTH
    rivals: tuple[Rival, ...]
    autocast: bool = False  # bfloat16 over float32 inputs
    experts: Callable[[Inputs], Any] = lambda inputs: None  # what ours chooses, given the inputs cut to their last sequence
    milliseconds: dict[str, Target] = field(default_factory=dict)  # bounds on our time itself
    step: Callable[[Inputs], Task] | None = None  # our training step of a whole model; `ours` is then one layer, to be checked
    tokens: int = 0  # in such a step
    best: dict[str, Target] = field(default_factory=dict)  # bounds over the fastest rival
    packed: int | None = None  # the batch is one row of packed sequences, the last of this length
    kernels: str = ""  # rows with the same name here share kernels, and so the process that compiles them


def leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}


def task(row: Row, inputs: Inputs, function: Callable[[Inputs], torch.Tensor] | None = None) -> Task:
    """Our side of a row."""
    function = function or row.ours
    return Task(lambda: function(inputs), list(leaves(inputs).values()))


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)
