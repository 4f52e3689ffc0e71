"""What a composition keeps for its backward pass: some tensors, in fewer that hold them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor lies: so many bytes after the beginning of the one in a slot."""

    slot: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


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


Piece = str | Address | Operand


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Layout:
    """What a composition kept, in the few tensors that hold it. Equal to itself alone, so that it can be part of a key."""

    def __init__(
        self, holders: list[Place], places: list[Place | Tensor | None], slab: int | None, device: torch.device, recorded=True
    ):
        self.holders, self.slab, self.device = holders, slab, device
        self.recorded = recorded  # a recording's, and so the same at each of its calls
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

    def restored(self, holders: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """As they were: a hook on a saved tensor may give another back, with the same values and other strides."""
        if all(self.as_it_was(i, t) for i, t in enumerate(holders)):
            return holders
        return tuple(t if self.as_it_was(i, t) else self.copied(i, t) for i, t in enumerate(holders))

    def as_it_was(self, i: int, t: Tensor) -> bool:
        _, _, dtype, shape, stride = self.holders[i]
        same = t.shape == shape and t.stride() == stride and t.dtype == dtype and t.device == self.device
        return same and (i != self.slab or t.data_ptr() % 16 == 0)  # as kernels were told

    def copied(self, i: int, t: Tensor) -> Tensor:
        _, _, dtype, shape, stride = self.holders[i]
        made = rest = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
        for axis, step in enumerate(stride):
            if step == 0:  # expanded: all of it is one element
                rest, t = rest.narrow(axis, 0, min(1, shape[axis])), t.narrow(axis, 0, min(1, shape[axis]))
        rest.copy_(t)
        return made


class Kept(NamedTuple):
    """What one composition keeps for another: the tensors themselves, or those that hold them."""

    tensors: tuple[Tensor | None, ...] = ()
    layout: Layout | None = None

    def flat(self) -> tuple[Any, ...]:
        return self.tensors if self.layout is None else self.layout.views(self.layout.restored(self.tensors))

    def to_save(self) -> "Kept":
        """By autograd: where hooks pack what is saved, the tensors themselves, as checkpointing wants as many each time."""
        if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return self
        flat = self.flat()
        holders = [Place(i, 0, t.dtype, tuple(t.shape), t.stride()) for i, t in enumerate(t for t in flat if t is not None)]
        of_each = iter(holders)
        places: list[Place | Tensor | None] = [None if t is None else next(of_each) for t in flat]
        saved = tuple(t for t in flat if t is not None)
        return Kept(saved, Layout(holders, places, None, saved[0].device, recorded=False))


NOTHING = Kept()
