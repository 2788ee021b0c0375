"""What a replica's thread takes over from the thread that calls the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch


class CallerState:
    """torch's settings in the thread that makes this object, for the threads of its replicas to work under.

    These are grad mode, inference mode, the autocast state and, for CUDA, the current stream of each device.

    In one thing they differ. torch keeps one cache of autocast's casts, by parameter, for the whole process.
    Replicas on one device share their parameters, so it would be luck whether one finds the other's cast
    there, and with it whether their gradients add up in the cast's precision or the parameter's. Theirs is
    off.

    Args:
        devices: where the replicas run, one entry per replica.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        kinds = {"cpu", "cuda", *(device.type for device in devices)}
        self._autocast = _Autocast([kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind)])
        self._autocast.cached &= len(set(devices)) == len(devices)
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._streams = {d: torch.cuda.current_stream(d) for d in devices if d.type == "cuda"}

    @contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Work under these settings for a replica on ``device``, in a thread that does nothing else."""
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
        self._kinds = {k: (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds}
        self.cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def applied(self) -> Iterator[None]:
        for kind, (enabled, dtype) in self._kinds.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cached)
        # Leaving a thread's outermost autocast block empties the cache of the process. The caller's block
        # is the outermost one: a replica that leaves one of its own must not empty the cache that the
        # caller fills.
        inside = any(enabled for enabled, _ in self._kinds.values())
        if inside:
            torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if inside:
                torch.autocast_decrement_nesting()
