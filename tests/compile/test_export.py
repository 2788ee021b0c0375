"""Other ways of making a graph of a model: torch.export, ONNX and torch.fx."""

import importlib.util
from collections import Counter

import pytest
import torch
from torch import nn

from syncbn_convert import convert_model, revert_model
from syncbn_core import SynchronizedBatchNorm2d


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    )


def operators(program):
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_export_is_that_of_torchs_own_layers(training, strict, dynamic):
    twin = net().train(training)
    model = convert_model(net()).train(training)
    x = torch.randn(4, 3, 5, 5)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    expected = torch.export.export(net().train(training), (x,), dynamic_shapes=shapes, strict=strict)
    assert operators(program) == operators(expected)
    whole = torch.randn(7, 3, 5, 5) if dynamic else x
    exported = program.module()
    torch.testing.assert_close(exported(whole), twin(whole))
    theirs = expected.module()
    theirs(whole)
    torch.testing.assert_close(dict(exported.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_clamp_is_exported(training, strict):
    layer = SynchronizedBatchNorm2d(3, eps_mode="clamp", eps=0.5).double().train(training)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0]).view(-1, 1, 1)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), layer(x))
    if training:
        torch.testing.assert_close(dict(exported.named_buffers()), dict(layer.named_buffers()))


def to_onnx(model, x, path):
    """Export a model; return the program as ONNX reads it back."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    import onnx

    mode = torch.onnx.TrainingMode.TRAINING if model.training else torch.onnx.TrainingMode.EVAL
    torch.onnx.export(model, (x,), dynamo=True, verbose=False, training=mode).save(path)
    written = onnx.load(path)
    onnx.checker.check_model(written)
    return written


@pytest.mark.filterwarnings("default")  # of the exporter itself
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_onnx_is_that_of_torchs_own_layers(training, tmp_path):
    x = torch.randn(4, 3, 5, 5)
    ours = to_onnx(convert_model(net()).train(training), x, tmp_path / "ours.onnx")
    theirs = to_onnx(net().train(training), x, tmp_path / "theirs.onnx")
    nodes = [[(node.op_type, str(node.attribute)) for node in each.graph.node] for each in (ours, theirs)]
    assert nodes[0] == nodes[1]
    assert nodes[0]


@pytest.mark.filterwarnings("default")  # of the exporter itself
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_onnx_of_clamp_computes_the_same(training, tmp_path):
    model = convert_model(net(), eps_mode="clamp").train(training)
    x = torch.randn(4, 3, 5, 5)
    written = to_onnx(model, x, tmp_path / "clamp.onnx")
    from onnx.reference import ReferenceEvaluator

    y, *_ = ReferenceEvaluator(written).run(None, {written.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


def test_symbolic_trace_is_an_error_that_says_what_to_do():
    model = convert_model(net())
    with pytest.raises(TypeError, match=r"Proxy of torch.fx.symbolic_trace.*revert_model.*is_leaf_module"):
        torch.fx.symbolic_trace(model)
    assert torch.fx.symbolic_trace(revert_model(model)) is not None


def test_a_tracer_that_takes_the_layers_as_leaves():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            leaf = isinstance(m, nn.modules.batchnorm._NormBase)
            return leaf or super().is_leaf_module(m, module_qualified_name)

    model = convert_model(net())
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(traced(x), net()(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_script_is_an_error_and_takes_what_revert_returns():
    model = convert_model(net())
    with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
        torch.jit.script(model)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(torch.jit.script(revert_model(model))(x), net()(x))


def test_a_program_exported_in_training_trains():
    model, twin = convert_model(net()).double(), net().double()
    x, w = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    w = w[:, :2, :3, :3]
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    for size in (4, 3):
        for called in (program, twin):
            called.zero_grad()
            (called(x[:size]) * w[:size]).sum().backward()
        ours, theirs = ({n: p.grad for n, p in each.named_parameters()} for each in (program, twin))
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(dict(program.named_buffers()), dict(twin.named_buffers()))


def test_something_else_than_a_tensor_is_an_error():
    with pytest.raises(TypeError, match="expected a tensor at 'SynchronizedBatchNorm2d', got list"):
        SynchronizedBatchNorm2d(3)([1.0])
