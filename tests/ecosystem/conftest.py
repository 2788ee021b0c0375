"""The tables of results in docs/ecosystem.md, and that only ``nox -s ecosystem`` runs what fills them."""

import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("monai") is None:  # the other sessions install none of these libraries
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tables", type=Path, help="the page whose tables to renew")


class Tables:
    """Rows by the name of their table, which the page marks: ``<!-- name -->`` to ``<!-- end -->``."""

    def __init__(self) -> None:
        self._rows: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, table: str, *cells: object) -> None:
        self._rows[table].append(f"| {' | '.join(map(str, cells))} |\n")

    def renew(self, page: Path) -> None:
        """Replace the rows of the page's tables; their two lines of headings stay."""
        text = page.read_text(encoding="utf-8")
        for table, rows in self._rows.items():
            place = re.compile(rf"(<!-- {table} -->\n(?:\|.*\n){{2}})(?:\|.*\n)*(<!-- end -->)")
            text, found = place.subn(lambda match, rows=rows: match[1] + "".join(rows) + match[2], text)
            assert found == 1, f"expected one table {table!r} in {page}, got {found}"
        page.write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def tables(request: pytest.FixtureRequest) -> Iterator[Tables]:
    filled = Tables()
    yield filled
    if (page := request.config.getoption("--tables")) and not request.session.testsfailed:
        filled.renew(page)
