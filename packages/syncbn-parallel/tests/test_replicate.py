"""What a replica shares with its module, and what it does not."""

import copy

import pytest
import torch
from torch import nn

from syncbn_parallel import replicate


def pairs(module, replica):
    """Yield each sub-module with its copy."""
    return zip(module.modules(), replica.modules(), strict=True)


class Blocks(nn.Module):
    """One of everything that a module can hold."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))])
        self.dict = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
        self.empty = nn.Sequential()
        self.missing = None
        self.register_parameter("nothing", None)
        self.register_buffer("no_buffer", None)
        self.register_buffer("counter", torch.zeros(2), persistent=False)
        self.linear = nn.Linear(2, 2)
        self.again = self.linear
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(2)
        self.ordinary = {"a": 1}

    def forward(self, x):
        return self.norm(self.linear(x) + self.tied(x)) * self.list[0] + self.list[1] + self.counter


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu", "cpu"], ["cpu", "meta"]])
def test_a_replica_has_the_structure_of_its_module(devices):
    module = Blocks()
    for replica in replicate(module, devices):
        assert [n for n, _ in replica.named_modules()] == [n for n, _ in module.named_modules()]
        assert [n for n, _ in replica.named_parameters()] == [n for n, _ in module.named_parameters()]
        assert list(replica.state_dict()) == list(module.state_dict())
        for original, replicated in pairs(module, replica):
            assert type(original) is type(replicated)
            assert original is not replicated
        assert replica.again is replica.linear
        assert replica.tied.weight is replica.linear.weight
        assert (replica.missing, replica.nothing, replica.no_buffer) == (None, None, None)
        assert replica.ordinary is module.ordinary


def test_replicas_on_the_devices_of_the_module_hold_its_own_parameters():
    module = Blocks()
    for replica in replicate(module, ["cpu", "cpu"]):
        assert all(p is q for p, q in zip(module.parameters(), replica.parameters(), strict=True))


def test_gradients_of_all_replicas_add_up_in_the_module():
    torch.manual_seed(0)
    module, whole = Blocks().double().eval(), Blocks().double().eval()
    whole.load_state_dict(module.state_dict())
    x, weights = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    outputs = [
        replica(part) for replica, part in zip(replicate(module, ["cpu"] * 3), x.chunk(3), strict=True)
    ]
    (torch.cat(outputs) * weights).sum().backward()
    (whole(x) * weights).sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), whole.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_first_replica_updates_the_buffers_of_the_module_and_no_other_does():
    module = nn.BatchNorm1d(3)
    first, second, third = replicate(module, ["cpu"] * 3)
    assert first.running_mean is module.running_mean
    assert len({b.data_ptr() for b in (first.running_mean, second.running_mean, third.running_mean)}) == 3
    second(torch.ones(4, 3))
    assert module.running_mean.eq(0).all()
    first(torch.ones(4, 3))
    assert module.running_mean.gt(0).all()
    assert module.num_batches_tracked == 1


def test_a_buffer_that_requires_grad_stays_connected():
    module = nn.Module()
    module.register_buffer("scale", torch.ones(2, requires_grad=True))
    for weight, replica in zip((2.0, 3.0), replicate(module, ["cpu", "cpu"]), strict=True):
        (replica.scale * weight).sum().backward()
    assert module.scale.grad.tolist() == [5.0, 5.0]


def test_a_buffer_under_two_names_stays_one_buffer_in_each_replica():
    module = nn.Module()
    module.register_buffer("a", torch.zeros(2))
    module.register_buffer("b", module.a)
    replicas = replicate(module, ["cpu", "cpu", "meta"])
    assert all(replica.a is replica.b for replica in replicas)


def test_copies_on_another_device_are_differentiable_and_shared_by_the_replicas_there():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    first, second, third = replicate(module, ["cpu", "meta", "meta"])
    assert first[0].weight is module[0].weight
    assert second[0].weight.device.type == "meta"
    assert second[0].weight.grad_fn is not None
    assert second[0].weight is third[0].weight
    assert [p.device.type for p in third.parameters()] == ["meta"] * 4
    assert second[1].running_mean is not third[1].running_mean
    assert third(torch.empty(4, 2, device="meta")).shape == (4, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_copies_have_no_graph_where_gradients_are_off(mode):
    with mode():
        _, away = replicate(nn.Linear(2, 2), ["cpu", "meta"])
    assert away.weight.grad_fn is None
    assert not away.weight.requires_grad


def test_a_frozen_parameter_stays_frozen_in_its_copies():
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    _, away = replicate(module, ["cpu", "meta"])
    assert (away.weight.requires_grad, away.bias.requires_grad) == (False, True)


def test_only_the_replicas_that_come_after_the_first_get_copies_of_the_buffers_at_home():
    module = nn.BatchNorm1d(2)
    away, home = replicate(module, ["meta", "cpu"])
    assert away.running_mean.device.type == "meta"
    assert home.running_mean is not module.running_mean


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_an_rnn_computes_with_the_weights_of_the_replica(kind):
    torch.manual_seed(0)
    module = kind(3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    here, second, away = replicate(module, ["cpu", "cpu", "meta"])
    for replica in (here, second):
        assert torch.equal(replica(x)[0], module(x)[0])
    assert [w.device.type for w in away._flat_weights] == ["meta"] * 16
    assert away(x.to("meta"))[0].shape == (5, 2, 8)


def test_hooks_run_in_replicas_with_the_replica():
    module = nn.Linear(2, 2)
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(m))
    replicas = replicate(module, ["cpu", "cpu"])
    for replica in replicas:
        replica(torch.ones(1, 2))
    assert seen == replicas


def test_hooks_that_a_forward_adds_end_with_the_replica():
    class Curious(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            seen = []
            self.inner.register_forward_hook(lambda module, args, y: seen.append(module))
            self.inner(x)
            return seen

    module = Curious()
    for replica in replicate(module, ["cpu", "cpu"]):
        assert replica(torch.ones(1, 2)) == [replica.inner]
    assert not module.inner._forward_hooks


@pytest.mark.parametrize("kind", [list, tuple])
def test_sub_modules_in_a_plain_list_are_those_of_the_replica(kind):
    module = nn.Module()
    module.first, module.second, elsewhere = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    module.blocks = kind([module.second, module.first, elsewhere])
    replica, _ = replicate(module, ["cpu", "cpu"])
    assert replica.blocks == kind([replica.second, replica.first, elsewhere])
    assert module.blocks == kind([module.second, module.first, elsewhere])


def test_a_forward_that_was_bound_to_the_module_is_bound_to_the_replica():
    module = nn.Linear(2, 2)
    module.forward = module.extra_repr
    seen = replicate(module, ["cpu"])[0].forward.__self__
    assert seen is not module
    assert type(seen) is nn.Linear


def test_parametrized_and_weight_normed_modules_compute_the_same_in_replicas():
    torch.manual_seed(0)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    for replica in replicate(module, ["cpu", "cpu"]):
        assert torch.equal(replica(x), module(x))


def test_a_module_compiled_in_place_is_uncompiled_in_replicas():
    module = nn.Linear(2, 2)
    calls = []
    module._compiled_call_impl = lambda x: calls.append(x)  # what module.compile() sets
    assert replicate(module, ["cpu"])[0](torch.ones(1, 2)).shape == (1, 2)
    assert calls == []


def test_the_result_of_compile_runs_the_replica_of_what_was_compiled():
    inner = nn.Linear(2, 2)
    seen = []
    inner.register_forward_hook(lambda m, args, out: seen.append(m))
    compiled = torch.compile(inner, backend="eager")
    replica, second = replicate(compiled, ["cpu", "cpu"])
    second(torch.ones(1, 2))
    assert seen == [second._orig_mod]
    assert replica._orig_mod is not second._orig_mod


def test_lazy_modules_are_refused():
    with pytest.raises(RuntimeError, match="uninitialized"):
        replicate(nn.LazyLinear(2), ["cpu", "cpu"])


def test_the_shortcut_copies_what_torch_copies():
    """Guards the repetition of nn.Module._replicate_for_data_parallel against changes of torch."""
    module = Blocks().linear
    theirs, ours = module._replicate_for_data_parallel(), replicate(module, ["cpu"])[0]
    assert theirs.__dict__.keys() == ours.__dict__.keys()
    for key, value in theirs.__dict__.items():
        if key not in {"_parameters", "_buffers", "_modules"} and "forward" not in key:
            assert ours.__dict__[key] is value, key


def test_replication_leaves_the_module_as_it_was():
    module = Blocks()
    before = {m: dict(m.__dict__) for m in module.modules()}
    contents = copy.deepcopy(module.state_dict())
    replicate(module, ["cpu", "meta", "cpu"])
    assert {m: dict(m.__dict__) for m in module.modules()} == before
    torch.testing.assert_close(module.state_dict(), contents)


def test_names_and_order_are_those_of_named_modules():
    from syncbn_parallel._module_tree import named_submodules

    deep = nn.Sequential(Blocks(), nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()))
    deep.append(deep[1][0])
    assert named_submodules(deep) == list(deep.named_modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_modules_are_refused_by_name():
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(RuntimeError, match=r"TorchScript module as '1'"):
        replicate(nn.Sequential(nn.ReLU(), traced), ["cpu", "cpu"])
