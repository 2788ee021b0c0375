"""A training run continues from its checkpoint on any replicas, with the losses of the whole batch."""

import io

import torch
from torch import nn

from syncbn_convert import convert_model
from syncbn_core import THIS_PROCESS
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 3


class Training:
    """A net, its optimizer, and the losses of its steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(96, 5), nn.BatchNorm1d(5)),
        ).double()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def load(self, checkpoint):
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self):
        file = io.BytesIO()
        torch.save({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()


def batch_of_step(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (8,), generator=generator)


def train(world, training, forward, first_step, shared):
    """Take some steps; with shared ones, gradients and losses are means over the processes."""
    losses = []
    for step in range(first_step, first_step + STEPS):
        x, labels = map(world.share, batch_of_step(step)) if shared else batch_of_step(step)
        training.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        if shared:
            loss = world.total(loss) / world.size
            for parameter in training.net.parameters():
                parameter.grad = world.total(parameter.grad) / world.size
        training.optimizer.step()
        losses.append(loss.detach())
    return losses


def whole_batch(training):
    return training.net


def replicas(training):
    return DataParallelWithCallback(convert_model(training.net, process_group=THIS_PROCESS), ["cpu"] * 2)


def processes_alone(training):
    return convert_model(training.net)


def replicas_and_processes(training):
    return DataParallelWithCallback(convert_model(training.net), ["cpu"] * 2)


JOURNEY = [  # every place after every other one
    *(whole_batch, replicas, processes_alone, replicas_and_processes),
    *(whole_batch, processes_alone, replicas, replicas_and_processes),
    *(replicas, whole_batch, replicas_and_processes, processes_alone, whole_batch),
]


def travel(world):
    stay_at_home = Training()
    checkpoint = None
    for leg, place in enumerate(JOURNEY):
        training = Training()
        if checkpoint is not None:
            training.load(checkpoint)
        shared = place in (processes_alone, replicas_and_processes)
        losses = train(world, training, place(training), leg * STEPS, shared)
        expected = train(world, stay_at_home, stay_at_home.net, leg * STEPS, False)
        torch.testing.assert_close(losses, expected, **EXACT)
        checkpoint = training.save()
    torch.testing.assert_close(training.net.state_dict(), stay_at_home.net.state_dict(), **EXACT)


def test_checkpoints_move_among_whole_batch_replicas_processes_and_both(processes):
    processes(2).run(travel)
