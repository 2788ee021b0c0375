"""convert_model and revert_model: plan everything, then change the model all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from ._edits import Edit, carry_out, substitutions
from ._layers import EpsMode, convert_wrapper, layer_options, settle, swap_layer
from ._notes import NOTE, BuildNote, SwapNote, build_back, lost_tensors, note_build, swap_back
from ._registry import Build, Swap, Wrap
from ._survey import Finding, SkipRule, Verdict, called, survey, warn_left_alone


def convert_model(
    model: nn.Module,
    *,
    process_group: Any = None,
    eps_mode: EpsMode | None = None,
    fused: bool = True,
    skip: SkipRule | Iterable[SkipRule] = (),
    inplace: bool = True,
) -> nn.Module:
    """Synchronize the batch norm layers of a model, and change nothing else about it.

    Layers of exactly the class ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``nn.SyncBatchNorm``, at every depth,
    become synchronized ones; an ``nn.DataParallel`` becomes a ``DataParallelWithCallback`` on the same
    devices, and an instance of a subclass of it gets replication callbacks. The objects stay, only their
    class changes: so parameters, buffers, hooks, training and requires_grad flags, user attributes, shared
    modules, state-dict keys and an optimizer built before all hold. Other kinds of batch norm are left alone,
    with one warning that lists them.

    Layers that synchronize already stay as they are, with the options that they have.

    Args:
        model: any module; a batch norm layer by itself too.
        process_group: for the layers that convert: as in ``SynchronizedBatchNorm2d``. None leaves an
            ``nn.SyncBatchNorm`` the group that it has.
        eps_mode: for the layers that convert: as in ``SynchronizedBatchNorm2d``.
        fused: for the layers that convert: as in ``SynchronizedBatchNorm2d``.
        skip: which modules to leave alone, with all that they contain: names or shell-style patterns for
            names (``"decoder"``, ``"*.bn2"``) and predicates ``(name, module) -> bool``.
        inplace: False converts a copy (which holds the same process groups) and leaves the model as it is.

    Returns:
        The converted model: ``model`` itself, unless ``inplace`` is False or a registered factory replaced
        it.

    Raises:
        ValueError: a layer to convert is inside a ``DistributedDataParallel``; a pattern in ``skip`` matches
            nothing; ``eps_mode`` is unknown. The model is as it was, as after any error.
        TypeError: the model is no module; ``skip`` holds something else; a registered factory returned
            something else than a module.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(convert_model(model)[1]).__name__
        'SynchronizedBatchNorm2d'
        >>> type(revert_model(model)[1]).__name__
        'BatchNorm2d'
    """
    _check_module("convert_model", model)
    options = layer_options(process_group, eps_mode, fused)
    if not inplace:
        model = _copy(model)
    findings = survey(model, skip)
    _refuse_wrapped(findings)
    edits: list[Edit] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for finding in findings:
        module = finding.module
        match finding.conversion:
            case Swap(target):
                edits.append((module, partial(swap_layer, module, target, options, finding.name)))
            case Wrap(wrapper):
                edits.append((wrapper, partial(convert_wrapper, wrapper)))
            case Build(factory):
                replacement = _checked(factory(module), finding)
                if replacement is not module:
                    replacements[module] = replacement
                    edits += _settling(finding, replacement, options)
    # Before the first change: where warnings are errors, this one too must leave the model as it is.
    warn_left_alone(findings)
    carry_out(edits + substitutions(model, replacements))
    return replacements.get(model, model)


def revert_model(model: nn.Module) -> nn.Module:
    """Take back what ``convert_model`` (or ``patch_sync_batchnorm``) did, exactly, and nothing else.

    The weights and statistics of today stay. Synchronized layers that were built as such stay too.

    Args:
        model: a model with converted layers; changed in place.

    Returns:
        The model with every converted module back at the class it was converted from: ``model`` itself,
        unless a registered factory had replaced it.

    Raises:
        TypeError: the model is no module.
        ValueError: a converted module has another class by now than the conversion gave it; or a factory's
            replacement does not hold all parameters and buffers of the original. The model is as it was.
    """
    _check_module("revert_model", model)
    edits: list[Edit] = []
    originals = {}
    for name, module in model.named_modules():
        note = vars(module).get(NOTE)
        if isinstance(note, SwapNote):
            if type(module) is not note.target:
                raise ValueError(
                    f"revert_model: expected {called(name)} to be a {note.target.__name__}, as converted, "
                    f"got {type(module).__name__}; take back first what changed its class since"
                )
            edits.append((module, partial(swap_back, module, note)))
        elif isinstance(note, BuildNote):
            if lost := lost_tensors(module, note):
                raise ValueError(
                    f"revert_model: expected {called(name)} to hold all parameters and buffers of the "
                    f"{type(note.original).__name__} that it replaced, but its factory did not hand on "
                    f"{', '.join(lost)}; have the factory share them"
                )
            originals[module] = note.original
            edits.append((note.original, partial(build_back, module, note)))
    carry_out(edits + substitutions(model, originals))
    return originals.get(model, model)


def _checked(replacement: object, finding: Finding) -> nn.Module:
    """What a registered factory returned, if it is a module."""
    if not isinstance(replacement, nn.Module):
        raise TypeError(
            f"convert_model: expected the factory registered for {type(finding.module).__name__} to return a "
            f"module for {called(finding.name)}, got {replacement!r}"
        )
    return replacement


def _settling(finding: Finding, replacement: nn.Module, options: dict[str, Any]) -> list[Edit]:
    """The edits that make a factory's module part of this model and of its conversion."""
    original = finding.module
    kept = set(original.modules())
    edits: list[Edit] = [(replacement, partial(note_build, original, replacement))]
    for name, module in replacement.named_modules(prefix=finding.name):
        if module not in kept:
            edits.append((module, partial(settle, module, original.training, options, name)))
    return edits


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy that shares the process groups, which cannot be copied."""
    groups = [vars(module).get("process_group") for module in model.modules()]
    return copy.deepcopy(model, {id(group): group for group in groups})


def _refuse_wrapped(findings: list[Finding]) -> None:
    wrapped = [finding for finding in findings if finding.verdict is Verdict.WRAPPED]
    if wrapped:
        raise ValueError(
            f"convert_model: expected a model that is not wrapped yet, got {len(wrapped)} layers to convert "
            f"{wrapped[0].reason} (the first is {called(wrapped[0].name)}); convert first, then wrap: "
            "DistributedDataParallel(convert_model(model))"
        )


def _check_module(caller: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected an nn.Module, got {model!r}")
