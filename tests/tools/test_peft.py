"""LoRA by PEFT: trained, merged, saved and loaded like any model."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from schemes import TOLERANCE
from torch import nn
from transformers import AutoModelForCausalLM

from llmnorm.errors import ConfigError
from llmnorm.training.finetuning import check_foreign_loop


def with_adapters(folder) -> PeftModel:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def trained(folder, ids) -> tuple[PeftModel, list[float]]:
    torch.manual_seed(0)
    model = with_adapters(folder)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval().requires_grad_(False), losses


def test_lora_lowers_the_loss_and_the_merged_folder_is_an_equal_plain_model(folder, ids, tmp_path):
    model, losses = trained(folder, ids)
    assert losses[-1] < losses[0] - 0.1
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapters")
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(base(ids).logits, expected, atol=1e-2)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=0, atol=0)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    torch.testing.assert_close(loaded(ids).logits, expected, **TOLERANCE[torch.float32])
    assert torch.equal(loaded(ids).logits, merged(ids).logits)


def test_adapters_sit_on_every_linear_layer_of_a_block_and_nowhere_else(folder):
    model = with_adapters(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    linear = {name for name, module in plain.named_modules() if type(module) is nn.Linear}
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapted == linear - {"lm_head"}
    assert len(adapted) == 2 * 7


@pytest.mark.parametrize("shape", [{}, {"weights": "weight_norm"}], ids=["plain", "weight_norm"])
def test_merging_is_exact_unless_the_matrix_is_rescaled_which_is_refused(make_folder, ids, shape):
    folder = make_folder(**shape)
    model, _ = trained(folder, ids)
    before = model(input_ids=ids).logits
    error = (model.merge_and_unload()(ids).logits - before).abs().max()
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    check_foreign_loop(fresh)
    if not shape:
        assert error < 1e-4
        check_foreign_loop(fresh, adapters=True)
    else:
        assert error > 1e-2
        with pytest.raises(ConfigError, match="rescales rows"):
            check_foreign_loop(fresh, adapters=True)
