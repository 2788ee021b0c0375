"""The settings that a replica's thread takes over from the thread that calls the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from syncbn_parallel._devices import accelerator_kind, device_module

# torch keeps all of these per thread, and has no public way to read or set them for another thread.
_functions: Any = torch._C
_autograd: Any = torch._C._autograd


class CallerState:
    """torch's settings in the thread that makes this object, for the threads of its replicas to work under.

    These are grad mode, inference mode, the autocast state, the current stream of every device of the
    replicas, the modes that intercept torch's functions and operators (``TorchFunctionMode``,
    ``TorchDispatchMode``, ``with torch.device(...)``), and from torch 2.8 on the hooks on saved tensors,
    unless they are those of a gradient checkpoint.

    One setting differs. torch keeps one cache of autocast's casts, by parameter, for the whole process.
    Replicas on one device share their parameters, so it would depend on chance which of them finds the cast
    of another one in the cache, and whether their gradients add up in the precision of the cast or of the
    parameter. So the cache is off for them.

    Args:
        devices: the device of each replica.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        kinds = {"cpu", "cuda", accelerator_kind(), *(device.type for device in devices)}
        self._autocast = _Autocast([kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind)])
        self._autocast.cached &= len(set(devices)) == len(devices)
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._streams = _Streams(devices[0].type, dict.fromkeys(devices))
        self._modes = _Modes()
        self._hooks = _top_saved_tensor_hooks()

    @contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Work under these settings for a replica on ``device``, in a thread that does nothing else."""
        with ExitStack() as stack:
            self._streams.enter(stack, device)
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            stack.enter_context(self._autocast.applied())
            if self._hooks is not None:
                _autograd._push_saved_tensors_default_hooks(*self._hooks)
                stack.callback(_autograd._pop_saved_tensors_default_hooks)
            self._modes.enter(stack)
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
        # A thread that leaves its outermost autocast block empties the cache of the whole process. The
        # caller's block is the outermost one here: a replica that leaves a block of its own must not empty
        # the cache that the caller fills.
        inside = any(enabled for enabled, _ in self._kinds.values())
        if inside:
            torch.autocast_increment_nesting()
        try:
            yield
        finally:
            if inside:
                torch.autocast_decrement_nesting()


class _Streams:
    """The current streams of the thread that makes this object, on all devices of the replicas.

    A replica works on its own device, but replica 0 also reads what the others wrote on theirs.
    """

    def __init__(self, kind: str, devices: Iterable[torch.device]) -> None:
        self._kind = _StreamFunctions(kind)
        get = self._kind.get_stream
        self._streams = {} if get is None else {device: get(device) for device in devices}

    def enter(self, stack: ExitStack, device: torch.device) -> None:
        """Make these streams and ``device`` the current ones until the stack is left."""
        kind = self._kind
        if kind.get_device is None:
            return
        stack.callback(kind.set_device, kind.get_device())
        for place, stream in self._streams.items():
            before = kind.get_stream(place)
            if before != stream:
                stack.callback(kind.set_stream, before)
                kind.set_stream(stream)
        kind.set_device(device.index)


class _StreamFunctions:
    """The functions that get and set the current device and streams; None if a kind of device has none.

    Those of the kind's own module come first: ``torch.cuda.set_device`` gives a new thread its CUDA context,
    without which cuBLAS warns.
    """

    def __init__(self, kind: str) -> None:
        module = device_module(kind)
        device, of = ("device", module)
        accelerator = getattr(torch, "accelerator", None)  # from torch 2.6 on
        if module is not None and not hasattr(module, "set_device") and kind == accelerator_kind():
            device, of = ("device_index", accelerator)
        self.get_device: Any = getattr(of, f"current_{device}", None)
        self.set_device: Any = getattr(of, f"set_{device}", None)
        self.get_stream: Any = getattr(of, "current_stream", None)
        self.set_stream: Any = getattr(of, "set_stream", None)


class _Modes:
    """The modes that intercept torch's functions and operators in the thread that makes this object.

    They are pushed, not entered: a mode that is entered again would remember the wrong state to return to.
    """

    def __init__(self) -> None:
        self._of_functions = [
            _functions._get_function_stack_at(i) for i in range(_functions._len_torch_function_stack())
        ]
        self._of_operators = [
            _functions._get_dispatch_stack_at(i) for i in range(_functions._len_torch_dispatch_stack())
        ]

    def enter(self, stack: ExitStack) -> None:
        """Have these modes intercept what this thread does until the stack is left."""
        for mode in self._of_operators:
            _functions._push_on_torch_dispatch_stack(mode)
            stack.callback(_functions._pop_torch_dispatch_stack, getattr(mode, "_mode_key", None))
        for mode in self._of_functions:
            _functions._push_on_torch_function_stack(mode)
            stack.callback(_functions._pop_torch_function_stack)


def _top_saved_tensor_hooks() -> Any:
    """Return the pack and unpack hooks that work in this thread, or None; always None before torch 2.8."""
    try:
        hooks = _autograd._top_saved_tensors_default_hooks(True)
    except (AttributeError, TypeError):
        return None
    # A checkpoint around the whole model cannot run the model again (see refuse_backward). Without its hooks,
    # the replicas keep what they save, so it does not have to.
    return None if hooks is None or getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint" else hooks
