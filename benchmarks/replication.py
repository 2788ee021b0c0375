"""``replicate`` for two devices beside the part of ``torch.nn.parallel.replicate`` that copies modules.

The net has 160 modules. Torch's replicate first broadcasts parameters and buffers, and only between GPUs.
Here it is given tensors that are there already, and what is left is the loop over the modules, in Python,
as it stands in torch. Ours does its whole work, copies of the buffers included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from unittest.mock import patch

import torch
from report import Target, save, target_table, timing_table
from side_by_side import Row, hand_over, measure, options_of, timed, under_each_setting
from torch import Tensor, nn

from syncbn_convert import convert_model
from syncbn_parallel import execute_replication_callbacks, replicate

CASE = "160 modules"
TORCH = "torch.nn.parallel.replicate, modules alone"
OURS = "replicate"
WITH_CALLBACKS = "replicate, with callbacks of synchronized layers"


def net_of_160_modules() -> nn.Module:
    """Build 39 blocks of three layers, and a head, of few channels: what counts is their number."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(39)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    if len(list(net.modules())) != 160:
        raise RuntimeError(f"expected 160 modules, built {len(list(net.modules()))}")
    return net


def broadcast_nothing(net: nn.Module) -> AbstractContextManager[object]:
    """Let torch's replicate find all broadcasts of this net's tensors done."""
    tensors = {id(each): each.detach() for each in (*net.parameters(), *net.buffers())}

    def broadcast(wanted: Sequence[Tensor], devices: Sequence[int], detach: bool) -> list[list[Tensor]]:
        return [[tensors[id(each)] for each in wanted] for _ in devices]

    module = sys.modules["torch.nn.parallel.replicate"]  # the package has a function by this name
    return patch.object(module, "_broadcast_coalesced_reshape", broadcast)


def main() -> None:
    """Measure, or collect what child processes have measured."""
    options = options_of(__doc__)
    if options.part:
        on_gpu = options.device == "cuda"
        devices = ["cuda:0", f"cuda:{torch.cuda.device_count() - 1}"] if on_gpu else ["cpu", "cpu"]
        net = net_of_160_modules().to(devices[0])
        converted = convert_model(net_of_160_modules()).to(devices[0])
        steps = {
            TORCH: partial(torch.nn.parallel.replicate, net, list(range(len(devices)))),
            OURS: partial(replicate, net, devices),
            WITH_CALLBACKS: lambda: execute_replication_callbacks(replicate(converted, devices)),
        }
        variants = {name: timed(step, options.device) for name, step in steps.items()}
        with broadcast_nothing(net):
            hand_over(measure(CASE, variants, options))
        return
    rows: list[Row] = under_each_setting(options)
    targets = [Target("to torch's copying of modules", 1 / 3, [((CASE, OURS), (CASE, TORCH))])]
    sections = {"Targets": target_table(targets, rows), "Timings": timing_table(rows)}
    save("replication", options, sections, rows)


if __name__ == "__main__":
    main()
