"""Conversion changes nothing but the synchronization, and reverting not even that, whatever the model.

Random trees of modules, with shared layers, modes, dtypes, devices, frozen parameters, attributes and hooks.
"""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from syncbn_convert import convert_model, inspect_model, revert_model
from syncbn_core import (
    SynchronizedBatchNorm,
    SynchronizedBatchNorm1d,
    SynchronizedBatchNorm2d,
    SynchronizedBatchNorm3d,
)

C = 3
CONVERSIONS = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    nn.BatchNorm3d: SynchronizedBatchNorm3d,
    nn.SyncBatchNorm: SynchronizedBatchNorm,
}
SHAPES = {nn.BatchNorm1d: (5, C), nn.BatchNorm2d: (5, C, 2, 3), nn.BatchNorm3d: (5, C, 2, 1, 2)}
# What is added to the __dict__ of a layer that was converted without options, and taken out again.
NOTES = {"layer_name", "_converted_from"}


class Odd(nn.BatchNorm2d):
    """Left alone."""


class Block(nn.Module):
    def __init__(self, children: list[nn.Module]) -> None:
        super().__init__()
        self.title = "a block"
        self.nothing = None
        for index, child in enumerate(children):
            self.add_module(f"part{index}", child)


OTHERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(C, C),
    lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 1)),
    lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(1, C),
    lambda: nn.GRU(C, C),
    lambda: nn.Dropout(),
    lambda: Odd(C),
]
CONTAINERS: list[Callable[[list[nn.Module]], nn.Module]] = [
    lambda children: nn.Sequential(*children),
    nn.ModuleList,
    lambda children: nn.ModuleDict({f"key{i}": child for i, child in enumerate(children)}),
    Block,
    lambda children: nn.DataParallel(nn.Sequential(*children)),
]

calls: list[str] = []  # by hooks, in order


def _noting(what: str) -> Callable[..., None]:
    def hook(*args: object, **kwargs: object) -> None:
        calls.append(what)

    return hook


HOOKS: list[Callable[[nn.Module], object]] = [
    lambda m: m.register_forward_pre_hook(_noting("pre")),
    lambda m: m.register_forward_pre_hook(_noting("pre, kwargs, first"), with_kwargs=True, prepend=True),
    lambda m: m.register_forward_hook(_noting("forward")),
    lambda m: m.register_forward_hook(_noting("forward, kwargs"), with_kwargs=True),
    lambda m: m.register_forward_hook(_noting("forward, first, always"), prepend=True, always_call=True),
    lambda m: m.register_full_backward_pre_hook(_noting("backward pre, first"), prepend=True),
    lambda m: m.register_full_backward_hook(_noting("backward")),
    lambda m: m.register_state_dict_pre_hook(_noting("state pre")),
    lambda m: m.register_load_state_dict_post_hook(_noting("load post")),
]
if hasattr(nn.Module, "register_state_dict_post_hook"):  # torch 2.5 and later
    HOOKS.append(lambda m: m.register_state_dict_post_hook(_noting("state post")))
    HOOKS.append(lambda m: m.register_load_state_dict_pre_hook(_noting("load pre")))


@st.composite
def batch_norms(draw: st.DrawFn) -> nn.Module:
    cls = draw(st.sampled_from(list(CONVERSIONS)))
    layer = cls(
        C,
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        momentum=draw(st.sampled_from([0.1, 0.5, None])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
        device=draw(st.sampled_from(["cpu", "cpu", "meta"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
    )
    for parameter in layer.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(draw(st.integers(0, 5)))
    if draw(st.booleans()):
        layer.mine = ["an attribute"]
    for add_hook in draw(st.lists(st.sampled_from(HOOKS), max_size=4)):
        add_hook(layer)
    return layer.train(draw(st.booleans()))


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    made: list[nn.Module] = []  # what a later place may share

    def make(depth: int) -> nn.Module:
        kinds = ["norm", "norm", "other", "again"] + ["container"] * depth
        kind = draw(st.sampled_from(kinds if made else ["norm"]))
        if kind == "again":
            return draw(st.sampled_from(made))
        if kind == "container":
            module = fill(depth)
        else:
            module = draw(batch_norms()) if kind == "norm" else draw(st.sampled_from(OTHERS))()
        made.append(module)
        return module

    def fill(depth: int) -> nn.Module:
        children = [make(depth - 1) for _ in range(draw(st.integers(1, 5)))]
        return draw(st.sampled_from(CONTAINERS))(children)

    return fill(3)


def convert(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Odd; other tests are about warnings
        return convert_model(model)


def without_notes(snapshot: list) -> list:
    """A snapshot without the classes, and without what is added to the layers and wrappers that convert."""
    extra = {*NOTES, "timeout", "dim", "output_device"}
    return [
        (name, module, [item for item in held if item[0] not in extra]) for name, module, _, held in snapshot
    ]


def behavior(model: nn.Module) -> list[object]:
    """State-dict keys, what each batch norm layer on the CPU computes alone, and which hooks it calls."""
    calls.clear()
    seen: list[object] = [list(model.state_dict())]
    for layer in model.modules():
        shape = next((SHAPES[cls] for cls in SHAPES if isinstance(layer, cls)), (5, C, 2))
        ours = type(layer) in {*CONVERSIONS, *CONVERSIONS.values()}
        if ours and all(tensor.device.type == "cpu" for tensor in [*layer.parameters(), *layer.buffers()]):
            dtype = next((t.dtype for t in layer.state_dict().values()), torch.float32)
            x = torch.linspace(-1, 2, math.prod(shape)).to(dtype).reshape(shape).requires_grad_()
            y = layer(x)
            (y * torch.arange(y.numel()).reshape(shape)).sum().backward()
            seen += [y, x.grad, *[p.grad for p in layer.parameters()], *[b.clone() for b in layer.buffers()]]
    return [*seen, *calls]


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def assert_same_behavior(one: nn.Module, other: nn.Module) -> None:
    expected, got = behavior(one), behavior(other)
    assert len(got) == len(expected)
    assert all(map(equal, got, expected))


@settings(deadline=None, max_examples=200)
@given(models())
def test_converting_changes_the_classes_and_nothing_else(snapshot, model):
    classes = {module: type(module) for module in model.modules()}
    before, original = snapshot(model), copy.deepcopy(model)

    assert convert(model) is model

    for module, cls in classes.items():
        if not isinstance(module, nn.DataParallel):
            assert type(module) is CONVERSIONS.get(cls, cls)
    assert without_notes(snapshot(model)) == without_notes(before)
    assert_same_behavior(original, model)


@settings(deadline=None, max_examples=200)
@given(models())
def test_a_reverted_model_is_the_original(snapshot, model):
    before, original = snapshot(model), copy.deepcopy(model)

    assert revert_model(convert(model)) is model

    assert snapshot(model) == before
    assert_same_behavior(original, model)


@settings(deadline=None, max_examples=100)
@given(models())
def test_a_converted_copy_leaves_the_original_and_behaves_alike(snapshot, model):
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = convert_model(model, inplace=False)

    assert snapshot(model) == before
    assert_same_behavior(model, converted)


@settings(deadline=None, max_examples=100)
@given(models())
def test_the_report_tells_exactly_what_conversion_does(model):
    promised = OrderedDict((row.name, row.outcome) for row in inspect_model(model).converted)

    classes = {name: type(module) for name, module in model.named_modules()}
    convert(model)
    done = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module) is not classes[name] and not isinstance(module, nn.DataParallel)
    }

    assert dict(promised) == done
