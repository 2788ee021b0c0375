"""What happens to everybody when one replica fails."""

import gc
import itertools
import signal
import threading
import traceback
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn_comm import BrokenSyncError, ReplicaLeftError, SyncTimeoutError
from syncbn_parallel import DataParallelWithCallback

SECONDS = 60.0  # of waiting, before a test gives up

# What torch 2.4 says about itself.
TORCH_2_4 = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast.* is deprecated:FutureWarning")


class Boom(Exception):
    """What no library raises."""


@pytest.fixture
def faulty(centre_class):
    """Return a function that makes a float64 net, with one layer that misbehaves in one replica."""

    class Faulty(centre_class):
        """Does something wrong in one replica; ``fault`` is shared by all copies, by reference."""

        def __init__(self, fault):
            super().__init__()
            self.fault = fault

        def forward(self, x):
            kind = self.fault.get("kind")
            if self.replica is None or self.replica.rank != self.fault["rank"] or kind is None:
                return super().forward(x)
            if kind == "raise":
                raise self.fault["error"]
            if kind == "skip":
                return x
            if kind == "extra":
                return super().forward(super().forward(x))
            self.name = "elsewhere"  # "mismatch"
            return super().forward(x)

    def build(at, fault):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4)]
        for i in range(3):
            layers += [Faulty(fault) if i == at else centre_class(), nn.Tanh()]
        return nn.Sequential(*layers).double()

    return build


