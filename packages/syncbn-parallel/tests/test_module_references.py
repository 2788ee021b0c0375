"""Modules that a model reaches by another way than its registered tree: each replica runs its own copy."""

import copy
import functools
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback, patch_replication_callback, replicate

Stage = namedtuple("Stage", "module name")


@pytest.fixture
def base(centre_class):
    """Return a net class of a linear layer and one that synchronizes, for which `run` is the computation."""

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.linear = nn.Linear(3, 3).double()
            self.centre = centre_class()
            self.register_buffer("calls", torch.zeros(1))
            self.prepare()

        def prepare(self):
            pass

        def run(self, x):
            self.calls += 1
            return self.centre(self.linear(x)).tanh()

        def forward(self, x):
            return self.run(x)

    return Base


def assert_replicas_equal_the_whole_batch(whole, net, count_calls=True):
    """Compare output and gradients, and see that the model's own buffer counts one call."""
    x = torch.randn(7, 3, dtype=torch.float64)
    weights = torch.randn(7, 3, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    model = DataParallelWithCallback(net, ["cpu"] * 3, timeout=60)
    actual, expected = model(ours), whole(theirs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    for one, other in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)
    if count_calls:
        assert net.calls.item() == whole.calls.item() == 1
    torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)  # and once more


def through(prepare, forward=lambda self, x: self.way(x)):
    """Return what makes a class of which `way`, set by `prepare`, is called by `forward`."""
    return {"prepare": prepare, "forward": forward}


def set_way(value):
    def prepare(self):
        object.__setattr__(self, "way", value(self))

    return prepare


def in_turn(self, x):
    self.calls += 1
    for module in self.modules_in_turn():
        x = module(x)
    return x.tanh()


def stored(make):
    """Return a class body whose modules in turn come out of what `make` has stored as an attribute."""

    def prepare(self):
        object.__setattr__(self, "kept", make(self))

    return {"prepare": prepare, "forward": in_turn}


def closure_in_closure(self):
    inner = lambda x: self.run(x)  # noqa: E731
    return lambda x: inner(x)


def recursive_function(self):
    def down(x, depth=2):
        return self.run(x) if depth == 0 else down(x, depth - 1)

    return down


def module_in_default(self):
    def call(x, centre=self.centre, *, linear=self.linear):
        self.calls += 1
        return centre(linear(x)).tanh()

    return call


def unregistered_sequential(self):
    hidden = nn.Sequential(self.linear, self.centre, nn.Tanh())

    def call(x):
        self.calls += 1
        return hidden(x)

    return call


CALLED = {
    "bound method": lambda self: self.run,
    "bound method of a module": lambda self: types.MethodType(
        lambda centre, x: (self.calls.add_(1), centre(self.linear(x)).tanh())[1], self.centre
    ),
    "lambda": lambda self: lambda x: self.run(x),
    "closure over a bound method": lambda self: (lambda run: lambda x: run(x))(self.run),
    "closure in a closure": closure_in_closure,
    "recursive function": recursive_function,
    "default arguments": module_in_default,
    "partial of a bound method": lambda self: functools.partial(self.run),
    "partial with a module": lambda self: functools.partial(lambda net, x: net.run(x), self),
    "partial by keyword": lambda self: functools.partial(lambda x, net: net.run(x), net=self),
    "functools.wraps": lambda self: functools.wraps(self.run)(lambda *args: self.run(*args)),
    "no_grad decorator, entered and left": lambda self: torch.enable_grad()(self.run),
    "unregistered Sequential": unregistered_sequential,
}


@pytest.mark.parametrize("way", CALLED)
def test_what_is_called_through_an_attribute_is_the_replicas(base, way):
    kind = type("Net", (base,), through(set_way(CALLED[way])))
    assert_replicas_equal_the_whole_batch(kind(), kind())


STORED = {
    "list": (lambda self: [self.linear, self.centre], lambda kept: kept),
    "tuple": (lambda self: (self.linear, self.centre), lambda kept: kept),
    "dict": (lambda self: {"b": self.linear, "a": self.centre}, lambda kept: kept.values()),
    "keys of a dict": (lambda self: {self.linear: 1, self.centre: 2}, lambda kept: kept),
    "ordered dict": (lambda self: OrderedDict(a=self.linear, b=self.centre), lambda kept: kept.values()),
    "defaultdict": (lambda self: defaultdict(list, a=[self.linear, self.centre]), lambda kept: kept["a"]),
    "list of pairs": (
        lambda self: [(self.linear, "linear"), (self.centre, "b")],
        lambda kept: [m for m, _ in kept],
    ),
    "named tuple": (
        lambda self: (Stage(self.linear, "linear"), Stage(self.centre, "centre")),
        lambda kept: [stage.module for stage in kept],
    ),
    "deque": (lambda self: deque([None, self.linear, self.centre], maxlen=2), lambda kept: kept),
    "sets": (
        lambda self: [{self.linear}, frozenset({self.centre})],
        lambda kept: [m for one in kept for m in one],
    ),
    "nested": (
        lambda self: {"stages": [({"linear": [self.linear]},), [deque([self.centre])]]},
        lambda kept: [kept["stages"][0][0]["linear"][0], kept["stages"][1][0][0]],
    ),
    "weak references": (
        lambda self: [weakref.ref(self.linear), weakref.ref(self.centre)],
        lambda kept: [reference() for reference in kept],
    ),
    "bound methods in a list": (lambda self: [self.linear.forward, self.centre.forward], lambda kept: kept),
}


