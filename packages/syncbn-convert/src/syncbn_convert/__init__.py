"""Turn a model's batch norm layers into synchronized ones and back, and change nothing else."""

from syncbn_convert._convert import convert_model, revert_model
from syncbn_convert._find_layers import SkipRule
from syncbn_convert._inspect import Report, ReportRow, inspect_model
from syncbn_convert._patch import patch_sync_batchnorm
from syncbn_convert._registry import register_conversion
from syncbn_convert._timm_layers import class_in_pickle as _class_in_pickle

__all__ = [
    "Report",
    "ReportRow",
    "SkipRule",
    "convert_model",
    "inspect_model",
    "patch_sync_batchnorm",
    "register_conversion",
    "revert_model",
]
__version__ = "0.1.0"

# Pickles and tracebacks name the classes as users import them, so that files can move.
Report.__module__ = ReportRow.__module__ = __name__

# A ``def __getattr__`` would tell type checkers that every name exists.
globals()["__getattr__"] = _class_in_pickle
