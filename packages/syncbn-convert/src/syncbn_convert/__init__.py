"""Turning a model's batch norm layers into synchronized ones, and back, and changing nothing else."""

from ._convert import convert_model, revert_model
from ._inspect import inspect_model
from ._patch import patch_sync_batchnorm
from ._registry import register_conversion

__all__ = ["convert_model", "inspect_model", "patch_sync_batchnorm", "register_conversion", "revert_model"]
__version__ = "0.1.0"
