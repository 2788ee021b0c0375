"""What a replica's thread takes over from the thread that calls the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch


class CallerState:
    """torch's thread-local settings in the thread that makes this object, for other threads to work under.

    These are: grad mode, inference mode, the whole autocast state and, for CUDA, the current stream of each device.

    One thing differs. torch keeps one cache of autocast's casts for the whole process, by parameter. Replicas on one
    device share their parameters: which of them finds the other's cast there would be a matter of luck, and with it
    the precision in which the gradients of a parameter add up. So their cache is off.

    Args:
        devices: where the replicas run, one entry per replica.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        kinds = sorted({"cpu", "cuda", *(device.type for device in devices)})
        self._autocast = _Autocast([kind for kind in kinds if torch.amp.is_autocast_available(kind)])
        self._autocast.cache &= len(set(devices)) == len(devices)
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._streams = {d: torch.cuda.current_stream(d) for d in devices if d.type == "cuda"}

    @contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Work under these settings, for a replica on ``device``; afterwards the thread has its own ones back."""
        with ExitStack() as stack:
            if device in self._streams:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(self._streams[device]))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(self._autocast.applied())
            yield


class _Autocast:
    """The autocast state of the thread that makes this object, for some kinds of device."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
        }
        self.cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def applied(self) -> Iterator[None]:
        own = _Autocast(list(self.kinds))
        self._set()
        # Whoever leaves the outermost autocast block of its thread empties the cache of all threads. Counted as being inside
        # one, a replica that leaves a block of its own does not do that to the caller.
        inside = any(enabled for enabled, _ in self.kinds.values())
        if inside:
            torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if inside:
                torch.autocast_decrement_nesting()
            own._set()

    def _set(self) -> None:
        for kind, (enabled, dtype) in self.kinds.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cache)
