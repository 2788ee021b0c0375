"""Changes in place: of the input as in the single model; of a tensor that replicas share, an error."""

import copy

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 0, "atol": 1e-12}


class Changes(nn.Module):
    """A layer whose forward does something to itself first."""

    def __init__(self, change):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = torch.ones(3, requires_grad=True)  # a leaf that is no parameter
        self.plain = torch.zeros(1)
        self.register_buffer("seen", torch.zeros(1))
        self.change = change

    def forward(self, x):
        self.change(self)
        return self.inner(x) * self.scale


def without_grad(change):
    def run(net):
        with torch.no_grad():
            change(net)

    return run


def step_inside(net):
    torch.optim.SGD([net.inner.weight], lr=0.1).step()


PARAMETER_CHANGES = {
    "no_grad": ("inner.weight", without_grad(lambda net: net.inner.weight.mul_(0.5))),
    "detach": ("inner.weight", lambda net: net.inner.weight.detach().mul_(0.5)),
    "data": ("inner.weight", lambda net: net.inner.weight.data.mul_(0.5)),
    "data of one element": ("inner.bias", lambda net: net.inner.bias.data[1].add_(1e-6)),
    "clamp": ("inner.weight", lambda net: net.inner.weight.data.clamp_(-1e-3, 1e-3)),
    "copy": ("inner.bias", without_grad(lambda net: net.inner.bias.copy_(torch.ones(3)))),
    "init": ("inner.weight", lambda net: nn.init.zeros_(net.inner.weight)),
    "leaf": ("scale", without_grad(lambda net: net.scale.add_(1))),
    "plain tensor": ("plain", lambda net: net.plain.add_(1)),
}


@pytest.mark.parametrize("kind", PARAMETER_CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_shared_tensor_that_changes_in_place_is_an_error_that_names_it(kind, training):
    name, change = PARAMETER_CHANGES[kind]
    model = DataParallelWithCallback(nn.Sequential(Changes(change)), ["cpu"] * 4).train(training)
    with pytest.raises(RuntimeError, match=rf"got '0\.{name}' changed in place: 4 replicas on cpu share it"):
        model(torch.ones(8, 3))


def test_an_optimizer_inside_a_forward_is_an_error():
    net = Changes(step_inside)
    net.inner.weight.grad = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match=r"got 'inner\.weight' changed in place"):
        DataParallelWithCallback(net, ["cpu"] * 2)(torch.ones(4, 3))


@pytest.mark.parametrize("kind", ["no_grad", "data"])
def test_a_change_that_begins_in_a_later_forward_is_found(kind):
    name, change = PARAMETER_CHANGES[kind]
    begun = []
    model = DataParallelWithCallback(Changes(lambda net: begun and change(net)), ["cpu"] * 2)
    for _ in range(3):
        model(torch.ones(4, 3))
    begun.append(1)
    with pytest.raises(RuntimeError, match=name):
        model(torch.ones(4, 3))  # the 4th


def test_a_tensor_of_nan_and_one_of_another_size_of_number_are_no_change():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).half())
    with torch.no_grad():
        net[0].weight.fill_(float("nan"))
    net[1].forward = lambda x: x
    DataParallelWithCallback(net, ["cpu"] * 2)(torch.ones(4, 3))


def test_parameters_made_in_inference_mode_are_left_alone():
    with torch.inference_mode():
        net = nn.Linear(3, 3)
        assert DataParallelWithCallback(net, ["cpu"] * 2)(torch.ones(4, 3)).shape == (4, 3)


def test_buffers_of_the_first_replica_change_in_place_as_in_the_single_model():
    net = Changes(lambda net: net.seen.add_(1))
    net.alias = net.seen
    DataParallelWithCallback(net, ["cpu"] * 4)(torch.ones(8, 3))
    assert net.seen.item() == net.alias.item() == 1


