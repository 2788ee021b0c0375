"""The modules of a model."""

from __future__ import annotations

from torch import nn

# The attributes of nn.Module itself.
STANDARD_ATTRIBUTES = frozenset(nn.Module().__dict__)


def named_submodules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what ``root.named_modules()`` yields, without its chain of generators, one per level."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", root)]
    while pending:
        name, module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.append((name, module))
            prefix = f"{name}." if name else ""
            children = reversed(module._modules.items())
            pending += [(prefix + key, child) for key, child in children if child is not None]
    return found
