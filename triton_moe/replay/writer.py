"""From what a Recorder saw to a function. See NOTE [Slabs]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import common
from .layout import Address, Kept, Layout, Operand, Place, storage

if TYPE_CHECKING:
    from .recorder import Recorder

SMALL = 1 << 20  # bytes
ALIGNMENT = 512  # of what lies in a slab, as torch's allocator would have it


class Recording:
    """A function in source, and what its names stand for."""

    def __init__(self, name: str, source: str, recorder: Recorder, layout: Layout):
        names = recorder.names
        exec(compile(source, f"<replay of {name}>", "exec"), names)
        self.run, self.source, self.layout, self.device = names["run"], source, layout, recorder.device
        self.operates = recorder.operates
        self.together = recorder.together  # of those given, which begin so many bytes after which other

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
        self.lies: dict[int, tuple[str, int]] = {}  # slots: in which slab, how many bytes from where it begins
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
        found: dict[Place, tuple[int, str]] = {}
        holders: list[Place] = []
        places: list[Place | Tensor | None] = []
        slab = None
        for place in self.kept:
            if place is None or place.slot in self.r.constants:
                places.append(place if place is None else self.r.constants[place.slot])
                continue
            name, start = self.lies.get(place.slot, ("", 0))
            if name:
                holder, offset = self.slabs[name], start + place.offset
            elif place.slot >= self.r.given and place.slot in self.r.dense:
                holder, offset = self.r.wholes[place.slot], place.offset
            else:  # a hook on saved tensors shall not find more of what was given than this
                holder, offset = place, 0
            if holder not in found:
                found[holder] = len(holders), name or self.tensor(holder)
                slab = len(holders) if name else slab
                holders.append(holder._replace(slot=len(holders), offset=0))
            places.append(place._replace(slot=found[holder][0], offset=offset))
        return [text for _, text in found.values()], Layout(holders, places, slab, self.r.device)

    def recording(self, name: str) -> Recording:
        r = self.r
        addressed = {piece.place.slot for line in r.lines for piece in line if isinstance(piece, Address)} - self.lies.keys()

        def addresses(slots) -> list[str]:
            return [] if common.INTERPRET else [f"at_t{slot} = t{slot}.data_ptr()" for slot in slots if slot in addressed]

        body = [f"{', '.join(f't{slot}' for slot in range(r.given))}, = given"]
        body += addresses([*range(r.given), *r.constants])
        for slab, place in self.slabs.items():
            body += [self.empty(slab, place), f"at_{slab} = {slab}.data_ptr()"]
        returned = {place.slot for place in (*self.outputs, *self.kept) if place is not None}
        remain = returned | r.constants.keys() | self.lies.keys() | set(range(r.given))
        for i in range(len(r.lines) + 1):
            made = [slot for slot, at in r.allocated.items() if at == i and slot not in self.lies]
            made = [slot for slot in made if slot in self.used or slot in returned]
            body += [self.empty(f"t{slot}", r.wholes[slot]) for slot in made] + addresses(made)
            if i == len(r.lines):
                break
            body.append("".join(map(self.text, r.lines[i])))
            made = [slot for slot, at in r.computed.items() if at == i]
            body += addresses(made)
            over = {slot for slot in made if slot not in self.used} | {slot for slot, at in self.used.items() if at[-1] == i}
            body += [f"t{slot} = None" for slot in sorted(over - remain)]
        results = {place: f"out{i}" for i, place in enumerate(self.outputs) if place is not None}
        body += [f"{result} = {self.tensor(place)}" for place, result in results.items()]
        holders, layout = self.holders()
        outputs = ["None" if place is None else results[place] for place in self.outputs]
        body.append(f"return ({', '.join([*outputs, ''])}), ({', '.join([*holders, ''])})")
        return Recording(name, "\n    ".join(["def run(given, stream):", *body]), r, layout)


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