@pytest.mark.parametrize("container", STORED)
def test_what_is_kept_in_a_container_is_the_replicas(base, container):
    make, unpack = STORED[container]
    body = {**stored(make), "modules_in_turn": lambda self: unpack(self.kept)}
    kind = type("Net", (base,), body)
    assert_replicas_equal_the_whole_batch(kind(), kind())


def test_a_container_keeps_its_type_and_its_settings():
    module = nn.Sequential(nn.Linear(2, 2))
    module.kept = [deque([module[0]], maxlen=3), defaultdict(set, a=module[0]), Counter({module[0]: 2})]
    queue, table, counter = replicate(module, ["cpu", "cpu"])[1].kept
    assert (type(queue), queue.maxlen) == (deque, 3)
    assert (type(table), table.default_factory) == (defaultdict, set)
    assert (type(counter), list(counter.values())) == (Counter, [2])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: lambda *args: inner(*args),
        lambda inner: functools.wraps(inner)(lambda *args: inner(*args)),
        lambda inner: torch.enable_grad()(inner),
        lambda inner: functools.partial(inner),
    ],
    ids=["lambda", "functools.wraps", "decorator of torch", "partial"],
)
@pytest.mark.parametrize("times", [1, 3])
def test_a_forward_that_is_wrapped_on_the_object_runs_the_replica(base, wrap, times):
    nets = base(), base()
    for net in nets:
        for _ in range(times):
            net.forward = wrap(net.forward)
    assert_replicas_equal_the_whole_batch(*nets)


