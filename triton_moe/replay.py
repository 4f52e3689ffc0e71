"""What a composition of kernels did, done again without its Python.

NOTE [Replay]
    A layer is a dozen launches chosen by several hundred lines of Python: shapes, strides, configurations, grids. All of it
    follows from the shapes, strides, dtypes and alignment of the tensors it is given, and from its constants. So at the third
    call with the same ones `replayed` writes down what happens (allocations, compiled kernels, operators of torch, views), and
    from then on does just that, with new tensors.
    It is no cache of results: nothing computed outlives its call. A composition that reads a tensor's values cannot be written
    down, and runs as it is, like everything under torch.compile, in the interpreter, or with tensors of a subclass.
"""

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .kernels import common

RECORDINGS = 256  # kept; the oldest goes first
CALLS_BEFORE = 2  # with the same arguments: the first compiles

_recordings: OrderedDict[tuple, "Recording | None"] = OrderedDict()
_seen: Counter[tuple] = Counter()
_lock = threading.RLock()

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


def replayed(function: Callable[..., tuple]) -> Callable[..., tuple]:
    """`function`(tensors, *constants) -> a flat tuple, both of tensors and None. Constants are hashable."""

    @functools.wraps(function)
    def call(tensors: tuple[Tensor | None, ...], *constants) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not possible():
            return function(tensors, *constants)
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        signature: list[Any] = [function, constants, autocast, torch.is_inference_mode_enabled()]
        device = None
        for t in tensors:
            if t is None:
                signature.append(None)
                continue
            if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
                return function(tensors, *constants)
            signature += (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)
            device = device or t.device
        if device is None or not here(device):
            return function(tensors, *constants)
        key = (*signature, device.index, tuning.generation)
        recording = _recordings.get(key)
        if recording is not None:
            return recording(tensors) if recording.fits(tensors) else function(tensors, *constants)
        if key in _recordings or not _lock.acquire(blocking=False):  # it has none; or another thread makes one
            return function(tensors, *constants)
        try:
            return called_again(key, function, tensors, constants, device)
        finally:
            _lock.release()

    return call


def called_again(key, function, tensors, constants, device) -> tuple[Tensor | None, ...]:
    _seen[key] += 1
    if _seen[key] <= CALLS_BEFORE:
        if len(_seen) > 16 * RECORDINGS:  # lengths that never come again
            _seen.clear()
        return function(tensors, *constants)
    del _seen[key]
    result, _recordings[key] = record(function, tensors, constants, device)
    while len(_recordings) > RECORDINGS:
        _recordings.popitem(last=False)
    return result


def remembered(check: Callable) -> Callable:
    """A check whose answer, never None, follows from the shapes, dtypes and devices of its tensors, its other arguments, and
    torch's modes: what passed once is answered from memory."""
    passed: dict[tuple, Any] = {}

    @functools.wraps(check)
    def call(*args, **named):
        if torch.compiler.is_compiling():
            return check(*args, **named)
        try:
            key = (facts(args), *named, facts(tuple(named.values())), torch.is_grad_enabled(), *modes())
            answer = passed.get(key)
        except TypeError:  # something that cannot be a key: the check will say more
            return check(*args, **named)
        if answer is not None:
            return answer
        if len(passed) >= RECORDINGS:
            passed.clear()
        passed[key] = answer = check(*args, **named)
        return answer

    return call


def facts(value):
    """What a check may ask of an argument; that 1 is not True is part of it."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
            raise TypeError("a tensor that may be anything")
        return value.shape, value.dtype, value.device
    if isinstance(value, tuple):
        return type(value), *[facts(part) for part in value]
    return type(value), value


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


class Unreplayable(Exception):
    """Something of which its tensors' shapes do not tell what it does."""


