"""The replacements and recipes of docs/migrating.md work; test_readmes.py runs the examples of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn_convert
import syncbn_core
from syncbn_parallel import DataParallelWithCallback

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
TEXT = PAGE.read_text(encoding="utf-8")
REPLACEMENTS = re.findall(r"^\| you have \|.*?\n\n", TEXT, flags=re.MULTILINE | re.DOTALL)
CELLS = re.findall(r"^\|[^|]+\|([^|]+)\|$", "".join(REPLACEMENTS), flags=re.MULTILINE)
CODE = sorted({code for cell in CELLS for code in re.findall(r"`([^`]+\)\S*)`", cell)})
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_the_page_has_replacements_to_try():
    assert "convert_model(model, process_group=group)" in CODE
    assert len(CODE) >= 6


@pytest.mark.parametrize("code", CODE)
def test_a_replacement_on_the_page_can_be_evaluated(code, process_group):
    names = {
        **vars(syncbn_core),
        **vars(syncbn_convert),
        "nn": nn,
        "torch": torch,
        "model": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        "group": process_group,
        "group_size": 1,
        "DistributedDataParallel": DistributedDataParallel,
    }
    assert eval(code, names) is not None


def test_ddp_does_not_count_the_layers_and_refuses_those_of_torch_on_the_cpu(process_group):
    """The reason that the page gives for not being an nn.SyncBatchNorm."""
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with"):
        DistributedDataParallel(nn.Sequential(nn.SyncBatchNorm(3)))
    model = DistributedDataParallel(syncbn_convert.convert_model(nn.Sequential(nn.BatchNorm2d(3))))
    model(torch.randn(2, 3, 2, 2)).sum().backward()
    assert not model._get_ddp_logging_data().get("has_sync_bn")


@pytest.fixture(scope="module")
def masked_batch_norm():
    """The recipe for padded inputs, as it stands on the page."""
    (recipe,) = [block for block in BLOCKS if "class MaskedBatchNorm" in block]
    names = {"torch": torch, "nn": nn, "SynchronizedBatchNorm1d": syncbn_core.SynchronizedBatchNorm1d}
    exec(recipe.partition("\n\n\nx = ")[0], names)
    return names["MaskedBatchNorm"]


@pytest.mark.parametrize("lengths", [[5, 1, 3, 2, 4, 1], [0, 0, 1, 5, 5, 5], [2, 2, 2, 2, 2, 2]])
def test_the_recipe_for_padded_inputs_is_exact_over_uneven_replicas(masked_batch_norm, lengths):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, dtype=torch.float64) * 3 + 1
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    weights = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view_as(x)

    layer, whole = masked_batch_norm(4).double(), nn.BatchNorm1d(4).double()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = DataParallelWithCallback(layer, ["cpu"] * 3)(ours, mask)
    (y * weights).sum().backward()
    z = whole(theirs[mask])
    (z * weights[mask]).sum().backward()

    torch.testing.assert_close(y[mask], z, rtol=1e-11, atol=1e-11)
    assert not y[~mask].any()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bn.running_mean, whole.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bn.running_var, whole.running_var, rtol=1e-12, atol=1e-12)
    for name, parameter in layer.bn.named_parameters():
        expected = getattr(whole, name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10)
