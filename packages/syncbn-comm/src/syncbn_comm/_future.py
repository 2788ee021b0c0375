"""A result that one thread leaves and another fetches."""

from __future__ import annotations

from typing import Generic, TypeVar

from syncbn_comm import _party
from syncbn_comm._errors import MisuseError, SyncTimeoutError
from syncbn_comm._timeout import Timeout, resolve_timeout

T = TypeVar("T")


class FutureResult(Generic[T]):
    """A slot for one value, filled by one thread and emptied by another, again and again.

    **Guarantees**

    - Both methods may be called from any thread. Of several threads that wait in `get`, one gets the value.
    - A value that has been fetched is not kept. A `get` that timed out changes nothing.

    Example:
        >>> future = FutureResult()
        >>> future.put("mean")
        >>> future.get()
        'mean'
    """

    def __init__(self) -> None:
        self._values: list[T] = []  # at most one
        self._mutex = _party.new_lock()
        self._filled = _party.new_lock()  # a binary semaphore: held while there is no value
        self._filled.acquire()

    def put(self, result: T) -> None:
        """Fill the slot.

        Raises:
            SyncError: the last value has not been fetched (also a ValueError).
        """
        with self._mutex:
            if self._values:
                raise MisuseError("expected a get before the next put, got two puts in a row")
            self._values.append(result)
        self._filled.release()

    def get(self, timeout: Timeout = ...) -> T:
        """Wait for a value, and empty the slot.

        Args:
            timeout: seconds; None waits for ever; left out, the environment variable ``SYNCBN_TIMEOUT``
                (seconds, or ``none``), else 300.

        Raises:
            SyncTimeoutError: nobody filled the slot in time.
        """
        seconds = resolve_timeout(timeout)
        if not self._filled.acquire(True, -1 if seconds is None else seconds):
            raise SyncTimeoutError(f"timed out after {seconds} s: expected a result to be put, got none")
        with self._mutex:
            return self._values.pop()
