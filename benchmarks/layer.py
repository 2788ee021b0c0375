"""One layer, forward and backward, over replicas; beside torch's own layer on the whole batch.

The variants:

- whole batch: ``nn.BatchNorm2d`` on one device;
- unsynchronized: the same, in each of the replicas, on its part of the batch;
- plain ops: synchronized by ordinary operations on sums and sums of squares (``plain_ops.py``);
- synchronized: ours.

Replicating the layer is included, splitting the batch and joining the outputs are not. With ``--device
cuda`` the replicas are two on the first GPU, and one on each where there are more; ``gpu.py`` says what is
added.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import gpu
import torch
from memory import RETURNS_AT_ONCE, kept_bytes, peak_growth
from plain_ops import PlainOpsBatchNorm2d
from report import Target, save, table, target_table, timing_table
from side_by_side import Row, hand_over, in_child, measure, options_of, timed, under_each_setting
from torch import Tensor, nn

from syncbn_core import SynchronizedBatchNorm2d
from syncbn_parallel import DataParallelWithCallback

SHAPES = [(32, 64, 56, 56), (16, 256, 28, 28), (8, 512, 7, 7), (4, 64, 8, 8)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = {
    "unsynchronized": nn.BatchNorm2d,
    "plain ops": PlainOpsBatchNorm2d,
    "synchronized": SynchronizedBatchNorm2d,
}
WHOLE = "whole batch"


class OnParts(DataParallelWithCallback):
    """Replicas whose arguments are the parts of the batch, and whose outputs stay apart."""

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        """Give each replica one argument."""
        return [(x,) for x in inputs], [{} for _ in inputs]

    def gather(self, outputs: Any, output_device: Any) -> Any:
        """Return the outputs as they are."""
        return outputs


@dataclass
class LayerStep:
    """A forward and a backward of a layer on given parts of a batch."""

    layer: nn.Module
    parts: list[Tensor]
    gradients: list[Tensor]

    def forward(self) -> Sequence[Tensor]:
        """Return the outputs."""
        outputs = self.layer(*self.parts)
        return [outputs] if isinstance(outputs, Tensor) else outputs

    def __call__(self) -> None:
        """Run forward and backward, as the first of its kind."""
        for leaf in (*self.parts, *self.layer.parameters()):
            leaf.grad = None
        torch.autograd.backward(self.forward(), self.gradients)

    def kept_bytes(self) -> int:
        """What the graph keeps beyond the input, the output and the model."""
        outputs = self.forward()
        return kept_bytes(outputs, [*self.parts, *outputs, *self.layer.parameters(), *self.layer.buffers()])


def name_of(shape: Sequence[int], layout: str, dtype: str) -> str:
    """Name a case."""
    return f"({','.join(map(str, shape))}) {layout} {dtype}"


def variants_of(
    shape: Sequence[int], layout: str, dtype: str, places: Sequence[list[str]]
) -> dict[str, LayerStep]:
    """The steps to compare in one case.

    Args:
        shape: of the whole batch.
        layout: a key of ``LAYOUTS``.
        dtype: a key of ``DTYPES``.
        places: for each number of replicas, their devices.
    """

    def batch() -> Tensor:
        return torch.randn(shape, device=home).to(DTYPES[dtype], memory_format=LAYOUTS[layout])

    def split(whole: Tensor, devices: list[str]) -> list[Tensor]:
        chunks = zip(whole.chunk(len(devices)), devices)
        return [part.to(device, memory_format=LAYOUTS[layout], copy=True) for part, device in chunks]

    home = places[0][0]
    x, dy = batch(), batch()
    on_one_device = {WHOLE: nn.BatchNorm2d(shape[1], device=home)}
    if home != "cpu":
        on_one_device |= gpu.whole_batch_layers(shape[1])
    variants = {
        name: LayerStep(layer, [x.clone().requires_grad_()], [dy]) for name, layer in on_one_device.items()
    }
    for devices, (name, kind) in product(places, LAYERS.items()):
        parts = [part.requires_grad_() for part in split(x, devices)]
        layer = OnParts(kind(shape[1], device=home), devices)
        variants[f"{len(devices)} {name}"] = LayerStep(layer, parts, split(dy, devices))
    return variants


def places_of(options: argparse.Namespace) -> list[list[str]]:
    """The devices of the replicas, for each number of them."""
    return gpu.places() if options.device == "cuda" else [["cpu"] * 2, ["cpu"] * 4]


def cases_of(options: argparse.Namespace) -> list[tuple[tuple[int, ...], str, str]]:
    """Every shape, layout and dtype."""
    if options.quick:
        return [(SHAPES[-1], layout, "float32") for layout in LAYOUTS]
    return list(product([*(gpu.SHAPES if options.device == "cuda" else []), *SHAPES], LAYOUTS, DTYPES))


def timings(options: argparse.Namespace) -> list[Row]:
    """Time every case."""
    rows = []
    for case in cases_of(options):
        steps = variants_of(*case, places_of(options))
        variants = {name: timed(step, options.device) for name, step in steps.items()}
        rows += measure(name_of(*case), variants, options)
    return rows


@dataclass
class Memory:
    """What one variant needs, in bytes."""

    case: str
    variant: str
    channels: int
    kept: int
    peak: float


def memory(options: argparse.Namespace) -> list[Memory]:
    """Measure the memory of every case in float32."""
    results = []
    for shape, layout, dtype in cases_of(options):
        if dtype == "float32":
            for name, step in variants_of(shape, layout, dtype, places_of(options)).items():
                peak = peak_growth(step, options.device)
                results.append(Memory(name_of(shape, layout, dtype), name, shape[1], step.kept_bytes(), peak))
    return results


def memory_table(found: Sequence[Memory]) -> str:
    """Compare what is kept with vectors of C float32, and the peak with that of the whole batch."""
    lines = []
    for each in found:
        native = next(other for other in found if other.case == each.case)
        vectors = f"{each.kept / (4 * each.channels):,.0f}"
        ratio = f"{each.peak / native.peak:.2f}" if native.peak else "-"
        lines.append([each.case, each.variant, f"{each.kept:,}", vectors, f"{each.peak / 1e6:.1f}", ratio])
    header = ["case", "variant", "bytes kept", "in vectors of C float32", "peak growth MB", "to whole batch"]
    return table(header, lines)


def kernels(options: argparse.Namespace) -> list[gpu.Kernels]:
    """Look at every case as host and GPU see it."""
    results = []
    for case in cases_of(options):
        steps = variants_of(*case, places_of(options))
        (whole,) = steps[WHOLE].parts
        results += [gpu.kernels(name_of(*case), name, step, whole.detach()) for name, step in steps.items()]
    return results


def targets_of(options: argparse.Namespace) -> list[Target]:
    """What the layer is to reach; on the CPU, in float32."""
    if options.device == "cuda":
        return gpu.targets([name_of(*case) for case in product(gpu.SHAPES, LAYOUTS, DTYPES)])
    whole = [("2 synchronized", WHOLE)]
    unsynchronized = [(f"{r} synchronized", f"{r} unsynchronized") for r in (2, 4)]
    plain = [(f"{r} synchronized", f"{r} plain ops") for r in (2, 4)]
    large, small, both = SHAPES[:2], SHAPES[-1:], list(LAYOUTS)
    targets = [
        _target(f"R = 2 to whole batch, {shape} {layout}", limit, [shape], [layout], whole)
        for shape, limits in zip(SHAPES, [(0.9, 1.4), (1.0, 1.6), (2.3, 3.5)])
        for layout, limit in zip(LAYOUTS, limits)
    ]
    return [
        *targets,
        _target("to unsynchronized, two large shapes", 1.1, large, both, unsynchronized),
        _target(f"to unsynchronized, {small[0]}", 2.0, small, both, unsynchronized),
        _target("to plain ops, two large shapes", 0.4, large, both, plain),
        _target("to plain ops, every shape", 1.0, SHAPES, both, plain),
    ]


def _target(
    what: str,
    limit: float,
    shapes: Sequence[Sequence[int]],
    layouts: Sequence[str],
    pairs: Sequence[tuple[str, str]],
) -> Target:
    cases = [name_of(shape, layout, "float32") for shape, layout in product(shapes, layouts)]
    return Target(what, limit, [((case, one), (case, other)) for case in cases for one, other in pairs])


def main() -> None:
    """Measure, or collect what child processes have measured."""
    options = options_of(__doc__)
    if options.part == "timings":
        hand_over(timings(options))
    elif options.part == "memory":
        hand_over(memory(options))
    elif options.part == "kernels":
        hand_over(kernels(options))
    else:
        rows = under_each_setting(options)
        needs = [Memory(**each) for each in in_child("memory", RETURNS_AT_ONCE)]
        sections = {"Targets": target_table(targets_of(options), rows), "Memory": memory_table(needs)}
        if options.device == "cuda":
            found = [gpu.Kernels(**each) for each in in_child("kernels", {})]
            sections["Launches and bandwidth"] = gpu.kernel_table(found)
        save("layer", options, {**sections, "Timings": timing_table(rows)}, rows)


if __name__ == "__main__":
    main()
