"""Whatever docs/migrating.md says to write instead can be written; its examples are run with all others."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn_convert
import syncbn_core

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
REPLACEMENTS = re.findall(r"^\|[^|]+\|([^|]+)\|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
CODE = sorted({code for cell in REPLACEMENTS for code in re.findall(r"`([^`]+\)\S*)`", cell)})


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_the_page_has_replacements_to_try():
    assert "convert_model(model, process_group=group)" in CODE


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
