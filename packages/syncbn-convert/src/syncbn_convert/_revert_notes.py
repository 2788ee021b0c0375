"""The note that a conversion leaves on each module that it changes: how to revert it."""

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
        names: the attributes that the conversion, or the new class, may have set.
        before: those that the module had before, with their values.
    """

    origin: type[nn.Module]
    target: type[nn.Module]
    names: tuple[str, ...]
    before: dict[str, Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> SwapNote:
        return self  # it is never changed, and a ProcessGroup in it cannot be copied

    def __getstate__(self) -> dict[str, Any]:
        # A ProcessGroup cannot be pickled either, and means nothing in another process.
        before = {name: None if name == "process_group" else value for name, value in self.before.items()}
        return {**vars(self), "before": before}


@dataclass(frozen=True)
class BuildNote:
    """On a module that a registered factory made.

    Attributes:
        original: the module that it replaces.
        tensors: where each parameter and buffer of the original (by qualified name) is in the replacement.
    """

    original: nn.Module
    tensors: dict[str, str]


def swap(
    module: nn.Module, target: type[nn.Module], attributes: dict[str, Any], names: Iterable[str]
) -> None:
    """Change the class and the attributes of a module, and note what they were.

    Everything else stays, because the object stays: parameters, buffers, hooks, flags.

    Args:
        module: the module.
        target: its new class.
        attributes: what to set on it.
        names: the attributes that a revert removes, or sets back to what they are now.
    """
    own = vars(module)
    names = (*names, NOTE)  # the note of an earlier conversion is restored too
    note = SwapNote(type(module), target, names, {name: own[name] for name in names if name in own})
    # Not by nn.Module.__setattr__, which a model may override.
    object.__setattr__(module, "__class__", target)
    own.update(attributes)
    own[NOTE] = note


def note_changes(module: nn.Module, origin: type[nn.Module], before: dict[str, Any]) -> None:
    """Note what another function changed on a module of class ``origin`` and ``__dict__`` ``before``."""
    own = vars(module)
    names = [name for name in {**before, **own} if before.get(name) is not own.get(name)]
    if names or type(module) is not origin:
        names.append(NOTE)
        own[NOTE] = SwapNote(origin, type(module), tuple(names), {n: before[n] for n in names if n in before})


def swap_back(module: nn.Module, note: SwapNote) -> None:
    """Revert a swap."""
    own = vars(module)
    for name in note.names:
        if name not in note.before:  # what was there before keeps its position in the dict
            own.pop(name, None)
    own.update(note.before)
    object.__setattr__(module, "__class__", note.origin)


def note_build(original: nn.Module, replacement: nn.Module) -> None:
    """Note on a replacement what it replaces, and which tensors the two share."""
    places = {id(slots[key]): name for name, (slots, key) in _tensors(replacement).items()}
    tensors = {
        name: places[id(slots[key])]
        for name, (slots, key) in _tensors(original).items()
        if id(slots[key]) in places
    }
    vars(replacement)[NOTE] = BuildNote(original, tensors)


def lost_tensors(replacement: nn.Module, note: BuildNote) -> list[str]:
    """Return the parameters and buffers of the original that its replacement does not have."""
    present = _tensors(replacement)
    return [name for name in _tensors(note.original) if note.tensors.get(name) not in present]


def build_back(replacement: nn.Module, note: BuildNote) -> None:
    """Give the original the tensors and the mode that its replacement has now."""
    present, past = _tensors(replacement), _tensors(note.original)
    for name, place in note.tensors.items():
        # These may be other objects than at the conversion: model.double() makes new buffers.
        (slots, key), (old_slots, old_key) = present[place], past[name]
        old_slots[old_key] = slots[key]
    if note.original.training != replacement.training:
        note.original.train(replacement.training)


def _tensors(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Return where each parameter and buffer is: qualified name -> (the dict that holds it, its key)."""
    return {
        f"{prefix}.{key}".removeprefix("."): (slots, key)
        for prefix, owner in module.named_modules()
        for slots in (owner._parameters, owner._buffers)
        for key, tensor in slots.items()
        if tensor is not None
    }
