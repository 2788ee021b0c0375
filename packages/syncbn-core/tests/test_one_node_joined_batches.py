"""Small batches of several replicas are joined into one batch, if their shapes and layouts fit together."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from syncbn_core._autograd import joined_node
from syncbn_core._replicas.recomputation import may_be_intercepted

pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 8), reason="this torch does not tell whether what is saved is intercepted"
)

RANKS = pytest.mark.parametrize("rank", [0, 1, 2])


@pytest.mark.parametrize("sizes", [(0, 4), (3, 0, 0, 2), (0, 0, 2), (0, 1, 0, 1)], ids=str)
def test_empty_batches_are_joined_too(form, sizes, layer_of, chunks_of, check, joined_calls):
    check(layer_of(form.kind), chunks_of(*sizes, spatial=form.spatial, layout=form.layout))
    assert joined_calls == [len(sizes)]


def test_outputs_share_one_storage(form, layer_of, chunks_of, run_replicas, joined_calls):
    outputs = run_replicas(layer_of(form.kind), chunks_of(2, 3, spatial=form.spatial, layout=form.layout))
    assert joined_calls == [2]
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1


def test_a_batch_of_up_to_the_limit_is_joined_and_no_larger_one(
    layer_of, chunks_of, check, one_node_calls, joined_calls, monkeypatch
):
    chunks = chunks_of(2, 2)
    monkeypatch.setattr(joined_node, "JOINED_UP_TO", chunks[0].numel())
    check(layer_of(), chunks)
    assert (one_node_calls, joined_calls) == ([2], [2])
    monkeypatch.setattr(joined_node, "JOINED_UP_TO", chunks[0].numel() - 1)
    check(layer_of(), chunks)
    assert (one_node_calls, joined_calls) == ([2, 2], [2])


@RANKS
def test_small_batches_are_not_joined_to_a_large_one(
    rank, layer_of, chunks_of, check, one_node_calls, joined_calls, monkeypatch
):
    chunks = chunks_of(*(4 if other == rank else 2 for other in range(3)))
    monkeypatch.setattr(joined_node, "JOINED_UP_TO", chunks[rank].numel() - 1)
    check(layer_of(), chunks)
    assert (one_node_calls, joined_calls) == ([3], [])


@RANKS
@pytest.mark.parametrize("odd_one", ["spatial sizes", "layout", "strides"])
def test_batches_of_other_shapes_or_layouts_are_not_joined(
    odd_one, rank, layer_of, chunks_of, run_replicas, one_node_calls, joined_calls
):
    chunks = chunks_of(2, 3, 2)
    if odd_one == "spatial sizes":
        chunks[rank] = chunks[rank][..., :2].contiguous()
    elif odd_one == "layout":
        chunks[rank] = chunks[rank].contiguous(memory_format=torch.channels_last)
    else:
        chunks[rank] = chunks[rank].repeat_interleave(2, -1)[..., ::2]
    run_replicas(layer_of(), chunks)
    assert (one_node_calls, joined_calls) == ([3], [])


def test_torch_reports_whether_saved_tensors_are_intercepted():
    # Private to torch: without it, every test of one node would be skipped.
    assert not may_be_intercepted()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert may_be_intercepted()
    assert not may_be_intercepted()
