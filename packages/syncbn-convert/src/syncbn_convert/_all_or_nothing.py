"""Change several modules of a model, all or none of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

Edit = tuple[nn.Module, Callable[[], object]]  # the module that it changes, and how


def carry_out(edits: list[Edit]) -> None:
    """Run the edits in order. If one raises, restore all modules, and raise."""
    with ExitStack() as undo:
        for module, edit in edits:
            undo.callback(_restore, module, type(module), dict(vars(module)), dict(module._modules))
            edit()
        undo.pop_all()


def substitutions(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> list[Edit]:
    """Return the edits that put each replacement in place of its key, in every parent, under every name."""
    return [
        (parent, _putting(parent, name, replacements[child]))
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child in replacements
    ]


def _putting(parent: nn.Module, name: str, child: nn.Module) -> Callable[[], None]:
    def put() -> None:
        parent._modules[name] = child

    return put


def _restore(
    module: nn.Module, cls: type[nn.Module], own: dict[str, Any], children: dict[str, nn.Module | None]
) -> None:
    object.__setattr__(module, "__class__", cls)
    vars(module).clear()
    vars(module).update(own)
    module._modules.clear()
    module._modules.update(children)
