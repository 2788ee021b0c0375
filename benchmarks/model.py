"""A training step of whole networks over replicas, beside the whole batch on one device.

The nets: a residual net of 20 layers, a U-Net, and a small chain of 15 layers, in which there is little to
do beside what replicas cost. A step is forward, loss, backward and SGD; splitting the batch and joining the
outputs are included. With ``--device cuda`` the last two nets are larger.

Of the synchronized steps on the CPU it also says what share of their time goes where. These shares come
from a run with clocks in it, and count a second of one of R threads that work side by side as 1 / R seconds.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from clocks import Clocks
from nets import UNet, chain, residual_net
from report import Target, save, table, target_table, timing_table
from side_by_side import (
    SETTINGS,
    Row,
    hand_over,
    in_child,
    measure,
    options_of,
    timed,
    under_each_setting,
    wait_for,
)
from torch import nn

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

WHOLE = "whole batch"
REPLICAS = (2, 4)
_STEPS_WITH_CLOCKS = 10


@dataclass
class Net:
    """A network and its task."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int
    classified: bool = False  # a class per image; else a class per pixel, of the channels


NETS = [
    Net("chain of 15, width 8, batch 8, 16x16", chain, 8, 16),
    Net("residual net of 20, width 32, batch 32, 32x32", residual_net, 32, 32, classified=True),
    Net("U-Net, width 16, batch 8, 64x64", UNet, 8, 64),
]
CHAIN, RESIDUAL = NETS[0].name, NETS[1].name
NETS_OF_GPUS = [
    NETS[0],
    Net(
        "residual net of 20, width 128, batch 128, 32x32",
        partial(residual_net, 128),
        128,
        32,
        classified=True,
    ),
    Net("U-Net, width 64, batch 16, 256x256", partial(UNet, 64), 16, 256),
]


class Training:
    """A step of SGD on one batch."""

    def __init__(self, net: Net, model: nn.Module, device: str) -> None:
        self.model = model
        self.images = torch.randn(net.batch, 3, net.size, net.size, device=device)
        shape = [net.batch] if net.classified else [net.batch, net.size, net.size]
        self.labels = torch.randint(8, shape, device=device)
        # So small a rate that hundreds of steps leave the net what it was.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def __call__(self) -> None:
        """Take a step."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def variants_of(net: Net, options: argparse.Namespace) -> dict[str, Training]:
    """The same net on the whole batch, and over replicas that are synchronized or not."""
    home = "cuda:0" if options.device == "cuda" else "cpu"
    torch.manual_seed(0)
    model = net.build().to(home)
    variants = {WHOLE: Training(net, copy.deepcopy(model), home)}
    for count in REPLICAS:
        # Two replicas share the first GPU, as with layer.py; further ones take what there is.
        available = max(1, torch.cuda.device_count() if count > 2 else 1)
        devices = [f"cuda:{i % available}" for i in range(count)] if home != "cpu" else ["cpu"] * count
        for name, one in [("unsynchronized", model), ("synchronized", convert_model(copy.deepcopy(model)))]:
            replicated = DataParallelWithCallback(copy.deepcopy(one), devices)
            variants[f"{count} {name}"] = Training(net, replicated, home)
    return variants


@dataclass
class Share:
    """What part of a variant's step goes where; each from 0 to 1."""

    case: str
    variant: str
    parts: dict[str, float]


def shares_of(net: Net, options: argparse.Namespace) -> list[Share]:
    """Take steps of the synchronized variants with clocks in them."""
    variants = variants_of(net, options)
    results = []
    for count in REPLICAS:
        name = f"{count} synchronized"
        step = variants[name]
        steps = 1 if options.quick else _STEPS_WITH_CLOCKS
        for _ in range(steps):
            step()
        clocks = Clocks(count)
        with clocks.running():
            wait_for(options.device)
            start = time.perf_counter()
            for _ in range(steps):
                step()
            wait_for(options.device)
            total = time.perf_counter() - start
        parts = {part: seconds / total for part, seconds in clocks.seconds.items()}
        results.append(Share(net.name, name, parts))
    return results


def share_table(shares: list[Share]) -> str:
    """Show the shares in percent; what is left is the rest of the net."""
    parts = list(shares[0].parts)
    lines = []
    for share in shares:
        rest = 1 - sum(share.parts.values())
        cells = [f"{each:.1%}" for each in (*(share.parts[part] for part in parts), rest)]
        lines.append([share.case, share.variant, *cells])
    return table(["case", "variant", *parts, "all else"], lines)


def main() -> None:
    """Measure, or collect what child processes have measured."""
    options = options_of(__doc__)
    nets = NETS_OF_GPUS if options.device == "cuda" else NETS
    nets = nets[:1] if options.quick else nets
    if options.part == "timings":
        rows: list[Row] = []
        for net in nets:
            steps = variants_of(net, options)
            variants = {name: timed(step, options.device) for name, step in steps.items()}
            rows += measure(net.name, variants, options)
        hand_over(rows)
    elif options.part == "shares":
        hand_over([share for net in nets for share in shares_of(net, options)])
    else:
        rows = under_each_setting(options)
        synchronized = "2 synchronized"
        targets = [
            Target(f"R = 2 to {other}, {net}", limit, [((net, synchronized), (net, other))])
            for net, other, limit in [(RESIDUAL, WHOLE, 1.05), (CHAIN, "2 unsynchronized", 1.6)]
        ]
        sections = {"Targets": target_table(targets, rows)}
        if options.device == "cpu":
            shares = [Share(**each) for each in in_child("shares", SETTINGS["pinned"])]
            sections["Where the time of a step goes"] = share_table(shares)
        save("model", options, {**sections, "Timings": timing_table(rows)}, rows)


if __name__ == "__main__":
    main()
