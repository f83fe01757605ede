"""The evaluation contract, against loops written out by hand in double precision."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmnorm.errors import ConfigError, DataError, EnvironmentProblem
from llmnorm.evaluation.perplexity import (
    IGNORED,
    _own_batches,
    _similar,
    cut,
    score_documents,
    token_nats,
)

pytestmark = pytest.mark.fast

EOT = 0
VOCAB = 61
LENGTHS = [3, 40, 1, 17, 0, 16]


def llama(dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(shape).to(dtype)


def gpt2(dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5
    )
    return GPT2LMHeadModel(shape).to(dtype)


def documents(lengths: list[int] = LENGTHS) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(1)
    return [(rng.integers(1, VOCAB, size=length), 3 * length + 1) for length in lengths]


def nats_one_by_one(model, stream: list[int], seq_len: int, stride: int) -> list[float]:
    """-log p of stream[1:], each from its own forward over nothing but its context."""
    model.eval()
    nats = []
    for target in range(1, len(stream)):
        start = 0
        while start + seq_len < target:
            start += stride
        with torch.no_grad():
            logits = model(torch.tensor([stream[start:target]])).logits[0, -1]
        nats.append(-torch.log_softmax(logits, -1)[stream[target]].item())
    return nats


def loss_by_hand(model, docs, seq_len: int, stride: int) -> float:
    nats = [
        n for ids, _ in docs for n in nats_one_by_one(model, [EOT, *ids.tolist()], seq_len, stride)
    ]
    return math.fsum(nats) / len(nats)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("stride", [16, 5, 1])
def test_every_token_is_scored_once_with_the_context_the_windows_promise(build, stride):
    model, docs = build(), documents()
    score = score_documents(model, docs, eos_token_id=EOT, seq_len=16, stride=stride, batch_size=4)
    assert score.tokens == sum(LENGTHS)
    assert score.loss == pytest.approx(loss_by_hand(model, docs, 16, stride), rel=1e-12)
    assert score.perplexity == pytest.approx(math.exp(score.loss), rel=1e-15)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_the_loss_does_not_depend_on_how_windows_are_batched(batch_size):
    model, docs = llama(), documents()
    one = score_documents(model, docs, eos_token_id=EOT, seq_len=16, batch_size=1)
    many = score_documents(model, docs, eos_token_id=EOT, seq_len=16, batch_size=batch_size)
    assert many.loss == pytest.approx(one.loss, rel=1e-12)
    assert many.tokens == one.tokens


def test_conventions_that_divide_by_something_else_give_other_numbers():
    """Neither the mean of batch means nor the sum over n + 1 batches is what we report."""
    model, docs = llama(), documents([3, 40, 17])
    per_batch = [nats_one_by_one(model, [EOT, *ids.tolist()], 64, 64) for ids, _ in docs]
    means = [sum(nats) / len(nats) for nats in per_batch]
    loss = score_documents(model, docs, eos_token_id=EOT, seq_len=64, batch_size=1).loss
    assert loss == pytest.approx(sum(map(sum, per_batch)) / 60, rel=1e-12)
    assert abs(loss - sum(means) / 3) > 1e-3
    assert abs(loss - sum(means) / 4) > 0.5


def test_bits_per_byte_divides_nats_by_the_bytes_of_the_documents():
    model = llama()
    text = "naïve"  # six bytes in UTF-8
    docs = [(np.array([5, 9, 11]), len(text.encode())), (np.array([], dtype=np.int64), 2)]
    score = score_documents(model, docs, eos_token_id=EOT, seq_len=8)
    nats = nats_one_by_one(model, [EOT, 5, 9, 11], 8, 8)
    assert (score.tokens, score.bytes, score.documents) == (3, 8, 2)
    assert score.bits_per_byte == pytest.approx(sum(nats) / (math.log(2) * 8), rel=1e-12)


def test_a_uniform_model_costs_log_vocab_nats_a_token():
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    score = score_documents(model, documents(), eos_token_id=EOT, seq_len=16)
    assert score.loss == pytest.approx(math.log(VOCAB), rel=1e-12)
    assert score.perplexity == pytest.approx(VOCAB, rel=1e-12)


def test_unknown_bytes_give_no_bits_per_byte():
    score = score_documents(llama(), [(np.array([1, 2]), 0)], eos_token_id=EOT, seq_len=8)
    assert math.isnan(score.bits_per_byte)
    assert math.isfinite(score.loss)


def test_windows_without_overlap_share_only_the_token_between_them():
    stream = np.arange(8)
    windows = [(w.inputs.tolist(), w.targets.tolist()) for w in cut(stream, 3, 3)]
    assert windows == [([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([6], [7])]


def test_overlapping_windows_score_only_what_is_new():
    windows = [(w.inputs.tolist(), w.targets.tolist()) for w in cut(np.arange(7), 4, 2)]
    unscored = IGNORED
    assert windows == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([2, 3, 4, 5], [unscored, unscored, 5, 6]),
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_rank_runs_as_many_forwards_and_every_window_is_scored_once(world):
    # sharded engines communicate in each forward, so that a rank more or less would hang
    windows = list(cut(np.arange(200), seq_len=8, stride=8))
    batches = list(_similar(iter(windows), batch_size=4))
    dealt = [list(_own_batches(iter(batches), rank, world)) for rank in range(world)]
    assert {len(own) for own in dealt} == {-(-len(batches) // world)}
    scored = [w.targets[w.targets != IGNORED] for own in dealt for batch in own for w in batch]
    assert sorted(np.concatenate(scored).tolist()) == list(range(1, 200))
    if world == 1:
        assert [[id(w) for w in batch] for batch in dealt[0]] == [
            [id(w) for w in batch] for batch in batches
        ]


def test_logits_of_low_precision_are_widened_before_the_softmax():
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(2)) * 10
    targets = torch.arange(40)
    narrow = logits.to(torch.bfloat16)
    by_hand = narrow.float().logsumexp(-1) - narrow.float()[torch.arange(40), targets]
    nats = token_nats(narrow, targets)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, by_hand, rtol=1e-6, atol=1e-6)
    assert token_nats(logits.double(), targets).dtype == torch.float64


def test_blocks_of_rows_and_the_whole_agree(monkeypatch):
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([1, 2, IGNORED, 4, 5, 6, 0])
    whole = token_nats(logits, targets)
    monkeypatch.setattr("llmnorm.evaluation.perplexity._LOGITS_UPCAST_TOGETHER", 3 * VOCAB)
    torch.testing.assert_close(token_nats(logits, targets), whole, rtol=0, atol=0)
    assert whole[2] == 0


def test_dropout_is_off_and_the_mode_comes_back():
    model = llama()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    first, second = (
        score_documents(model, documents(), eos_token_id=EOT, seq_len=16) for _ in range(2)
    )
    assert first == second
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("autocast", "name"), [(False, "float32"), (True, "bfloat16 autocast")])
def test_the_record_names_the_precision_of_the_computation(autocast, name):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        score = score_documents(llama(torch.float32), documents(), eos_token_id=EOT, seq_len=16)
    assert score.dtype == name


@pytest.mark.parametrize("build", [llama, gpt2])
def test_windows_beyond_the_positions_of_the_model_are_refused(build):
    with pytest.raises(ConfigError, match="seq_len is 65 but the model has 64 positions"):
        score_documents(build(), documents(), eos_token_id=EOT, seq_len=65)


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_that_skips_tokens_is_refused(stride):
    with pytest.raises(ConfigError, match="expected 1 to seq_len"):
        score_documents(llama(), documents(), eos_token_id=EOT, seq_len=16, stride=stride)


def test_ids_beyond_the_vocabulary_are_refused_before_the_model_sees_them():
    docs = [*documents(), (np.array([4, VOCAB]), 2)]
    with pytest.raises(DataError, match=rf"document {len(LENGTHS)} holds token ids from 4 to 61"):
        score_documents(llama(), docs, eos_token_id=EOT, seq_len=16)


def test_an_end_of_text_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="end-of-text is token 61"):
        score_documents(llama(), documents(), eos_token_id=VOCAB, seq_len=16)


def test_nothing_to_score_is_an_error_not_a_nan():
    empty = (np.array([], dtype=np.int64), 0)
    with pytest.raises(DataError, match="2 documents hold no token"):
        score_documents(llama(), [empty, empty], eos_token_id=EOT, seq_len=16)


def test_several_ranks_need_a_process_group():
    with pytest.raises(EnvironmentProblem, match="accelerate launch"):
        score_documents(llama(), documents(), eos_token_id=EOT, seq_len=16, rank=0, world=2)


def test_a_model_that_diverged_gives_an_infinite_perplexity_not_an_overflow():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight *= 1e5
    score = score_documents(model, documents(), eos_token_id=EOT, seq_len=16)
    assert 710 < score.loss < math.inf
    assert score.perplexity == math.inf


@pytest.mark.parametrize("name", ["lm_eval", "lm_eval_pad_heavy"])
def test_exact_token_mean_of_the_reference_vectors(shared_folder, name):
    """Nats and counts of the reference, whose sequences start with a token of their own.

    1e-7 and not the 1e-9 of the vectors: stock Llama computes its norms in float32.
    """
    golden = shared_folder / "golden"
    case = json.loads((golden / "eval" / f"{name}.json").read_text())
    tensors = load_file(golden / "stacks" / "llama_pre_4l_mha.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**case["config"])).double()
    weights = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    model.load_state_dict(weights)
    nats, targets = 0.0, 0
    for batch in case["batches"]:
        for ids, length in zip(batch["input_ids"], batch["lengths"], strict=True):
            tokens = (np.array(ids[1:length]), length)
            score = score_documents(model, [tokens], eos_token_id=ids[0], seq_len=32)
            nats, targets = nats + score.loss * score.tokens, targets + score.tokens
    assert targets == case["target_tokens"]
    assert nats / targets == pytest.approx(
        case["conventions"]["exact_token_mean"]["loss"], rel=1e-7
    )
