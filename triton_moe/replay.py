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
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .kernels import common

RECORDINGS = 256  # kept; the oldest goes first
CALLS_BEFORE = 2  # with the same arguments: the first compiles
SMALL = 1 << 20  # bytes
ALIGNMENT = 512  # of what lies in a slab, as torch's allocator would have it

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


class Place(NamedTuple):
    """Where a tensor lies: so many bytes after the beginning of the one in a slot."""

    slot: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Layout:
    """What a composition kept, in the few tensors that hold it. Equal to itself alone, so that it can be part of a key."""

    def __init__(self, holders: list[Place], places: list[Place | Tensor | None], slab: int | None, device: torch.device):
        self.holders, self.slab, self.device = holders, slab, device
        self.places = places  # in holders; a tensor is one of `common.constants`

    def views(self, holders: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        made: dict[Place, Tensor] = {}
        for place in self.places:
            if isinstance(place, Place) and place not in made:
                whole = place == self.holders[place.slot]
                made[place] = holders[place.slot] if whole else view(holders[place.slot], *place[1:])
        return tuple(made[place] if isinstance(place, Place) else place for place in self.places)

    def packed(self, flat: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """The holders of tensors that lie elsewhere."""
        holders: dict[int, Tensor] = {}
        for t, place in zip(flat, self.places, strict=True):
            if t is None or not isinstance(place, Place):
                continue
            i, holder = place.slot, self.holders[place.slot]
            if i == self.slab:
                if i not in holders:
                    holders[i] = torch.empty_strided(holder.shape, holder.stride, dtype=holder.dtype, device=self.device)
                view(holders[i], *place[1:]).copy_(t)
            elif i not in holders:
                holders[i] = t if place == holder else view(t, -place.offset, *holder[2:])
        return tuple(holders[i] for i in range(len(self.holders)))

    def restored(self, holders: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As they were: a hook on saved tensors may give others back, with the same values and other strides."""
        for t, (_, _, dtype, shape, stride) in zip(holders, self.holders, strict=True):
            if t.shape != shape or t.stride() != stride or t.dtype != dtype or t.device != self.device:
                empty = functools.partial(torch.empty_strided, device=self.device)
                return tuple(empty(h.shape, h.stride, dtype=h.dtype).copy_(t) for t, h in zip(holders, self.holders, strict=True))
        return holders


class Kept(NamedTuple):
    """What one composition keeps for another: the tensors themselves, or those that hold them."""

    tensors: tuple[Tensor | None, ...] = ()
    layout: Layout | None = None

    def flat(self) -> tuple[Tensor | None, ...]:
        return self.tensors if self.layout is None else self.layout.views(self.layout.restored(self.tensors))


NOTHING = Kept()


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


class Unreplayable(Exception):
    """Something of which its tensors' shapes do not tell what it does."""


class Recording:
    """A function's source, and what its names stand for."""

    def __init__(self, name: str, source: str, names: dict[str, Any], device: torch.device):
        self.source, self.device = source, device
        exec(compile(source, f"<replay of {name}>", "exec"), names)
        self.run = names["run"]
        self.operates = False  # with operators of torch
        self.together: list[tuple[int, int, int]] = []  # of those given, which begin so many bytes after which other
        self.layout: Layout

    def fits(self, tensors) -> bool:
        return all(
            tensors[b].data_ptr() - tensors[a].data_ptr() == distance and storage(tensors[a]) == storage(tensors[b])
            for a, b, distance in self.together
        )

    def __call__(self, tensors) -> tuple:
        stream = 0 if common.INTERPRET else common.current_stream()(self.device.index)
        autocast = self.operates and torch.is_autocast_enabled(self.device.type)  # what it did is among the lines
        if autocast:
            torch.set_autocast_enabled(self.device.type, False)
        try:
            outputs, holders = self.run(tensors, stream)
        finally:
            if autocast:
                torch.set_autocast_enabled(self.device.type, True)
        return outputs, Kept(holders, self.layout)


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def view(t: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """What lies so many bytes after the beginning of t, which is of a dtype of the same size, or a slab."""
    if t.dtype != dtype:
        t = t.view(dtype)
    return t.as_strided(shape, stride, t.storage_offset() + offset // dtype.itemsize)


class Address(NamedTuple):
    """In a line: what a kernel takes."""

    place: Place


class Operand(NamedTuple):
    """In a line: what an operator of torch takes."""

    place: Place


class Recorder(TorchDispatchMode):
    """Runs everything, and writes it down."""

    def __init__(self, tensors, device: torch.device):
        super().__init__()
        self.thread = threading.get_ident()
        self.device, self.given, self.slots = device, len(tensors), len(tensors)
        self.where: dict[int, int] = {}  # of a storage: its slot
        self.alive: list[StorageWeakRef] = []  # so that no address of a storage comes twice
        self.wholes: dict[int, Place] = {}  # of a slot
        self.starts: dict[int, int] = {}  # of a slot: its storage offset, in bytes
        self.dense: set[int] = set()  # slots whose tensor is all of its storage
        self.lines: list[list[str | Address | Operand]] = []
        self.allocated: dict[int, int] = {}  # slots: before which line
        self.computed: dict[int, int] = {}  # slots: in which line
        self.slab: int | None = None  # the slot of one, as which it may be viewed in any dtype
        self.names: dict[str, Any] = {"view": view, "empty_strided": torch.empty_strided, "device": device}
        self.bound: dict[int, str] = {}
        self.operates = False
        self.together: list[tuple[int, int, int]] = []
        for slot, t in enumerate(tensors):
            if t is None:
                continue
            if storage(t) in self.where:
                first = self.where[storage(t)]
                if not tensors[first].numel():
                    raise Unreplayable("an empty tensor, which has no address, before another of its storage")
                self.together.append((first, slot, t.data_ptr() - tensors[first].data_ptr()))
                continue
            self.know(slot, t)

    # ---- tensors

    def know(self, slot: int, t: Tensor) -> None:
        self.alive.append(StorageWeakRef(t.untyped_storage()))
        self.where[storage(t)] = slot
        self.wholes[slot] = Place(slot, 0, t.dtype, tuple(t.shape), t.stride())
        self.starts[slot] = t.storage_offset() * t.element_size()
        if t.numel() * t.element_size() == t.untyped_storage().nbytes():
            self.dense.add(slot)

    def new(self, t: Tensor) -> int:
        slot = self.slots
        self.slots += 1
        self.know(slot, t)
        return slot

    def slot_of(self, t: Tensor) -> int | None:
        slot = self.where.get(storage(t))
        if slot is None and storage(t) in common.constants:
            slot = self.new(t)
            self.names[f"t{slot}"] = t
        return slot

    def place(self, t: Tensor) -> Place:
        slot = self.slot_of(t)
        if slot is None:
            raise Unreplayable("a tensor that was not given")
        whole, size = self.wholes[slot], t.element_size()
        offset = t.storage_offset() * size - self.starts[slot]
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

    def argument(self, a) -> list[str | Address | Operand]:
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
        elif copied or (not func.is_view and (func._schema.is_mutable or not outputs)):
            self.operate(func, args, kwargs, result, outputs)
        return result

    def operate(self, func, args, kwargs, result, outputs) -> None:
        """An operator of torch."""
        given = [(f"{name}=", a) for name, a in (*(("", a) for a in args), *kwargs.items())]
        fresh = {i: self.new(t) for i, t in enumerate(outputs) if t is not None and self.slot_of(t) is None}
        target = "".join(f"t{fresh[i]}, " if i in fresh else "_, " for i in range(len(outputs)))
        if not isinstance(result, (tuple, list)):
            target = target[:-2]
        pieces = [piece for name, a in given for piece in (name[1:] if name == "=" else name, *self.argument(a), ", ")]
        self.computed |= dict.fromkeys(fresh.values(), len(self.lines))
        self.lines.append([f"{target} = {self.name(func)}(", *pieces, ")"])
        self.operates = True

    def launch(self, started, grid: tuple[int, ...], args) -> None:
        """A kernel, as `common.start` or the interpreter began it."""
        if common.INTERPRET:
            pieces = [piece for a in args for piece in (*self.kernel_argument(a, a), ", ")]
            self.lines.append([f"{self.name(started)}([", *pieces, "])"])
            return
        compiled, run, values = started
        x, y, z = *grid, *(1,) * (3 - len(grid))
        before = f"{self.name(run)}({x}, {y}, {z}, stream, {self.name(compiled.function)}, {self.name(compiled.packed_metadata)}"
        pieces = [
            piece
            for a, value in zip((*args, *values[len(args) :]), values, strict=True)
            for piece in (", ", *self.kernel_argument(a, value))
        ]
        self.lines.append([f"{before}, None, None, None", *pieces, ")"])

    def kernel_argument(self, a, value) -> list[str | Address | Operand]:
        return (
            [Address(self.place(a))]
            if isinstance(a, Tensor)
            else self.argument(a)
            if isinstance(a, TensorDescriptor)
            else [self.name(value)]
        )

    def finish(self, name: str, result: tuple, shown: int | None) -> Recording:
        places = [None if t is None else self.place(t) for t in result]
        shown = len(places) if shown is None else shown
        return Writer(self, places[:shown], places[shown:]).recording(name)


class Writer:
    """Makes a function of a Recorder's lines, which returns `outputs` and what holds `kept`. See NOTE [Slabs]."""

    def __init__(self, recorder: Recorder, outputs: list[Place | None], kept: list[Place | None]):
        self.r, self.outputs, self.kept = recorder, outputs, kept
        self.used: dict[int, list[int]] = {}  # slots: in which lines
        alone = {place.slot for place in outputs if place is not None}
        for i, line in enumerate(recorder.lines):
            for piece in line:
                if not isinstance(piece, str):
                    self.used.setdefault(piece.place.slot, []).append(i)
                    if isinstance(piece, Operand):
                        alone.add(piece.place.slot)
        held = {place.slot for place in kept if place is not None}
        sizes = {slot: self.size(slot) for slot in recorder.allocated if slot not in alone}
        small = [slot for slot, size in sizes.items() if size <= SMALL]
        lives = {slot: (self.used[slot][0], self.used[slot][-1]) for slot in small if slot not in held and slot in self.used}
        forever = {slot: (0, 0) for slot in small if slot in held}
        self.lies: dict[int, tuple[str, int]] = {}  # slots: in which slab, and how many bytes from its beginning
        self.slabs: dict[str, Place] = {}
        for name, slots in (("slab", lives), ("kept", forever)):
            offsets, size = packing([(*life, sizes[slot]) for slot, life in slots.items()])
            self.lies |= {slot: (name, offset) for slot, offset in zip(slots, offsets, strict=True)}
            if slots:
                self.slabs[name] = Place(-1, 0, torch.uint8, (size,), (1,))

    def size(self, slot: int) -> int:
        """In a slab, where only what fills its storage may lie."""
        whole = self.r.wholes[slot]
        size = math.prod(whole.shape) * whole.dtype.itemsize
        return max(1, common.cdiv(size, ALIGNMENT)) * ALIGNMENT if slot in self.r.dense else SMALL + 1

    def tensor(self, place: Place) -> str:
        slot, offset, dtype, shape, stride = place
        if place == self.r.wholes[slot] and slot not in self.lies:
            return f"t{slot}"
        name, start = self.lies.get(slot, (f"t{slot}", 0))
        if dtype == self.r.wholes[slot].dtype and not offset and slot not in self.lies:
            return f"{name}.as_strided({shape}, {stride})"
        return f"view({name}, {start + offset}, {self.r.name(dtype)}, {shape}, {stride})"

    def text(self, piece) -> str:
        if isinstance(piece, str):
            return piece
        if isinstance(piece, Operand) or common.INTERPRET:
            return self.tensor(piece.place)
        name, start = self.lies.get(piece.place.slot, (f"t{piece.place.slot}", 0))
        return f"at_{name} + {start + piece.place.offset}"

    def empty(self, name: str, place: Place) -> str:
        return f"{name} = empty_strided({place.shape}, {place.stride}, dtype={self.r.name(place.dtype)}, device=device)"

    def holders(self) -> tuple[list[str], Layout]:
        """Where the function has what holds the tensors kept, and how they lie in that."""
        found: dict[Place | str, tuple[int, str]] = {}
        holders: list[Place] = []
        places: list[Place | Tensor | None] = []
        for place in self.kept:
            if place is None or f"t{place.slot}" in self.r.names:
                places.append(None if place is None else self.r.names[f"t{place.slot}"])
                continue
            slot, (slab, start) = place.slot, self.lies.get(place.slot, ("", 0))
            if slab:
                holder, offset = self.slabs[slab], start + place.offset
            elif slot >= self.r.given and slot in self.r.dense:
                holder, offset = self.r.wholes[slot], place.offset
            else:  # a hook on saved tensors would move no more of what was given than this
                holder, offset = place, 0
            if holder not in found:
                found[holder] = len(holders), slab or self.tensor(holder)
                holders.append(holder._replace(slot=len(holders), offset=0))
            places.append(place._replace(slot=found[holder][0], offset=offset))
        slab = found.get(self.slabs.get("kept"), (None,))[0]
        return [text for _, text in found.values()], Layout(holders, places, slab, self.r.device)

    def recording(self, name: str) -> Recording:
        r, constants = self.r, {slot for slot in self.r.wholes if f"t{slot}" in self.r.names}
        addressed = {piece.place.slot for line in r.lines for piece in line if isinstance(piece, Address)} - self.lies.keys()
        if common.INTERPRET:
            addressed.clear()
        returned = {place.slot for place in (*self.outputs, *self.kept) if place is not None}
        remain = returned | constants | self.lies.keys() | set(range(r.given))
        body = [f"{', '.join(f't{slot}' for slot in range(r.given))}, = given"]
        body += [
            f"at_t{slot} = t{slot}.data_ptr()" for slot in r.wholes if slot in addressed and (slot < r.given or slot in constants)
        ]
        for slab, place in self.slabs.items():
            body += [self.empty(slab, place), f"at_{slab} = {slab}.data_ptr()"]
        for i, line in enumerate([*r.lines, []]):
            made = [slot for slot, at in r.allocated.items() if at == i and slot not in self.lies]
            made = [slot for slot in made if slot in self.used or slot in returned]
            body += [self.empty(f"t{slot}", r.wholes[slot]) for slot in made]
            body += [f"at_t{slot} = t{slot}.data_ptr()" for slot in made if slot in addressed]
            if not line:
                break
            body.append("".join(map(self.text, line)))
            made = [slot for slot, at in r.computed.items() if at == i]
            body += [f"at_t{slot} = t{slot}.data_ptr()" for slot in made if slot in addressed]
            last = {slot for slot, lines in self.used.items() if lines[-1] == i} | {
                slot for slot in made if slot not in self.used
            }
            body += [f"t{slot} = None" for slot in sorted(last - remain)]
        made_once = {place: f"out{i}" for i, place in enumerate(self.outputs) if place is not None}
        body += [f"{name} = {self.tensor(place)}" for place, name in made_once.items()]
        holders, layout = self.holders()
        outputs = [made_once.get(place, "None") for place in self.outputs]
        body.append(f"return ({', '.join([*outputs, ''])}), ({', '.join([*holders, ''])})")
        source = "\n    ".join(["def run(given, stream):", *body])
        recording = Recording(name, source, r.names, r.device)
        recording.operates, recording.together, recording.layout = r.operates, r.together, layout
        return recording


def packing(lives: list[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Of each (first line, last line, size) its offset, such that none overlaps another of the same time; and what all take.

    The largest first, each where it first fits.
    """
    offsets: dict[int, int] = {}
    for i in sorted(range(len(lives)), key=lambda i: -lives[i][2]):
        first, last, size = lives[i]
        others = [(at, at + lives[j][2]) for j, at in offsets.items() if lives[j][0] <= last and first <= lives[j][1]]
        offset = 0
        for begin, end in sorted(others):
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[i] = offset
    return [offsets[i] for i in range(len(lives))], max((at + lives[i][2] for i, at in offsets.items()), default=0)


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
