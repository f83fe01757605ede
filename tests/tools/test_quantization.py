"""int8 weights by torchao, on a CPU: what each scheme loses on a text it was trained on."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

pytest.importorskip("torchao", reason="torchao is in the extra `torchao`, which `dev` leaves out")

from torchao.quantization import Int8WeightOnlyConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:torchao")


def trained(folder, ids, to) -> float:
    """Fit the model to the text and save it; returns the loss."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(to)
    with torch.no_grad():
        return model.eval()(ids, labels=ids).loss.item()


@torch.no_grad()
def quantized_loss(folder, ids) -> tuple[float, int]:
    config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    held = [type(m.weight).__name__ for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return model(ids, labels=ids).loss.item(), sum("Int8" in name for name in held)


def test_int8_weights_move_the_loss_by_less_than_a_hundredth(folder, ids, tmp_path):
    with torch.enable_grad():
        loss = trained(folder, ids, tmp_path)
    after, matrices = quantized_loss(tmp_path, ids)
    assert matrices == 14  # those of the blocks
    assert after != loss
    assert abs(after - loss) < 0.01 * loss
