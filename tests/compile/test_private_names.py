"""The names of torch that are private and used all the same: these tests tell when one has changed."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

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
        assert collectives.all_reduce(values, group, place).shape == (5,)
    finally:
        dist.destroy_process_group()


def test_a_condition_can_be_asserted_without_a_wait():
    collectives.expect(torch.tensor([True]), "never")
    with pytest.raises(RuntimeError, match="expected something else"):
        collectives.expect(torch.tensor([False]), "expected something else")
