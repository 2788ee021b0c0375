"""How much memory a forward keeps for its backward, and how much a step takes at its height."""

from __future__ import annotations

import gc
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Large tensors get pages of their own, and give them back when they go: so resident memory is what lives.
RETURNS_AT_ONCE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
}
_STEPS = 5


def kept_bytes(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> int:
    """How many bytes the graph of the outputs holds on to, without those of the tensors that are known."""
    found = {}
    pending = [output.grad_fn for output in outputs]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is None:
            continue
        for tensor in _kept_by(node):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        behind = {after for after, _ in node.next_functions} - seen
        seen |= behind
        pending += behind
    for tensor in known:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


def _kept_by(node: Any) -> Iterator[Tensor]:
    """The tensors that one node of a graph keeps."""
    kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    if hasattr(node, "saved_tensors"):  # a torch.autograd.Function, on which one may hang more
        kept += [*node.saved_tensors, *vars(node).values()]
    for value in kept:
        values = value if isinstance(value, (list, tuple)) else [value]
        yield from (each for each in values if torch.is_tensor(each))


def peak_growth(step: Callable[[], object], device: str) -> float:
    """By how many bytes memory grows at most during a step; the median of some.

    On the CPU, the process has to be started with the environment ``RETURNS_AT_ONCE``.
    """
    growth = []
    for _ in range(_STEPS):
        step()
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            growth.append(torch.cuda.max_memory_allocated() - before)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
            before = _resident("VmRSS")
            step()
            growth.append(_resident("VmHWM") - before)
    return statistics.median(growth)


def _resident(which: str) -> int:
    """Resident memory in bytes: now (``VmRSS``) or at its peak (``VmHWM``)."""
    match = re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"expected {which} in /proc/self/status, which Linux has")
    return 1024 * int(match[1])
