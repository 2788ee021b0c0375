"""The README tells the truth."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_each_program_prints_what_the_block_after_it_says():
    blocks = re.findall(r"```(python|text)\n(.*?)```", README.read_text(), re.DOTALL)
    namespace: dict[str, object] = {"__name__": "readme"}

    for (kind, program), (next_kind, printed) in zip(blocks[::2], blocks[1::2], strict=True):
        assert (kind, next_kind) == ("python", "text")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(program, README.name, "exec"), namespace)
        assert output.getvalue() == printed
