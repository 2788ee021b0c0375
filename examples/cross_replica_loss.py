"""Two losses over all replicas, built on syncbn-comm and a replication callback.

Needs: torch, syncbn-comm and syncbn-parallel, and nothing else.

- A focal loss is divided by the number of positives in the *whole* batch. Otherwise the examples of a replica
  with few or no positives would count too much.
- A contrastive loss compares every embedding with those of the *whole* batch. The few samples of one replica
  are not enough to compare with.

Both are computed in the replicas. The losses and their gradients equal those of one large batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn_parallel import CallbackContext, DataParallelWithCallback


class AcrossReplicas(nn.Module):
    """A module that can ask its copies in the other replicas."""

    replica = None  # this copy's member of the forward's group; None if the model runs without replicas
    where = ""  # the module's name in the model, for error messages

    def __data_parallel_replicate__(self, ctx: CallbackContext, copy_id: int) -> None:
        """Remember, in this copy only, which replica it is."""
        self.replica = ctx.group.member(copy_id)
        self.where = ctx.name

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of the x of all replicas."""
        if self.replica is None:
            return x
        return self.replica.all_reduce(x, lambda a, b: a + b.to(a.device), where=self.where).to(x.device)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the x of all replicas in rank order.

        They come with their graphs, so gradients flow back into every replica without further ado.
        """
        if self.replica is None:
            return [x]
        return [part.to(x.device) for part in self.replica.all_gather(x, where=self.where)]

    @property
    def rank(self) -> int:
        """The number of this replica."""
        return 0 if self.replica is None else self.replica.rank


class FocalLoss(AcrossReplicas):
    """Binary focal loss: this replica's share of the sum over the batch, divided by all positives.

    Args:
        gamma: how much less well-classified examples count.

    Shape:
        scores and targets: (N, *), the targets 0 or 1; the result: (). The results of all replicas add up to
        the loss of the whole batch.

    Reference:
        Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", 2017.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Compare scores with targets."""
        cross_entropy = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
        probability_of_target = torch.exp(-cross_entropy)
        losses = (1 - probability_of_target) ** self.gamma * cross_entropy
        return losses.sum() / self.total(targets.sum()).clamp(min=1)


class ContrastiveLoss(AcrossReplicas):
    """Distinguish the partner of every embedding from all other embeddings of the batch.

    Args:
        temperature: what similarities are divided by.

    Shape:
        left and right: (N, D), whose rows with the same index are partners; the result: (). The results of
        all replicas add up to the loss of the whole batch.

    Reference:
        van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Compare the embeddings of this replica with those of all replicas."""
        parts = self.parts(F.normalize(right, dim=1))
        before = sum(len(part) for part in parts[: self.rank])  # rows of the replicas before this one
        everybody = torch.cat(parts)
        similarities = F.normalize(left, dim=1) @ everybody.T / self.temperature  # (N, rows of all replicas)
        partners = torch.arange(before, before + len(left), device=left.device)
        return F.cross_entropy(similarities, partners, reduction="sum") / len(everybody)


class Detector(nn.Module):
    """A stand-in for a detection network, with its loss inside, so that the loss runs in the replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 20)
        self.loss = FocalLoss()

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the replica's share of the loss."""
        return self.loss(self.score(x), targets)


class Encoder(nn.Module):
    """A stand-in for a network that embeds two views of an object, with its loss inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.loss = ContrastiveLoss()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the replica's share of the loss."""
        return self.loss(self.embed(left), self.embed(right))


def loss_and_gradient(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return a loss, and its gradient with respect to all parameters as one vector."""
    model.zero_grad()
    loss = compute()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Print the loss of the whole batch, and those of four replicas, together and each for itself."""
    replicas = DataParallelWithCallback(model, device_ids=["cpu"] * 4)
    shares = list(zip(*(tensor.chunk(4) for tensor in batch), strict=True))
    ways: dict[str, Callable[[], Tensor]] = {
        "whole batch": lambda: model(*batch),
        "four replicas together": lambda: replicas(*batch).sum(),
        "four replicas, each for itself": lambda: torch.stack([model(*share) for share in shares]).mean(),
    }
    _, expected = loss_and_gradient(model, ways["whole batch"])
    print(f"{type(model.loss).__name__:<32}{'loss':>12}{'gradient, distance':>24}")
    for way, compute in ways.items():
        loss, gradient = loss_and_gradient(model, compute)
        print(f"  {way:<30}{loss:>12.6f}{(gradient - expected).abs().max().item():>24.1e}")


def main() -> None:
    """Compare both losses over four replicas with those of the whole batch."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    rare = (torch.rand(16, 20) < 0.05).double()
    compare(Detector(), (torch.randn(16, 8), rare))
    left = torch.randn(16, 8)
    compare(Encoder(), (left, left + 0.3 * torch.randn(16, 8)))


if __name__ == "__main__":
    main()
