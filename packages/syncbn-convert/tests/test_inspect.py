"""The report about a model, in code and from a shell."""

import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from torch import nn

from syncbn_convert import convert_model, inspect_model, register_conversion
from syncbn_convert.__main__ import main
from syncbn_core import THIS_PROCESS


class Odd(nn.BatchNorm2d):
    pass


def make_model() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
            "odd": Odd(4),
            "head": nn.SyncBatchNorm(16),
        }
    )


def test_it_says_what_would_convert_and_what_not_and_why():
    report = inspect_model(make_model())

    assert [(row.name, row.class_name, row.num_features, row.outcome) for row in report.converted] == [
        ("stem.1", "BatchNorm2d", 8, "SynchronizedBatchNorm2d"),
        ("head", "SyncBatchNorm", 16, "SynchronizedBatchNorm"),
    ]
    assert [(row.name, row.outcome) for row in report.skipped] == [
        ("odd", "Odd is a subclass of BatchNorm2d")
    ]


def test_it_changes_nothing_and_calls_no_factory(snapshot):
    model = make_model()
    before = snapshot(model)

    def fail(layer: nn.Module) -> nn.Module:
        raise AssertionError

    with register_conversion(Odd, fail):
        report = inspect_model(model)

    assert snapshot(model) == before
    assert report.converted[1].outcome.endswith("fail returns")


def test_it_names_the_same_layers_after_the_conversion():
    model = make_model()
    names = [row.name for row in inspect_model(model).converted]

    convert_model(model, skip="odd")

    report = inspect_model(model)
    assert [row.name for row in report.converted] == names
    assert {row.outcome for row in report.converted} == {"synchronized already"}


def test_it_takes_the_rules_of_what_to_skip():
    report = inspect_model(make_model(), skip=["stem"])

    assert [row.name for row in report.converted] == ["head"]
    assert report.skipped[0].outcome == "matches skip='stem'"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["replicas, default group", "replicas, group of 2"]),
        (THIS_PROCESS, ["replicas of this process"] * 2),
        (SimpleNamespace(size=lambda: 8), ["replicas, group of 8"] * 2),
    ],
)
def test_it_says_over_what_a_layer_synchronizes_before_and_after(given, expected):
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=SimpleNamespace(size=lambda: 2))
    )

    before = inspect_model(model, process_group=given)
    after = inspect_model(convert_model(model, process_group=given))

    assert [row.synchronizes_over for row in before.converted] == expected
    assert [row.synchronizes_over for row in after.converted] == expected


def test_wrappers_are_rows_of_their_own():
    class Foreign(nn.DataParallel):
        pass

    report = inspect_model(nn.Sequential(nn.DataParallel(nn.BatchNorm2d(3)), Foreign(nn.Identity())))

    assert [(row.name, row.outcome) for row in report.wrappers] == [
        ("0", "DataParallelWithCallback"),
        ("1", "replication callbacks"),
    ]
    assert [row.name for row in report.converted] == ["0.module"]


@pytest.mark.filterwarnings("ignore:DataParallelWithCallback found no GPU:UserWarning")
def test_a_wrapper_says_why_it_is_skipped_and_nothing_once_it_is_converted():
    model = nn.Sequential(nn.DataParallel(nn.BatchNorm2d(3)))

    assert [row.outcome for row in inspect_model(model, skip="0").wrappers] == ["matches skip='0'"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DataParallelWithCallback found no GPU")
        converted = convert_model(model)
    assert inspect_model(converted).wrappers == ()


def test_a_layer_that_synchronizes_already_is_converted_wherever_it_is():
    model = convert_model(nn.Sequential(nn.BatchNorm2d(3)))

    assert [row.name for row in inspect_model(model, skip="0").converted] == ["0"]


def test_it_prints_as_a_table():
    assert str(inspect_model(make_model())).splitlines() == [
        "name    class          features  convert_model                     synchronizes over",
        "------  -------------  --------  --------------------------------  -----------------------",
        "stem.1  BatchNorm2d    8         SynchronizedBatchNorm2d           replicas, default group",
        "odd     Odd            4         Odd is a subclass of BatchNorm2d",
        "head    SyncBatchNorm  16        SynchronizedBatchNorm             replicas, default group",
        "",
        "2 synchronize, 1 do not",
    ]


def test_a_layer_by_itself_and_a_model_without_any_print_too():
    assert "(itself)" in str(inspect_model(nn.BatchNorm2d(3)))
    assert str(inspect_model(nn.Linear(3, 3))).endswith("0 synchronize, 0 do not")


MODELS = """
from torch import nn
def make(): return nn.Sequential(nn.BatchNorm1d(3))
class Nets: small = nn.BatchNorm2d(5)
def needs(width): return nn.BatchNorm1d(width)
nothing = list
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Return a folder with a module ``models``, which can be imported in this process too."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    yield tmp_path
    sys.modules.pop("models", None)


@pytest.fixture
def shell(models):
    """Runs the module in a shell."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "error", "-m", "syncbn_convert", *arguments]
        path = os.pathsep.join([str(models), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            command, capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": path}
        )

    return run


def test_a_shell_gets_the_table(shell):
    done = shell("models:make")

    assert done.returncode == 0, done.stderr
    assert "1 synchronize, 0 do not" in done.stdout


def test_a_shell_gets_the_message_without_a_traceback(shell):
    done = shell("models:make", "--skip", "1")

    assert done.returncode == 2
    assert "skip: expected the name of a module or a pattern for names, got '1'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("target", ["models:make", "models:Nets.small"])
def test_a_factory_and_a_model_give_the_table(target, capsys):
    main([target])

    assert "1 synchronize, 0 do not" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
def test_a_shell_can_skip(capsys):
    main(["models:make", "--skip", "0"])

    assert "matches skip='0'" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("models", "expected package.module:factory, got 'models'"),
        ("absent:make", "No module named 'absent'"),
        ("models:absent", "no attribute 'absent'"),
        ("models:needs", "missing 1 required positional argument"),
        ("models:nothing", "expected 'models:nothing' to give an nn.Module, got []"),
    ],
)
def test_a_shell_is_told_what_is_wrong(target, message, capsys):
    with pytest.raises(SystemExit) as end:
        main([target])

    assert end.value.code == 2
    assert message in capsys.readouterr().err
