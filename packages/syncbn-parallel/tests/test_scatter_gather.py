"""How a call is split over replicas and its outputs are joined."""

from collections import OrderedDict, defaultdict, namedtuple
from typing import NamedTuple

import pytest
import torch

from syncbn_parallel._gather import gather
from syncbn_parallel._scatter import scatter_kwargs

CPU = torch.device("cpu")
META = torch.device("meta")
Point = namedtuple("Point", "x y")


class Boxes(NamedTuple):
    corners: torch.Tensor
    label: str


class Config(OrderedDict):
    """A dict subclass, as libraries return for outputs."""


class Vague:
    """Compares as an array does: to something that is neither true nor false."""

    def __eq__(self, other):
        raise ValueError("ambiguous")

    __hash__ = None


@pytest.mark.parametrize(("size", "devices"), [(8, 4), (5, 4), (1, 4), (3, 8), (7, 2), (9, 4), (4, 1)])
def test_chunks_are_those_of_chunk(size, devices):
    x = torch.arange(size * 2.0).view(size, 2)
    inputs, kwargs = scatter_kwargs((x,), None, [CPU] * devices)
    expected = x.chunk(devices)
    assert len(inputs) == len(kwargs) == len(expected)
    assert all(torch.equal(own, chunk) for (own,), chunk in zip(inputs, expected, strict=True))


def test_every_container_is_split_and_keeps_its_type():
    x = torch.arange(4.0)
    value = (
        [x, (x, "text")],
        Point(x, 1),
        Boxes(x, "cat"),
        {"a": x, "b": [None]},
        Config(c=x),
        defaultdict(list, d=x),
        (),
        [],
        {},
    )
    (first, second), _ = scatter_kwargs((value,), {}, [CPU, CPU])
    for (part,), half in ((first, x[:2]), (second, x[2:])):
        nested, point, boxes, plain, config, default, *empty = part
        assert type(nested) is list
        assert torch.equal(nested[0], half)
        assert type(nested[1]) is tuple
        assert nested[1][1] == "text"
        assert torch.equal(nested[1][0], half)
        assert type(point) is Point
        assert torch.equal(point.x, half)
        assert point.y == 1
        assert type(boxes) is Boxes
        assert torch.equal(boxes.corners, half)
        assert boxes.label == "cat"
        assert torch.equal(plain["a"], half)
        assert plain["b"] == [None]
        assert type(config) is Config
        assert torch.equal(config["c"], half)
        assert type(default) is defaultdict
        assert default.default_factory is list
        assert torch.equal(default["d"], half)
        assert empty == [(), [], {}]


def test_other_arguments_go_to_every_replica_as_they_are():
    thing = object()
    inputs, kwargs = scatter_kwargs((torch.ones(2), thing), {"mode": thing}, [CPU, CPU])
    assert all(own[1] is thing for own in inputs)
    assert all(own["mode"] is thing for own in kwargs)


def test_keyword_arguments_alone_are_split_too():
    inputs, kwargs = scatter_kwargs((), {"x": torch.arange(4)}, [CPU, CPU])
    assert inputs == ((), ())
    assert [own["x"].tolist() for own in kwargs] == [[0, 1], [2, 3]]


def test_a_small_batch_with_other_arguments_beside_it_is_split_consistently():
    inputs, kwargs = scatter_kwargs((torch.arange(5),), {"mode": "fast"}, [CPU] * 4)
    assert [len(x) for (x,) in inputs] == [2, 2, 1]
    assert kwargs == ({"mode": "fast"},) * 3


def test_without_tensors_every_device_gets_the_arguments():
    assert scatter_kwargs((3,), {"a": "b"}, [CPU] * 2) == (((3,), (3,)), ({"a": "b"}, {"a": "b"}))


def test_without_arguments_there_are_no_calls():
    assert scatter_kwargs((), {}, [CPU, CPU]) == ((), ())


def test_an_empty_batch_is_one_chunk():
    inputs, _ = scatter_kwargs((torch.ones(0, 3), "x"), {}, [CPU] * 3)
    assert [(x.shape, rest) for x, rest in inputs] == [((0, 3), "x")]


def test_an_empty_tensor_goes_with_any_other():
    inputs, _ = scatter_kwargs((torch.ones(4, 2), torch.ones(0, 5)), {}, [CPU] * 2)
    assert [(len(x), tuple(boxes.shape)) for x, boxes in inputs] == [(2, (0, 5)), (2, (0, 5))]


def test_another_batch_dimension_is_split_along():
    ((first,), (second,)), _ = scatter_kwargs((torch.arange(6).view(2, 3),), {}, [CPU, CPU], dim=1)
    assert (first.tolist(), second.tolist()) == ([[0, 1], [3, 4]], [[2], [5]])


