"""The layers, as users build them."""

from __future__ import annotations

from torch import nn

from syncbn_core._base import _SynchronizedBatchNorm


class SynchronizedBatchNorm1d(_SynchronizedBatchNorm, nn.BatchNorm1d):
    """Batch norm over ``(N, C)`` or ``(N, C, L)`` by the statistics of the batches of all replicas.

    A drop-in ``nn.BatchNorm1d``: the same arguments, attributes and state-dict keys. See
    :class:`SynchronizedBatchNorm2d`.
    """

    _dims = (2, 3)


class SynchronizedBatchNorm2d(_SynchronizedBatchNorm, nn.BatchNorm2d):
    """Batch norm over ``(N, C, H, W)`` by the statistics of the batches of all replicas.

    Inside a replicated model (``syncbn_parallel.DataParallelWithCallback``, or an ``nn.DataParallel``), and
    over processes, a layer in training normalizes by the mean and the variance of all replicas' batches
    together, weighted by their true sizes. Its gradients are those of the whole batch. In evaluation, or
    without other replicas, it is ``torch.nn.functional.batch_norm``::

        y = (x - mean) / sqrt(var + eps) * weight + bias

    Args:
        num_features: the number of channels C, at least 1.
        eps: added to the variance, or its floor (see ``eps_mode``).
        momentum: the weight of the new batch in the running statistics; None for their cumulative average.
        affine: whether the layer has a weight and a bias, ``(C,)`` each.
        track_running_stats: whether the layer has running statistics. Without them, evaluation normalizes by
            its own batch.
        device: of the parameters and buffers. A process group in this place is taken as ``process_group``,
            since ``nn.SyncBatchNorm`` has it there.
        dtype: of the parameters and buffers.
        process_group: where ``torch.distributed`` is initialized, the processes to synchronize over, with all
            their replicas: None for the default group, ``THIS_PROCESS`` for the replicas of this process
            alone.
        eps_mode: ``"plus"`` for ``sqrt(var + eps)``; ``"clamp"`` for ``sqrt(max(var, eps))``;
            ``"clamp_synchronized"`` for the second where the layer synchronizes and the first elsewhere; None
            for what `set_sbn_eps_mode` has set.
        fused: True for torch's fused kernels, with first derivatives only; False for plain operations, which
            are slower and have derivatives of any order.
        bias: False for a weight without a bias.

    Attributes:
        layer_name: the layer's name in the model, for error messages; None to use its class name.
            ``convert_model`` sets it; in replicas the wrapper gives the name.

    Shape:
        - Input: ``(N, C, H, W)``; N may be 0 and may differ among the replicas.
        - Output: as the input, in its dtype and memory format.

    Raises:
        ValueError: an input of another shape; or a single value per channel in all replicas together.
        TypeError: an input of integers; or inputs of different dtypes in the replicas.
        RuntimeError: an input of another dtype than the parameters; or a backward inside a replica's forward.
        syncbn_comm.BrokenSyncError: another replica or process failed, finished early, or did not arrive
            before the timeout.

    Example:
        >>> import torch
        >>> layer = SynchronizedBatchNorm2d(3)
        >>> layer(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])

    Reference:
        S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
        Covariate Shift", 2015.
    """

    _dims = (4,)


class SynchronizedBatchNorm3d(_SynchronizedBatchNorm, nn.BatchNorm3d):
    """Batch norm over ``(N, C, D, H, W)`` by the statistics of the batches of all replicas.

    A drop-in ``nn.BatchNorm3d``: the same arguments, attributes and state-dict keys. See
    :class:`SynchronizedBatchNorm2d`.
    """

    _dims = (5,)


class SynchronizedBatchNorm(_SynchronizedBatchNorm):
    """Batch norm over ``(N, C)`` to ``(N, C, D, H, W)`` by the statistics of the batches of all replicas.

    Accepts any number of dimensions, as ``nn.SyncBatchNorm`` does. See :class:`SynchronizedBatchNorm2d`.
    """
