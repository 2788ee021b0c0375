"""``python -m syncbn_convert package.module:factory``: inspect a model from a shell."""

from __future__ import annotations

import argparse
import importlib
from functools import reduce
from typing import Any

from torch import nn

from syncbn_convert._inspect import inspect_model


def main(arguments: list[str] | None = None) -> None:
    """Print what convert_model would do with the named model."""
    parser = argparse.ArgumentParser(
        prog="python -m syncbn_convert",
        description="Report, layer by layer, what convert_model would do with a model.",
    )
    parser.add_argument(
        "model", metavar="package.module:factory", help="a callable that returns the model, or the model"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="names to skip; may be repeated"
    )
    options = parser.parse_args(arguments)
    try:
        print(inspect_model(_load(options.model), skip=options.skip))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        parser.error(str(error))


def _load(target: str) -> nn.Module:
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"expected package.module:factory, got {target!r}")
    found: Any = reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected {target!r} to give an nn.Module, got {model!r}")
    return model


if __name__ == "__main__":
    main()
