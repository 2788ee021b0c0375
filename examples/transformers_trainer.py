"""transformers.Trainer, which wraps the model in nn.DataParallel: convert the model before.

Needs: ``pip install transformers accelerate``, besides torch and syncbn-convert.

On a machine with several GPUs, write ``Trainer(convert_model(model), ...)``: the converted layers synchronize
in the ``nn.DataParallel`` that Trainer makes. This program does not need GPUs: it makes four replicas on the
CPU at the same place (``_wrap_model``), and prints how far the weights are from those of a training on the
whole batches.
"""

import copy
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

try:
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is missing: pip install transformers accelerate") from error

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback


class Images(Dataset[dict[str, Tensor]]):
    """Random images and labels, the same ones each time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(32, 3, 16, 16, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(5, (32,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class OnFourReplicas(Trainer):
    """Does on the CPU what Trainer does where it finds four GPUs."""

    def _wrap_model(self, model: nn.Module, training: bool = True, **_: Any) -> nn.Module:
        return DataParallelWithCallback(model, ["cpu"] * 4) if training else model


def train(model: nn.Module, trainer_class: type[Trainer], replicas: int) -> nn.Module:
    """Train for one epoch with batches of 8."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8 // replicas,
            num_train_epochs=1,
            learning_rate=0.05,
            optim="sgd",
            average_tokens_across_devices=False,  # a model of images has no tokens to average over
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        if arguments.device.type == "cpu":
            arguments._n_gpu = replicas  # what Trainer finds out on a machine with GPUs
        trainer_class(model, arguments, train_dataset=Images()).train()
    return model


def main() -> None:
    """Train the whole batch and four replicas, and say how far apart the two models are."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    model = ResNetForImageClassification(config).double()
    whole = train(copy.deepcopy(model), Trainer, 1)
    replicas = train(convert_model(model), OnFourReplicas, 4)
    pairs = zip(whole.state_dict().values(), replicas.state_dict().values(), strict=True)
    distance = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"after 4 steps, four replicas are this far from the whole batch: {distance:.0e}")


if __name__ == "__main__":
    main()
