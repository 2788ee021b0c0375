"""The benchmarks run, and write a table and a chart; no time is checked."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("matplotlib")


def tables_of(text):
    """Return the tables of a Markdown file: by their headings, lists of rows of cells without the header."""
    tables = {}
    for line in text.splitlines():
        if line.startswith("## "):
            rows = tables[line[3:]] = []
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    for rows in tables.values():
        assert len({len(row) for row in rows}) == 1
        assert set(rows[1]) == {"---"}
    return {heading: rows[2:] for heading, rows in tables.items()}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Run a benchmark, once, and return the folder with its results."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--output", str(folder)]
        environment = os.environ | {"PYTHONWARNINGS": "error", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return folder

    return run


@pytest.mark.full
@pytest.mark.parametrize("name", ["layer", "rounds", "model", "replication", "compiled"])
def test_every_variant_is_timed_in_blocks_and_in_turns_under_every_setting(name, folder_of):
    tables = tables_of((folder_of(name) / f"{name}.md").read_text())
    conditions = {}
    for case, variant, setting, order, median, quartiles, ratio, faults in tables["Timings"]:
        conditions.setdefault((case, variant), set()).add((setting, order))
        low, high = (float(each.replace(",", "")) for each in quartiles.split(" to "))
        assert 0 < low <= float(median.replace(",", "")) <= high
        assert float(ratio) > 0
        assert int(faults) >= 0
    settings = ("pinned", "pinned, short spins", "default")
    all_conditions = {(setting, order) for setting in settings for order in ("blocks", "turns")}
    assert len(conditions) > 1
    assert all(each == all_conditions for each in conditions.values())
    assert tables["Targets"]
    assert {row[-1] for row in tables["Targets"]} <= {"yes", "**no**"}
    assert (folder_of(name) / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_a_forward_keeps_vectors_and_of_a_small_batch_a_copy_unless_it_is_of_plain_operations(folder_of):
    rows = tables_of((folder_of("layer") / "layer.md").read_text())["Memory"]
    assert {"2 synchronized", "4 plain ops"} < {row[1] for row in rows}
    batch = 4 * 8 * 8 if torch.__version__ >= (2, 8) else 0  # in vectors of C
    for _, variant, _, vectors, *_ in rows:
        beyond = int(vectors) - (batch if variant.endswith(" synchronized") else 0)
        assert (0 <= beyond < 50) == ("plain" not in variant)


@pytest.mark.full
def test_every_part_of_a_step_takes_time(folder_of):
    rows = tables_of((folder_of("model") / "model.md").read_text())["Where the time of a step goes"]
    for _, _, *shares in rows:
        assert len(shares) == 4
        assert all(0 < float(share.rstrip("%")) < 100 for share in shares)


@pytest.mark.parametrize("name", ["layer", "model", "compiled"])
def test_a_chart_is_drawn_again_from_its_table(name, tmp_path):
    table = tmp_path / f"{name}.md"
    table.write_text((BENCHMARKS / "results" / f"{name}.md").read_text())
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "report.py"), str(table)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
