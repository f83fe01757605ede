"""What users of transformers expect of a causal language model, for schemes of every wiring."""

import pytest
import torch
from schemes import KINDS, SHAPE, TOLERANCE, tokens
from transformers import AutoModelForCausalLM

from llmnorm import build_config, build_model
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
IDS = tokens(2, 11)


@pytest.fixture(params=KINDS, ids=lambda pair: "-".join(pair))
def model(request) -> LlmNormForCausalLM:
    norm, placement = request.param
    own = placement in ("hybrid_norm", "ngpt")  # norms on queries and keys
    qk_norm = "none" if own else "per_head"
    config = build_config(SHAPE, norm=norm, placement=placement, qk_norm=qk_norm)
    model = build_model(config, seed=1).eval()
    torch.manual_seed(0)
    with torch.no_grad():  # away from the init, where logits are near ties
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def test_attention_implementations_agree(model):
    sdpa = model(IDS).logits
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, sdpa, **TOLERANCE[torch.float32])


@pytest.mark.fast
def test_flash_attention_is_selected_or_says_what_is_missing():
    model = build_model(build_config(SHAPE))
    try:
        model.set_attn_implementation("flash_attention_2")
    except ImportError as error:
        assert "FlashAttention2" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert model.config._attn_implementation == "flash_attention_2"


def test_cached_generation_equals_generation_without_a_cache(model):
    plain = model.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(IDS, **GREEDY), plain)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **GREEDY), plain)


def test_left_padding_does_not_change_what_is_generated(model):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(14) >= 3).long().expand(2, -1)
    generated = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(generated[:, 3:], model.generate(IDS, **GREEDY))


def test_beam_search_reorders_the_cache_rightly(model):
    cached = model.generate(IDS, num_beams=4, **GREEDY)
    assert torch.equal(cached, model.generate(IDS, num_beams=4, use_cache=False, **GREEDY))


def test_hidden_states_and_attentions_are_recorded(model):
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    depth = SHAPE["num_hidden_layers"]
    assert len(output.hidden_states) == depth + 1
    assert len(output.attentions) == depth
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 11))
    first = model.model.embedding_norm(model.model.embedding_scale(model.model.embed_tokens(IDS)))
    assert torch.equal(
        output.hidden_states[0], model.model.streams.close(model.model.streams.open(first))
    )
    assert (output.attentions[-1].triu(1) == 0).all()


def test_logits_to_keep_are_the_last_ones(model):
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, model(IDS).logits[:, -3:])


def test_restarting_positions_keep_documents_apart(model):
    positions = torch.cat([torch.arange(5), torch.arange(6)]).expand(2, -1)
    together = model(IDS, position_ids=positions).logits
    apart = torch.cat([model(IDS[:, :5]).logits, model(IDS[:, 5:]).logits], dim=1)
    torch.testing.assert_close(together, apart, **TOLERANCE[torch.float32])


def test_bfloat16_stays_finite_and_near_float32(model):
    reference = model(IDS, labels=IDS).loss
    model.bfloat16().train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert abs(loss.item() / reference.item() - 1) < 0.02
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_saved_safetensors_load_equal_through_the_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlmNormForCausalLM)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.fast
def test_dropout_acts_in_training_only():
    model = build_model(build_config(SHAPE, attention_dropout=0.5))
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    assert torch.equal(model.eval()(IDS).logits, model(IDS).logits)
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)


@pytest.mark.fast
def test_no_position_makes_earlier_tokens_exchangeable():
    model = build_model(build_config(SHAPE, position="none", num_hidden_layers=1)).eval()
    swapped = IDS.clone()
    swapped[:, [0, 3]] = IDS[:, [3, 0]]
    torch.testing.assert_close(model(swapped).logits[:, -1], model(IDS).logits[:, -1])
    rope = build_model(build_config(SHAPE, num_hidden_layers=1)).eval()
    assert not torch.allclose(rope(swapped).logits[:, -1], rope(IDS).logits[:, -1], atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "formula"),
    [
        ({"hidden_act": "silu"}, lambda g, u: torch.nn.functional.silu(g) * u),
        ({"hidden_act": "gelu"}, lambda g, u: torch.nn.functional.gelu(g) * u),
        ({"mlp": "plain", "hidden_act": "gelu"}, lambda g, u: torch.nn.functional.gelu(u)),
    ],
    ids=["swiglu", "geglu", "gelu"],
)
def test_mlp_formulas(fields, formula):
    mlp = build_model(build_config(SHAPE, **fields)).model.layers[0].mlp.double()
    x = torch.randn(2, 3, SHAPE["hidden_size"], dtype=torch.float64)
    gate = mlp.gate_proj(x) if hasattr(mlp, "gate_proj") else None
    torch.testing.assert_close(mlp(x), mlp.down_proj(formula(gate, mlp.up_proj(x))))


@pytest.mark.fast
@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_takes_the_gains_of_the_logits_along(tied):
    config = build_config(SHAPE, norm="l2norm", placement="ngpt", tie_word_embeddings=tied)
    model, vocab = build_model(config, seed=1).eval(), SHAPE["vocab_size"]
    with torch.no_grad():
        model.logits.weight.uniform_(0.5, 1.5)
    before, gains = model(IDS).logits, model.logits.weight.clone()
    model.resize_token_embeddings(vocab + 3)
    after = model(IDS).logits
    assert torch.equal(model.logits.weight[:vocab], gains)
    assert model.logits.weight[vocab:].tolist() == pytest.approx([model.logits.stored] * 3)
    torch.testing.assert_close(after[..., :vocab], before, **TOLERANCE[torch.float32])
    for matrix in (model.lm_head.weight, model.model.embed_tokens.weight):
        torch.testing.assert_close(matrix.norm(dim=1), torch.ones(vocab + 3))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    kept = model.logits.weight
    model.resize_token_embeddings(vocab + 3)
    assert model.logits.weight is kept
    model.resize_token_embeddings(vocab - 3)
    assert model(IDS % (vocab - 3)).logits.shape[-1] == vocab - 3
