"""What a composition of kernels did, done again without its Python.

NOTE [Replay]
    A layer is a dozen launches chosen by several hundred lines of Python: shapes, strides, configurations, grids. All of it
    follows from the shapes, strides, dtypes and alignment of the tensors it is given, and from its constants. So at the third
    call with the same ones `replayed` writes down what happens (allocations, compiled kernels, operators of torch, views) as the
    source of a function, one line each (`Recording.source`), and from then on calls that, with new tensors.
    It is no cache of results: nothing computed outlives its call. A composition that reads a tensor's values cannot be written
    down, and runs as it is, like everything under torch.compile, in the interpreter, or with tensors of a subclass.

NOTE [Slabs]
    A tensor costs the host two or three microseconds where it is made, and as much again where a backward pass is handed it. But
    kernels take addresses. So small results that only kernels read are no tensors in a recording: they lie in one, the slab, at
    offsets that follow from when each is first and last used. Those kept for a backward pass lie in a second slab, which is
    one tensor to save; a `Layout` says what is where, and stands for all of it in the key of the backward pass. What the caller
    sees, what an operator of torch reads, and what is larger than SMALL (whose memory should be free as soon as it can be) is a
    tensor of its own.
"""

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..kernels import common
from .layout import NOTHING, Kept
from .recorder import record
from .writer import Recording

RECORDINGS = 256  # kept; the oldest goes first
CALLS_BEFORE = 2  # with the same arguments: the first compiles

_recordings: OrderedDict[tuple, Recording | None] = OrderedDict()
_seen: Counter[tuple] = Counter()
_lock = threading.RLock()


def replayed(function: Callable[..., tuple], shown: int | None = None) -> Callable[..., tuple]:
    """`function`(tensors, *constants) -> a flat tuple, both of tensors and None. Constants are hashable.

    With `shown`, only so many of the results are for the caller to look at: the others come as one Kept, which another such
    function takes as `kept`, to have its tensors after its own.
    """

    def arranged(result: tuple) -> tuple:
        return result if shown is None else (*result[:shown], Kept(tuple(result[shown:])))

    def plain(tensors, constants, kept: Kept) -> tuple:
        return arranged(function((*tensors, *kept.flat()), *constants))

    @functools.wraps(function)
    def call(tensors: tuple[Tensor | None, ...], *constants, kept: Kept = NOTHING) -> tuple:
        if torch.compiler.is_compiling() or not possible():
            return plain(tensors, constants, kept)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        if kept.layout is not None and not kept.layout.recorded:
            kept = Kept(kept.flat())
        layout = kept.layout
        key: list[Any] = [function, constants, layout, autocast, torch.is_inference_mode_enabled(), tuning.generation]
        if layout is not None:
            kept = Kept(layout.restored(kept.tensors), layout)
        given = (*tensors, *kept.tensors)
        device = None
        for t in given:
            if t is None:
                key.append(None)
                continue
            if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
                return plain(tensors, constants, kept)
            key += (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)
            device = device or t.device
        if device is None or not here(device):
            return plain(tensors, constants, kept)
        key.append(device.index)
        known = tuple(key)
        recording = _recordings.get(known)
        if recording is not None and recording.fits(given):
            outputs, keeps = recording(given)
            return outputs if shown is None else (*outputs, keeps)
        if known in _recordings or not _lock.acquire(blocking=False):  # it has none that fits; or another thread makes one
            return plain(tensors, constants, kept)
        try:
            _seen[known] += 1
            if _seen[known] <= CALLS_BEFORE and layout is None:  # what kept it was recorded: this is not the first call
                if len(_seen) > 16 * RECORDINGS:  # lengths that never come again
                    _seen.clear()
                return plain(tensors, constants, kept)
            del _seen[known]
            result, recording = record(function, tensors, constants, device, shown, kept)
            _recordings[known] = recording
            while len(_recordings) > RECORDINGS:
                _recordings.popitem(last=False)
        finally:
            _lock.release()
        if recording is None or shown is None:
            return arranged(result)
        return *result[:shown], Kept(recording.layout.packed(result[shown:]), recording.layout)

    return call


def remembered(check: Callable) -> Callable:
    """A check whose answer, never None, follows from the shapes, dtypes and devices of its tensors, its other arguments, and
    torch's modes: what passed once is answered from memory."""
    passed: dict[tuple, Any] = {}

    @functools.wraps(check)
    def call(*args, **named):
        if torch.compiler.is_compiling():
            return check(*args, **named)
        key: list[Any] = [torch.is_grad_enabled(), *modes(), *named]
        try:
            facts(args, key)
            facts(named.values(), key)
            known = tuple(key)
            answer = passed.get(known)
        except TypeError:  # something that cannot be a key: the check will say more
            return check(*args, **named)
        if answer is not None:
            return answer
        if len(passed) >= RECORDINGS:
            passed.clear()
        passed[known] = answer = check(*args, **named)
        return answer

    return call


def facts(values, key: list) -> None:
    """Adds to a key what a check may ask of its arguments; that 1 is not True is part of it."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            key += (value.shape, value.dtype, value.device)
        elif isinstance(value, Tensor):
            raise TypeError("a tensor that may be anything")
        elif isinstance(value, tuple):
            key += (kind, len(value))
            facts(value, key)
        else:
            key += (kind, value)


def modes() -> tuple:
    """Of torch, for computations on a GPU or in the interpreter."""
    device = "cpu" if common.INTERPRET else "cuda"
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, common.input_precision(torch.float32)


def possible() -> bool:
    """Not where something else watches launches or operators."""
    if common.INTERPRET or torch.version.hip:  # whose kernels are chosen by more than `common.start` knows
        return False
    watched = common.on_launch is not None or common.recorder is not None or tuning.override is not None or common.hooked()
    return not (watched or torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack())


def here(device: torch.device) -> bool:
    """Whether launches go there as things are."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()
