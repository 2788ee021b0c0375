"""What a replica's thread takes over from the calling one, and gives back."""

import contextvars
import threading

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback


class Probe(nn.Module):
    """Returns what it sees of the settings of its thread."""

    def __init__(self, look):
        super().__init__()
        self.look = look
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.look(x, self.weight)


def seen(look, replicas=3):
    """Return what the replicas agree to see."""
    return DataParallelWithCallback(Probe(look), ["cpu"] * replicas)(torch.ones(6, 2))


def test_replicas_run_in_threads_of_their_own_at_once():
    barrier = threading.Barrier(3)

    def look(x, weight):
        barrier.wait(60)
        return torch.tensor(threading.get_ident())

    assert len({*seen(look).tolist(), threading.get_ident()}) == 4


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_carried_over(enabled):
    with torch.set_grad_enabled(enabled):
        assert seen(lambda x, weight: (torch.is_grad_enabled(), (x * weight).requires_grad)) == (enabled,) * 2


def test_inference_mode_is_carried_over():
    with torch.inference_mode():
        assert seen(lambda x, weight: (torch.is_inference_mode_enabled(), (x * weight).is_inference())) == (
            True,
            True,
        )
    assert not seen(lambda x, weight: torch.is_inference_mode_enabled())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_carried_over_with_its_dtype(dtype):
    def look(x, weight):
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), (x @ x.T).dtype

    with torch.autocast("cpu", dtype=dtype):
        assert seen(look) == (True, dtype, dtype)
    assert seen(look)[::2] == (False, torch.float32)


def test_autocast_of_another_kind_of_device_is_carried_over():
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert seen(lambda x, w: (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))) == (
            True,
            torch.bfloat16,
        )
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert not seen(lambda x, w: torch.is_autocast_enabled("cuda"))


def test_a_cache_that_is_off_stays_off():
    with torch.autocast("cpu", cache_enabled=False):
        assert not seen(lambda x, weight: torch.is_autocast_cache_enabled())


def test_a_block_of_autocast_inside_a_replica_leaves_the_caller_its_cache():
    weight = torch.ones(2, 2, requires_grad=True)

    def cast(x):
        product = x @ weight
        return product.grad_fn.next_functions[1][0]

    def look(x, _):
        with torch.autocast("cpu", enabled=False):
            pass

    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = cast(torch.ones(2, 2))
        seen(look)
        assert cast(torch.ones(2, 2)) is before


def test_replicas_on_one_device_do_not_share_casts_of_their_weights():
    casts = []

    class Linear(nn.Linear):
        def forward(self, x):
            y = x @ self.weight
            casts.append(y.grad_fn.next_functions[1][0])
            return y

    with torch.autocast("cpu", dtype=torch.bfloat16):
        DataParallelWithCallback(Linear(2, 2), ["cpu"] * 3)(torch.ones(6, 2))
    assert len(set(casts)) == 3


def test_context_variables_are_carried_over_and_changes_stay_with_the_replica():
    variable = contextvars.ContextVar("variable", default="nothing")
    variable.set("caller")

    def look(x, weight):
        before = variable.get()
        variable.set("replica")
        return before

    assert seen(look) == "caller"
    assert variable.get() == "caller"


@pytest.mark.parametrize(("devices", "share"), [(2, 3), (3, 2), (4, 1), (8, 1)])
def test_each_replica_works_on_its_share_of_the_callers_threads(devices, share):
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        assert seen(lambda x, weight: torch.get_num_threads(), replicas=devices) == share
        assert torch.get_num_threads() == 6
        in_new_thread = []
        thread = threading.Thread(target=lambda: in_new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join(60)
        assert in_new_thread == [6]
    finally:
        torch.set_num_threads(before)


def test_what_a_replica_sets_does_not_leak_into_the_next_forward():
    def spoil(x, weight):
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_cache_enabled(False)

    def look(x, weight):
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    seen(spoil)
    assert seen(look) == (True, False)
