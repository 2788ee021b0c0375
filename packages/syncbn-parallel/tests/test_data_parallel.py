"""DataParallelWithCallback beside the module on the whole batch, and beside nn.DataParallel."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback


def gradients(model, x, weights):
    model.zero_grad()
    (model(x) * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("replicas", "batch"), [(2, 8), (3, 8), (4, 5), (8, 8), (8, 3), (2, 1), (1, 4)])
def test_output_and_gradients_are_those_of_the_whole_batch(centred_net, replicas, batch):
    net = centred_net()
    model = DataParallelWithCallback(centred_net(), ["cpu"] * replicas)
    x = torch.randn(batch, 4).double()
    x_parallel, x_whole = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(batch, 4).double()
    ours, theirs = gradients(model, x_parallel, weights), gradients(net, x_whole, weights)
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=1e-13)
    torch.testing.assert_close([x_parallel.grad, *ours], [x_whole.grad, *theirs], rtol=0, atol=1e-12)


def test_it_is_a_data_parallel_with_its_attributes_and_keys():
    module = nn.Linear(4, 2)
    model = DataParallelWithCallback(module, ["cpu", "cpu"], dim=1)
    assert isinstance(model, nn.DataParallel)
    assert model.module is module
    assert list(model.state_dict()) == ["module.weight", "module.bias"]
    assert model.device_ids == [torch.device("cpu")] * 2
    assert (model.output_device, model.dim) == (torch.device("cpu"), 1)


def test_a_single_chunk_runs_in_the_calling_thread_on_the_module_itself():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((self, threading.get_ident()))
            return x

    module = Probe()
    model = DataParallelWithCallback(module, ["cpu"] * 4)
    for batch in (1, 0):
        assert model(torch.ones(batch, 2)).shape == (batch, 2)
    assert seen == [(module, threading.get_ident())] * 2


def test_a_module_without_arguments_runs_once():
    class Constant(nn.Module):
        def forward(self):
            return torch.ones(3)

    assert DataParallelWithCallback(Constant(), ["cpu"] * 4)().shape == (3,)


def test_arguments_without_tensors_go_to_every_replica():
    class Ones(nn.Module):
        def forward(self, number):
            return torch.ones(number)

    assert DataParallelWithCallback(Ones(), ["cpu"] * 4)(3).shape == (12,)


def test_keyword_arguments_and_nested_containers_pass_through():
    class Nested(nn.Module):
        def forward(self, pair, *, extra):
            return {"sum": pair[0] + pair[1], "loss": extra.mean(), "name": "nested"}

    x = torch.arange(4.0)
    out = DataParallelWithCallback(Nested(), ["cpu"] * 2)((x, x), extra=x)
    assert out["sum"].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert out["loss"].tolist() == [0.5, 2.5]
    assert out["name"] == "nested"


def test_another_batch_dimension_is_used():
    assert DataParallelWithCallback(nn.Linear(4, 2), ["cpu"] * 2, dim=1)(torch.ones(3, 6, 4)).shape == (
        3,
        6,
        2,
    )


def test_one_device_is_the_module_itself_and_nothing_is_gathered():
    class Scalar(nn.Module):
        def forward(self, x):
            return x.mean()

    assert DataParallelWithCallback(Scalar(), ["cpu"])(torch.ones(4)).dim() == 0


def test_replicas_on_another_device_take_part():
    model = DataParallelWithCallback(nn.Linear(4, 2), ["meta", "meta"])
    with pytest.raises(RuntimeError, match=r"on meta .*'weight' of the module itself on cpu; move"):
        model(torch.ones(4, 4))
    assert model.to("meta")(torch.ones(4, 4)).device.type == "meta"


def test_methods_can_be_overridden_as_those_of_data_parallel():
    calls = []

    class Logged(DataParallelWithCallback):
        def scatter(self, inputs, kwargs, device_ids):
            calls.append("scatter")
            return super().scatter(inputs, kwargs, device_ids)

        def replicate(self, module, device_ids):
            calls.append("replicate")
            return super().replicate(module, device_ids)

        def parallel_apply(self, replicas, inputs, kwargs):
            calls.append("parallel_apply")
            return super().parallel_apply(replicas, inputs, kwargs)

        def gather(self, outputs, output_device):
            calls.append("gather")
            return super().gather(outputs, output_device)

    Logged(nn.Linear(4, 2), ["cpu", "cpu"])(torch.ones(4, 4))
    assert calls == ["scatter", "replicate", "parallel_apply", "gather"]


def test_replicas_that_somebody_else_made_run_too():
    class Own(DataParallelWithCallback):
        def replicate(self, module, device_ids):
            return [module] * len(device_ids)

    assert Own(nn.Linear(4, 2), ["cpu", "cpu"])(torch.ones(4, 4)).shape == (4, 2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_compute_the_same_after_a_forward(centred_net, duplicate):
    model = DataParallelWithCallback(nn.Linear(4, 2), ["cpu", "cpu"], timeout=7.0)
    x = torch.randn(6, 4)
    expected = model(x)
    again = duplicate(model)
    assert torch.equal(again(x), expected)
    assert again.timeout == 7.0
    assert again.module.weight is not model.module.weight


@pytest.mark.usefixtures("no_accelerator")
class TestOnAMachineWithoutGPU:
    @pytest.mark.filterwarnings("ignore:DataParallelWithCallback found no GPU:UserWarning")
    def test_no_device_ids_run_the_module_alone(self):
        model = DataParallelWithCallback(nn.Linear(4, 2), dim=1)
        assert list(model.device_ids) == []
        assert model.dim == 1
        assert model(torch.ones(4)).shape == (2,)

    @pytest.mark.parametrize("device_ids", [[0], [0, 1], ["cuda"], ["cuda:3"]])
    def test_gpus_are_refused(self, device_ids):
        with pytest.raises(ValueError, match=r"devices that exist, got cuda:\d.* 0 devices"):
            DataParallelWithCallback(nn.Linear(4, 2), device_ids)

    def test_a_gpu_for_the_output_is_refused(self):
        with pytest.raises(ValueError, match="expected devices that exist"):
            DataParallelWithCallback(nn.Linear(4, 2), ["cpu", "cpu"], output_device=0)


@pytest.mark.parametrize(
    "device_ids", [[], "cpu", ["cpu", 0], ["cpu", "meta"], ["nonsense"], [-1], [None], 3]
)
def test_device_ids_that_make_no_sense_are_refused(device_ids):
    with pytest.raises(ValueError, match="expected device_ids to be a list of devices of one kind"):
        DataParallelWithCallback(nn.Linear(4, 2), device_ids)


def test_an_invalid_timeout_is_refused_and_the_default_comes_from_the_environment(monkeypatch):
    class Timeout(nn.Module):
        def __data_parallel_replicate__(self, ctx, copy_id):
            self.timeout = ctx.group.timeout

        def forward(self, x):
            return self.timeout

    assert DataParallelWithCallback(Timeout(), ["cpu"] * 2)(torch.ones(2)) == 300.0
    assert DataParallelWithCallback(Timeout(), ["cpu"] * 2, timeout=None)(torch.ones(2)) is None
    monkeypatch.setenv("SYNCBN_TIMEOUT", "12")
    assert DataParallelWithCallback(Timeout(), ["cpu"] * 2)(torch.ones(2)) == 12.0
    assert DataParallelWithCallback(Timeout(), ["cpu"] * 2, timeout=5)(torch.ones(2)) == 5.0
    with pytest.raises(ValueError, match="timeout"):
        DataParallelWithCallback(Timeout(), ["cpu"] * 2, timeout=-1)


def test_a_model_inside_a_model_synchronizes_with_its_own_replicas(centre_class):
    inner = DataParallelWithCallback(nn.Sequential(centre_class()), ["cpu"] * 2)
    outer = DataParallelWithCallback(nn.Sequential(nn.Identity(), inner), ["cpu"] * 2)
    x = torch.randn(8, 4)
    halves = [part - part.mean(0) for part in x.chunk(2)]
    torch.testing.assert_close(outer(x), torch.cat(halves))


def test_one_model_used_twice_in_a_forward_and_by_several_threads(centred_net):
    model, net = DataParallelWithCallback(centred_net(), ["cpu"] * 3), centred_net()
    x = torch.randn(7, 4).double()
    expected = net(net(x))
    results = {}

    def use(number):
        results[number] = [model(model(x)) for _ in range(10)]

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for outputs in results.values():
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)


def test_a_shared_layer_synchronizes_at_each_of_its_calls(centre_class):
    centre = centre_class()
    model = DataParallelWithCallback(nn.Sequential(centre, nn.Tanh(), centre), ["cpu"] * 2)
    x = torch.randn(6, 2)
    torch.testing.assert_close(model(x), nn.Sequential(centre, nn.Tanh(), centre)(x))