class Recording:
    """Slots hold tensors: first those given, then those made. A step fills slots or writes to what is in them."""

    def __init__(self, given: int, device: torch.device):
        self.given, self.slots, self.device = given, given, device
        self.steps: list[Callable] = []
        self.outputs: list[tuple | None] = []
        self.together: list[tuple[int, int, int]] = []  # of those given, which begin so many bytes after which other
        self.constants: list[tuple[int, Tensor]] = []

    def fits(self, tensors) -> bool:
        return all(
            tensors[b].data_ptr() - tensors[a].data_ptr() == distance and storage(tensors[a]) == storage(tensors[b])
            for a, b, distance in self.together
        )

    def __call__(self, tensors) -> tuple[Tensor | None, ...]:
        more = self.slots - self.given
        slots = [*tensors, *[None] * more]
        addresses = [0 if t is None else t.data_ptr() for t in tensors] + [0] * more
        for slot, t in self.constants:
            slots[slot], addresses[slot] = t, t.data_ptr()
        stream = 0 if common.INTERPRET else common.current_stream()(self.device.index)
        autocast = torch.is_autocast_enabled(self.device.type)  # what it did is among the steps
        torch.set_autocast_enabled(self.device.type, False)
        try:
            for step in self.steps:
                step(slots, addresses, stream)
        finally:
            torch.set_autocast_enabled(self.device.type, autocast)
        made = {spec: view(slots, spec) for spec in set(self.outputs) if spec is not None}
        return tuple(None if spec is None else made[spec] for spec in self.outputs)


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def view(slots: list, spec: tuple) -> Tensor:
    """spec: a slot; or a slot, a dtype of the same size, a shape, strides, and elements from where the slot's tensor begins."""
    if len(spec) == 1:
        return slots[spec[0]]
    slot, dtype, shape, stride, offset = spec
    t = slots[slot]
    if t.dtype != dtype:
        t = t.view(dtype)
    return t.as_strided(shape, stride, t.storage_offset() + offset)


