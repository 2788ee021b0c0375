"""Find the batch norm layers of a model, and what ``convert_model`` does with each; change nothing."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase, _NormBase
from torch.nn.utils import parametrize

from syncbn_convert._change_layer import OPTIONS
from syncbn_convert._forward_check import SYNCHRONIZED, why_unsynchronized
from syncbn_convert._kept_forwards import kept_forwards
from syncbn_convert._registry import Build, Conversion, Swap, Wrap, conversion_of
from syncbn_parallel import DataParallelWithCallback

SkipRule = str | Callable[[str, nn.Module], bool]


class Verdict(enum.Enum):
    """What ``convert_model`` does with a module."""

    CONVERTS = enum.auto()
    SYNCHRONIZES = enum.auto()  # it is a synchronized layer already
    SKIPPED = enum.auto()  # the user asked for it
    LEFT_ALONE = enum.auto()  # there is no conversion for it
    WRAPPED = enum.auto()  # it would convert, but it is inside a DistributedDataParallel


@dataclass(frozen=True)
class Finding:
    """One module that convert_model changes, or that it reports.

    Attributes:
        name: the module's (first) qualified name.
        module: the module.
        verdict: what convert_model does with it.
        conversion: how it converts, if it does.
        reason: why it does not convert, if it does not.
    """

    name: str
    module: nn.Module
    verdict: Verdict
    conversion: Conversion | None = None
    reason: str = ""


def survey(model: nn.Module, skip: SkipRule | Iterable[SkipRule] = ()) -> list[Finding]:
    """Return a finding for every batch norm layer, registered class and nn.DataParallel of a model."""
    enclosed = _requested(model, skip)
    for module in model.modules():
        if enclosure := _enclosure(module):
            for member in module.modules():
                if member is not module:
                    enclosed.setdefault(member, enclosure)
    kept = kept_forwards(model)
    findings = []
    for name, module in model.named_modules():
        finding = _by_itself(name, module)
        if finding is None:
            continue
        if isinstance(finding.conversion, Swap) and module in kept:
            finding = Finding(name, module, Verdict.LEFT_ALONE, reason=_kept_in(kept[module]))
        if module in enclosed and finding.verdict is not Verdict.SYNCHRONIZES:
            verdict, reason = enclosed[module]
            if verdict is not Verdict.WRAPPED or finding.verdict is Verdict.CONVERTS:
                finding = Finding(name, module, verdict, reason=reason)
        findings.append(finding)
    return findings


def called(name: str) -> str:
    """Return a module's qualified name for a message."""
    return repr(name) if name else "the model itself"


def warn_left_alone(findings: list[Finding]) -> None:
    """Give the caller of convert_model one warning about all layers that have no conversion."""
    left = [f for f in findings if f.verdict is Verdict.LEFT_ALONE]
    if left:
        lines = [f"  {called(f.name)}: {f.reason}" for f in left]
        warnings.warn(
            f"convert_model left {len(left)} batch norm layer(s) alone, which do not synchronize:\n"
            + "\n".join(lines)
            + "\nUse register_conversion(SourceType, factory) to define what such a layer becomes, or "
            "skip= to leave it without this warning.",
            stacklevel=3,
        )


def _requested(model: nn.Module, skip: SkipRule | Iterable[SkipRule]) -> dict[nn.Module, tuple[Verdict, str]]:
    """Return the modules that a rule matches under any of their names, with all that they contain."""
    rules = [skip] if isinstance(skip, str) or callable(skip) else list(skip)
    named = list(model.named_modules(remove_duplicate=False))
    requested: dict[nn.Module, tuple[Verdict, str]] = {}
    for rule in rules:
        if isinstance(rule, str):
            matched = [module for name, module in named if fnmatchcase(name, rule)]
            reason = f"matches skip={rule!r}"
            if not matched:
                # A misspelled pattern would convert the layers that it was meant to protect.
                raise ValueError(
                    f"skip: expected the name of a module or a pattern for names, got {rule!r}, which "
                    "matches no module; model.named_modules() lists the names"
                )
        elif isinstance(rule, (type, nn.Module)) or not callable(rule):
            raise TypeError(
                f"skip: expected names, patterns and predicates (name, module) -> bool, got {rule!r}"
            )
        else:
            matched = [module for name, module in named if rule(name, module)]
            reason = f"matches skip={getattr(rule, '__qualname__', repr(rule))}"
        for module in matched:
            for inner in module.modules():
                requested.setdefault(inner, (Verdict.SKIPPED, reason))
    return requested


