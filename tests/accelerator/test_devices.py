"""Four devices that do not mix, with the numbers of the CPU."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("accelerator")


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().sum().backward()
    gradients = {f"d {name}": p.grad.cpu() for name, p in model.named_parameters()}
    return {**gradients, **{name: b.cpu() for name, b in model.named_buffers()}}


def test_a_net_trains_as_on_the_cpu() -> None:
    here = net()
    there = copy.deepcopy(here).to("sim:1")
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(step(there, x.to("sim:1")), step(here, x))


def test_a_copy_of_a_model_stays_on_its_device() -> None:
    twin = copy.deepcopy(net().to("sim:2"))
    assert {p.device for p in twin.parameters()} == {torch.device("sim:2")}


@pytest.mark.parametrize("operator", [torch.add, torch.mm, torch.cat])
def test_tensors_of_two_devices_do_not_mix(operator) -> None:
    left, right = torch.ones(3, 3, device="sim:0"), torch.ones(3, 3, device="sim:1")
    with pytest.raises(RuntimeError, match=r"(?i)on the same device.* sim:0 and sim:1"):
        operator([left, right]) if operator is torch.cat else operator(left, right)


def test_tensors_of_two_devices_do_not_mix_in_a_kernel() -> None:
    x, mean = torch.ones(2, 3, device="sim:0"), torch.ones(3, device="sim:1")
    with pytest.raises(RuntimeError, match=r"same device, got .* in batch_norm_elemt"):
        torch.batch_norm_elemt(x, None, None, mean, mean, 0.0)


@pytest.mark.parametrize("operator", [torch.add, torch.mm])
def test_a_tensor_of_the_cpu_does_not_mix_with_one_of_a_device(operator) -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="sim:0")
    for left, right in ((there, here), (here, there)):
        with pytest.raises(RuntimeError, match=r"(?i)on the same device.* (sim:0 and cpu|cpu and sim:0)"):
            operator(left, right)


def test_a_scalar_of_the_cpu_mixes_with_a_tensor_of_a_device() -> None:
    assert (torch.ones(3, device="sim:0") + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RuntimeError, match="expected one of 4 devices"):
        torch.ones(3, device="sim:4")


def test_the_current_device_is_each_threads_own(accelerator) -> None:
    assert torch.sim.device_count() == accelerator.DEVICES
    with torch.sim.device(2):
        assert torch.empty(1, device="sim").device == torch.device("sim:2")
    assert torch.sim.current_device() == 0


def test_a_seed_makes_random_numbers_repeatable() -> None:
    torch.manual_seed(3)
    first = torch.randn(5, device="sim:1")
    torch.manual_seed(3)
    torch.testing.assert_close(torch.randn(5, device="sim:1"), first)


def test_a_state_dict_is_saved_and_loaded() -> None:
    file = io.BytesIO()
    torch.save(net().to("sim:3").state_dict(), file)
    file.seek(0)
    assert torch.load(file)["0.weight"].device == torch.device("sim:3")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_recomputes_with_the_same_random_numbers(use_reentrant: bool) -> None:
    x = torch.randn(4, 100, device="sim:1", requires_grad=True)
    y = checkpoint(nn.Dropout(), x, use_reentrant=use_reentrant)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y.detach() != 0) * 2.0)
