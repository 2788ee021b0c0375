"""convert_model and revert_model: plan all changes, then make all of them or none."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar, cast

from torch import nn

from syncbn_convert._all_or_nothing import Edit, carry_out, substitutions
from syncbn_convert._change_layer import EpsMode, convert_wrapper, layer_options, settle, swap_layer
from syncbn_convert._find_layers import Finding, SkipRule, Verdict, called, survey, warn_left_alone
from syncbn_convert._forward_check import SYNCHRONIZED, why_unsynchronized
from syncbn_convert._registry import Build, Swap, Wrap
from syncbn_convert._revert_notes import (
    NOTE,
    BuildNote,
    SwapNote,
    build_back,
    lost_tensors,
    note_build,
    swap_back,
)

Module = TypeVar("Module", bound=nn.Module)


def convert_model(
    module: Module,
    *,
    process_group: Any = None,
    eps_mode: EpsMode | None = None,
    fused: bool = True,
    skip: SkipRule | Iterable[SkipRule] = (),
    inplace: bool = True,
) -> Module:
    """Turn the batch norm layers of a model into synchronized ones, and change nothing else.

    Layers of exactly the classes ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``nn.SyncBatchNorm``, and timm's
    ``BatchNormAct2d`` and ``SyncBatchNormAct``, at every depth, become synchronized layers. An
    ``nn.DataParallel`` becomes a ``DataParallelWithCallback`` on the same devices; an instance of a subclass
    of ``nn.DataParallel`` gets replication callbacks.

    The objects stay, and only their class changes. So parameters, buffers, hooks, training and requires_grad
    flags, attributes, shared modules and state-dict keys stay, and an optimizer that was built before still
    works. Other kinds of batch norm stay as they are; one warning lists them. Layers that are synchronized
    already keep their options.

    Args:
        module: the model; any module, also a single batch norm layer.
        process_group: for the converted layers, as in ``SynchronizedBatchNorm2d``. With None, an
            ``nn.SyncBatchNorm`` keeps its group.
        eps_mode: for the converted layers, as in ``SynchronizedBatchNorm2d``.
        fused: for the converted layers, as in ``SynchronizedBatchNorm2d``.
        skip: the modules to leave as they are, with all that they contain: names, shell-style patterns for
            names (``"decoder"``, ``"*.bn2"``), or predicates ``(name, module) -> bool``.
        inplace: False converts a copy, with the same process groups, and leaves the model as it is.

    Returns:
        The converted model: ``module`` itself, unless ``inplace`` is False or a registered factory replaces
        the model itself.

    Raises:
        ValueError: a layer to convert is inside a ``DistributedDataParallel``; a pattern in ``skip`` matches
            no module; ``eps_mode`` is unknown. After any error the model is as it was before.
        TypeError: ``module`` is not a module; ``skip`` contains something else; a registered factory did not
            return a module, or returned one that does not synchronize although it derives from our layers.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(convert_model(model)[1]).__name__
        'SynchronizedBatchNorm2d'
        >>> type(revert_model(model)[1]).__name__
        'BatchNorm2d'
    """
    _check_module("convert_model", module)
    options = layer_options(process_group, eps_mode, fused)
    model: nn.Module = module if inplace else _copy(module)
    findings = survey(model, skip)
    _refuse_wrapped(findings)
    edits: list[Edit] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for finding in findings:
        found = finding.module
        match finding.conversion:
            case Swap(target):
                edits.append((found, partial(swap_layer, found, target, options, finding.name)))
            case Wrap(wrapper):
                edits.append((wrapper, partial(convert_wrapper, wrapper)))
            case Build(factory):
                replacement = _checked(factory(found), finding)
                if replacement is not found:
                    replacements[found] = replacement
                    edits += _settling(finding, replacement, options)
    # Before the first change: if warnings are errors, this one too has to leave the model as it is.
    warn_left_alone(findings)
    carry_out(edits + substitutions(model, replacements))
    return cast(Module, replacements.get(model, model))


def revert_model(module: Module) -> Module:
    """Revert what ``convert_model`` or ``patch_sync_batchnorm`` did, exactly, and nothing else.

    Weights and statistics keep their present values. Layers that were built as synchronized layers stay.

    Args:
        module: a model with converted layers; it is changed in place.

    Returns:
        The model, in which every converted module has its former class again: ``module`` itself, unless a
        registered factory had replaced it.

    Raises:
        TypeError: ``module`` is not a module.
        ValueError: the class of a converted module has been changed since; or the replacement that a factory
            made does not hold all parameters and buffers of the original. The model is as it was before.
    """
    _check_module("revert_model", module)
    model: nn.Module = module
    edits: list[Edit] = []
    originals = {}
    for name, found in model.named_modules():
        note = vars(found).get(NOTE)
        if isinstance(note, SwapNote):
            if type(found) is not note.target:
                raise ValueError(
                    f"revert_model: expected {called(name)} to be a {note.target.__name__}, as converted, "
                    f"got {type(found).__name__}; first revert what changed its class since"
                )
            edits.append((found, partial(swap_back, found, note)))
        elif isinstance(note, BuildNote):
            if lost := lost_tensors(found, note):
                raise ValueError(
                    f"revert_model: expected {called(name)} to hold all parameters and buffers of the "
                    f"{type(note.original).__name__} that it replaced, but its factory did not reuse "
                    f"{', '.join(lost)}; let the factory give the same tensors to the replacement"
                )
            originals[found] = note.original
            edits.append((note.original, partial(build_back, found, note)))
    carry_out(edits + substitutions(model, originals))
    return cast(Module, originals.get(model, model))


def _checked(replacement: object, finding: Finding) -> nn.Module:
    """Return what a registered factory returned, if it is a module and synchronizes as its class says."""
    if not isinstance(replacement, nn.Module):
        raise TypeError(
            f"convert_model: expected the factory registered for {type(finding.module).__name__} to return a "
            f"module for {called(finding.name)}, got {replacement!r}"
        )
    for part in replacement.modules():
        if isinstance(part, SYNCHRONIZED) and (reason := why_unsynchronized(type(part))):
            raise TypeError(
                f"convert_model: expected the replacement for {called(finding.name)} to synchronize, got a "
                f"{type(part).__name__}, which {reason}"
            )
    return replacement


def _settling(finding: Finding, replacement: nn.Module, options: dict[str, Any]) -> list[Edit]:
    """Return the edits that make a factory's replacement part of this model and its conversion."""
    original = finding.module
    kept = set(original.modules())
    edits: list[Edit] = [(replacement, partial(note_build, original, replacement))]
    for name, module in replacement.named_modules(prefix=finding.name):
        if module not in kept:
            edits.append((module, partial(settle, module, original.training, options, name)))
    return edits


def _copy(model: nn.Module) -> nn.Module:
    """Return a deep copy that shares the process groups, which cannot be copied."""
    groups = [vars(module).get("process_group") for module in model.modules()]
    return copy.deepcopy(model, {id(group): group for group in groups})


def _refuse_wrapped(findings: list[Finding]) -> None:
    wrapped = [finding for finding in findings if finding.verdict is Verdict.WRAPPED]
    if wrapped:
        raise ValueError(
            f"convert_model: expected a model that is not wrapped yet, got {len(wrapped)} layer(s) to "
            f"convert {wrapped[0].reason} (the first is {called(wrapped[0].name)}); convert first, then "
            "wrap: DistributedDataParallel(convert_model(model))"
        )


def _check_module(caller: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected an nn.Module, got {model!r}")
