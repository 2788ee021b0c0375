"""The device as torch sees it: its name, the module ``torch.sim``, and its kernels."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch

from simulated_accelerator import autocast, kernels, process_group, streams
from simulated_accelerator.build import native

DEVICES = 4
"""How many there are: "sim:0" to "sim:3"."""

_loaded = False


def load() -> None:
    """Build the device if it has to be, and make it known to torch. Later calls in a process do nothing."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    torch.utils.rename_privateuse1_backend("sim")
    assert native().device_count == DEVICES
    module = _torch_module()
    torch._register_device_module("sim", module)
    sys.modules["torch.sim"] = module
    torch.utils.generate_methods_for_privateuse1_backend()
    kernels.register()
    autocast.register()
    process_group.register()


def _torch_module() -> types.ModuleType:
    """``torch.sim``, with what torch itself and users of ``torch.cuda`` look for."""
    module = types.ModuleType("torch.sim")
    vars(module).update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        device_count=lambda: DEVICES,
        current_device=torch.accelerator.current_device_index,
        set_device=lambda device: torch.accelerator.set_device_index(streams.device_of(device)),
        device=_CurrentDevice,
        Stream=streams.Stream,
        Event=streams.Event,
        stream=streams.stream,
        current_stream=streams.current_stream,
        default_stream=streams.default_stream,
        set_stream=streams.set_stream,
        synchronize=streams.synchronize,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        # Operators run on the CPU and draw from its generator, which torch.manual_seed seeds as well.
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device="sim": torch.get_rng_state(),
        set_rng_state=lambda state, device="sim": torch.set_rng_state(state),
    )
    return module


class _CurrentDevice:
    """``torch.sim.device(...)``: a context in which another device is this thread's current one."""

    def __init__(self, device: Any) -> None:
        self._index = streams.device_of(device).index

    def __enter__(self) -> None:
        self._before = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(self._index)

    def __exit__(self, *exception: object) -> None:
        torch.accelerator.set_device_index(self._before)
