"""Shared by several test files."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn


def everything_in(model: nn.Module) -> list[Any]:
    """Every module under every name: its identity, its class, and all that it holds, by identity, in order.

    Two equal answers for one model mean that nothing about it has changed but numbers inside of tensors.
    """

    def identity(value: Any) -> Any:
        return [(key, id(item)) for key, item in value.items()] if isinstance(value, dict) else id(value)

    return [
        (name, id(module), type(module), [(key, identity(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


@pytest.fixture(scope="session")
def snapshot() -> Callable[[nn.Module], list[Any]]:
    return everything_in