def test_a_change_between_two_forwards_is_allowed():
    model = DataParallelWithCallback(Changes(lambda net: None), ["cpu"] * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()


class Alone(nn.Module):
    """Stands for the wrapper in the single model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def wrappers():
    return [Alone, lambda module: DataParallelWithCallback(module, ["cpu"] * 3)]


def decoder(first):
    torch.manual_seed(1)
    return nn.Sequential(first, nn.Linear(4, 4), nn.Tanh()).double()


@pytest.mark.parametrize(
    "first", [nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True), nn.SiLU(inplace=True)]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_first_operation_in_place_after_another_model_equals_the_whole_batch(first, dim):
    """Also for what comes after: the input itself has changed, and its gradient goes through the change."""
    results = []
    torch.manual_seed(0)
    weights, x = torch.randn(3, 7, 7, 4).double(), torch.randn(7, 7, 4).double()
    for wrap in (Alone, lambda module: DataParallelWithCallback(module, ["cpu"] * 3, dim=dim)):
        own = x.clone().requires_grad_()
        encoder = own * 2 + 1  # does not save its output
        output = wrap(decoder(copy.deepcopy(first)))(encoder)
        (output * weights[0] + encoder * weights[1] + encoder.sin() * weights[2]).sum().backward()
        results.append([output.detach(), encoder.detach(), own.grad])
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_an_input_that_a_parameter_changes_in_place_gets_the_history_of_the_change():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.arange(1.0, 5.0).double())

        def forward(self, x):
            return x.mul_(self.weight).sin()

    results = []
    for wrap in wrappers():
        x, scale = torch.arange(24.0).view(6, 4).double(), Scale()
        output = wrap(scale)(x)
        (output + x.cos()).sum().backward()
        results.append([x.detach(), scale.weight.grad])
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_an_input_whose_values_were_saved_before_is_torchs_own_error():
    for wrap in wrappers():
        x = torch.randn(6, 4).double().requires_grad_()
        encoder = x.exp()  # saves its output
        loss = wrap(decoder(nn.ReLU(inplace=True)))(encoder).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_input_without_gradient_that_was_saved_before_is_torchs_own_error():
    for wrap in wrappers():
        x, weight = torch.randn(6, 4).double(), torch.ones(4, requires_grad=True, dtype=torch.float64)
        before = x * weight  # saves x
        loss = wrap(decoder(nn.ReLU(inplace=True)))(x).sum() + before.sum()
        assert x.ge(0).all()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("repetition", range(5))
def test_replicas_that_change_their_inputs_do_not_disturb_each_others_backward(repetition):
    """Chunks that shared one version would count each other's changes."""
    model = DataParallelWithCallback(decoder(nn.ReLU(inplace=True)), ["cpu"] * 8)
    for _ in range(20):
        model(torch.randn(16, 4).double()).sum().backward()


def test_a_leaf_that_requires_grad_may_not_be_changed_in_place():
    for wrap in wrappers():
        x = torch.randn(6, 4).double()
        own = x.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=r"leaf Variable that requires grad|is being modified inplace"):
            wrap(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2).double()))(own)
        assert torch.equal(own.detach(), x)


class Look(nn.Module):
    """Notes where the memory of its inputs is."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.untyped_storage().data_ptr())
        return x * 2


def test_a_leaf_that_requires_grad_is_not_copied():
    look = Look()
    x = torch.randn(6, 4, requires_grad=True)
    DataParallelWithCallback(look, ["cpu"] * 3)(x).sum().backward()
    assert set(look.seen) == {x.untyped_storage().data_ptr()}
    assert torch.equal(x.grad, torch.full((6, 4), 2.0))


def test_an_input_that_is_not_changed_keeps_its_history_and_its_memory():
    look = Look()
    x = torch.randn(6, 4).requires_grad_() * 1
    before = x.grad_fn, x._version
    DataParallelWithCallback(look, ["cpu"] * 3)(x)
    assert (x.grad_fn, x._version) == before
    assert set(look.seen) == {x.untyped_storage().data_ptr()}


def test_second_derivatives_go_through_the_chunks():
    x = torch.randn(6, 4).double().requires_grad_()
    y = DataParallelWithCallback(nn.Tanh(), ["cpu"] * 3)(x * 2)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    first.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (whole,) = torch.autograd.grad((other * 2).tanh().sum(), other, create_graph=True)
    whole.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, **EXACT)


def test_an_override_of_scatter_may_make_views():
    class Views(DataParallelWithCallback):
        def scatter(self, inputs, kwargs, device_ids):
            return [(part,) for part in inputs[0].split([2, 4])], [{}, {}]

    x = torch.randn(6, 4)
    assert torch.equal(Views(nn.ReLU(), ["cpu"] * 2)(x), x.relu())
