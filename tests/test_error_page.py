"""docs/errors.md has every error and warning that the packages raise, with its cause and a remedy.

The page and the sources are compared word by word. "…" on the page, and each value that the sources fill in,
stand for any words.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
ANYTHING = "…"
ENOUGH = 0.6  # of the words before a message's advice: the page may leave out the others
WARNING_FUNCTIONS = ("warn", "warn_the_caller")

# Messages that are made in another place than the error. That place is looked at too: it is a function of
# `_error_messages`, or its string begins with "expected".
MADE_ELSEWHERE = re.compile(
    r"message|reason|report|self\._report|(self\._prefix \+ )?(report|_error_messages\.\w+\(.*\))"
    r"|_compiled\.not_a_tensor\(.*\)"
)
OTHER_BEGINNINGS = {  # functions that make messages that begin with another word
    "_error_messages.py": ("left", "split", "timed_out", "failed"),
    "_master.py": ("_replaced_by",),
}


class Message(NamedTuple):
    """A message in the sources, or a row of the page."""

    where: str
    kind: str  # the class of the error or warning; "" where it is not known
    text: str

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(re.findall(rf"\w+|{ANYTHING}", self.text.lower()))

    @property
    def first_clause(self) -> set[str]:
        """The words before the advice, after what is put in front of the message."""
        text = self.text.strip().removeprefix(f"{ANYTHING}: ")
        return set(re.findall(r"\w+", re.split(r"[;:.] |\n", text)[0].lower()))


def template(node: ast.expr) -> str | None:
    """Return the text of a string expression, with "…" for what is filled in; None if there is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else ANYTHING for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        if left is None and right is None:
            return None
        return (ANYTHING if left is None else left) + (ANYTHING if right is None else right)
    return None


def strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of each whole string in a piece of code."""
    text = template(node) if isinstance(node, ast.expr) else None
    if text is not None:
        yield node.lineno, text
        return
    for child in ast.iter_child_nodes(node):
        yield from strings(child)


def raised(module: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Yield the calls that make an error or a warning, with its class."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in WARNING_FUNCTIONS:
            yield node, "UserWarning"
        elif name.endswith("Error") or name == "kind":
            yield node, name


def messages_of(path: Path, source: str) -> Iterator[Message]:
    """Yield the messages of a module.

    Raises:
        AssertionError: nobody can tell from the sources what an error says.
    """
    module = ast.parse(source)
    for call, kind in raised(module):
        text = template(call.args[0]) if call.args else None
        where = f"{path.name}:{call.lineno}"
        if text is not None:
            message = Message(where, kind, text)
            if message.first_clause - {"got"}:  # the rest of the text is a variable, which is a string below
                yield message
        elif call.args:
            assert MADE_ELSEWHERE.fullmatch(ast.unparse(call.args[0])), f"{where}: {ast.unparse(call)}"
    for line, text in strings(module):
        if re.match(rf"{ANYTHING}?:? ?(\w+: )?expected ", text, flags=re.IGNORECASE):
            yield Message(f"{path.name}:{line}", "", text + ANYTHING)
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef) and function.name in OTHER_BEGINNINGS.get(path.name, ()):
            yield from reports_of(function, path.name)


def reports_of(function: ast.FunctionDef, file: str) -> Iterator[Message]:
    """Yield what a function puts together."""
    for statement in function.body[ast.get_docstring(function) is not None :]:
        for line, text in strings(statement):
            message = Message(f"{file}:{line}", "", text + ANYTHING)
            if message.first_clause - {"is", "are", ""}:
                yield message


def rows_of(page: str) -> Iterator[tuple[Message, list[str]]]:
    """Yield the message of each row of the page, and the other cells of the row."""
    for number, line in enumerate(page.splitlines(), start=1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `"):
            kind, text = re.fullmatch(r"(?:(\w+(?:Error|Warning)): )?(.*)", cells[0].strip("`")).groups()
            yield Message(f"errors.md:{number}", kind or "MisuseError", text), cells[1:]


@cache
def common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Return how many words two texts share, one after the other; less than 0 if they cannot be the same."""
    best = [[-(10**6)] * (len(other) + 1) for _ in range(len(one) + 1)]
    best[-1][-1] = 0
    for i in range(len(one), -1, -1):
        for j in range(len(other), -1, -1):
            options = [best[i][j]]
            if i < len(one) and one[i] == ANYTHING:
                options += [best[i + 1][j]] + ([best[i][j + 1]] if j < len(other) else [])
            if j < len(other) and other[j] == ANYTHING:
                options += [best[i][j + 1]] + ([best[i + 1][j]] if i < len(one) else [])
            if i < len(one) and j < len(other) and one[i] == other[j]:
                options.append(best[i + 1][j + 1] + (one[i] != ANYTHING))
            best[i][j] = max(options)
    return best[0][0]


def is_same(message: Message, row: Message) -> bool:
    """Tell whether a row of the page is this message."""
    kinds_fit = message.kind in ("", "kind", row.kind)
    needed = ENOUGH * len(message.first_clause)
    likely = len(message.first_clause & set(row.words)) >= needed
    return kinds_fit and likely and common(message.words, row.words) >= needed


def missing(messages: list[Message], page: str) -> list[str]:
    """Return the messages that the page lacks."""
    rows = [row for row, _ in rows_of(page)]
    return [
        f"{message.where}: {message.kind}: {message.text}"
        for message in messages
        if not any(is_same(message, row) for row in rows)
    ]


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def messages():
    return [m for path in SOURCES for m in messages_of(path, path.read_text(encoding="utf-8"))]


def test_every_message_is_on_the_page(messages, page):
    assert len(messages) > 100
    assert missing(messages, page) == []


def test_every_row_of_the_page_is_a_message(messages, page):
    stale = [row for row, _ in rows_of(page) if not any(is_same(message, row) for message in messages)]
    assert stale == []


def test_every_row_has_a_cause_and_a_remedy(page):
    rows = list(rows_of(page))
    assert len(rows) > 60
    assert [row.where for row, cells in rows if not all(cells)] == []


@pytest.mark.parametrize(
    "source",
    [
        'raise ValueError(f"expected a whale at {where!r}, got {fish}")',
        'raise TypeError("a whale is no fish")',
        'words = f"{caller}: expected a whale, got {fish}"',
        'warnings.warn(f"there is a whale at {where!r}", stacklevel=2)',
        # of another class than on the page
        'raise KeyError(f"expected eps_mode to be one of {expected}, got {mode!r}")',
    ],
)
def test_a_message_that_is_not_on_the_page_is_found(source, page):
    assert missing(list(messages_of(Path("whales.py"), source)), page)


def test_a_message_that_nobody_can_read_in_the_sources_is_found():
    with pytest.raises(AssertionError, match=r"whales.py:1: ValueError\(about\(whales\)\)"):
        list(messages_of(Path("whales.py"), "raise ValueError(about(whales))"))
