"""torch's compiler: left out of the wrapper, with a reason, and not loaded where nothing is compiled."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from syncbn_parallel import DataParallelWithCallback
from syncbn_parallel._compiler import REASON

SECONDS = 120

pytestmark = pytest.mark.filterwarnings("default")  # of torch's own compiler


def run(program):
    """Run a program in a fresh process, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_forward_and_backward_do_not_load_the_compiler():
    run("""
import sys, torch
from torch import nn
from syncbn_parallel import DataParallelWithCallback
model = DataParallelWithCallback(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), ["cpu"] * 2)
x = torch.ones(4, 4, requires_grad=True)
for _ in range(2):
    model(x * 2).sum().backward()
with torch.no_grad(), torch.autocast("cpu"):
    model(x)
assert "torch._dynamo" not in sys.modules
""")


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="torch.compiler.disable has no reason"
)
def test_a_graph_breaks_once_at_the_wrapper_and_the_break_says_why(centred_net):
    model = DataParallelWithCallback(centred_net(), ["cpu"] * 2)

    def step(x):
        return model(x.tanh()).tanh()

    report = torch._dynamo.explain(step)(torch.randn(6, 4).double())
    assert (report.graph_count, report.graph_break_count) == (2, 1)
    assert REASON in report.break_reasons[0].reason


@pytest.mark.usefixtures("_fresh_compiler")
def test_results_around_the_wrapper_are_those_without_a_compiler(centred_net):
    model = DataParallelWithCallback(centred_net(), ["cpu"] * 2)
    x = torch.randn(6, 4).double()
    compiled = torch.compile(nn.Sequential(nn.Tanh(), model), backend="eager")
    assert torch.equal(compiled(x), model(x.tanh()))
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_module_inside_runs_uncompiled_in_replicas(centred_net):
    x = torch.randn(6, 4).double()
    expected = centred_net()(x)
    net = centred_net()
    net.compile(backend="eager")
    for module in (net, torch.compile(centred_net(), backend="eager")):
        torch.testing.assert_close(
            DataParallelWithCallback(module, ["cpu"] * 2)(x), expected, rtol=0, atol=1e-13
        )
