"""The check of documented figures lets rounding pass, and nothing else."""

import runpy
from pathlib import Path

import pytest

differences = runpy.run_path(str(Path(__file__).with_name("compare_figures.py")))["differences"]

PAGE = """
| run | loss | accuracy | distance |
|---|---|---|---|
| one | 0.137 | 58.9% | 3e-11 |
"""


@pytest.mark.parametrize("row", ["0.137 | 58.9% | 3e-11", "0.138 | 58.9% | 9e-12", "0.136 | 58.9% | 2e-10"])
def test_figures_that_differ_only_by_rounding_pass(row):
    assert differences(PAGE, PAGE.replace("0.137 | 58.9% | 3e-11", row)) == []


@pytest.mark.parametrize("row", ["0.139 | 58.9% | 3e-11", "0.137 | 58.8% | 3e-11", "0.137 | 58.9% | 3e-01"])
def test_figures_that_differ_by_more_are_listed(row):
    assert len(differences(PAGE, PAGE.replace("0.137 | 58.9% | 3e-11", row))) == 1


def test_a_table_that_the_page_lacks_is_a_difference():
    assert differences("no table", PAGE)
    assert differences(PAGE, "no table")
