"""docs/errors.md names every error and warning that the packages raise."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = re.compile(r"[a-zA-Z_']{2,}")
ENOUGH = 0.75  # of the words of a message's first clause in the first cell of a row


def literal(node: ast.expr) -> str:
    """Return the text of a message, without what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return " "


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every message that a module raises or warns with."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        # An error may also be made in one place and raised in another.
        name = ast.unparse(call.func)
        if isinstance(node, ast.Raise) or name.endswith(("Error", "warn", "warn_the_caller")):
            yield node.lineno, literal(call.args[0])


def words_of_first_clause(message: str) -> set[str]:
    """Return the words before the advice."""
    return set(WORDS.findall(re.split(r"[;:.] |\n", message.strip())[0].lower()))


SOURCES = [
    pytest.param(path, id=path.name) for path in sorted(ROOT.glob("packages/*/src/**/*.py")) if messages(path)
]


@pytest.mark.parametrize("path", SOURCES)
def test_every_message_of_a_module_is_on_the_page(path):
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").lower()
    rows = [set(WORDS.findall(line.split("|")[1])) for line in page.splitlines() if line.startswith("|")]
    missing = []
    for line, message in messages(path):
        words = words_of_first_clause(message)
        if len(words) > 2 and not any(len(words & row) >= ENOUGH * len(words) for row in rows):
            missing.append(f"{path.name}:{line}: {message}")
    assert not missing, missing
