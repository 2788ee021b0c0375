"""A value that one thread puts and another thread gets."""

from __future__ import annotations

from typing import Generic, TypeVar

from syncbn_comm import _locks
from syncbn_comm._errors import MisuseError, SyncTimeoutError
from syncbn_comm._timeout import Timeout, resolve_timeout

T = TypeVar("T")


class FutureResult(Generic[T]):
    """A reusable slot for one value, which one thread fills and another empties.

    **Guarantees**

    - Both methods may be called from any thread. Of several waiting threads, one gets the value.
    - The slot does not keep a value that has been fetched. A `get` that times out changes nothing.

    Example:
        >>> future = FutureResult()
        >>> future.put("mean")
        >>> future.get()
        'mean'
    """

    def __init__(self) -> None:
        self._values: list[T] = []  # at most one
        self._mutex = _locks.new_lock()
        self._filled = _locks.new_lock()  # a binary semaphore, held while there is no value
        self._filled.acquire()

    def put(self, result: T) -> None:
        """Fill the slot.

        Raises:
            SyncError: nobody has fetched the last value yet (also a ValueError).
        """
        with self._mutex:
            if self._values:
                raise MisuseError("expected a get between two puts, got two puts in a row")
            self._values.append(result)
        self._filled.release()

    def get(self, timeout: Timeout = ...) -> T:
        """Wait for a value, and empty the slot.

        Args:
            timeout: seconds; None waits forever. The default is the environment variable ``SYNCBN_TIMEOUT``
                (seconds, or ``none``), or 300 if it is not set.

        Raises:
            SyncTimeoutError: nobody filled the slot in time.
        """
        seconds = resolve_timeout(timeout)
        if not self._filled.acquire(True, -1 if seconds is None else seconds):
            raise SyncTimeoutError(f"timed out after {seconds} s: expected a result to be put, got none")
        with self._mutex:
            return self._values.pop()