def test_chunks_move_to_their_devices_and_gradients_come_back():
    x = torch.ones(4, requires_grad=True)
    ((first,), (second,)), _ = scatter_kwargs((x,), {}, [CPU, CPU])
    (first * 2 + second * 3).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 3.0, 3.0]
    ((here,), (away,)), _ = scatter_kwargs((x,), {}, [CPU, META])
    assert (here.device, away.device) == (CPU, META)


def test_tensors_that_make_different_numbers_of_chunks_are_refused_by_their_place():
    with pytest.raises(ValueError, match=r"8 rows .* inputs\[0\], 1 rows .* kwargs\['anchors'\]\[0\]"):
        scatter_kwargs((torch.ones(8, 2),), {"anchors": [torch.ones(1, 2)]}, [CPU, CPU])


@pytest.mark.parametrize(("size", "devices"), [(16, 4), (10, 2), (7, 4), (3, 3)])
def test_tensors_of_a_multiple_of_the_size_are_split_side_by_side(size, devices):
    x, y = torch.arange(size), torch.arange(size).repeat_interleave(3)
    calls, _ = scatter_kwargs((x, y), {}, [CPU] * devices)
    assert all(torch.equal(own_x.repeat_interleave(3), own_y) for own_x, own_y in calls)


@pytest.mark.parametrize(
    ("sizes", "devices"), [((8, 7), 4), ((8, 7), 2), ((8, 6), 2), ((6, 8), 2), ((5, 10), 4)]
)
def test_tensors_of_different_sizes_that_do_not_go_side_by_side_are_refused(sizes, devices):
    with pytest.raises(ValueError, match=rf"{sizes[0]} rows .* inputs\[0\], {sizes[1]} rows .* inputs\[1\]"):
        scatter_kwargs(tuple(map(torch.ones, sizes)), {}, [CPU] * devices)


@pytest.mark.parametrize(("x", "dim"), [(torch.tensor(1.0), 0), (torch.ones(4), 1), (torch.ones(4), -2)])
def test_a_tensor_without_the_batch_dimension_is_refused_by_its_place(x, dim):
    with pytest.raises(ValueError, match=rf"batch dimension {dim}, got .* in inputs\[0\]\['x'\]"):
        scatter_kwargs(({"x": x},), {}, [CPU, CPU], dim)


def test_outputs_are_joined_in_rank_order_through_every_container():
    parts = [
        (
            [torch.full((2, 1), float(i)), {"a": torch.full((1,), i)}],
            Boxes(torch.tensor([i]), "cat"),
            Config(c=torch.tensor([i])),
            defaultdict(list, d=torch.tensor([i])),
            None,
            "same",
            3,
        )
        for i in range(2)
    ]
    nested, boxes, config, default, nothing, text, number = gather(parts, CPU)
    assert nested[0].tolist() == [[0.0], [0.0], [1.0], [1.0]]
    assert nested[1]["a"].tolist() == [0, 1]
    assert type(boxes) is Boxes
    assert boxes.corners.tolist() == [0, 1]
    assert type(config) is Config
    assert config["c"].tolist() == [0, 1]
    assert (type(default), default.default_factory) == (defaultdict, list)
    assert default["d"].tolist() == [0, 1]
    assert (nothing, text, number) == (None, "same", 3)


def test_scalars_become_a_vector_with_their_gradients():
    losses = [torch.tensor(float(i), requires_grad=True) for i in range(3)]
    joined = gather(losses, CPU, dim=1)
    assert joined.tolist() == [0.0, 1.0, 2.0]
    (joined * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert [loss.grad.item() for loss in losses] == [1.0, 10.0, 100.0]


def test_tensors_are_joined_along_the_batch_dimension():
    assert gather([torch.ones(2, 1), torch.ones(2, 3)], CPU, dim=1).shape == (2, 4)


def test_a_parameter_and_its_copy_are_both_tensors():
    parts = [torch.nn.Parameter(torch.ones(1)), torch.ones(1)]
    assert gather(parts, CPU).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[1, "a"], [1, "b"]], r"value .* got \['a', 'b'\] in the output\[1\]"),
        ([{"loss": 0.5}, {"loss": 0.25}], r"value .* in the output\['loss'\]; return a tensor"),
        ([Vague(), Vague()], "the output of type Vague"),
        ([None, torch.ones(1)], "type"),
        ([1, 1.0], "type"),
        ([[1], [1, 2]], r"length .* got \[1, 2\] in the output"),
        ([{"a": 1}, {"b": 1}], "keys"),
        ([torch.tensor(1.0), torch.ones(1)], "scalar"),
    ],
)
def test_outputs_that_do_not_go_together_are_refused_by_their_place(parts, message):
    with pytest.raises(ValueError, match=message):
        gather(parts, CPU)
