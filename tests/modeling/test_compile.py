"""Compiled blocks equal eager ones, and per-layer constants do not multiply the graphs."""

import pytest
import torch
from schemes import FULL, SHAPE, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from llmnorm import build_config, build_model

# Dynamo reads .grad of the tensors it traces and then meets torch's own warning about it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

IDS = tokens(2, 11)


def compiled_and_eager(norm, placement, backend, **shape):
    model = build_model(build_config(SHAPE | shape, norm=norm, placement=placement), seed=1)
    eager = model(IDS, labels=IDS, use_cache=False)
    eager.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    compiled = model(IDS, labels=IDS, use_cache=False)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_blocks_compile_to_at_most_two_graphs_a_wiring(norm, placement):
    counter = CompileCounterWithBackend("aot_eager")
    compiled_and_eager(norm, placement, counter)
    wirings = 2 if placement == "mix_ln" else 1
    assert 1 <= counter.frame_count <= 2 * wirings


@pytest.mark.parametrize("placement", ["lns", "deepnorm"])
def test_constants_of_24_layers_compile_to_two_graphs(placement):
    counter = CompileCounterWithBackend("aot_eager")
    compiled_and_eager("rmsnorm", placement, counter, num_hidden_layers=24)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "placement"), [("rmsnorm", "lns"), ("derf", "pre_ln")])
def test_inductor_equals_eager(norm, placement):
    compiled_and_eager(norm, placement, "inductor", num_hidden_layers=2)
