"""Two runs with one seed are bitwise equal, in one process or in two, however the threads interleave."""

import hashlib
import subprocess
import sys

import torch
from torch import nn

from syncbn_convert import convert_model


class FanOut(nn.Module):
    """One tensor feeds three layers, whose gradients are added up where it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, size, padding=size // 2), nn.BatchNorm2d(8)) for size in (1, 3, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return torch.stack([branch(x) for branch in self.branches]).square().mean(dim=(0, 3, 4))


def train(split_as) -> str:
    """Train for ten steps; return a hash of all weights and buffers."""
    torch.manual_seed(0)
    model = convert_model(FanOut())
    replicas = split_as(model, [4, 3, 4, 5])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        loss = replicas(torch.randn(16, 3, 10, 10)).sin().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    return hashlib.sha256(b"".join(state)).hexdigest()


def test_runs_in_one_process_are_bitwise_equal(split_as):
    hashes = set()
    for unrelated_nodes in range(6):
        # Graphs built in between move the numbers by which autograd orders its nodes.
        x = torch.ones(3, requires_grad=True)
        for _ in range(17 * unrelated_nodes):
            x = x * 1
        hashes.add(train(split_as))
    assert len(hashes) == 1


def test_a_run_in_another_process_is_bitwise_equal(split_as):
    program = f"""
import runpy
print(runpy.run_path({__file__!r})["train"](runpy.run_path({split_as_file(split_as)!r})["SplitAs"]))
"""
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (other.returncode, other.stderr) == (0, "")
    assert other.stdout.strip() == train(split_as)


def split_as_file(split_as) -> str:
    return sys.modules[split_as.__module__].__file__
