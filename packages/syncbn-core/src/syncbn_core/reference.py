"""Batch normalization in plain operations: what the layers of this package compute, on one device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from syncbn_core._kernels.statistics import sum_over_batch, unsqueeze_channels


class BatchNorm2dReimpl(nn.Module):
    """Batch norm over ``(N, C, H, W)`` in plain operations, to read and to test against.

    Args:
        num_features: the number of channels C.
        eps: added to the variance.
        momentum: the weight of the new batch in the running statistics.

    Shape:
        - Input and output: ``(N, C, H, W)``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> x = torch.randn(2, 3, 4, 4)
        >>> torch.allclose(BatchNorm2dReimpl(3)(x), nn.BatchNorm2d(3)(x), atol=1e-5)
        True

    Reference:
        S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", 2015, algorithm 1.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features))
        self.register_buffer("running_var", torch.empty(num_features))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0 and the running variance to 1."""
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def reset_parameters(self) -> None:
        """Reset the running statistics, and weight and bias to 1 and 0."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C, H, W)``: by its own statistics in training, else by the running ones."""
        mean, var = self._statistics(input) if self.training else (self.running_mean, self.running_var)
        normalized = (input - unsqueeze_channels(mean, input)) / unsqueeze_channels(
            (var + self.eps).sqrt(), input
        )
        return normalized * unsqueeze_channels(self.weight, input) + unsqueeze_channels(self.bias, input)

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        count = input.numel() // input.shape[1]
        mean = sum_over_batch(input) / count
        m2 = sum_over_batch((input - unsqueeze_channels(mean, input)) ** 2)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(m2 / (count - 1), self.momentum)
        return mean, m2 / count
