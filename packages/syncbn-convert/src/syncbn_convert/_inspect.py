"""What convert_model makes of a model, as a table and as data."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from syncbn_core import THIS_PROCESS

from ._survey import Finding, SkipRule, Verdict, survey

_HEADINGS = ("name", "class", "features", "convert_model", "synchronizes over")


class _Kind(enum.Enum):
    CONVERTED = enum.auto()
    SKIPPED = enum.auto()
    WRAPPER = enum.auto()


@dataclass(frozen=True)
class Row:
    """One module in a ``Report``.

    Attributes:
        name: the qualified name in the model; '' for the model itself.
        class_name: of the class that it has now.
        num_features: C; None where the module does not say.
        outcome: what convert_model makes of it, or why it does nothing.
        synchronizes_over: whose batches make the statistics, once converted; '' for what does not convert.
    """

    name: str
    class_name: str
    num_features: int | None
    outcome: str
    synchronizes_over: str
    _kind: _Kind


@dataclass(frozen=True)
class Report:
    """What ``inspect_model`` found, in the model's order; prints as a table."""

    rows: tuple[Row, ...]

    @property
    def converted(self) -> tuple[Row, ...]:
        """The layers that synchronize, or will once convert_model has run."""
        return self._of(_Kind.CONVERTED)

    @property
    def skipped(self) -> tuple[Row, ...]:
        """The other batch norm layers."""
        return self._of(_Kind.SKIPPED)

    @property
    def wrappers(self) -> tuple[Row, ...]:
        """Each nn.DataParallel that convert_model gives replication callbacks."""
        return self._of(_Kind.WRAPPER)

    def _of(self, kind: _Kind) -> tuple[Row, ...]:
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
    model: nn.Module, *, process_group: Any = None, skip: SkipRule | Iterable[SkipRule] = ()
) -> Report:
    """Say, layer by layer, what ``convert_model`` would do with the same arguments, and why; change nothing.

    From a shell: ``python -m syncbn_convert package.module:factory``.

    Args:
        model: any module, before or after its conversion.
        process_group: as for ``convert_model``.
        skip: as for ``convert_model``.

    Returns:
        The report: print it, or ask for its ``converted`` and ``skipped`` layers.

    Raises:
        ValueError: a pattern in ``skip`` matches nothing.
        TypeError: the model is no module; ``skip`` holds something else than patterns and predicates.

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
    return Report(tuple(_row(finding, process_group) for finding in survey(model, skip)))


def _row(finding: Finding, process_group: Any) -> Row:
    module = finding.module
    kind, outcome, over = _Kind.SKIPPED, finding.reason, ""
    if isinstance(module, nn.DataParallel):
        kind = _Kind.WRAPPER
        outcome = outcome or str(finding.conversion)
    elif finding.verdict is Verdict.CONVERTS:
        group = vars(module).get("process_group") if process_group is None else process_group
        kind, outcome, over = _Kind.CONVERTED, str(finding.conversion), _scope(group)
    elif finding.verdict is Verdict.SYNCHRONIZES:
        kind, outcome, over = _Kind.CONVERTED, "synchronized already", _scope(module.process_group)
    return Row(
        name=finding.name,
        class_name=type(module).__name__,
        num_features=vars(module).get("num_features"),
        outcome=outcome,
        synchronizes_over=over,
        _kind=kind,
    )


def _scope(process_group: Any) -> str:
    """Whose batches a layer with this process group normalises together."""
    if process_group is None:
        return "replicas, default group"
    if process_group is THIS_PROCESS:
        return "replicas of this process"
    return f"replicas, group of {process_group.size()}"
