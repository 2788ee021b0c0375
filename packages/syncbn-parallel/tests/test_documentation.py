"""The examples in the README and in the docstrings."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import syncbn_parallel

README = Path(__file__).parent.parent / "README.md"
INNER = [f"syncbn_parallel.{module.name}" for module in pkgutil.iter_modules(syncbn_parallel.__path__)]


def test_the_readme_shows_what_happens():
    failed, tried = doctest.testfile(str(README), module_relative=False)
    assert failed == 0
    assert tried > 0


@pytest.mark.parametrize("name", ["syncbn_parallel", *INNER])
def test_the_examples_in_docstrings_show_what_happens(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", [name for name in syncbn_parallel.__all__ if name != "CallbackContext"])
def test_whatever_users_call_has_an_example(name):
    assert ">>> " in getattr(syncbn_parallel, name).__doc__
