"""How often the devices are asked for something."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from simulated_accelerator.build import native

_READ = "read by the host"
_WAIT = "wait of the host"


class Counts(dict[str, int]):
    """What all devices have been asked for, by all threads, and how often; by name.

    Operators go by their own name without overload ("add"), an in-place one perhaps by that of the operator
    behind it. Copies are "copy from host", "copy to host", "copy on the device" and "copy between devices";
    collectives are called "all_gather into a tensor", "all_gather of a list", "all_reduce" and "broadcast".
    Views and allocations are free, as on a GPU. An emulated kernel counts once, whatever it calls.
    """

    @property
    def total(self) -> int:
        """The number of launches, copies and collectives together."""
        return sum(count for name, count in self.items() if name not in (_READ, _WAIT))

    @property
    def reads(self) -> int:
        """How often the host has waited for a value or a size that is on the device."""
        return self.get(_READ, 0)

    @property
    def waits(self) -> int:
        """How often the host has waited otherwise: in a synchronization, or in a blocking copy from host."""
        return self.get(_WAIT, 0)


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count meanwhile; one count at a time. The counts are filled in at the end of the block."""
    counts = Counts()
    native().start_counting()
    try:
        yield counts
    finally:
        counts.update(native().stop_counting())
