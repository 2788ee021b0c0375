"""In-place changes of what replicas share: parameters, plain tensors, and the model's input.

In the single model such a change happens once. Replicas on one device share their parameters and the tensors
in plain attributes, so there it would happen once per replica; that is an error. Containers in attributes are
shared by all replicas; a warning says so if one has been filled with tensors. Changes of the input are
carried over to the caller's tensor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from syncbn_parallel._containers import parts_of
from syncbn_parallel._devices import moved
from syncbn_parallel._hints import warn_the_caller
from syncbn_parallel._module_tree import STANDARD_ATTRIBUTES, named_submodules

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# How many forwards each model has made, by whether it was in training.
_forwards: WeakKeyDictionary[nn.Module, dict[bool, int]] = WeakKeyDictionary()


class SharedTensorChanges:
    """Watches the parameters and plain tensors that several replicas share, from before they run until after.

    torch counts the changes of a tensor, and reading the count costs nothing. The count leaves out changes
    through ``.data``. So on the CPU the contents are compared as well, in the 1st, 2nd, 4th, 8th, ... forward
    of a model, which costs next to nothing in the long run.

    Args:
        model: the data-parallel model.
        replicas: the replicas.
        devices: their devices.
    """

    def __init__(
        self, model: nn.Module, replicas: Sequence[nn.Module], devices: Sequence[torch.device]
    ) -> None:
        self._sharers = {device: n for device in devices if (n := devices.count(device)) > 1}
        shared: dict[int, tuple[str, Tensor]] = {}
        for device in self._sharers:
            shared.update(_shared_tensors(replicas[devices.index(device)]))
        # A tensor of the inference mode has no version.
        self._shared = [(n, t, t._version) for n, t in shared.values() if not t.is_inference()]
        self._contents: list[int | None] | None = None
        self._containers: list[tuple[str, Any, list[ref[Tensor]]]] = []
        if _is_time_to_compare(model, replicas[0].training):
            self._contents = [_fingerprint(tensor) for _, tensor, _ in self._shared]
            self._containers = [
                (name, container, [ref(tensor) for tensor in _tensors_in(container)])
                for name, container in _shared_containers(replicas)
            ]

    def refuse(self) -> None:
        """Raise if one of the tensors has changed.

        Raises:
            RuntimeError: it has; the message names it.
        """
        for i, (name, tensor, version) in enumerate(self._shared):
            changed = tensor._version != version
            if not changed and self._contents is not None:
                changed = self._contents[i] != _fingerprint(tensor)
            if changed:
                number = self._sharers.get(tensor.device, 1)
                raise RuntimeError(
                    "expected a forward that leaves parameters and plain tensors as they are, got "
                    f"{name!r} changed in place: {number} replicas on {tensor.device} share it, so this "
                    f"forward may have changed it {number} times, and it stays changed. Load its last good "
                    "value. Then make the change before the model is called, compute a new tensor instead "
                    "(torch.nn.utils.parametrize), or register it as a buffer: each replica has its own"
                )

    def warn_of_containers(self) -> None:
        """Warn if a forward has put tensors into a container that all replicas share."""
        for name, container, before in self._containers:
            known = {id(reference()) for reference in before}
            if any(id(tensor) not in known for tensor in _tensors_in(container)):
                warn_the_caller(
                    f"expected a forward that keeps its tensors to itself, got {name!r}, a "
                    f"{type(container).__name__}, filled with tensors: all replicas share it, so each may "
                    "read what another one has put there. Let the forward use a local variable, or set the "
                    "attribute anew (self.x = {}), which each replica does for itself; to use the tensors "
                    "after the forward, return them"
                )


def _shared_tensors(replica: nn.Module) -> Iterator[tuple[int, tuple[str, Tensor]]]:
    """Yield the parameters of a replica and the tensors in plain attributes, by id and with their names."""
    modules = named_submodules(replica)
    buffers = {id(buffer) for _, module in modules for buffer in module._buffers.values()}
    for name, module in modules:
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield id(parameter), (prefix + key, parameter)
        if Tensor in map(type, module.__dict__.values()):
            for key, value in module.__dict__.items():
                if type(value) is Tensor and value.grad_fn is None and id(value) not in buffers:
                    yield id(value), (prefix + key, value)


def _shared_containers(replicas: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the lists, dicts, sets and deques in attributes that the first two replicas share."""
    for (name, first), (_, second) in zip(*map(named_submodules, replicas[:2])):
        for key in first.__dict__.keys() - STANDARD_ATTRIBUTES:
            value = first.__dict__[key]
            if isinstance(value, (list, dict, set, deque)) and second.__dict__.get(key) is value:
                yield f"{name}.{key}" if name else key, value


def _tensors_in(container: Any) -> list[Tensor]:
    values = list(container.values() if isinstance(container, dict) else container)
    return [value for value in values if isinstance(value, Tensor)]


def _is_time_to_compare(model: nn.Module, training: bool) -> bool:
    counts = _forwards.setdefault(model, {})
    number = counts[training] = counts.get(training, 0) + 1
    return number & (number - 1) == 0


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> int | None:
    """Return the sum of the contents as integers, which no NaN spoils; None where that takes a copy."""
    kind = _INTEGERS.get(tensor.element_size())
    if kind is None or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return None
    return int(tensor.detach().view(kind).sum())


class InputChanges:
    """Carries changes in place of the replicas' inputs over to the tensors that they are chunks of.

    A module may begin with an operation in place, such as ``nn.ReLU(inplace=True)``. In the single model this
    changes the caller's tensor. Here a chunk on the tensor's device shares its memory, but autograd does not
    know this, since the chunk is not a view. A chunk on another device is a copy.

    Args:
        arguments: those of the model.
        calls: those of the replicas.
    """

    def __init__(self, arguments: Any, calls: Sequence[Any]) -> None:
        self._chunks: list[tuple[Tensor, list[Tensor], list[int], bool]] = []
        columns = [list(_tensors(call)) for call in calls]
        tensors = list(_tensors(arguments))
        if {len(tensors)} != set(map(len, columns)):
            return  # an override of `scatter` split them in another way
        for tensor, *chunks in zip(tensors, *columns):
            shared = [_shares_memory(chunk, tensor) for chunk in chunks]
            if any(shared) and not any(chunk.is_inference() for chunk in chunks):
                versions = [chunk._version for chunk in chunks]
                self._chunks.append((tensor, chunks, versions, all(shared)))

    def carry_over(self, dim: int) -> None:
        """Make the caller's tensors and their gradients what they would be after the single model.

        Args:
            dim: the batch dimension.
        """
        for tensor, chunks, versions, all_shared in self._chunks:
            if [chunk._version for chunk in chunks] == versions:
                continue
            has_history = torch.is_grad_enabled() and any(chunk.requires_grad for chunk in chunks)
            if all_shared and not has_history:
                torch.autograd.graph.increment_version(tensor)
            else:  # the numbers are in place already; this records the change in the graph
                tensor.copy_(torch.cat([moved(chunk, tensor.device) for chunk in chunks], dim))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for _, part in parts_of(value, "") or ():
            yield from _tensors(part)


def _shares_memory(chunk: Tensor, tensor: Tensor) -> bool:
    """Return whether ``chunk`` shares the memory of ``tensor`` without being a view of it."""
    if chunk is tensor or chunk.device != tensor.device or chunk._base is not None:
        return False
    if chunk.layout is not torch.strided or tensor.layout is not torch.strided:
        return False
    return bool(chunk.untyped_storage()._cdata == tensor.untyped_storage()._cdata)