class Recorder(TorchDispatchMode):
    """Runs everything, and writes it down."""

    def __init__(self, tensors, device: torch.device):
        super().__init__()
        self.thread = threading.get_ident()
        self.recording = Recording(len(tensors), device)
        self.where: dict[int, int] = {}  # of a storage: its slot
        self.alive: list[StorageWeakRef] = []  # so that no address of a storage comes twice
        self.bases: dict[int, tuple] = {}  # of a slot: dtype, shape, strides, storage offset
        self.last: dict[int, int] = {}  # of a slot: the last step that uses it
        for slot, t in enumerate(tensors):
            if t is None:
                continue
            if storage(t) in self.where:
                first = self.where[storage(t)]
                if not tensors[first].numel():
                    raise Unreplayable("an empty tensor, which has no address, before another of its storage")
                self.recording.together.append((first, slot, t.data_ptr() - tensors[first].data_ptr()))
                continue
            self.know(slot, t)

    def know(self, slot: int, t: Tensor) -> None:
        self.alive.append(StorageWeakRef(t.untyped_storage()))
        self.where[storage(t)] = slot
        self.bases[slot] = t.dtype, t.shape, t.stride(), t.storage_offset()

    def new(self, t: Tensor) -> int:
        slot = self.recording.slots
        self.recording.slots += 1
        self.know(slot, t)
        return slot

    def slot_of(self, t: Tensor) -> int | None:
        return self.where.get(storage(t))

    def spec(self, t: Tensor) -> tuple:
        slot = self.slot_of(t)
        if slot is None and storage(t) in common.constants:
            slot = self.new(t)
            self.recording.constants.append((slot, t))
        if slot is None:
            raise Unreplayable("a tensor that was not given")
        self.last[slot] = len(self.recording.steps)
        dtype, shape, stride, offset = self.bases[slot]
        if t.dtype.itemsize != dtype.itemsize or t.is_conj() or t.is_neg():
            raise Unreplayable("a view in a dtype of another size")
        if t.dtype == dtype and t.shape == shape and t.stride() == stride and t.storage_offset() == offset:
            return (slot,)
        return slot, t.dtype, tuple(t.shape), t.stride(), t.storage_offset() - offset

    def kept(self, a) -> Callable[[list], Any]:
        """An argument as a function of the slots, which keeps no tensor."""
        if isinstance(a, Tensor):
            spec = self.spec(a)
            return lambda slots: view(slots, spec)
        if isinstance(a, TensorDescriptor):
            base, sizes = self.spec(a.base), (a.shape, a.strides, a.block_shape)
            return lambda slots: TensorDescriptor(view(slots, base), *sizes)
        if isinstance(a, (list, tuple)) and any(isinstance(part, Tensor) for part in a):
            parts = [self.kept(part) for part in a]
            return lambda slots: [part(slots) for part in parts]
        return lambda slots: a

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(t, Tensor) or t is None for t in outputs):
            raise Unreplayable(f"{func} returns no tensor")
        if torch.Tag.dynamic_output_shape in func.tags and not indexes_by_number(func, args):
            raise Unreplayable(f"{func} returns a shape that depends on values")
        copied = any(t is not None and self.slot_of(t) is None for t in outputs)  # a view may have to copy: `contiguous`, `to`
        if func in ALLOCATIONS:
            self.allocate(result)
        elif not func.is_view or copied:
            self.operate(func, args, kwargs, outputs)
        return result

    def allocate(self, t: Tensor) -> None:
        slot, shape, stride, dtype, device = self.new(t), tuple(t.shape), t.stride(), t.dtype, t.device

        def step(slots, addresses, stream):
            slots[slot] = made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            addresses[slot] = made.data_ptr()

        self.recording.steps.append(step)

    def operate(self, func, args, kwargs, outputs) -> None:
        """An operator of torch, with views made anew."""

        positional = [self.kept(a) for a in args]
        named = {name: self.kept(a) for name, a in kwargs.items()}
        fresh = [(i, self.new(t)) for i, t in enumerate(outputs) if t is not None and self.slot_of(t) is None]

        def step(slots, addresses, stream):
            result = func(*[a(slots) for a in positional], **{name: a(slots) for name, a in named.items()})
            for i, slot in fresh:
                slots[slot] = made = result[i] if isinstance(result, (tuple, list)) else result
                addresses[slot] = made.data_ptr()

        self.recording.steps.append(step)

    def launch(self, started, grid: tuple[int, ...], args) -> None:
        """A kernel, as `common.start` or the interpreter began it."""
        if common.INTERPRET:
            kept = [self.kept(a) for a in args]
            self.recording.steps.append(lambda slots, addresses, stream: started([a(slots) for a in kept]))
            return
        compiled, run, values = started
        pointers, descriptors = [], []
        for i, a in enumerate(args):
            if isinstance(a, TensorDescriptor):
                descriptors.append((i, self.kept(a)))
                values[i] = None  # it would keep its tensor
            elif isinstance(a, Tensor):
                slot, *place = self.spec(a)
                pointers.append((i, slot, place[3] * a.element_size() if place else 0))
        x, y, z = *grid, *(1,) * (3 - len(grid))
        function, metadata = compiled.function, compiled.packed_metadata

        def step(slots, addresses, stream):
            these = values.copy()  # another thread may be here too
            for i, slot, offset in pointers:
                these[i] = addresses[slot] + offset
            for i, descriptor in descriptors:
                these[i] = descriptor(slots)
            run(x, y, z, stream, function, metadata, None, None, None, *these)

        self.recording.steps.append(step)

    def finish(self, result) -> Recording:
        recording = self.recording
        recording.outputs = [None if t is None else self.spec(t) for t in result]
        steps = recording.steps
        for slot, last in self.last.items():
            if recording.given <= slot and last < len(steps):
                steps[last] = released(steps[last], slot)
        return recording


def indexes_by_number(func, args) -> bool:
    """x[i], whose shape is known; not x[mask]."""
    masks = (torch.bool, torch.uint8)
    return func is aten.index.Tensor and all(i is None or i.dtype not in masks for i in args[1])


def released(step: Callable, slot: int) -> Callable:
    """The step, after which nothing needs the slot."""

    def last(slots, addresses, stream):
        step(slots, addresses, stream)
        slots[slot] = None

    return last


def record(function, tensors, constants, device) -> tuple[tuple, Recording | None]:
    """-> the function's result, and its recording if there can be one."""
    try:
        common.recorder = recorder = Recorder(tensors, device)
        with recorder:
            result = function(tensors, *constants)
        return result, recorder.finish(result)
    except Unreplayable:
        pass
    finally:
        common.recorder = None
    return function(tensors, *constants), None  # here, where nothing of the first attempt is alive
