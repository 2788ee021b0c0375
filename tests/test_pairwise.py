"""The marker ``pairwise`` keeps few cases that cover all pairs of values, and marks the others ``full``."""

import random
import runpy
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pairwise_cover = runpy.run_path(str(ROOT / "conftest.py"))["pairwise_cover"]


def pairs_of(case):
    return set(combinations(sorted(case.items()), 2))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 4, 2), (2, 2, 2, 2, 2), (4, 3, 2, 2, 2)], ids=str)
def test_all_pairs_of_values_are_covered_by_few_cases(sizes):
    names = "abcde"
    cases = [dict(zip(names, values)) for values in product(*map(range, sizes))]

    chosen = pairwise_cover(cases)

    assert set().union(*(pairs_of(cases[i]) for i in chosen)) == set().union(*map(pairs_of, cases))
    largest = sorted(sizes)[-2:]
    assert len(chosen) <= 2 * largest[0] * largest[1]


def test_pairs_that_no_case_has_are_not_missed():
    cases = [{"a": a, "b": b, "c": c} for a, b, c in product(range(3), repeat=3) if a != b]
    random.Random(0).shuffle(cases)

    chosen = pairwise_cover(cases)

    assert set().union(*(pairs_of(cases[i]) for i in chosen)) == set().union(*map(pairs_of, cases))


def test_all_values_of_a_single_parameter_stay():
    assert pairwise_cover([{"a": 0}, {"a": 1}, {"a": 2}]) == {0, 1, 2}


def test_without_parameters_the_test_stays():
    assert pairwise_cover([{}]) == {0}


PROGRAM = """
import pytest

@pytest.mark.pairwise
@pytest.mark.parametrize("a", [None, 2.5, "x", (1, 2)])
@pytest.mark.parametrize(("b", "c"), [(1, 2), (1, 3), (2, 2), (2, 3)])
@pytest.mark.parametrize("d", [True, False])
def test_of_many_parameters(a, b, c, d):
    pass
"""


def test_the_sessions_together_run_each_case_once(tmp_path):
    (tmp_path / "conftest.py").write_bytes((ROOT / "conftest.py").read_bytes())
    path = f"pythonpath = {ROOT / 'tests' / 'accelerator'}\n"  # where its plugins are
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{path}markers =\n  full: x\n  pairwise: x\n")
    (tmp_path / "test_program.py").write_text(PROGRAM)
    selected = []
    for marks in ("not full", "full"):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-m",
            marks,
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True)
        selected.append({line for line in done.stdout.splitlines() if "::" in line})

    short, rest = selected
    assert len(short | rest) == 32
    assert not short & rest
    assert 8 <= len(short) <= 12
