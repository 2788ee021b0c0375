"""A model, not a measurement: what synchronizing the 53 layers of ResNet-50 costs a step, by processes.

A message of n bytes takes ``latency + n / bandwidth`` from one process to the next. Each layer has two
collectives, as in syncbn-core: one of 2C + 1 float64 numbers in the forward, one of 2C in the backward. Up
to 8 processes both are gathers in a ring, of P - 1 messages each. Beyond that both are reductions: in a
tree of 2 log2(P) messages of n bytes (as NCCL reduces so few numbers), or in a ring of 2(P - 1) messages of
n / P bytes (as gloo does). The model leaves out the time that processes wait for one another because they
are not equally fast.
"""

import argparse
import math

GATHER_UP_TO = 8
FLOAT64 = 8  # bytes
CHANNELS = [64]  # of every batch norm of a ResNet-50
for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
    CHANNELS += [width, width, 4 * width] * blocks + [4 * width]


def gather_seconds(processes: int, size: int, latency: float, bandwidth: float) -> float:
    """A gather of ``size`` bytes of every process, in a ring."""
    return (processes - 1) * (latency + size / bandwidth)


def ring_seconds(processes: int, size: int, latency: float, bandwidth: float) -> float:
    """A reduction in a ring."""
    return 2 * (processes - 1) * (latency + size / processes / bandwidth)


def tree_seconds(processes: int, size: int, latency: float, bandwidth: float) -> float:
    """A reduction in a tree."""
    return 2 * math.log2(processes) * (latency + size / bandwidth)


def step_seconds(processes: int, tree: bool, latency: float, bandwidth: float) -> tuple[float, float]:
    """All collectives of the 53 layers: those of forward, those of backward."""
    if processes == 1:
        return 0.0, 0.0
    reduce_seconds = tree_seconds if tree else ring_seconds
    seconds = gather_seconds if processes <= GATHER_UP_TO else reduce_seconds
    forward = [seconds(processes, FLOAT64 * (2 * c + 1), latency, bandwidth) for c in CHANNELS]
    backward = [seconds(processes, FLOAT64 * 2 * c, latency, bandwidth) for c in CHANNELS]
    return sum(forward), sum(backward)


def main() -> None:
    """Print the model's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=5e-6, help="seconds from one process to the next")
    parser.add_argument("--bandwidth", type=float, default=10e9, help="bytes per second")
    parser.add_argument("--ring", action="store_true", help="reduce in a ring, as gloo does")
    arguments = parser.parse_args()
    print("| processes that synchronize | forward, ms | backward, ms |")
    print("|---|---|---|")
    for processes in (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096):
        parts = step_seconds(processes, not arguments.ring, arguments.latency, arguments.bandwidth)
        cells = " | ".join(f"{1e3 * part:,.1f}" for part in parts)
        print(f"| {processes} | {cells} |")


if __name__ == "__main__":
    main()
