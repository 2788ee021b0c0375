"""The snippets of docs/compile.md run, one after the other."""

import re
import shutil
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "compile.md"


@pytest.mark.filterwarnings("default")  # of the compiler itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_the_snippets_run(compiler_cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(compiler_cache))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._inductor.config.compile_threads = 1
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(snippets) == 4
    namespace = {"__name__": "docs"}
    for snippet in snippets:
        exec(compile(snippet, PAGE.name, "exec"), namespace)
