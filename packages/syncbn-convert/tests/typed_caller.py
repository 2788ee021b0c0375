"""A user's program, for the type checker: every public name, with the types that users give and get."""

from __future__ import annotations

from typing import assert_type

from torch import nn

from syncbn_convert import (
    Report,
    ReportRow,
    SkipRule,
    convert_model,
    inspect_model,
    patch_sync_batchnorm,
    register_conversion,
    revert_model,
)
from syncbn_core import THIS_PROCESS


def is_head(name: str, module: nn.Module) -> bool:
    return name.startswith("head") and isinstance(module, nn.BatchNorm1d)


def replace(layer: nn.BatchNorm2d) -> nn.Module:
    return nn.Identity()


def first_row(report: Report) -> ReportRow:
    return report.rows[0]


model = nn.Sequential(nn.BatchNorm1d(3))
converted = convert_model(
    model, process_group=THIS_PROCESS, eps_mode="clamp", fused=False, skip=["0", is_head], inplace=False
)
convert_model(model, skip="0")
convert_model(model, skip=is_head)
assert_type(converted, nn.Sequential)  # the type of the model survives
assert_type(revert_model(converted), nn.Sequential)
assert_type(convert_model(module=nn.BatchNorm2d(3)), nn.BatchNorm2d)
rules: list[SkipRule] = ["0", is_head]
convert_model(model, skip=rules)

report: Report = inspect_model(model, process_group=None, skip=("0",))
names: list[str] = [row.name for row in (*report.converted, *report.skipped, *report.wrappers)]
features: list[int | None] = [row.num_features for row in report.rows]

with patch_sync_batchnorm(process_group=None, eps_mode="plus", fused=True):
    built: nn.Module = nn.BatchNorm2d(3)

with register_conversion(nn.BatchNorm2d, replace):
    convert_model(model)
handle = register_conversion(nn.BatchNorm2d, nn.BatchNorm2d)
handle.remove()
