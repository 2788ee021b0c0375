"""What belongs to the calling thread and concerns the replicas: transforms, modes, hooks, dual numbers."""

import threading
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn_parallel import DataParallelWithCallback, patch_replication_callback

# torch says this of itself where it first needs a derivative in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def loss(model):
    return lambda x: (model(x) * torch.arange(18.0).view(6, 3)).sum()


TRANSFORMS = {
    "grad": lambda model: torch.func.grad(loss(model))(X),
    "grad_and_value": lambda model: torch.func.grad_and_value(loss(model))(X),
    "vjp": lambda model: torch.func.vjp(model, X)[1](X),
    "jvp": lambda model: torch.func.jvp(model, (X,), (X,)),
    "jacrev": lambda model: torch.func.jacrev(model)(X),
    "jacfwd": lambda model: torch.func.jacfwd(model)(X),
    "hessian": lambda model: torch.func.hessian(loss(model))(X),
    "vmap": lambda model: torch.func.vmap(model)(X.expand(4, 6, 3)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("ours", [True, False])
def test_a_function_transform_around_replicas_is_an_error_that_says_what_to_do(transform, ours, foreign):
    model = (
        DataParallelWithCallback(net(), ["cpu"] * 2)
        if ours
        else patch_replication_callback(foreign(net(), 2))
    )
    with pytest.raises(RuntimeError, match=r"outside of function transforms.*attribute \.module"):
        TRANSFORMS[transform](model)
    torch.testing.assert_close(model(X), net()(X))
    TRANSFORMS[transform](model.module)


def test_a_transform_around_keyword_inputs_or_given_parameters_is_the_same_error():
    model = DataParallelWithCallback(net(), ["cpu"] * 2)
    outer = nn.Sequential(model)  # torch refuses a functional_call of an nn.DataParallel itself
    parameters = {name: parameter.detach() for name, parameter in outer.named_parameters()}
    stacked = {name: torch.stack([parameter] * 2) for name, parameter in parameters.items()}

    def call(given):
        return torch.func.functional_call(outer, given, (X,)).square().sum()

    for transform in (
        lambda: torch.func.grad(lambda x: model(input=x).square().sum())(X),
        lambda: torch.func.grad(call)(parameters),
        lambda: torch.func.vmap(call)(stacked),
    ):
        with pytest.raises(RuntimeError, match=r"outside of function transforms.*attribute \.module"):
            transform()


def test_a_transform_around_the_wrapper_on_one_device_or_none_is_the_modules_own():
    expected = torch.func.grad(loss(net()))(X)
    actual = torch.func.grad(loss(DataParallelWithCallback(net(), ["cpu"])))(X)
    torch.testing.assert_close(actual, expected)


def test_a_transform_inside_the_forward_works():
    class Inside(nn.Module):
        def forward(self, x):
            return torch.func.grad(lambda y: y.sin().sum())(x)

    torch.testing.assert_close(DataParallelWithCallback(Inside(), ["cpu"] * 3)(X), X.cos())


def test_functional_call_on_the_wrapper_uses_the_given_parameters():
    model, other = DataParallelWithCallback(net(), ["cpu"] * 2), nn.Linear(3, 3).double()
    given = {f"0.module.{i}.{k}": p for i in (0, 2) for k, p in other.named_parameters()}
    actual = torch.func.functional_call(nn.Sequential(model), given, (X,))
    torch.testing.assert_close(actual, other(other(X).tanh()))
    actual.sum().backward()
    assert other.weight.grad.abs().sum() > 0
    assert model.module[0].weight.grad is None


def test_dual_numbers_pass_through_replicas_forward():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, X.cos())
        actual = forward_ad.unpack_dual(DataParallelWithCallback(net(), ["cpu"] * 3)(x)).tangent
        expected = forward_ad.unpack_dual(net()(x)).tangent
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


class CountFunctions(TorchFunctionMode):
    """Counts calls of linear, by thread."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            self.threads.append(threading.get_ident())
        return func(*args, **(kwargs or {}))


class Double(TorchFunctionMode):
    """Makes tanh return twice its value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func in (torch.tanh, torch.Tensor.tanh) else result


class CountOperators(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.lock = threading.Lock()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self.lock:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_function_modes_of_the_caller_work_in_replicas_and_end_with_it():
    model = DataParallelWithCallback(net(), ["cpu"] * 3)
    with CountFunctions() as counted, Double():
        actual, expected = model(X), net()(X)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    assert len(counted.threads) == 8
    assert len(set(counted.threads)) == 4
    torch.testing.assert_close(model(X), net()(X), rtol=0, atol=1e-13)
    assert len(counted.threads) == 8


def test_operator_modes_of_the_caller_work_in_replicas_and_end_with_it():
    model = DataParallelWithCallback(net(), ["cpu"] * 3)
    with CountOperators() as counted:
        actual = model(X)
    torch.testing.assert_close(actual, net()(X), rtol=0, atol=1e-13)
    assert counted.calls["aten.tanh.default"] == 3
    model(X)
    assert counted.calls["aten.tanh.default"] == 3


def test_a_mode_ends_with_a_replica_that_raises():
    class Failing(nn.Module):
        def forward(self, x):
            raise ValueError("no luck")

    model, good = (DataParallelWithCallback(m, ["cpu"] * 3) for m in (Failing(), net()))
    with CountOperators() as counted, pytest.raises(ValueError, match="no luck"):
        model(X)
    counted.calls.clear()
    good(X)
    assert not counted.calls


def test_the_default_device_of_the_caller_is_that_of_the_replicas():
    class Makes(nn.Module):
        def forward(self, x):
            return str(torch.ones(1).device)

    model = DataParallelWithCallback(Makes(), ["cpu"] * 2)
    with torch.device("meta"):
        assert model(X) == "meta"
    assert model(X) == "cpu"
    assert torch.ones(1).device.type == "cpu"
    torch.set_default_device("meta")
    try:
        assert model(X) == "meta"
    finally:
        torch.set_default_device(None)
    assert model(X) == "cpu"


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
    reason="before 2.8 torch does not tell which hooks there are",
)
def test_hooks_on_saved_tensors_work_in_replicas_and_end_with_them():
    packed, lock = [], threading.Lock()

    def pack(tensor):
        with lock:
            packed.append(threading.get_ident())
        return tensor.numpy().copy()

    model = DataParallelWithCallback(net(), ["cpu"] * 3)
    model.zero_grad()
    with saved_tensors_hooks(pack, torch.from_numpy):
        y = model(X)
    assert len(set(packed) - {threading.get_ident()}) == 3
    whole = net()
    y.square().sum().backward()
    whole(X).square().sum().backward()
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)
    packed.clear()
    model(X)
    assert packed == []