@pytest.mark.parametrize("replicas", [2, 3, 8])
@pytest.mark.parametrize("rank", ["first", "middle", "last"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kind", ["raise", "skip", "extra", "mismatch"])
def test_a_fault_anywhere_ends_the_forward_and_the_next_one_works(
    faulty, worker_count, kind, at, rank, replicas
):
    fault = {
        "rank": {"first": 0, "middle": replicas // 2, "last": replicas - 1}[rank],
        "error": Boom("out of luck"),
    }
    net = faulty(at, fault)
    model = DataParallelWithCallback(net, ["cpu"] * replicas, timeout=SECONDS)
    x = torch.randn(2 * replicas, 4).double()
    expected = net(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    workers = worker_count()

    fault["kind"] = kind
    layer = str(1 + 2 * at)
    with pytest.raises((Boom, BrokenSyncError)) as caught:
        model(x)
    error = caught.value
    assert not isinstance(error, SyncTimeoutError)
    report = "\n".join([str(error), *error.__notes__])
    if kind == "raise":
        assert error is fault["error"]
        assert (
            f"replica {fault['rank']} (of 0 to {replicas - 1}) on cpu, in layer '{layer}' (Faulty)" in report
        )
    elif kind == "skip" and at == 2:
        assert isinstance(error, ReplicaLeftError)
        assert f"replica {fault['rank']} finished without reaching '{layer}'" in report
    elif kind == "extra" and at == 2:
        assert isinstance(error, ReplicaLeftError)
    elif kind == "mismatch":
        assert "'elsewhere'" in report
    else:
        assert f"'{layer}'" in report

    del fault["kind"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-13)
    assert worker_count() == workers


def test_five_hundred_failures_leave_no_further_thread(faulty, worker_count):
    fault = {"rank": 1, "error": Boom()}
    net = faulty(1, fault)
    model = DataParallelWithCallback(net, ["cpu"] * 3, timeout=SECONDS)
    x = torch.randn(6, 4).double()
    expected = model(x)
    workers, threads = worker_count(), threading.active_count()
    kinds = ("raise", "skip", "extra", "mismatch")
    for i in range(500):
        fault.update(kind=kinds[i % 4], rank=i % 3, error=Boom())
        with pytest.raises((Boom, BrokenSyncError)):
            model(x)
    del fault["kind"]
    assert torch.equal(model(x), expected)
    assert (worker_count(), threading.active_count()) == (workers, threads)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, torch.OutOfMemoryError, MemoryError])
def test_exceptions_of_every_kind_arrive_as_they_are(faulty, kind):
    fault = {"rank": 1, "error": kind("x"), "kind": "raise"}
    model = DataParallelWithCallback(faulty(1, fault), ["cpu"] * 2, timeout=SECONDS)
    with pytest.raises(kind) as caught:
        model(torch.randn(4, 4).double())
    assert caught.value is fault["error"]


def test_the_traceback_is_that_of_the_replica(faulty):
    fault = {"rank": 1, "error": Boom(), "kind": "raise"}
    model = DataParallelWithCallback(faulty(1, fault), ["cpu"] * 2, timeout=SECONDS)
    with pytest.raises(Boom) as caught:
        model(torch.randn(4, 4).double())
    assert 'raise self.fault["error"]' in "".join(traceback.format_tb(caught.value.__traceback__))


class Misfit(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            raise Boom
        return x


@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (nn.Sequential(nn.Identity(), nn.Sequential(Misfit())), "layer '1.0' (Misfit)"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "layer '0' (Linear)"),
        (Misfit(), "cpu"),
    ],
)
def test_the_note_names_the_innermost_layer_at_work(net, layer):
    with pytest.raises((Boom, RuntimeError)) as caught:
        DataParallelWithCallback(net, ["cpu"] * 2)(torch.tensor([[-1.0], [1.0]]))
    (note,) = caught.value.__notes__
    assert note.startswith("raised in replica ")
    assert note.endswith(layer)


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_of_the_model_that_raises_reaches_the_others(centred_net, register):
    net = centred_net()
    error = Boom()

    def hook(module, args, *output):
        if module[1].replica.rank == 1:
            raise error

    getattr(net, register)(hook)
    with pytest.raises(Boom) as caught:
        DataParallelWithCallback(net, ["cpu"] * 3, timeout=SECONDS)(torch.randn(6, 4).double())
    assert caught.value is error


def test_a_replica_that_fails_before_its_call_reaches_the_others(centred_net, monkeypatch):
    from syncbn_parallel import _data_parallel

    error, states = Boom(), itertools.count()
    original = _data_parallel.CallerState.applied

    def applied(state, device):
        if next(states) == 1:
            raise error
        return original(state, device)

    monkeypatch.setattr(_data_parallel.CallerState, "applied", applied)
    with pytest.raises(Boom) as caught:
        DataParallelWithCallback(centred_net(), ["cpu"] * 3, timeout=SECONDS)(torch.randn(6, 4).double())
    assert caught.value is error


def test_the_first_of_several_failures_is_the_one_that_is_raised():
    errors = [Boom("late"), Boom("early")]
    early_is_out = threading.Event()

    class Late(nn.Module):
        def __data_parallel_replicate__(self, ctx, copy_id):
            self.group, self.rank = ctx.group, copy_id

        def forward(self, x):
            if self.rank == 0:
                assert early_is_out.wait(SECONDS)
                while not self.group.broken:
                    pass
            else:
                early_is_out.set()
            raise errors[self.rank]

    with pytest.raises(Boom) as caught:
        DataParallelWithCallback(Late(), ["cpu"] * 2)(torch.ones(2))
    assert caught.value is errors[1]


def test_no_replica_runs_on_after_the_forward_has_raised():
    others_may_end, ended = threading.Event(), []

    class Slow(nn.Module):
        def __data_parallel_replicate__(self, ctx, copy_id):
            self.rank = copy_id

        def forward(self, x):
            if self.rank == 0:
                others_may_end.set()
                raise Boom
            assert others_may_end.wait(SECONDS)
            ended.append(self.rank)

    with pytest.raises(Boom):
        DataParallelWithCallback(Slow(), ["cpu"] * 3)(torch.ones(3))
    assert sorted(ended) == [1, 2]


def test_a_replica_that_is_too_slow_is_named(centre_class):
    timed_out = threading.Event()

    class Slow(centre_class):
        def forward(self, x):
            if self.replica.rank == 1:
                assert timed_out.wait(SECONDS)
                return x
            try:
                return super().forward(x)
            finally:
                timed_out.set()

    model = DataParallelWithCallback(nn.Sequential(Slow()), ["cpu"] * 2, timeout=0.05)
    with pytest.raises(SyncTimeoutError, match=r"timed out after 0.05 s at '0'.*missing: 1"):
        model(torch.ones(2, 2))


@pytest.mark.usefixtures("interrupts_raise")
def test_an_interrupt_of_the_waiting_caller_ends_all_replicas(centre_class):
    """Ctrl-C while one replica waits for another that computes: it is raised once both have ended."""
    waiting, may_end, ended = threading.Event(), threading.Event(), []

    class Busy(centre_class):
        def forward(self, x):
            try:
                if self.replica.rank == 0:
                    waiting.set()
                    return super().forward(x)
                assert waiting.wait(SECONDS)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                assert may_end.wait(SECONDS)
                return x
            finally:
                may_end.set()
                ended.append(self.replica.rank)

    model = DataParallelWithCallback(nn.Sequential(Busy()), ["cpu"] * 2, timeout=SECONDS)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 2))
    assert ended == [0, 1]


