"""Report what convert_model would do with a model, as a table and as data."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from syncbn_convert._find_layers import Finding, SkipRule, Verdict, survey
from syncbn_convert._forward_check import SYNCHRONIZED
from syncbn_convert._registry import Swap
from syncbn_core import THIS_PROCESS

_HEADINGS = ("name", "class", "features", "convert_model", "synchronizes over")


class _Kind(enum.Enum):
    CONVERTED = enum.auto()
    SKIPPED = enum.auto()
    WRAPPER = enum.auto()
    OTHER = enum.auto()  # its class becomes a registered one that is no synchronized layer


@dataclass(frozen=True)
class ReportRow:
    """One module in a ``Report``.

    Attributes:
        name: the qualified name in the model; empty for the model itself.
        class_name: the name of its present class.
        num_features: the number of channels; None if the module has no such attribute.
        outcome: what convert_model makes of it, or why it leaves it as it is.
        synchronizes_over: the replicas and processes whose batches make the statistics after the conversion;
            empty for a module that does not synchronize.
    """

    name: str
    class_name: str
    num_features: int | None
    outcome: str
    synchronizes_over: str
    _kind: _Kind


@dataclass(frozen=True)
class Report:
    """What ``inspect_model`` has found, in the order of the model; it prints as a table."""

    rows: tuple[ReportRow, ...]

    @property
    def converted(self) -> tuple[ReportRow, ...]:
        """The layers that synchronize now, or will after convert_model."""
        return self._of(_Kind.CONVERTED)

    @property
    def skipped(self) -> tuple[ReportRow, ...]:
        """The other batch norm layers."""
        return self._of(_Kind.SKIPPED)

    @property
    def wrappers(self) -> tuple[ReportRow, ...]:
        """Each nn.DataParallel that convert_model gives replication callbacks."""
        return self._of(_Kind.WRAPPER)

    def _of(self, kind: _Kind) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row._kind is kind)

    def __str__(self) -> str:
        cells = [
            (r.name or "(itself)", r.class_name, str(r.num_features or ""), r.outcome, r.synchronizes_over)
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(_HEADINGS, *cells)]
        table = [_HEADINGS, tuple("-" * width for width in widths), *cells]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        return "\n".join([*lines, "", f"{len(self.converted)} synchronize, {len(self.skipped)} do not"])


def inspect_model(
    module: nn.Module, *, process_group: Any = None, skip: SkipRule | Iterable[SkipRule] = ()
) -> Report:
    """Report, layer by layer, what ``convert_model`` would do with the same arguments, and why.

    It changes nothing. In a shell: ``python -m syncbn_convert package.module:factory``.

    Args:
        module: any model, before or after its conversion.
        process_group: as in ``convert_model``.
        skip: as in ``convert_model``.

    Returns:
        The report. Print it, or read its ``converted``, ``skipped`` and ``wrappers``.

    Raises:
        ValueError: a pattern in ``skip`` matches no module.
        TypeError: ``module`` is not a module; ``skip`` contains something else than patterns and predicates.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2), nn.LazyBatchNorm1d())
        >>> report = inspect_model(model)
        >>> [row.name for row in report.converted], [row.outcome for row in report.skipped]
        (['0'], ['LazyBatchNorm1d has no features yet: run one forward, then convert'])
        >>> print(inspect_model(model[:2]))
        name  class        features  convert_model            synchronizes over
        ----  -----------  --------  -----------------------  -----------------------
        0     BatchNorm1d  4         SynchronizedBatchNorm1d  replicas, default group
        <BLANKLINE>
        1 synchronize, 0 do not
    """
    return Report(tuple(_row(finding, process_group) for finding in survey(module, skip)))


def _row(finding: Finding, process_group: Any) -> ReportRow:
    module = finding.module
    kind, outcome, over = _Kind.SKIPPED, finding.reason, ""
    if isinstance(module, nn.DataParallel):
        kind = _Kind.WRAPPER
        outcome = outcome or str(finding.conversion)
    elif isinstance(finding.conversion, Swap) and not issubclass(finding.conversion.target, SYNCHRONIZED):
        kind, outcome = _Kind.OTHER, str(finding.conversion)
    elif finding.verdict is Verdict.CONVERTS:
        group = vars(module).get("process_group") if process_group is None else process_group
        kind, outcome, over = _Kind.CONVERTED, str(finding.conversion), _scope(group)
    elif finding.verdict is Verdict.SYNCHRONIZES:
        kind, outcome, over = _Kind.CONVERTED, "synchronized already", _scope(module.process_group)
    return ReportRow(
        name=finding.name,
        class_name=type(module).__name__,
        num_features=vars(module).get("num_features"),
        outcome=outcome,
        synchronizes_over=over,
        _kind=kind,
    )


def _scope(process_group: Any) -> str:
    """Return over which replicas and processes a layer with this process group synchronizes."""
    if process_group is None:
        return "replicas, default group"
    if process_group is THIS_PROCESS:
        return "replicas of this process"
    return f"replicas, group of {process_group.size()}"
