"""Models of stock classes come in, compute the same, and go back as they were."""

from typing import Any

import pytest
import torch
from schemes import SHAPE, tokens
from transformers import PreTrainedModel

from llmnorm import LlmNormForCausalLM, build_config
from llmnorm.export import Form
from llmnorm.export.fitting import fit
from llmnorm.export.form import HEAD
from llmnorm.export.hosts import HOSTS, Host

CLASS = 5e-6  # of the logits' standard deviation: these classes compute norms and RoPE in float32
READABLE = [host for host in HOSTS.values() if host.placement is not None]
IDS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


def stock(host: Host, **settings: Any) -> PreTrainedModel:
    """A float64 model of a host's class with biases and moved weights."""
    given = {**SHAPE, **IDS, "num_hidden_layers": 2, **host.fixed}
    if not host.has("num_key_value_heads"):
        del given["num_key_value_heads"]
    given |= {"layer_types": ["full_attention"] * 2} if host.has("layer_types") else {}
    given |= {"rope_parameters": host.rope(5000.0)} if host.position == "rope" else {}
    given |= {"head_dim": 16} if host.has("head_dim") else {}
    given |= {flag: True for flag in host.biases if flag}
    own = {"query_pre_attn_scalar": 16} if "gemma" in host.name else {}
    own |= {"attention_multiplier": 8**-0.5} if host.name == "granite" else {}
    torch.manual_seed(5)
    model = host.model_class(host.config_class(**{**given, **own, **settings})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def read(host: Host, model: PreTrainedModel) -> LlmNormForCausalLM:
    """Our model of it."""
    config, tensors = model.config, host.read(model)
    names = (*SHAPE, "tie_word_embeddings", "head_dim", "hidden_act")
    shape = {name: getattr(config, name) for name in names if hasattr(config, name)}
    biases = {
        field: any(part in name and name.endswith("_proj.bias") for name in tensors)
        for field, part in (("attention_bias", ".self_attn."), ("mlp_bias", ".mlp."))
    }
    ours = LlmNormForCausalLM(build_config(shape, **biases, **host.scheme(config))).double().eval()
    for name, wanted in ours.state_dict().items():
        if name.endswith("_proj.bias"):
            tensors.setdefault(name, torch.zeros_like(wanted))
    ours.load_state_dict(tensors)
    return ours


@torch.no_grad()
def far(got: torch.nn.Module, wanted: torch.nn.Module) -> float:
    found, true = got(tokens()).logits, wanted(tokens()).logits
    return float((found - true).abs().max() / true.std())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("host", READABLE, ids=lambda host: host.name)
def test_a_stock_model_comes_in_and_goes_back_as_it_was(host, tied):
    model = stock(host, tie_word_embeddings=tied)
    ours = read(host, model)
    assert far(ours, model) < CLASS
    found = fit(Form.of(ours), host.name)
    back, state = host.write(found.form, torch.float64), dict(model.state_dict())
    if found.form.tied:
        del state[f"{HEAD}.weight"]
    assert found.form.tied == (tied and host.name != "granite")  # whose table is scaled
    for name, tensor in state.items() if found.form.tied == tied else ():
        torch.testing.assert_close(back.pop(name), tensor, rtol=1e-14, atol=1e-15, msg=name)
    assert back == {} or found.form.tied != tied


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", {"query_pre_attn_scalar": 11}),
        ("gemma3", {"query_pre_attn_scalar": 11}),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}),
        ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
        ("granite", {"residual_multiplier": 0.4, "attention_multiplier": 0.2}),
        ("gpt2", {"n_inner": None, "activation_function": "relu"}),
        ("llama", {"attention_bias": False, "mlp_bias": True, "hidden_act": "gelu"}),
    ],
)
def test_settings_that_llmnorm_holds_otherwise_come_in(name, settings):
    model = stock(HOSTS[name], tie_word_embeddings=True, **settings)
    assert far(read(HOSTS[name], model), model) < CLASS


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("gemma2", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; llmnorm has"),
        ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("llama", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'; llmnorm has 'default'"),
        ("glm4", {"rope_parameters": {"rope_theta": 1e4}}, "partial_rotary_factor is 0.5"),
        ("mistral", {"sliding_window": 32}, "sliding_window is 32; llmnorm has nothing like it"),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True}
            | {"sliding_window": 16},
            "sliding_window is 16, shorter than the context of 64",
        ),
        ("minimax", {}, "MiniMaxForCausalLM can be written, not read"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("gpt_neox", {"use_parallel_residual": True}, "use_parallel_residual is True"),
    ],
)
def test_a_setting_that_llmnorm_does_not_have_is_named_with_its_value(name, settings, words):
    host = HOSTS[name]
    given = {**SHAPE, **IDS, **host.fixed, "num_hidden_layers": 2}
    given |= {"rope_parameters": host.rope(5000.0)} if host.position == "rope" else {}
    with pytest.raises(ValueError, match=words) as told:
        host.scheme(host.config_class(**{**given, **settings}))
    assert "\n" not in str(told.value)


def test_gemma3_has_one_base_of_rope_for_all_layers():
    host = HOSTS["gemma3"]
    rope = {**host.rope(1e6), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    kinds = ["full_attention", "sliding_attention"]
    given = {**SHAPE, **host.fixed, "num_hidden_layers": 2, "layer_types": kinds}
    config = host.config_class(**given, rope_parameters=rope, sliding_window=64)
    with pytest.raises(ValueError, match=r"rope_theta is .*1000000.*10000.*by layer type"):
        host.scheme(config)