@pytest.mark.parametrize("kind", ["raise", "skip"])
def test_a_failed_forward_keeps_nothing_alive_without_the_garbage_collector(faulty, kind):
    fault = {"rank": 1, "error": Boom(), "kind": kind}
    made = []

    class Recording(DataParallelWithCallback):
        def replicate(self, module, device_ids):
            replicas = super().replicate(module, device_ids)
            made.extend(map(weakref.ref, replicas))
            return replicas

    model = Recording(faulty(1, fault), ["cpu"] * 3, timeout=SECONDS)

    def fail():
        x = torch.randn(6, 4).double()
        made.append(weakref.ref(x))
        try:
            model(x)
        except Exception:
            fault.clear()  # with the exception that is raised
            return
        raise AssertionError("nothing was raised")

    gc.collect()
    gc.disable()
    try:
        fail()
        assert [reference() for reference in made] == [None] * 4
    finally:
        gc.enable()


def test_a_forward_that_succeeds_keeps_nothing_alive_without_the_garbage_collector(centred_net):
    made = []

    class Recording(DataParallelWithCallback):
        def replicate(self, module, device_ids):
            replicas = super().replicate(module, device_ids)
            made.extend(map(weakref.ref, replicas))
            return replicas

    model = Recording(centred_net(), ["cpu"] * 3)
    x = torch.randn(6, 4).double()
    made.append(weakref.ref(x))
    gc.collect()
    gc.disable()
    try:
        model(x)
        del x
        assert [reference() for reference in made] == [None] * 4
    finally:
        gc.enable()


@TORCH_2_4
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model_is_right_or_says_what_to_do(centred_net, reentrant):
    model = DataParallelWithCallback(centred_net(), ["cpu"] * 2)
    x = torch.randn(4, 4).double().requires_grad_()
    weights = torch.randn(4, 4).double()
    (model(x) * weights).sum().backward()
    expected, x.grad = x.grad, None
    loss = (checkpoint(model, x, use_reentrant=reentrant) * weights).sum()
    if reentrant:
        with pytest.raises(RuntimeError, match="put the checkpoint inside the module"):
            loss.backward()
    else:  # nothing of this graph asks for a second pass
        loss.backward()
        assert torch.equal(x.grad, expected)


@TORCH_2_4
def test_a_checkpoint_that_runs_the_whole_model_again_says_what_to_do(centred_net):
    model = DataParallelWithCallback(centred_net(), ["cpu"] * 2)
    x = torch.randn(4, 4).double().requires_grad_()
    loss = checkpoint(lambda x: model(x).sin().sum(), x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="put the checkpoint inside the module"):
        loss.backward()
    assert model(x).shape == (4, 4)
