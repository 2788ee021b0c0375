"""Models are saved, copied and cast as any other, also after a parallel forward."""

import copy
import io
import pickle

import pytest
import torch

from syncbn_convert import convert_model
from syncbn_parallel import DataParallelWithCallback

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def x():
    return torch.randn(6, 3, 6, 6, dtype=torch.float64)


@pytest.fixture
def used(residual_net, train_step, x):
    """Replicas after a training step."""
    replicas = DataParallelWithCallback(convert_model(residual_net()), ["cpu"] * 3)
    train_step(replicas, x)
    return replicas


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("wrapper_too", [True, False])
def test_a_copy_trains_on_its_own_as_the_original_does(
    duplicate, wrapper_too, used, train_step, assert_close, x
):
    twin = duplicate(used) if wrapper_too else DataParallelWithCallback(duplicate(used.module), ["cpu"] * 3)
    before = copy.deepcopy(used.state_dict())
    step = train_step(twin, x)
    torch.testing.assert_close(used.state_dict(), before, rtol=0, atol=0)
    assert_close(train_step(used, x), step, rtol=0, atol=0)


def test_state_moves_both_ways_between_converted_and_stock_models(used, residual_net, x):
    stock = residual_net()
    file = io.BytesIO()
    torch.save(used.module.state_dict(), file)
    file.seek(0)
    assert list(stock.state_dict()) == list(used.module.state_dict())
    stock.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(stock.eval()(x), used.eval()(x), **EXACT)

    fresh = convert_model(residual_net())
    fresh.load_state_dict(stock.state_dict())
    torch.testing.assert_close(fresh.state_dict(), used.module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_used_model_can_be_cast_and_trained_on(dtype, used, residual_net, train_step, x):
    cast = train_step(used.to(dtype), x.to(dtype))
    assert {tensor.dtype for name, tensor in cast.items() if "num_batches" not in name} == {dtype}
    whole = residual_net()
    train_step(whole, x)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    expected = train_step(whole.to(dtype), x.to(dtype))["y"]
    torch.testing.assert_close(cast["y"], expected, rtol=tolerance, atol=tolerance)


def test_nothing_of_a_forward_stays_on_the_model(residual_net, train_step, x):
    replicas = DataParallelWithCallback(convert_model(residual_net()), ["cpu"] * 3)
    before = {name: set(vars(module)) for name, module in replicas.named_modules()}
    train_step(replicas, x)
    assert {name: set(vars(module)) for name, module in replicas.named_modules()} == before