@pytest.mark.parametrize("kind", ["bound method", "closure"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_call_a_sub_module_call_that_of_the_replica(base, kind, register):
    class Net(base):
        def hook(self, module, args, *output):
            y = self.centre(output[0] if output else args[0]).sin()
            return y if output else (y,)

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    nets = Net(), Net()
    for net in nets:
        hook = net.hook if kind == "bound method" else (lambda *args, own=net: own.hook(*args))
        getattr(net.linear, register)(hook)
    assert_replicas_equal_the_whole_batch(*nets)


def test_a_gradient_hook_that_is_a_bound_method_is_that_of_the_replica():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.linear.register_full_backward_hook(self.note)
            self.noted = "nobody"

        def note(self, *args):
            self.noted = "me"

        def forward(self, x):
            return self.linear(x)

    net = Net()
    replicas = replicate(net, ["cpu", "cpu"])
    replicas[1](torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert [replicas[0].noted, replicas[1].noted, net.noted] == ["nobody", "me", "nobody"]


def test_an_attribute_that_changes_between_two_forwards_is_followed_again(base):
    class Net(base):
        def forward(self, x):
            return self.steps[-1](x)

    whole, net = Net(), Net()
    for one in (whole, net):
        one.steps = [one.linear]
    model, x = DataParallelWithCallback(net, ["cpu"] * 3), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)
    for one in (whole, net):
        one.steps.append(one.centre)  # the very list, and the same number of attributes
    torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)
    for one in (whole, net):
        one.steps[-1] = one.run
    torch.testing.assert_close(model(x), whole(x), rtol=0, atol=1e-13)


def test_what_is_shared_stays_shared_inside_a_replica():
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    shared = [net[0]]
    cell = types.SimpleNamespace(get=None, set=None)

    def make():
        current = net[0]

        def change(module):
            nonlocal current
            current = module

        return (lambda: current), change

    cell.get, cell.set = make()
    net.one, net[1].other, net.get, net.set = shared, shared, cell.get, cell.set
    first, second = replicate(net, ["cpu", "cpu"])
    assert first.one is first[1].other
    assert first.one is not second.one
    assert first.one == [first[0]]
    first.set(first[1])
    assert (first.get(), second.get(), net.get()) == (first[1], second[0], net[0])


def test_a_value_that_leads_to_no_module_stays_the_same_object():
    net = nn.Linear(2, 2)
    counts = []
    net.names, net.table, net.count = ["a"], {"b": (1, 2)}, lambda: counts.append(1)
    net.other = [nn.Linear(2, 2)]
    for replica in replicate(net, ["cpu", "cpu"]):
        assert replica.names is net.names
        assert replica.table is net.table
        assert replica.count is net.count
        assert replica.other is net.other


def test_a_counter_in_a_closure_beside_a_module_counts_for_all_replicas():
    def counting(module):
        calls = 0

        def call(x):
            nonlocal calls
            calls += 1
            return module(x)

        return call, lambda: calls

    net = nn.Sequential(nn.Tanh())
    net.call, total = counting(net[0])
    replicas = replicate(net, ["cpu", "cpu"])
    assert all(replica.call(torch.zeros(1)) == 0 for replica in replicas)
    assert total() == 2


def test_containers_that_hold_themselves_are_followed():
    net = nn.Sequential(nn.Tanh())
    net.loop = [net[0]]
    net.loop.append(net.loop)
    net.table = {"module": net[0]}
    net.table["self"] = (net.table,)
    net.again = lambda: (net.again, net[0])
    replica = replicate(net, ["cpu", "cpu"])[1]
    assert replica.loop[1] is replica.loop
    assert replica.loop[0] is replica[0]
    assert replica.table["self"][0]["module"] is replica[0]
    assert replica.again()[1] is replica[0]


def test_a_parent_that_is_kept_unregistered_is_the_replicas():
    net = nn.Sequential(nn.Tanh())
    net[0].__dict__["parent"] = net
    first, second = replicate(net, ["cpu", "cpu"])
    assert first[0].parent is first
    assert second[0].parent is second


def test_buffers_and_parameters_under_another_name_are_the_replicas():
    net = nn.BatchNorm1d(2)
    net.statistics = {"mean": net.running_mean, "weight": net.weight}
    first, second, away = replicate(net, ["cpu", "cpu", "meta"])
    assert first.statistics["mean"] is net.running_mean
    assert second.statistics["mean"] is second.running_mean
    assert second.statistics["mean"] is not net.running_mean
    assert second.statistics["weight"] is net.weight
    assert away.statistics["weight"].device.type == "meta"


def test_a_rebuilt_function_looks_like_its_original():
    net = nn.Sequential(nn.Tanh())

    def call(x: int, *, y: int = 3) -> int:
        """Say something."""
        return net[0], x, y

    call.note = "kept"
    net.call = call
    made = replicate(net, ["cpu"])[0].call
    assert made is not call
    assert (made.__name__, made.__qualname__, made.__doc__) == (
        call.__name__,
        call.__qualname__,
        call.__doc__,
    )
    assert (made.__module__, made.note, made(1)[1:]) == (call.__module__, "kept", (1, 3))


def test_a_compiled_function_in_an_attribute_runs_uncompiled_in_replicas():
    net = nn.Sequential(nn.Tanh())
    net.step = torch.compile(lambda x: net[0], backend="eager")
    replica = replicate(net, ["cpu"])[0]
    assert not hasattr(replica.step, "_torchdynamo_orig_callable")
    assert replica.step(None) is replica[0]


def test_values_that_cannot_be_followed_stay_the_original():
    """The layer itself can say so; see the class docstring of `replicate`."""
    net = nn.Sequential(nn.Tanh())
    net.kept = types.SimpleNamespace(module=net[0])
    net.wrapped = UserDict(a=net[0])
    replica = replicate(net, ["cpu", "cpu"])[1]
    assert replica.kept.module is net[0]
    assert replica.wrapped["a"] is net[0]


def test_replication_changes_no_attribute_of_the_module(base):
    kind = type("Net", (base,), stored(lambda self: {"a": [self.linear], "f": lambda x: self.run(x)}))
    net = kind()
    before, inside = dict(vars(net)), copy.copy(net.kept)
    replicate(net, ["cpu", "cpu"])
    assert vars(net) == before
    assert net.kept == inside
    assert net.kept["a"][0] is net.linear


def test_replicas_of_a_patched_data_parallel_run_their_own_copies_too(base, foreign):
    class AsTorch(foreign):
        def replicate(self, module, device_ids):
            replicas = []
            for _ in device_ids:
                copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
                for m, made in copies.items():
                    made._modules = {key: copies[child] for key, child in m._modules.items()}
                    made._parameters, made._buffers = dict(m._parameters), dict(m._buffers)
                replicas.append(copies[module])
            return replicas

    kind = type("Net", (base,), through(set_way(CALLED["closure in a closure"])))
    x = torch.randn(7, 3, dtype=torch.float64)
    actual = patch_replication_callback(AsTorch(kind(), 2))(x)
    torch.testing.assert_close(actual, kind()(x), rtol=0, atol=1e-13)
