"""The names of torch that are private and used all the same: these tests tell when one has changed."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from syncbn_core._compiled import _is_exporting
from syncbn_core._processes import graph_collectives as collectives


def test_the_functional_collectives_take_what_they_are_given():
    arguments = {
        "all_gather_into_tensor": ["input", "group_size", "group_name"],
        "all_reduce": ["input", "reduce_op", "group_name"],
        "wait_tensor": ["tensor"],
    }
    for name, expected in arguments.items():
        schema = getattr(torch.ops._c10d_functional, name).default._schema
        assert [argument.name for argument in schema.arguments] == expected


def test_a_process_group_has_a_name_that_the_collectives_know():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        group = collectives.group_of(None, "bn")
        assert group == (dist.group.WORLD.group_name, 3)
        values, place = torch.ones(5, device="meta"), ("forward", "bn")
        assert collectives.all_gather(values, group, place).shape == (3, 5)
        total, own = collectives.all_reduce(values, group, place)
        assert total.shape == own.shape == (5,)
    finally:
        dist.destroy_process_group()


def test_a_condition_can_be_asserted_without_a_wait():
    collectives.expect(torch.tensor([True]), "never")
    with pytest.raises(RuntimeError, match="expected something else"):
        collectives.expect(torch.tensor([False]), "expected something else")


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this torch has no such flag")
def test_a_flag_says_that_torch_exports():
    class Asks(torch.nn.Module):
        def forward(self, x):
            return x + 1 if _is_exporting() else x - 1

    module, x = Asks(), torch.zeros(1)
    assert module(x) == -1
    assert torch.compile(module, backend="eager", fullgraph=True)(x) == -1
    for strict in (True, False):
        assert torch.export.export(module, (x,), strict=strict).module()(x) == 1
