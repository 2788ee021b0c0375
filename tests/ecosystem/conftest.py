"""How a model of another library is tested, and the tables of results in docs/ecosystem.md.

Each module here needs libraries that one session installs: ``nox -s ecosystem``, or ``nox -s newest``.
"""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncbn_convert import convert_model, inspect_model, revert_model
from syncbn_parallel import DataParallelWithCallback

collect_ignore = []
if find_spec("monai") is None:
    collect_ignore += ["test_models.py", "test_tools.py", "test_trainers.py"]
if find_spec("torchvision") is None or find_spec("timm") is None:
    collect_ignore += ["test_newest.py"]


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


def build(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors(item)


def train_step(model: nn.Module, x: Tensor, weighted_sum: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """Run forward and backward; return the outputs, the gradients and the running statistics."""
    outputs = list(tensors(model(x)))
    sum(map(weighted_sum, outputs)).backward()
    module = getattr(model, "module", model)
    gradients = [torch.zeros(()) if p.grad is None else p.grad for p in module.parameters()]
    return [[y.detach() for y in outputs], gradients, list(module.buffers())]


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any number, relative to the largest in its tensor where that is above 1."""
    return max(
        float((a - e).abs().max() / e.abs().max().clamp(min=1.0))
        for a, e in zip(actual, expected, strict=True)
    )


def without_synchronization(
    model: nn.Module, x: Tensor, weighted_sum: Callable[[Tensor], Tensor], expected: list[Tensor]
) -> str:
    """What the same replicas make of the model as it is: how far the output is off, if there is one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "expected batch-norm layers that synchronize")
            outputs = train_step(DataParallelWithCallback(model, ["cpu"] * 4), x, weighted_sum)[0]
    except ValueError:  # the replica with one sample of one pixel: "Expected more than 1 value per channel"
        return "ValueError"
    return f"{distance(outputs, expected):.0e}"


def contents_of(model: nn.Module) -> list[Any]:
    """Every module under every name: its identity, its class, and what it holds, by identity, in order."""
    return [
        (name, id(module), type(module), [(key, id(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


@pytest.fixture
def contents() -> Callable[[nn.Module], list[Any]]:
    return contents_of


@pytest.fixture
def assert_is_the_whole_batch(tables, weighted_sum) -> Callable[..., None]:
    """Convert a model, train it for a step on four replicas, revert it, and add a row to a table."""

    def check(
        table: str,
        library: str,
        name: str,
        factory: Callable[[], nn.Module],
        shape: tuple[int, ...],
        skipped: int = 0,
    ) -> None:
        x = torch.randn(shape, dtype=torch.float64)
        original = build(factory)
        model, untouched = copy.deepcopy(original), copy.deepcopy(original)
        held = contents_of(model)

        convert_model(model)
        report = inspect_model(model)
        print(f"\n{library}: {name}", report, sep="\n")
        assert len(report.skipped) == skipped

        replicas = DataParallelWithCallback(model, ["cpu"] * 4)
        expected = train_step(original, x, weighted_sum)
        distances = list(map(distance, train_step(replicas, x, weighted_sum), expected))
        assert max(distances) < 1e-9

        revert_model(model)
        assert contents_of(model) == held
        model.load_state_dict(untouched.state_dict())
        reverted, unconverted = (list(tensors(m.eval()(x))) for m in (model, untouched))
        assert all(map(torch.equal, reverted, unconverted))

        apart = without_synchronization(untouched.train(), x, weighted_sum, expected[0])
        figures = [f"{d:.0e}" for d in distances]
        tables.add(table, f"{library} {version(library)}", name, len(report.converted), *figures, apart)

    return check
