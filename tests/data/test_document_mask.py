"""A packed row with restarting positions gives each document the logits it has alone."""

from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmnorm.data import GlobalBatches, Prepared

SEQ_LEN = 128


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=prepared.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,  # with a cache transformers builds no mask from the positions
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


def test_masked_packing_equals_separate_documents(
    model: LlamaForCausalLM, prepared: Prepared
) -> None:
    batch = GlobalBatches(
        prepared.split("train"),
        seq_len=SEQ_LEN,
        global_batch_size=4,
        micro_batch_size=4,
        seed=0,
        eos_token_id=prepared.eos_token_id,
        document_mask=True,
    ).step(0)[0]
    starts = (batch["position_ids"] == 0).sum()
    assert starts > 8  # several documents in a row
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
        unmasked = model(batch["input_ids"]).logits
        for ids, positions, logits in zip(
            batch["input_ids"], batch["position_ids"], packed, strict=True
        ):
            borders = [*torch.nonzero(positions == 0).flatten().tolist(), SEQ_LEN]
            for begin, end in pairwise(borders):
                alone = model(ids[None, begin:end]).logits[0]
                torch.testing.assert_close(logits[begin:end], alone, rtol=0, atol=1e-10)
    assert (packed - unmasked).abs().max() > 1e-3  # without the mask documents do see each other
