"""Small batches are normalised as the one batch that they are; whatever makes no one batch, apart as ever."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from syncbn_core import _together
from syncbn_core._replication import may_be_intercepted

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="this torch does not tell whether what is saved is intercepted"
)

RANKS = pytest.mark.parametrize("rank", [0, 1, 2])


@pytest.mark.parametrize("sizes", [(0, 4), (3, 0, 0, 2), (0, 0, 2), (0, 1, 0, 1)], ids=str)
def test_empty_batches_are_part_of_it(form, sizes, layer_of, chunks_of, check, joined):
    check(layer_of(form.kind), chunks_of(*sizes, spatial=form.spatial, layout=form.layout))
    assert joined == [len(sizes)]


def test_outputs_share_one_storage(form, layer_of, chunks_of, run_replicas, joined):
    outputs = run_replicas(layer_of(form.kind), chunks_of(2, 3, spatial=form.spatial, layout=form.layout))
    assert joined == [2]
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1


def test_a_batch_of_up_to_the_limit_is_small_and_no_other(
    layer_of, chunks_of, check, joined, reduced, monkeypatch
):
    chunks = chunks_of(2, 2)
    monkeypatch.setattr(_together, "UP_TO", chunks[0].numel())
    check(layer_of(), chunks)
    assert (joined, reduced) == ([2], [])
    monkeypatch.setattr(_together, "UP_TO", chunks[0].numel() - 1)
    check(layer_of(), chunks)
    assert (joined, reduced) == ([2], [2])


@RANKS
def test_one_large_batch_among_small_ones_takes_three_nodes(
    rank, layer_of, chunks_of, check, joined, reduced, monkeypatch
):
    chunks = chunks_of(*(4 if other == rank else 2 for other in range(3)))
    monkeypatch.setattr(_together, "UP_TO", chunks[rank].numel() - 1)
    check(layer_of(), chunks)
    assert joined == reduced == []


def test_torch_tells_whether_what_is_saved_is_intercepted():
    # Private to torch: without it, every test of one node would be skipped.
    assert not may_be_intercepted()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert may_be_intercepted()
    assert not may_be_intercepted()
