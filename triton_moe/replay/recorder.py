"""Runs a composition, and writes down what it does."""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import common
from .layout import NOTHING, Address, Kept, Operand, Piece, Place, storage, view
from .writer import Recording, Writer

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class Unreplayable(Exception):
    """Something of which its tensors' shapes do not tell what it does."""


class Recorder(TorchDispatchMode):
    """Runs everything, and writes it down."""

    def __init__(self, tensors, device: torch.device):
        super().__init__()
        self.thread = threading.get_ident()
        self.device, self.given, self.slots = device, len(tensors), len(tensors)
        self.where: dict[int, int] = {}  # of a storage: its slot
        self.others: dict[tuple[int, int], int] = {}  # of a storage given in several dtypes, and an element's size: a slot
        self.alive: list[StorageWeakRef] = []  # so that no address of a storage comes twice
        self.wholes: dict[int, Place] = {}  # of a slot
        self.starts: dict[int, int] = {}  # of a slot: its storage offset, in bytes
        self.dense: set[int] = set()  # slots whose tensor is all of its storage
        self.lines: list[list[Piece]] = []
        self.allocated: dict[int, int] = {}  # slots: before which line
        self.computed: dict[int, int] = {}  # slots: in which line
        self.slab: int | None = None  # the slot of one, as which it may be viewed in any dtype
        self.names: dict[str, Any] = {"view": view, "empty_strided": torch.empty_strided, "device": device}
        self.bound: dict[int, str] = {}
        self.constants: dict[int, Tensor] = {}  # slots: of `common.constants`
        self.operates = False  # with operators of torch
        self.together: list[tuple[int, int, int]] = []
        for slot, t in enumerate(tensors):
            if t is None:
                continue
            if storage(t) in self.where:
                first = self.where[storage(t)]
                if not tensors[first].numel():
                    raise Unreplayable("an empty tensor, which has no address, before another of its storage")
                if t.numel():
                    self.together.append((first, slot, t.data_ptr() - tensors[first].data_ptr()))
                if (storage(t), t.element_size()) not in self.others and t.element_size() != tensors[first].element_size():
                    self.others[storage(t), t.element_size()] = slot
                    self.whole(slot, t)
                continue
            self.know(slot, t)

    # ---- tensors

    def know(self, slot: int, t: Tensor) -> None:
        self.alive.append(StorageWeakRef(t.untyped_storage()))
        self.where[storage(t)] = slot
        self.whole(slot, t)
        if t.numel() * t.element_size() == t.untyped_storage().nbytes():
            self.dense.add(slot)

    def whole(self, slot: int, t: Tensor) -> None:
        self.wholes[slot] = Place(slot, 0, t.dtype, tuple(t.shape), tuple(t.stride()))
        self.starts[slot] = int(t.storage_offset()) * t.element_size()

    def new(self, t: Tensor) -> int:
        slot = self.slots
        self.slots += 1
        self.know(slot, t)
        return slot

    def slot_of(self, t: Tensor) -> int | None:
        slot = self.others.get((storage(t), t.element_size()), self.where.get(storage(t)))
        if slot is None and storage(t) in common.constants:
            slot = self.new(t)
            self.constants[slot] = self.names[f"t{slot}"] = t
        return slot

    def place(self, t: Tensor) -> Place:
        slot = self.slot_of(t)
        if slot is None:
            raise Unreplayable("a tensor that was not given")
        whole, size = self.wholes[slot], t.element_size()
        offset = int(t.storage_offset()) * size - self.starts[slot]
        if (size != whole.dtype.itemsize and slot != self.slab) or t.is_conj() or t.is_neg():
            raise Unreplayable("a view in a dtype of another size")
        return Place(slot, offset, t.dtype, tuple(t.shape), t.stride())

    # ---- lines

    def name(self, value) -> str:
        """What stands for a value that is no tensor."""
        if value is None or type(value) in (bool, int):
            return repr(value)
        if isinstance(value, Tensor):
            raise Unreplayable("a tensor within another argument")
        if id(value) not in self.bound:
            self.bound[id(value)] = f"c{len(self.bound)}"
            self.names[self.bound[id(value)]] = value
        return self.bound[id(value)]

    def argument(self, a) -> list[Piece]:
        if isinstance(a, Tensor):
            return [Operand(self.place(a))]
        if isinstance(a, TensorDescriptor):
            sizes = (self.name(part) for part in (a.shape, a.strides, a.block_shape))
            return [f"{self.name(TensorDescriptor)}(", Operand(self.place(a.base)), f", {', '.join(sizes)})"]
        if isinstance(a, (list, tuple)) and any(isinstance(part, Tensor) for part in a):
            return ["[", *(piece for part in a for piece in (*self.argument(part), ", ")), "]"]
        return [self.name(a)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(t, Tensor) or t is None for t in outputs):
            raise Unreplayable(f"{func} returns no tensor")
        if torch.Tag.dynamic_output_shape in func.tags and not indexes_by_number(func, args):
            raise Unreplayable(f"{func} returns a shape that depends on values")
        copied = any(t is not None and self.slot_of(t) is None for t in outputs)  # a view may have to copy: `contiguous`, `to`
        if func in ALLOCATIONS and result.device == self.device:
            self.allocated[self.new(result)] = len(self.lines)
        elif copied or not (func.is_view or returns_the_same(func, outputs)):
            self.operate(func, args, kwargs, result, outputs)
        return result

    def operate(self, func, args, kwargs, result, outputs) -> None:
        """An operator of torch."""
        given = [("", a) for a in args] + [(f"{name}=", a) for name, a in kwargs.items()]
        pieces = [piece for name, a in given for piece in (name, *self.argument(a), ", ")]
        fresh = {i: self.new(t) for i, t in enumerate(outputs) if t is not None and self.slot_of(t) is None}
        target = "".join(f"t{fresh[i]}, " if i in fresh else "_, " for i in range(len(outputs)))
        if not isinstance(result, (tuple, list)):
            target = target[:-2]
        self.computed |= dict.fromkeys(fresh.values(), len(self.lines))
        self.lines.append([f"{target} = {self.name(func)}(", *pieces, ")"])
        self.operates = True

    def launch(self, started, grid: tuple[int, ...], args) -> None:
        """A kernel, as `common.start` or the interpreter began it."""
        if common.INTERPRET:
            pieces = [piece for a in args for piece in (*self.passed(a, a), ", ")]
            self.lines.append([f"{self.name(started)}([", *pieces, "])"])
            return
        compiled, run, values = started
        x, y, z = *grid, *(1,) * (3 - len(grid))
        before = f"{self.name(run)}({x}, {y}, {z}, stream, {self.name(compiled.function)}, {self.name(compiled.packed_metadata)}"
        pairs = zip((*args, *values[len(args) :]), values, strict=True)
        pieces = [piece for a, value in pairs for piece in (", ", *self.passed(a, value))]
        self.lines.append([f"{before}, None, None, None", *pieces, ")"])

    def passed(self, a, value) -> list[Piece]:
        """To a kernel."""
        if isinstance(a, Tensor):
            return [Address(self.place(a))]
        return self.argument(a) if isinstance(a, TensorDescriptor) else [self.name(value)]

    def finish(self, name: str, result: tuple, shown: int | None) -> Recording:
        places = [None if t is None else self.place(t) for t in result]
        shown = len(places) if shown is None else shown
        parts = (place for place in places[shown:] if place is not None and place != self.wholes[place.slot])
        if any(place.slot in self.constants for place in parts):
            raise Unreplayable("a part of a constant, to be kept")
        return Writer(self, places[:shown], places[shown:]).recording(name)


def returns_the_same(func, outputs) -> bool:
    """As a view does that is not called one, like `_unsafe_view`; where no output is new."""
    return not func._schema.is_mutable and any(t is not None for t in outputs)


def indexes_by_number(func, args) -> bool:
    """x[i], whose shape is known; not x[mask]."""
    masks = (torch.bool, torch.uint8)
    return func is aten.index.Tensor and all(i is None or i.dtype not in masks for i in args[1])


def record(function, tensors, constants, device, shown=None, kept: Kept = NOTHING) -> tuple[tuple, Recording | None]:
    """-> the function's result, and its recording if there can be one. `kept`: what comes after the tensors."""
    flat = (*tensors, *kept.flat())
    try:
        common.recorder = recorder = Recorder((*tensors, *kept.tensors), device)
        if kept.layout is not None and kept.layout.slab is not None:
            recorder.slab = len(tensors) + kept.layout.slab
        with recorder:
            result = function(flat, *constants)
        return result, recorder.finish(function.__name__, result, shown)
    except Unreplayable:
        pass
    finally:
        common.recorder = None
    return function(flat, *constants), None  # here, where nothing of the first attempt is alive
