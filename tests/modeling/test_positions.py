"""Learned positions: a table added to the token embedding, and treated as a part of it."""

from types import SimpleNamespace

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn

from llmnorm import build_config, build_model, self_test
from llmnorm.environment import parameter_counts
from llmnorm.errors import SelfTestError
from llmnorm.training.constraints import Constraints
from llmnorm.training.environment import flops_per_token
from llmnorm.training.optimizer import parameter_groups

TABLE = "model.embed_positions.weight"
ROWS = 16
GREEDY = {"do_sample": False, "pad_token_id": 0}


def build(**overrides):
    shape = {**SHAPE, "max_position_embeddings": ROWS, "position": "learned"}
    return build_model(build_config({**shape, **overrides}), seed=1).eval()


@pytest.mark.fast
def test_the_first_block_reads_token_plus_position_after_the_treatment():
    model = build(embedding="scale").double()
    ids = tokens(2, 9)
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, -1)
    with torch.no_grad():
        first = model(ids, position_ids=positions, output_hidden_states=True).hidden_states[0]
    table = model.get_parameter(TABLE)
    by_hand = model.model.embedding_scale.weight * (model.model.embed_tokens.weight[ids])
    by_hand = by_hand + model.model.embedding_scale.weight * table[positions]
    torch.testing.assert_close(first, by_hand)


@pytest.mark.fast
def test_embeddings_given_get_their_positions_too():
    model, ids = build(), tokens(2, 9)
    given = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=given).logits, model(ids).logits)


@pytest.mark.fast
def test_a_scaled_embedding_starts_at_rms_1_positions_included():
    model = build(vocab_size=2048, max_position_embeddings=2048, embedding="scale", hidden_size=64)
    ids = torch.arange(2048)[None]
    with torch.no_grad():
        first = model.model.embedding_scale(
            model.model.embed_positions(model.model.embed_tokens(ids), ids, cached=False)
        )
    assert first.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.fast
def test_nothing_but_the_table_knows_positions():
    """With a table of zeros earlier tokens are exchangeable: queries and keys are not turned."""
    model, ids = build(num_hidden_layers=1), tokens(2, 11)
    swapped = ids.clone()
    swapped[:, [0, 3]] = ids[:, [3, 0]]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the init, where attention is uniform
            parameter.add_(0.5 * torch.randn(parameter.shape))
        assert not torch.allclose(model(swapped).logits[:, -1], model(ids).logits[:, -1], atol=0.1)
        nn.init.zeros_(model.get_parameter(TABLE))
        torch.testing.assert_close(model(swapped).logits[:, -1], model(ids).logits[:, -1])


@pytest.mark.fast
def test_other_positions_have_no_table():
    for position in ("rope", "none"):
        assert TABLE not in build(position=position).state_dict()


@pytest.mark.fast
def test_a_row_may_be_longer_than_the_table_if_its_documents_are_not():
    model, ids = build(), tokens(1, 2 * ROWS)
    positions = torch.arange(ROWS).repeat(2)[None]
    together = model(ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(part).logits for part in ids.split(ROWS, dim=1)], dim=1)
    torch.testing.assert_close(together, apart, **TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match="the sequence has 17 positions, but the learned table"):
        model(ids[:, : ROWS + 1])
    with pytest.raises(ValueError, match=r"has max_position_embeddings=16; use a shorter sequence"):
        model(ids, position_ids=positions + 1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_to_the_end_of_the_table_and_no_further(cache):
    model, ids = build(), tokens(2, ROWS - 4)
    options = {"cache_implementation": cache, **GREEDY}
    plain = model.generate(ids, max_new_tokens=5, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=5, **options), plain)  # the last is read
    with pytest.raises(ValueError, match="the sequence has 17 positions"):
        model.generate(ids, max_new_tokens=6, **options)


@pytest.mark.fast
@pytest.mark.parametrize("parametrization", ["standard", {"name": "mup", "base_width": 16}])
def test_the_optimizer_treats_the_table_as_the_token_embedding(parametrization):
    model = build(parametrization=parametrization)
    settings = SimpleNamespace(
        name="muon", lr=1e-3, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8, options={}
    )
    groups = parameter_groups(model, settings)
    group = next(group for group in groups if TABLE in group.names)
    assert "model.embed_tokens.weight" in group.names
    assert (group.branch, group.weight_decay, group.lr_factor) == ("adamw", 0.0, 1.0)


@pytest.mark.fast
def test_unit_weights_keep_the_rows_of_the_table_at_length_1():
    model = build(weights="unit")
    table = model.get_parameter(TABLE)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(ROWS))
    with Constraints(model).around(1):
        table.mul_(3)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(ROWS))


@pytest.mark.fast
def test_the_table_counts_as_embedding_and_takes_no_work():
    ours, rope = build(), build(position="rope")
    counts, without = parameter_counts(ours), parameter_counts(rope)
    assert counts["total"] - without["total"] == ROWS * SHAPE["hidden_size"]
    assert counts["non_embedding"] == without["non_embedding"]
    assert flops_per_token(ours, 8) == flops_per_token(rope, 8)


@pytest.mark.fast
def test_a_resized_vocabulary_leaves_the_table_alone():
    model, ids = build(), tokens(2, 9)
    before, table = model(ids).logits, model.get_parameter(TABLE)
    model.resize_token_embeddings(SHAPE["vocab_size"] + 3)
    assert model.get_parameter(TABLE) is table
    torch.testing.assert_close(model(ids).logits[..., : SHAPE["vocab_size"]], before)


@pytest.mark.fast
def test_self_test_names_a_table_that_is_drawn_too_wide_or_lost():
    model = build(hidden_size=64)
    self_test(model, fresh=True)
    with torch.no_grad():
        model.get_parameter(TABLE).mul_(1.5)
    with pytest.raises(SelfTestError, match=r"embed_positions\.weight starts with std 0\.02[89]"):
        self_test(model, fresh=True)
    model.model.embed_positions = nn.Identity()
    with pytest.raises(SelfTestError, match=r"model\.embed_positions\.weight is missing"):
        self_test(model, fresh=False)
