"""self_test on weights sharded over two processes: sums are reduced, shares are compared."""

import pytest

WORKER = """
import os, sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from llmnorm import build_config, build_model, self_test
from llmnorm.errors import SelfTestError

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
shape |= {"num_attention_heads": 4}
model = build_model(build_config(shape, norm="derf", placement="deepnorm"), seed=1)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(p, DTensor) for p in model.parameters())
self_test(model, fresh=True)
said = []
mlp, norm = model.model.layers[1].mlp, model.model.layers[1].mlp_residual.out
for parameter, factor in ((mlp.up_proj.weight, 1.3), (norm.weight, 0.9), (norm.alpha, 0.5)):
    with torch.no_grad():
        parameter.mul_(factor)
    try:
        self_test(model, fresh=True)
        said.append("nothing")
    except SelfTestError as error:
        said.append(str(error))
    with torch.no_grad():
        parameter.div_(factor)
ids = torch.arange(18).view(2, 9)
for placement, norm in (("parallel", "rmsnorm"), ("residual_dual", "rmsnorm"), ("bhyt", "bhyt")):
    model = build_model(build_config(shape, norm=norm, placement=placement), seed=1)
    wanted = model(ids, labels=ids).loss.item()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    self_test(model, fresh=True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.item() - wanted) < 1e-5, (placement, loss.item(), wanted)
    assert all(parameter.grad is not None for parameter in model.parameters()), placement
    said.append(placement)
print("SAID " + " | ".join(said), flush=True)
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.timeout(120)
def test_a_broken_promise_is_found_in_shards_and_kept_ones_are_not(tmp_path, run_ranks):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    outputs = run_ranks(script)
    matrix, gain, alpha, *schemes = outputs[0].rpartition("SAID ")[2].split(" | ")
    assert "layers.1.mlp.up_proj.weight starts with std" in matrix
    assert "layers.1.mlp_residual.out.weight starts at 0.9; the scheme promises 1" in gain
    assert "layers.1.mlp_residual.out.alpha starts at 0.5; the scheme promises 1" in alpha
    assert [scheme.strip() for scheme in schemes] == ["parallel", "residual_dual", "bhyt"]
