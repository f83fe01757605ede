"""A folded model as a GGUF file: written by `gguf`, read back by transformers with equal logits."""

from pathlib import Path

import gguf
import pytest
import torch
from tools.write_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def llama_folder(request, make_folder, as_llama) -> tuple[Path, Path]:
    """A folder of ours and the stock Llama folder it folds into."""
    ours = make_folder(placement="lns", tie_word_embeddings=request.param)
    return ours, as_llama(ours)


@torch.no_grad()
def test_a_gguf_file_gives_the_models_logits_and_tokens(llama_folder, ids, tmp_path):
    ours, llama = llama_folder
    write_gguf(llama, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert type(read) is LlamaForCausalLM
    stock = LlamaForCausalLM.from_pretrained(llama)
    assert torch.equal(read(ids).logits, stock(ids).logits)
    native = AutoModelForCausalLM.from_pretrained(ours)
    torch.testing.assert_close(read(ids).logits, native(ids).logits, rtol=1e-5, atol=1e-5)
    text = "What is 3 plus 3? It's naïve — 6."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert tokenizer.encode(text, add_special_tokens=False) == AutoTokenizer.from_pretrained(
        llama
    ).encode(text)


def test_query_and_key_rows_are_in_llama_cpps_order(llama_folder, tmp_path):
    _, llama = llama_folder
    write_gguf(llama, tmp_path / "model.gguf")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = LlamaForCausalLM.from_pretrained(llama).state_dict()
    ours = weights["model.layers.1.self_attn.k_proj.weight"].numpy()
    # Of a head of 8 rows the pairs (0, 4), (1, 5), ... turn together; llama.cpp has them adjoin.
    order = [head * 8 + row for head in range(2) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert (tensors["blk.1.attn_k.weight"] == ours[order]).all()
    assert (
        tensors["blk.0.attn_v.weight"] == weights["model.layers.0.self_attn.v_proj.weight"].numpy()
    ).all()
