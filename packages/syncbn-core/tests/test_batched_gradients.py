"""Many gradients at once (``is_grads_batched=True``, ``jacobian(vectorize=True)``) equal single ones."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("graph_kind")

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composite"])
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.mark.pairwise
@FUSED
@LAYOUTS
@pytest.mark.parametrize("used", [[0, 1, 2], [1], [0, 2]], ids=str)
def test_batched_gradients_are_those_one_by_one(
    used, layout, fused, layer_of, chunks_of, leaves_of, run_replicas
):
    layer, inputs = layer_of(fused=fused), leaves_of(chunks_of(2, 1, 3, layout=layout))
    wanted = [*inputs, *layer.parameters()]
    outputs = [run_replicas(layer, inputs)[rank] for rank in used]
    dys = [torch.randn(5, *y.shape, dtype=torch.float64) for y in outputs]
    one_by_one = [
        torch.autograd.grad(outputs, wanted, [dy[i] for dy in dys], retain_graph=True) for i in range(5)
    ]
    batched = torch.autograd.grad(outputs, wanted, dys, is_grads_batched=True)
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*one_by_one))), **EXACT)


@FUSED
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps_mode": "clamp"}], ids=str)
def test_a_vectorized_jacobian_is_that_of_the_whole_batch(
    options, fused, layer_of, chunks_of, run_replicas, stock_twin
):
    layer = layer_of(fused=fused, eps=1e-14, **options)  # with such a small eps, clamp equals plus
    twin = stock_twin(layer, 4)
    chunks = chunks_of(1, 2, spatial=(2, 1))

    def replicas(x):
        return torch.cat(run_replicas(layer, x.split([1, 2])))

    x = torch.cat(chunks)
    ours = torch.autograd.functional.jacobian(replicas, x, vectorize=True)
    torch.testing.assert_close(ours, torch.autograd.functional.jacobian(twin, x), rtol=1e-9, atol=1e-9)
