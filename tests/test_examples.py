"""The examples run, show what they promise, and the losses across replicas are those of the whole batch."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[1] / "examples"
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def run(name, *arguments):
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_the_synchronized_run_on_digits_follows_the_whole_batch_and_the_other_does_not(tmp_path):
    for package in ("sklearn", "tqdm", "matplotlib"):
        pytest.importorskip(package)
    output = run("digits.py", "--epochs", "1", "--output", str(tmp_path / "digits.png"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if "|" in line]
    distances = {row[0]: (float(row[3]), float(row[4])) for row in rows[2:]}
    assert max(distances["synchronized"]) < 1e-9
    assert min(distances["unsynchronized"]) > 1e-2
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_it_needs_and_is_in_the_table_of_examples(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("Needs: ") for line in lines[:4])
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        *(("digits.py", "sklearn.datasets"), ("digits.py", "tqdm"), ("digits_ddp.py", "matplotlib.figure")),
        *(("lightning_layer_sync.py", "pytorch_lightning"), ("accelerate_ddp.py", "accelerate")),
        ("transformers_trainer.py", "transformers"),
    ],
)
def test_an_example_without_what_it_needs_names_what_to_install(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as Python does for a program

    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    assert str(error.value).startswith(f"{module} is missing: pip install ")


def test_every_failure_is_shown_with_its_cause_and_then_training_goes_on():
    raises, skips, swaps = run("when_a_replica_fails.py").split("---")[1:]
    assert "ValueError: these images are black\nraised in replica 2 (of 0 to 3) on cpu" in raises
    assert "ReplicaLeftError: replica 2 finished without reaching 'norm2' (call 1)" in skips
    assert "replicas 0, 1, 3 at 'norm1' (call 1), replica 2 at 'norm2' (call 1)" in swaps
    assert all("and the next step works" in part for part in (raises, skips, swaps))


def test_the_losses_across_replicas_are_compared_with_the_whole_batch():
    output = run("cross_replica_loss.py")
    together = [float(line.split()[-1]) for line in output.splitlines() if "together" in line]
    separately = [float(line.split()[-1]) for line in output.splitlines() if "for itself" in line]
    assert max(together) < 1e-12
    assert min(separately) > 1e-2


@pytest.fixture
def losses():
    # If threads make a process's first call of exp at the same time, torch's CPU library may give one of
    # them a result of only nine digits.
    torch.exp(torch.zeros(7, dtype=torch.float64))
    return runpy.run_path(str(EXAMPLES / "cross_replica_loss.py"))


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4], [3, 0, 2, 5]], ids=str)
def test_focal_loss_is_divided_by_the_positives_of_all_replicas(sizes, losses, split_as):
    scores = torch.randn(sum(sizes), 7, dtype=torch.float64)
    targets = (torch.rand(sum(sizes), 7) < 0.2).double()
    targets[: sizes[0]] = 0  # the first replica has no positives at all
    targets[-1, 0] = 1

    ours = scores.clone().requires_grad_()
    loss = split_as(losses["FocalLoss"](), sizes)(ours, targets).sum()
    loss.backward()

    expected = scores.clone().requires_grad_()
    p = torch.sigmoid(expected)
    p_target = torch.where(targets == 1, p, 1 - p)
    expected_loss = (-((1 - p_target) ** 2) * p_target.log()).sum() / targets.sum()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    torch.testing.assert_close(ours.grad, expected.grad, **EXACT)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4], [3, 0, 2, 5]], ids=str)
def test_contrastive_loss_compares_with_the_embeddings_of_all_replicas(sizes, losses, split_as):
    left, right = (torch.randn(sum(sizes), 6, dtype=torch.float64) for _ in range(2))

    ours = [left.clone().requires_grad_(), right.clone().requires_grad_()]
    loss = split_as(losses["ContrastiveLoss"](temperature=0.5), sizes)(*ours).sum()
    loss.backward()

    expected = [left.clone().requires_grad_(), right.clone().requires_grad_()]
    similarities = F.cosine_similarity(expected[0][:, None], expected[1][None], dim=2) / 0.5
    expected_loss = -similarities.log_softmax(dim=1).diagonal().mean()
    expected_loss.backward()
    torch.testing.assert_close(loss, expected_loss, **EXACT)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, **EXACT)
