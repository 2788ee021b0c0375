"""Tools that work on batch norm layers, with converted ones: they work, or an error says what to do first."""

import copy
from collections.abc import Callable
from importlib.metadata import version

import onnxruntime
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from syncbn_convert import convert_model, revert_model
from syncbn_core import SynchronizedBatchNorm2d
from syncbn_parallel import DataParallelWithCallback

# Of torch's own exporter, and of Lightning, by what they ask torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Row = Callable[[str, str], None]


@pytest.fixture
def row(tables) -> Row:
    return lambda tool, result: tables.add("tools", tool, result)


@pytest.fixture
def original(residual_net) -> nn.Module:
    """A net whose running statistics are not the initial ones."""
    net = residual_net()
    net(torch.randn(16, 3, 8, 8, dtype=torch.float64))
    return net


@pytest.fixture
def converted(original) -> nn.Module:
    return convert_model(original, inplace=False)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, 8, 8, dtype=torch.float64)


def on_replicas(model: nn.Module) -> DataParallelWithCallback:
    return DataParallelWithCallback(model, ["cpu"] * 4)


def test_fuse_conv_bn_eval_fuses_a_converted_layer(row):
    conv, norm = nn.Conv2d(3, 8, 3).eval(), SynchronizedBatchNorm2d(8)
    norm(torch.randn(16, 8, 5, 5))
    norm.eval()
    x = torch.randn(4, 3, 6, 6)

    fused = torch.nn.utils.fuse_conv_bn_eval(conv, norm)

    torch.testing.assert_close(fused(x), norm(conv(x)))
    row("`torch.nn.utils.fuse_conv_bn_eval`", "works")


def test_export_in_eval_mode_gives_the_same_program_as_the_original(row, original, converted, x):
    exported, expected = (torch.export.export(model.eval(), (x,)) for model in (converted, original))

    assert [node.target for node in exported.graph.nodes] == [node.target for node in expected.graph.nodes]
    assert torch.equal(exported.module()(x), original(x))
    row("`torch.export` in eval mode", "works: the original's own graph")


def test_onnx_export_in_eval_mode_computes_what_the_model_does(row, converted, x, tmp_path):
    model, x = converted.float().eval(), x.float()
    path = str(tmp_path / "model.onnx")

    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)

    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)
    row(f"ONNX export in eval mode, run by onnxruntime {version('onnxruntime')}", "works")


def test_update_bn_through_replicas_gives_the_statistics_of_the_whole_batches(row, original, converted):
    batches = [torch.randn(7, 3, 8, 8, dtype=torch.float64) for _ in range(3)]

    update_bn(batches, original)
    update_bn(batches, on_replicas(converted))

    for ours, expected in zip(converted.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    row("`torch.optim.swa_utils.update_bn`", "works on replicas: the statistics of whole batches")


def test_an_averaged_model_of_converted_layers_averages_and_runs_on_replicas(row, original, converted, x):
    averages = []
    for model in (original, converted):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        average.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        average.update_parameters(model)
        averages.append(average)

    expected, ours = averages[0](x), on_replicas(averages[1])(x)

    torch.testing.assert_close(ours, expected, **EXACT)
    row("`torch.optim.swa_utils.AveragedModel`", "works")


def test_a_deep_copy_made_during_training_is_a_model_of_its_own(row, original, converted, x, train_step):
    replicas = on_replicas(converted)
    replicas(x)
    average = copy.deepcopy(replicas)
    before = {key: value.clone() for key, value in replicas.state_dict().items()}

    average(x).sum().backward()

    assert all(torch.equal(value, before[key]) for key, value in replicas.state_dict().items())
    assert all(parameter.grad is None for parameter in replicas.parameters())
    original(x)
    torch.testing.assert_close(train_step(average, x)["y"], train_step(original, x)["y"], **EXACT)
    row("a moving average by `copy.deepcopy`", "works, also for the wrapper and after a parallel forward")


def test_functional_call_reaches_the_replicas_inside_of_another_module(
    row, original, converted, x, weighted_sum
):
    def gradients(model: nn.Module) -> list[Tensor]:
        given = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        weighted_sum(torch.func.functional_call(model, given, (x,))).backward()
        return [parameter.grad for parameter in given.values()]

    with pytest.raises(RuntimeError, match=r"can't be used with nn\.DataParallel"):
        gradients(on_replicas(converted))

    ours, expected = gradients(nn.Sequential(on_replicas(converted))), gradients(original)

    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)
    assert all(parameter.grad is None for parameter in converted.parameters())
    row(
        "`torch.func.functional_call`",
        "works, but not with an `nn.DataParallel` of any kind as the outermost module: "
        "use `nn.Sequential(replicas)`",
    )


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore:.*torch.jit.*:FutureWarning",
)
def test_tracing_for_torchscript_records_the_originals_evaluation(row, original, converted, x):
    traced = torch.jit.trace(converted.eval(), x)

    assert torch.equal(traced(x), original.eval()(x))
    row("`torch.jit.trace` in eval mode", "works; warns about the checks of the input shape")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_scripting_works_after_a_revert(row, original, converted, x):
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(converted)

    scripted = torch.jit.script(revert_model(converted).eval())

    assert torch.equal(scripted(x), original.eval()(x))
    row("`torch.jit.script`", "does not support these layers: call `revert_model` first")


def test_symbolic_tracing_works_before_the_conversion(row, original, converted, x):
    with pytest.raises(TypeError, match="revert_model"):
        torch.fx.symbolic_trace(converted)

    model = convert_model(torch.fx.symbolic_trace(original))

    assert sum(isinstance(layer, SynchronizedBatchNorm2d) for layer in model.modules()) == 5
    expected = copy.deepcopy(original)(x)
    torch.testing.assert_close(on_replicas(model)(x), expected, **EXACT)
    row("`torch.fx.symbolic_trace`", "an error that says what to do: trace first, then `convert_model`")


class Classifier(pytorch_lightning.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, labels = batch
        return F.cross_entropy(self.net(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")  # advice: the number of workers
def test_a_lightning_module_trains_replicas_as_it_trains_the_whole_batch(row, original, converted):
    data = TensorDataset(torch.randn(24, 3, 8, 8, dtype=torch.float64), torch.randint(5, (24,)))
    for net in (original, on_replicas(converted)):
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(net), DataLoader(data, batch_size=8))

    for ours, expected in zip(converted.state_dict().values(), original.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    row(
        f"a LightningModule of pytorch-lightning {version('pytorch-lightning')} "
        "with a `DataParallelWithCallback` inside",
        "works: the weights of the whole batch",
    )