def _enclosure(module: nn.Module) -> tuple[Verdict, str] | None:
    """Return what this module means for the modules inside it; None if nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return Verdict.LEFT_ALONE, "part of a TorchScript module: convert before scripting or tracing"
    if type(module).__module__.startswith("torch.ao.nn."):
        return Verdict.LEFT_ALONE, f"part of the quantized or fused {type(module).__name__}"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return Verdict.WRAPPED, "inside a DistributedDataParallel"
    if isinstance(conversion_of(type(module)), Build):
        return Verdict.SKIPPED, f"part of a {type(module).__name__}, which converts as a whole"
    return None


def _kept_in(place: str) -> str:
    return f"{place} holds its forward, which would still be the unsynchronized one: store the layer itself"


def _by_itself(name: str, module: nn.Module) -> Finding | None:
    """Return the finding about a module, wherever it is; None if it has nothing to do with batch norm."""
    if isinstance(module, nn.DataParallel):
        if isinstance(module, DataParallelWithCallback):
            return None
        return Finding(name, module, Verdict.CONVERTS, Wrap(module))
    if isinstance(module, SYNCHRONIZED):
        reason = why_unsynchronized(type(module))
        if reason:
            return Finding(name, module, Verdict.LEFT_ALONE, reason=f"{type(module).__name__} {reason}")
        return Finding(name, module, Verdict.SYNCHRONIZES)
    conversion = conversion_of(type(module))
    if conversion is not None:
        obstacle = _obstacle(module, conversion.target) if isinstance(conversion, Swap) else ""
        if obstacle:
            return Finding(name, module, Verdict.LEFT_ALONE, reason=obstacle)
        return Finding(name, module, Verdict.CONVERTS, conversion)
    reason = _kinship(module)
    return Finding(name, module, Verdict.LEFT_ALONE, reason=reason) if reason else None


def _obstacle(module: nn.Module, target: type[nn.Module]) -> str:
    """Return what on this object, not in its class, prevents its conversion; '' if nothing does."""
    own = vars(module)
    if "forward" in own:
        return "has a forward that is set on the object, which would still run the unsynchronized one"
    if own.get("qconfig") is not None:
        return "prepared for quantization (it has a qconfig)"
    for option in OPTIONS if issubclass(target, SYNCHRONIZED) else ():
        expected = option == "process_group" and isinstance(module, nn.SyncBatchNorm)
        if option in own and not expected:
            return f"has an attribute {option!r}, which a synchronized layer uses for another purpose"
    return ""


def _kinship(module: nn.Module) -> str:
    """Return why a module without a conversion is a batch norm; '' if it is none."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module) and isinstance(module, _BatchNorm):
        return "is parametrized: convert first, then parametrize"
    if isinstance(module, _LazyNormBase) and isinstance(module, _BatchNorm):
        return f"{kind} has no features yet: run one forward, then convert"
    if isinstance(module, _BatchNorm):
        base = next(c for c in type(module).__mro__ if c.__module__ == _BatchNorm.__module__)
        return f"{kind} is a subclass of {base.__name__}"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{module.original_name} in TorchScript" if "BatchNorm" in module.original_name else ""
    buffers = dict(module.named_buffers(recurse=False))
    if {"running_mean", "running_var"} <= buffers.keys() and not isinstance(module, _NormBase):
        return f"{kind} keeps running statistics, but is no subclass of torch's batch norm"
    return ""
