"""Batches and outputs of every kind of container: split by samples, joined by samples, or refused."""

import dataclasses
import types
import warnings
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from syncbn_parallel import DataParallelWithCallback
from syncbn_parallel._gather import gather
from syncbn_parallel._scatter import scatter_kwargs

CPU = torch.device("cpu")


def split(value, devices=2):
    """Return each replica's part of one argument."""
    calls, _ = scatter_kwargs((value,), {}, [CPU] * devices)
    return [own for (own,) in calls]


@dataclass
class Batch:
    image: Any
    label: Any = None
    name: str = "a"
    rows: int = field(init=False, default=0)

    def __post_init__(self):
        self.rows = len(self.image)


@dataclass(frozen=True)
class Frozen:
    image: Any
    boxes: Any = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "boxes", self.image * 10)


@dataclass(slots=True)
class Slots:
    image: Any
    name: str = "a"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSlots:
    image: Any


class Encoding(UserDict):
    """As tokenizers return it, with an attribute beside its data."""

    def __init__(self, data=None, source="text"):
        super().__init__(data)
        self.source = source


class ReadOnly(Mapping):
    """A mapping that nobody can change."""

    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Output(OrderedDict):
    """A dict whose entries are attributes as well."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Named(NamedTuple):
    image: Any
    size: Any


X = torch.arange(8.0).view(4, 2)

CONTAINERS = {
    "dataclass": (lambda x: Batch(x, label=[x]), lambda b: (b.image, b.label[0])),
    "frozen dataclass": (lambda x: Frozen(x), lambda b: (b.image, b.boxes / 10)),
    "dataclass with slots": (lambda x: Slots(x), lambda b: (b.image,)),
    "frozen dataclass with slots": (lambda x: FrozenSlots(image=x), lambda b: (b.image,)),
    "UserDict": (lambda x: UserDict(a=x), lambda b: (b["a"],)),
    "subclass of UserDict": (lambda x: Encoding({"a": x}, "title"), lambda b: (b["a"],)),
    "read-only mapping": (lambda x: ReadOnly({"a": x}), lambda b: (b["a"],)),
    "mapping proxy": (lambda x: types.MappingProxyType({"a": x}), lambda b: (b["a"],)),
    "dict with attributes": (lambda x: Output(a=x), lambda b: (b["a"], b.a)),
    "deque": (lambda x: deque([x, x], maxlen=2), tuple),
    "named tuple": (lambda x: Named(x, [x]), lambda b: (b.image, b.size[0])),
    "result of torch.max": (lambda x: torch.max(x, dim=1), lambda b: (b.values.view(-1, 1).expand(-1, 2),)),
    "nested": (lambda x: {"b": [Batch(UserDict(a=(x,)))]}, lambda b: (b["b"][0].image["a"][0],)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_is_split_and_joined_and_keeps_its_type(kind):
    make, unpack = CONTAINERS[kind]
    whole = make(X)
    parts = split(whole)
    assert [type(part) for part in parts] == [type(whole)] * 2
    for part, rows in zip(parts, X.chunk(2), strict=True):
        for actual, expected in zip(unpack(part), unpack(make(rows)), strict=True):
            assert torch.equal(actual, expected)
    joined = gather(parts, CPU)
    assert type(joined) is type(whole)
    for actual, expected in zip(unpack(joined), unpack(whole), strict=True):
        assert torch.equal(actual, expected)
    assert all(torch.equal(actual, expected) for actual, expected in zip(unpack(whole), unpack(make(X))))


def test_the_other_contents_of_a_container_stay():
    for part in split(Batch(X, name="b")):
        assert (part.name, part.rows) == ("b", 4)
    assert [part.source for part in split(Encoding({"a": X}, "title"))] == ["title"] * 2
    assert [part.maxlen for part in split(deque([X], maxlen=3))] == [3, 3]


def test_attributes_of_a_dataclass_that_are_not_fields_are_split_too():
    batch = Batch(X)
    batch.mask = X > 3
    assert [len(part.mask) for part in split(batch)] == [2, 2]


def test_a_whole_model_takes_a_dataclass_and_returns_one():
    class Net(nn.Module):
        def forward(self, batch):
            return dataclasses.replace(batch, image=batch.image * 2)

    out = DataParallelWithCallback(Net(), ["cpu"] * 2)(Frozen(X))
    assert type(out) is Frozen
    assert torch.equal(out.image, X * 2)
    assert torch.equal(out.boxes, X * 20)


@pytest.mark.parametrize(("rows", "devices"), [(8, 4), (5, 4), (7, 3), (2, 4)])
@pytest.mark.parametrize("dtype", ["f4", "i8", "U3", "O"])
def test_arrays_are_split_as_tensors_are_and_stay_arrays(rows, devices, dtype):
    array = numpy.arange(rows * 2).reshape(rows, 2).astype(dtype)
    parts, tensors = split(array, devices), split(torch.zeros(rows, 2), devices)
    assert [part.shape for part in parts] == [tuple(tensor.shape) for tensor in tensors]
    assert all(type(part) is numpy.ndarray and part.dtype == array.dtype for part in parts)
    assert numpy.array_equal(gather(parts, CPU), array)


def test_arrays_are_split_along_the_batch_dimension():
    ((first,), (second,)), _ = scatter_kwargs((numpy.arange(6).reshape(2, 3),), {}, [CPU] * 2, dim=-1)
    assert (first.tolist(), second.tolist()) == ([[0, 1], [3, 4]], [[2], [5]])
    assert gather([first, second], CPU, 1).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_array_and_a_tensor_have_to_agree():
    assert [(len(a), len(t)) for a, t in split((numpy.ones(5), torch.ones(5)), 4)] == [(2, 2), (2, 2), (1, 1)]
    with pytest.raises(ValueError, match=r"4 rows .* inputs\[0\]\[0\], 3 rows .* inputs\[0\]\[1\]"):
        split((torch.ones(4), numpy.ones(3)))


class Plain:
    """An object of somebody's own."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize(
    "value",
    [
        "text",
        b"bytes",
        3,
        2.5,
        None,
        True,
        numpy.float32(1.5),
        numpy.array(3),
        Plain(size=3, names=["a"], table={"b": (1, 2)}),
        Plain(scale=torch.tensor(0.5)),
        len,
        Plain,
        torch.float32,
        torch.Size([2, 3]),
        nn.Linear(2, 2),
        range(3),
        types.SimpleNamespace(lr=0.1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_replica_gets_ordinary_objects_whole_and_without_a_warning(value):
    _, parts = split((torch.ones(4), value)), split([X, value])
    assert all(part[1] is value or part[1] == value for part in parts)


def test_an_ordinary_dataclass_is_the_same_object_in_every_replica():
    config = Slots(image=3)
    assert all(own is config for _, own in split((X, config)))


@pytest.mark.parametrize(
    "hidden",
    [
        lambda: X,
        lambda: [X],
        lambda: {"a": (X,)},
        lambda: numpy.ones(4),
        lambda: types.SimpleNamespace(x=X),
        lambda: {X},
        lambda: UserList([X]),
    ],
)
def test_an_object_that_holds_tensors_is_warned_of_once_per_type(hidden):
    kind = type("Graph", (Plain,), {})
    with pytest.warns(
        UserWarning, match=r"inputs\[0\]\[1\] of type .*Graph, which holds tensors: every replica"
    ):
        parts = split((X, kind(inside=hidden())))
    assert parts[0][1] is parts[1][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split((X, kind(inside=hidden())))


def test_an_object_with_slots_that_holds_tensors_is_warned_of():
    class Slotted:
        __slots__ = ("x",)

    thing = Slotted()
    thing.x = X
    with pytest.warns(UserWarning, match="which holds tensors"):
        split(thing)


class Stubborn(UserDict):
    """A mapping whose copy does not take what is put into it."""

    def __setitem__(self, key, value):
        super().__setitem__(key, self.data.get(key, value))


class Wanting(tuple):
    """A tuple that cannot be built from its entries."""

    def __new__(cls, items, more):
        return super().__new__(cls, items)


@pytest.mark.parametrize("value", [Stubborn(a=X), Wanting([X], 1)])
def test_a_container_that_cannot_be_rebuilt_is_refused_by_its_type(value):
    with pytest.raises(TypeError, match=rf"got a {type(value).__name__} in inputs\[0\].*use a dict, a list"):
        split(value)


def packed(lengths):
    return pack_padded_sequence(
        torch.ones(len(lengths), max(lengths), 5), torch.tensor(lengths), batch_first=True
    )


@pytest.mark.parametrize("lengths", [[4] * 6, [4, 4, 3, 3, 2, 1]])
def test_a_packed_sequence_is_refused_and_the_error_says_where_to_pack(lengths):
    with pytest.raises(TypeError, match=r"PackedSequence in inputs\[0\].*inside the forward"):
        DataParallelWithCallback(nn.LSTM(5, 4, batch_first=True), ["cpu"] * 2)(packed(lengths))
    with pytest.raises(TypeError, match="PackedSequence in the output"):
        gather([packed(lengths)] * 2, CPU)


def test_packing_inside_the_forward_gives_the_whole_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn = nn.LSTM(5, 4, batch_first=True).double()

        def forward(self, x, lengths):
            y = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
            return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]

    x, lengths = torch.randn(6, 4, 5).double(), torch.tensor([4, 1, 3, 3, 2, 1])
    actual = DataParallelWithCallback(Net(), ["cpu"] * 3)(x, lengths)
    torch.testing.assert_close(actual, Net()(x, lengths), rtol=0, atol=1e-13)


class Meta(torch.Tensor):
    """A tensor with a note, as image libraries have it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        sources = args[0] if args and isinstance(args[0], (list, tuple)) else args
        notes = [one.note for one in sources if isinstance(one, cls) and hasattr(one, "note")]
        for one in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(one, cls) and notes:
                one.note = notes[0]
        return result


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("batch", [6, 1])
def test_a_subclass_of_tensor_keeps_its_type_and_takes_changes_in_place(requires_grad, batch):
    seen = []

    class Net(nn.Module):
        def forward(self, x):
            seen.append((type(x), x.note))
            return torch.relu_(x) * 2

    x = torch.randn(batch, 3).requires_grad_(requires_grad)
    own = (x * 1).as_subclass(Meta)
    own.note = "scan"
    expected = x.detach().relu() * 2
    y = DataParallelWithCallback(Net(), ["cpu"] * 3)(own)
    assert type(y) is Meta
    assert y.note == "scan"
    assert set(seen) == {(Meta, "scan")}
    torch.testing.assert_close(y.detach().as_subclass(torch.Tensor), expected)
    if requires_grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, 2.0 * (x.detach() > 0))


def generator():
    yield 1


@pytest.mark.parametrize(
    ("make", "name"),
    [(generator, "generator"), (lambda: iter([1]), "list_iterator"), (lambda: Plain(x=X), "Plain")],
)
def test_an_output_that_cannot_be_joined_is_refused_by_its_type(make, name):
    class Net(nn.Module):
        def forward(self, x):
            return {"loss": x.sum(), "more": make()}

    with pytest.raises(ValueError, match=rf"the output\['more'\] of type {name}.*return tensors, or a tuple"):
        DataParallelWithCallback(Net(), ["cpu"] * 2)(X)


def test_dataclasses_of_outputs_have_to_agree():
    with pytest.raises(ValueError, match=r"type .* in the output\.label"):
        gather([Batch(X), Batch(X, label=X)], CPU)
    with pytest.raises(ValueError, match=r"value .* \['a', 'b'\] in the output\.name; return a tensor"):
        gather([Batch(X), Batch(X, name="b")], CPU)


UNSPLIT = {
    "sparse_coo": lambda: torch.eye(4).to_sparse(),
    "sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "mkldnn": lambda: torch.ones(4, 3).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors):UserWarning")
@pytest.mark.parametrize("kind", UNSPLIT)
def test_a_tensor_that_is_not_dense_is_refused_by_its_place_and_kind(kind):
    model = DataParallelWithCallback(nn.Identity(), ["cpu"] * 2)
    with pytest.raises(
        TypeError, match=rf"expected a dense tensor to split, got a .*{kind} one in inputs\[0\]\['x'\]"
    ):
        model({"x": UNSPLIT[kind]()})
