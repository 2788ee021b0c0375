"""What every test of the accelerator begins with."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_for_every_test() -> None:
    torch.manual_seed(0)
