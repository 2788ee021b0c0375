"""torch.compile and replicas: the graph breaks at each layer or at the wrapper, and the results are right."""

import shutil

import pytest
import torch

from syncbn_convert import convert_model

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("default"),  # of torch's own compiler
]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def test_compiled_blocks_on_replicas_equal_the_whole_batch(residual_net, split_as, train_step, assert_close):
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    converted = convert_model(residual_net())
    for index in (3, 4):
        converted[index].compile(backend="aot_eager")
    whole = residual_net()
    replicas = split_as(converted, [3, 1, 2])
    for _ in range(2):
        assert_close(train_step(replicas, x), train_step(whole, x), **CLOSE)


def test_compiled_around_all_replicas_equals_the_whole_batch(
    residual_net, split_as, train_step, assert_close
):
    x = torch.randn(6, 3, 6, 6, dtype=torch.float64)
    replicas = split_as(convert_model(residual_net()), [3, 1, 2])
    replicas.compile(backend="aot_eager")
    whole = residual_net()
    for _ in range(2):
        assert_close(train_step(replicas, x), train_step(whole, x), **CLOSE)
