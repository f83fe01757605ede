"""Pre-LN with RMSNorm is Llama: equal logits, gradients and generated tokens on copied weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmnorm import build_config, build_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RENAMED = {
    "attn_residual.pre": "input_layernorm",
    "mlp_residual.pre": "post_attention_layernorm",
}


def as_llama(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def pair(**options):
    config = build_config(
        SHAPE,
        norm={"op": "rmsnorm", "cast": "input"},
        attention_bias=options.get("attention_bias", False),
        mlp_bias=options.get("mlp_bias", False),
        tie_word_embeddings=options.get("tie_word_embeddings", False),
    )
    ours = build_model(config, seed=3)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, **options))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    llama.load_state_dict({as_llama(k): v for k, v in ours.state_dict().items()}, strict=True)
    return ours, llama


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.fast
@pytest.mark.parametrize(
    "options",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    ids=["plain", "biases", "tied"],
)
def test_logits_loss_and_gradients_equal_llamas(options):
    ours, llama = pair(**options)
    ids = torch.randint(0, 97, (3, 17))
    outputs = [model(ids, labels=ids) for model in (ours, llama)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    theirs = dict(llama.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[as_llama(name)].grad, rtol=1e-5, atol=1e-7, msg=name
        )


@pytest.mark.fast
def test_bfloat16_logits_equal_llamas_when_the_norm_casts_its_input(tmp_path):
    ours, llama = pair()
    llama.save_pretrained(tmp_path)  # loading keeps its rotary buffer in float32; .bfloat16() not
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = ours.bfloat16()
    ids = torch.randint(0, 97, (2, 9))
    assert torch.equal(ours(ids).logits, llama(ids).logits)


@pytest.mark.fast
def test_cached_generation_equals_llamas():
    ours, llama = (model.eval() for model in pair())
    ids = torch.randint(0, 97, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **options), llama.generate(ids, **options))
