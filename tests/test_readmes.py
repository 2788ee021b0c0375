"""Every Python example of every page runs as it stands, and prints what the page says that it prints.

The blocks of a page run one after the other, with the names of those before. A block with a title
(``python title="train.py"``) is a program of its own, for two processes.
"""

import contextlib
import doctest
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from syncbn_core import set_sbn_eps_mode

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted(ROOT.glob("examples/*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n+```text\n(.*?)^```)?", flags=re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r'^```python title="([^"]+)"\n(.*?)^```', flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _the_default_eps_mode_again():
    yield
    set_sbn_eps_mode("plus")


def name_of(page):
    return str(page.relative_to(ROOT))


# The first import of the compiler warns of a function that it uses itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    if page.name == "compile.md" and shutil.which("g++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block, expected in BLOCK.findall(page.read_text(encoding="utf-8")):
        if block.startswith(">>>"):
            session = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0)
            assert doctest.DocTestRunner().run(session, clear_globs=False).failed == 0
            names = session.globs
        else:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block, str(page), "exec"), names)
            assert not expected or printed.getvalue() == expected


PROGRAMS = [
    pytest.param(
        program,
        id=f"{name_of(page)}: {title}",
        marks=[] if page.name == "README.md" else [pytest.mark.full],
    )
    for page in PAGES
    for title, program in PROGRAM.findall(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_a_page_runs_in_two_processes(program, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(program)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launch = (*launcher, str(ROOT / "tests" / "without_shutdown.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(path)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
