"""The note that a conversion leaves on each module that it changed: how to take it back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

NOTE = "_converted_from"


@dataclass(frozen=True)
class SwapNote:
    """On a module whose class and attributes were changed in place.

    Attributes:
        origin: the class before.
        target: the class after.
        names: the attributes that the conversion set or might have set.
        before: those of them that were there before.
    """

    origin: type[nn.Module]
    target: type[nn.Module]
    names: tuple[str, ...]
    before: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> SwapNote:
        return self  # never changed; and a ProcessGroup in it cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        # A ProcessGroup cannot be pickled either, and means nothing elsewhere.
        before = {name: None if name == "process_group" else value for name, value in self.before.items()}
        return {**vars(self), "before": before}


@dataclass(frozen=True)
class BuildNote:
    """On a module that a registered factory made.

    Attributes:
        original: the module in whose place it is.
        tensors: where each parameter and buffer of the original (by qualified name) is in the replacement.
    """

    original: nn.Module
    tensors: dict[str, str]


def swap(
    module: nn.Module, target: type[nn.Module], attributes: dict[str, Any], names: Iterable[str]
) -> None:
    """Change the class and the attributes of a module, and note what they were.

    Nothing else is touched: parameters, buffers, hooks, flags and whatever else the object holds stay because
    the object stays.

    Args:
        module: the module.
        target: its new class.
        attributes: what to set on it.
        names: all the attributes that go away, or back to what they are now, when the swap is taken back.
    """
    own = vars(module)
    names = (*names, NOTE)  # an older conversion's note comes back with the rest
    note = SwapNote(type(module), target, names, {name: own[name] for name in names if name in own})
    # Past nn.Module.__setattr__, which a model may override.
    object.__setattr__(module, "__class__", target)
    own.update(attributes)
    own[NOTE] = note


def note_changes(module: nn.Module, origin: type[nn.Module], before: dict[str, Any]) -> None:
    """Note on a module what somebody else changed about it, whose class and ``__dict__`` were those given."""
    own = vars(module)
    names = [name for name in {**before, **own} if before.get(name) is not own.get(name)]
    if names or type(module) is not origin:
        names.append(NOTE)
        own[NOTE] = SwapNote(origin, type(module), tuple(names), {n: before[n] for n in names if n in before})


def swap_back(module: nn.Module, note: SwapNote) -> None:
    """Take a swap back."""
    own = vars(module)
    for name in note.names:
        if name not in note.before:  # what was there before keeps its place in the order
            own.pop(name, None)
    own.update(note.before)
    object.__setattr__(module, "__class__", note.origin)


def note_build(original: nn.Module, replacement: nn.Module) -> None:
    """Note on a replacement what it replaces, and which of its tensors are the original's own."""
    places = {id(slots[key]): name for name, (slots, key) in _tensors(replacement).items()}
    tensors = {
        name: places[id(slots[key])]
        for name, (slots, key) in _tensors(original).items()
        if id(slots[key]) in places
    }
    vars(replacement)[NOTE] = BuildNote(original, tensors)


def lost_tensors(replacement: nn.Module, note: BuildNote) -> list[str]:
    """The original's parameters and buffers that cannot be found in its replacement."""
    present = _tensors(replacement)
    return [name for name in _tensors(note.original) if note.tensors.get(name) not in present]


def build_back(replacement: nn.Module, note: BuildNote) -> None:
    """Hand the tensors and the mode that a replacement has now to the original."""
    present, past = _tensors(replacement), _tensors(note.original)
    for name, place in note.tensors.items():
        # Not the same objects any more after, say, model.double(), which makes new buffers.
        (slots, key), (old_slots, old_key) = present[place], past[name]
        old_slots[old_key] = slots[key]
    if note.original.training != replacement.training:
        note.original.train(replacement.training)


def _tensors(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where every parameter and buffer is: qualified name -> (the dict that holds it, its key there)."""
    return {
        f"{prefix}.{key}".removeprefix("."): (slots, key)
        for prefix, owner in module.named_modules()
        for slots in (owner._parameters, owner._buffers)
        for key, tensor in slots.items()
        if tensor is not None
    }
