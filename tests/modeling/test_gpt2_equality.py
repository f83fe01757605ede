"""Learned positions, LayerNorm and a plain mlp are GPT-2: equal logits, gradients, generations."""

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from llmnorm import build_config, build_model

VOCAB, WIDTH, DEPTH, HEADS, POSITIONS = 97, 32, 3, 4, 24
MODULES = {
    "attn_residual.pre": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "mlp_residual.pre": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under our names; its Conv1D stores (in, out), q, k and v side by side."""
    ours = {
        "model.embed_tokens.weight": theirs["transformer.wte.weight"],
        "model.embed_positions.weight": theirs["transformer.wpe.weight"],
        "lm_head.weight": theirs["transformer.wte.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"model.norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(DEPTH):
            layer, block = f"model.layers.{i}", f"transformer.h.{i}"
            fused = theirs[f"{block}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            for name, part in zip("qkv", fused, strict=True):
                ours[f"{layer}.self_attn.{name}_proj.{kind}"] = part.mT if part.ndim > 1 else part
            for name, module in MODULES.items():
                held = theirs[f"{block}.{module}.{kind}"]
                ours[f"{layer}.{name}.{kind}"] = held.mT if held.ndim > 1 else held
    return ours


def pair():
    shape = {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "n_positions": POSITIONS}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape)).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():  # away from the init, where biases are 0 and gains 1
        for parameter in gpt2.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    config = build_config(
        {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 4 * WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
        position="learned",
        norm={"op": "layernorm", "eps": 1e-5},
        mlp="plain",
        hidden_act="gelu_new",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    ours = build_model(config).double().eval()
    ours.load_state_dict(as_ours(gpt2.state_dict()), strict=True)
    return ours, gpt2


@pytest.mark.fast
def test_logits_loss_and_gradients_equal_gpt2s():
    ours, gpt2 = pair()
    ids = torch.randint(0, VOCAB, (3, POSITIONS))
    mine, theirs = (model(ids, labels=ids) for model in (ours, gpt2))
    torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-12, atol=1e-12)
    assert mine.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)  # theirs in float32
    for output in (mine, theirs):
        output.logits.square().mean().backward()
    gradients = as_ours({name: p.grad for name, p in gpt2.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.fast
def test_cached_generation_of_padded_prompts_equals_gpt2s():
    ids = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    mine, theirs = (model.generate(ids, max_new_tokens=12, **options) for model in pair())
    assert torch.equal(mine, theirs)
