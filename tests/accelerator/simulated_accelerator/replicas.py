"""Replicas of a model on several devices, each in its own thread, and the whole batch to compare with.

All that tests need of a data-parallel wrapper. The wrapper itself is in a package that not every test has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from simulated_accelerator.counting import Counts, counted
from syncbn_comm import ReplicaGroup

JOIN_SECONDS = 60.0

Call = Callable[[nn.Module, Tensor, int], Tensor]
"""(replica, its input, its rank) -> its output."""


def copy_to(model: nn.Module, device: torch.device, master: bool) -> nn.Module:
    """Replicate a model on a device, as ``nn.DataParallel`` does.

    Parameters are copies through which gradients reach the model's own. The master has the model's buffers,
    every other replica has copies.
    """
    replica = model._replicate_for_data_parallel()
    replica._parameters = {
        name: None if parameter is None else parameter.to(device)
        for name, parameter in model._parameters.items()
    }
    if not master:
        replica._buffers = {
            name: None if buffer is None else buffer.to(device, copy=True)
            for name, buffer in model._buffers.items()
        }
    for name, child in model.named_children():
        replica._modules[name] = copy_to(child, device, master)
    return replica


class DeviceReplicas:
    """The replicas of one forward of a model, whose layers are called "net.0", "net.1" and so on.

    Args:
        model: on the first of the devices.
        devices: one for each replica.
        introduced: whether the layers are told who belongs together, as by syncbn-parallel. A stock
            ``nn.DataParallel`` does not tell.
    """

    def __init__(self, model: nn.Module, devices: Sequence[str], introduced: bool = True) -> None:
        self.devices = [torch.device(device) for device in devices]
        self.group = ReplicaGroup(len(devices), timeout=JOIN_SECONDS / 2)
        if introduced:
            self.modules = [copy_to(model, device, rank == 0) for rank, device in enumerate(self.devices)]
            self._introduce()
        else:
            self.modules = self._replicated_module_by_module(model)
        self._introduced = introduced

    def _introduce(self) -> None:
        for rank, replica in enumerate(self.modules):
            for name, module in replica.named_modules():
                if hasattr(module, "__data_parallel_replicate__"):
                    context = SimpleNamespace(name=f"net.{name}".rstrip("."), group=self.group)
                    module.__data_parallel_replicate__(context, rank)

    def _replicated_module_by_module(self, model: nn.Module) -> list[nn.Module]:
        """As torch's own loop: all replicas of one module, then all of the next."""
        replicas = {
            module: [module._replicate_for_data_parallel() for _ in self.devices]
            for module in model.modules()
        }
        for module, copies in replicas.items():
            for rank, (copy, device) in enumerate(zip(copies, self.devices)):
                for name, child in module.named_children():
                    copy._modules[name] = replicas[child][rank]
                for name, parameter in module._parameters.items():
                    setattr(copy, name, None if parameter is None else parameter.to(device))
                if rank:
                    copy._buffers = {name: b.to(device, copy=True) for name, b in module._buffers.items()}
        return replicas[model]

    def outcomes(self, work: Callable[[nn.Module, int], Any]) -> list[Any]:
        """Call ``work(replica, rank)`` in one thread for each replica; return results and exceptions."""
        outcomes: list[Any] = [None] * len(self.modules)
        grad_enabled = torch.is_grad_enabled()

        def run(rank: int) -> None:
            torch.set_grad_enabled(grad_enabled)  # threads do not inherit it
            torch.sim.set_device(self.devices[rank])
            try:
                if self._introduced:
                    with self.group.member(rank):
                        outcomes[rank] = work(self.modules[rank], rank)
                else:
                    outcomes[rank] = work(self.modules[rank], rank)
            except BaseException as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(outcomes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(JOIN_SECONDS)
        assert not any(thread.is_alive() for thread in threads)
        return outcomes

    def run(self, work: Callable[[nn.Module, int], Any]) -> list[Any]:
        """As `outcomes`, with the first failure raised here."""
        outcomes = self.outcomes(work)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            raise self.group.failure or failures[0]
        return outcomes


class Step:
    """One forward and backward of replicas on devices, with what it gave (on the CPU) and what it cost.

    Each output has weights of its own in the loss, since the gradient of a batch norm's plain sum is zero.

    Args:
        model: on the first of the devices.
        chunks: on the CPU, one for each device.
        devices: one for each replica.
        call: what each replica does with its input.
        introduced: as for `DeviceReplicas`.
        weights: of the outputs in the loss, on the CPU; None for those of `weights_of`.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: Sequence[Tensor],
        devices: Sequence[str],
        call: Call = lambda replica, x, rank: replica(x),
        introduced: bool = True,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        model.zero_grad()
        inputs = [
            chunk.to(device, memory_format=torch.preserve_format).requires_grad_()
            for chunk, device in zip(chunks, devices)
        ]
        replicas = DeviceReplicas(model, devices, introduced)
        with counted() as self.forward:
            self.outputs = replicas.run(lambda replica, rank: call(replica, inputs[rank], rank))
        weights = weights_of(self.outputs) if weights is None else weights
        dy = [weight.to(y) for weight, y in zip(weights, self.outputs)]
        with counted() as self.backward:
            torch.autograd.backward(self.outputs, dy)
        self.inputs = inputs
        self.gave = _result(model, self.outputs, [x.grad for x in inputs])

    @property
    def counts(self) -> list[Counts]:
        """Those of forward and backward."""
        return [self.forward, self.backward]


def whole_batch_step(
    twin: nn.Module,
    chunks: Sequence[Tensor],
    call: Callable[[nn.Module, Tensor], Tensor] = lambda twin, x: twin(x),
) -> dict[str, Any]:
    """What `Step` gives, by a layer of torch on the CPU that has the whole batch."""
    twin.zero_grad()
    x = torch.cat([chunk.double() for chunk in chunks]).requires_grad_()
    outputs = call(twin, x).split([len(chunk) for chunk in chunks])
    torch.autograd.backward(outputs, weights_of(outputs))
    assert x.grad is not None
    return _result(twin, outputs, x.grad.split([len(chunk) for chunk in chunks]))


def weights_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The weights of the loss: for each number of all outputs a different one, in float64 on the CPU."""
    numbers = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=numbers, dtype=torch.float64) for y in outputs]


def twin_of(layer: nn.Module, dims: int) -> nn.Module:
    """Build torch's own layer for inputs of ``dims`` axes on the CPU in float64, with the same state."""
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[dims]
    options = (layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    twin = kind(*options, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    return twin.train(layer.training)


def _result(
    model: nn.Module, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Any]:
    return {
        "y": torch.cat([y.detach().cpu() for y in outputs]),
        "dx": torch.cat([g.cpu() for g in gradients if g is not None]),
        **{f"d {name}": _on_cpu(p.grad) for name, p in model.named_parameters()},
        **{name: buffer.cpu().clone() for name, buffer in model.named_buffers()},
    }


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()
